"""Claims are compared seed by seed, and their arms are settings that train.py accepts."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from benchmarks.claim import CLAIMS, ROOT, main, value_of, verdict, within
from recipes.config.check import check
from recipes.config.sources import register


def test_a_winner_must_be_better_on_every_seed():
    assert verdict([3.0, 4.0], [2.0, 3.5], higher=True)["holds"]
    assert verdict([3.0, 4.0], [2.0, 3.5], higher=True)["gain"] == pytest.approx(0.75)
    assert not verdict([3.0, 3.0], [2.0, 3.5], higher=True)["holds"]
    assert verdict([1.0, 2.0], [2.0, 2.5], higher=False)["holds"]
    assert verdict([1.0], [2.0], higher=False)["spread"] is None


def test_an_arm_within_the_spread_may_be_worse_by_it_and_no_more():
    assert not within([1.0, 1.1], [1.5, 3.5], higher=True)["holds"]  # by 1.45, of 1.41
    assert within([1.1, 1.2], [1.5, 3.5], higher=True)["holds"]  # by 1.35
    assert not within([1.0, 9.0], [5.5, 5.7], higher=True)["holds"]  # its own noise is no excuse
    assert within([1.0, 1.2], [1.5, 1.7], higher=False)["worse"] == pytest.approx(-0.5)


def test_a_measure_is_found_in_each_part_of_a_report():
    result = {"quality": {"frechet": {"value": 2.0}}, "compared": {"psnr": {"value": 20.0}}, "cost": {"macs": 7}}
    assert value_of(result, "frechet") == 2.0 and value_of(result, "psnr") == 20.0 and value_of(result, "macs") == 7
    assert value_of({"quality": {}, "compared": None}, "psnr") is None


@pytest.mark.parametrize("seeds", ["[-1]", "[4294967296]", "[0.5]", "[]", "0", "[true]", "[nan]"])
def test_seeds_that_no_run_takes_are_refused_before_one_begins(seeds, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.claim.run", lambda *words: pytest.fail("a run was begun"))
    assert main(["flux_tiny_distill", f"seeds={seeds}"]) == 2
    assert "seeds is a list of whole numbers from 0 to 4294967295, got " in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CLAIMS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_arm_composes_and_those_that_are_judged_are_among_them(path):
    claim = OmegaConf.load(path)
    judged = [claim.winner] if "winner" in claim else []
    judged += [arm for pair in (*claim.get("within", []), *(b[:2] for b in claim.get("at_most", []))) for arm in pair]
    assert judged and set(judged) <= claim.arms.keys() and len(claim.arms) > 1 and len(claim.seeds) >= 3
    assert set(claim.measures.values()) <= {"higher", "lower"}
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        for settings in OmegaConf.to_container(claim.arms, resolve=False).values():
            assert check(compose("train", [*settings, "name=a", "seed=1"])) == []


def test_without_a_claim_it_says_which_there_are(capsys):
    assert main([]) == 2 and "flux_tiny_distill" in capsys.readouterr().out
