"""The coordinate check on the specification's toy: flat under muP, and steep for every wrong variant of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import edit
from edit.backbones.dit import DiTConfig
from edit.denoiser import Denoiser
from edit.groups import Group
from edit.scaling.coordinates import OUTPUT, Row, Trial, batch_for, coordinates, optimizer_for, slope
from edit.scaling.mup import MuP
from edit.stream import Condition, Stream
from edit.tokens.micro_dit import PatchMixer

HEAD, BASE = 16, 32
WIDTHS = (32, 128, 256)
TRIAL = Trial(steps=4, seeds=1, batch=8, lr=2**-6)  # the toy's rate, at which what is wrong is loud
MILD = Trial(steps=4, seeds=2, lr=0.01)  # the command's, at which a narrow model is not noisier than 0.2


def toy(width: int, mup: MuP) -> Denoiser:
    spec = DiTConfig(4, 4, 2, width, depth=4, num_heads=width // HEAD, num_classes=10)
    return edit.apply(spec.build(), {"mup": mup})


# ---- wrong variants -------------------------------------------------------------------------------------------------


@dataclass
class NoReadout(MuP):
    def apply(self, denoiser: Denoiser) -> None:
        """The multiplier is left out."""


@dataclass
class HiddenUnscaled(MuP):
    def groups(self, denoiser: Denoiser) -> Mapping[str, Group]:
        return {}


@dataclass
class AllScaled(MuP):
    def groups(self, denoiser: Denoiser) -> Mapping[str, Group]:
        return {name: Group(lr=self.base_width / denoiser.facts.width) for name, _ in denoiser.named_parameters()}


@cache
def checked(kind: str, init: str = "normal", trial: Trial = TRIAL) -> Mapping[tuple[str, int], Row]:
    """Rows by module and step. "usual": the base is as wide as the model."""
    classes = {"muP": MuP, "no readout": NoReadout, "hidden unscaled": HiddenUnscaled, "all scaled": AllScaled}

    def build(width: int) -> Denoiser:
        if kind == "usual":
            return toy(width, MuP(width, adaln_init=init))
        return toy(width, classes[kind](BASE, adaln_init=init))

    return {(row.name, row.step): row for row in coordinates(build, WIDTHS, trial)}


def at(kind: str, name: str, step: int) -> float:
    found = checked(kind)[name, step].slope
    assert found is not None
    return found


# ---- oracle 3: slopes as the specification has them -----------------------------------------------------------------


@pytest.mark.parametrize("init", ["normal", pytest.param("zero", marks=pytest.mark.slow)])
def test_mup_is_flat_for_every_module_at_every_step(init):
    rows = checked("muP", init, MILD).values()
    names = {row.name for row in rows}
    assert {"unit.0", "unit.3", "end.norm", OUTPUT, "model.t_embedder.mlp.2", "model.blocks.3.attn.qkv"} <= names
    assert all(row.passes for row in rows)


def test_the_usual_parametrisation_grows_with_the_width():
    assert 0.7 < at("usual", OUTPUT, 1) < 1.3  # 1.18 there
    assert at("usual", "unit.3", 4) > 1.3  # 1.8


@pytest.mark.parametrize(
    ("kind", "name", "step", "low", "high"),
    [
        ("no readout", OUTPUT, 1, 0.7, 1.3),  # 0.94
        ("hidden unscaled", "unit.3", 4, 1.0, 2.0),  # 1.33
        ("all scaled", OUTPUT, 1, -1.4, -0.8),  # -1.04
    ],
)
def test_each_wrong_variant_is_found(kind, name, step, low, high):
    row = checked(kind)[name, step]
    assert low < row.slope < high and not row.passes
    assert checked("muP")[name, step].passes


# ---- what masks tokens ----------------------------------------------------------------------------------------------


@dataclass
class Masked(PatchMixer):
    """Behind the mixer, every second token alone."""

    def embed(self, stream: Stream, t: Tensor, condition: Condition, own: nn.Module | None) -> Stream:
        assert own is not None
        kept = torch.arange(0, stream.image.shape[1], 2).expand(len(t), -1)
        return own(stream, kept)


@dataclass
class MixerUnscaled(MuP):
    def groups(self, denoiser: Denoiser) -> Mapping[str, Group]:
        return {name: group for name, group in super().groups(denoiser).items() if "mixer" not in name}


def masked(mup: type[MuP]) -> list[Row]:
    """Of a mixer as wide as three quarters of the model, from 64 on: narrower ones are noisier than 0.2."""

    def build(size: int) -> Denoiser:
        spec = DiTConfig(4, 4, 1, size, depth=2, num_heads=size // HEAD, num_classes=10)
        return edit.apply(spec.build(), {"mixer": Masked(2, None, HEAD, multiple=8), "mup": mup(64)})

    return coordinates(build, (64, 256), Trial(steps=3, seeds=2, batch=8, lr=0.01))


def test_a_masked_model_with_a_patch_mixer_is_flat():
    rows = masked(MuP)
    names = {row.name for row in rows}
    assert {"unit.0", "edits.mixer.enter.1", "edits.mixer.leave.1", "edits.mixer.blocks.1.mlp.w2"} <= names
    assert [(row.name, row.step, row.slope) for row in rows if not row.passes] == []


@pytest.mark.slow
def test_a_mixer_that_is_trained_at_the_usual_rate_is_found():
    steep = {row.name for row in masked(MixerUnscaled) if row.judged and row.slope > 0.4}
    assert {f"edits.mixer.blocks.{i}.mlp.w2" for i in (0, 1)} <= steep, steep


# ---- the measure ----------------------------------------------------------------------------------------------------


def test_a_slope_is_that_of_the_logarithms_and_zero_has_none():
    assert slope([1, 2, 4, 8], [3, 3 * 2**0.5, 6, 6 * 2**0.5]) == pytest.approx(0.5)
    assert slope([64, 128], [0.0, 1.0]) is None
    assert Row(OUTPUT, 0, (1.0, 0.5), -1.0).passes and not Row(OUTPUT, 1, (1.0, 0.5), -1.0).passes
    assert not Row("unit.0", 0, (1.0, 0.5), -1.0).passes


def test_the_batch_is_the_same_at_every_width_and_groups_multiply_rate_and_decay():
    one, two = toy(32, MuP(BASE)), toy(64, MuP(BASE))
    for a, b in zip(batch_for(one, 3, 1)[:3], batch_for(two, 3, 1)[:3], strict=True):
        assert torch.equal(a, b)
    optimizer = optimizer_for(two, Trial(lr=0.1, weight_decay=0.2))
    rates = {(g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert rates == {(0.1, 0.2), (0.05, 0.4)}


@pytest.mark.parametrize(
    ("widths", "trial", "sentence"),
    [((32,), TRIAL, "at least two widths"), ((32, 64), Trial(seeds=1, lr=1e9), "no number any more after")],
)
def test_what_cannot_be_compared_is_refused(widths, trial, sentence):
    with pytest.raises(ValueError, match=sentence):
        coordinates(lambda width: toy(width, MuP(BASE)), widths, trial)


# ---- oracle 4: rates transfer ---------------------------------------------------------------------------------------


def best(make: Callable[[int], MuP], width: int, exponents: range, steps: int = 80) -> tuple[int, dict[int, float]]:
    """The exponent of the best rate, and the mean loss of the last ten of 80 steps on data that can be learnt."""
    found = {}
    for exponent in exponents:
        torch.manual_seed(0)
        denoiser = toy(width, make(width))
        optimizer, g = optimizer_for(denoiser, Trial(lr=2.0**exponent, eps=1e-10)), torch.Generator().manual_seed(0)
        centres, losses = torch.randn(10, 4, 4, 4, generator=torch.Generator().manual_seed(1)), []
        for _ in range(steps):
            label = torch.randint(10, (32,), generator=g)
            x = centres[label] + 0.1 * torch.randn(32, 4, 4, 4, generator=g)
            noise, t = torch.randn(32, 4, 4, 4, generator=g), torch.rand(32, generator=g)
            s = t[:, None, None, None]
            out = denoiser((1 - s) * x + s * noise, t, Condition(label=label)).sample
            loss = (out - (noise - x)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found[exponent] = sum(losses[-10:]) / 10
    return min(found, key=lambda e: found[e]), found


@pytest.mark.slow
def test_the_best_rate_stays_under_mup_and_falls_with_the_width_without():
    exponents, widths = range(-11, -2), (32, 128, 384)
    mup = {w: best(lambda width: MuP(BASE), w, exponents) for w in widths}
    usual = {w: best(lambda width: MuP(width), w, exponents) for w in widths}
    rates = [mup[w][0] for w in widths]
    assert max(rates) - min(rates) <= 1, rates  # a factor of 2
    fallen = [usual[w][0] for w in widths]
    assert fallen == sorted(fallen, reverse=True) and fallen[0] - fallen[-1] >= 2, fallen
    stable = [e for e in exponents if e <= min(rates)]
    wider = [mup[384][1][e] <= mup[32][1][e] for e in stable]
    assert all(wider), (mup[32][1], mup[384][1])  # wider is better
