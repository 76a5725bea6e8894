"""Flow maps: a model that takes the end time of its step, and the derivatives by which it is trained.

u(z, t, r) is the mean velocity of the way from t to r, so that z_r = z_t - (t - r) u is one step of any length; at
r = t it is the velocity itself. Following the way, d/dt of (t - r) u = z_t - z_r gives the identity that methods train
on, u = v - (t - r) du/dt (MeanFlow, arXiv 2505.13447). Specification: methods/distillation.md, D3.6; a second embedder
with a zero last layer as the input of r is ours there, as is its scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from edit.backbones.dit import TimeEmbed
from edit.denoiser import Denoiser, Edit
from edit.inputs.limits import check_numbers
from edit.losses import Field
from edit.paths import column
from edit.solvers import Euler, Grid, Solver
from edit.stream import Condition, Stream

How = Literal["difference", "jvp"]


@dataclass
class IntervalInput(Edit):
    """A model that hears `Condition.end`: the length t - end of its step is embedded and added to the time.

    The new embedder's last layer is zero, so at first every step is taken with the velocity at its beginning. Asked
    without an end the output equals the unedited model's.

    Args:
        scale: the length is multiplied by this before its sinusoids, whose shortest period is 2 pi; times are by 1000
            in most families, which makes derivatives large
    """

    leads: ClassVar[bool] = True
    keeps: ClassVar[bool] = True
    scale: float = 10.0

    def __post_init__(self):
        check_numbers(self)
        if self.scale <= 0:
            raise ValueError(f"IntervalInput: scale must be positive, got {self.scale}; 10 is the default")

    def apply(self, denoiser: Denoiser) -> nn.Module:
        if denoiser.prediction != "velocity":  # nor has one of those families a plain vector to add to
            raise ValueError(
                f"IntervalInput: a flow map steps along velocities, this {denoiser.name} predicts "
                f"{denoiser.prediction}: use a flow model (SiT, FLUX, SD3, Qwen-Image)"
            )
        if any(e.leads for e in denoiser.applied.values()):
            raise ValueError(f"IntervalInput: this {denoiser.name} is told the end of its steps already: apply it once")
        weight = next(denoiser.parameters())
        self._check_vector(denoiser, weight)
        with weight.device:
            own = TimeEmbed(denoiser.facts.width, 0.0).to(weight.dtype)
        nn.init.zeros_(own.mlp[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(own.mlp[2].bias)  # type: ignore[arg-type]
        return own

    @staticmethod
    @torch.no_grad()
    def _check_vector(denoiser: Denoiser, weight: Tensor) -> None:
        """Refuse a family whose units are modulated by more than one vector of the time: one sample is embedded."""
        x, t = weight.new_zeros(1, *denoiser.sample_shape), torch.ones(1, device=weight.device)
        condition = denoiser.example(1, text=1).map(lambda v: v.to(weight if v.is_floating_point() else weight.device))
        stream = denoiser.embed(**denoiser.pack(x, t, condition))
        if stream.cond is not stream.signal or stream.time is None:
            raise ValueError(
                f"IntervalInput: a step's length is added to one vector that modulates all units, and this "
                f"{denoiser.name} has none: use another flow model (SiT, FLUX, SD3, Qwen-Image)"
            )

    def embed(self, stream: Stream, t: Tensor, condition: Condition, own: nn.Module | None) -> Stream:
        if condition.end is None:
            return stream
        assert own is not None and stream.time is not None
        length = own(self.scale * (t.float() - condition.end.float())).to(stream.cond.dtype)
        cond = stream.cond + length
        return replace(stream, cond=cond, time=stream.time + length, signal=cond)


def need_interval(method: str, student: Denoiser) -> None:
    """Refuse a student without an input for the end of a step.

    Raises:
        ValueError: with the edit that is missing
    """
    if not any(e.leads for e in student.applied.values()):
        raise ValueError(
            f"{method} trains a flow map, but this {student.name} is not told where its steps end: add "
            "+edits.flow_map._target_=edit.few_step.flow_map.IntervalInput"
        )


def check_solver(method: str, solver: Solver) -> None:
    """Refuse a solver that does not tell a flow map where its steps end, or does not end them there.

    Raises:
        ValueError: naming both, and an alternative
    """
    if not isinstance(solver, Euler) and not (isinstance(solver, Grid) and not solver.renoise):
        raise ValueError(
            f"{method} trains straight steps that are told their end, the sampler is {solver}: set sampler.solver to "
            "edit.solvers.Euler, or to edit.solvers.Grid with renoise=false"
        )


def check_difference(method: str, how: str, step: float) -> None:
    """Refuse settings that `derivative` cannot follow."""
    if how not in ("difference", "jvp"):
        raise ValueError(f"{method}: how must be difference or jvp, got {how!r}")
    if step <= 0:
        raise ValueError(f"{method}: step must be positive, got {step}; 1e-2 is the default")


@torch.no_grad()
def derivative(
    f: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    dx: Tensor,
    dt: Tensor,
    how: How = "difference",
    step: float = 1e-2,
) -> Tensor:
    """Of f(x + s dx, t + s dt) by s at s = 0, without a graph and in fp32, whatever the precision of training.

    Both ways call f under the dropout that a call of f right afterwards will have. They are two derivatives rather than
    two ways to one number: most families hear times through sinusoids of 1000 t, whose ripple is most of an exact
    derivative by t, and a step of 1e-2 is the mean of that over three of their shortest periods. On a trained tiny FLUX
    its cosine with the change over +-0.05 is .83, .95 and .95 at t = .3, .6 and .9; that of "jvp", and of the step of
    1e-3 that FastGen takes, is .26, .36 and .90.

    Args:
        f: (x, t) -> shaped as x
        x: b c *sizes
        t: b
        dx: direction, shaped as x
        dt: likewise, b
        how: "difference": central, two calls, works wherever f does; times may leave their range by `step` dt.
            "jvp": forward-mode differentiation, exact, with attention that keeps all weights (memory of tokens
            squared); neither FSDP2 nor compiled units allow it
        step: of "difference", relative to the direction; smooths what is shorter. Where weights themselves are bf16
            (FSDP2 with bf16), rounding is felt below 1e-2
    """
    x, t, dx, dt = x.float(), t.float(), dx.float(), dt.float()

    def at(s: float) -> Tensor:
        with same_dropout(x):
            return f(x + s * dx, t + s * dt).float()

    with torch.autocast(x.device.type, enabled=False):
        if how == "jvp":
            with sdpa_kernel(SDPBackend.MATH), same_dropout(x):  # the other kernels know no tangents
                return torch.func.jvp(f, (x, t), (dx, dt))[1]
        return (at(step) - at(-step)) / (2 * step)


def same_dropout(x: Tensor):
    """A context that leaves the generators behind as it found them."""
    return torch.random.fork_rng([x.device] if x.is_cuda else [])


def mean_velocity(
    student: Field, x_t: Tensor, t: Tensor, v: Tensor, condition: Condition, how: How, step: float
) -> Tensor:
    """Target of u from its own derivative along the path: v - (t - end) du/dt, without a graph.

    Args:
        student: u
        x_t: b c *sizes
        t: b
        v: velocity at x_t, shaped as it
        condition: with its `end`
        how, step: see `derivative`
    """
    assert condition.end is not None
    slope = derivative(lambda x, s: student(x, s, condition), x_t, t, v, torch.ones_like(t), how, step)
    return v - column(t - condition.end, x_t) * slope
