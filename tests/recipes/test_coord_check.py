"""The command: its table, files and exit codes, and what it refuses."""

import json

import pytest

from recipes.coord_check import main

TINY = (
    "backbone=dit_tiny",
    "backbone.depth=1",
    "backbone.patch_size=4",
    "widths=[32,64]",
    "steps=2",
    "seeds=1",
    "batch=4",
)
NAMES = {"unit.0", "end.norm", "end.output", "model.blocks.0.attn.qkv", "model.t_embedder.mlp.2"}


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path / "found"


def test_mup_and_the_usual_parametrisation_are_told_apart_in_table_picture_and_numbers(out, capsys):
    words = (*TINY, "edits=mup", "edits.mup.base_width=32", "lr=0.02", f"out={out}")
    code = main(list(words))
    said = capsys.readouterr().out
    found = json.loads((out / "coord_check.json").read_text())
    assert found["widths"] == [32, 64] and list(found["rows"]) == ["muP", "usual"] == list(found["passes"])
    assert {row["name"] for row in found["rows"]["muP"]} >= NAMES
    assert {row["step"] for row in found["rows"]["muP"]} == {0, 1, 2}
    row = next(r for r in found["rows"]["usual"] if r["name"] == "end.output" and r["step"] == 1)
    assert row["slope"] > 0.5 and not row["passes"] and len(row["sizes"]) == 2
    assert (code == 0) == found["passes"]["muP"] and not found["passes"]["usual"]
    assert (out / "coord_check.png").read_bytes().startswith(b"\x89PNG")
    lines = [line.split() for line in said.splitlines() if line.startswith(("muP ", "usual "))]
    assert [line[0] for line in lines] == ["muP"] * 4 + ["usual"] * 4
    assert lines[6][:3] == ["usual", "output", "–"] and lines[6][-1] == "FAIL"


def test_without_mup_the_model_itself_is_judged_and_fails(out, capsys):
    assert main([*TINY, "lr=0.1", f"out={out}"]) == 1
    assert "no muP is among the edits: add edits=mup" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("widths=[32,40]",), "widths are multiples of the head width 16 of this dit, got 40"),
        (("widths=[32]",), "compares at least two widths, got [32]"),
        (("steps=0",), "steps must be at least 1, got 0"),
        (("edits=mup",), "base_width=64 is above the width 32 of this dit"),
        (("backbone=dit_tyny",), "dit_tiny"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(words, sentence, out, capsys):
    given = [w for w in TINY if w.partition("=")[0] not in {word.partition("=")[0] for word in words}]
    assert main([*given, *words, f"out={out}"]) == 2
    assert sentence in capsys.readouterr().err
    assert not out.exists()


def test_help_tells_every_key(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {key}=" in said for key in ("widths", "lr", "steps", "seeds", "batch", "out"))
