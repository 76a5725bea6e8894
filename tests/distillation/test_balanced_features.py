"""Balanced feature distillation: the specification's oracle of w_l, and what is compared."""

import pytest
import torch
from families import family

import edit
from edit.distillation.balanced_features import BalancedFeatureKD, weights
from edit.moe.dense2moe import Dense2MoE


def test_weights_are_those_of_the_specification():
    raw, norms = torch.tensor([1.0, 10.0, 100.0]), torch.tensor([1.0, 5.0, 30.0])
    w = weights(torch.tensor(0.3), raw, norms)
    torch.testing.assert_close(w * raw, torch.tensor([3.6, 0.72, 0.12]))


def test_no_gradient_passes_through_the_weights():
    distill, raw, norms = (torch.rand(n, requires_grad=True) for n in (1, 3, 3))
    w = weights(distill[0], raw, norms)
    assert not w.requires_grad
    (w * raw).sum().backward()
    assert torch.equal(raw.grad, w) and distill.grad is None and norms.grad is None


def test_a_feature_that_is_the_teachers_has_no_part():
    assert (weights(torch.tensor(0.3), torch.zeros(2), torch.ones(2)) * torch.zeros(2) == 0).all()


@pytest.fixture(scope="module")
def models():
    teacher = family("flux").float()
    student = edit.apply(family("flux").float(), {"moe": Dense2MoE(ranking="magnitude", stage="shared")}).eval()
    return student, teacher


PAIRS = tuple((i, i) for i in range(4))


def seen_of(see, models, term):
    from families import inputs

    x, t, condition = inputs(models[1], 3)
    return see(*models, (x.float(), t.float(), condition.map(lambda v: v.float())), term)


def test_the_value_is_pinned_to_the_distance_of_predictions(see, models):
    term = BalancedFeatureKD(PAIRS)
    seen = seen_of(see, models, term)
    loss = term.losses(seen)["balanced_features"]
    assert loss.shape == (3,)
    distill = (seen.output.sample - seen.taught.sample).square().mean()
    sides = [
        [(seen.output.trace[f"unit.{i}{k}"], seen.taught.trace[f"unit.{i}{k}"]) for k in ("", ".text")]
        for i in range(4)
    ]
    norms = torch.stack([torch.cat([t.flatten() for _, t in pair]).norm() for pair in sides])
    torch.testing.assert_close(loss.mean(), (distill * norms.mean() / norms).sum(), rtol=1e-4, atol=0)
    raw = term.metrics(seen)
    for i, pair in enumerate(sides):  # per element, image and text together
        wanted = torch.cat([(s - t).flatten() for s, t in pair]).square().mean()
        torch.testing.assert_close(raw[f"raw/{i}"], wanted)
    assert BalancedFeatureKD(PAIRS, weight=0.0).losses(seen)["balanced_features"].abs().max() == 0
    image = BalancedFeatureKD(PAIRS, text=False).metrics(seen)["raw/0"]
    torch.testing.assert_close(image, (sides[0][0][0] - sides[0][0][1]).square().mean())


def test_its_gradient_is_that_of_the_weighed_distances(see, models):
    student, _ = models
    term = BalancedFeatureKD(((1, 1),))
    seen = seen_of(see, models, term)
    p = student.edits["moe"]["0"].shared.into.weight
    (found,) = torch.autograd.grad(term.losses(seen)["balanced_features"].mean(), p, retain_graph=True)
    raw, norms = term.compared(seen)
    w = weights((seen.output.sample - seen.taught.sample).square().mean(), raw.mean(1), norms)
    (wanted,) = torch.autograd.grad((w[:, None] * raw).mean(), p)
    torch.testing.assert_close(found, wanted)


def test_it_needs_a_teacher_and_pairs():
    with pytest.raises(ValueError, match="BalancedFeatureKD compares with a teacher and there is none: give one"):
        BalancedFeatureKD(PAIRS).build(family("dit"))
    with pytest.raises(ValueError, match="BalancedFeatureKD: pairs are"):
        BalancedFeatureKD(())
