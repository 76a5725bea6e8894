"""`benchmarks.all_tools`: every method through every tool. Under `slow` all is run, on as many cores as there are."""

import subprocess
from dataclasses import replace

import pytest

from benchmarks import all_tools
from benchmarks.all_tools import (
    FAILED,
    HOLDS,
    NONE,
    REFUSED,
    TOOLS,
    Case,
    Outcome,
    before,
    cases,
    chosen,
    made,
    markdown,
    parallel,
    read,
    runnable,
    smallest,
)
from recipes.catalogue import CONFIGS, entries
from recipes.config import composed

EXPECTED = {  # tools that a method must pass, whatever else it refuses
    "lcm": TOOLS[:9],
    "elastic": ("plan", "train", "bf16", "resume", "cost", "eval"),
    "dense2moe": ("plan", "train", "bf16", "resume", "cost", "eval", "ddp", "fsdp2"),
}


def ended(code, out="", err=""):
    return subprocess.CompletedProcess(("train.py",), code, out, err)


def test_every_method_is_a_case_on_a_world_that_has_what_it_needs():
    methods = [
        m for m in composed.names(CONFIGS, "method") if composed.about(CONFIGS, "method", m).get("part") is not True
    ]
    found = {case.name: case for case in cases()}
    for method in methods:
        world = found[method].words[0].removeprefix("experiment=").partition("/")[0]
        assert composed.unfit(CONFIGS, world, method) is None


def test_every_edit_term_and_few_step_method_is_in_a_case_or_needs_weights_that_are_not_here():
    told = {
        name for m in composed.names(CONFIGS, "method") for name in composed.about(CONFIGS, "method", m).get("rows", {})
    }
    names = {case.name for case in cases()} | told
    left = {e.name for e in entries() if e.kind in ("edits", "terms", "few_step")} - names
    assert left == {"FixedGuidance"}  # its only command reads FLUX.1-dev


def test_a_method_is_tried_on_the_world_of_the_fewest_tokens():
    assert smallest("lcm") == "dit_digits"  # 4 tokens
    assert smallest("llsa") == "dit_pixels"  # it needs blocks: 64
    assert smallest("flash") == "flux_tiny"  # it needs a guidance input


def test_one_case_of_each_folder_is_trained_on_two_ranks():
    kinds = {case.kind for case in cases()} - {""}
    names = parallel(cases())
    assert sorted(case.kind for case in cases() if case.name in names) == sorted(kinds)
    assert {"moe", "few_step", "routing", "caching", "distillation", "pruning", "alignment"} <= kinds


def test_an_edit_without_training_becomes_an_artifact_of_its_own():
    words = runnable("python eval.py artifact=runs/digits variant.fast=pab")
    assert words == ("recipe=calibrate", "init=${runs}/dit_digits_teacher", "edits=pab")
    steps = runnable("python eval.py artifact=runs/digits variant.fast=table_reuse steps=10")
    assert steps[-1] == "sampler.solver.steps=10"
    assert runnable("python train.py experiment=flux_dev/guidance_free backbone.path=FLUX.1-dev") == ()


def test_runs_before_a_run_are_as_small_as_it_is_to_any_depth():
    found = list(before(["experiment=dit_digits/tinyfusion"], "before"))
    assert "before.teacher.trainer.max_steps=2" in found
    assert "before.search.trainer.max_steps=2" in found
    assert "before.search.before.teacher.data.batch_size=8" in found
    assert not any(word.startswith("before.prune.") for word in found)  # no run: it takes none of these words


@pytest.mark.parametrize(
    "result, outcome",
    [
        (ended(0, "artifact  runs/x"), Outcome(HOLDS)),
        (ended(2, err="error: lr must be positive"), Outcome(REFUSED, "lr must be positive")),
        (ended(1, err="Traceback (most recent call last):\nKeyError: 'x'"), Outcome(FAILED, "KeyError: 'x'")),
        (ended(2, err="Traceback (most recent call last):\nerror: x"), Outcome(FAILED, "error: x")),
        (ended(1, err="error: no such steps"), Outcome(REFUSED, "no such steps")),
        (
            ended(1, err="error: KeyError: 'x'; debug=true shows the traceback"),
            Outcome(FAILED, "error: KeyError: 'x'; debug=true shows the traceback"),
        ),
        (ended(1), Outcome(FAILED, "it ended with code 1 and said nothing")),
    ],
)
def test_one_sentence_is_a_refusal_and_anything_else_a_failure(result, outcome):
    assert read(result) == outcome


def training(monkeypatch, tmp_path, works):
    """The row of a run that works with those settings for which `works` is true."""

    def resumed(self, settings):
        if works(set(settings)):
            return {"train": Outcome(HOLDS), "resume": Outcome(HOLDS)}
        return {"train": Outcome(REFUSED, f"not with {', '.join(settings)}")}

    monkeypatch.setattr(all_tools.Bench, "resumed", resumed)
    row = all_tools.Bench(Case("x", "", ()), tmp_path, tmp_path).training()
    return {tool: one.state for tool, one in row.items()}


def test_the_setting_that_is_refused_is_found_and_the_others_are_still_tried(monkeypatch, tmp_path):
    assert training(monkeypatch, tmp_path, lambda s: "checkpointing" not in s) == {
        "bf16": HOLDS,
        "checkpointing": REFUSED,
        "compile": HOLDS,
        "train": HOLDS,
        "resume": HOLDS,
    }
    assert training(monkeypatch, tmp_path, lambda s: not s & {"compile", "checkpointing"}) == {
        "bf16": HOLDS,
        "checkpointing": REFUSED,
        "compile": REFUSED,
        "train": HOLDS,
        "resume": HOLDS,
    }
    assert training(monkeypatch, tmp_path, lambda s: False) == {"train": REFUSED}  # no setting is to blame


def test_a_run_that_takes_too_long_is_not_tried_again_with_fewer_settings(monkeypatch, tmp_path):
    tried = []

    def resumed(self, settings):
        tried.append(list(settings))
        return {"train": Outcome(FAILED, all_tools.LATE)}

    monkeypatch.setattr(all_tools.Bench, "resumed", resumed)
    assert all_tools.Bench(Case("x", "", ()), tmp_path, tmp_path).training()["train"].said == all_tools.LATE
    assert len(tried) == 1


def test_the_table_has_each_sentence_once_with_the_cases_that_said_it():
    row = {tool: Outcome(HOLDS) for tool in TOOLS} | {
        "export": Outcome(REFUSED, "/tmp/a/lcm/artifact: 'a' stays live: A cannot")
    }
    text = markdown(
        {"lcm": row, "dydit": row | {"export": Outcome(REFUSED, "/tmp/b/dydit/artifact: 'b' stays live: B cannot")}}
    )
    assert "| lcm | holds |" in text
    assert "- export of lcm, dydit: artifact: '...' stays live: it cannot" in text
    assert "Failed" not in text


def test_cases_that_are_done_are_not_made_again(tmp_path):
    row = {tool: Outcome(NONE) for tool in TOOLS} | {"plan": Outcome(FAILED, "as it was", 1.5)}
    file = tmp_path / "rows/lcm.json"
    file.parent.mkdir()
    file.write_text(all_tools.json.dumps({tool: all_tools.asdict(one) for tool, one in row.items()}))
    assert made(tmp_path, chosen(["lcm"]), workers=1) == {"lcm": row}
    assert replace(row["plan"], seconds=0) == Outcome(FAILED, "as it was")


def test_an_unknown_case_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="no case 'lcmm': there are .*lcm"):
        chosen(["lcmm"])


@pytest.mark.slow  # an hour of two cores
def test_no_tool_fails_for_any_method(tmp_path_factory):
    rows = made(tmp_path_factory.mktemp("all"), chosen([]), workers=all_tools.os.cpu_count() or 1)
    print(markdown(rows))
    assert [(n, t, o.said) for n, row in rows.items() for t, o in row.items() if o.state == FAILED] == []
    for name, tools in EXPECTED.items():
        assert {tool: rows[name][tool].state for tool in tools} == dict.fromkeys(tools, HOLDS), name
