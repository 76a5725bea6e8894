"""An artifact with training-free edits on top, made by a command."""

import json
import re

import pytest
import torch

import edit
from edit.artifacts.card import origins, recipe
from edit.artifacts.export import ExportSettings, export
from edit.caching.reuse import Reuse
from edit.sampling import Sampler
from edit.solvers import Euler
from recipes.apply import main

DIGITS = {"_target_": "data.sets.digits.Digits"}


@pytest.fixture
def runs(make_dit, tmp_path, monkeypatch):
    """In a folder with the run `whole`, which was started from a published model."""
    monkeypatch.chdir(tmp_path)
    edit.save(make_dit(), "whole/artifact", sampler=Sampler(Euler(4)), data=DIGITS, run={"name": "whole", "step": 7})
    (tmp_path / "whole/config.yaml").write_text("init: someone/model\ntrainer: {max_steps: 7}\n")
    return tmp_path


def test_edits_and_steps_are_applied_to_weights_that_are_not_copied(runs, capsys, batch):
    assert main("artifact=whole edits=reuse edits.reuse.interval=3 steps=2 out=fast".split()) == 0
    assert capsys.readouterr().out == "applied   fast/artifact\n"
    fast, whole = edit.load("fast"), edit.load("whole")
    assert fast.denoiser.applied == {"reuse": Reuse(3)} and fast.sampler == Sampler(Euler(2)) and fast.data == DIGITS
    assert sorted(p.name for p in (runs / "fast/artifact").iterdir()) == ["config.json", "edits.json"]
    torch.testing.assert_close(fast.denoiser(*batch).sample, whole.denoiser(*batch).sample, rtol=0, atol=0)
    assert fast.run["name"] == "fast" and fast.run["step"] == 7 and fast.run["applied"]["to"] == "whole/artifact"


def test_one_on_top_of_another_refers_to_the_weights_at_the_root(runs):
    assert main("artifact=whole edits=reuse edits.reuse.branches=[feed] out=fast".split()) == 0
    more = "edits.more._target_=edit.caching.reuse.Reuse edits.more.branches=[attention]"
    assert main(f"artifact=fast edits=none {more} out=deep/faster".split()) == 0
    described = json.loads((runs / "deep/faster/artifact/edits.json").read_text())
    assert described["refers"]["path"] == "../../../whole/artifact" and list(described["edits"]) == ["reuse", "more"]
    edit.load("deep/faster")


def test_with_copy_it_stands_alone(runs):
    assert main("artifact=whole edits=reuse out=fast copy=true".split()) == 0
    (runs / "whole").rename("elsewhere")
    assert list(edit.load("fast").denoiser.applied) == ["reuse"]


def test_dropped_units_are_written_and_not_referred_to(runs, capsys):
    assert main("artifact=whole edits=depth out=half".split()) == 1
    assert "error: depth: the weights are not those of whole any more: add copy=true\n" == capsys.readouterr().err
    assert not (runs / "half").exists()
    assert main("artifact=whole edits=depth out=half copy=true".split()) == 0
    assert len(edit.load("half").denoiser.units) < 3


def test_a_former_result_is_replaced_and_nothing_else(runs, capsys):
    (runs / "notes").mkdir()
    (runs / "notes/mine.txt").write_text("mine")
    words = "artifact=whole edits=reuse".split()
    assert main([*words, "out=fast"]) == main([*words, "edits.reuse.interval=4", "out=fast"]) == 0
    assert edit.load("fast").denoiser.applied["reuse"].interval == 4
    for out in ("whole", "notes"):
        assert main([*words, f"out={out}"]) == 1
        assert re.search(f"error: out={out} .*: give another out=, or remove it\n", capsys.readouterr().err)
    assert main("artifact=fast edits=none out=fast".split()) == 1  # it is made of itself
    assert edit.load("whole").run["name"] == "whole" and (runs / "notes/mine.txt").exists()


def test_a_card_tells_where_the_weights_come_from(runs):
    assert main("artifact=whole edits=reuse out=fast".split()) == 0
    assert main("artifact=fast edits=none steps=2 copy=true out=copied".split()) == 0
    for name in ("fast", "copied"):
        artifact = runs / name / "artifact"
        assert [o.hub for o in origins(artifact)] == ["someone/model"] and recipe(artifact)["steps"] == 7


def test_it_is_exported(runs, make_flux):
    edit.save(make_flux(), "flux", sampler=Sampler(Euler(4)))
    assert main("artifact=flux edits=none steps=2 out=few".split()) == 0
    folder = export(ExportSettings("few", "exported"))
    flux, out = (edit.load(p).denoiser.state_dict() for p in ("flux", folder))
    assert flux.keys() == out.keys() and all(torch.equal(flux[k], out[k]) for k in flux)
    assert "steps: 2" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ("artifact=whole edits=reuze out=x", 2, "edits=reuze: there is no configs/edits/reuze.yaml; did you mean"),
        ("artifact=whole edits=lora out=x", 1, "lora (LoRA) is not training-free"),
        ("artifact=whole edits=reuse edits.reuse.interval=0 out=x", 1, "edits.reuse.interval: expected int at least 1"),
        ("artifact=whole edits=reuse edits.ruse.interval=2 out=x", 2, "edits has no edit named 'ruse'; did you mean"),
        ("artifact=whole edits=none steps=0 out=x", 2, "edits.steps: expected a whole number from 1 to 10000, got '0'"),
        ("artifact=whole out=x", 2, "edits is missing"),
        ("artifact=whle edits=reuse out=x", 1, "did you mean whole?"),
        ("artefact=whole edits=reuse out=x", 2, "did you mean artifact?"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(runs, capsys, words, code, sentence):
    assert main(words.split()) == code
    err = capsys.readouterr().err
    assert sentence in err and err.startswith("error: ") and err.count("\n") == 1 and not (runs / "x").exists()
