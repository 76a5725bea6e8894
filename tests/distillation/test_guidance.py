from dataclasses import replace

import pytest
import torch

from edit.distillation.guidance import TeacherGuidance
from edit.stream import Condition

SCALE = torch.tensor([1.0, 2.5, 7.0])


@pytest.fixture
def plain(make_flux):
    """A flux without guidance input: it needs true guidance."""
    return make_flux(guidance_embeds=False)


@torch.no_grad()
def test_true_guidance_has_one_convention_whichever_way_it_is_written(plain, told):
    x, t, condition = told
    null = plain.null(condition)
    found = TeacherGuidance(1.0, 8.0)(plain, x, t, condition, null, SCALE).sample
    cond, uncond, g = plain(x, t, condition).sample, plain(x, t, null).sample, SCALE.view(3, 1, 1, 1)
    for written in (uncond + g * (cond - uncond), cond + (g - 1) * (cond - uncond)):
        torch.testing.assert_close(found, written, rtol=1e-4, atol=1e-4)  # fp32: up to 7 times the difference of two
    confused = cond + g * (cond - uncond)  # w taken for g
    assert (found - confused).abs().max() > 0.05


@torch.no_grad()
def test_guidance_works_on_labels_too(dit, batch):
    x, t, condition = batch
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
    null = dit.null(condition)
    found = TeacherGuidance(1.0, 4.0)(dit, x, t, condition, null, scale).sample
    cond, uncond = dit(x, t, condition).sample, dit(x, t, null).sample
    expected = uncond + scale.view(4, 1, 1, 1) * (cond - uncond)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_taps_and_branches_are_those_of_the_condition(plain, told):
    x, t, condition = told
    guided = TeacherGuidance(3.0, 3.0)(plain, x, t, condition, plain.null(condition), SCALE, taps=(0, 6), branches=(4,))
    alone = plain(x, t, condition, taps=(0, 6), branches=(4,))
    assert guided.trace.keys() == alone.trace.keys()
    for name, tokens in alone.trace.items():
        torch.testing.assert_close(guided.trace[name], tokens, rtol=1e-4, atol=1e-4)  # fp32 in another batch size


@torch.no_grad()
def test_a_teacher_with_a_guidance_input_is_told_the_scale_of_each_sample(flux, told):
    x, t, condition = told
    calls = count_calls(flux)
    found = TeacherGuidance(1.0, 8.0)(flux, x, t, condition, flux.null(condition), SCALE, taps=(2,))
    assert calls == [3]
    expected = flux(x, t, replace(condition, guidance=SCALE), taps=(2,))
    assert torch.equal(found.sample, expected.sample) and torch.equal(found.trace["unit.2"], expected.trace["unit.2"])


def test_guidance_of_one_asks_once_and_any_other_in_one_call_of_twice_the_batch(plain, told):
    x, t, condition = told
    student = replace(condition, guidance=SCALE)  # what a student is told does not reach a teacher that cannot be
    calls = count_calls(plain)
    none = TeacherGuidance()(plain, x, t, student, plain.null(student), torch.ones(3))
    TeacherGuidance(1.0, 2.0)(plain, x, t, student, plain.null(student), torch.ones(3))
    assert calls == [3, 6]
    assert torch.equal(none.sample, plain(x, t, condition).sample)
    assert not none.sample.requires_grad


def count_calls(denoiser) -> list[int]:
    """Batch sizes of the calls to come."""
    seen: list[int] = []
    denoiser.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


def test_the_learned_variance_is_that_of_the_condition(make_dit, batch):
    dit = make_dit(time="ddpm", learn_sigma=True)
    x, t, condition = batch
    with torch.no_grad():
        expected = dit(x, t, condition).variance
    found = TeacherGuidance(4.0, 4.0)(dit, x, t, condition, dit.null(condition), torch.full((4,), 4.0)).variance
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_scales_lie_between_the_bounds():
    u = torch.linspace(0, 1, 5)
    assert TeacherGuidance(1.0, 8.0).scale(u).tolist() == [1, 2.75, 4.5, 6.25, 8]
    assert TeacherGuidance(3.5, 3.5).scale(u).tolist() == [3.5] * 5


@pytest.mark.parametrize("bounds", [(-1.0, 2.0), (4.0, 3.0)])
def test_impossible_bounds_are_refused(bounds):
    with pytest.raises(ValueError, match="0 <= low <= high, got"):
        TeacherGuidance(*bounds)


def test_a_condition_without_text_is_the_model_s_own_complaint(plain):
    with pytest.raises(ValueError, match="needs condition.text"):
        TeacherGuidance()(plain, torch.zeros(1, 4, 8, 8), torch.ones(1), Condition(), Condition(), torch.ones(1))
