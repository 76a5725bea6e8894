"""pi-Flow (arXiv 2510.14974): one call of the network gives a policy, a velocity field that is followed without it.

At the start (x_s, s) of a segment the student predicts the data as a Gaussian mixture for each latent pixel. The
velocity that this mixture implies at any later point has a closed form, so a segment of many substeps costs one call.
The student is trained on its own path: the policy is followed without a graph, and at a few points of it its velocity
is compared with the teacher's. Specification: methods/distillation.md, D3.10.

Written for stability in velocities u_k = u + o_k and a std in units of s, mean_k = x_s - s u_k and sigma = s r, as the
mixture is parameterised in the release; there is no difference of large numbers as tau or r goes to 0. Choices of ours:
the std is one per pixel, of the tokens (the release: one per sample, of the time embedding); substeps are shared evenly
by the segments; velocities are compared at points (the release: means over 3 substeps), without dropout of components;
a step trains one segment, drawn by its length (the release: all, weighted by it).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import ceil, log, prod
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from edit.denoiser import Denoiser, Edit
from edit.few_step.method import FewStepMethod
from edit.grid import patch_of
from edit.inputs.limits import Count, NotNegative, Steps, check_numbers
from edit.losses import Draws, Seen
from edit.objectives import Objective, Ramp, Weight, shift_times, weight_at
from edit.paths import column, corrupt, mean, move
from edit.solvers import Draw, Path, Query, Solver
from edit.stream import Output, Stream

TRACE = "policy"  # b (k c + k + 1) *sizes: offsets of the velocities, logits, log std
SMALLEST = 1e-4  # smallest time of a velocity


# ---- the policy -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """The student's distribution of the data at (x_s, s), in fp32."""

    x: Tensor  # b c *sizes, where the segment starts
    s: Tensor  # b, when, in (0, 1]
    u: Tensor  # b c *sizes, the model's velocity there
    offsets: Tensor  # b k c *sizes, of the components' velocities from u
    logits: Tensor  # b k *sizes
    std: Tensor  # b 1 *sizes, in units of s

    @staticmethod
    def of(mixture: Tensor, u: Tensor, x: Tensor, s: Tensor) -> Policy:
        """From the head's map b (k c + k + 1) *sizes and the velocity at x_s."""
        c, count = x.shape[1], mixture.shape[1]
        k = (count - 1) // (c + 1)
        offsets, logits, log_std = mixture.float().split((k * c, k, 1), 1)
        return Policy(x.float(), s, u.float(), offsets.unflatten(1, (k, c)), logits, log_std.exp())

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """At the point x [b c *sizes] of the path, at times t [b], 0 < t <= s: the mean over the mixture, given x."""
        t, s, r2 = column(t, x), column(self.s, x), self.std.square()
        q = (t / s).square()
        zeta = ((1 - t).square() - q * (1 - s).square()).clamp_min(0)  # t^2 times that of the specification; so nu
        spread = (q + r2 * zeta).clamp_min(1e-20)
        lead = ((1 - t) * ((1 - t) * self.x - x) + q * (1 - s) * s * self.x) / s  # (zeta x_s - nu) / s
        surprise = (lead - zeta * self.u)[:, None]  # zero where x is what u alone predicts
        fit = (self.offsets * (surprise - 0.5 * zeta[:, None] * self.offsets)).sum(2) / spread
        weights = (self.logits + fit).softmax(1)
        u = self.u + (weights[:, :, None] * self.offsets).sum(1)
        told = u + (x - self.x) / s  # (x - mean) / s
        seen = (1 - s) * t / s**2 * (self.x - (1 - s) * x) - (1 - t) * x
        return (t / s * told + r2 * seen) / spread

    @torch.no_grad()
    def follow(self, x: Tensor, start: Tensor, end: Tensor, substeps: Steps, shift: float) -> Tensor:
        """Euler steps along it, evenly spaced before the shift; start and end [b] are times before the shift."""
        for k in range(substeps):
            t, ahead = (shift_times(torch.lerp(start, end, i / substeps), shift) for i in (k, k + 1))
            x = move(x, self.velocity(x, t), t, ahead)
        return x


def segments(steps: int, last: float, device: torch.device | str = "cpu") -> Tensor:
    """steps + 1 times from 1 to 0 before the shift; the last segment is `last` <= 1 as long as each of the others."""
    return (1 - torch.arange(steps + 1, device=device) / (steps - 1 + last)).clamp_min(0)


# ---- the head -------------------------------------------------------------------------------------------------------


@dataclass
class MixtureHead(Edit):
    """Gives a model its mixture: a norm and a linear layer on the last image tokens, recorded in the trace.

    The components' mean is the model's own prediction at first, and the prediction stays what it was: the head's
    weights start at zero, and biases that cancel each other tell the components apart.

    Args:
        components: Gaussians of a latent pixel
        spread: std of the components' first offsets from the model's velocity
        std: the first std of a component in units of s
    """

    keeps: ClassVar[bool] = True
    records: ClassVar = (TRACE,)
    components: Count = 8
    spread: float = 0.05
    std: float = 0.05

    excludes: ClassVar = ("MixtureHead",)
    subsets: ClassVar[bool] = False

    def __post_init__(self):
        check_numbers(self)
        if self.components < 1:
            raise ValueError(f"MixtureHead: components must be at least 1, got {self.components}")
        if self.spread < 0 or self.std <= 0:
            raise ValueError(
                f"MixtureHead: spread must be at least 0 and std above 0, got {self.spread:g} and {self.std:g}"
            )

    def apply(self, denoiser: Denoiser) -> nn.Module:
        weight = next(denoiser.parameters())
        width, area = self._measure(denoiser, weight.device)
        k, c = self.components, denoiser.sample_shape[0]
        with weight.device:
            head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, area * (k * c + k + 1)))
            offsets = self.spread * torch.randn(k, c)
            offsets -= offsets.mean(0)
            one = torch.cat((offsets.flatten(), torch.zeros(k), torch.full((1,), log(self.std))))
            nn.init.zeros_(head[1].weight)
            with torch.no_grad():
                head[1].bias.copy_(one.repeat(area))
        return head.to(weight.dtype)

    @staticmethod
    @torch.no_grad()
    def _measure(denoiser: Denoiser, device: torch.device) -> tuple[int, int]:
        """Width of an image token and the number of latent pixels it stands for, of any family: one is embedded."""
        x, t = torch.zeros(1, *denoiser.sample_shape, device=device), torch.ones(1, device=device)
        condition = denoiser.example(1, text=1).map(lambda v: v.to(device))
        stream = denoiser.embed(**denoiser.pack(x, t, condition))
        return stream.image.shape[-1], prod(patch_of(denoiser.sample_shape[1:], stream.layout.grid))

    def readout(self, output: Output, stream: Stream, own: nn.Module | None) -> Output:
        assert own is not None
        (frames, rows, columns), sizes = stream.layout.grid, output.sample.shape[2:]
        tokens = own(stream.image[:, stream.layout.registers :])
        o, p, q = patch_of(sizes, stream.layout.grid)
        told = {"f": frames, "y": rows, "x": columns, "o": o, "p": p, "q": q}
        mixture = rearrange(tokens, "b (f y x) (o p q m) -> b m (f o) (y p) (x q)", **told)
        return output._replace(trace={**output.trace, TRACE: mixture.flatten(2, -len(sizes))})


# ---- training and sampling ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolicyImitation(FewStepMethod):
    """Compare the policy with the teacher on the policy's own path.

    For a start the path is the teacher's: between two points the policy is followed for 1 - mixing of the way, the
    teacher's velocity for the rest.

    Args:
        steps, last, shift, substeps: of `PolicySolver`
        points: of a segment, at which velocities are compared
        weight: of the squared difference
        mixing: share of a path that is the teacher's
        needs_data: segments start at noised data; else at the end of the segments before, from noise
    """

    steps: Steps = 4
    last: float = 0.5
    shift: float = 3.2
    substeps: Steps = 128
    points: Steps = 4
    weight: NotNegative = 30.0
    mixing: Weight = Ramp(1.0, 0.0, until=2 / 3)
    needs_data: bool = False

    def __post_init__(self):
        check_numbers(self)
        self.solver()  # raises for the other fields

    def solver(self) -> PolicySolver:
        """The solver whose steps this method trains."""
        return PolicySolver(self.steps, self.last, self.shift, self.substeps)

    def check(self, solver: Solver) -> None:
        mine = (self.steps, self.last, self.shift)
        if not isinstance(solver, PolicySolver) or (solver.steps, solver.last, solver.shift) != mine:
            raise ValueError(
                f"PolicyImitation trains {self.steps} segments, the last {self.last:g} as long as the others, with "
                f"shift {self.shift:g}, the sampler is {solver}: use sampler.solver={{_target_: edit.few_step."
                f"policy.PolicySolver, steps: {self.steps}, last: {self.last:g}, shift: {self.shift:g}}}"
            )

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> None:
        if not any(isinstance(e, MixtureHead) for e in student.applied.values()):
            raise ValueError(
                "PolicyImitation trains a mixture that this student does not have: use edits=policy, or add "
                "+edits.policy={_target_: edit.few_step.policy.MixtureHead}"
            )

    def student_losses(self, seen: Seen) -> dict[str, Tensor]:
        condition, share = seen.condition, weight_at(self.mixing, seen.progress)
        x, start, end = self._start(seen)
        policy = self._policy(seen, x, start)
        own, taught = (self._ways(seen.draws, 2 + i * self.points) for i in (0, 1))  # points b, parts of the segment
        own, taught = (1 - share) * own, share * torch.cat((taught[1:], torch.ones_like(taught[:1])))
        losses, now = [], start
        for i in range(self.points):
            there = torch.lerp(start, end, own[i] + (taught[i - 1] if i else 0)).clamp_min(SMALLEST)
            x = policy.follow(x, now, there, ceil(self.solver().each / self.points), self.shift)
            t = shift_times(there, self.shift)
            v = seen.teacher(x, t, condition)
            losses.append(mean((policy.velocity(x, t) - v).square()))
            now = torch.lerp(start, end, own[i] + taught[i]).clamp_min(SMALLEST)
            x = move(x, v, t, shift_times(now, self.shift))
        return {"policy": self.weight * torch.stack(losses).mean(0)}

    def _ways(self, draws: Draws, stream: int) -> Tensor:
        """Increasing uniform numbers of each sample: points b."""
        return torch.stack([draws.uniform(stream + i) for i in range(self.points)]).sort(0).values

    def _policy(self, seen: Seen, x: Tensor, start: Tensor) -> Policy:
        s = shift_times(start, self.shift)
        out = seen.predict(x, s, seen.condition)
        return Policy.of(out.trace[TRACE], out.sample, x, s)

    def _start(self, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
        """x_s, and the times [b] before the shift at which a segment starts and ends; drawn by its length."""
        draws, eps = seen.draws, seen.draws.gaussian(0)
        grid = segments(self.steps, self.last, eps.device)
        if self.needs_data:
            assert seen.x is not None, "needs_data is declared"
            k = torch.searchsorted(-grid, -draws.uniform(1)) - 1  # the segment that a uniform time falls into
            return corrupt(seen.x, eps, shift_times(grid[k], self.shift)), grid[k], grid[k + 1]
        moment, x, k = draws.shared(1), eps, 0
        starts, ends = grid[:, None].expand(-1, seen.count), segments(self.steps, self.last).tolist()[1:]
        with torch.no_grad():
            while ends[k] > moment:  # on all ranks the same
                policy = self._policy(seen, x, starts[k])
                x = policy.follow(x, starts[k], starts[k + 1], self.solver().each, self.shift)
                k += 1
        return x, starts[k], starts[k + 1]


@dataclass(frozen=True)
class PolicySolver(Solver):
    """One call of the model for each segment, whose policy is followed in substeps that cost nothing (pi-Flow, arXiv
    2510.14974).

    Args:
        steps: segments
        last: length of the last one, which ends at data, in lengths of the others
        shift: moves the times towards noise
        substeps: of all segments together
    """

    integrates: ClassVar = ("velocity", "noise")
    extras: ClassVar = (TRACE,)
    steps: Steps = 4
    last: float = 0.5
    shift: float = 3.2
    substeps: Steps = 128

    def __post_init__(self):
        check_numbers(self)
        if not 1 <= self.steps <= self.substeps:
            raise ValueError(
                f"PolicySolver: 1 <= steps <= substeps, got {self.steps} steps and {self.substeps} substeps"
            )
        if not 0 < self.last <= 1:
            raise ValueError(f"PolicySolver: last must be above 0 and at most 1, got {self.last:g}; 1: all are as long")
        if self.shift <= 0:
            raise ValueError(f"PolicySolver: shift must be positive, got {self.shift}; 1 leaves times unchanged")

    @property
    def each(self) -> int:
        """Substeps of a segment."""
        return ceil(self.substeps / self.steps)

    def times_of(self, objective: Objective, shape: tuple[int, ...]) -> tuple[float, ...]:
        starts = shift_times(segments(self.steps, self.last)[:-1], self.shift)
        return (*objective.native(torch.ones_like(starts), starts)[1].tolist(), 0.0)

    def path(self, x: Tensor, objective: Objective, draw: Draw) -> Path:
        c, ts = x.shape[1], segments(self.steps, self.last, x.device)[:, None].expand(-1, len(x))
        for t, (start, end) in zip(self.times_of(objective, tuple(x.shape[1:])), pairwise(ts), strict=False):
            s = shift_times(start, self.shift)
            out = yield Query(objective.native(x, s)[0], t)
            policy = Policy.of(out[:, c:], objective.velocity(out[:, :c], x, s), x, s)
            x = policy.follow(x, start, end, self.each, self.shift)
        return x
