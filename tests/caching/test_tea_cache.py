"""TeaCache on scripted signals. `test_engine` has what all caches have in common."""

import pytest
import torch
from gates import UNIT

from edit.caching.tea_cache import FLUX, Accumulated, value_of
from edit.stream import Step


def after(gate: Accumulated, values) -> list[int]:
    state: dict = {}
    steps = [Step(i, len(values), 0.5) for i in range(len(values))]
    return [i for i, v in enumerate(values) if gate.after(UNIT, torch.full((1, 2, 2), v), steps[i], state)]


def test_changes_from_evaluation_to_evaluation_add_up_until_the_threshold():
    """Of 1, 1.1, 1.21, ...: a tenth each; 0.25 is reached at the third after a computed one. First and last are."""
    values = [1.1**i for i in range(9)]
    assert after(Accumulated(0.25, (1.0, 0.0)), values) == [0, 3, 6, 8]
    assert after(Accumulated(0.0, (1.0, 0.0)), values) == list(range(9))
    assert after(Accumulated(9.0, (1.0, 0.0)), values) == [0, 8]
    assert after(Accumulated(0.25, (2.0, 0.0)), values) == [0, 2, 4, 6, 8]  # p(d) = 2 d


def test_the_published_polynomial_has_its_highest_power_first():
    assert value_of(FLUX, 0.0) == 0.264230861
    assert value_of(FLUX, 0.1) == pytest.approx(
        498.651651e-4 - 283.781631e-3 + 55.8554382e-2 - 3.82021401e-1 + 0.264230861
    )
