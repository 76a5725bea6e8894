"""The benchmarks' own models do what their tables say."""

import pytest
import torch

from benchmarks.experts import LAYOUTS, both, counted, forward
from benchmarks.masking import counted as masked
from benchmarks.routing import BELOW, DYDIT, ELASTIC, dydit, elastic, executed
from edit.backbones.dit import DiTConfig
from edit.routing.elastic_routers import forced
from edit.stream import Step
from edit.tokens.micro_dit import PatchMixer


@pytest.mark.parametrize("method, budgets", [("elastic", ELASTIC), ("dydit", DYDIT), ("td_lora", DYDIT)])
@torch.no_grad()
def test_the_work_that_is_timed_falls_with_the_budget(method, budgets):
    torch.manual_seed(0)
    dense = DiTConfig(16, 4, 2, 64, 6, 8, num_classes=10).build().eval()
    for p in dense.parameters():
        p.add_(0.02 * torch.randn_like(p))
    inputs = torch.randn(4, 4, 16, 16), torch.full((4,), 0.5), dense.example(4)
    whole = executed(lambda: dense(*inputs))
    shares: list[float] = []
    for budget in budgets:
        step = Step(0, 1, 0.5)
        if method == "elastic":
            model, rule = elastic(dense, budget)
            with forced(model, rule):
                share = executed(lambda model=model, step=step: model(*inputs, step=step)) / whole
        else:
            model = dydit(dense, budget, inputs, BELOW[method])
            share = executed(lambda model=model, step=step: model(*inputs, step=step)) / whole
        # drawn for 24 pairs of units and samples, and a router is a fifth of so small a unit
        shares.append(share)
        assert budget - 0.2 < share < budget + 0.3
    assert shares == sorted(shares, reverse=True) and shares[-1] < 0.8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_do_the_work_of_a_dense_feed_forward_as_wide_as_what_a_token_takes(layout):
    work = {step: counted(layout, 64, 96, torch.float32, step) for step in (forward, both)}
    router = 2 * 96 * 64 * LAYOUTS[layout][0] / 1e9
    found = {name: each["gflop"] for name, each in work[forward].items()}
    assert found["experts"] == pytest.approx(found["activated"] + router) and found["total"] > 2 * found["activated"]
    assert work[both]["experts"]["gflop"] == pytest.approx(3 * found["experts"], rel=0.02)
    assert work[forward]["experts"]["gb"] > work[forward]["activated"]["gb"]


def test_masked_steps_that_are_timed_do_less_the_more_is_dropped_and_a_mixer_costs_its_share():
    work = masked(DiTConfig(16, 4, 2, 64, 6, 4, num_classes=10), PatchMixer(1, None, 16, multiple=16))
    assert work["dense"] == 1 and list(work)[0] == "dense"
    assert 0.45 < work["naive 0.5"] < 0.55 and 0.2 < work["naive 0.75"] < 0.3
    assert 1.05 < work["mixer 0"] < 1.2 and work["naive 0.75"] < work["mixer 0.75"] < work["mixer 0.5"] < 0.7
