import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import edit
from data.names import legible
from edit.artifacts.variant import same_weights
from edit.backbones.flux import FluxConfig
from edit.inputs.command import print_any_name
from edit.measuring.flops import Flops
from edit.pruning.depth import DepthPruning
from edit.sampling import Sampler
from edit.solvers import Euler
from recipes.apply import main as apply
from recipes.config.schema import Evaluation, Root
from recipes.report.columns import COLUMNS
from recipes.report.evaluate import Work, run
from recipes.report.samples import Reference, sample_and_measure
from recipes.report.yardstick import progress
from recipes.training import finish

ROOT = Path(__file__).parents[3]
DIGITS = {"_target_": "data.sets.digits.Digits"}


@pytest.fixture(scope="module")
def cli():
    spec = spec_from_file_location("eval_cli", ROOT / "eval.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Shared, so that the judge is trained once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def runs(make_dit, tmp_path, monkeypatch) -> Path:
    """Two runs in the working folder, `whole` and `shallow` (a unit dropped), of untrained digit models."""
    monkeypatch.chdir(tmp_path)
    for name in ("whole", "shallow"):
        denoiser = make_dit(in_channels=1, patch_size=4)
        if name == "shallow":
            edit.apply(denoiser, {"depth": DepthPruning(ratio=0.34)})
        edit.save(denoiser, tmp_path / name / "artifact", sampler=Sampler(Euler(4)), data=DIGITS, run={"name": name})
    return tmp_path


@pytest.fixture
def quick(cache) -> list[str]:
    return ["n=24", "rounds=2", f"cache={cache}"]


def results(folder: Path) -> list[dict]:
    return json.loads((folder / "report.json").read_text())["artifacts"]


def test_one_artifact_gives_a_report_in_its_run_folder_with_everything_named(cli, runs, quick, capsys):
    assert cli.main([f"artifact={runs / 'whole'}", "guidance=[1,1.5]", *quick]) == 0
    out = capsys.readouterr().out
    assert str(runs / "whole" / "report.html") in out and "whole w=1.5" in out
    (entry,) = results(runs / "whole")
    plain, guided = entry["results"]
    assert entry["name"] == "whole" and entry["data"] == DIGITS and entry["run"]["name"] == "whole"
    assert len(entry["extractor"]["hash"]) == 12 and "no resizing" in entry["extractor"]["rule"]
    assert entry["reference"]["n"] == 360 and entry["reference"]["judge"]["accuracy"] > 0.98
    assert plain["n"] == 24 and plain["seed"] == [0]
    # an untrained model is far from digits, the training images are near
    assert plain["quality"]["frechet"]["value"] > 10 * entry["reference"]["floor"]
    assert plain["quality"]["frechet"]["spread"] > 0
    assert plain["quality"]["accuracy"]["value"] < 0.5
    assert plain["cost"]["evaluations"] == 4 and guided["cost"]["evaluations"] == 8  # guidance runs two branches
    assert guided["cost"]["macs_per_image"] == 2 * plain["cost"]["macs_per_image"]
    assert plain["cost"]["generation"]["count"] == 2 and plain["cost"]["peak_memory"] > 0
    assert (runs / "whole" / plain["grid"]).is_file()


def test_the_page_of_the_run_is_never_older_than_its_report(cli, runs, quick, capsys):
    words = [f"artifact={runs / 'whole'}", "guidance=1", "n=8", "rounds=0", "features=none"]
    assert cli.main(words) == 0
    assert f"page      {runs / 'whole/index.html'}" in capsys.readouterr().out
    page, report = (runs / "whole" / name for name in ("index.html", "report.json"))
    assert page.stat().st_mtime_ns >= report.stat().st_mtime_ns
    assert not (runs / "index.html").exists()  # no run says that its folder is that of all runs
    page.unlink()
    assert cli.main([*words, "out=apart"]) == 0
    assert not page.exists() and sorted(p.name for p in (runs / "apart").glob("*.html")) == ["report.html"]


def test_the_same_command_gives_the_same_qualities_at_any_batch_size(cli, runs, quick):
    seen = []
    for batch in (16, 24):
        assert cli.main([f"artifact={runs / 'whole'}", f"batch={batch}", "guidance=1", *quick]) == 0
        seen.append(results(runs / "whole")[0]["results"][0]["quality"])
    for name in ("frechet", "nearest_train"):
        # sums of matrix products in another order, seldom enough to move a rounded pixel
        assert seen[0][name]["value"] == pytest.approx(seen[1][name]["value"], rel=1e-2), name


@pytest.mark.parametrize("name", ["run[1]", "it's {a}, [b] = #1 $x_2$", "0x10", os.fsdecode(b"caf\xe9")])
def test_a_run_of_any_name_is_evaluated_by_the_command_that_training_prints(
    cli, runs, cache, capsys, monkeypatch, name
):
    monkeypatch.chdir(runs)
    Path("whole").rename(name)
    Path("shallow").rename("run1")  # which run[1] matches as a pattern
    print_any_name()
    cfg = OmegaConf.structured(Root)
    cfg.name, cfg.backbone = name, {}
    finish(cfg, Path(name) / "artifact")
    (said,) = (w.removeprefix("next      ") for w in capsys.readouterr().out.splitlines() if w.startswith("next"))
    command = ["bash", "-c", f"printf '%s\\0' {said}"]
    python, script, *words = map(os.fsdecode, subprocess.run(command, capture_output=True).stdout.split(b"\0")[:-1])
    assert (python, Path(script).name, len(words)) == ("python", "eval.py", 1)
    assert not name.isprintable() or shlex.split(said)[2:] == words
    assert cli.main([*words, "features=none", "guidance=1", "n=8", "rounds=0"]) == 0
    (told,) = results(Path(name))
    assert told["name"] == legible(name) and not Path("run1/report.json").exists()


@pytest.mark.parametrize(
    "words,sentence",
    {
        "artifact=": "artifact is empty: write artifact=<value>",
        "artifact=file": "no artifact at file: it is a file, expected a folder",
        "artifact=whole out=file": "out=file cannot be written: .*file is no folder",
        "artifact=whole out=file/below": "out=file/below cannot be written: .*file is no folder",
    }.items(),
)
def test_a_file_where_a_folder_is_wanted_is_told_before_any_work(cli, runs, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(runs)
    Path("file").write_text("mine")
    monkeypatch.setattr(cli, "run", lambda *_: pytest.fail("it was measured"))
    assert cli.main(words.split()) == 2
    assert re.fullmatch(f"error: {sentence}.*\n", capsys.readouterr().err)


def test_a_name_that_looks_like_markup_or_a_format_is_shown_on_a_terminal(monkeypatch):
    import io

    from rich.console import Console

    screen = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda: Console(file=screen, force_terminal=True, width=100))
    with progress("run {0} [/b] [bold]", 8) as done:
        done(8)
    assert "run {0} [/b] [bold]" in screen.getvalue()


def test_several_artifacts_are_compared_side_by_side_with_the_reference(cli, runs, quick, tmp_path):
    out = tmp_path / "out"
    words = [
        f"artifact={runs / 'whole'}",
        f"artifact=[{runs / 'shallow'}]",
        f"reference={runs / 'whole'}",
        f"out={out}",
    ]
    assert cli.main([*words, "guidance=1", "seed=[0,1]", *quick]) == 0
    whole, shallow = (a["results"][0] for a in results(out))
    assert whole["compared"]["psnr"]["value"] == 100 and whole["compared"]["ssim"]["value"] == pytest.approx(1)
    assert whole["compared"]["perceptual"]["value"] == 0
    assert shallow["compared"]["psnr"]["value"] < 60 and shallow["compared"]["perceptual"]["value"] > 0
    assert shallow["cost"]["macs"] < 0.75 * whole["cost"]["macs"]  # two of three units remain, and the embedders
    assert len(whole["quality"]["frechet"]["values"]) == 2 and "2 seeds" in whole["quality"]["frechet"]["over"]
    page = (out / "report.html").read_text()
    assert page.count("<figure>") == 3 + 4  # real images, two artifacts, and two qualities against two costs


def test_fewer_steps_are_compared_with_the_artifacts_own(cli, runs, quick):
    words = [f"artifact={runs / 'whole'}", f"reference={runs / 'whole'}", "steps=2", "guidance=1"]
    assert cli.main([*words, *quick]) == 0
    (result,) = results(runs / "whole")[0]["results"]
    assert result["cost"]["evaluations"] == 2 and result["compared"]["psnr"]["value"] < 100


def test_an_artifact_that_fails_becomes_a_row_and_the_others_are_measured(cli, runs, quick, tmp_path, capsys):
    shutil.copytree(runs / "whole", runs / "broken")
    file = runs / "broken" / "artifact" / "edits.json"
    described = json.loads(file.read_text().replace("data.sets.digits.Digits", "data.sets.digits.Letters"))
    file.write_text(json.dumps({k: v for k, v in described.items() if k != "checksums"}))
    out = tmp_path / "out"
    assert cli.main([f"artifact={runs}/*", "features=none", "guidance=1", f"out={out}", *quick]) == 1
    entries = {a["name"]: a for a in results(out)}
    assert set(entries) == {"whole", "shallow", "broken"} and "data.sets.digits.Letters" in entries["broken"]["error"]
    # without features, costs and distances to the training set remain
    assert set(entries["whole"]["results"][0]["quality"]) == {"nearest_train"}
    assert "1 of 3 artifacts could not be measured: broken" in capsys.readouterr().err
    assert cli.main([f"artifact={runs / 'broken'}", f"out={out}", *quick]) == 1
    assert "broken/artifact cannot be evaluated: the data set of" in capsys.readouterr().err


def test_training_can_evaluate_its_artifact_at_the_end(runs, cache):
    chosen = Evaluation.of({"n": 8, "guidance": [1.0], "rounds": 0, "cache": str(cache)})
    report = run([runs / "whole" / "artifact"], chosen, runs / "whole")
    assert report["artifacts"][0]["results"][0]["cost"]["forward"] is None
    assert results(runs / "whole") == report["artifacts"]


# ---- variants -------------------------------------------------------------------------------------------------------


@pytest.fixture
def bare() -> list[str]:
    """Without a judge, which takes seconds to train."""
    return ["n=8", "rounds=2", "guidance=1", "features=none"]


FAST = ("variant.fast=reuse", "variant.fast.reuse.interval=4", "variant.few.steps=2")


def test_variants_of_one_artifact_are_rows_beside_it_from_one_load(cli, runs, bare, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr(
        edit, "load", lambda *args, load=edit.load, **more: loaded.append(args[0]) or load(*args, **more)
    )
    assert cli.main([f"artifact={runs / 'whole'}", f"out={runs / 'whole'}", *FAST, *bare]) == 0
    assert loaded == [runs / "whole/artifact"]
    entries = results(runs / "whole")
    assert [a["name"] for a in entries] == ["whole", "whole + fast", "whole + few"]
    assert [a.get("changes") for a in entries] == [None, "reuse interval=4", "steps=2"]
    plain, fast, few = (a["results"][0] for a in entries)
    assert plain["compared"] is None and plain["cost"]["speed"] == {}
    for made in (fast, few):  # of the same noise, and not the same
        assert 10 < made["compared"]["psnr"]["value"] < 100
        assert made["cost"]["macs_per_image"] < 0.6 * plain["cost"]["macs_per_image"]
        assert made["cost"]["speed"]["plain"]["count"] == 2 and "dense" not in made["cost"]["speed"]
    assert (fast["cost"]["evaluations"], few["cost"]["evaluations"]) == (4, 2)
    assert few["cost"]["speed"]["plain"]["median"] > 1.3  # half the work
    shown = {c.name: c for c in COLUMNS}
    held, computed = (
        [shown[f"{name} caches{more}"].value(row) for row in (plain, fast, few)]
        for name, more in (("held by", " per image"), ("computed by", ""))
    )
    c = entries[0]["config"]  # fp32 tokens of two branches of each unit
    tokens = 4 * 2 * c["depth"] * c["hidden_size"] * (c["input_size"] // c["patch_size"]) ** 2
    assert fast["cost"]["held"] == tokens and held == [None, tokens / 2**20, None]
    assert computed == [None, 25.0, None]
    page, table = (runs / "whole/report.html").read_text(), capsys.readouterr().out
    assert "reuse interval=4" in page and "reuse interval=4" in table and "Times as fast as plain" in table
    assert "held by caches per image" in page and "Held by caches: what they remember of one image" in page
    assert page.count("<figure>") == 4 + 1 + 2  # real images once, three rows, what the cache decided, and two plots


def test_variants_do_not_write_over_the_report_of_the_run(cli, runs, bare):
    assert cli.main([f"artifact={runs / 'whole'}", *bare]) == 0
    before = (runs / "whole/report.json").read_text()
    assert cli.main([f"artifact={runs / 'whole'}", *FAST, *bare]) == 0
    assert (runs / "whole/report.json").read_text() == before
    found = json.loads((runs / "reports/whole_fast_few/report.json").read_text())
    assert len(found["artifacts"]) == 3 and found["command"][:2] == ["eval.py", f"artifact={runs / 'whole'}"]


def test_a_report_tells_where_its_artifacts_come_from(cli, runs, bare):
    (runs / "whole/config.yaml").write_text("backbone: {_target_: edit.backbones.dit.DiTConfig}\nname: whole\n")
    (runs / "whole/metrics.csv").write_text("step,train/loss\n10,1.5\n")
    assert cli.main([f"artifact={runs / 'whole'}", "variant.fast=reuse", f"out={runs / 'out'}", *bare]) == 0
    whole, fast = results(runs / "out")
    assert whole["origin"]["losses"] == {"step": [10], "loss": [1.5]} and whole["origin"]["config"]["name"] == "whole"
    assert whole["papers"] == {"DiTConfig": ["2212.09748", "2401.08740", "2501.01423"]}
    assert "origin" not in fast and fast["papers"] == {"Reuse": ["2407.01425"]}
    page = (runs / "out/report.html").read_text()
    assert "arxiv.org/abs/2407.01425" in page and "training loss" in page and "python eval.py" in page


def test_the_plain_images_are_those_of_the_same_noise_whether_kept_or_made_again(cli, runs, bare, monkeypatch):
    seen = []
    for kept in (2**30, 0):
        monkeypatch.setattr(Reference, "KEPT", kept)
        assert (
            cli.main([f"artifact={runs / 'whole'}", f"out={runs / 'whole'}", *FAST, "seed=[0,1]", "batch=5", *bare])
            == 0
        )
        seen.append([a["results"][0]["compared"] for a in results(runs / "whole")])
    assert seen[0] == seen[1] and len(seen[0][1]["psnr"]["values"]) == 2


def test_a_variant_that_changes_nothing_is_the_plain_one(cli, runs, bare):
    assert (
        cli.main([f"artifact={runs / 'shallow'}", f"out={runs / 'shallow'}", "variant.same=none", "steps=2", *bare])
        == 0
    )
    plain, same = (a["results"][0] for a in results(runs / "shallow"))
    assert same["compared"]["psnr"]["value"] == 100 and same["cost"]["macs"] == plain["cost"]["macs"]
    assert same["cost"]["evaluations"] == plain["cost"]["evaluations"] == 2


def test_a_reference_that_is_asked_for_is_that_of_variants_too(cli, runs, bare):
    words = [
        f"artifact={runs / 'shallow'}",
        f"reference={runs / 'whole'}",
        "variant.same=none",
        f"out={runs / 'shallow'}",
    ]
    assert cli.main([*words, *bare]) == 0
    plain, same = (a["results"][0] for a in results(runs / "shallow"))
    assert plain["compared"] == same["compared"] and plain["compared"]["psnr"]["value"] < 100
    assert set(plain["cost"]["speed"]) == {"dense"} and set(same["cost"]["speed"]) == {"dense", "plain"}


def work(fn, device):
    """A stopwatch whose seconds are what is computed: the load of the machine has no part in it."""
    with Flops() as counter:
        fn()
    return counter.total / 1e9


def test_artifacts_are_timed_in_turns_with_the_first_of_them(cli, runs, bare, monkeypatch, tmp_path):
    monkeypatch.setattr("edit.measuring.timing.stopwatch", work)
    out = tmp_path / "out"
    words = [f"artifact={runs / 'whole'}", f"artifact={runs / 'shallow'}", "variant.few.steps=2", f"out={out}"]
    assert cli.main([*words, *bare]) == 0
    assert json.loads((out / "report.json").read_text())["dense"] == "whole"
    speeds = {a["name"]: a["results"][0]["cost"]["speed"] for a in results(out)}
    assert {name: sorted(s) for name, s in speeds.items()} == {
        "whole": [],
        "whole + few": ["dense", "plain"],
        "shallow": ["dense"],
        "shallow + few": ["dense", "plain"],
    }
    few = speeds["shallow + few"]
    assert few["dense"]["median"] > few["plain"]["median"] > 1.2  # fewer units, too


def test_artifacts_of_the_same_weights_share_them(cli, runs, bare, monkeypatch, tmp_path):
    apply([f"artifact={runs / 'whole'}", "edits=reuse", f"out={runs / 'fast'}"])
    seen = []
    monkeypatch.setattr(Work, "compare", lambda self, subject, *_, **__: seen.append(subject.artifact.denoiser))
    paths = [runs / name / "artifact" for name in ("whole", "shallow", "fast")]
    run_quietly(paths, Evaluation.of({"n": 8, "features": "none", "device": "cpu"}), tmp_path / "out")
    whole, shallow, fast = seen
    assert same_weights(whole, fast) and not same_weights(whole, shallow)


def run_quietly(paths, chosen, out):
    with suppress(IndexError):  # nothing was measured
        run(paths, chosen, out)


def test_an_edit_that_needs_training_becomes_a_row_with_the_reason(cli, runs, bare, capsys):
    words = [f"artifact={runs / 'whole'}", f"out={runs / 'whole'}", "variant.mine=lora", "variant.few.steps=2"]
    assert cli.main([*words, *bare]) == 1
    whole, mine, few = results(runs / "whole")
    assert "not training-free" in mine["error"] and "error" not in whole and len(few["results"]) == 1
    assert "1 of 1 artifacts and 2 variants could not be measured: whole + mine" in capsys.readouterr().err
    assert "not training-free" in (runs / "whole/report.html").read_text()


@pytest.mark.parametrize("how", [pytest.param(KeyboardInterrupt, marks=pytest.mark.slow), signal.SIGTERM])
def test_what_was_measured_stays_when_the_command_is_stopped(cli, runs, bare, monkeypatch, capsys, how):
    def stopped(subject, *rest, measure=sample_and_measure):
        if subject.name == "whole + few":
            if how is KeyboardInterrupt:
                raise how
            os.kill(os.getpid(), how)
        return measure(subject, *rest)

    monkeypatch.setattr("recipes.report.evaluate.sample_and_measure", stopped)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main([f"artifact={runs / 'whole'}", f"out={runs / 'whole'}", *FAST, *bare]) == 130
    page = runs / "whole/report.html"
    assert capsys.readouterr().err == f"interrupted: 2 of 3 rows are in {page}\n"
    assert [len(a["results"]) for a in results(runs / "whole")] == [1, 1]
    assert "This report is not complete: 2 of 3 rows are measured" in page.read_text()
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    assert cli.main([f"artifact={runs / 'whole'}", f"out={runs / 'whole'}", *FAST, *bare]) == 0
    assert "not complete" not in page.read_text() and json.loads((runs / "whole/report.json").read_text())["complete"]


def test_stopped_before_the_first_row_there_is_no_report(cli, runs, bare, monkeypatch, capsys):
    def stopped(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("recipes.report.evaluate.sample_and_measure", stopped)
    assert cli.main([f"artifact={runs / 'whole'}", *bare]) == 130
    assert capsys.readouterr().err == "interrupted: no row was measured, and no report was written\n"
    assert not (runs / "whole/report.json").exists()


def test_a_row_is_kept_when_a_later_guidance_weight_fails(cli, runs, bare, monkeypatch, tmp_path):
    def diverges(subject, sampler, *rest, measure=sample_and_measure):
        if sampler.guidance == 2 and subject.variant:
            raise ValueError("8 of 8 generated images are not finite")
        return measure(subject, sampler, *rest)

    monkeypatch.setattr("recipes.report.evaluate.sample_and_measure", diverges)
    words = [f"artifact={runs / 'whole'}", f"out={runs / 'whole'}", "variant.few.steps=2", *bare]
    assert cli.main([*(w for w in words if "guidance" not in w), "guidance=[1,2]"]) == 1
    plain, few = results(runs / "whole")
    assert [r["guidance"] for r in plain["results"]] == [1, 2] and [r["guidance"] for r in few["results"]] == [1]
    assert "not finite" in few["error"] and "speed" in few["results"][0]["cost"]
    page = (runs / "whole/report.html").read_text()
    assert "whole + few w=1" in page and "not finite" in page


# ---- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["artefact=runs/a"], "there is no key 'artefact': did you mean artifact?"),
        (["runs/a"], "'runs/a' is no setting: write key=value, such as n=..."),
        (["n=100"], "nothing to evaluate: say artifact=runs/<name>"),
        (["artifact={runs}/whle"], "there is no such folder; did you mean {runs}/whole?"),
        (["artifact={runs}/x*"], "matches no folder with an artifact"),
        (["artifact={runs}/whole", "out=a", "out=b"], "out is given twice"),
        (["artifact={runs}/whole", "n=ten"], "n: expected a whole number, got 'ten'"),
        (["artifact={runs}/whole", "reference={runs}"], "no artifact at"),
        (["artifact={runs}/whole", "device=tpu9"], "device=tpu9 is not on this machine"),
        (["artifact={runs}/whole", "features=nowhere"], "no feature extractor at nowhere"),
        (["artifact={runs}/whole", "variant=reuse"], "variant has no name: write variant.<name>=reuse"),
        (["artifact={runs}/whole", "variannt.a=reuse"], "there is no key 'variannt.a': did you mean variant?"),
        (["artifact={runs}/whole", "variant.a=reuze"], "did you mean 'reuse'"),
        (
            ["artifact={runs}/whole", "variant.a=reuse", "variant.a.reuse.interval=0"],
            "interval: expected int at least 1",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_a_nonzero_exit(cli, runs, cache, capsys, words, sentence):
    cached = [f"cache={cache}"] if any("features" in w for w in words) else []
    assert cli.main([w.format(runs=runs) for w in words] + cached) in (1, 2)
    err = capsys.readouterr().err
    assert sentence.format(runs=runs) in err and err.startswith("error: ") and err.count("\n") == 1


def test_help_and_mistakes_are_answered_without_loading_torch():
    code = "import sys, eval; code = eval.main(sys.argv[1:]); sys.exit(code if 'torch' not in sys.modules else 99)"
    for words, expected in ((["--help"], 0), (["artifact=x", "stepz=3"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == expected, done.stderr
    assert "did you mean steps" in done.stderr


def test_images_that_no_judge_can_see_are_measured_without_one(cli, make_dit, tmp_path, capsys):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            pixels = torch.randint(0, 256, (72, 72, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / "images" / name / f"{i}.png")
    denoiser = make_dit(in_channels=3, patch_size=8, input_size=72, num_classes=2)
    data = {"_target_": "data.sets.image_folder.ImageFolder", "path": str(tmp_path / "images"), "size": 72}
    edit.save(denoiser, tmp_path / "run", sampler=Sampler(Euler(2)), data=data)
    words = [f"artifact={tmp_path / 'run'}", "n=8", "rounds=0", "guidance=1", f"cache={tmp_path}"]
    assert cli.main(words) == 0
    assert "set features=<folder of a transformers image model>" in " ".join(capsys.readouterr().out.split())
    (entry,) = results(tmp_path / "run")
    assert entry["extractor"] is None and set(entry["results"][0]["quality"]) == {"nearest_train"}
    assert cli.main([*words, "features=judge"]) == 1
    assert "labelled images of at most 64 pixels" in capsys.readouterr().err


def test_what_a_teacher_made_of_an_embedded_world_is_measured_as_that_world(tmp_path):
    from data.making.generator import generate
    from data.making.request import Request
    from data.sets.toy_text import LENGTH, ToyText

    world = {"_target_": "data.sets.shapes.Shapes", "count": 24, "held": 12}
    tiny = FluxConfig(48, 1, 1, 12, 2, 64, 64, False, (4, 4, 4), (8, 8)).build()
    teacher = edit.save(tiny, tmp_path / "teacher" / "artifact", sampler=Sampler(Euler(1)), data=world)
    folders = ToyText().write(tmp_path / "text")
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue crosses\n")
    t5, clip = str(folders["text_encoder_2"]), str(folders["text_encoder"])
    work = Request(str(teacher), str(tmp_path / "prompts.txt"), str(tmp_path / "made"), t5, pooled_encoder=clip)
    work = replace(work, max_tokens=LENGTH, padding="zeros", steps=1, device="cpu")
    generate(work, lambda _: None)
    made = {"_target_": "data.sets.latents.Latents", "path": str(tmp_path / "made")}
    edit.save(tiny, tmp_path / "student" / "artifact", sampler=Sampler(Euler(1)), data=made)
    chosen = Evaluation.of({"n": 8, "guidance": 1, "features": "none", "device": "cpu", "rounds": 0})
    report = run([tmp_path / "teacher", tmp_path / "student"], chosen, tmp_path / "out")
    teachers, students = (a["results"][0]["quality"] for a in report["artifacts"])
    assert "prompt_accuracy" in students and students == teachers  # the same weights on the same captions
    assert [a["reference"]["world"] for a in report["artifacts"]] == [None, "Shapes"]


WORDS = ["n=${x}", "n=${oc.env:HOME}", "artifact=/", "artifact=.", "artifact=", "artifact=null", "artifact={a: b}"]
WORDS += ["artifact=[[a]]", "artifact=\udcff", "=", "+=", "++", "~", "foo", "a.b.c=", "artifact=[", "n.x=1", "n=[1,2]"]


@pytest.mark.parametrize("word", WORDS, ids=ascii)
def test_a_word_that_means_nothing_is_one_sentence(word, cli, capsys):
    assert cli.main([word]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_a_report_cannot_be_told_the_environment(cli, capsys):
    assert cli.main(["features=${oc.env:HOME}"]) == 2
    assert "'features=${oc.env:HOME}' refers to something" in capsys.readouterr().err


def test_an_error_that_nobody_foresaw_is_one_sentence_with_its_type(cli, capsys, monkeypatch):
    monkeypatch.setattr(cli, "folders", lambda given: {}["x"])
    assert cli.main(["artifact=a"]) == 1
    assert capsys.readouterr().err == "error: KeyError: 'x'; debug=true shows the traceback\n"
