"""Calibration: the same batches and generations in every pass, own noise, and edits in their order."""

from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

import edit
from edit import noise
from edit.caching.reuse import Reuse
from edit.calibrating import OnData, calibrate, calibrates
from edit.objectives import FlowMatching
from edit.sampling import Sampler
from edit.solvers import Euler
from edit.stream import Condition


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "toys"))
    import toy_scale

    return toy_scale


def data(samples=True):
    for k in count():
        draw = torch.arange(3 * k, 3 * k + 3)
        x = {"x": noise.gaussian(7, draw, noise.NOISE, (4, 8, 8))} if samples else {}
        yield {"draw": draw, "label": draw % 10, **x}


def on_data(denoiser, **options):
    sampler = Sampler(Euler(3), guidance=2.0)
    return OnData(denoiser, FlowMatching(), sampler, data, **{"batches": 2, "samples": 4, "seed": 5, **options})


def test_every_pass_has_the_same_noisy_batches_and_the_seed_decides_them(dit):
    first, again, other = (list(on_data(dit, seed=seed)) for seed in (5, 5, 6))
    assert len(first) == len(on_data(dit)) == 2
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a.x_t, b.x_t) and torch.equal(a.t, b.t) and not torch.equal(a.t, c.t)
        assert a.condition.label.tolist() == b.condition.label.tolist()
    x = next(data())["x"]
    eps = noise.gaussian(5, torch.arange(3), noise.NOISE, (4, 8, 8))
    t = first[0].t.view(-1, 1, 1, 1)
    torch.testing.assert_close(first[0].x_t, (1 - t) * x + t * eps)


def test_a_generation_is_the_samplers_and_every_evaluation_is_watched(dit):
    steps, told = [], []
    calibration = on_data(dit, progress=lambda *args: told.append(args), title="a")
    made = calibration.generate(lambda step, output: steps.append((step.index, len(output.sample))))
    assert [len(x) for x in made] == [3, 1]  # four samples from batches of three
    assert steps == [(i, 2 * size) for size in (3, 1) for i in range(3)]  # joint
    numbers = torch.arange(3)
    wanted = calibration.sampler(dit, FlowMatching(), Condition(label=numbers % 10), numbers, 5)
    assert torch.equal(made[0], wanted)
    assert not torch.equal(calibration.generate(seed=6)[0], wanted)
    assert [len(x) for x in calibration.generate(samples=2)] == [2]
    assert told[:2] == [("a: samples 1 to 3 of 4, evaluations", k, 3) for k in (1, 2)]


def test_edits_calibrate_in_order_and_write_their_own_buffers(dit, toys):
    before = {k: v.clone() for k, v in dit.state_dict().items()}
    edit.apply(dit, {"scale": toys.Scale(), "reuse": Reuse(), "watcher": toys.Watcher()})
    assert calibrate(dit, on_data(dit)) == ["scale", "watcher"]
    assert dit.edits["scale"].count == 2 and dit.edits["watcher"].count == 6  # two generations of three evaluations
    scaled = [dit(*noisy).sample.square().mean() for noisy in on_data(dit)]
    assert torch.stack(scaled).mean().sqrt().item() == pytest.approx(1, rel=1e-4)
    assert torch.equal(torch.cat(on_data(dit).generate()).square().mean().sqrt(), dit.edits["watcher"].scale)
    assert all(torch.equal(v, dit.state_dict()[k]) for k, v in before.items())
    assert not any(p.grad_fn for p in dit.buffers())


def test_only_the_edits_that_are_named_calibrate(dit, toys):
    edit.apply(dit, {"a": toys.Scale(), "b": toys.Scale()})
    assert calibrate(dit, on_data(dit), names=["b"]) == ["b"]
    assert dit.edits["a"].count == 0 and dit.edits["b"].count == 2
    assert calibrates(toys.Scale()) and not calibrates(Reuse())


def test_data_of_conditions_alone_give_generations_and_no_batches(dit, toys):
    calibration = replace(on_data(dit), data=lambda: data(samples=False))
    assert len(torch.cat(calibration.generate())) == 4
    edit.apply(dit, {"a": toys.Scale()})
    with pytest.raises(ValueError, match="edit 'a' calibrates on noisy samples, and this data set has conditions only"):
        calibrate(dit, calibration)


def test_a_model_with_a_guidance_input_is_told_the_samplers(make_flux):
    flux = make_flux(guidance_embeds=True)

    def texts():
        yield {"draw": torch.arange(2), "text": torch.ones(2, 5, 24), "pooled": torch.ones(2, 20), "x": x}

    x = torch.zeros(2, 4, 8, 8)
    told = OnData(flux, FlowMatching(), Sampler(Euler(2), told=3.5), texts, batches=1)
    (noisy,) = told
    assert noisy.condition.guidance.tolist() == [3.5, 3.5]
    (noisy,) = replace(told, sampler=Sampler(Euler(2)))
    assert noisy.condition.guidance is None
