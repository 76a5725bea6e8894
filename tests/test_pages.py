"""The check of pages (`pages.py`) itself: it finds each kind of fault, and none in a page without."""

from pathlib import Path

from pages import faults, needs_chromium

PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"


def page(folder: Path, body: str, style: str = "") -> Path:
    file = folder / "page.html"
    style = f":root {{ color-scheme: light dark }} {style}"
    file.write_text(f"<!doctype html><html lang=en><meta charset=utf-8><style>{style}</style><title>t</title>{body}")
    return file


@needs_chromium
def test_a_page_without_faults_has_none(tmp_path):
    (tmp_path / "beside.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>")
    body = "<p>text</p><div style='overflow-x: auto'><div style='width: 3000px'>wide</div></div>"
    body += f"<img alt=dot src='{PIXEL}'><img alt=beside src=beside.svg>"
    body += "<svg width=9 height=9 aria-label=curve></svg><script>'</script>'</script>"
    for dark in (False, True):
        assert faults(page(tmp_path, body), 400, dark) == []


@needs_chromium
def test_each_kind_of_fault_is_found(tmp_path):
    body = "<div style='width: 450px'>wide</div><details><p class=dim>dim</p></details>"
    body += f"<img src='{PIXEL}'><img alt=gone src=gone.png><svg width=9 height=9></svg>"
    style = "@media (prefers-color-scheme: dark) { .dim { color: #555 } }"
    found = faults(page(tmp_path, body, style), 400, dark=True)
    assert len(found) == 6 and found[0].endswith("the window 400"), found
    assert found[1].startswith('<div> "wide" ends at') and found[2].startswith('<p.dim> "dim" has a contrast of')
    assert found[3:5] == ['<img> "" has no alternative text', '<img> "gone" shows nothing']
    assert found[5] == '<svg> "" has no alternative text'
    assert not any("contrast" in fault for fault in faults(page(tmp_path, body, style), 1400, dark=False))
