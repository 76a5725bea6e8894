"""How a page looks in headless Chromium: what is wider than the window, hard to read, or told only by a picture."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: pages are not looked at")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
)
CONTRAST = 4.5  # WCAG 2, level AA

# The page is looked at in a frame: a window of Chromium is no narrower than 500 px.
FRAME = """<!doctype html><meta charset=utf-8><style>:root {{ color-scheme: {scheme} }} iframe {{ border: 0 }}</style>
<iframe id=frame width={width} height=1200></iframe><script>
const frame = document.getElementById("frame"), found = [];
frame.onload = () => {{
  const page = frame.contentDocument, view = frame.contentWindow;
  if (view.innerWidth !== {width}) found.push(`the window has ${{view.innerWidth}} px, not {width}`);
  if (view.matchMedia("(prefers-color-scheme: dark)").matches !== {dark}) found.push("the window is not {scheme}");
  page.querySelectorAll("details").forEach((e) => {{ e.open = true }});
  look(page, view);
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify([...new Set(found)]);
  document.body.append(out);
}};
{look}
frame.srcdoc = {page};
</script>"""

LOOK = """
const told = (e) => `<${e.localName}${e.className && e.getAttribute("class") ? "." + e.getAttribute("class") : ""}> `
  + `"${(e.textContent || e.alt || "").trim().replace(/\\s+/g, " ").slice(0, 40)}"`;
const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 })
  .getContext("2d", { willReadFrequently: true });
const rgba = (colour) => {
  context.clearRect(0, 0, 1, 1);
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
  return [r, g, b, a / 255];
};
const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ancestors = (e) => e ? [e, ...ancestors(e.parentElement)] : [];

function look(page, view) {
  const style = (e) => view.getComputedStyle(e), all = [...page.body.querySelectorAll("*")];
  const canvas = page.createElement("i");
  canvas.style.background = "Canvas";
  page.body.append(canvas);
  const empty = rgba(style(canvas).backgroundColor);
  canvas.remove();

  // widths
  const scrolls = (e) => ["auto", "scroll"].includes(style(e).overflowX);
  const wide = page.documentElement.scrollWidth;
  if (wide > view.innerWidth) found.push(`the page is ${wide} px wide, the window ${view.innerWidth}`);
  for (const e of all) {
    const box = e.getBoundingClientRect();
    if (!box.width || (box.right <= view.innerWidth + 1 && box.left >= -1)) continue;
    if (!ancestors(e.parentElement).some(scrolls)) found.push(`${told(e)} ends at ${Math.round(box.right)} px`);
  }

  // text
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !e.getClientRects().length || e.closest("style, script")) continue;
    const line = ancestors(e), seen = line.reduce((o, a) => o * style(a).opacity, 1);
    const ground = line.map((a) => rgba(style(a).backgroundColor)).reverse().reduce((g, c) => over(c, g), empty);
    const fill = e.namespaceURI.endsWith("svg") ? style(e).fill : style(e).color;
    const ink = rgba(fill);
    const both = [over([...ink.slice(0, 3), ink[3] * seen], ground), ground];
    const [dark, bright] = both.map(light).sort((a, b) => a - b);
    const contrast = (bright + 0.05) / (dark + 0.05);
    if (contrast < CONTRAST) found.push(`${told(e)} has a contrast of ${contrast.toFixed(2)}`);
  }

  // pictures
  for (const e of page.images) {
    if (!e.alt.trim()) found.push(`${told(e)} has no alternative text`);
    if (!e.naturalWidth) found.push(`${told(e)} shows nothing`);
  }
  for (const e of page.querySelectorAll("svg, canvas")) {
    if (e.parentElement.closest("svg") || e.closest("[aria-hidden=true]")) continue;
    if (!e.getAttribute("aria-label") && !e.querySelector("title")) found.push(`${told(e)} has no alternative text`);
  }
}
""".replace("CONTRAST", str(CONTRAST))


def faults(page: Path, width: int, dark: bool) -> list[str]:
    """What is wrong with a page in a window of this width; folded details are opened.

    - elements that end outside of the window, but for those in a container that scrolls
    - text whose contrast to the background colours of its ancestors is below `CONTRAST`
    - images without an alternative text, or that show nothing

    Args:
        page: an HTML file; what it links to is found beside it
        width: of the window in px
        dark: whether the reader prefers dark pages

    Raises:
        AssertionError: if Chromium did not look at it
    """
    assert CHROMIUM is not None, "no Chromium: mark the test with `needs_chromium`"
    base = f"<base href='{page.absolute().parent.as_uri()}/'>"
    text = re.sub("(?i)^(<!doctype[^>]*>)?", lambda found: found[0] + base, page.read_text().strip(), count=1)
    scheme = "dark" if dark else "light"
    script = json.dumps(text).replace("</", "<\\/")
    frame = FRAME.format(scheme=scheme, width=width, dark=json.dumps(dark), look=LOOK, page=script)
    with tempfile.TemporaryDirectory() as folder:
        wrapper = Path(folder) / "frame.html"
        wrapper.write_text(frame)
        words = [CHROMIUM, *QUIET, f"--user-data-dir={folder}/profile", f"--window-size={max(width, 500) + 40},1400"]
        words += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", wrapper.as_uri()]
        run = subprocess.run(words, capture_output=True, text=True, timeout=120)
    answer = re.search(r'<pre id="found">(.*?)</pre>', run.stdout, re.DOTALL)
    assert answer, f"Chromium did not look at {page}: {run.stderr[-2000:]}"
    return json.loads(unescape(answer[1]))
