import pytest
from made_runs import made_run

from recipes.report.sweep_page import html, plot, roles_of
from recipes.report.swept import summarise


def sweep_of(tmp_path, keys, values=2, seeds=1):
    """A full grid over keys; the loss is the sum of the values."""
    grid = [()]
    for _ in keys:
        grid = [(*g, v) for g in grid for v in range(1, values + 1)]
    for place in grid:
        for seed in range(seeds):
            changes = dict(zip(keys, place, strict=True)) | {"seed": seed}
            made_run(tmp_path, "-".join(map(str, (*place, seed))), changes, losses=[sum(place) + seed / 10])
    return summarise(tmp_path)


KEYS = ("optimizer.lr", "backbone.depth", "ema.decay", "label_drop")


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_one_plot_shows_any_number_of_settings_and_says_what_is_left_out(tmp_path, count):
    sweep = sweep_of(tmp_path, KEYS[:count], seeds=2)
    png, caption = plot(sweep)
    assert png.startswith(b"\x89PNG")
    assert ("a line for each" in caption) == (count > 1) and ("a plot for each" in caption) == (count > 2)
    assert ("at the best optimizer.lr=1" in caption) == (count > 3)


def test_an_axis_of_numbers_over_decades_is_logarithmic(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    scales = []
    monkeypatch.setattr(Axes, "set_xscale", lambda self, scale: scales.append(scale))
    for lr in (1e-4, 1e-3, 1e-2):
        made_run(tmp_path / "wide", f"{lr}", {"optimizer.lr": lr})
        made_run(tmp_path / "narrow", f"{lr}", {"optimizer.lr": 1 + lr})
    plot(summarise(tmp_path / "narrow"))
    assert scales == []
    plot(summarise(tmp_path / "wide"))
    assert scales == ["log"]


def test_numbers_are_the_axis_and_words_are_lines(tmp_path):
    for schedule in ("cosine", "constant", "linear"):
        for lr in (1e-3, 2e-3):
            made_run(tmp_path, f"{schedule}{lr}", {"optimizer.schedule": schedule, "optimizer.lr": lr})
    sweep = summarise(tmp_path)
    roles = roles_of(sweep)
    assert [sweep.keys[roles[k]] for k in ("x", "line")] == ["optimizer.lr", "optimizer.schedule"]
    assert plot(sweep) is not None


def test_names_and_values_are_text_in_the_page(tmp_path):
    for value in ("<b>a", "<b>$b"):
        made_run(tmp_path, f"x-{len(value)}", {"optimizer.schedule": value})
    page = html(summarise(tmp_path))
    assert "<b>" not in page and "&lt;b&gt;$b" in page


def test_a_sweep_without_a_number_has_a_page_that_says_so(tmp_path):
    made_run(tmp_path, "a", artifact=False)
    page = html(summarise(tmp_path))
    assert "No run has a number" in page and "no number: a (stopped at step 20 of 20)" in page and "<img" not in page
