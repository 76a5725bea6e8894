"""Training-free variants in memory."""

from dataclasses import replace

import pytest
import torch

import edit
from edit.artifacts.variant import same_weights, twin, variant
from edit.caching.reuse import Reuse
from edit.pruning.depth import DepthPruning
from edit.sampling import Sampler, at_steps
from edit.solvers import Euler, Grid
from edit.tuning.lora import LoRA


@pytest.fixture
def artifact(dit, tmp_path):
    return edit.load(edit.save(dit, tmp_path / "whole", sampler=Sampler(Euler(4))))


def addresses(denoiser) -> list[int]:
    return [p.data_ptr() for p in denoiser.parameters()]


def test_a_variant_has_the_same_tensors_and_the_plain_one_stays_as_it_is(artifact, batch):
    before = artifact.denoiser(*batch).sample
    fast = variant(artifact, {"reuse": Reuse(2)}, at_steps(artifact.sampler, 2))
    assert addresses(fast.denoiser) == addresses(artifact.denoiser) and same_weights(fast.denoiser, artifact.denoiser)
    assert list(fast.denoiser.applied) == ["reuse"] and not artifact.denoiser.applied
    assert (fast.sampler.solver.steps, artifact.sampler.solver.steps) == (2, 4)
    assert all(unit.slots.branch is not None for unit in artifact.denoiser.units)
    torch.testing.assert_close(artifact.denoiser(*batch).sample, before, rtol=0, atol=0)
    torch.testing.assert_close(fast.denoiser(*batch).sample, before, rtol=0, atol=0)  # it does nothing outside of steps


def test_a_variant_of_an_artifact_with_trained_edits_keeps_them(dit, tmp_path, batch):
    edit.apply(dit, {"lora": LoRA(rank=2)})
    with torch.no_grad():
        for name, p in dit.named_parameters():
            if "lora" in name:
                p.add_(0.1)
    tuned = edit.load(edit.save(dit, tmp_path / "tuned"))
    fast = variant(tuned, {"reuse": Reuse(2)})
    assert list(fast.denoiser.applied) == ["lora", "reuse"] and same_weights(fast.denoiser, tuned.denoiser)
    torch.testing.assert_close(fast.denoiser(*batch).sample, tuned.denoiser(*batch).sample, rtol=0, atol=0)


def test_dropping_units_needs_no_training_and_leaves_the_plain_one_whole(artifact):
    half = variant(artifact, {"depth": DepthPruning(ratio=0.34)})
    assert (len(half.denoiser.units), len(artifact.denoiser.units)) == (2, 3)
    assert set(addresses(half.denoiser)) < set(addresses(artifact.denoiser))
    assert not same_weights(half.denoiser, artifact.denoiser)


def test_an_edit_with_parameters_is_refused(artifact):
    with pytest.raises(ValueError, match=r"lora \(LoRA\) is not training-free: it adds \d+ tensors of parameters"):
        variant(artifact, {"lora": LoRA(rank=2)})


def test_an_edit_that_sets_weights_gets_weights_of_its_own(artifact):
    class Zero(DepthPruning):
        def apply(self, denoiser):
            return None

        def initialise(self, denoiser):
            with torch.no_grad():
                for p in denoiser.parameters():
                    p.zero_()

    zero = variant(artifact, {"zero": Zero()})
    assert not any(p.any() for p in zero.denoiser.parameters()) and any(p.any() for p in artifact.denoiser.parameters())


def test_a_twin_repeats_what_was_folded(artifact):
    edit.apply(artifact.denoiser, {"depth": DepthPruning(ratio=0.34)})
    edit.fold(artifact.denoiser)
    again = twin(artifact.denoiser)
    assert len(again.units) == 2 and again.folded == artifact.denoiser.folded


def test_steps_are_not_asked_of_a_solver_with_times_of_its_own(artifact):
    with pytest.raises(ValueError, match="steps=3, but this model is sampled at times of its own"):
        at_steps(replace(artifact.sampler, solver=Grid((1.0, 0.5))), 3)
