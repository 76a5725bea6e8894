"""LESA: where the units do not run, the last hidden state is its newest value, moved along a learned direction.

LESA (arXiv 2602.20497). Of T evaluations at the noise levels tau_0 > tau_1 > ... > tau_T = 0, s is computed if

    s < E,   s = 3,   or   s = E - 1 + k N,   k = 1, 2, ...

At every other, with h_1, ..., h_K the tokens behind the last unit at the K evaluations before, computed or not, h_K the
newest, and the first repeated where there are fewer,

    z = sum_k w_k h_k + b,   alpha_s = KAN(tau_s - tau_0, ..., tau_s - tau_T),   h = h_K + alpha_s z

w_1, ..., w_K, b and the KAN are those of the stage that tau_s lies in, apart for cond and uncond. The output layer is
that of the present evaluation. The network sees times alone, so alpha_s is one number of each evaluation: what was
trained for one schedule becomes a table (`BakedLESA`), and no network is left.

It is trained by `edit.caching.lesa_training`. Site `last_hidden` of the specification; its `post_norm` needs a seam
inside `Denoiser.readout`, and stages of a model of noise need its times as noise levels: neither is here.

Specification: methods/lesa.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from edit.caching.engine import Predictor, Scheduled, SpanCached
from edit.caching.kan import Kan
from edit.denoiser import Denoiser
from edit.inputs.limits import Count, Limits, Natural, Steps, check_numbers
from edit.objectives import Objective
from edit.solvers import Solver
from edit.stream import Branch, Step
from edit.walk import cut

RING = 8  # evaluations that are remembered
SETS = {"cond": slice(0, 1), "uncond": slice(1, 2), "joint": slice(0, 2)}  # of weights, by guidance branch


def full(index: int, interval: int, first: int, forced: int | None) -> bool:
    """Whether evaluation `index` is computed."""
    return index < first or index == forced or (index - first + 1) % interval == 0


@dataclass(frozen=True)
class Schedule:
    """The times of a generation's evaluations, as solver and objective tell them.

    Args:
        solver: of the sampler
        objective: of the model
        shape: of one sample, where the solver's times depend on it
    """

    solver: Solver
    objective: Objective
    shape: tuple[int, ...] = ()

    @property
    def times(self) -> tuple[float, ...]:
        """Of each evaluation, then 0."""
        return self.solver.times_of(self.objective, tuple(self.shape))


class Learned(SpanCached):
    """What is told of a predictor, with its network or its table; a subclass is a dataclass with these fields."""

    interval: int  # N, in evaluations; 1 computes all
    first: int  # E, evaluations at the beginning that are all computed
    forced: int | None  # one more that is computed; None: none
    steps: int  # T, evaluations of a generation
    schedule: Schedule | None  # that it is of; None: any of T evaluations
    boundaries: tuple[float, ...]  # noise levels above which the stages lie, but for the last
    windows: tuple[int, ...]  # K of each stage, at most 8
    guided: bool  # cond and uncond have weights of their own; else there are those of cond alone

    def check_fields(self) -> None:
        """Bring tuples into their form.

        Raises:
            ValueError: if the fields contradict each other
        """
        check_numbers(self)
        who = type(self).__name__
        self.boundaries, self.windows = tuple(self.boundaries), tuple(self.windows)
        if list(self.boundaries) != sorted(set(self.boundaries), reverse=True):
            raise ValueError(f"{who}: boundaries fall from stage to stage, got {list(self.boundaries)}")
        if len(self.windows) != len(self.boundaries) + 1 or not all(1 <= k <= RING for k in self.windows):
            raise ValueError(
                f"{who}: windows has 1 to {RING} evaluations for each of the {len(self.boundaries) + 1} stages between "
                f"boundaries, got {list(self.windows)}"
            )
        if self.schedule is not None and (count := len(self.schedule.times) - 1) != self.steps:
            raise ValueError(f"{who}: steps is {self.steps}, and schedule has {count} evaluations: give one number")

    def computed(self, index: int) -> bool:
        return full(index, self.interval, self.first, self.forced)

    def stage(self, level: float) -> int:
        """Of an evaluation at a noise level."""
        return sum(level <= b for b in self.boundaries)

    def at(self, step: Step) -> Step:
        return step

    def kind(self, step: Step) -> tuple[int, int]:
        return self.stage(step.sigma), min(step.index, RING)

    def check(self, sampler: Any, times: tuple[float, ...]) -> None:
        super().check(sampler, times)
        who = f"{self.name} ({type(self).__name__})"
        if len(times) - 1 != self.steps:
            raise ValueError(
                f"{who} is of generations of {self.steps} evaluations, and this sampler has {len(times) - 1}: sample "
                "in as many, or train another"
            )
        mine = times if self.schedule is None else self.schedule.times
        if any(abs(a - b) > 1e-6 for a, b in zip(mine, times, strict=True)):
            raise ValueError(
                f"{who} is of evaluations at the times {cut(mine)}, and this sampler's are {cut(times)}: "
                "choose the same solver and shift, or train another"
            )
        if sampler.perturbation:
            raise ValueError(f"{who} has no weights for the branch 'perturbed': set the sampler's perturbation to 0")
        if sampler.guidance != 1 and not self.guided:
            raise ValueError(
                f"{who} has weights for cond alone, and this sampler guides at {sampler.guidance:g}: sample at "
                "guidance 1, or train another with guided=true"
            )
        if sampler.guidance != 1 and tuple(sampler.interval) != (0.0, 1.0):
            raise ValueError(
                f"{who} needs one history from the first evaluation to the last, and this sampler guides in "
                f"{sampler.interval} alone: guide at all times, or not at all"
            )

    def stand(self, denoiser: Denoiser, own: nn.Module) -> nn.Module:
        """Stand around the units, with weights."""
        if denoiser.prediction != "velocity":
            raise ValueError(
                f"{type(self).__name__}: stages lie between noise levels of a flow, and this {denoiser.name} predicts "
                "a noise: choose a model of velocities, or another cache"
            )
        self.cache(denoiser, Scheduled(lambda step: self.computed(step.index)), Mixed(self, own), "hidden")
        return own


@dataclass
class LESA(Learned):
    """A cache that learns to look ahead, and becomes a table when training is over.

    Args:
        interval: N, in evaluations; 1 computes all
        first: E, evaluations at the beginning that are all computed
        forced: one more evaluation that is computed; none: none
        steps: T, evaluations of a generation
        schedule: that it is for; none: any of T evaluations, and no table is made
        boundaries: noise levels above which the stages lie, but for the last; 0.9 and 0.4 for Qwen-Image
        windows: K of each stage, at most 8
        guided: weights of their own for cond and uncond; false: for cond alone
        network: of alpha: a KAN, or, as an ablation, a perceptron
        hidden: width of its two hidden layers
        init: "reference", the release's, or "reuse": alpha is 0, and what is predicted is the newest value
        start: a run or artifact with such an edit of the same name, whose weights are taken over; none: of nowhere
    """

    interval: Count = 7
    first: Count = 3
    forced: Natural | None = 3
    steps: Steps = 50
    schedule: Schedule | None = None
    boundaries: tuple[float, ...] = (0.9, 0.5)
    windows: tuple[int, ...] = (4, 8, 8)
    guided: bool = True
    network: Literal["kan", "mlp"] = "kan"
    hidden: Annotated[int, Limits(1, 65_536)] = 256
    init: Literal["reference", "reuse"] = "reference"
    start: str | None = None

    def __post_init__(self):
        self.check_fields()

    def apply(self, denoiser: Denoiser) -> nn.Module:
        return self.stand(denoiser, Predictors(self))

    def trainable(self, name: str) -> bool:
        return name.startswith("edits.")

    def initialise(self, denoiser: Denoiser) -> None:
        if self.start is not None:
            denoiser.edits[self.name].load_state_dict(weights_of(self.start, self))

    def compact(self, own: nn.Module | None) -> tuple[BakedLESA, nn.Module] | None:
        assert isinstance(own, Predictors)
        if self.schedule is None:
            return None
        names = ("interval", "first", "forced", "steps", "schedule", "boundaries", "windows", "guided")
        left = BakedLESA(**{name: getattr(self, name) for name in names})
        baked = Table(left)
        with torch.no_grad():
            found = (*own.mixtures(), own.alphas(self.schedule.times))
            for buffer, value in zip((baked.mix, baked.bias, baked.table), found, strict=True):
                buffer.copy_(value)
        return left, baked


@dataclass
class BakedLESA(Learned):
    """What is left of a trained `LESA`: weights of the history and a table of step sizes. It is no longer trained.

    Args:
        interval, first, forced, steps, schedule, boundaries, windows, guided: as of `LESA`
    """

    interval: Count = 7
    first: Count = 3
    forced: Natural | None = 3
    steps: Steps = 50
    schedule: Schedule | None = None
    boundaries: tuple[float, ...] = (0.9, 0.5)
    windows: tuple[int, ...] = (4, 8, 8)
    guided: bool = True

    def __post_init__(self):
        self.check_fields()

    def apply(self, denoiser: Denoiser) -> nn.Module:
        return self.stand(denoiser, Table(self))


def weights_of(path: str, edit: LESA) -> dict[str, Tensor]:
    """The weights of the edit of this name in a run or artifact.

    Raises:
        ValueError: if there is none, or it predicts other evaluations or in another way
    """
    from safetensors.torch import load_file

    from edit.artifacts.checkpoint import skeleton
    from edit.artifacts.location import find
    from edit.artifacts.weights import OWN

    other = skeleton(path).applied.get(edit.name)
    if not isinstance(other, LESA):
        there = "a table" if isinstance(other, BakedLESA) else "none"
        raise ValueError(
            f"{edit.name} (LESA): start={path} has {there} under this name: give the run of its first stage"
        )
    same = ("interval", "first", "forced", "steps", "boundaries", "windows", "guided", "network", "hidden")
    if odd := next((name for name in same if getattr(other, name) != getattr(edit, name)), None):
        raise ValueError(
            f"{edit.name} (LESA): start={path} has {odd}={getattr(other, odd)}, and this one {getattr(edit, odd)}: "
            "train both stages alike"
        )
    head = f"edits.{edit.name}."
    return {k.removeprefix(head): v for k, v in load_file(find(path) / OWN).items() if k.startswith(head)}


# ---- weights ---------------------------------------------------------------------------------------------------------

Weights = tuple[Tensor, Tensor, Tensor]  # w, b and alpha


class Expert(nn.Module):
    """w, b and the network of one stage and guidance branch."""

    def __init__(self, edit: LESA, window: int):
        super().__init__()
        sizes = (edit.steps + 1, edit.hidden, edit.hidden, 1)
        self.mix = nn.Linear(window, 1)
        self.network = Kan(sizes) if edit.network == "kan" else perceptron(sizes)
        if edit.init == "reuse" and not self.mix.weight.is_meta:
            last = self.network[-1]
            last.zero() if edit.network == "kan" else (nn.init.zeros_(last.weight), nn.init.zeros_(last.bias))

    def alpha(self, offsets: Tensor) -> Tensor:  # ... T+1 -> ...
        return self.network(offsets)[..., 0].float()


def perceptron(sizes: Sequence[int]) -> nn.Sequential:
    a, b, c, d = sizes
    return nn.Sequential(nn.Linear(a, b), nn.SiLU(), nn.Linear(b, c), nn.SiLU(), nn.Linear(c, d))


class Predictors(nn.Module):
    """The experts of all stages, for cond and, if guided, for uncond. They stay in fp32."""

    def __init__(self, edit: LESA):
        super().__init__()
        self.edit = edit
        self.sets = nn.ModuleList(
            nn.ModuleList(Expert(edit, k) for k in edit.windows) for _ in range(2 if edit.guided else 1)
        )

    def offsets(self, times: Sequence[float]) -> Tensor:
        """tau_s - tau_j: T T+1."""
        taus = torch.tensor(times, dtype=torch.float64, device="cpu")
        found = (taus[:-1, None] - taus).float()
        return found.to(self.sets[0][0].mix.weight.device)

    def now(self, chosen: slice, step: Step) -> Weights:
        """Of an evaluation, with a graph: w c K, b c, alpha c, for c sets."""
        stage, offsets = self.edit.stage(step.sigma), self.offsets(step.times)[step.index]
        experts = [experts[stage] for experts in self.sets[chosen]]
        mix = torch.cat([e.mix.weight for e in experts]).float()
        bias = torch.cat([e.mix.bias for e in experts]).float()
        return mix, bias, torch.stack([e.alpha(offsets) for e in experts])

    def mixtures(self) -> tuple[Tensor, Tensor]:
        """Of all stages: w c e 8, the newest last, and b c e, for e stages."""
        mix = [[nn.functional.pad(e.mix.weight[0], (RING - k, 0)) for e, k in self._each(s)] for s in self.sets]
        return stacked(mix).float(), stacked([[e.mix.bias[0] for e in experts] for experts in self.sets]).float()

    def alphas(self, times: Sequence[float]) -> Tensor:
        """Of all evaluations: c T."""
        offsets, stages = self.offsets(times), [self.edit.stage(t) for t in times[:-1]]
        found = [[e.alpha(offsets) for e in experts] for experts in self.sets]
        return stacked([[rows[e][i] for i, e in enumerate(stages)] for rows in found])

    def _each(self, experts: Any) -> zip:
        return zip(experts, self.edit.windows, strict=True)


def stacked(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(list(row)) for row in rows])


class Table(nn.Module):
    """What `Predictors` comes to on one schedule, as buffers."""

    mix: Tensor
    bias: Tensor
    table: Tensor

    def __init__(self, edit: BakedLESA):
        super().__init__()
        sets, stages = 2 if edit.guided else 1, len(edit.windows)
        self.register_buffer("mix", torch.zeros(sets, stages, RING))
        self.register_buffer("bias", torch.zeros(sets, stages))
        self.register_buffer("table", torch.zeros(sets, edit.steps))

    def mixtures(self) -> tuple[Tensor, Tensor]:
        return self.mix.float(), self.bias.float()

    def alphas(self, times: Sequence[float]) -> Tensor:
        return self.table.float()


# ---- prediction ------------------------------------------------------------------------------------------------------


def remember(state: dict, image: Tensor) -> None:
    """Put the tokens of one more evaluation behind those that are remembered."""
    state["history"] = [*state.get("history", []), image][-RING:]


@dataclass(frozen=True)
class Mixed(Predictor):
    """The newest tokens, and alpha times a mixture of those before; places are steps.

    While the model trains, weights come with a graph; else the memory has those of all evaluations, and which is next
    is a number on the device (`edit.caching.graphs`).
    """

    edit: Learned
    own: Any  # Predictors | Table

    def observe(self, state: dict, at: Step, value: Branch, rows: Tensor | None = None) -> None:
        assert rows is None, "the schedule is the same for all samples"
        self.tick(state, at, value.image.device)
        remember(state, value.image)

    def predict(self, state: dict, at: Step) -> Branch:
        history, window = state["history"], self.edit.windows[self.edit.stage(at.sigma)]
        chosen = SETS[at.branch]
        self.tick(state, at, history[-1].device)
        with uncast(history[-1].device):
            mix, bias, alpha = self.own.now(chosen, at) if self.learns else self.looked_up(state, chosen, at)
            image = ahead(history, mix[:, -window:], bias, alpha)
        remember(state, image)
        return Branch(image)

    @property
    def learns(self) -> bool:
        return self.own.training and isinstance(self.own, Predictors)

    def tick(self, state: dict, at: Step, device: torch.device) -> None:
        """Begin the memory, or go to the next evaluation."""
        if self.learns or self.edit.interval == 1:
            return
        if "next" in state:
            state["next"] = state["next"] + 1
            return
        with uncast(device):
            state["table"] = self.own.alphas(at.times)
        state["next"] = torch.full((1,), at.index, dtype=torch.int64, device=device)

    def looked_up(self, state: dict, chosen: slice, at: Step) -> Weights:
        mix, bias = self.own.mixtures()
        stage, table = self.edit.stage(at.sigma), state["table"][chosen]
        return mix[chosen, stage], bias[chosen, stage], table.index_select(1, state["next"])[:, 0]


def uncast(device: torch.device) -> AbstractContextManager[Any]:
    """Whatever is cast outside, fp32 stays; there is nothing to cast on the meta device."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def ahead(history: Sequence[Tensor], mix: Tensor, bias: Tensor, alpha: Tensor) -> Tensor:
    """h_K + alpha (sum_k w_k h_k + b), of c guidance branches one after the other.

    Args:
        history: b n d each, the newest last
        mix: c K
        bias, alpha: c
    """
    newest, many = history[-1], len(history[-1]) // len(mix)

    def of_samples(v: Tensor) -> Tensor:  # c -> b 1 1
        return v.repeat_interleave(many)[:, None, None]

    z: Tensor = of_samples(bias)
    for back, w in enumerate(mix.flip(1).unbind(1), 1):  # from the newest
        z = torch.addcmul(z, of_samples(w), history[max(len(history) - back, 0)].float())
    return torch.addcmul(newest.float(), of_samples(alpha), z).to(newest.dtype)
