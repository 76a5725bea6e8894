"""TeaCache on scripted signals. `test_engine` has what all caches have in common."""

import pytest
import torch
from caches import executed, family, paint
from gates import UNIT

from edit.caching.tea_cache import FLUX, Accumulated, TeaCache, value_of
from edit.stream import Step
from edit.unit import core


def after(gate: Accumulated, values) -> list[int]:
    state: dict = {}
    steps = [Step(i, len(values), 0.5) for i in range(len(values))]
    return [i for i, v in enumerate(values) if gate.after(UNIT, torch.full((1, 2, 2), v), steps[i], state)]


def test_changes_from_evaluation_to_evaluation_add_up_until_the_threshold():
    """Of 1, 1.1, 1.21, ...: a tenth each; 0.25 is reached at the third after a computed one. First and last are."""
    values = [1.1**i for i in range(9)]
    assert after(Accumulated(0.25, (1.0, 0.0)), values) == [0, 3, 6, 8]
    assert after(Accumulated(0.29, (1.0, 0.0)), values) == [0, 3, 6, 8]  # of the one before, not of the present
    assert after(Accumulated(0.0, (1.0, 0.0)), values) == list(range(9))
    assert after(Accumulated(9.0, (1.0, 0.0)), values) == [0, 8]
    assert after(Accumulated(0.25, (2.0, 0.0)), values) == [0, 2, 4, 6, 8]  # p(d) = 2 d


def test_the_published_polynomial_has_its_highest_power_first():
    assert value_of(FLUX, 0.0) == 0.264230861
    assert value_of(FLUX, 0.1) == pytest.approx(
        498.651651e-4 - 283.781631e-3 + 55.8554382e-2 - 3.82021401e-1 + 0.264230861
    )


def test_what_is_compared_is_what_the_first_attention_reads():
    net, read, compared = family("dit", cache=TeaCache(0.0)), [], []
    core(net.units[0]).attn.qkv.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    paint(net, 3, lambda step, out: compared.append(step.memory["cache", 0, "joint"]["gate"]["entered"]))
    assert len(read) == 3 and all(torch.equal(a, b) for a, b in zip(read, compared, strict=True))


def test_threshold_and_polynomial_reach_the_gate():
    """Of a constant change 0.4, 1 is reached at every third."""
    seen = executed(family("dit", cache=TeaCache(1.0, (0.4,))), 9, "cache")["joint"]
    assert [i for i, shares in enumerate(seen) if shares[0]] == [0, 3, 6, 8]
