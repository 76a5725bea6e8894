"""A generation that is stepped by hand: it is the generation itself, it stops and goes on, and it can be trained on."""

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from gaussian import Gaussian, labels
from small_runs import config
from torch import Tensor, nn

import edit
from edit.artifacts.checkpoint import load, save
from edit.caching.reuse import Reuse
from edit.denoiser import Denoiser, Edit
from edit.edits import compact
from edit.few_step.policy import MixtureHead, PolicySolver
from edit.objectives import FlowMatching, Objective
from edit.predictions import default_objective
from edit.sampling import Sampler
from edit.solvers import DDIMSolver, DDPMSolver, DPMSolver, Euler, EulerMaruyama, Grid, Heun, Query, Solver, StockEuler
from edit.stream import Branch, Stream, pack, unpack
from edit.tuning.lora import LoRA
from edit.walk import Walk
from recipes.assembly import assemble
from recipes.config.errors import UserError
from recipes.report.samples import adjusted
from recipes.training import settle

FLOW = [
    Euler(4),
    Euler(3, 3.0),
    StockEuler(4, dynamic=(0.5, 1.15, 4, 64), terminal=0.02),
    StockEuler(4, 3.0, even=False),
    Grid((0.9, 0.7, 0.4, 0.2), shift=2.0),
    Grid((1.0, 0.75, 0.5, 0.25), renoise=True),
    Heun(3, 2.0),
    EulerMaruyama(4),
    DPMSolver(4, 3),
    PolicySolver(3, substeps=6),
]
NOISE = [DDPMSolver(4), DDIMSolver(4), DPMSolver(4), Grid((0.9, 0.7, 0.4, 0.2))]
SOLVERS: list[tuple[Solver, str]] = [(s, "flow") for s in FLOW] + [(s, "ddpm") for s in NOISE]
GUIDED = [
    {},
    {"guidance": 2.0},
    {"guidance": 3.0, "interval": (0.3, 0.8), "channels": 3},
    {"guidance": 3.0, "norm_patch": 2},
]
over_solvers = pytest.mark.parametrize("solver, time", SOLVERS, ids=lambda v: repr(v) if isinstance(v, Solver) else v)


def same(make_dit: Callable, **options: Any) -> Denoiser:
    """The same weights every time."""
    torch.manual_seed(0)
    return make_dit(**options)


def cached(make_dit: Callable, solver: Solver, time: str) -> tuple[Denoiser, Objective]:
    """A DiT that repeats branches; for the solver's maps and variance, where it takes some."""
    denoiser = same(make_dit, time=time, learn_sigma=time == "ddpm")
    if isinstance(solver, PolicySolver):
        edit.apply(denoiser, {"policy": MixtureHead(2)})
        nn.init.normal_(denoiser.edits["policy"][1].weight, std=0.1)
    edit.apply(denoiser, {"reuse": Reuse(2)})
    return denoiser, default_objective(denoiser)


def begin(denoiser: Denoiser, sampler: Sampler, objective: Objective | None = None, **told: Any) -> Walk:
    return sampler.walk(denoiser, objective or FlowMatching(), labels(2, 3), torch.arange(2), seed=5, **told)


def finish(walk: Walk) -> Tensor:
    for moment in walk:
        moment.give(moment.ask())
    return walk.x


def stored(state: dict) -> dict:
    """As it comes from a file, from which nothing is executed."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- it is the generation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", GUIDED, ids=str)
@over_solvers
@torch.no_grad()
def test_a_walk_is_the_generation(solver, time, guided, make_dit):
    denoiser, objective = cached(make_dit, solver, time)
    sampler, seen, told = Sampler(solver, **guided), [], []
    whole = sampler(denoiser, objective, labels(2, 3), torch.arange(2), seed=5)
    walk = begin(denoiser, sampler, objective, watch=lambda s, out: seen.append(s), progress=lambda *n: told.append(n))
    places = []
    for moment in walk:
        assert torch.equal(walk.x, moment.x)
        places.append((moment.step.index, moment.step.sigma))
        moment.give(moment.ask())
    assert torch.equal(walk.x, whole) and walk.moment is None
    count = solver.evaluations
    assert [i for i, _ in places] == list(range(count)) and told == [(i + 1, count) for i in range(count)]
    assert all((s.index, s.sigma) in places and s.count == count for s in seen) and len(seen) >= count


@over_solvers
@torch.no_grad()
def test_every_step_knows_the_time_of_every_evaluation(solver, time, make_dit):
    denoiser, objective = cached(make_dit, solver, time)
    shape, asked = denoiser.sample_shape, []
    times = solver.times_of(objective, shape)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    answer = torch.cat((x, x.new_zeros(2, 11, 8, 8)), 1) if isinstance(solver, PolicySolver) else x

    def predict(x: Tensor, t: float, end: float | None = None) -> Tensor:
        asked.append(t)
        return answer

    solver.integrate(predict, x, objective, lambda k: x)
    assert times == (*asked, 0) and len(times) == solver.evaluations + 1 and list(times) == sorted(times, reverse=True)
    steps = []
    Sampler(solver, guidance=2.0)(
        denoiser, objective, labels(2), torch.arange(2), watch=lambda step, out: steps.append(step)
    )
    assert all(step.times == times and step.sigma == times[step.index] for step in steps) and steps


def test_the_times_are_those_of_the_samples_shape():
    solver, shapes = StockEuler(4, dynamic=(0.5, 1.15, 4, 64)), ((4, 8, 8), (4, 16, 8))
    small, large = (solver.times_of(FlowMatching(), shape) for shape in shapes)
    assert small[1] < large[1]
    walk = Sampler(solver).walk(Gaussian(), FlowMatching(), labels(1), torch.arange(1), shape=shapes[1])
    assert walk.times == large == walk.moment.step.times


def test_what_is_given_is_what_the_solver_takes():
    walk = begin(Gaussian(), Sampler(Euler(4)))
    start = walk.x
    for moment in walk:
        assert torch.equal(moment.x, start)
        moment.give(torch.zeros_like(moment.ask()))
    assert torch.equal(walk.x, start)


# ---- it stops and goes on --------------------------------------------------------------------------------------------


@over_solvers
@torch.inference_mode()
def test_a_walk_goes_on_after_any_evaluation_in_another_process(solver, time, make_dit):
    denoiser, objective = cached(make_dit, solver, time)
    sampler = Sampler(solver, guidance=2.0)
    whole = sampler(denoiser, objective, labels(2, 3), torch.arange(2), seed=5)
    walk = begin(denoiser, sampler, objective)
    states = [walk.state()]
    for moment in walk:
        moment.give(moment.ask())
        states.append(walk.state())
    assert len(states) == solver.evaluations + 1
    for k, state in enumerate(states):
        again = begin(cached(make_dit, solver, time)[0], sampler, objective, state=stored(state))
        assert (again.moment is None) == (k == solver.evaluations) and len(again.given) == k
        assert torch.equal(finish(again), whole), k


@torch.no_grad()
def test_without_its_memory_a_walk_would_go_on_elsewhere(make_dit):
    denoiser, _ = cached(make_dit, Euler(4), "flow")
    walk = begin(denoiser, Sampler(Euler(4)))
    walk.moment.give(walk.moment.ask())
    state = walk.state()
    whole = finish(walk)
    assert torch.equal(finish(begin(denoiser, Sampler(Euler(4)), state=state)), whole)
    bare = finish(begin(denoiser, Sampler(Euler(4)), state={**state, "memory": ["dict"]}))
    assert not torch.allclose(bare, whole, atol=1e-4)


@torch.no_grad()
def test_a_state_is_a_copy_and_fits_its_own_walk_alone(make_dit):
    denoiser, _ = cached(make_dit, Euler(4), "flow")
    walk = begin(denoiser, Sampler(Euler(4)))
    walk.moment.give(walk.moment.ask())
    state, before = walk.state(), stored(walk.state())
    for value in walk.memory.values():
        for branch in value.values():
            branch["value"].image.zero_()
    walk.given[0].zero_()
    assert state["given"][0].equal(before["given"][0]) and str(state["memory"]) == str(before["memory"])
    with pytest.raises(ValueError, match=r"generation at the times 1, 0.75, .*this sampler's are 1, 0.6667"):
        begin(denoiser, Sampler(Euler(3)), state=state)
    with pytest.raises(ValueError, match=r"samples of \(2, 4, 8, 8\), this walk's of \(3, 4, 8, 8\)"):
        Sampler(Euler(4)).walk(denoiser, FlowMatching(), labels(3), torch.arange(3), state=state)


def test_a_memory_is_packed_into_plain_values_and_comes_back():
    x = torch.arange(3.0)
    memory = {("a", 1, "cond"): {"x": x, "pair": Branch(x, None)}, "list": [1, (2.5, "b", None, True), [], {}], 3: ()}
    back = unpack(stored({"m": pack(memory, Tensor.clone)})["m"])
    assert repr(back) == repr(memory) and isinstance(back["a", 1, "cond"]["pair"], Branch)
    for odd in (nn.Linear(1, 1), {1}, torch.float32, Counter()):
        with pytest.raises(ValueError, match=rf"holds a {type(odd).__name__}, which can be neither saved nor copied"):
            pack({"m": [odd]}, Tensor.clone)


# ---- asking ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_dense_answer_is_that_of_the_model_without_its_cache_and_leaves_the_memory_alone(make_dit):
    denoiser, _ = cached(make_dit, Euler(5), "flow")
    sampler, seen = Sampler(Euler(5), guidance=2.0, interval=(0.3, 0.9)), []
    whole = sampler(denoiser, FlowMatching(), labels(2, 3), torch.arange(2), seed=5)
    walk = begin(denoiser, sampler, watch=lambda step, out: seen.append(step.index))
    teacher = begin(same(make_dit), sampler)
    differ = []
    for moment in walk:
        before = str(pack(walk.memory, Tensor.clone))
        dense, again = moment.ask(dense=True), moment.ask(dense=True)
        assert str(pack(walk.memory, Tensor.clone)) == before and torch.equal(dense, again)
        answer = moment.ask()
        assert torch.equal(moment.ask(dense=True), dense)
        differ.append(not torch.equal(answer, dense))
        teacher.moment.x = moment.x
        assert torch.equal(teacher.moment.ask(), dense)
        moment.give(answer)
        teacher.moment.give(answer)
    assert torch.equal(walk.x, whole) and seen == list(range(5))
    assert differ == [False, False, False, True, False]  # the interval's ends compute all: 1 of 0 to 4 is repeated


@torch.no_grad()
def test_without_a_step_a_cache_predicts_as_the_dense_model(make_dit, batch):
    plain, repeating = same(make_dit), edit.apply(same(make_dit), {"reuse": Reuse(3)})
    for _ in range(2):
        assert torch.equal(repeating(*batch, step=None).sample, plain(*batch).sample)


@dataclass
class Diary(Edit):
    """Writes down each evaluation that it remembers."""

    def apply(self, denoiser: Denoiser) -> None:
        unit = denoiser.units[0]

        def remembering(stream: Stream) -> Stream:
            if stream.step is None:
                return unit(stream)
            pages = stream.step.recall(self.name, 0).setdefault("pages", [])
            pages.append(stream.image.mean())
            return unit(replace(stream, image=stream.image + torch.stack(pages).sum()))

        denoiser.units[0] = remembering


@torch.no_grad()
def test_an_evaluation_is_asked_as_often_as_wanted_and_remembered_once(make_dit):
    denoiser = edit.apply(make_dit(), {"diary": Diary()})
    whole = Sampler(Euler(4))(denoiser, FlowMatching(), labels(2, 3), torch.arange(2), seed=5)
    walk = begin(denoiser, Sampler(Euler(4)))
    for moment in walk:
        first, second = (moment.ask(remember=False) for _ in range(2))
        answer = moment.ask()
        assert torch.equal(first, answer) and torch.equal(second, answer)
        moment.ask(remember=False)
        with pytest.raises(RuntimeError, match=r"evaluation \d was asked before, and edits would remember it twice"):
            moment.ask()
        with pytest.raises(RuntimeError, match="take the state after give"):
            walk.state()
        moment.give(answer)
        assert [len(v["pages"]) for v in walk.memory.values()] == [moment.step.index + 1]
    assert torch.equal(walk.x, whole)


def test_an_evaluation_is_given_one_prediction():
    walk = begin(Gaussian(), Sampler(Euler(3)))
    with pytest.raises(RuntimeError, match="evaluation 0 was given no prediction"):
        for moment in walk:
            moment.ask()
    moment.give(moment.ask(remember=False))
    with pytest.raises(RuntimeError, match="evaluation 0 was given a prediction already"):
        moment.give(moment.ask(remember=False))


@dataclass
class Perturbing(Edit):
    perturbs = True

    def apply(self, denoiser: Denoiser) -> None:
        """Changes nothing."""


def test_perturbed_guidance_has_no_dense_answer(dit):
    denoiser = edit.apply(dit, {"p": Perturbing()})
    with pytest.raises(ValueError, match="a dense answer has no step: set perturbation=0"):
        begin(denoiser, Sampler(Euler(2), perturbation=1.0)).moment.ask(dense=True)


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients(denoiser: Denoiser, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(denoiser.parameters()), allow_unused=True)
    return [g for g in found if g is not None]


def test_gradients_reach_the_parameters_through_an_answer(make_dit):
    denoiser = make_dit()
    moment = begin(denoiser, Sampler(Euler(4))).moment
    moment.give(moment.ask().detach())
    assert not moment.walk.x.requires_grad
    moment = moment.walk.moment
    mine = gradients(denoiser, moment.ask().square().mean())
    direct = denoiser(moment.x, torch.full((2,), 0.75), labels(2, 3)).sample
    theirs = gradients(denoiser, direct.square().mean())
    assert len(mine) == len(theirs) > 10 and all(map(torch.equal, mine, theirs))
    with torch.no_grad():
        assert not moment.ask(remember=False).requires_grad
    assert not Sampler(Euler(2))(denoiser, FlowMatching(), labels(2), torch.arange(2)).requires_grad


def test_a_whole_rollout_has_one_graph_unless_it_is_cut(make_dit):
    denoiser, _ = cached(make_dit, Euler(2), "flow")

    def remembered(walk: Walk) -> list[bool]:
        return [b["value"].image.requires_grad for unit in walk.memory.values() for b in unit.values()]

    def trained(cut: bool) -> Tensor:
        walk = begin(denoiser, Sampler(Euler(2)))
        for moment in walk:
            answer = moment.ask()
            moment.give(answer.detach() if cut else answer)
            assert set(remembered(walk)) == {moment.step.index == 0 or not cut}  # the second repeats the first's
            if cut:
                walk.detach()
                assert set(remembered(walk)) == {False}
        return walk.x

    assert trained(cut=False).requires_grad and not trained(cut=True).requires_grad
    assert torch.equal(trained(cut=False), trained(cut=True))


# ---- edits that were made for some samplers --------------------------------------------------------------------------


@dataclass
class Fixed(Edit):
    """Made for generations at certain times, each with a number of its own, which a network learns from the time."""

    times: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25, 0.0)

    def __post_init__(self):
        self.times = tuple(self.times)

    def check(self, sampler: Sampler, times: tuple[float, ...]) -> None:
        if times != self.times:
            raise ValueError(f"{self.name} was trained at the times {self.times}, the sampler asks at {times}")

    def apply(self, denoiser: Denoiser) -> nn.Module:
        own, unit = self.module(next(denoiser.parameters()).device), denoiser.units[0]

        def shifted(stream: Stream) -> Stream:
            stream = unit(stream)
            if stream.step is None:
                return stream
            assert stream.step.times == self.times
            return replace(stream, image=stream.image + self.numbers(own)[stream.step.index])

        denoiser.units[0] = shifted
        return own

    def module(self, device: torch.device) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).to(device)

    def numbers(self, own: nn.Module) -> Tensor:
        return own(torch.tensor(self.times[:-1])[:, None])[:, 0]

    @torch.no_grad()
    def compact(self, own: nn.Module | None) -> tuple[Edit, nn.Module | None] | None:
        assert own is not None
        table = nn.ParameterList([self.numbers(own)])
        return Table(self.times), table


@dataclass
class Table(Fixed):
    """The numbers, without the network."""

    def module(self, device: torch.device) -> nn.Module:
        return nn.ParameterList([torch.empty(len(self.times) - 1, device=device)])

    def numbers(self, own: nn.Module) -> Tensor:
        return own[0]

    def compact(self, own: nn.Module | None) -> None:
        return None


OTHER = r"fixed was trained at the times \(1.0, 0.75, 0.5, 0.25, 0.0\), the sampler asks at \(1.0, 0.5, 0.0\)"


def fixed(make_dit: Callable) -> Denoiser:
    return edit.apply(same(make_dit), {"fixed": Fixed(), "lora": LoRA(2)})


def test_an_edit_refuses_a_sampler_that_it_was_not_made_for(make_dit, tmp_path):
    denoiser = fixed(make_dit)
    for sampler in (Sampler(Euler(2)), Sampler(Grid((1.0, 0.5)))):
        with pytest.raises(ValueError, match=OTHER):
            sampler(denoiser, FlowMatching(), labels(2), torch.arange(2))
        with pytest.raises(ValueError, match=OTHER):
            begin(denoiser, sampler)
    path = save(denoiser, tmp_path / "a", sampler=Sampler(Euler(4)))
    artifact = load(path, trusted=("test_stepped",))
    assert adjusted(artifact, 1, 4).solver == adjusted(artifact, 1, None).solver == Euler(4)
    with pytest.raises(ValueError, match=OTHER):
        adjusted(artifact, 1, 2)


def test_a_run_refuses_a_sampler_that_its_edit_was_not_made_for(tmp_path, monkeypatch):
    def check(self, sampler: Sampler, times: tuple[float, ...]) -> None:
        if len(times) != 5:
            raise ValueError(f"{self.name} was trained for 4 steps, the sampler has {len(times) - 1}")

    monkeypatch.setattr(LoRA, "check", check)
    for steps in (4, 3):
        cfg = config(tmp_path, "edits=lora", f"sampler.solver.steps={steps}")
        settle(cfg)
        if steps == 4:
            assemble(cfg)
            continue
        with pytest.raises(UserError, match="sampler: lora was trained for 4 steps, the sampler has 3"):
            assemble(cfg)


# ---- what is left at inference ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_is_left_at_inference_predicts_the_same_and_loads_again(make_dit, tmp_path):
    trained, sampler = fixed(make_dit), Sampler(Euler(4), guidance=2.0)
    for p in trained.edits.parameters():
        p.add_(1.0)

    def images(denoiser: Denoiser) -> Tensor:
        return sampler(denoiser, FlowMatching(), labels(2, 3), torch.arange(2))

    smaller = compact(trained)
    assert [type(e).__name__ for e in smaller.applied.values()] == ["Table", "LoRA"]
    assert [e.name for e in smaller.applied.values()] == list(smaller.applied) == ["fixed", "lora"]
    assert isinstance(trained.applied["fixed"], Fixed) and not smaller.training
    assert [k for k in smaller.state_dict() if k.startswith("edits.fixed")] == ["edits.fixed.0"]
    weight = "model.blocks.0.mlp.fc1.weight"
    assert smaller.state_dict()[weight].data_ptr() == trained.state_dict()[weight].data_ptr()  # no copy of the model
    assert torch.equal(images(smaller), images(trained))
    assert not torch.equal(images(smaller), images(same(make_dit)))
    again = load(save(smaller, tmp_path / "a", sampler=sampler), trusted=("test_stepped",)).denoiser
    assert torch.equal(images(again), images(trained)) and isinstance(again.applied["fixed"], Table)
    assert compact(again) is again and compact(plain := make_dit()) is plain


@torch.no_grad()
def test_a_full_state_stands_in_for_weights_that_are_elsewhere(make_dit):
    """As `recipes.training.keep` has it: the gathered state of a sharded average."""
    trained = fixed(make_dit)
    state = {k: v + 0.5 for k, v in trained.state_dict().items()}
    smaller = compact(trained, state)
    trained.load_state_dict(state)
    images = [
        Sampler(Euler(4))(d, FlowMatching(), labels(2, 3), torch.arange(2))
        for d in (smaller, trained, compact(trained))
    ]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_a_module_that_does_not_fit_the_edit_that_was_left_is_refused(make_dit, monkeypatch):
    monkeypatch.setattr(Fixed, "compact", lambda self, own: (Table(self.times), None))
    with pytest.raises(
        ValueError, match="the state that Edit.compact left does not fit this model: 1 keys are missing"
    ):
        compact(fixed(make_dit))


@pytest.mark.parametrize(("separate", "seen"), [(False, ["joint"]), (True, ["cond", "uncond"])])
def test_who_looks_sees_each_branch_with_its_taps_of_dense_answers_too(separate, seen, make_dit, monkeypatch):
    denoiser = edit.apply(make_dit(), {"reuse": Reuse()})
    monkeypatch.setattr(Reuse, "separate", separate)
    walk = begin(denoiser, Sampler(Euler(4), guidance=2.0))
    with torch.no_grad():
        for moment in walk:
            for told in ({}, {"remember": False}, {"dense": True}):
                if told or not moment.asked:
                    outputs = {}
                    moment.ask(**told, taps=(-1,), look=outputs.__setitem__)
                    assert list(outputs) == seen
                    tokens = [out.trace["unit.2"] for out in outputs.values()]
                    assert sum(len(v) for v in tokens) == 4
                    executed = [k for out in outputs.values() for k in out.trace if k.startswith("reuse.")]
                    assert bool(executed) != ("dense" in told)
            moment.give(moment.x * 0)


def test_the_guided_prediction_of_a_model_is_asked_at_any_sample(make_dit):
    denoiser, sampler = make_dit(), Sampler(Euler(4), guidance=2.0)
    walk = begin(denoiser, sampler)
    guided = sampler.guided(denoiser, labels(2, 3), torch.arange(2))
    with torch.no_grad():
        for moment in walk:
            own = moment.ask()
            assert torch.equal(own, guided(Query(moment.x, moment.step.sigma, moment.end), None))
            moment.give(own)


def test_a_state_may_be_made_elsewhere(make_dit):
    walk = begin(make_dit(), Sampler(Euler(2)))
    with torch.no_grad():
        walk.moment.give(walk.moment.ask())
    assert walk.state(lambda v: v.double())["given"][0].dtype == torch.float64
