"""A run leaves its page and the list of runs, whatever its end."""

import json

import pytest
from small_runs import train


def test_a_run_ends_with_its_page_and_the_list_and_says_where(tmp_path, capsys):
    words = ("trainer.max_steps=4", "preview.every=2", "preview.count=10", "sampler.solver.steps=2")
    train(tmp_path, "name=below/a", *words)
    said = capsys.readouterr().out.splitlines()
    place = said.index(f"page      {tmp_path}/below/a/index.html")
    assert said[place + 1] == f"next      python eval.py artifact={tmp_path}/below/a"
    page, index = ((tmp_path / file).read_text() for file in ("below/a/index.html", "index.html"))
    assert "samples at step 4" in page and "trained for 4 steps of 16 images (64 in all) on Digits" in page
    assert page.count('alt="loss over the steps') == 1 and "href='../../index.html'" in page
    assert "href='below/a/index.html'" in index and "finished" in index
    assert json.loads((tmp_path / "below/a/env.json").read_text())["command"] == []  # this test is no command line


def test_a_run_that_fails_leaves_a_page_that_tells_how_far_it_came(tmp_path, monkeypatch):
    from recipes.steps.diffusion import Diffusion

    step = Diffusion.training_step

    def fails(module, batch, index):
        if module.trainer.global_step == 3:
            raise RuntimeError("broken")
        return step(module, batch, index)

    monkeypatch.setattr(Diffusion, "training_step", fails)
    with pytest.raises(RuntimeError, match="broken"):
        train(tmp_path, "name=a")
    assert "stopped at step 3 of 12" in (tmp_path / "a/index.html").read_text()
    assert "stopped at step 3 of 12" in (tmp_path / "index.html").read_text()
