"""Claims are compared seed by seed, and their arms are settings that train.py accepts."""

import json
from math import inf
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from made_runs import made_run
from omegaconf import OmegaConf

from benchmarks.claim import CLAIMS, ROOT, logged, main, plain, reached, spelled, value_of, verdict, within
from recipes.config.check import check
from recipes.config.schema import Evaluation
from recipes.config.sources import register
from recipes.variants import variants


def test_a_winner_must_be_better_on_every_seed():
    assert verdict([3.0, 4.0], [2.0, 3.5], higher=True)["holds"]
    assert verdict([3.0, 4.0], [2.0, 3.5], higher=True)["gain"] == pytest.approx(0.75)
    assert not verdict([3.0, 3.0], [2.0, 3.5], higher=True)["holds"]
    assert verdict([1.0, 2.0], [2.0, 2.5], higher=False)["holds"]
    assert verdict([1.0], [2.0], higher=False)["spread"] is None
    assert not verdict([float("inf"), 1.0], [1.0, float("inf")], higher=False)["holds"]


def test_what_json_cannot_write_is_null():
    assert json.dumps(plain({"a": [1.5, inf], "b": (float("nan"), "c", True)}), allow_nan=False) == (
        '{"a": [1.5, null], "b": [null, "c", true]}'
    )


def test_an_arm_within_the_spread_may_be_worse_by_it_and_no_more():
    assert not within([1.0, 1.1], [1.5, 3.5], higher=True)["holds"]  # by 1.45, of 1.41
    assert within([1.1, 1.2], [1.5, 3.5], higher=True)["holds"]  # by 1.35
    assert not within([1.0, 9.0], [5.5, 5.7], higher=True)["holds"]  # its own noise is no excuse
    assert within([1.0, 1.2], [1.5, 1.7], higher=False)["worse"] == pytest.approx(-0.5)


def test_a_measure_is_found_in_each_part_of_a_report():
    result = {"quality": {"frechet": {"value": 2.0}}, "compared": {"psnr": {"value": 20.0}}, "cost": {"macs": 7}}
    assert value_of(result, "frechet") == 2.0 and value_of(result, "psnr") == 20.0 and value_of(result, "macs") == 7
    assert value_of({"quality": {}, "compared": None}, "psnr") is None


def test_a_column_of_the_log_counts_by_the_mean_of_its_last_tenth(tmp_path):
    rows = "".join(f"{step},{step / 10},\n" for step in range(1, 21))
    (tmp_path / "metrics.csv").write_text(f"step,train/near,train/far\n{rows}")
    assert logged(tmp_path, "train/near") == pytest.approx((1.9 + 2.0) / 2)
    with pytest.raises(SystemExit, match="no column train/far; there are train/near"):
        logged(tmp_path, "train/far")


def test_steps_and_seconds_are_counted_to_the_first_row_that_is_as_good_as_the_others_last(tmp_path):
    for name, losses in {"plain": (3, 2, 1), "fast": (3, 0.9, 0.5), "never": (3, 2, 1.1)}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("data: {batch_size: 8}\n")
        rows = "".join(f"{10 * i},{loss},{4 * i}\n" for i, loss in enumerate(losses, 1))
        (tmp_path / name / "metrics.csv").write_text(f"step,heldout/loss,images_per_second\n{rows}")
    fast, plain, never = (
        reached(tmp_path / name, tmp_path / "plain", "heldout/loss") for name in ("fast", "plain", "never")
    )
    assert fast == (20, pytest.approx(10 * 8 / 4 + 10 * 8 / 8))
    assert plain == (30, pytest.approx(fast[1] + 10 * 8 / 12)) and never == (inf, inf)
    assert verdict([20.0, inf], [30.0, 30.0], higher=False) | {"gains": None} == {
        "gain": -inf, "spread": None, "holds": False, "gains": None
    }  # fmt: skip


@pytest.mark.parametrize("seeds", ["[-1]", "[4294967296]", "[0.5]", "[]", "0", "[true]", "[nan]"])
def test_seeds_that_no_run_takes_are_refused_before_one_begins(seeds, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.claim.run", lambda *words: pytest.fail("a run was begun"))
    assert main(["flux_tiny_distill", f"seeds={seeds}"]) == 2
    assert "seeds is a list of whole numbers from 0 to 4294967295, got " in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CLAIMS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_arm_composes_and_those_that_are_judged_are_among_them(path):
    claim = OmegaConf.load(path)
    told = OmegaConf.to_container(claim, resolve=False)
    changed, learned = told.get("variants", {}), told.get("arms", {})
    arms = {**changed, **learned}
    judged = [claim.winner] if "winner" in claim else []
    pairs = (*claim.get("within", []), *claim.get("better", []), *(b[:2] for b in claim.get("at_most", [])))
    judged += [arm for pair in pairs for arm in pair]
    assert judged and set(judged) <= arms.keys() and len(arms) > 1 and len(claim.seeds) >= 3
    assert set(claim.measures.values()) <= {"higher", "lower"}
    trained = [*([claim.model] if changed else []), *learned.values()]
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        for settings in trained:
            assert check(compose("train", [*settings, "name=a", "seed=1"])) == []
    if changed:
        words = [word for arm, changes in changed.items() for word in spelled(arm, changes)]
        made = variants(dict(word.split("=", 1) for word in words))
        assert [v.name for v in made] == list(changed) and all(v.edits() or v.steps for v in made)
        assert not learned or claim.reference in changed
        Evaluation.of(claim.evaluate)


def test_variants_are_measured_once_for_each_seed_on_one_model(monkeypatch, tmp_path):
    """The commands of the training and of the reports, and the verdict over what these say."""
    file = tmp_path / "caches.yaml"
    file.write_text(
        "claim: a\nmodel: [experiment=dit_pixels/teacher]\nartifact: dit_pixels_teacher\nseeds: [3, 5]\n"
        "variants: {one: {edits: reuse, reuse.interval: 3}, few: {steps: 9}}\nbetter: [[one, few]]\n"
        "measures: {psnr: higher}\nat_most: [[one, few, macs, 1.0]]\nevaluate: {n: 8}\n"
    )
    ran = []

    def run(script, *words):
        ran.append((script, *words))
        if script == "eval.py":
            out, seed = words[-1].removeprefix("out="), int(words[-3].removeprefix("seed="))
            rows = [{"name": "m"}] + [
                {"name": arm, "variant": arm, "results": [{"compared": {"psnr": {"value": v}}, "cost": {"macs": 2.0}}]}
                for arm, v in (("one", 20.0 + seed), ("few", 24.0))
            ]
            Path(out).mkdir(parents=True)
            (Path(out) / "report.json").write_text(json.dumps({"artifacts": rows}))

    monkeypatch.setattr("benchmarks.claim.run", run)
    monkeypatch.setattr("benchmarks.claim.CLAIMS", tmp_path)
    assert main(["caches", f"runs={tmp_path}"]) == 0
    assert ran[0] == ("train.py", "experiment=dit_pixels/teacher", f"runs={tmp_path}")
    words = ("variant.one=reuse", "variant.one.reuse.interval=3", "variant.few.steps=9")
    folder = tmp_path / "claims" / "caches"
    read = f"artifact={tmp_path / 'dit_pixels_teacher'}"
    assert ran[1:] == [("eval.py", read, *words, f"seed={s}", "n=8", f"out={folder}/noise_{s}") for s in (3, 5)]
    outcome = json.loads((folder / "claim.json").read_text())
    assert outcome["values"]["one"] == {"macs": [2.0, 2.0], "psnr": [23.0, 25.0]}
    assert outcome["comparisons"][0]["gains"] == [-1.0, 1.0] and not outcome["holds"]
    assert outcome["comparisons"][1]["ratio"] == 1.0 and outcome["comparisons"][1]["holds"]


def test_trained_arms_and_edits_of_one_model_are_measured_in_one_report_of_each_seed(monkeypatch, tmp_path):
    file = tmp_path / "both.yaml"
    file.write_text(
        "claim: a\nmodel: [experiment=dit_pixels/teacher]\nartifact: dit_pixels_teacher\nseeds: [3, 5]\n"
        "arms: {lesa: [experiment=dit_pixels/lesa]}\nreference: all\n"
        "variants: {all: {steps: 50}, one: {edits: reuse, reuse.interval: 3}}\n"
        "better: [[lesa, one]]\nmeasures: {psnr: higher}\nevaluate: {n: 8}\n"
    )
    ran = []

    def run(*words):
        ran.append(words)
        if words[0] == "eval.py":
            out = Path(words[-1].removeprefix("out="))
            paths = [w.removeprefix("artifact=") for w in words if w.startswith("artifact=")]
            found = [20.0, 24.0 if words[-3] == "seed=3" else 19.0, 22.0]
            rows = [
                {"name": p, "path": f"{p}/artifact", "results": [{"compared": {"psnr": {"value": v}}}]}
                for p, v in zip(paths, found, strict=True)
            ]
            out.mkdir(parents=True)
            (out / "report.json").write_text(json.dumps({"artifacts": rows}))

    monkeypatch.setattr("benchmarks.claim.run", run)
    monkeypatch.setattr("benchmarks.claim.CLAIMS", tmp_path)
    assert main(["both", f"runs={tmp_path}", "model.trainer.max_steps=7", "trainer.max_steps=9", "lesa.seed=4"]) == 0
    folder = tmp_path / "claims" / "both"
    assert ran[0] == ("train.py", "experiment=dit_pixels/teacher", f"runs={tmp_path}", "trainer.max_steps=7")
    assert [w[2] for w in ran[1:3]] == ["name=claims/both/lesa_3", "name=claims/both/lesa_5"]
    assert all("trainer.max_steps=9" in w and "seed=4" in w for w in ran[1:3])
    read = f"artifact={tmp_path / 'dit_pixels_teacher'}"
    assert ran[3:5] == [
        ("-m", "recipes.apply", read, "edits=none", "steps=50", f"out={folder}/all"),
        ("-m", "recipes.apply", read, "edits=reuse", "edits.reuse.interval=3", f"out={folder}/one"),
    ]
    measured = [f"artifact={folder}/{name}" for name in ("all", "lesa_3", "one")]
    assert ran[5] == ("eval.py", *measured, f"reference={folder}/all", "seed=3", "n=8", f"out={folder}/noise_3")
    outcome = json.loads((folder / "claim.json").read_text())
    assert outcome["values"] == {"lesa": {"psnr": [24.0, 19.0]}, "one": {"psnr": [22.0, 22.0]}}
    assert outcome["comparisons"][0]["gains"] == [2.0, -3.0] and not outcome["holds"]


def test_the_drift_of_a_swept_setting_is_that_of_the_best_means_of_all_seeds(monkeypatch, tmp_path, capsys):
    (tmp_path / "moved.yaml").write_text(
        "claim: a\nseeds: [3, 5]\narms: {still: [a=1], moves: [a=2]}\nwinner: still\nmeasures: {drift: lower}\n"
        "sweep: {line: size, over: optimizer.lr, by: heldout/loss}\nbound: [[still, drift, 2.0], [moves, drift, 2.0]]\n"
    )
    ran, rates = [], (1.0, 2.0, 4.0, 8.0)
    best = {"still": {"w64": 2.0, "w128": 4.0}, "moves": {"w64": 4.0, "w128": 1.0}}

    def run(script, *words, may_fail=False):
        ran.append((script, *words))
        if script != "train.py":
            return
        arm = words[3].rpartition("/")[2]
        for line, there in best[arm].items():
            for lr, seed in ((lr, seed) for lr in rates for seed in (3, 5)):
                if (arm, line, lr, seed) == ("still", "w128", 8.0, 5):
                    continue  # it has diverged: the other seed's number, which is the least of all, does not count
                loss = 0.01 if (arm, line, lr) == ("still", "w128", 8.0) else 1 + abs(lr - there) + 0.1 * (seed == 5)
                made_run(
                    tmp_path,
                    f"claims/moved/{arm}/{line}_{lr:g}_{seed}",
                    {"optimizer.lr": lr, "seed": seed, "backbone.hidden_size": int(line[1:])},
                    columns={"heldout/loss": (9.0, loss)},
                    command=["train.py", f"size={line}", f"optimizer.lr={lr}", f"seed={seed}"],
                )

    monkeypatch.setattr("benchmarks.claim.run", run)
    monkeypatch.setattr("benchmarks.claim.CLAIMS", tmp_path)
    assert main(["moved", f"runs={tmp_path}", "trainer.max_steps=9"]) == 0
    words = ("seed=3,5", "name=claims/moved/still", f"runs={tmp_path}", "trainer.max_steps=9")
    assert ran[0] == ("train.py", "-m", "a=1", *words) and len(ran) == 3
    assert ran[2] == ("-m", "recipes.sweep", f"runs={tmp_path / 'claims/moved'}", "by=heldout/loss")
    outcome = json.loads((tmp_path / "claims/moved/claim.json").read_text())
    assert outcome["values"]["still"] == {"drift": [2.0], "best at w64": [2.0], "best at w128": [4.0]}
    assert outcome["values"]["moves"] == {"drift": [4.0], "best at w64": [4.0], "best at w128": [1.0]}
    assert [c["holds"] for c in outcome["comparisons"]] == [True, True, False] and not outcome["holds"]
    assert "moves: at w128 the best optimizer.lr is the last of those that were tried" in capsys.readouterr().out


def test_without_a_claim_it_says_which_there_are(capsys):
    assert main([]) == 2 and "flux_tiny_distill" in capsys.readouterr().out
