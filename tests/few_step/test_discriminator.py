"""Heads on a frozen model: what they look at, what they are told, whom their losses push where."""

import math

import pytest
import torch
from torch import nn
from views import Models

from edit.few_step.discriminator import (
    Heads,
    approximate_r1,
    hinge_generator,
    hinge_real_fake,
    judge,
    softplus_generator,
    softplus_real_fake,
)


def roles_of(denoiser, taps) -> Models:
    """A frozen model and heads on it, as the recipe hands them to a method."""

    def features(x_t, t, condition):
        return denoiser(x_t, t, condition, taps=taps)

    def absent(*_):
        raise AssertionError("a judgement asks the features alone")

    denoiser.requires_grad_(False)
    return Models(absent, absent, absent, absent, features, absent, Heads.on(denoiser, taps, hidden=16))


@pytest.mark.parametrize("family", ["dit", "flux"])
def test_the_generators_gradient_flows_through_the_frozen_model_and_leaves_it_alone(family, dit, flux, batch, told):
    denoiser, (x, t, condition) = {"dit": (dit, batch), "flux": (flux, told)}[family]
    roles = roles_of(denoiser, (1, -1))
    roles.own.requires_grad_(False)
    x.requires_grad_(True)
    hinge_generator(judge(roles, x, t, condition)).sum().backward()
    assert x.grad.abs().flatten(1).amax(1).gt(0).all()  # of each sample
    assert all(p.grad is None for p in (*denoiser.parameters(), *roles.own.parameters()))


@pytest.mark.parametrize("family", ["dit", "flux"])
def test_the_discriminators_gradient_reaches_every_parameter_of_the_heads(family, dit, flux, batch, told):
    denoiser, (x, t, condition) = {"dit": (dit, batch), "flux": (flux, told)}[family]
    roles = roles_of(denoiser, (0, -1))
    real, fake = judge(roles, x, t, condition), judge(roles, x.flip(0), t, condition)
    assert real.shape == (len(x), 2 * 16)  # two heads, 16 tokens
    hinge_real_fake(real, fake).sum().backward()
    assert all(p.grad.abs().sum() > 0 for name, p in roles.own.named_parameters() if not name.endswith("outer.bias"))


def test_losses_are_what_they_are_said_to_be_where_nothing_is_known():
    nothing = torch.zeros(3, 5)
    assert hinge_real_fake(nothing, nothing).tolist() == [2, 2, 2]
    assert hinge_generator(nothing).tolist() == [0, 0, 0]
    assert torch.allclose(softplus_real_fake(nothing, nothing), torch.full((3,), 2 * math.log(2)))
    assert torch.allclose(softplus_generator(nothing), torch.full((3,), math.log(2)))


@pytest.mark.parametrize(
    "discriminator, generator", [(hinge_real_fake, hinge_generator), (softplus_real_fake, softplus_generator)]
)
def test_the_discriminator_parts_reals_from_fakes_and_the_generator_brings_fakes_up(discriminator, generator):
    real, fake, own = (torch.zeros(1, 4, requires_grad=True) for _ in range(3))
    (discriminator(real, fake) + generator(own)).sum().backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all() and (own.grad < 0).all()


def test_the_hinge_lets_go_of_what_is_told_apart():
    logits = torch.full((2, 3), 1.5, requires_grad=True)
    loss = hinge_real_fake(logits, -logits).sum()
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_the_penalty_of_a_linear_discriminator_is_its_squared_gradient():
    torch.manual_seed(0)
    w, x, noise = torch.randn(50), torch.randn(4000, 50), torch.randn(4000, 50)
    penalty = approximate_r1((x @ w)[:, None], ((x + 0.1 * noise) @ w)[:, None]).mean()
    # the mean of 4000 squared normals is off by sqrt(2 / 4000) = 2.2 % (one deviation)
    assert penalty == pytest.approx(0.01 * w.square().sum().item(), rel=0.1)


def test_fresh_heads_do_not_hear_time_and_text_and_learn_to(told):
    heads, tokens = Heads((0,), 32, pooled=20, hidden=16), {"unit.0": torch.randn(3, 16, 32)}
    t, pooled = told[1], told[2].pooled

    def answers():
        return [heads(tokens, *told, (1, 4, 4)) for told in ((t, pooled), (t.flip(0), pooled), (t, pooled.flip(0)))]

    plain, later, other = answers()
    assert torch.equal(plain, later) and torch.equal(plain, other)
    nn.init.normal_(heads.code.weight)
    plain, later, other = answers()
    assert not torch.allclose(plain, later) and not torch.allclose(plain, other)


def test_pooled_text_is_left_out_where_the_model_is_told_none():
    heads, tokens = Heads((0,), 32), {"unit.0": torch.randn(2, 16, 32)}
    t = torch.tensor([0.1, 0.9])
    assert torch.equal(heads(tokens, t, torch.randn(2, 20), (1, 4, 4)), heads(tokens, t, None, (1, 4, 4)))


def test_tokens_lie_in_rows_and_columns_of_the_latent():
    heads = Heads((0,), 32, hidden=8)
    inner = heads.heads[0].inner
    with torch.no_grad():
        inner.weight += inner.weight.flip(3)  # sees left and right alike
    t, tokens = torch.tensor([0.5]), torch.randn(1, 4 * 6, 32)
    mirrored = tokens.unflatten(1, (4, 6)).flip(2).flatten(1, 2)
    plain, other = (heads({"unit.0": v}, t, None, (1, 4, 6)).view(4, 6) for v in (tokens, mirrored))
    assert torch.allclose(plain, other.flip(1), atol=1e-5)  # sums in another order


def test_a_kernel_of_one_does_not_care_where_tokens_are():
    t, tokens, order = torch.tensor([0.5]), torch.randn(1, 16, 32), torch.randperm(16)
    for kernel, same in ((1, True), (3, False)):
        heads = Heads((0,), 32, hidden=8, kernel=kernel)
        plain, moved = (heads({"unit.0": v}, t, None, (1, 4, 4)) for v in (tokens, tokens[:, order]))
        assert torch.allclose(plain[:, order], moved, atol=1e-5) == same


def test_samples_are_judged_one_by_one():
    heads, tokens, t = Heads((0,), 32, hidden=8), torch.randn(3, 16, 32), torch.rand(3)
    together = heads({"unit.0": tokens}, t, None, (1, 4, 4))
    alone = heads({"unit.0": tokens[1:2]}, t[1:2], None, (1, 4, 4))
    assert torch.allclose(together[1:2], alone, atol=1e-5)  # convolutions may sum in another order


def test_the_frames_of_a_video_are_judged_each_by_itself():
    heads, tokens, t = Heads((0,), 32, hidden=8), torch.randn(3, 2 * 16, 32), torch.rand(3)
    nn.init.normal_(heads.code.weight)
    together = heads({"unit.0": tokens}, t, None, (2, 4, 4))
    alone = [heads({"unit.0": frame}, t, None, (1, 4, 4)) for frame in tokens.chunk(2, 1)]
    assert torch.allclose(together, torch.cat(alone, 1), atol=1e-5)


def test_tokens_that_are_not_all_there_are_refused():
    with pytest.raises(ValueError, match="unit 0 has 15 tokens, its model's grid 1 x 4 x 4"):
        Heads((0,), 32)({"unit.0": torch.randn(1, 15, 32)}, torch.rand(1), None, (1, 4, 4))


def test_heads_are_built_on_the_meta_device(flux):
    with torch.device("meta"):
        heads = Heads.on(flux, (0, -1))
    assert heads.units == (0, 6) and heads.pooled == 20
    assert all(p.is_meta for p in heads.parameters())


def test_impossible_heads_are_refused():
    with pytest.raises(ValueError, match="at least one tapped unit"):
        Heads((), 32)
    with pytest.raises(ValueError, match="kernel must be odd, got 2"):
        Heads((0,), 32, kernel=2)
