"""Loads of experts in previews, reports and pages."""

import json

import pytest
import torch
from PIL import Image
from small_runs import train

import edit
from edit.moe.dit_moe import DiTMoE
from edit.objectives import FlowMatching
from edit.sampling import Sampler
from edit.solvers import Euler
from recipes.config.schema import Evaluation
from recipes.report.evaluate import run
from recipes.report.experts_map import Loading, Loads, draw_loads, idle_experts, load_numbers, load_sentence, together

DIGITS = {"_target_": "data.sets.digits.Digits"}


def lazy(make_dit):
    """Experts 1 and 3 of unit 0 never have a token: what reaches their logits is always negative."""
    denoiser = edit.apply(make_dit(depth=2, in_channels=1, patch_size=4), {"moe": DiTMoE(experts=4)})
    layer = denoiser.edits["moe"]["0"]
    layer.router.register_forward_hook(lambda m, i, out: out - 1e4 * torch.tensor([0.0, 1.0, 0.0, 1.0]))
    return denoiser


def test_loads_are_means_over_samples_and_branches_at_each_moment(make_dit):
    denoiser = lazy(make_dit)
    seen, outputs = Loading(denoiser), []
    watch = together(seen, None, lambda step, out: outputs.append(out.trace["moe.0.loads"]))
    condition = denoiser.example(3)
    Sampler(Euler(4), guidance=2.0)(denoiser, FlowMatching(), condition, torch.arange(3), watch=watch)
    found = seen.found()["moe"]
    assert list(found.layers) == ["0", "1"] and list(found.times.values()) == [1.0, 0.75, 0.5, 0.25]
    assert found.shares.shape == (4, 2, 4)
    torch.testing.assert_close(found.shares.sum(2), torch.ones(4, 2))
    for k in range(4):  # both branches are one batch
        torch.testing.assert_close(found.shares[k, 0], outputs[k].mean(0))
    assert (found.shares[:, 0, [0, 2]] == 0.5).all()
    assert together(None, None) is None


def test_numbers_name_the_fullest_and_those_without_a_token():
    shares = torch.tensor([[[0.5, 0.0, 0.5, 0.0], [0.25] * 4], [[0.5, 0.0, 0.5, 0.0], [0.25] * 4]])
    found = load_numbers(Loads({0: 1.0, 1: 0.5}, ["0", "1.text"], shares))
    assert found["layers"] == {"0": 2.0, "1.text": 1.0} and found["fullest"] == 1.5 and found["std_timesteps"] == 0
    assert found["unreached"] == {"0": [1, 3]}
    assert idle_experts(found) == "no token has reached expert 1 of unit 0, 3 of unit 0"
    said = load_sentence(found)
    assert "in unit 0 2.00 times" in said and said.endswith("No token has reached expert 1 of unit 0, 3 of unit 0.")
    many = {"unreached": {"0": list(range(20))}}
    assert idle_experts(many).endswith("11 of unit 0 and 8 more") and idle_experts({"unreached": {}}) == ""


def test_the_picture_has_experts_against_time_and_against_units():
    picture = draw_loads(Loads({i: 1 - i / 9 for i in range(9)}, list("0123"), torch.rand(9, 4, 8).softmax(-1)))
    assert picture.width > 1000 and len(set(picture.tobytes())) > 50


def test_a_report_shows_the_loads_and_warns_of_experts_without_a_token(make_dit, tmp_path, capsys, monkeypatch):
    denoiser = lazy(make_dit)
    with torch.no_grad():  # a hook is not saved: the same by weights, of a token that is never negative there
        denoiser.edits["moe"]["0"].router.weight[[1, 3]] = 0
        denoiser.edits["moe"]["0"].router.weight[0] = 20 * torch.randn(32)
        denoiser.edits["moe"]["0"].router.weight[2] = -denoiser.edits["moe"]["0"].router.weight[0]
    edit.save(denoiser, tmp_path / "run" / "artifact", sampler=Sampler(Euler(3)), data=DIGITS)
    words = {"n": 10, "guidance": [1.0], "rounds": 0, "features": "none", "device": "cpu"}
    run([tmp_path / "run"], Evaluation.of(words), tmp_path / "out")
    (result,) = json.loads((tmp_path / "out" / "report.json").read_text())["artifacts"][0]["results"]
    assert result["routing"]["moe"]["load"]["experts"] == 4
    assert Image.open(tmp_path / "out" / result["routing_maps"]["moe"]).format == "PNG"
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<h2>Experts</h2>") == 1 and "<h2>Routing</h2>" not in page
    assert "the fullest of 4 experts has" in page
    cost = result["cost"]
    assert cost["per_token"] < cost["parameters"] and "share" not in cost  # the work is the same for every image
    idle = result["routing"]["moe"]["load"]["unreached"]
    assert bool(idle) == ("warning: moe: in 10 images no token has reached expert" in capsys.readouterr().out)


def test_a_preview_draws_the_loads_and_the_logger_has_them_beside_the_balance_loss(tmp_path):
    words = ("edits=dit_moe", "edits.dit_moe.experts=4", "preview.every=2", "preview.count=4", "trainer.max_steps=2")
    train(tmp_path, "name=a", *words, "logger=csv", "log_every=1")
    assert Image.open(tmp_path / "a" / "samples" / "experts_dit_moe_000002.png").width > 1000
    (table,) = (tmp_path / "a").rglob("metrics.csv")
    head = table.read_text().splitlines()[0]
    assert all(f"dit_moe/{name}" in head for name in ("balance", "unevenness", "idle"))
    assert "loads of the experts of dit_moe" in (tmp_path / "a" / "index.html").read_text()
    assert pytest.approx(0.005 * 2, rel=0.3) == balance_of(table)


def balance_of(table) -> float:
    head, *rows = table.read_text().splitlines()
    at = next(i for i, name in enumerate(head.split(",")) if name.endswith("dit_moe/balance"))
    return next(float(v) for row in rows if (v := row.split(",")[at]))
