import pytest
import torch
from analytic import average, roles
from views import view

import edit
from edit.few_step.flow_map import IntervalInput
from edit.few_step.shortcut import Shortcut
from edit.losses import Draws, Seen
from edit.paths import corrupt
from edit.stream import Condition

SHAPE = (1, 2, 2)


def given(count: int = 64) -> Seen:
    condition = Condition(label=torch.zeros(count, dtype=torch.int64))
    draws = Draws(0, torch.arange(count), 0, SHAPE)
    return Seen(condition, condition, torch.ones(count), draws, 0.0, torch.randn(count, *SHAPE))


def test_the_exact_flow_map_has_no_loss_and_another_has():
    right, wrong = (
        Shortcut().student_losses(view(roles(average(lam), lambda x, t, c: -0.7 * x), given()))["shortcut"]
        for lam in (-0.7, -0.5)
    )
    # the error of a difference over 0.01 is 1e-4 / 6 times a third derivative below 1, and squared here
    assert right.shape == (64,) and right.max() < 1e-8 and wrong.mean() > 1e-3


def test_samples_are_diffusion_consistency_and_between_in_the_shares_asked_for():
    seen = []
    Shortcut().student_losses(view(roles(average(0.1, seen), lambda x, t, c: x), given(4000)))
    t, end = seen[-1]
    shares = [(end == t).float().mean(), (end == 0).float().mean(), ((0 < end) & (end < t)).float().mean()]
    # a share of 4000 draws has a standard error of at most 0.008
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.03)
    assert (t[end == 0].mean() - 0.5).abs() < 0.05  # consistency has the law's own times, error 0.01


def test_it_is_asked_a_step_ahead_and_a_step_behind_on_the_way():
    seen = []

    def student(x, t, condition):
        seen.append((x, t, condition.end))
        return x

    now = given()
    Shortcut(step=0.05).student_losses(view(roles(student, lambda x, t, c: 3 * torch.ones_like(x)), now))
    ahead, behind, here = seen
    torch.testing.assert_close(ahead[0] - here[0], torch.full_like(here[0], 0.15))
    torch.testing.assert_close(here[0] - behind[0], torch.full_like(here[0], 0.15))
    torch.testing.assert_close(ahead[1] - here[1], torch.full((64,), 0.05))
    torch.testing.assert_close(here[1] - behind[1], torch.full((64,), 0.05))
    assert torch.equal(ahead[2], here[2]) and torch.equal(behind[2], here[2])


def test_diffusion_alone_on_data_is_flow_matching():
    seen, now = [], given()
    method = Shortcut(target="data", diffusion=1.0, consistency=0.0)
    loss = method.student_losses(view(roles(average(0.3, seen)), now))["shortcut"]
    eps = now.draws.gaussian(3)
    expected = (0.3 * corrupt(now.x, eps, seen[-1][0]) - (eps - now.x)).flatten(1).square().mean(1)
    torch.testing.assert_close(loss, expected)
    assert not method.needs_teacher and Shortcut().needs_teacher


def test_a_student_without_an_end_and_impossible_shares_are_refused(dit):
    with pytest.raises(ValueError, match="Shortcut trains a flow map.*IntervalInput"):
        Shortcut().build(dit, None)
    assert Shortcut().build(edit.apply(dit, {"flow_map": IntervalInput()}), None) is None
    with pytest.raises(ValueError, match="diffusion and consistency are shares of one whole, got 0.9 and 0.25"):
        Shortcut(diffusion=0.9)
    with pytest.raises(ValueError, match="target must be teacher or data, got 'student'"):
        Shortcut(target="student")
    with pytest.raises(ValueError, match="step must be positive, got 0"):
        Shortcut(step=0.0)
