"""Guidance with edits: which branches share a batch, and that nothing depends on it."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import edit
from edit.attention.linear import LinearAttention
from edit.denoiser import Denoiser, Edit
from edit.few_step.flow_map import IntervalInput
from edit.few_step.policy import MixtureHead, PolicySolver
from edit.measuring.cost import count_generation, macs, twin
from edit.objectives import FlowMatching
from edit.pruning.collapse import Collapse
from edit.pruning.depth import DepthPruning
from edit.pruning.modulation import ModulationApproximator
from edit.pruning.tinyfusion import TinyFusion
from edit.pruning.width import FeedForwardWidth, TextFeedForwardLinear
from edit.routing.dydit import DyDiT
from edit.routing.elastic import Elastic
from edit.sampling import Sampler
from edit.solvers import Euler
from edit.stream import Condition
from edit.tuning.guidance import FixedGuidance, GuidanceInput
from edit.tuning.lora import LoRA
from edit.tuning.td_lora import TDLoRA

CACHED = "elastic, repeating"
DIT: dict[str, Callable[[], Edit]] = {
    "depth": lambda: DepthPruning(pattern="listed", units=(0, 2)),
    "collapse": lambda: Collapse(((0, 1),)),
    "tinyfusion": lambda: TinyFusion("1:3"),
    "width": lambda: FeedForwardWidth(),
    "lora": lambda: LoRA(4, alpha=1.0),
    "td_lora": lambda: TDLoRA(),
    "linear": lambda: LinearAttention(),
    "dydit": lambda: DyDiT(bias=0.0, token_bias=0.0),
    "elastic": lambda: Elastic(router=8, reuse=0),
    CACHED: lambda: Elastic(router=8, band=0.5, reuse=1, cache_from=0.2),
    "interval": lambda: IntervalInput(),
    "mixture": lambda: MixtureHead(2),
}
FLUX: dict[str, Callable[[], Edit]] = {
    "text linear": lambda: TextFeedForwardLinear((0, 1)),
    "modulation": lambda: ModulationApproximator(2, 16, steps=0),
    "fixed guidance": lambda: FixedGuidance(),
    "guidance input": lambda: GuidanceInput(),
    "lora": lambda: LoRA(4, alpha=1.0, targets=("to_q", "proj_mlp")),
    "td_lora": lambda: TDLoRA(),
    "dydit": lambda: DyDiT(bias=0.0, token_bias=0.0),
    "elastic": lambda: Elastic(router=8, reuse=0),
    CACHED: lambda: Elastic(router=8, band=0.5, reuse=1, cache_from=0.2),
}
CASES = [("dit", name) for name in DIT] + [("flux", name) for name in FLUX]


@torch.no_grad()
def edited(family: str, name: str, make_dit: Callable, make_flux: Callable) -> tuple[Denoiser, Condition, Condition]:
    """A denoiser whose edit does something, a condition of three samples, and its unconditional counterpart."""
    g = torch.Generator().manual_seed(1)
    if family == "dit":
        new, denoiser = DIT[name](), make_dit()
        condition = Condition(label=torch.tensor([0, 3, 9]))
    else:
        new, denoiser = FLUX[name](), make_flux(guidance_embeds=name == "fixed guidance", sample_size=(8, 8))
        condition = Condition(text=torch.randn(3, 5, 24, generator=g), pooled=torch.randn(3, 20, generator=g))
    edit.apply(denoiser, {"it": new})
    for key, p in denoiser.named_parameters():
        if key.startswith("edits.") or new.owns(key) or ".lora_" in key or name == "modulation":
            p.add_(0.3 * torch.randn(p.shape, generator=g))
        if isinstance(new, Elastic) and ".gate." in key:
            p.sub_(p.mean())  # p around 1/2
    return denoiser, condition, denoiser.null(condition)


def generated(denoiser: Denoiser, told: tuple, interval: tuple[float, float], apart: bool) -> tuple[Tensor, list, list]:
    """Images, and of each evaluation the branch and the decisions."""
    (new,) = denoiser.applied.values()
    new.separate = apart  # type: ignore[misc]
    branches, decided = [], []

    def watch(step, out) -> None:
        branches.append(step.branch)
        decided.append(new.decisions(out.trace))

    solver = PolicySolver(4) if isinstance(new, MixtureHead) else Euler(4)
    sampler = Sampler(solver, guidance=2.0, interval=interval)
    x = sampler(denoiser, FlowMatching(), told[0], torch.arange(3), negative=told[1], watch=watch)
    return x, branches, decided


@pytest.mark.parametrize("family, name", CASES, ids=[" ".join(case) for case in CASES])
def test_branches_in_one_batch_make_the_images_of_branches_apart(family, name, make_dit, make_flux):
    denoiser, *told = edited(family, name, make_dit, make_flux)
    intervals = {(0.0, 1.0): 4, (0.3, 0.8): 2}  # with the number of guided steps
    for interval, guided in intervals.items():
        if name == CACHED and guided < 4:
            continue  # in one batch, nothing is remembered across the interval's ends
        joint, branches, decided = generated(denoiser, told, interval, apart=False)
        assert sorted(branches) == ["cond"] * (4 - guided) + ["joint"] * guided
        apart, branches, _ = generated(denoiser, told, interval, apart=True)
        assert sorted(branches) == ["cond"] * 4 + ["uncond"] * guided
        # fp32 products of larger batches are summed in another order: 1e-6 after four steps, as measured
        torch.testing.assert_close(joint, apart, rtol=0, atol=1e-5 * apart.abs().max().item())
        for quantity in decided[0]:  # something was decided
            shares = torch.cat([d[quantity].flatten() for d in decided])
            assert 0 < shares.mean() < 1, quantity


def test_what_is_repeated_of_a_joint_batch_is_that_of_the_same_branch(make_dit, make_flux):
    """And not the first evaluations of what cond did before the guidance interval."""
    denoiser, *told = edited("dit", CACHED, make_dit, make_flux)
    kept = {}

    def counts(step, out) -> None:
        kept.setdefault(step.index, set()).update(k[-1] for k in step.memory)

    sampler = Sampler(Euler(4), guidance=2.0, interval=(0.3, 0.8))
    sampler(denoiser, FlowMatching(), told[0], torch.arange(3), negative=told[1], watch=counts)
    assert kept == {0: set(), 1: {"joint"}, 2: {"joint"}, 3: {"cond"}}


@pytest.mark.parametrize("name", ["lora", "elastic", CACHED, "dydit"])
def test_a_joint_evaluation_counts_as_the_two_that_it_is(name, make_dit, make_flux):
    denoiser, *told = edited("dit", name, make_dit, make_flux)
    (new,) = denoiser.applied.values()

    def counted(apart: bool):
        new.separate = apart
        return count_generation(denoiser, Sampler(Euler(4), guidance=2.0), FlowMatching(), told[0], 3)

    assert counted(False) == counted(True) and counted(False).forwards == 8


def test_conditions_evaluated_apart_are_counted_by_the_lengths_of_their_texts(make_flux):
    denoiser = twin(make_flux(sample_size=(8, 8)))
    long, short = (denoiser.example(1, text=length) for length in (40, 2))
    sampler = partial(Sampler(Euler(2), guidance=2.0), negative=short)
    counted = count_generation(denoiser, sampler, FlowMatching(), long, 1)
    assert counted.macs == 2 * (macs(denoiser, long) + macs(denoiser, short)) and counted.forwards == 4


@pytest.mark.parametrize("routers", [DyDiT(), Elastic()], ids=["dydit", "elastic"])
def test_routers_copy_units_and_their_work_differs(routers, dit):
    edit.apply(dit, {"routers": routers})
    with pytest.raises(ValueError, match="which copies units as they are: put it before"):
        edit.apply(dit, {"lora": LoRA()})
    assert not twin(dit, adaptive=False).applied
