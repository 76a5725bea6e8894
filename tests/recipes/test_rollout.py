"""Training on the sampler's own path: what moves, on which samples, on how many ranks, and after a stop."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import small_runs
import torch
from hydra.utils import instantiate
from killed_runs import kill_at
from omegaconf import OmegaConf
from small_runs import TWO_RANKS, config, losses, rows, train, train_ranks
from torch import Tensor
from weights import randomise

import edit
from data.sets.latents import Latents
from edit import noise
from edit.backbones.dit import DiTConfig
from edit.objectives import FlowMatching
from edit.sampling import Sampler
from edit.solvers import Euler, Query
from edit.stream import Condition, pack
from recipes.assembly import assemble
from recipes.config.chosen import procedure_of
from recipes.config.errors import UserError
from recipes.runtime.checkpoint_files import checkpoints, newest, read_rank
from recipes.steps.rollout import Rollout

TOYS = Path(__file__).parents[1] / "toys"
SAMPLE, SAMPLE_3 = Sampler(Euler(4), 2.0), Sampler(Euler(4), 3.0)
WHOLE = ("trainer.max_steps=12", "optimizer.schedule=constant")

SAMPLER = ("sampler.solver.steps=4", "sampler.guidance=2.0")
ROUTED = ("+edits.mixed={_target_: toy_rollouts.Mixed, beta: 1e-4}", "recipe.method={_target_: toy_rollouts.Harmony}")
LESSON = ("+edits.ahead={_target_: toy_rollouts.Ahead}", "recipe.method={_target_: toy_rollouts.Lesson}")
FORCED = (LESSON[0], "recipe.method={_target_: toy_rollouts.Lesson, forced: true}")
SHORT = ("optimizer.warmup=0", "optimizer.lr=0.05", "trainer.max_steps=6", "data.batch_size=4", "ema.decay=0.5")
TRUSTED = ("toy_rollouts",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a model whose branches count: of random weights."""
    folder = tmp_path_factory.mktemp("rollouts")
    for name, seed in (("model", 0), ("other", 1)):
        model = DiTConfig(8, 1, 4, 32, 2, 2, num_classes=10, learn_sigma=False, time="flow", frequency_shift=1).build()
        randomise(model, seed)
        edit.save(model, folder / name, sampler=Sampler(Euler(4)))
    return folder


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.syspath_prepend(str(TOYS))


def words(folder, name, *more):
    common = (f"name={name}", f"init={folder}/model", "recipe=rollout", "trusted=[toy_rollouts]", *SAMPLER, *SHORT)
    changed = {w.split("=")[0] for w in more}
    return (*(w for w in common if w.split("=")[0] not in changed), *more)


def watch(patch) -> list:
    """Each evaluation that is made from now on: what the method saw, and what the generation went on with."""
    from toy_rollouts import Harmony, Lesson

    seen = []
    for method in (Harmony, Lesson):

        def watched(self, visit, proceed=method.proceed):
            seen.append((visit, given := proceed(self, visit)))
            return given

        patch.setattr(method, "proceed", watched)
    return seen


@pytest.fixture
def visits(monkeypatch):
    return watch(monkeypatch)


@pytest.fixture(scope="module")
def routed(folder):
    """A run that trains a table: its visits, whether its teacher has changed a memory, its result."""
    from recipes import training

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOYS))
        asked, changed, results, keep = Rollout._taught, [], [], training.keep

        def watched(module, moment, batch):
            before = str(pack(moment.walk.memory, Tensor.clone))
            answer = asked(module, moment, batch)
            changed.append((len(before) > 8, before != str(pack(moment.walk.memory, Tensor.clone))))
            return answer

        patch.setattr(Rollout, "_taught", watched)
        patch.setattr(training, "keep", lambda run, made, *more: (results.append(made), keep(run, made, *more))[1])
        visits = watch(patch)
        train(folder, *words(folder, "routed", *ROUTED, "optimizer.lr=1.0"))
    return SimpleNamespace(visits=visits, changed=changed, average=results[0].denoiser)


@pytest.fixture(scope="module")
def lesson(folder):
    """The visits of a run that trains a predictor, of two generations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOYS))
        visits = watch(patch)
        train(folder, *words(folder, "lesson", *LESSON, "trainer.max_steps=4"))
    return visits


def weights(folder, name) -> dict[str, Tensor]:
    found = torch.load(newest(folder / name / "checkpoints"), weights_only=True)["state_dict"]
    return {k.removeprefix("denoiser."): v for k, v in found.items() if k.startswith("denoiser.")}


def dense(model, visit, sampler=SAMPLE) -> Tensor:
    """The guided prediction of a model at the sample of a visit."""
    guided = sampler.guided(model, visit.condition, visit.batch["draw"])
    with torch.no_grad():
        return guided(Query(visit.x, visit.step.sigma, None), None)


# ---- what moves, and where ------------------------------------------------------------------------------------------


def test_only_what_the_edits_leave_open_moves_and_of_a_table_only_rows_that_train(folder, routed):
    before, after = edit.load(folder / "model").denoiser.state_dict(), weights(folder, "routed")
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    rho = after["edits.mixed.rho"]
    assert (rho[0] == 0).all() and (rho[1:] != 0).all()


def test_the_sample_of_an_evaluation_is_where_the_students_own_prediction_led(routed):
    visits = [v for v, _ in routed.visits]
    assert [v.step.index for v in visits] == [0, 1, 2, 3] * 2
    assert [v.updates for v in visits] == [0, 0, 1, 2, 3, 3, 4, 5]
    for visit, after in zip(visits, visits[1:], strict=False):
        if not after.step.index:
            continue
        now, then = visit.step.times[visit.step.index], after.step.times[after.step.index]
        torch.testing.assert_close(after.x, visit.x + (then - now) * visit.student.prediction.detach())
    assert not any(torch.equal(v.student.prediction, v.teacher.prediction) for v in visits if v.step.index)
    first = visits[0]
    assert first.teacher is None and not first.student.prediction.requires_grad  # it trains nothing
    again = noise.gaussian(0, visits[4].batch["draw"], noise.NOISE, (1, 8, 8))
    assert torch.equal(visits[4].x, again) and not torch.equal(visits[4].x, visits[0].x)


def test_the_dense_teacher_predicts_as_the_model_without_edits_and_leaves_the_memory_alone(folder, routed):
    assert [filled for filled, _ in routed.changed] == [False, True, True, True] * 2
    assert not any(changed for _, changed in routed.changed)
    model = edit.load(folder / "model").denoiser
    for visit, _ in routed.visits[1:4]:
        torch.testing.assert_close(visit.teacher.prediction, dense(model, visit))


def test_the_artifact_has_what_is_left_of_a_trained_edit_and_generates_as_the_average(folder, routed):
    artifact, average = edit.load(folder / "routed", trusted=TRUSTED), routed.average.eval()
    table = artifact.denoiser.edits["mixed"].computed
    assert [type(e).__name__ for e in artifact.denoiser.applied.values()] == ["Fixed"]
    assert type(average.applied["mixed"]).__name__ == "Mixed" and table.any() and not table.all()
    condition, numbers = Condition(label=torch.arange(4)), torch.arange(4)
    one, two = (artifact.sampler(m, artifact.objective, condition, numbers) for m in (artifact.denoiser, average))
    assert torch.equal(one, two)
    assert "ema.edits.mixed.rho" in torch.load(newest(folder / "routed/checkpoints"), weights_only=True)["state_dict"]


def test_on_its_own_path_the_teacher_generates_as_the_model_without_edits(folder, lesson):
    model, tokens = edit.load(folder / "model").denoiser, {}
    walk = SAMPLE.walk(model, FlowMatching(), lesson[0][0].condition, lesson[0][0].batch["draw"])
    with torch.no_grad():
        for visit, _ in lesson[:4]:
            prediction = walk.moment.ask(taps=(1,), look=tokens.__setitem__)
            torch.testing.assert_close(visit.teacher.prediction, prediction)
            torch.testing.assert_close(visit.teacher.record("unit.1"), tokens["joint"].trace["unit.1"])
            walk.moment.give(prediction)


def test_no_gradient_reaches_back_to_an_evaluation_before(lesson):
    for visit, _ in lesson:
        assert not visit.x.requires_grad
        pack(visit.step.memory, lambda v: pytest.fail("a graph") if v.requires_grad else v)


def test_with_the_teachers_history_the_student_runs_no_unit_and_with_its_own_only_in_full_evaluations(
    folder, lesson, visits, monkeypatch
):
    from edit.backbones.dit import DiTBlock

    run, calls = DiTBlock.forward, []
    monkeypatch.setattr(DiTBlock, "forward", lambda self, s: (calls.append(s.step is not None), run(self, s))[1])
    train(folder, *words(folder, "forced", *FORCED, "trainer.max_steps=4"))
    assert not any(calls) and len(calls) == 2 * 8  # of the teacher: two units, four evaluations of two batches
    free, forced = ([v for v, _ in seen if v.step.index == 3] for seen in (lesson, visits))
    for ours, theirs in zip(free, forced, strict=True):  # beside the teacher's path, and on it
        assert not torch.equal(ours.x, theirs.x)
        assert torch.equal(ours.teacher.prediction, theirs.teacher.prediction)
    model = edit.load(folder / "model").denoiser
    torch.testing.assert_close(dense(model, forced[0]), forced[0].teacher.prediction)


@pytest.mark.slow
def test_the_student_runs_its_units_in_full_evaluations_alone(folder, monkeypatch):
    from edit.backbones.dit import DiTBlock

    run, calls = DiTBlock.forward, []
    monkeypatch.setattr(DiTBlock, "forward", lambda self, s: (calls.append(s.step is not None), run(self, s))[1])
    train(folder, *words(folder, "full", *LESSON, "trainer.max_steps=4"))
    assert sum(calls) == 2 * 4  # two units, two full evaluations of two batches


@pytest.mark.slow
def test_another_teacher_is_asked_at_the_students_own_samples_with_its_guidance(folder, visits):
    train(folder, *words(folder, "taught", *ROUTED, "trainer.max_steps=2", f"teacher.path={folder}/other"))
    other, visit = edit.load(folder / "other").denoiser, visits[2][0]
    torch.testing.assert_close(visit.teacher.prediction, dense(other, visit))


def test_a_planted_predictor_is_found(folder):
    planted = (LESSON[0], LESSON[1].replace("Lesson", "Planted"))
    train(folder, *words(folder, "found", *planted, "optimizer.lr=0.1", "trainer.max_steps=40"))
    found = [float(v) for v in losses(folder, "found")]
    assert sum(found[-4:]) < 0.1 * sum(found[:4])
    mix = weights(folder, "found")["edits.ahead.mix"]
    assert abs(mix.sum().item() - 0.2) < 0.05  # the history is nearly constant: a sum is known best


@pytest.mark.slow
def test_parameters_stay_within_their_limits_and_so_does_the_average(folder):
    limited = ROUTED[1].replace("Harmony", "Harmony, limit: 0.2")
    train(folder, *words(folder, "limited", ROUTED[0], limited, "optimizer.lr=1.0", "trainer.max_steps=4"))
    state = torch.load(newest(folder / "limited/checkpoints"), weights_only=True)["state_dict"]
    assert state["denoiser.edits.mixed.rho"].abs().max() == torch.tensor(0.2)
    assert state["ema.edits.mixed.rho"].abs().max() <= 0.2


# ---- between updates ------------------------------------------------------------------------------------------------


REFRESHED = (ROUTED[0], "recipe.method={_target_: toy_rollouts.Harmony, every: 4}", "recipe.samples=8")


def test_weights_of_evaluations_are_made_anew_every_so_many_updates(folder, monkeypatch):
    from toy_rollouts import Harmony

    seen, refresh = [], Harmony.refresh

    def watched(self, student, batches, own):
        refresh(self, student, batches, own)
        seen.append((own.lambdas.clone(), [len(x) for x in batches.generate()]))

    monkeypatch.setattr(Harmony, "refresh", watched)
    train(folder, *words(folder, "anew", *REFRESHED, "trainer.max_steps=6"))
    assert len(seen) == 2 and seen[0][1] == [4, 4]
    for lambdas, _ in seen:
        assert lambdas[0] == 0 and (lambdas[1:] > 0).all()
    assert not torch.equal(seen[0][0], seen[1][0])
    state = torch.load(newest(folder / "anew/checkpoints"), weights_only=True)["state_dict"]
    assert torch.equal(state["own.lambdas"], seen[1][0])


# ---- stops and ranks ------------------------------------------------------------------------------------------------


LATER = pytest.param(LESSON, marks=pytest.mark.slow, id="predictor")


@pytest.mark.parametrize("method", [pytest.param(REFRESHED, id="table"), LATER])
def test_a_run_that_stops_inside_a_generation_goes_on_bit_equal(folder, method):
    name = f"stop{len(method)}"
    every = "checkpoint.every=1"
    train(folder, *words(folder, f"{name}_whole", *method, WHOLE[1], "trainer.max_steps=5"))
    for last in (4, 5):  # of three updates, or of two, in a generation
        train(folder, *words(folder, name, *method, WHOLE[1], f"trainer.max_steps={last}", every))
    assert losses(folder, name) == losses(folder, f"{name}_whole")
    one, two = (weights(folder, n) for n in (name, f"{name}_whole"))
    assert all(torch.equal(v, two[k]) for k, v in one.items())


def test_a_file_of_a_rank_belongs_to_its_checkpoint(folder, capsys):
    train(folder, *words(folder, "files", *ROUTED, WHOLE[1], "trainer.max_steps=5", "checkpoint.every=1"))
    place = folder / "files/checkpoints"
    assert {p.name for p in place.iterdir()} == {
        f"step_0000000{k}.ckpt{rank}{end}" for k in (4, 5) for rank in ("", ".rank_0_of_1") for end in ("", ".sha256")
    }
    last = place / "step_00000005.ckpt.rank_0_of_1"
    last.write_bytes(last.read_bytes()[:-1] + b"x")
    assert newest(place).name == "step_00000004.ckpt"
    assert "step_00000005.ckpt.rank_0_of_1 is not what was saved" in capsys.readouterr().out
    last.unlink()
    assert newest(place).name == "step_00000004.ckpt" and "is missing" in capsys.readouterr().out
    for end in ("", ".sha256"):
        (place / f"step_00000004.ckpt.rank_0_of_1{end}").rename(place / f"step_00000004.ckpt.rank_0_of_2{end}")
    with pytest.raises(UserError, match="on each of 2 ranks, and this command has 1: go on with 2 of them"):
        read_rank(place / "step_00000004.ckpt", 0, 1)


@pytest.mark.slow
def test_at_the_end_of_a_generation_nothing_is_kept(folder):
    train(folder, *words(folder, "ends", *ROUTED, "trainer.max_steps=3", "checkpoint.every=3"))
    assert {p.suffix for p in (folder / "ends/checkpoints").iterdir()} == {".ckpt", ".sha256"}
    assert len(checkpoints(folder / "ends/checkpoints")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one_process(folder, strategy):
    two = ("trainer.gradient_checkpointing=false", f"trainer={strategy}", *TWO_RANKS[:3], "data.batch_size=2")
    train_ranks(folder, *words(folder, f"two_{strategy}", *REFRESHED, *two), world=2)
    if not (folder / "one").exists():
        train(folder, *words(folder, "one", *REFRESHED))
    for key in ("train/loss", "train/match"):
        one, two = ([float(r[key]) for r in rows(folder, n)] for n in ("one", f"two_{strategy}"))
        assert one == pytest.approx(two, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [None, "ddp", "fsdp2"])
def test_a_killed_run_goes_on_bit_equal(folder, strategy):
    """Killed after step 6, from the checkpoint of step 4, inside the second generation."""
    name, world = f"killed_{strategy}", 1 if strategy is None else 2
    more = [*REFRESHED, *WHOLE]
    if strategy:
        more += [f"trainer={strategy}", *TWO_RANKS[:3], "data.batch_size=2", "trainer.gradient_checkpointing=false"]
    train_ranks(folder, *words(folder, f"{name}_whole", *more), world=world)
    told = words(folder, name, *more)
    kill_at(folder, name, 6, *(w for w in told if not w.startswith("name=")), world=world)
    train_ranks(folder, *told, world=world)
    assert losses(folder, name) == losses(folder, f"{name}_whole") and len(losses(folder, name)) == 12
    one, two = (weights(folder, n) for n in (name, f"{name}_whole"))
    assert all(torch.equal(v, two[k]) for k, v in one.items())


# ---- what is refused, what it costs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("trainer.accumulate", 2, "updates after each evaluation: set trainer.accumulate=1"),
        ("trainer.gradient_checkpointing", True, "set it to false with recipe=rollout"),
        ("trainer.strategy", "zero2", "use trainer=ddp or fsdp2"),
        ("matching", {"_target_": "edit.few_step.progressive.Progressive"}, "leave one of the two out"),
        ("terms.a", {"_target_": "edit.distillation.output.OutputKD"}, "leave out terms.a"),
        ("teacher.placement", "tied", "the model itself, dense, is the teacher of a rollout"),
        ("strata", 2, "data_weight and strata are of diffusion training"),
        ("critic.follow", 0.5, "only a few-step method"),
    ],
)
def test_what_a_rollout_cannot_have_is_refused_in_one_sentence(chosen, key, value, sentence):
    cfg = chosen.copy()
    OmegaConf.update(cfg, key, value, force_add=True)
    (said,) = procedure_of(cfg).check(cfg)
    assert sentence in said and "\n" not in said


@pytest.fixture(scope="module")
def chosen(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOYS))
        return config(folder, *words(folder, "refused", *ROUTED))


def test_an_evaluation_at_which_nothing_can_be_learned_is_named(folder):
    cached = (
        "edits=reuse",
        "+edits.ahead={_target_: toy_rollouts.Ahead, interval: 1}",
    )
    with pytest.raises(UserError, match="at evaluation 1 no trained parameter has a part in the losses: let Harmony"):
        train(folder, *words(folder, "nothing", *cached, "recipe.method={_target_: toy_rollouts.Harmony}"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("recipe.method={_target_: edit.distillation.output.OutputKD}", "RolloutMethod"),
        ("recipe.method=null", "RolloutMethod"),
        ("sampler.solver.steps=6", "Mixed has 4 steps, the sampler 6: use as many"),
        ("+sampler.perturbation=1.0", "perturb"),
        ("recipe.batches=0", "recipe.batches: expected int at least 1"),
        ("teacher.guidance=2.0", "guides its teacher as the student, by sampler.guidance"),
    ],
)
def test_a_part_that_does_not_fit_is_refused_in_one_sentence(folder, change, sentence):
    base = [w for w in words(folder, "refused", *ROUTED) if w.split("=")[0] != change.split("=")[0].lstrip("+")]
    with pytest.raises((UserError, ValueError), match=sentence) as refused:
        train(folder, *base, f"teacher.path={folder}/other", change)
    assert "\n" not in str(refused.value)


def test_a_generation_in_which_nothing_would_train_is_refused(folder):
    base = [w for w in words(folder, "none", *LESSON) if "solver.steps" not in w]
    cfg = config(folder, *base, "sampler.solver.steps=1")
    cfg.trainer.devices, cfg.trainer.precision = 1, "32-true"
    with pytest.raises(UserError, match="trains none of 1 evaluations: sample in more steps"):
        procedure_of(cfg).module(assemble(cfg))


# ---- stored features ------------------------------------------------------------------------------------------------

FLUX = ("backbone=flux_tiny", "backbone.num_layers=1", "backbone.num_single_layers=1", "sampler.guidance=3.0")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder with a text-conditioned model of random weights, and its features of 8 prompts, in fp32."""
    from data.embedded import main as embed
    from data.generate import main as generate

    place = tmp_path_factory.mktemp("features")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_runs, "SMALL", [w for w in small_runs.SMALL if not w.startswith("backbone.")])
        spec = instantiate(config(place, "name=x", *FLUX, "data=shapes").backbone, _convert_="all")
        model = spec.build()
        model.settle((12, 8, 8), spec)
        randomise(model, 0)
        edit.save(model, place / "model", data={"_target_": "data.sets.shapes.Shapes", "count": 8, "held": 4})
        world = place / "world"
        assert embed([f"out={world}", "count=8"]) == 0
        told = [f"teacher={place}/model", f"prompts={world}/prompts.txt", f"out={place}/cache", "max_tokens=16"]
        told += [f"text_encoder={world}/text_encoder_2", f"pooled_encoder={world}/text_encoder", "padding=zeros"]
        told += ["guidance=3.0", "steps=4", "shift=1.0", "seed=7", "dtype=float32", "device=cpu", "taps=1"]
        assert generate(told) == 0
        yield place


def of_cache(stored, name, *more):
    data = ("data=latents", f"data.set.path={stored}/cache", f"data.set.generated_by={stored}/model")
    return words(stored, name, *FLUX, *data, "data.set.features=true", *more)


@pytest.mark.slow
@pytest.mark.parametrize("method", [LESSON, FORCED], ids=["free", "forced"])
def test_stored_features_are_the_answers_of_the_teacher_live(stored, visits, method):
    train(stored, *of_cache(stored, f"s{method == FORCED}", *method, "trainer.max_steps=4"))
    model = edit.load(stored / "model").denoiser
    null = Condition(**{k: v[None] for k, v in Latents(f"{stored}/cache").null.items()})
    condition, numbers = visits[0][0].condition, visits[0][0].batch["number"]
    walk, tokens = SAMPLE_3.walk(model, FlowMatching(), condition, numbers, 7, null), {}
    by_index = {v.step.index: v for v, _ in visits if torch.equal(v.batch["number"], numbers)}
    if method != FORCED:
        assert torch.equal(walk.x, by_index[0].x)  # the noise of the teacher
    with torch.no_grad():
        for moment in walk:
            prediction = moment.ask(taps=(1,), look=tokens.__setitem__)
            if (visit := by_index.get(moment.step.index)) is not None:
                torch.testing.assert_close(visit.teacher.prediction, prediction, rtol=1e-4, atol=1e-4)
                live = torch.cat([out.trace["unit.1"] for out in tokens.values()])
                torch.testing.assert_close(visit.teacher.record("unit.1"), live, rtol=1e-4, atol=1e-4)
            moment.give(prediction)
    assert all(float(v) > 0 for v in losses(stored, f"s{method == FORCED}"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("sampler.solver.steps=6", "features are of euler in 4 steps with shift 1, and the sampler is"),
        ("sampler.guidance=2.0", "features were made at guidance 3 at all times, and the sampler guides at 2"),
        ("+recipe.method.unit=0", "behind unit 0, stored are those of"),
    ],
)
def test_features_of_another_generation_are_refused(stored, change, sentence):
    with pytest.raises(UserError, match=sentence):
        train(stored, *of_cache(stored, "refused", *LESSON, change))
