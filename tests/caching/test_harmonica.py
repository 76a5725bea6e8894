"""HarmoniCa: the oracles of methods/harmonica.md, its run, and what its artifact is."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from caches import FEW, branches_of, executed, family, generated, paint, sampler, told
from hydra import compose, initialize_config_dir
from small_runs import CONFIGS, TWO_RANKS, config, losses, rows, train, train_ranks
from torch import Tensor
from weights import randomise

import edit
from edit.backbones.dit import DiTConfig
from edit.caching.harmonica import HarmoniCa
from edit.caching.harmonica_training import Effects, StepWiseDenoising
from edit.caching.reuse import Reuse
from edit.caching.table_reuse import TableReuse
from edit.calibrating import OnData
from edit.edits import compact, trains
from edit.objectives import FlowMatching
from edit.predictions import default_objective
from edit.rollout import Answer
from edit.sampling import Sampler
from edit.solvers import Euler, Heun
from edit.stream import Branch, Condition, Step, pack
from edit.unit import Divides, core
from recipes.config.check import check
from recipes.config.sources import register
from recipes.models import made

T = 4


def routed(name: str = "dit", steps: int = T, soft: bool = False, **settings):
    """A model with a router, frozen as in a run; soft or hard."""
    denoiser = family(name, it=HarmoniCa(steps, **settings))
    for key, p in denoiser.named_parameters():
        p.requires_grad_(p.requires_grad and trains(denoiser, key))
    denoiser.edits["it"].train(soft)
    return denoiser


def fill(denoiser, r: float, rows=range(1, T)) -> None:
    """Set r = sigmoid(rho), exactly at 0 and 1."""
    with torch.no_grad():
        for i in rows:
            denoiser.edits["it"].rho[i].fill_(torch.tensor(r).logit())


def drawn(width: int, seed: int = 0) -> list[str]:
    g = torch.Generator().manual_seed(seed)
    rest = ["".join(map(str, torch.randint(0, 2, (width,), generator=g).tolist())) for _ in range(T - 1)]
    return ["1" * width, *rest]


def decide(denoiser, table: list[str]) -> None:
    """Set rho so that its hard table is this one."""
    with torch.no_grad():
        for row, digits in zip(denoiser.edits["it"].rho, table, strict=True):
            row.copy_(torch.tensor([4.0 if d == "1" else -4.0 for d in digits]))


def columns_of(denoiser) -> list[tuple[int, str]]:
    """Unit and branch of each column."""
    columns = HarmoniCa().columns(denoiser)
    return [(i, name) for i, names in columns.items() for name in names]


def walk_of(denoiser, guidance: float = 2.0):
    given = denoiser, default_objective(denoiser), told(denoiser), torch.arange(2)
    return sampler(denoiser, T, guidance=guidance).walk(*given)


def ask(moment, dense: bool = False, **options) -> Answer:
    outputs: dict = {}
    return Answer(moment.ask(dense=dense, look=outputs.__setitem__, **options), outputs)


def launches(denoiser) -> list[tuple[int, int, str]]:
    """Evaluation, unit and branch of all branches that are computed from now on."""
    launched: list = []
    for i, unit in enumerate(map(core, denoiser.units)):

        def spy(stream, branch, run, i=i):
            launched.append((stream.step.index, i, branch))
            return run(stream)

        unit.slots.branch.before = spy
    return launched


# ---- 1: hard decisions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
def test_where_all_is_computed_a_generation_is_the_dense_one_bit_for_bit(name):
    denoiser = routed(name)
    fill(denoiser, 0.999)
    whole = paint(family(name))
    assert torch.equal(paint(denoiser), whole)
    assert torch.equal(paint(family(name, it=TableReuse(("1",) * T))), whole)


@pytest.mark.parametrize("name", FEW)
def test_where_only_the_first_row_computes_its_outputs_are_repeated_under_present_gates(name):
    denoiser, seen = routed(name), {}
    fill(denoiser, 0.0)
    for i, unit in enumerate(map(core, denoiser.units)):

        def spy(stream, branch, run, i=i, slot=unit.slots.branch):
            seen.setdefault((i, branch), []).append(out := slot(stream, branch, run))
            return out

        unit.slots.branch = spy
    images = paint(denoiser)
    for first, *others in seen.values():
        assert len(others) == T - 1 and all(torch.equal(first.image, o.image) for o in others)
        assert first.text is None or all(torch.equal(first.text, o.text) for o in others)
    assert torch.equal(images, paint(family(name, it=Reuse(T))))  # the same by another way, gates of each evaluation


# ---- 2: the mixture --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
def test_soft_at_1_is_dense_and_at_0_is_replay(name):
    answers = {}
    for r in (1.0, 0.0):
        denoiser = routed(name, soft=True)
        fill(denoiser, r)
        walk = walk_of(denoiser)
        with torch.no_grad():
            walk.moment.give(walk.moment.ask())
            answers[r] = (walk.moment.ask(remember=False), walk.moment.ask(dense=True))
            denoiser.edits["it"].eval()
            hard = walk.moment.ask(remember=False)
        assert torch.equal(answers[r][0], hard)
    assert torch.equal(*answers[1.0]) and not torch.equal(*answers[0.0])


def mixtures(relaxation: str, r: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one branch at the second evaluation: what was remembered, computed, given, and then remembered."""
    denoiser = routed(soft=True, units=(1,), branches=("feed",), relaxation=relaxation)
    fill(denoiser, r)
    unit, made = core(denoiser.units[1]), []

    def spy(stream, name, run, slot=unit.slots.branch):
        if name == "feed":
            made.append(run(stream).image)
        out = slot(stream, name, run)
        made.append(out.image)
        return out

    unit.slots.branch = spy
    walk = walk_of(denoiser, guidance=1.0)
    with torch.no_grad():
        walk.moment.give(walk.moment.ask())
        old = walk.memory["it", 1, "cond"]["feed"]["value"].image
        made.clear()
        walk.moment.ask()
    return old, made[-2], made[-1], walk.memory["it", 1, "cond"]["feed"]["value"].image


@pytest.mark.parametrize("r", [0.05, 0.3, 0.8])
def test_a_branch_is_linear_in_r_and_is_remembered_above_theta(r):
    old, fresh, given, kept = mixtures("soft", r)
    assert not torch.equal(old, fresh)
    torch.testing.assert_close(given, r * fresh + (1 - r) * old)
    assert torch.equal(kept, given if r > 0.1 else old)


@pytest.mark.parametrize("r", [0.05, 0.3])
def test_straight_through_training_sees_what_inference_does(r):
    old, fresh, given, kept = mixtures("ste", r)
    assert torch.equal(given, fresh if r > 0.1 else old) and torch.equal(kept, given)


# ---- 3: gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relaxation", ["soft", "ste"])
def test_an_update_reaches_the_row_of_its_evaluation_alone(relaxation):
    denoiser = routed(soft=True, relaxation=relaxation)
    rho = denoiser.edits["it"].rho
    before = [p.clone() for p in rho]
    walk = walk_of(denoiser)
    with torch.no_grad():
        walk.moment.give(walk.moment.ask())
    for i in range(1, T):
        denoiser.zero_grad(set_to_none=True)
        moment = walk.moment
        student = ask(moment)
        student.prediction.square().mean().backward()
        assert [j for j, p in enumerate(rho) if p.grad is not None] == [i] and (rho[i].grad != 0).all()
        assert {n for n, p in denoiser.named_parameters() if p.grad is not None} == {f"edits.it.rho.{i}"}
        moment.give(student.prediction.detach())
        pack(walk.memory, lambda v: pytest.fail("a graph") if v.requires_grad else v)
    assert all(torch.equal(p, b) for p, b in zip(rho, before, strict=True)) and (rho[0] == 5).all()


def test_where_old_and_new_agree_beta_alone_pushes_r_down():
    denoiser, beta = routed(soft=True, beta=0.5), 0.5
    x, t, condition = torch.randn(2, 4, 8, 8), torch.full((2,), 0.5), Condition(label=torch.arange(2))
    memory: dict = {}
    for i in range(2):  # the same sample and time: the features are the same, too
        out = denoiser(x, t, condition, step=Step(i, T, 0.5, memory=memory))
    edit_, row = denoiser.applied["it"], denoiser.edits["it"].rho[1]
    distance = (out.sample - denoiser(x, t, condition).sample).square().mean()
    (loss,) = edit_.losses(out.trace).values()
    (distance + loss.mean()).backward()
    r = row.detach().sigmoid()
    torch.testing.assert_close(loss, (beta * r.mean()).expand(2))
    torch.testing.assert_close(row.grad, beta / len(r) * r * (1 - r))


@pytest.mark.parametrize(("relaxation", "r"), [("soft", 0.2), ("ste", 0.05)])
def test_where_they_differ_the_distance_pushes_r_up(relaxation, r):
    denoiser = routed(soft=True, beta=0.0, relaxation=relaxation)
    fill(denoiser, r)
    walk = walk_of(denoiser)
    with torch.no_grad():
        walk.moment.give(walk.moment.ask())
    student, teacher = ask(walk.moment), ask(walk.moment, dense=True)
    (student.prediction - teacher.prediction.detach()).square().mean().backward()
    assert denoiser.edits["it"].rho[1].grad.sum() < 0


def test_the_distance_of_an_evaluation_weighs_as_much_as_its_replay_changes_the_latent():
    own = Effects(T)
    own.weights[2] = 3.0
    one, zero = Answer(torch.full((2, 1, 2, 2), 2.0), {}), Answer(torch.zeros(2, 1, 2, 2), {})
    visit = SimpleNamespace(step=Step(2, T, 0.5), student=one, teacher=zero, own=own)
    assert StepWiseDenoising().losses(visit)["distance"].tolist() == [12.0, 12.0]


# ---- 4: IEPO ---------------------------------------------------------------------------------------------------------


def effects(denoiser, iepo: str = "incremental", seed: int = 0):
    """After a refresh of the weights."""
    method = StepWiseDenoising(iepo)
    data = [{"draw": torch.arange(4), "label": torch.arange(4)}]
    given = denoiser, default_objective(denoiser), sampler(denoiser, T)
    own = method.build(denoiser)
    with torch.no_grad():
        method.refresh(denoiser.eval(), OnData(*given, lambda: iter(data), samples=4, seed=seed), own)
    return own


@pytest.mark.parametrize("iepo", ["incremental", "single"])
def test_an_evaluation_has_no_weight_where_all_is_computed(iepo):
    denoiser = routed()
    fill(denoiser, 1.0, rows=(2,))
    weights = effects(denoiser, iepo).weights
    assert weights[0] == weights[2] == 0 and weights[1] > 0 and weights[3] > 0


def test_harmless_replay_has_no_weight_and_no_error():
    denoiser = routed(branches=("feed",))
    with torch.no_grad():
        for unit in denoiser.model.blocks:
            unit.mlp.fc2.weight.zero_()  # constant in x and t
    fill(denoiser, 0.5)
    own = effects(denoiser)
    assert not own.weights.any() and own.soft == own.hard == 0
    fill(denoiser, 0.01)
    assert effects(denoiser).executed == 1 / T


def test_weights_are_a_function_of_the_seed_and_those_of_one_alone_are_others():
    denoiser = routed()
    fill(denoiser, 0.4)
    one, again, other, single = (effects(denoiser, *a) for a in ((), (), ("incremental", 1), ("single",)))
    assert torch.equal(one.weights, again.weights) and not torch.equal(one.weights, other.weights)
    assert one.weights[1] == single.weights[1] and (one.weights[2:] != single.weights[2:]).all()
    assert one.soft == single.soft > 0 and one.hard == 0 and one.executed == 1  # r = 0.4 is above theta
    assert denoiser.edits["it"].on.all() and not denoiser.edits["it"].training


# ---- 7: cost ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["dit", "pixart", *(pytest.param(n, marks=pytest.mark.slow) for n in ("flux", "sd3 dual"))]
)
def test_a_generation_executes_what_its_table_says_and_launches_no_more(name):
    whole, parts = branches_of(family(name))
    denoiser = family(name)
    columns, table = columns_of(denoiser), drawn(len(parts))
    edit.apply(denoiser, {"it": TableReuse(tuple(table))})
    launched = launches(denoiser)
    shares = executed(denoiser, T, "it")["joint"]
    expected = [(i, *columns[m]) for i, row in enumerate(table) for m, digit in enumerate(row) if digit == "1"]
    assert sorted(launched) == sorted(expected)
    for row, found in zip(table, shares, strict=True):
        of = [[row[m] == "1" for m, (u, _) in enumerate(columns) if u == unit] for unit in range(len(found))]
        assert found == pytest.approx([sum(v) / len(v) for v in of])
    spared = sum(parts[columns[m]] for row in table for m, digit in enumerate(row) if digit == "0")
    assert generated(family(name, it=TableReuse(tuple(table))), T) == 2 * (T * whole - spared)


# ---- what is left: a table -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_what_is_left_is_a_table_that_generates_the_same(name, tmp_path):
    denoiser = routed(name, sampler=sampler(family(name), T))
    wanted = drawn(len(denoiser.edits["it"].rho[0]))
    decide(denoiser, wanted)
    left = compact(denoiser)
    assert isinstance(table := left.applied["it"], TableReuse) and not [*left.edits.parameters(), *left.edits.buffers()]
    digits = "".join(table.rows)
    assert list(table.rows) == wanted and 0 < digits.count("0") < len(digits)
    assert torch.equal(paint(left), paint(denoiser))
    edit.save(left, tmp_path, sampler=table.sampler)
    read = edit.load(tmp_path).denoiser
    assert read.applied["it"] == table and torch.equal(paint(read), paint(denoiser))


class InParts(Divides):
    """The slot `branch` of a fused unit, which asks for attention and feed-forward apart."""

    def __init__(self, before):
        self.before = before

    def divides(self, stream):
        return True

    def __call__(self, stream, name, run):
        return self.before(stream, name, run)


def test_a_fused_branch_that_runs_in_two_parts_has_one_column_and_counts_once():
    net = family("flux", cache=TableReuse(("1", "0", "1")))
    for unit in map(core, net.units[2:]):
        unit.slots.branch = InParts(unit.slots.branch)
    assert executed(net, 3, "cache")["joint"] == [[1.0] * 4, [0.0] * 4, [1.0] * 4]


def test_what_a_table_decides_now_and_next_is_known_before_an_evaluation():
    cache, steps = TableReuse(("1", "0", "01")), [Step(i, 3, 0.5) for i in range(3)]
    assert [cache.kind(step) for step in steps] == [("1", "0"), ("0", "01"), ("01",)]
    assert [cache.due(step, "feed") for step in steps] == [True, False, True]


@torch.no_grad()
def test_after_an_update_rho_is_within_the_limit_on_both_sides():
    net = family("dit", cache=HarmoniCa(steps=2))
    net.edits["cache"].rho[1].copy_(torch.tensor([7.0, -7.0, 2.5, -2.5]))
    for limit, expected in ((5.0, [5.0, -5.0, 2.5, -2.5]), (2.0, [2.0, -2.0, 2.0, -2.0])):
        StepWiseDenoising(limit=limit).constrain(net, None)
        assert net.edits["cache"].rho[1].tolist() == expected


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (Sampler(Euler(5), 2.0), "the table is of 4 evaluations, this sampler makes 5: sample in as many"),
        (
            Sampler(Euler(4, shift=2.0), 2.0),
            r"was made for Euler\(steps=4, shift=1.0\), got Euler\(steps=4, shift=2.0\)",
        ),
        (
            Sampler(Euler(4)),
            r"a sampler with guidance at times \[0.0, 1.0\], got one without guidance: guide as it did",
        ),
        (Sampler(Euler(4), 2.0, (0.2, 0.8)), r"got one with guidance at times \[0.2, 0.8\]"),
    ],
)
@pytest.mark.parametrize("settings", [(HarmoniCa, T), (TableReuse, ("1",) * T)], ids=["router", "table"])
def test_another_sampler_than_its_own_is_refused_in_one_sentence(other, sentence, settings):
    cls, size = settings
    denoiser = family("dit", it=cls(size, sampler=Sampler(Euler(T), 2.0)))
    given = denoiser, FlowMatching(), told(denoiser), torch.arange(2)
    with pytest.raises(ValueError, match=sentence) as refused:
        other(*given)
    assert "\n" not in str(refused.value)
    Sampler(Euler(T), 3.0).check(denoiser, FlowMatching())  # another scale


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (
            lambda: HarmoniCa(4, sampler=Sampler(Heun(4))),
            "steps=4, but the sampler makes 7 evaluations: set it to that",
        ),
        (lambda: HarmoniCa(relaxation="hard"), "relaxation is soft or ste, got 'hard'"),
        (lambda: StepWiseDenoising("both"), "iepo is incremental or single, got 'both'"),
        (lambda: TableReuse(("1", "2")), "is a text of the digits 0 and 1, got '2'"),
        (lambda: TableReuse((1, 0)), "is a text of the digits 0 and 1, got 1"),
        (lambda: TableReuse(()), "got 'no row'"),
        (lambda: family("dit", it=TableReuse(("1", "011"))), "have 4 residual branches, got a row of 3"),
        (lambda: StepWiseDenoising().build(family("dit")), "trains one router, an edit HarmoniCa, and there are: none"),
        (lambda: family("dit", a=HarmoniCa(), b=Reuse()), "'a' caches attention of unit 0 already"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(wrong, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        wrong()
    assert "\n" not in str(refused.value)


# ---- 5: a run --------------------------------------------------------------------------------------------------------

FEW_UPDATES = (
    "experiment=dit_digits/harmonica",
    "before=[]",
    "edits.harmonica.beta=1e-3",
    "recipe.method.every=2",
    "recipe.samples=4",
    "sampler.solver.steps=4",
    "optimizer.lr=0.5",
    "data.batch_size=4",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a model of random weights."""
    folder = tmp_path_factory.mktemp("harmonica")
    model = DiTConfig(8, 1, 4, 32, 2, 2, num_classes=10, learn_sigma=False, time="flow", frequency_shift=1).build()
    randomise(model, 0)
    edit.save(model, folder / "model", sampler=Sampler(Euler(4), 2.0))
    return folder


def words(folder: Path, name: str, *more: str) -> tuple[str, ...]:
    return f"name={name}", f"init={folder}/model", *FEW_UPDATES, *more


@pytest.fixture(scope="module")
def run(folder) -> SimpleNamespace:
    """Five updates: the visits, and whether the teacher has changed a memory that was filled."""
    from recipes.steps.rollout import Rollout

    visits, memories = [], []
    with pytest.MonkeyPatch.context() as patch:
        proceed, taught = StepWiseDenoising.proceed, Rollout._taught

        def watched(self, visit):
            visits.append((visit, given := proceed(self, visit)))
            return given

        def asked(module, moment, batch):
            before = str(pack(moment.walk.memory, Tensor.clone))
            answer = taught(module, moment, batch)
            memories.append((before, str(pack(moment.walk.memory, Tensor.clone))))
            return answer

        patch.setattr(StepWiseDenoising, "proceed", watched)
        patch.setattr(Rollout, "_taught", asked)
        train(folder, *words(folder, "run", "trainer.max_steps=5"))
    return SimpleNamespace(visits=visits, memories=memories)


def test_an_evaluations_sample_is_where_the_students_own_prediction_led(run):
    visits = [v for v, _ in run.visits]
    assert [v.step.index for v in visits] == [0, 1, 2, 3, 0, 1, 2]
    for (visit, given), after in zip(run.visits, visits[1:], strict=False):
        assert not visit.x.requires_grad and torch.equal(given.detach(), visit.student.prediction.detach())
        if after.step.index:
            now, then = visit.step.times[visit.step.index], visit.step.times[after.step.index]
            torch.testing.assert_close(after.x, visit.x + (then - now) * visit.student.prediction.detach())
            assert visit.step.index == 0 or not torch.equal(visit.student.prediction, visit.teacher.prediction)


def test_the_teacher_leaves_what_is_remembered_as_it_was(run):
    assert [len(before) > 10 for before, _ in run.memories] == [False, True, True, True, False, True, True]
    assert all(before == after for before, after in run.memories)


def test_a_run_tells_its_losses_and_the_error_after_hard_decisions(folder, run):
    found = rows(folder, "run")
    for row in found:
        parts = float(row["train/distance"]) + float(row["train/harmonica/computed"])
        assert float(row["train/loss"]) == pytest.approx(parts, rel=1e-5)
        assert 0 < float(row["train/effect_soft"]) and 0 < float(row["train/effect_executed"]) <= 1
        assert 0 <= float(row["train/effect_hard"])
        assert float(row["train/harmonica/computed"]) == pytest.approx(
            1e-3 / 4 * float(row["train/harmonica/weight"]), rel=1e-4
        )
    assert found[0]["train/effect_soft"] == found[1]["train/effect_soft"] != found[2]["train/effect_soft"]


def test_the_artifact_is_a_table_of_its_sampler(folder, run):
    artifact = edit.load(folder / "run")
    table = artifact.denoiser.applied["harmonica"]
    assert type(table) is TableReuse and len(table.rows) == 4 and table.sampler == artifact.sampler
    launched = launches(artifact.denoiser)
    columns = [column for unit in range(2) for column in ((unit, "attention"), (unit, "feed"))]
    assert len(artifact.sample(labels=[1, 2], seed=0)) == 2
    digits = {(i, *columns[m]): d for i, row in enumerate(table.rows) for m, d in enumerate(row)}
    assert sorted(launched) == sorted(place for place, digit in digits.items() if digit == "1")
    assert 4 < len(launched) < 16  # something was learned
    with pytest.raises(ValueError, match="the table is of 4 evaluations, this sampler makes 6"):
        artifact.sample(labels=[1, 2], seed=0, steps=6)


@pytest.mark.slow
def test_a_run_that_stops_inside_a_generation_goes_on_bit_equal(folder, run):
    """After update 4 comes the next measurement of the weights, inside the second generation."""
    for last in (4, 5):
        train(folder, *words(folder, "stopped", f"trainer.max_steps={last}", "checkpoint.every=1"))
    assert losses(folder, "stopped") == losses(folder, "run")
    one, two = (edit.load(folder / name).denoiser.applied["harmonica"] for name in ("stopped", "run"))
    assert one.rows == two.rows


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_the_table_of_one_process(folder, strategy, run):
    """Weights of evaluations are measured on the same generations on each rank, and gradients are of both."""
    two = (f"trainer={strategy}", *TWO_RANKS[:3], "trainer.gradient_checkpointing=false", "trainer.max_steps=5")
    told = [w for w in words(folder, f"two_{strategy}", *two) if not w.startswith("data.batch_size")]
    train_ranks(folder, *told, "data.batch_size=2", "recipe.batches=8", world=2)
    for key in ("train/loss", "train/effect_soft", "train/harmonica/weight"):
        one, two = ([float(r[key]) for r in rows(folder, n)] for n in ("run", f"two_{strategy}"))
        assert one == pytest.approx(two, rel=1e-4) and len(one) == 5
    one, two = (edit.load(folder / n).denoiser.applied["harmonica"] for n in ("run", f"two_{strategy}"))
    assert one.rows == two.rows


@pytest.mark.parametrize("world", ["dit_pixels", "flux_tiny", "pixart_tiny"])
def test_the_table_is_of_the_worlds_sampler(world):
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        cfg = compose("train", [f"experiment={world}/harmonica"])
    assert check(cfg) == []
    (router,), its = made(cfg.edits).values(), made(cfg.sampler)
    assert router.steps == its.solver.evaluations == 10 and router.sampler == its and its.guidance > 1


def test_a_model_without_a_router_is_refused_before_the_run(folder):
    from recipes.assembly import assemble
    from recipes.config.chosen import procedure_of
    from recipes.config.errors import UserError

    cfg = config(
        folder,
        *(w for w in words(folder, "none") if "edits" not in w),
        "~edits.harmonica",
        "+edits.it._target_=edit.caching.reuse.Reuse",
    )
    cfg.trainer.devices, cfg.trainer.precision = 1, "32-true"
    with pytest.raises(UserError, match="recipe.method: StepWiseDenoising trains one router"):
        procedure_of(cfg).module(assemble(cfg))


# ---- 6: a planted table ----------------------------------------------------------------------------------------------

PLANTED = ["1111", "0010", "1000", "0101", "0010", "1000"]


def planted(beta: float, relaxation: str = "soft", updates: int = 600):
    """What is learned of a model whose branches give something else at the planted places alone."""
    steps, now = len(PLANTED), {"index": 0}
    denoiser = DiTConfig(4, 1, 2, 16, 2, 2, num_classes=2, learn_sigma=False, time="flow", frequency_shift=1).build()
    randomise(denoiser, 0)
    g = torch.Generator().manual_seed(3)
    for m, (unit, name) in enumerate((u, n) for u in range(2) for n in ("attention", "feed")):
        level = torch.cumsum(torch.tensor([float(row[m]) for row in PLANTED]), 0)
        pattern = torch.randn(4, 16, generator=g)

        part = core(denoiser.units[unit]).slots.branch

        def value(stream, branch, run, name=name, level=level, pattern=pattern, part=part):
            if branch != name:
                return part(stream, branch, run)
            index = now["index"] if stream.step is None else stream.step.index
            return Branch((level[index] * pattern).expand(len(stream.image), -1, -1))

        core(denoiser.units[unit]).slots.branch = value
    torch.manual_seed(0)
    edit.apply(denoiser, {"it": HarmoniCa(steps, beta=beta, relaxation=relaxation)})
    for key, p in denoiser.named_parameters():
        p.requires_grad_(p.requires_grad and trains(denoiser, key))
    method, given = StepWiseDenoising(every=100), (denoiser, FlowMatching())
    sample, condition = Sampler(Euler(steps)), Condition(label=torch.arange(2))
    own = method.build(denoiser)
    data = [{"draw": torch.arange(2), "label": torch.arange(2)}]
    rho = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(rho, lr=0.1, weight_decay=0.0, eps=1e-12)
    for update in range(updates):
        if not update % method.every:
            with torch.no_grad():
                method.refresh(denoiser.eval(), OnData(*given, sample, lambda: iter(data), samples=2), own)
        if not update % (steps - 1):
            walk = sample.walk(*given, condition, torch.arange(2) + update)
            denoiser.train()
            with torch.no_grad():
                walk.moment.give(walk.moment.ask())
        denoiser.train()
        moment = walk.moment
        now["index"] = moment.step.index
        with torch.no_grad():
            teacher = ask(moment, dense=True)
        student = ask(moment)
        visit = SimpleNamespace(step=moment.step, student=student, teacher=teacher, own=own)
        (output,) = student.outputs.values()
        terms = {**method.losses(visit), **denoiser.applied["it"].losses(output.trace)}
        optimizer.zero_grad(set_to_none=True)
        sum(v.mean() for v in terms.values()).backward()
        optimizer.step()
        with torch.no_grad():
            method.constrain(denoiser, own)
            moment.give(method.proceed(visit).detach())
    return list(compact(denoiser).applied["it"].rows), own


@pytest.mark.slow
def test_a_planted_table_is_found():
    found, own = planted(6e-7)
    assert found == PLANTED
    assert own.hard < 0.1 * own.soft


@pytest.mark.slow
def test_a_larger_beta_never_computes_more():
    counts = ["".join(planted(beta)[0]).count("1") for beta in (1e-8, 6e-7, 1e-5, 1e-2)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[1] == "".join(PLANTED).count("1") > counts[2] >= counts[3] == 4
