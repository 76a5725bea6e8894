"""The command on a made-up sweep: two keys, three seeds, known numbers."""

import re
from html import unescape

import pytest
from made_runs import made_run
from pages import faults, needs_chromium

from recipes.sweep import main

VALUES = {  # Fréchet distances of seeds 0, 1, 2; mean and standard deviation are round numbers
    (1e-3, 2): (3.0, 4.0, 5.0),
    (1e-3, 4): (2.0, 2.0, 5.0),
    (1e-2, 2): (1.5, 2.0, 2.5),
    (1e-2, 4): (7.0, 8.0, 9.0),
}


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for (lr, depth), values in VALUES.items():
        for seed, value in enumerate(values):
            words = [f"optimizer.lr={lr:g}", f"backbone.depth={depth}", f"seed={seed}", "trainer.max_steps=20"]
            made_run(
                tmp_path / "runs",
                f"sweep/depth-{depth}_lr-{lr:g}_seed-{seed}",
                {"optimizer.lr": lr, "backbone.depth": depth, "seed": seed},
                frechet={1.0: value, 1.5: value + 3},
                command=["train.py", *words, f"name=sweep/depth-{depth}_lr-{lr:g}_seed-{seed}"],
            )
    return tmp_path / "runs/sweep"


def test_one_table_one_plot_and_one_command_tell_the_best_setting_with_mean_and_spread(sweep, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["runs=runs/sweep"]) == 0
    said = capsys.readouterr().out
    best = next(line for line in said.splitlines() if line.rstrip().endswith("best"))
    assert best.split() == ["0.01", "2", "2.00", "±", "0.50", "3", "best"]
    assert [line.split()[2] for line in said.splitlines()[1:5]] == ["2.00", "3.00", "4.00", "8.00"]  # best first
    next_ = [line.removeprefix("next      ") for line in said.splitlines() if line.startswith("next")]
    assert next_ == ["python train.py optimizer.lr=0.01 backbone.depth=2 seed=0 name=sweep_best trainer.max_steps=40"]
    assert "page      runs/sweep/sweep.html" in said
    page = (sweep / "sweep.html").read_text()
    assert "href='sweep/sweep.html'" in (sweep.parent / "index.html").read_text()
    row = re.search(r"<tr><td class=best>(.*?)</tr>", page)[1]
    assert [unescape(cell) for cell in re.findall(r"([^<>]+)</td><td class=best>", row)] == [
        "0.01",
        "2",
        "2.00",
        "± 0.50",
    ]
    assert page.count("<img") == 1 and page.count("<pre>") == 1 and next_[0] in page


def test_another_figure_or_weight_is_asked_for_by_name(sweep, capsys):
    assert main(["runs=runs/sweep", "by=train/loss"]) == 0
    assert "training loss: mean of the last tenth" in capsys.readouterr().out
    assert main(["runs=runs/sweep", "guidance=1.5"]) == 0
    assert "5.00" in capsys.readouterr().out
    assert main(["runs=runs/sweep", "by=frchet"]) == 2
    assert "by=frchet: no finished run has it; there is frechet, accuracy" in capsys.readouterr().err
    assert main(["runs=runs/sweep", "guidance=2"]) == 2
    assert "it was measured at 1, 1.5" in capsys.readouterr().err


def test_a_folder_without_runs_is_refused_and_no_words_are_answered_with_help(tmp_path, capsys):
    assert main([f"runs={tmp_path}"]) == 2
    assert "holds no runs: give the folder of a sweep" in capsys.readouterr().err
    assert main([]) == 2 and "by=" in capsys.readouterr().out


@needs_chromium
@pytest.mark.parametrize("width, dark", [(400, False), (1400, True)])
def test_the_page_fits_windows_and_is_legible(sweep, width, dark):
    main(["runs=runs/sweep"])
    assert faults(sweep / "sweep.html", width, dark) == []
