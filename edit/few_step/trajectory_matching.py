"""Trajectory distribution matching (TDM, arXiv 2503.06674): the student's own way from noise to data is matched with
the teacher's, segment by segment, without any data.

The student goes from noise to one of its times (without a graph), then one step further, into the segment that ends
there. What it then holds is noised again inside that segment, where the two scores are compared. Specification:
methods/distillation.md, D3.9. With x and eps what the student sees at t, the state at the lower end s is
(1 - s) x + s eps, and noised again to tau in [s, t) it is (1 - tau) x + tau n with n = rho eps + sqrt(1 - rho^2) noise,
rho = s (1 - tau) / (tau (1 - s)): the published a and b, without their cancellation at small tau. The student's loss is
the pseudo-Huber distance of each element from its target, x_teacher - x_critic away, averaged and over the normaliser:
where the two agree to less than c, gradients shrink with their difference. Inferred: tau is uniform in the segment, and
1e-6 in the normaliser.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from edit.few_step.method import FewStepMethod, need_turns, pseudo_huber
from edit.few_step.scores import capped, check_grid, data_distance, rollout
from edit.inputs.limits import Count, check_numbers
from edit.losses import Seen
from edit.paths import column, corrupt, mean
from edit.solvers import Grid, Solver

STEP, TIME, NOISE, CRITIC_TIME, CRITIC_NOISE = 1, 2, 3, 4, 5  # streams of `Draws`, beside those of the rollout


@dataclass(frozen=True)
class TrajectoryMatching(FewStepMethod):
    """Match the marginals along the student's deterministic trajectory; guided teacher: 4.5 for PixArt.

    Args:
        grid: times of the student's steps, the sampler's own before `shift`. A student of one step, (1.0,), is to start
            from one that has learned the teacher's ends from noise, by `edit.few_step.endpoint`
        shift: of these times, likewise
        c: of the pseudo-Huber distance, of one element
        cap: of the signal-to-noise ratio, which weights the critic's loss on data
        every: the student's turn is every n-th step, the critic's are the others
        together: the critic is trained on the student's turns as well; the rollout and the student's step are then made
            twice on the same numbers, with a graph and without
    """

    grid: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    shift: float = 1.0
    c: float = 1e-3
    cap: float = 5.0
    every: Count = 2
    together: bool = False

    needs_data: ClassVar[bool] = False
    has_critic: ClassVar[bool] = True

    def __post_init__(self):
        check_numbers(self)
        object.__setattr__(self, "grid", tuple(self.grid))
        Grid(self.grid, shift=self.shift)  # raises for times that are no grid
        if self.c <= 0 or self.cap <= 0:
            raise ValueError(f"TrajectoryMatching: c and cap must be positive, got {self.c}, {self.cap}")
        need_turns(self, "critic")

    @property
    def solver(self) -> Grid:
        return Grid(self.grid, shift=self.shift)

    def check(self, solver: Solver) -> None:
        check_grid("TrajectoryMatching", self.solver, solver)

    def student_losses(self, seen: Seen) -> dict[str, Tensor]:
        x, eps, tau, rho = self.step(seen, TIME)
        with torch.no_grad():
            x_tau, _ = renoise(x, eps, seen.draws.gaussian(NOISE), tau, rho)
            teacher, critic = seen.teacher(x_tau, tau, seen.condition), seen.critic(x_tau, tau, seen.condition)
            apart = column(tau, x) * (teacher - critic)  # x_critic - x_teacher
            scale = data_distance(x, x_tau, tau, teacher)
        # the target is x - apart, taken from x without rounding
        return {"trajectory": pseudo_huber(x - x.detach() + apart, self.c) / scale}

    def critic_losses(self, seen: Seen) -> dict[str, Tensor]:
        noise = seen.draws.gaussian(CRITIC_NOISE)
        with torch.no_grad():
            x, eps, tau, rho = self.step(seen, CRITIC_TIME)
            x_tau, n = renoise(x, eps, noise, tau, rho)
            importance = (0.5 * (mean(noise.square()) - mean(n.square()))).exp()
        error = seen.critic(x_tau, tau, seen.condition) - (n - x)
        return {"data": importance * capped(error, tau, self.cap)}

    def step(self, seen: Seen, time: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The student's view after its rollout, and where in the segment below it is noised to.

        Args:
            seen: the batch, and the student that is asked
            time: the stream that tau is drawn from

        Returns:
            x, eps b c *sizes, with the student's graph unless it is off; tau, rho [b]
        """
        draws, ts = seen.draws, self.solver.grid
        k = int(draws.shared(STEP) * len(self.grid))
        x_t = rollout(seen, ts[: k + 1], renoise=False)
        t, end = (torch.full_like(seen.scale, ts[j]) for j in (k, k + 1))
        v = seen.student(x_t, t, replace(seen.condition, end=end))
        tau = torch.lerp(end, t, draws.uniform(time))
        return x_t - column(t, x_t) * v, x_t + column(1 - t, x_t) * v, tau, end * (1 - tau) / (tau * (1 - end))


def renoise(x: Tensor, eps: Tensor, noise: Tensor, tau: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    """State at tau, and the noise in it, of which the part rho is the student's own: both shaped as x."""
    n = column(rho, x) * eps + column((1 - rho.square()).clamp_min(0).sqrt(), x) * noise
    return corrupt(x, n, tau), n
