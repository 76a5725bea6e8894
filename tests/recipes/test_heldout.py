"""The loss on held-out data: of the average, the same for all runs and ranks, and nothing that training notices."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from small_runs import TWO_RANKS, losses, rows, train, train_ranks

import edit
from data.sets.digits import Digits
from edit.data_set import opened
from edit.distillation.guidance import TeacherGuidance
from edit.objectives import FlowMatching
from edit.stream import Condition, Output
from recipes.calibrate import Calibrating
from recipes.heldout import HeldOut
from recipes.recipe import Recipe
from recipes.steps.diffusion import Diffusion
from recipes.steps.few_step import FewStep
from recipes.steps.rollout import Rollout

COUNT = 51  # of two ranks one has 26, and the other 25
HELD = ("heldout.every=4", f"heldout.count={COUNT}", "backbone.depth=1", "optimizer.schedule=constant")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of one process, with and without, and one that was stopped on the way."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder, "name=with", *HELD)
    train(folder, "name=without", *HELD, "heldout.every=0")
    train(folder, "name=stopped", *HELD, "trainer.max_steps=6")
    train(folder, "name=stopped", *HELD, "heldout.every=2")  # decides no other numbers, and may change
    return folder


def held(folder, name):
    return {int(row["step"]): row["heldout/loss"] for row in rows(folder, name) if row.get("heldout/loss")}


def test_training_is_the_same_to_the_last_bit(folder):
    assert losses(folder, "with") == losses(folder, "without")
    assert list(held(folder, "with")) == [4, 8, 12] and not held(folder, "without")


def test_it_draws_no_random_numbers_and_keeps_no_graph(tmp_path, monkeypatch):
    loss, states = HeldOut.loss, []

    def watched(self, trainer, module):
        before = torch.get_rng_state()
        value = loss(self, trainer, module)
        states.append(torch.equal(before, torch.get_rng_state()))
        assert all(p.grad is None for p in module.ema.parameters())
        return value

    monkeypatch.setattr(HeldOut, "loss", watched)
    train(tmp_path, "name=a", *HELD, "trainer.max_steps=4")
    assert states == [True]


def test_it_is_the_objective_s_loss_of_the_artifact_on_samples_that_it_was_not_trained_on(folder):
    artifact, count = edit.load(folder / "with"), COUNT
    split = opened(artifact.data).heldout()
    found = []
    for k in range(count):
        sample = split.sample(k * len(split) // count, 0)
        t = torch.tensor([((k + 0.5) * (5**0.5 - 1) / 2) % 1])
        t = artifact.objective.times(t)
        eps = edit.noise.gaussian(-1, torch.tensor([k]), edit.noise.NOISE, (1, 8, 8))
        x_t = (1 - t) * sample["x"][None] + t * eps
        with torch.no_grad():
            velocity = artifact.denoiser(x_t, t, Condition(label=sample["label"][None])).sample
        found.append((velocity - (eps - sample["x"])).square().mean())
    assert float(held(folder, "with")[12]) == pytest.approx(float(torch.stack(found).mean()), rel=1e-4)


def test_a_run_that_was_stopped_goes_on_with_the_same_numbers(folder):
    whole, stopped = held(folder, "with"), held(folder, "stopped")
    assert {step: stopped[step] for step in whole} == whole


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_ranks_share_the_samples_and_train_the_same_to_the_last_bit(tmp_path, folder, strategy):
    two = (*TWO_RANKS, f"trainer={strategy}", "data.batch_size=8", *HELD, "trainer.max_steps=6")
    train_ranks(tmp_path, "name=with", *two, world=2)
    assert list(held(tmp_path, "with")) == [4, 6]
    assert float(held(tmp_path, "with")[4]) == pytest.approx(float(held(folder, "with")[4]), rel=1e-5)
    if strategy == "fsdp2":  # which gathers the average's weights on all ranks
        train_ranks(tmp_path, "name=without", *two, "heldout.every=0", world=2)
        assert losses(tmp_path, "with") == losses(tmp_path, "without")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_samples_times_and_noise_are_the_same_however_they_are_divided(world):
    split = Digits().heldout()
    whole, parts = HeldOut(split, 10, 10, 1, 1), HeldOut(split, 10, 3, 1, 1)
    batch, u, eps = whole._drawn(torch.arange(10), torch.device("cpu"))
    seen = [numbers for rank in range(world) for numbers in parts._shares(rank, world)]
    assert len({len(parts._shares(rank, world)) for rank in range(world)}) == 1
    assert sorted(k for numbers in seen for k in numbers.tolist() if k < 10) == list(range(10))
    for numbers in seen:
        own, quantiles, noise = parts._drawn(numbers, torch.device("cpu"))
        inside = numbers < 10
        assert torch.equal(own["x"][inside], batch["x"][numbers[inside]])
        assert torch.equal(quantiles[inside], u[numbers[inside]]) and torch.equal(noise[inside], eps[numbers[inside]])


def test_times_span_the_law_evenly_and_samples_the_split():
    split = Digits().heldout()
    batch, u, _ = HeldOut(split, 100, 100, 1, 1)._drawn(torch.arange(100), torch.device("cpu"))
    assert (torch.histc(u, 10, 0, 1) - 10).abs().max() <= 2
    assert torch.equal(batch["x"][0], split.sample(0, 0)["x"])
    assert torch.equal(batch["x"][99], split.sample(99 * len(split) // 100, 0)["x"])
    assert HeldOut(split, 10**6, 1, 1, 1).count == len(split)


@pytest.mark.parametrize(
    ("every", "rows", "last", "steps"),
    [(4, 1, 12, [4, 8, 12]), (25, 10, 100, [30, 50, 80, 100]), (5, 10, 25, [10, 20, 25]), (50, 10, 30, [30])],
)
def test_it_is_in_the_first_row_from_each_multiple_on_and_in_the_last(every, rows, last, steps):
    asked = HeldOut(Digits().heldout(), 1, 1, every, rows)
    logged = [step for step in range(1, last + 1) if step % rows == 0 or step == last]
    assert [step for step in logged if asked.due(step, last)] == steps


def test_where_the_data_have_no_part_in_training_there_is_none(tmp_path):
    train(tmp_path, "name=a", *HELD, "data_weight=0", "trainer.max_steps=4")
    assert "heldout/loss" not in rows(tmp_path, "a")[0]
    assert FewStep.heldout is Recipe.heldout and Rollout.heldout is Recipe.heldout
    assert not hasattr(Calibrating, "heldout")


def test_a_set_without_held_out_samples_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(Digits, "heldout", lambda self: None)
    train(tmp_path, "name=a", *HELD, "trainer.max_steps=4")
    assert "heldout/loss" not in rows(tmp_path, "a")[0]


@pytest.mark.parametrize(("told", "scale"), [(True, 3.0), (False, None)])
def test_a_student_that_is_told_a_scale_of_guidance_is_told_one_that_it_learns(told, scale):
    seen = []

    def average(x_t, t, condition):
        seen.append(condition.guidance)
        return Output(torch.zeros_like(x_t), None, {})

    module = SimpleNamespace(data_weight=1.0, objective=FlowMatching(), told=told, casting=nullcontext, ema=average)
    module.guidance = TeacherGuidance(2.0, 4.0)
    x, eps = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    loss = Diffusion.heldout(module, {"x": x, "label": torch.tensor([1, 2])}, torch.tensor([0.25, 0.5]), eps)
    torch.testing.assert_close(loss, (eps - x).square().mean((1, 2, 3)))
    assert seen[0] is scale if scale is None else (seen[0] == scale).all()
