from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gaussian import Gaussian, generate, labels
from ranks import run_ranks
from torch import Tensor, nn
from weights import randomise

import edit
from edit import noise
from edit.backbones.flux import FluxConfig
from edit.denoiser import Denoiser, Edit
from edit.objectives import FlowMatching
from edit.predictions import default_objective
from edit.sampling import Sampler
from edit.solvers import DDIMSolver, DDPMSolver, DPMSolver, Euler, EulerMaruyama, Grid, Heun
from edit.stream import Condition, Layout, Step, Stream

# ---- one image per (seed, sample) ------------------------------------------------------------------------------------

ALL = [Euler(4), Heun(3), EulerMaruyama(4), DPMSolver(4), DDPMSolver(4), DDIMSolver(4)]


@pytest.mark.parametrize("solver", ALL, ids=repr)
def test_an_image_does_not_depend_on_its_batch(solver):
    denoiser = Gaussian(predicts=solver.integrates[0])
    objective = default_objective(denoiser)
    condition = Condition(label=torch.arange(8))

    def images(size: int) -> Tensor:
        return torch.cat(
            [
                Sampler(solver, guidance=2.0)(denoiser, objective, condition.map(lambda v, s=s: v[s]), s, seed=5)
                for s in torch.arange(8).split(size)
            ]
        )

    whole = images(8)
    assert torch.equal(images(3), whole) and torch.equal(images(1), whole)  # an elementwise model: to the bit
    assert len(whole.flatten(1).unique(dim=0)) == 8
    again = Sampler(solver, guidance=2.0)(denoiser, objective, condition, torch.arange(8), seed=6)
    assert not torch.isclose(again, whole).all()


@pytest.mark.parametrize("solver", [Heun(3), EulerMaruyama(4)], ids=repr)
def test_an_image_of_a_dit_does_not_depend_on_its_batch(dit, solver):
    sampler, condition = Sampler(solver, guidance=1.5), Condition(label=torch.arange(8))
    whole = sampler(dit, FlowMatching(), condition, torch.arange(8))
    for size in (3, 1):
        parts = [
            sampler(dit, FlowMatching(), condition.map(lambda v, s=s: v[s]), s) for s in torch.arange(8).split(size)
        ]
        # matrix products of other sizes sum in another order: 1e-6 per evaluation, amplified by the random network
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)


def test_an_image_does_not_depend_on_the_number_of_ranks():
    def share() -> np.ndarray:
        import os

        mine = torch.arange(6)[int(os.environ["RANK"]) :: int(os.environ["WORLD_SIZE"])]
        sampler = Sampler(EulerMaruyama(4), guidance=2.0)
        return sampler(Gaussian(), FlowMatching(), labels(len(mine)), mine, seed=3).numpy()

    whole = Sampler(EulerMaruyama(4), guidance=2.0)(Gaussian(), FlowMatching(), labels(6), torch.arange(6), seed=3)
    first, second = run_ranks(share)
    assert np.array_equal(first, whole[0::2].numpy()) and np.array_equal(second, whole[1::2].numpy())


def test_a_rank_that_fails_shows_its_traceback():
    def fail():
        raise RuntimeError("the disk is full")

    with pytest.raises(AssertionError, match="rank [01]:(.|\n)*the disk is full"):
        run_ranks(fail)


def test_nothing_is_drawn_from_the_global_generator():
    denoisers = {predicts: Gaussian(predicts=predicts) for predicts in ("velocity", "noise")}
    before = torch.get_rng_state()
    for solver in ALL:
        generate(denoisers[solver.integrates[0]], solver)
    assert torch.equal(before, torch.get_rng_state())


# ---- guidance --------------------------------------------------------------------------------------------------------


def branches(denoiser: Gaussian) -> list[str]:
    return [branch for branch, _, _ in denoiser.seen]


def test_guidance_one_is_the_conditional_pass_and_runs_no_other():
    denoiser = Gaussian()
    x = generate(denoiser, Euler(5), guidance=1.0)
    assert branches(denoiser) == ["cond"] * 5
    torch.testing.assert_close(generate(Gaussian(), Euler(5), guidance=1 + 1e-6), x, rtol=1e-4, atol=1e-4)


def test_guidance_zero_is_the_unconditional_pass():
    unconditional = Sampler(Euler(5))(Gaussian(), FlowMatching(), labels(8, 0), torch.arange(8))
    torch.testing.assert_close(generate(Gaussian(), Euler(5), guidance=0.0), unconditional)


@torch.no_grad()
def test_guidance_extrapolates_from_the_unconditional_prediction(dit):
    x, condition, t = noise.gaussian(0, torch.arange(2), noise.NOISE, (4, 8, 8)), labels(2, 3), torch.ones(2)
    cond, uncond = (dit(x, t, c).sample for c in (condition, labels(2, 10)))
    guided = Sampler(Euler(1), guidance=3.0)(dit, FlowMatching(), condition, torch.arange(2))
    torch.testing.assert_close(guided, x - (uncond + 3 * (cond - uncond)), rtol=1e-5, atol=1e-5)
    other = dit(x, t, labels(2, 7)).sample  # a negative prompt
    guided = Sampler(Euler(1), guidance=3.0)(dit, FlowMatching(), condition, torch.arange(2), negative=labels(2, 7))
    torch.testing.assert_close(guided, x - (other + 3 * (cond - other)), rtol=1e-5, atol=1e-5)


def test_three_channel_guidance_leaves_the_fourth_channel_conditional():
    plain, guided = generate(Gaussian(), Euler(5)), generate(Gaussian(), Euler(5), guidance=4.0, channels=3)
    assert torch.equal(guided[:, 3], plain[:, 3])
    assert torch.equal(guided[:, :3], generate(Gaussian(), Euler(5), guidance=4.0)[:, :3])
    assert not torch.isclose(guided[:, :3], plain[:, :3]).any()


def test_guided_ddpm_keeps_the_conditional_variance():
    for v in (-1.0, 1.0):
        guided = generate(Gaussian(0.5, "noise", variance=v), DDPMSolver(5), guidance=3.0, channels=3)
        plain = generate(Gaussian(0.5, "noise", variance=v), DDPMSolver(5))
        assert torch.equal(guided[:, 3], plain[:, 3])


@dataclass
class Apart(Edit):
    """Changes nothing, but has branches evaluated apart."""

    separate = True

    def apply(self, denoiser: Denoiser) -> None:
        pass


def apart() -> "Gaussian":
    denoiser = Gaussian()
    edit.apply(denoiser, {"apart": Apart()})
    return denoiser


def test_both_branches_share_a_batch_unless_an_edit_treats_them_differently_and_nothing_changes(make_dit):
    one = make_dit()
    two = deepcopy(one)
    edit.apply(two, {"apart": Apart()})
    options = {"guidance": 2.0, "interval": (0.2, 0.9), "channels": 3}
    together, separate = generate(one, Euler(5), **options), generate(two, Euler(5), **options)
    # the same products in a larger batch: other kernels may round the last bits of fp32 differently
    torch.testing.assert_close(together, separate, rtol=0, atol=1e-4 * separate.abs().max().item())
    for denoiser, expected in ((Gaussian(), ["joint"] * 5), (apart(), ["cond", "uncond"] * 5)):
        generate(denoiser, Euler(5), guidance=2.0)
        assert branches(denoiser) == expected


@pytest.mark.parametrize("edits", [False, True])
def test_conditions_that_cannot_be_joined_are_evaluated_apart(edits):
    denoiser, seen = flux(), []
    if edits:
        edit.apply(denoiser, {"deaf": Deaf()})
    denoiser.register_forward_hook(lambda m, args, out: seen.append(tuple(args[2].text.shape[:2])))

    def evaluated(negative: Condition, **fields) -> list[tuple[int, int]]:
        """Samples and length of text, padding included, of each evaluation."""
        seen.clear()
        condition = replace(denoiser.example(2, text=4), **fields)
        Sampler(Euler(1), guidance=2.0)(denoiser, FlowMatching(), condition, torch.arange(2), negative=negative)
        return list(seen)

    whole, short = (denoiser.example(2, text=length) for length in (4, 3))
    assert evaluated(whole) == [(4, 4)]
    assert evaluated(short) == [(2, 4), (2, 3)]
    assert evaluated(whole, end=torch.zeros(2)) == [(2, 4), (2, 4)]  # only one has this field
    masks = [torch.ones(2, length, dtype=torch.bool) for length in (4, 3)]
    # a FLUX attends to padding, whatever the mask says
    assert evaluated(replace(short, text_mask=masks[1]), text_mask=masks[0]) == [(2, 4), (2, 3)]


def test_outside_its_interval_guidance_is_not_evaluated():
    denoiser = apart()
    generate(denoiser, Euler(10), guidance=2.0, interval=(0.25, 0.75))
    asked = {branch: [round(s, 2) for b, _, s in denoiser.seen if b == branch] for branch in ("cond", "uncond")}
    assert asked["cond"] == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert asked["uncond"] == [0.7, 0.6, 0.5, 0.4, 0.3]
    untouched = apart()
    x = generate(untouched, Euler(10), guidance=2.0, interval=(0.0, 0.05))
    assert "uncond" not in branches(untouched)
    assert torch.equal(x, generate(Gaussian(), Euler(10)))


def test_both_branches_of_a_step_share_its_index():
    denoiser = apart()
    generate(denoiser, Heun(2), guidance=2.0)
    assert [(b, i) for b, i, _ in denoiser.seen] == [(b, i) for i in range(3) for b in ("cond", "uncond")]


# ---- perturbed guidance and memory -----------------------------------------------------------------------------------


@dataclass
class IdentityAttention(Edit):
    """Perturbed-attention guidance: the perturbed branch attends to nothing but itself."""

    perturbs = True

    def apply(self, denoiser: Denoiser) -> None:
        def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, step: Step | None) -> Tensor:
            if step is not None and step.branch == "perturbed":
                return v
            return F.scaled_dot_product_attention(q, k, v)

        denoiser.units[1].slots.attention = attention


@torch.no_grad()
def test_perturbation_moves_away_from_the_perturbed_prediction(dit):
    edit.apply(dit, {"pag": IdentityAttention()})
    x, condition, t = noise.gaussian(0, torch.arange(2), noise.NOISE, (4, 8, 8)), labels(2, 3), torch.ones(2)
    cond, uncond = (dit(x, t, c).sample for c in (condition, labels(2, 10)))
    perturbed = dit(x, t, condition, step=Step(0, 1, 1.0, "perturbed")).sample
    assert not torch.allclose(perturbed, cond, atol=1e-3)
    for guidance, base in ((1.0, cond), (2.0, uncond + 2 * (cond - uncond))):
        sampler = Sampler(Euler(1), guidance=guidance, perturbation=1.5)
        moved = sampler(dit, FlowMatching(), condition, torch.arange(2))
        torch.testing.assert_close(moved, x - (base + 1.5 * (cond - perturbed)), rtol=1e-5, atol=1e-5)


def test_perturbation_without_an_edit_that_perturbs_is_refused():
    with pytest.raises(ValueError, match="perturbation guidance needs an edit that perturbs the model"):
        generate(Gaussian(), Euler(2), perturbation=1.0)


@dataclass
class Diary(Edit):
    """Writes down what its unit remembers when it is called."""

    def apply(self, denoiser: Denoiser) -> None:
        unit, self.pages = denoiser.units[0], []

        def remembering(stream: Stream) -> Stream:
            memory = stream.step.recall("diary", 0)
            self.pages.append((stream.step.branch, stream.step.index, dict(memory)))
            memory["written"] = (stream.step.branch, stream.step.index)
            return unit(stream)

        denoiser.units[0] = remembering


@dataclass
class Separate(Diary):
    separate = True


def remembered(dit: Denoiser, diary: Diary, **settings) -> dict[str, list]:
    """By branch: (step, the step that was written down before) of each evaluation."""
    edit.apply(dit, {"diary": diary})
    for _ in range(2):  # nothing is left of the first generation
        diary.pages.clear()
        Sampler(Euler(5), guidance=2.0, **settings)(dit, FlowMatching(), labels(1, 3), torch.arange(1))
    found: dict[str, list] = {}
    for branch, index, page in diary.pages:
        found.setdefault(branch, []).append((index, page.get("written", (branch, None))))
    assert all(before[0] == branch for branch, pages in found.items() for _, before in pages)
    return {branch: [(index, before[1]) for index, before in pages] for branch, pages in found.items()}


def test_memory_lives_for_one_generation_and_one_branch(make_dit):
    every = [(0, None), (1, 0), (2, 1), (3, 2), (4, 3)]
    assert remembered(make_dit(), Separate()) == {"cond": every, "uncond": every}
    assert remembered(make_dit(), Diary()) == {"joint": every}


def test_nothing_is_remembered_across_the_ends_of_the_guidance_interval_but_of_branches_that_go_on(make_dit):
    inside = {"interval": (0.35, 0.85)}  # of times 1, 0.8, 0.6, 0.4 and 0.2
    assert remembered(make_dit(), Diary(), **inside) == {
        "cond": [(0, None), (4, None)],  # what step 0 left is too old
        "joint": [(1, None), (2, 1), (3, 2)],
    }
    assert remembered(make_dit(), Separate(), **inside) == {
        "cond": [(0, None), (1, 0), (2, 1), (3, 2), (4, 3)],
        "uncond": [(1, None), (2, 1), (3, 2)],
    }


# ---- a few steps at given times --------------------------------------------------------------------------------------


def test_a_renoised_sample_does_not_depend_on_its_batch():
    sampler, denoiser = Sampler(Grid((1.0, 0.5, 0.25), renoise=True)), Gaussian()
    whole = sampler(denoiser, FlowMatching(), labels(6), torch.arange(6))
    part = sampler(denoiser, FlowMatching(), labels(2), torch.tensor([4, 1]))
    assert torch.equal(part, whole[[4, 1]])
    assert not torch.equal(whole[0], whole[1])


@dataclass
class Ends(Edit):
    """Writes down which end its model is told."""

    leads = True

    def apply(self, denoiser: Denoiser) -> None:
        self.told = []

    def embed(self, stream: Stream, t: Tensor, condition: Condition, own: nn.Module | None) -> Stream:
        self.told.append((round(t[0].item(), 3), None if condition.end is None else condition.end.tolist()))
        return stream


@dataclass
class Deaf(Ends):
    """Likewise, of a model that is no flow map."""

    leads = False


def test_only_a_flow_map_is_told_where_a_step_ends():
    def heard(solver, ends: Ends, **settings) -> list:
        denoiser = Gaussian()
        edit.apply(denoiser, {"ends": ends})
        generate(denoiser, solver, n=2, **settings)
        return ends.told

    assert heard(Grid((1.0, 0.5)), Ends()) == [(1, [0.5, 0.5]), (0.5, [0, 0])]
    assert heard(Grid((1.0, 0.5), renoise=True), Ends()) == [(1, [0, 0]), (0.5, [0, 0])]  # each goes to data
    assert heard(Euler(2), Ends()) == [(1, [0.5, 0.5]), (0.5, [0, 0])]
    assert heard(Heun(2), Ends())[:2] == [(1, [1, 1]), (0.5, [0.5, 0.5])]  # instantaneous velocities
    assert heard(Euler(1), Ends(), guidance=2.0) == [(1, [0, 0, 0, 0])]  # both branches
    assert heard(Grid((1.0, 0.5)), Deaf()) == [(1, None), (0.5, None)]


# ---- models with a guidance input ------------------------------------------------------------------------------------


def flux(**options) -> Denoiser:
    denoiser = FluxConfig(16, 1, 1, 32, 2, 32, 32, axes_dims_rope=(8, 12, 12), sample_size=(8, 8), **options).build()
    randomise(denoiser, 0)
    return denoiser.eval()


def told(denoiser: Denoiser, n: int = 2, **settings) -> Tensor:
    condition = denoiser.example(n, text=4)
    return Sampler(Euler(2), **settings)(denoiser, FlowMatching(), condition, torch.arange(n))


def test_a_model_with_a_guidance_input_is_told_the_scale_in_one_pass():
    denoiser, calls = flux(guidance=3.5), []
    denoiser.register_forward_hook(lambda m, args, out: calls.append((len(args[0]), args[2].guidance)))
    x = told(denoiser, told=5.0)
    assert [n for n, _ in calls] == [2, 2]  # no second half, no second pass
    assert all(torch.equal(g, torch.full((2,), 5.0)) for _, g in calls)
    assert not torch.allclose(x, told(denoiser), atol=1e-3)
    assert torch.equal(told(denoiser, told=3.5), told(denoiser))  # its own scale


def test_a_scale_is_told_to_both_branches_where_there_is_guidance_on_top():
    denoiser, seen = flux(), []
    denoiser.register_forward_hook(lambda m, args, out: seen.append(args[2].guidance))
    told(denoiser, told=2.0, guidance=1.5)
    assert all(torch.equal(g, torch.full((4,), 2.0)) for g in seen)


def test_a_scale_cannot_be_told_to_a_model_without_input(dit):
    for denoiser, name in ((flux(guidance_embeds=False), "flux"), (dit, "dit")):
        with pytest.raises(ValueError, match=f"told=2, but this {name} has no guidance input: use guidance instead"):
            told(denoiser, told=2.0)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, complaint",
    [
        (lambda: Euler(0), "Euler: steps must be at least 1, got 0"),
        (lambda: EulerMaruyama(1), "EulerMaruyama: steps must be at least 2, got 1"),
        (lambda: EulerMaruyama(10, last=1.0), "last must lie between 0 and 1, got 1.0"),
        (lambda: Grid(()), r"times must decrease and be above 0, got \[\]"),
        (lambda: Grid((0.5, 1.0)), r"times must decrease and be above 0, got \[0.5, 1.0\]"),
        (lambda: Grid((1.0, 0.5, 0.5)), "times must decrease and be above 0"),
        (lambda: Grid((1.0, 0.0)), "times must decrease and be above 0"),
        (lambda: Grid((1.5, 1.0)), "times are at most 1, which is pure noise, got 1.5"),
        (lambda: Grid(shift=0), "shift must be positive, got 0"),
        (lambda: DPMSolver(10, order=4), "order must be 1, 2 or 3, got 4"),
        (lambda: Sampler(interval=(0.7, 0.2)), "interval must be 0 <= low < high <= 1"),
        (lambda: Sampler(interval=(0.0, 1.5)), "interval must be 0 <= low < high <= 1"),
    ],
)
def test_impossible_settings_are_refused(build, complaint):
    with pytest.raises(ValueError, match=complaint):
        build()


# ---- what a sample is told and how large it is -----------------------------------------------------------------------


def test_one_negative_condition_stands_for_the_whole_batch(dit):
    sampler = Sampler(Euler(3), guidance=2.0)
    numbers, told = torch.arange(4), Condition(label=torch.tensor([1, 2, 3, 4]))
    one, four = (
        sampler(dit, FlowMatching(), told, numbers, negative=Condition(label=torch.full((n,), 7))) for n in (1, 4)
    )
    assert torch.equal(one, four)
    assert not torch.equal(one, sampler(dit, FlowMatching(), told, numbers))


def test_a_sample_may_be_trained_on(dit):
    x = Sampler(Euler(2))(dit, FlowMatching(), Condition(label=torch.tensor([1])), torch.arange(1))
    assert not x.is_inference()
    dit(x, torch.ones(1), Condition(label=torch.tensor([1]))).sample.sum().backward()
