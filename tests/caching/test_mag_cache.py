"""MagCache's table is measured on generations of the model; TestGates has its decisions."""

import pytest
import torch
from caches import family, paint, sampler, told

from edit.artifacts.checkpoint import default_objective, load, save
from edit.caching.mag_cache import MagCache
from edit.calibrating import OnData, calibrate


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
