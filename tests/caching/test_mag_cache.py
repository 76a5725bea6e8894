"""MagCache: its table is measured on generations of the model, and decides as computed by hand."""

import pytest
import torch
from caches import family, paint, sampler, told
from gates import UNIT, stream

from edit.artifacts.checkpoint import load, save
from edit.caching.mag_cache import Budget, MagCache, Ratios, nearest
from edit.calibrating import OnData, calibrate
from edit.predictions import default_objective


def measured(steps: int, length: int = 8, name: str = "dit"):
    net = family(name, cache=MagCache(9.0, most=2, retention=0.0, length=length))
    given = told(net, 4)
    batch = {k: v for k, v in vars(given).items() if v is not None} | {"draw": torch.arange(4)}
    objective = default_objective(net)
    calibration = OnData(net, objective, sampler(net, steps), lambda: iter([batch]), samples=4)
    calibrate(net, calibration)
    return net


def ratios_by_hand(steps: int) -> list[float]:
    """Of what all units add to the tokens, evaluation by evaluation."""
    net, added = family("dit"), []
    first, last = net.units[0], net.units[-1]

    def entering(stream):
        added.append(-stream.image)
        return first(stream)

    def leaving(stream):
        out = last(stream)
        added[-1] = added[-1] + out.image
        return out

    net.units[0], net.units[-1] = entering, leaving
    given = default_objective(net), told(net, 4), torch.arange(4)
    sampler(net, steps)(net, *given)
    norms = [a.norm(dim=-1) for a in added]
    return [1.0, *((b / a).mean().item() for a, b in zip(norms, norms[1:], strict=False))]


def test_the_table_is_the_ratio_of_the_norms_of_what_all_units_add():
    found = measured(8).edits["cache"].table
    torch.testing.assert_close(found, torch.tensor(ratios_by_hand(8)), rtol=1e-5, atol=1e-6)


def test_a_table_of_another_length_has_the_nearest_ratios():
    wanted = ratios_by_hand(8)
    found = measured(8, length=4).edits["cache"].table.tolist()
    assert found == pytest.approx([wanted[i] for i in (0, 2, 5, 7)], rel=1e-5)


def test_measured_again_it_is_the_same_and_it_is_stored_with_the_artifact(tmp_path):
    net = measured(8)
    table, images = net.edits["cache"].table.clone(), paint(net, 8)
    assert not torch.equal(images, paint(family("dit"), 8)), "a table lets evaluations be predicted"
    save(net, tmp_path / "artifact")
    read = load(tmp_path / "artifact").denoiser
    assert torch.equal(read.edits["cache"].table, table) and torch.equal(paint(read, 8), images)


# ---- decisions -------------------------------------------------------------------------------------------------------


def budgeted(table, count: int, **settings) -> list[int]:
    own = Ratios(len(table))
    own.table.copy_(torch.tensor(table))
    gate, state = Budget(MagCache(length=len(table), **settings), own), {}
    return [i for i in range(count) if gate.computes(UNIT, stream(1.0, i, count), state)]


def test_the_error_of_the_magnitude_adds_up_and_runs_in_a_row_are_limited():
    """Ratios of 0.98: errors 0.02, 0.0396 more, 0.0588 more."""
    table = [1.0, *[0.98] * 9]
    assert budgeted(table, 10, threshold=0.06, most=9, retention=0.1) == [0, 3, 6, 9]
    assert budgeted(table, 10, threshold=9.0, most=4, retention=0.1) == [0, 5]
    assert budgeted(table, 10, threshold=9.0, most=9, retention=0.5) == [0, 1, 2, 3, 4]
    assert budgeted(table, 10, threshold=0.0, most=9, retention=0.0) == list(range(10))
    assert budgeted([1.0, *[1.0] * 9], 10, threshold=0.0, most=3, retention=0.0) == [0, 4, 8]


def test_a_table_is_read_at_the_nearest_place():
    assert [nearest(i, 5, 9) for i in range(5)] == [0, 2, 4, 6, 8]
    assert [nearest(i, 9, 5) for i in range(9)] == [0, 0, 1, 2, 2, 2, 3, 4, 4]
    assert nearest(0, 1, 5) == 0


def test_without_a_table_all_is_computed():
    assert budgeted([0.0] * 4, 8) == list(range(8))
