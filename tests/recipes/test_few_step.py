"""Runs with student, teacher and critic: whose turn it is, what moves, on how many ranks, and after a stop."""

import json
from dataclasses import dataclass

import pytest
import small_runs
import torch
from ranks import run_ranks
from small_runs import SMALL, TWO_RANKS, config, losses, rows, train

import edit
from edit.denoiser import Edit
from recipes.config.errors import UserError
from recipes.roles import Origin
from recipes.runtime.checkpoint_files import newest

MATCHING = "matching={_target_: edit.few_step.distribution_matching.DistributionMatching, every: 2}"
GRID = ("sampler=grid", "sampler.solver.renoise=true", "label_drop=0.1", "optimizer.warmup=0", "optimizer.lr=1e-3")


def student(folder, name, *more):
    return (
        f"name={name}",
        f"init={folder}/t",
        f"teacher.path={folder}/t",
        "teacher.guidance=2.0",
        MATCHING,
        *GRID,
        *more,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    train(folder, "name=t", "trainer.max_steps=4")
    return folder


@pytest.fixture
def watched(monkeypatch):
    """(step, part) -> whether an optimiser step changed it, and what student and critic were after it."""
    from recipes.steps.few_step import FewStep

    step, moved, after = FewStep.optimizer_step, {}, []

    def snapshot(module):
        parts = {"denoiser": module.denoiser, "critic": module.critic, "ema": module.ema}
        return {name: [p.detach().clone() for p in part.parameters()] for name, part in parts.items()}

    def watching(module, *args):
        number, before = module.trainer.global_step, snapshot(module)
        step(module, *args)
        now = snapshot(module)
        for name in now:
            moved[number, name] = any(not torch.equal(a, b) for a, b in zip(before[name], now[name], strict=True))
        after.append((before, now))

    monkeypatch.setattr(FewStep, "optimizer_step", watching)
    return moved, after


def test_in_its_turn_a_role_moves_and_nothing_else_does(folder, watched):
    train(folder, *student(folder, "turns", "trainer.max_steps=4"))
    moved, _ = watched
    for step in range(4):
        mine = step % 2 == 0
        assert [moved[step, name] for name in ("denoiser", "ema", "critic")] == [mine, mine, not mine]


def test_after_the_students_turn_the_critic_follows_part_of_the_way(folder, watched):
    train(folder, *student(folder, "follow", "trainer.max_steps=3", "critic.follow=0.25"))
    before, now = watched[1][2]  # a turn of the student; the critic has had one
    for old, new, target in zip(before["critic"], now["critic"], now["denoiser"], strict=True):
        torch.testing.assert_close(new, torch.lerp(old, target, 0.25))


def test_following_all_the_way_is_a_copy(folder, watched):
    train(folder, *student(folder, "copy", "trainer.max_steps=1", "critic.follow=1.0"))
    _, now = watched[1][0]
    for theirs, ours in zip(now["critic"], now["denoiser"], strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-7)  # lerp with weight 1 rounds once


def test_both_turns_in_one_step_have_the_gradients_of_each_alone(folder, watched):
    """The first step of a run in which both are trained moves the student as far as one in which it is alone, though
    the critic's gradient is the one that is clipped."""
    train(folder, *student(folder, "alone", "trainer.max_steps=2", "trainer.clip=0.5"))
    both = MATCHING.replace("every: 2", "every: 1, together: true")
    words = student(folder, "both", "trainer.max_steps=2", "trainer.clip=0.5")
    train(folder, *(both if word == MATCHING else word for word in words))
    assert float(rows(folder, "alone")[0]["grad_norm"]) < 0.5 < float(rows(folder, "alone")[1]["grad_norm"])
    (_, mine), _, (_, joint), _ = watched[1]
    torch.testing.assert_close(mine["denoiser"], joint["denoiser"])
    assert watched[0][0, "critic"]


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_loss(folder):
    both = MATCHING.replace("every: 2", "every: 2, together: true")
    words = [both if w == MATCHING else w for w in student(folder, "plain")]
    train(folder, *words)
    train(folder, *words[1:], "name=checkpointed", "trainer.gradient_checkpointing=true")
    a, b = ([float(v) for v in losses(folder, name)] for name in ("plain", "checkpointed"))
    assert a == pytest.approx(b, rel=1e-5)  # recomputed units round alike, fused ones nearly


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_its_critic_as_if_nothing_had_happened(folder):
    even = "optimizer.schedule=constant"
    train(folder, *student(folder, "whole", "trainer.max_steps=8", even))
    train(folder, *student(folder, "parts", "trainer.max_steps=4", even))
    state = torch.load(newest(folder / "parts" / "checkpoints"), weights_only=True)["state_dict"]
    assert any(k.startswith("critic.") for k in state)
    train(folder, *student(folder, "parts", "trainer.max_steps=8", even))
    assert losses(folder, "whole") == losses(folder, "parts")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_the_roles_of_one_process(folder, strategy):
    two = student(folder, f"two_{strategy}", f"trainer={strategy}", *TWO_RANKS, "data.batch_size=8")
    run_ranks(_train, 2, args=(folder, two), timeout=120)
    if not (folder / "one").exists():
        train(folder, *student(folder, "one", "data.batch_size=16"))
    a, b = ([float(v) for v in losses(folder, name)] for name in ("one", f"two_{strategy}"))
    assert a == pytest.approx(b, rel=1e-4)  # sums in another order, amplified by the steps of Adam


def _train(folder, overrides):
    train(folder, *overrides)


def test_with_lora_student_critic_and_teacher_share_one_base(folder, watched, monkeypatch):
    from recipes.steps.few_step import FewStep

    shared = []
    start = FewStep.on_train_start

    def looking(module):
        start(module)
        for name, p in module.denoiser.named_parameters():
            others = [m.get_parameter(name) for m in (module.critic, module.ema)]
            assert all(torch.equal(p, q) for q in others)  # also where they are to go different ways
            shared.append((p.requires_grad, [q is p for q in others]))

    monkeypatch.setattr(FewStep, "on_train_start", looking)
    tied = ("edits=lora", "teacher.placement=tied", "critic.start=student", "trainer.max_steps=2")
    train(folder, *(w for w in student(folder, "lora", *tied) if not w.startswith("teacher.path")))
    assert {(trained, tuple(same)) for trained, same in shared} == {(True, (False, False)), (False, (True, True))}
    moved, _ = watched
    assert moved[0, "denoiser"] and not moved[0, "critic"] and moved[1, "critic"] and not moved[1, "denoiser"]


def test_losses_of_both_roles_are_in_every_row_once_each_had_a_turn(folder):
    train(folder, *student(folder, "rows", "trainer.max_steps=4"))
    for row in rows(folder, "rows")[1:]:
        assert row["train/distribution"] and row["train/critic/velocity"]


@dataclass
class Small(Edit):
    """Asks for a unit's output to be small."""

    def apply(self, denoiser):
        unit = denoiser.units[0]
        denoiser.units[0] = lambda stream: (s := unit(stream)).record("size", s.image.square().mean((1, 2)))

    def losses(self, trace):
        return {"size": 1e-3 * trace["size"]}


def test_edits_of_both_roles_ask_for_their_losses_each_on_its_turn(folder, monkeypatch):
    from recipes import models

    made = models.student_of

    def with_edit(*args):
        build, structure = made(*args)
        return Origin(lambda: edit.apply(build(), {"small": Small()}), structure)

    monkeypatch.setattr(models, "student_of", with_edit)
    train(folder, *student(folder, "edited", "critic.start=student", "trainer.max_steps=3"))
    before, *after = rows(folder, "edited")
    assert float(before["train/small/size"]) > 0 and not before["train/critic/small/size"]
    assert all(float(row["train/critic/small/size"]) > 0 for row in after)
    critics = [float(after[0][f"train/critic/{name}"]) for name in ("velocity", "small/size")]
    assert float(after[0]["train/loss"]) == pytest.approx(sum(critics), rel=1e-5)  # the critic's turn alone


def test_a_student_with_routers_is_trained_with_their_budget(folder):
    train(folder, *student(folder, "routed", "edits=dydit", "+edits.dydit.complete=0", "trainer.max_steps=2"))
    assert all(row["train/dydit/budget"] for row in rows(folder, "routed"))


def test_the_artifact_says_how_its_steps_were_trained(folder):
    train(folder, *student(folder, "said", "trainer.max_steps=1"))
    said = json.loads((folder / "said/artifact/edits.json").read_text())
    assert said["run"]["matching"]["grid"] == said["sampler"]["solver"]["times"]
    assert said["run"]["teacher"]["guidance"] == 2.0


@pytest.mark.parametrize(
    "change, sentence",
    [
        ("sampler.solver.times=[1.0,0.5]", "give both the same times"),
        ("sampler.solver.renoise=false", "choose sampler=grid"),
        ("teacher.path=null", "matching compares with a teacher"),
        ("+terms.a={_target_: edit.distillation.output.OutputKD}", "two ways to train"),
        ("data_weight=0.5", "which matching replaces"),
        ("sampler.guidance=3.0", "guide it a second time"),
        ("matching=null", None),
        ("edits=dydit", "score one prediction: set edits.dydit.complete=0"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(folder, change, sentence):
    words = [w for w in student(folder, "refused") if change.lstrip("+").split("=")[0] != w.split("=")[0]]
    if sentence is None:
        words, sentence = [*words, "critic.start=student"], "only a few-step method"
    with pytest.raises((UserError, ValueError), match=sentence) as refused:
        train(folder, *words, change)
    assert "\n" not in str(refused.value)


def test_deepspeed_which_moves_everything_in_every_step_takes_no_turns(folder):
    from hydra.utils import instantiate

    from recipes.models import critic_of

    cfg = config(folder, *student(folder, "zero", "trainer=zero2", "trainer.accelerator=gpu"))
    with pytest.raises(UserError, match="roles cannot take turns"):
        critic_of(cfg, instantiate(cfg.matching), None, None)
    with pytest.raises(UserError, match="weights that DeepSpeed keeps elsewhere"):
        config(folder, *student(folder, "zero", "trainer=zero2", "critic.follow=0.03"))


@pytest.mark.slow
def test_a_student_with_a_guidance_input_is_told_what_the_teacher_is_asked_at(tmp_path, monkeypatch):
    from edit.backbones.flux import Flux

    scales, forward = [], Flux.forward

    def watching(self, x, t, condition, *args, **kwargs):
        if self.config["guidance_embeds"]:
            scales.append(condition.guidance)
        return forward(self, x, t, condition, *args, **kwargs)

    flux = ("backbone=flux_tiny", "data=shapes", "data.set.count=64", "data.set.held=16", "trainer.max_steps=2")
    plain = [w for w in SMALL if not w.startswith("backbone.")]
    monkeypatch.setattr(small_runs, "SMALL", tuple(plain))
    train(tmp_path, *flux, "name=t", "trainer.max_steps=1")
    monkeypatch.setattr(Flux, "forward", watching)
    told = ("+edits.told={_target_: edit.tuning.guidance.GuidanceInput}", "teacher.guidance=[2.0,4.0]")
    words = [w for w in student(tmp_path, "s", *told) if w != "teacher.guidance=2.0"]
    train(tmp_path, *flux, *words, "label_drop=0.0")
    assert scales and all(((s >= 2) & (s <= 4)).all() and s.std() > 0 for s in scales)
    with pytest.raises(UserError, match="a guidance that the student does not learn"):
        train(tmp_path, *flux, *words, "name=u", "+sampler.told=5.0")
    train(tmp_path, *flux, *student(tmp_path, "one", *told[:1]), "label_drop=0.0")
    assert json.loads((tmp_path / "one/artifact/edits.json").read_text())["sampler"]["told"] == 2.0
