"""Loss terms in a run: models that they ask, frozen models that they look with, and their end, on one rank and two."""

import gc
import weakref

import pytest
import torch
from killed_runs import kill_at
from ranks import run_ranks
from small_runs import TWO_RANKS, losses, rows, train, train_ranks

from edit.losses import Draws
from recipes.config.errors import UserError
from recipes.models import refuse_unending
from recipes.runtime.checkpoint_files import newest
from recipes.steps.diffusion import Diffusion

SELF = "+terms.sra={_target_: toy_terms.SelfAlignment}"
VISION = "+terms.haste={_target_: toy_terms.VisionAlignment, ends: 6}"
TOYS = "trusted=[toy_terms]"


@pytest.fixture(autouse=True)
def toys(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / "tests" / "toys")


def close(a, b, tolerance=2e-5):
    return max(abs(float(x) - float(y)) for x, y in zip(a, b, strict=True)) < tolerance


def kept(folder, name):
    return torch.load(newest(folder / name / "checkpoints"), weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_term_that_asks_the_average_at_another_time_and_one_that_ends_train_alike_on_two_ranks(tmp_path, strategy):
    train(tmp_path, "name=one", TOYS, SELF, VISION, "data.batch_size=16")
    words = (f"name={strategy}", f"trainer={strategy}", *TWO_RANKS, "data.batch_size=8", TOYS, SELF, VISION)
    train_ranks(tmp_path, *words, world=2)
    for key in ("train/loss", "train/sra/self"):
        assert close(*([r[key] for r in rows(tmp_path, name)] for name in ("one", strategy)))
    one, two = (kept(tmp_path, name)["state_dict"] for name in ("one", strategy))
    assert "own.sra.weight" in two and one.keys() == two.keys()


def ended(folder, overrides):
    """Train, and look at what is left at the first step after the end: module, vision model, DDP, and parameters."""
    alive = {}
    step = Diffusion.training_step

    def watched(self, batch, batch_index):
        if "haste" in self.own:
            alive["own"] = weakref.ref(self.own["haste"])
            alive["eye"] = weakref.ref(next(iter(self.sight.models.values())))
            alive["wrapped"] = weakref.ref(self.trainer.strategy.model)
            alive["count"] = len(self.trained)
        elif "left" not in alive:
            gc.collect()
            groups = self.trainer.optimizers[0].param_groups
            wrapped = alive["wrapped"]()
            names = ("own", "eye")
            alive["left"] = [alive[name]() is not None for name in names] + [wrapped not in (None, self)]
            alive["left"].append(len(self.trained) - alive["count"])
            assert sum(len(g["params"]) for g in groups) == len(self.trained)
            assert len(self.trainer.optimizers[0].state) == len(self.trained)
        return step(self, batch, batch_index)

    Diffusion.training_step = watched
    try:
        train(folder, *overrides)
    finally:
        Diffusion.training_step = step
    return alive["left"]


@pytest.mark.parametrize("strategy", ["single", *(pytest.param(s, marks=pytest.mark.slow) for s in ("ddp", "fsdp2"))])
def test_after_its_end_a_term_leaves_no_loss_no_parameter_and_no_state(tmp_path, strategy):
    words, world = ("name=a", TOYS, VISION), 1
    if strategy != "single":
        words, world = (*words, f"trainer={strategy}", *TWO_RANKS), 2
    for left in run_ranks(ended, world, args=(tmp_path, words), timeout=120):
        assert left == [False, False, False, -2]  # own module, vision model, former DDP; a weight and a bias
    found = [r.get("train/haste/align") for r in rows(tmp_path, "a")]
    assert all(found[:6]) and not any(found[6:])
    state = kept(tmp_path, "a")
    assert not any("haste" in key or "eye" in key for key in state["state_dict"])


def test_a_term_that_has_ended_leaves_the_losses_of_a_run_in_which_it_weighed_nothing(tmp_path):
    """What is left is the same training: Adam's state of all other parameters goes on."""
    train(tmp_path, "name=never", "seed=1")
    weightless = "+terms.haste={_target_: toy_terms.Weightless, ends: 6}"
    train(tmp_path, "name=ended", "seed=1", TOYS, weightless)
    never, ended = ([r["train/loss"] for r in rows(tmp_path, name)] for name in ("never", "ended"))
    assert never == ended


@pytest.mark.parametrize("at", [5, pytest.param(9, marks=pytest.mark.slow)], ids=["before the end", "after it"])
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_killed_before_or_after_the_end_goes_on_bit_equal(tmp_path, at, world):
    words = [TOYS, SELF, VISION, *(["trainer=fsdp2", *TWO_RANKS] if world == 2 else [])]
    train_ranks(tmp_path, "name=whole", *words, world=world)
    kill_at(tmp_path, "killed", at, *words, world=world)
    train_ranks(tmp_path, "name=killed", *words, world=world)
    assert losses(tmp_path, "killed") == losses(tmp_path, "whole")


def test_a_group_of_the_optimiser_ends_with_its_parameters(tmp_path):
    groups = "+optimizer.groups={own.haste: {lr_scale: 10}}"
    train(tmp_path, "name=a", TOYS, VISION, groups)
    assert len(kept(tmp_path, "a")["optimizer_states"][0]["param_groups"]) == 1


def test_draws_of_a_term_are_its_own_and_do_not_depend_on_the_batch():
    draws = Draws(0, torch.arange(4), 0, (1, 2, 2))
    one, other = draws.of("one"), draws.of("other")
    assert not torch.equal(one.uniform(0), other.uniform(0)) and not torch.equal(one.uniform(0), one.uniform(1))
    half = Draws(0, torch.arange(2, 4), 5, (1, 2, 2)).of("one")
    assert torch.equal(half.gaussian(3), one.gaussian(3)[2:])


def test_zero_cannot_let_a_term_end():
    from toy_terms import VisionAlignment

    refuse_unending("zero2", {"haste": VisionAlignment()})
    with pytest.raises(UserError, match="terms.haste ends at step 6, and trainer=zero2 keeps .* use trainer=fsdp2"):
        refuse_unending("zero2", {"haste": VisionAlignment(ends=6)})
