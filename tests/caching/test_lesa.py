"""LESA: which evaluations are computed, what stands in for the others, what of it learns, and what is left of it."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from caches import executed, family, paint, sampler, told
from families import solver_at

import edit
from edit.caching.engine import Latest, Scheduled
from edit.caching.graphs import Graphed
from edit.caching.kan import BASES, Kan, KanLayer, bases
from edit.caching.lesa import LESA, SITES, BakedLESA, Schedule, full
from edit.caching.lesa_predictor import RING, Mixed, Predictors, Table
from edit.caching.lesa_training import FollowHistory
from edit.caching.spans import SpanCached
from edit.caching.taylor import Ladder
from edit.denoiser import Denoiser
from edit.edits import compact, trains
from edit.objectives import DDPM, FlowMatching, schedule_tables
from edit.predictions import default_objective
from edit.rollout import Answer, Visit
from edit.sampling import Sampler
from edit.solvers import DDIMSolver, Euler, Heun, times
from edit.stream import Branch, Output, Step, pack

STEPS = 8
OF_8 = Schedule(Euler(STEPS), FlowMatching())


def scheduled(denoiser: Denoiser) -> Schedule:
    return Schedule(solver_at(denoiser, STEPS), default_objective(denoiser))


def small(**fields) -> LESA:
    return LESA(**{"interval": 3, "steps": STEPS, "hidden": 8, **fields})


def moved(net, name="lesa"):
    """After some training."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.edits[name].parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return net


# ---- which are computed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "anchors", "speed"),
    [
        (5, [0, 1, 2, 3, 7, 12, 17, 22, 27, 32, 37, 42, 47], 3.85),
        (7, [0, 1, 2, 3, 9, 16, 23, 30, 37, 44], 5.00),
        (8, [0, 1, 2, 3, 10, 18, 26, 34, 42], 5.56),
        (10, [0, 1, 2, 3, 12, 22, 32, 42], 6.25),
    ],
)
def test_of_50_evaluations_the_published_ones_are_computed(interval, anchors, speed):
    found = [s for s in range(50) if full(s, interval, 3, 3)]
    assert found == anchors and round(50 / len(found), 2) == speed


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_a_generation_runs_the_units_at_these_alone(name):
    net = family(name, lesa=small(forced=4))
    shares = executed(net, STEPS, "lesa")["joint"]
    assert [all(s) for s in shares] == [any(s) for s in shares] == [full(s, 3, 3, 4) for s in range(STEPS)]


@dataclass
class Hold(SpanCached):
    """Interval reuse of the last hidden state."""

    interval: int = 3
    end: str = "units"

    def apply(self, denoiser):
        gate = Scheduled(lambda step: full(step.index, self.interval, 3, 3))
        self.cache(denoiser, gate, Latest(), "hidden", end=self.end)


SITED = [("dit", site) for site in SITES] + [("flux", "post_norm"), ("sd3 dual", "velocity"), ("pixart", "post_norm")]


@pytest.mark.parametrize(("name", "network"), [("dit", "kan"), ("dit", "mlp"), ("flux", "kan")])
def test_without_a_step_size_it_is_interval_reuse_to_the_bit(name, network):
    wanted = paint(family(name, held=Hold()), STEPS)
    found = paint(family(name, lesa=small(init="reuse", network=network)), STEPS)
    assert torch.equal(found, wanted)
    assert not torch.equal(paint(family(name, lesa=small(network=network)), STEPS), wanted)  # as the release begins


@pytest.mark.parametrize(("name", "site"), SITED[1:])
def test_at_every_site_it_is_interval_reuse_there_without_a_step_size(name, site):
    wanted = paint(family(name, held=Hold(end=SITES[site])), STEPS)
    assert torch.equal(paint(family(name, lesa=small(init="reuse", site=site)), STEPS), wanted)
    assert not torch.equal(paint(family(name, held=Hold()), STEPS), wanted)


@pytest.mark.parametrize("site", SITES)
def test_with_interval_1_it_is_the_dense_sampler_to_the_bit(site):
    assert torch.equal(paint(family("dit", lesa=small(interval=1, site=site)), STEPS), paint(family("dit"), STEPS))


@pytest.mark.parametrize(("site", "norms", "layers"), [("last_hidden", 8, 8), ("post_norm", 5, 8), ("velocity", 5, 5)])
def test_a_predicted_evaluation_runs_what_lies_behind_its_site_alone(site, norms, layers):
    net, calls = family("dit", lesa=small(site=site)), []
    last = net.model.final_layer
    last.norm_final.register_forward_hook(lambda *_: calls.append("norm"))
    last.linear.register_forward_hook(lambda *_: calls.append("layer"))
    paint(net, STEPS)
    assert (calls.count("norm"), calls.count("layer")) == (norms, layers)  # of 8 evaluations 5 are computed


def test_a_family_that_has_its_readout_in_one_piece_is_cached_behind_the_last_unit_alone(monkeypatch):
    from edit.backbones.dit import DiT

    monkeypatch.setattr(DiT, "last_norm", Denoiser.last_norm)
    with pytest.raises(ValueError, match="LESA: this dit does not tell its last norm from its output layer: cache"):
        family("dit", lesa=small(site="post_norm"))


def test_separate_branches_are_predicted_as_those_that_share_a_batch():
    joint = moved(family("dit", lesa=small()))
    apart = family("dit", lesa=small())
    apart.load_state_dict(joint.state_dict())
    apart.applied["lesa"].separate = True
    assert executed(apart, STEPS, "lesa").keys() == {"cond", "uncond"}
    torch.testing.assert_close(paint(apart, STEPS), paint(joint, STEPS))


# ---- what is predicted -----------------------------------------------------------------------------------------------


def predictor(mix: list[float], bias: float, alpha: float, steps: int = 20) -> Mixed:
    baked = BakedLESA(steps=steps, boundaries=(), windows=(RING,), guided=False)
    own = Table(baked)
    own.mix[..., -len(mix) :], own.bias[:], own.table[:] = torch.tensor(mix), bias, alpha
    return Mixed(baked, own)


def at(index: int, steps: int = 20, branch: str = "cond") -> Step:
    ts = tuple(times(steps, 1.0))
    return Step(index, steps, ts[index], branch, times=ts)


@pytest.mark.parametrize("gap", [1, 5, 15])
def test_a_difference_of_two_is_a_straight_line_of_any_length(gap):
    start, slope, state = torch.tensor([[[1.0, -2.0]]]), torch.tensor([[[0.5, 3.0]]]), {}
    line = predictor([-1.0, 1.0], 0.0, 1.0)
    for s in range(3):
        line.observe(state, at(s), Branch(start + slope * s))
    for s in range(3, 3 + gap):
        assert torch.equal(line.predict(state, at(s)).image, start + slope * s)
    line.observe(state, at(3 + gap), Branch(start))
    assert len(state["history"]) == min(RING, gap + 4) and torch.equal(state["history"][-1], start)


def test_a_short_history_begins_with_its_oldest_value():
    state, late = {}, predictor([1.0] + [0.0] * (RING - 1), 0.5, 2.0)
    for s in range(2):
        late.observe(state, at(s), Branch(torch.full((1, 1, 1), 10.0 + s)))
    assert late.predict(state, at(2)).image.item() == 11 + 2 * (10 + 0.5)


def test_each_guidance_branch_has_weights_of_its_own():
    baked = BakedLESA(steps=20, boundaries=(), windows=(1,))
    own, history = Table(baked), torch.arange(1.0, 5.0)[:, None, None]
    own.mix[0, ..., -1], own.mix[1, ..., -1], own.table[:] = 1.0, 10.0, 1.0
    for branch, samples, wanted in (
        ("joint", slice(0, 4), [2, 4, 33, 44]),
        ("cond", slice(0, 2), [2, 4]),
        ("uncond", slice(2, 4), [33, 44]),
    ):
        state: dict = {}
        Mixed(baked, own).observe(state, at(0), Branch(history[samples]))
        assert Mixed(baked, own).predict(state, at(1, branch=branch)).image.flatten().tolist() == wanted


def test_stages_lie_between_noise_levels():
    edit_ = LESA()
    assert [edit_.stage(t) for t in (1.0, 0.91, 0.9, 0.51, 0.5, 0.0)] == [0, 0, 1, 1, 2, 2]
    shifted = times(50, 3.1582)  # FLUX at 1024 x 1024: mu = 1.15
    found = [edit_.stage(t) for t in shifted[:-1]]
    assert (found.index(1), found.index(2)) == (13, 38)


def test_the_network_reads_how_much_higher_the_present_level_is_than_each():
    offsets = Predictors(LESA(steps=2, hidden=4)).offsets((1.0, 0.75, 0.0))
    assert offsets.tolist() == [[0.0, 0.25, 1.0], [-0.25, 0.0, 0.75]]


def test_kinds_of_evaluations_are_of_a_stage_and_of_the_values_there_are():
    assert [small().kind(at(i)) for i in (0, 3, 8, 9, 19)] == [(0, 0), (1, 3), (1, 8), (1, 8), (2, 8)]


def test_of_a_model_of_noise_stages_and_offsets_are_of_noise_levels():
    """Halfway through its thousand steps DDPM's sample is three quarters noise."""
    net, objective = moved(family("pixart", lesa=small(steps=10))), DDPM()
    walk = sampler(net, 10).walk(net, objective, told(net), torch.arange(2))
    step = walk.moment.step
    signal, spread, *_ = schedule_tables(1000, 1e-4, 0.02, torch.device("cpu"))
    at_ = (torch.tensor(step.times[:-1]) * 1000).round().long() - 1
    torch.testing.assert_close(torch.tensor(step.levels[:-1]), (spread / (signal + spread))[at_])
    assert step.levels[-1] == 0 and step.levels == Schedule(DDIMSolver(10), objective).levels
    edit_, own = net.applied["lesa"], net.edits["lesa"]
    assert [edit_.kind(replace(step, index=i))[0] for i in range(10)] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    seen = []
    own.offsets = lambda levels: seen.append(levels) or Predictors.offsets(own, levels)
    own.now(slice(0, 1), replace(step, index=5))
    own.alphas(step.levels)
    assert seen == [step.levels] * 2


# ---- the network and its table ---------------------------------------------------------------------------------------


def test_bases_sum_to_1_inside_and_are_0_outside():
    x = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    found = bases(x)
    assert found.shape == (1601, BASES) and (found >= 0).all()
    inside = (x >= -3) & (x < 3)
    torch.testing.assert_close(found.sum(-1)[inside], torch.ones(int(inside.sum()), dtype=torch.float64))
    assert not found[x.abs() >= 6.6].any()


def test_bases_are_the_splines_of_the_recursion():
    knots = torch.arange(-3, 9, dtype=torch.float64) * 1.2 - 3
    x = torch.linspace(-6.5, 6.5, 101, dtype=torch.float64)[:, None]
    b = ((x >= knots[:-1]) & (x < knots[1:])).double()
    for k in (1, 2, 3):
        left = (x - knots[: -k - 1]) / (knots[k:-1] - knots[: -k - 1]) * b[:, :-1]
        right = (knots[k + 1 :] - x) / (knots[k + 1 :] - knots[1:-k]) * b[:, 1:]
        b = left + right
    torch.testing.assert_close(bases(x[:, 0]), b)


def test_the_layer_has_the_gradients_of_its_values_and_without_weights_gives_0():
    torch.manual_seed(0)
    layer = KanLayer(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))
    with torch.no_grad():
        layer.spline.zero_()
        torch.testing.assert_close(layer(x), torch.nn.functional.silu(x) @ layer.base.T)
    layer.zero()
    assert not layer(x).any()


def test_initial_values_are_those_of_the_release():
    torch.manual_seed(0)
    layer = KanLayer(64, 64).requires_grad_(False)
    assert layer.base.abs().max() <= 1 / 8 and layer.base.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)
    limit = (5 / 64) ** 0.5
    assert layer.scale.abs().max() <= limit and layer.scale.std() == pytest.approx(limit / 3**0.5, rel=0.1)
    knots = torch.linspace(-3, 3, 6)
    noise = bases(knots) @ layer.spline[..., None]  # what the splines go through
    assert noise.abs().max() <= 0.5 * 0.02 / 5 + 1e-6 and noise.std() == pytest.approx(0.02 / 5 / 12**0.5, rel=0.1)


def test_three_experts_of_50_evaluations_have_the_published_number_of_parameters():
    with torch.device("meta"):
        one, two = (Predictors(LESA(guided=guided)) for guided in (False, True))
    count = [sum(p.numel() for p in own.parameters()) for own in (one, two)]
    assert count == [2_365_463, 2 * 2_365_463]
    assert sum(p.numel() for p in Kan((51, 256, 256, 1)).parameters()) == 788_480


@pytest.mark.parametrize("network", ["kan", "mlp"])
def test_the_table_is_the_network_at_every_evaluation_and_nothing_else_is_left(network):
    torch.manual_seed(0)
    lesa = small(schedule=Schedule(Euler(STEPS, 3.0), FlowMatching()), network=network)
    own = Predictors(lesa)
    left, baked = lesa.compact(own)
    assert set(dict(baked.named_buffers())) == {"mix", "bias", "table"} and not list(baked.parameters())
    ts = lesa.schedule.times
    for s in range(STEPS):
        mix, bias, alpha = own.now(slice(0, 2), Step(s, STEPS, ts[s], "joint", times=ts))
        stage = lesa.stage(ts[s])
        torch.testing.assert_close(baked.table[:, s], alpha.detach(), rtol=0, atol=1e-6)
        assert torch.equal(baked.mix[:, stage, -mix.shape[1] :], mix.detach())
        assert torch.equal(baked.bias[:, stage], bias.detach())
    assert len(baked.table.unique()) == 2 * STEPS
    assert LESA().compact(Predictors(LESA(hidden=8))) is None  # of no schedule: there is no table


@pytest.mark.parametrize(
    ("name", "site"),
    [("dit", "velocity"), ("pixart", "last_hidden"), ("flux", "post_norm")]
    + [pytest.param("flux", "last_hidden", marks=pytest.mark.slow)],
)
def test_the_artifact_has_the_table_and_paints_the_same(name, site, tmp_path):
    of = scheduled(family(name))
    net = moved(family(name, lesa=small(schedule=of, site=site)))
    wanted = paint(net, STEPS)
    edit.save(compact(net), tmp_path / "a")
    loaded = edit.load(tmp_path / "a").denoiser
    assert type(loaded.applied["lesa"]) is BakedLESA and loaded.applied["lesa"].site == site
    assert loaded.applied["lesa"].schedule == of
    assert {k for k in loaded.state_dict() if k.startswith("edits.")} == {
        f"edits.lesa.{k}" for k in ("mix", "bias", "table")
    }
    assert torch.equal(paint(loaded, STEPS), wanted)


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_while_it_trains_it_predicts_as_afterwards(name):
    """With a graph, weights are those of one evaluation; else they are looked up among those of all."""
    net = moved(family(name, lesa=small()))
    torch.testing.assert_close(paint(net.train(), STEPS), paint(net.eval(), STEPS), rtol=1e-4, atol=1e-5)


def test_step_sizes_know_nothing_of_the_prompt():
    net, seen = moved(family("dit", lesa=small())), []
    for label in (1, 2):
        condition = replace(told(net), label=torch.full((2,), label))
        walk = sampler(net, STEPS).walk(net, default_objective(net), condition, torch.arange(2))
        with torch.no_grad():
            walk.moment.give(walk.moment.ask())
        seen.append(walk.memory["lesa", 0, "joint"]["value"]["table"])
    assert torch.equal(*seen)


def of_table(steps: int):
    """A model with a table of random numbers."""
    net, g = family("dit", lesa=BakedLESA(interval=3, steps=steps)), torch.Generator().manual_seed(5)
    for buffer in net.edits["lesa"].buffers():
        buffer.copy_(0.3 * torch.randn(buffer.shape, generator=g))
    return net


def test_a_generation_by_table_is_a_few_recorded_kinds_of_evaluations():
    wanted, net = paint(of_table(24), 24), Graphed(of_table(24))
    assert torch.equal(paint(net, 24), wanted) and torch.equal(paint(net, 24), wanted)
    recorded = [k for k in net.kinds.values() if k is not None]
    assert len(recorded) == len(net.kinds) < 16  # computed or not in each stage, and while the history grows


def test_no_number_is_read_from_the_device():
    net = of_table(8).to("meta")
    condition = told(net).map(lambda v: v.to("meta"))
    x = Sampler(Euler(8), 2.0)(net, default_objective(net), condition, torch.arange(2, device="meta"))
    assert x.device.type == "meta"


# ---- what learns -----------------------------------------------------------------------------------------------------


def student(**fields):
    """A model as the recipe prepares it."""
    net = moved(family("dit", lesa=small(**fields))).train()
    for name, p in net.named_parameters():
        p.requires_grad_(trains(net, name))
    return net


def follow(**fields) -> FollowHistory:
    return FollowHistory(interval=3, **fields)


def generations(net, method: FollowHistory, update, numbers=(0, 1)) -> list:
    """Samples at all evaluations of one batch, which the recipe would give to the method; `update` gets the losses."""
    made = sampler(net, STEPS), default_objective(net), told(net, len(numbers)), torch.tensor(numbers)
    given = (net, *made[1:])
    walk, path = made[0].walk(*given), made[0].walk(*given)
    samples = []
    for moment in walk:
        outputs: dict = {}
        with torch.no_grad():
            prediction = path.moment.ask(dense=True, taps=method.teacher_taps, look=outputs.__setitem__)
            path.moment.give(prediction)
        visit = Visit(moment.step, moment.x, made[2], None, 0, 0.0, {}, teacher=Answer(prediction, outputs))
        samples.append(moment.x.clone())
        trains_ = method.trains(moment.step.index, STEPS)
        if trains_ or (goes := method.passing(visit)) is None:
            answers: dict = {}
            with torch.set_grad_enabled(trains_):
                prediction = moment.ask(taps=method.taps, look=answers.__setitem__)
            visit = replace(visit, student=Answer(prediction, answers))
            if trains_:
                update(visit, method.losses(visit)["tokens"].mean())
            with torch.no_grad():
                goes = method.proceed(visit)
        moment.give(goes.detach())
        walk.detach()
        pack(walk.memory, lambda v: pytest.fail("a graph in the memory") if v.requires_grad else v)
    return samples


def test_the_loss_is_the_mean_absolute_distance_of_each_sample_and_branch():
    def answer(value):
        return Answer(torch.zeros(2), {"joint": Output(torch.zeros(2), None, {"unit.1": torch.full((4, 3, 2), value)})})

    visit = SimpleNamespace(student=answer(2.0), teacher=answer(-1.0))
    assert follow().losses(visit)["tokens"].tolist() == [3.0] * 4


def test_gradients_reach_the_stage_of_the_evaluation_alone():
    net, seen = student(boundaries=(0.9, 0.3)), []

    def update(visit, loss):
        net.zero_grad(set_to_none=True)
        loss.backward()
        stage = net.applied["lesa"].stage(visit.step.sigma)
        reached = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}
        wanted = {
            n for n, _ in net.named_parameters() if n.startswith(tuple(f"edits.lesa.sets.{c}.{stage}." for c in (0, 1)))
        }
        assert reached == wanted and len(wanted) == 2 * (2 + 9)
        assert all(p.grad is None for n, p in net.named_parameters() if n not in wanted)
        seen.append(stage)

    generations(net, follow(), update)
    assert set(seen) == {1, 2}


def shaken(net):
    def update(visit, loss):
        assert loss > 0
        with torch.no_grad():
            for p in net.edits["lesa"].parameters():
                p.add_(0.05)

    return update


@pytest.mark.parametrize("true_history", [True, False])
def test_on_the_true_history_no_sample_depends_on_the_predictor_and_on_its_own_they_do(true_history):
    method = follow(true_history=true_history)
    still = generations(student(), method, lambda *_: None)
    net = student()
    after = generations(net, method, shaken(net))
    second = [s for s in range(STEPS) if method.trains(s, STEPS)][1]  # the first that is predicted after an update
    equal = [torch.equal(a, b) for a, b in zip(still, after, strict=True)]
    assert all(equal[: second + 1]) and equal[second + 1 :] == [true_history] * (STEPS - second - 1)


@pytest.mark.parametrize("true_history", [True, False])
def test_units_run_in_no_evaluation_on_the_true_history_and_else_in_full_ones_alone(true_history, monkeypatch):
    from edit.backbones.dit import DiTBlock

    run, calls, net = DiTBlock.forward, [], student()
    monkeypatch.setattr(DiTBlock, "forward", lambda self, s: (calls.append(s.step is not None), run(self, s))[1])
    generations(net, follow(true_history=true_history), lambda *_: None)
    anchors = sum(full(s, 3, 3, 3) for s in range(STEPS))
    assert calls.count(False) == STEPS * len(net.units)  # of the teacher
    assert calls.count(True) == (0 if true_history else anchors * len(net.units))


@pytest.mark.parametrize("site", SITES)
def test_what_is_remembered_is_the_truth_or_what_was_predicted(site):
    for true_history in (True, False):
        net, seen = student(site=site), []
        method = follow(true_history=true_history, site=site)
        (record,) = (f"end.{tap}" if tap != -1 else "unit.1" for tap in method.taps)

        def proceed(self, visit, keep=FollowHistory.proceed, seen=seen, record=record):
            given = keep(self, visit)
            if visit.student is not None and self.trains(visit.step.index, STEPS):
                (memory,) = visit.memory("lesa", 0).values()
                new = memory["value"]["history"][-1]
                truth, mine = (next(iter(a.outputs.values())).trace[record] for a in (visit.teacher, visit.student))
                seen.append((torch.equal(new, truth), torch.equal(new, mine)))
            return given

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FollowHistory, "proceed", proceed)
            generations(net, method, lambda *_: None)
        assert seen and set(seen) == {(true_history, not true_history)}


# ---- what is refused -------------------------------------------------------------------------------------------------

OTHERS = {
    "of generations of 8 evaluations, and this sampler has 10": Sampler(Euler(10)),
    "at the times 1, 0.875, 0.75, 0.625 ... .9., and this sampler's are 1, 0.9545": Sampler(Euler(STEPS, 3.0)),
    "no weights for the branch 'perturbed'": Sampler(Euler(STEPS), perturbation=1.0),
    "weights for cond alone, and this sampler guides at 2": Sampler(Euler(STEPS), 2.0),
}


@pytest.mark.parametrize("said", OTHERS)
@pytest.mark.parametrize("baked", [False, True])
def test_another_sampler_is_refused_in_one_sentence(said, baked):
    lesa = small(schedule=OF_8, guided=False)
    lesa = lesa.compact(Predictors(lesa))[0] if baked else lesa
    with pytest.raises(ValueError, match=said) as refused:
        lesa.check(OTHERS[said], OTHERS[said].solver.times_of(FlowMatching(), ()))
    assert "\n" not in str(refused.value)
    lesa.check(Sampler(Euler(STEPS)), OF_8.times)


def test_guidance_in_an_interval_is_refused_and_a_sampler_that_fits_is_not():
    with pytest.raises(ValueError, match="one history from the first evaluation to the last"):
        small().check(Sampler(Euler(STEPS), 2.0, (0.0, 0.5)), OF_8.times)
    small().check(Sampler(Euler(STEPS), 1.0, (0.0, 0.5)), OF_8.times)
    small(steps=2 * STEPS - 1, schedule=Schedule(Heun(STEPS), FlowMatching()))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"windows": (4, 8)}, "for each of the 3 stages"),
        ({"windows": (4, 8, 9)}, "1 to 8 evaluations"),
        ({"boundaries": (0.5, 0.9)}, "fall from stage to stage"),
        ({"schedule": OF_8, "steps": 9}, "steps is 9, and schedule has 8"),
        ({"interval": 0}, "interval must be at least 1"),
        ({"site": "nowhere"}, "site is one of last_hidden, post_norm, velocity, got 'nowhere'"),
    ],
)
def test_wrong_fields_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        small(**fields)


def test_the_predictor_of_a_flow_is_refused_by_a_model_of_noise():
    with pytest.raises(ValueError, match="schedule is of a model of the velocity, and this pixart predicts the noise"):
        family("pixart", lesa=small(schedule=OF_8))


def test_a_method_for_another_edit_is_refused():
    net = SimpleNamespace(applied={"lesa": small(boundaries=(0.4, 0.2))}, prediction="velocity")
    guided = Sampler(Euler(STEPS), 2.0)
    follow().check(net, guided, OF_8.times)
    with pytest.raises(ValueError, match="interval is 4, and that of the edit lesa is 3: give one number"):
        FollowHistory(interval=4).check(net, guided, OF_8.times)
    with pytest.raises(ValueError, match="site is post_norm, and that of the edit lesa is last_hidden: give one"):
        follow(site="post_norm").check(net, guided, OF_8.times)
    with pytest.raises(ValueError, match="has weights for uncond, which guidance 1 does not train"):
        follow().check(net, Sampler(Euler(STEPS)), OF_8.times)
    with pytest.raises(ValueError, match="no LESA named 'other', its edits: lesa .LESA.: choose edits=lesa"):
        replace(follow(), edit="other").check(net, guided, OF_8.times)
    net.applied["lesa"].boundaries = (0.9, 0.4)
    with pytest.raises(ValueError, match="of the 8 evaluations none is predicted in stage 0 of 3, and its weights"):
        follow().check(net, guided, OF_8.times)


# ---- whether it learns -----------------------------------------------------------------------------------------------


def waves(omega: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    """h_s = sin(phase_s) v + c of 3 samples, the phase growing by omega_s."""
    g = torch.Generator().manual_seed(seed)
    v, c, begin = torch.randn(3, 1, 6, generator=g), torch.randn(3, 1, 6, generator=g), torch.rand(3, 1, 1, generator=g)
    return [torch.sin(6.28 * begin + phase) * v + c for phase in omega.cumsum(0)]


def run(mixed: Mixed, truth: list, closed: bool, update=None) -> float:
    """The mean error of the predicted evaluations of one trajectory."""
    state, errors, steps = {}, [], len(truth)
    for s, h in enumerate(truth):
        if mixed.edit.computed(s):
            mixed.observe(state, at(s, steps), Branch(h))
            continue
        error = (mixed.predict(state, at(s, steps)).image - h).abs().mean()
        if update is not None:
            update(error)
        errors.append(error.item())
        state["history"][-1] = state["history"][-1].detach() if closed else h
    return sum(errors) / len(errors)


def taught(omega: torch.Tensor, updates: int, closed: float = 0.0, rate: float = 3e-3, **fields) -> Mixed:
    """A predictor after so many updates, the last part of them on its own history."""
    torch.manual_seed(0)
    lesa = LESA(**{"interval": 7, "steps": len(omega), "hidden": 16, "guided": False, **fields})
    mixed = Mixed(lesa, Predictors(lesa))
    optimizer = torch.optim.AdamW(mixed.own.parameters(), rate)
    done = 0

    def update(loss):
        nonlocal done
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mixed.own.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - min(1.0, done / updates)) + 1e-5
        optimizer.step()
        done += 1

    seed = 1
    while done < updates:
        run(mixed, waves(omega, seed), done >= (1 - closed) * updates, update)
        seed += 1
    return mixed


def error(mixed, omega, closed=True) -> float:
    with torch.no_grad():
        return sum(run(mixed, waves(omega, seed), closed) for seed in (1001, 1002, 1003)) / 3


def taylor(order: int, omega) -> float:
    """The same of the last anchors' polynomial."""
    ladder, found = Ladder(order), []
    for seed in (1001, 1002, 1003):
        state: dict = {}
        for s, h in enumerate(waves(omega, seed)):
            if full(s, 7, 3, 3):
                ladder.observe(state, float(s), Branch(h))
            else:
                found.append((ladder.predict(state, float(s)).image - h).abs().mean().item())
    return sum(found) / len(found)


@pytest.mark.slow
def test_on_its_own_history_it_comes_nearer_than_reuse_taylor_and_what_only_saw_the_truth():
    omega = torch.full((50,), 0.2)
    free, forced = (error(taught(omega, 300, closed), omega) for closed in (0.5, 0.0))
    assert free < 0.9 * min(taylor(order, omega) for order in (0, 1, 2))
    assert free < 0.9 * forced


@pytest.mark.slow
def test_three_experts_come_nearer_than_one_where_each_stage_is_another_motion():
    omega = torch.cat([torch.full((15,), 2.5), torch.full((17,), 0.3), torch.full((18,), 1.2)])
    three = taught(omega, 600, rate=2e-2, boundaries=(0.7, 0.36), windows=(3, 3, 3))
    one = taught(omega, 600, rate=2e-2, boundaries=(), windows=(3,))
    assert error(three, omega, False) < 0.5 * error(one, omega, False)
