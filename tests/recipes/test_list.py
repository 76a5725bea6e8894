"""The catalogue says what the code says, and tells all of one method in a way that works as printed."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from edit.catalogue import TITLES
from recipes import catalogue
from recipes.catalogue import CONFIGS, ROOT, Entry, entries
from recipes.config.check import check
from recipes.config.sources import register
from recipes.cost import main as cost
from recipes.details import arguments, details, example, worlds
from recipes.list import WRITTEN, main, meant, page
from recipes.variants import variants


@pytest.fixture(scope="module")
def rows() -> list[Entry]:
    return entries()


def test_the_written_catalogue_is_that_of_the_code(rows):
    assert WRITTEN.read_text() == page(rows), "python -m recipes.list --write"


def test_nothing_is_missing_and_everything_named_exists(rows):
    assert {row.kind for row in rows} == set(TITLES)
    names = [row.name for row in rows]
    assert len(names) == len(set(names)) > 50 and {"DiTConfig", "TinyFusion", "OutputKD", "LADD", "Euler"} <= set(names)
    for row in rows:
        assert row.summary and row.change and len(row.change.split()) < 10
        assert f"class {row.name}" in (ROOT / row.file).read_text()
        assert all((CONFIGS / f"{name}.yaml").is_file() for name in row.configs)
        assert all((ROOT / f"benchmarks/claims/{name}.yaml").is_file() for name in row.claims)
        assert row.result or not row.claims
    links = re.findall(r"\]\((?!https)([^)]+)\)", WRITTEN.read_text())
    assert links and all((WRITTEN.parent / link).exists() for link in links)


def test_a_class_of_which_nothing_is_told_is_named_with_what_to_write(monkeypatch):
    told = catalogue.sayings()
    monkeypatch.setattr(catalogue, "sayings", lambda: {k: v for k, v in told.items() if k != "LADD"})
    with pytest.raises(ValueError, match="differ in LADD: say under about.rows"):
        entries()
    monkeypatch.setattr(catalogue, "sayings", lambda: {**told, "Nothing": {}})
    with pytest.raises(ValueError, match="differ in Nothing: there is no such class"):
        entries()


def test_every_claim_is_some_rows(rows):
    claims = {file.stem for file in Path(ROOT / "benchmarks/claims").glob("*.yaml")}
    assert claims == {claim for row in rows for claim in row.claims}


def test_it_is_printed(capsys):
    assert main([]) == 0
    assert all(title in capsys.readouterr().out for title in ["Loss terms"])


# ---- one of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("dydit", ["DyDiT"]),
        ("DYDIT", ["DyDiT"]),
        ("td-lora", ["TDLoRA"]),
        ("lcm", ["Consistency"]),
        ("method/lcm", ["Consistency"]),
        ("heun", ["Heun"]),
        ("backbone/flux", ["FluxConfig"]),
        ("solvers", None),
        ("Few-step", None),
        ("consistency.py", ["Consistency"]),
        ("width", ["FeedForwardWidth", "TextFeedForwardLinear"]),
        ("distill", ["FeatureKD", "OutputKD"]),
        ("2407.01425", ["FORA", "Reuse"]),
    ],
)
def test_a_word_means_a_family_a_class_a_file_a_configuration_or_a_paper(rows, word, names):
    found = meant(word, rows)
    if names is None:
        kind = {"solvers": "solvers", "Few-step": "few_step"}[word]
        assert [e for e in rows if e.kind == kind] == [e for e in found if e.kind == kind] and len(found) > 5
    else:
        assert [e.name for e in found] == names


@pytest.mark.parametrize(
    ("word", "near"), [("dydt", "did you mean dydit"), ("tinyfuson", "tinyfusion"), ("zzz", "all")]
)
def test_a_word_that_means_nothing_is_refused_with_near_ones(capsys, word, near):
    assert main([word]) == 2
    said = capsys.readouterr().err
    assert f"there is no method '{word}'" in said and near in said and said.count("\n") == 1


def test_all_is_told_of_one(rows, capsys):
    assert main(["dydit"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "heads and channel groups by time",
        "https://arxiv.org/abs/2410.03456",
        "edit/routing/dydit.py",
        "configs/method/dydit.yaml",
        "worlds dit_digits, dit_pixels, flux_tiny, flux_wide, shapes32, shapes64, sit_xl_2",
        "try it python train.py experiment=dit_digits/dydit",
        "benchmarks/claims/dit_digits_dydit.yaml",
        "settings, edits.dydit.<name>=<value>",
        "complete=0.15 fraction of the run",
        "bias=null of fresh width routers",
    ):
        assert part in said, part


def test_every_method_is_told_with_its_settings_and_in_short_lines(rows):
    from dataclasses import fields
    from importlib import import_module

    for e in rows:
        text = details(e)
        cls = getattr(import_module(e.place.rpartition(".")[0]), e.name)
        told = [line for part in text.split("\nsettings, ")[1:] for line in part.splitlines()]
        for f in fields(cls):
            assert any(line.startswith(f"  {f.name}=") for line in told), f"{e.name}.{f.name}"
        assert "arXiv" in text or "abs/" in text or not e.papers
        assert "all" not in worlds(e)


def test_help_of_a_field_is_its_argument_or_the_comment_behind_it():
    from edit.pruning.width import FeedForwardWidth
    from edit.solvers import DPMSolver

    assert arguments(FeedForwardWidth)["units"] == "in which units, counted from 0; none given: in all"
    assert arguments(DPMSolver)["shift"] == "of the flow path; ignored for noise predictions"


def test_every_example_is_a_command_that_works_as_printed(rows):
    """What it names is composed and fits the signatures; the commands on FLUX.1-dev and DINOv2 want their weights."""
    register()
    examples = {example(e): e.name for e in rows}
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        for command, name in examples.items():
            words = shlex.split(command)
            assert words[:1] == ["python"], f"{name} has no example: say one in {catalogue.CATALOGUE.name}"
            if words[1] == "train.py":
                assert check(compose("train", words[2:])) == [], command
            elif words[1] == "eval.py":
                told = dict(word.split("=", 1) for word in words[2:])
                assert variants({key: text for key, text in told.items() if key.startswith("variant.")}), command
            else:
                assert words[1:3] == ["-m", "recipes.cost"] and words[3].startswith("backbone=")


def test_a_family_is_listed(capsys):
    assert main(["caching"]) == 0 and "Reuse" in capsys.readouterr().out
    assert main(["pruning"]) == 0
    said = capsys.readouterr().out
    assert "TinyFusion" in said and "LADD" not in said and "Solvers" not in said


def test_the_example_of_a_backbone_costs_it(capsys):
    assert cost(["backbone=wan", "size=tiny"]) == 0
