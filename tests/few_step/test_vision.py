"""A discriminator that looks at decoded images: what it is shown, how much it counts, whom its losses push."""

import json
import shutil
from dataclasses import replace

import dino
import pytest
import torch
from torch import nn
from views import Models, view

from data.decoder import Codec
from edit.few_step.discriminator import hinge_generator, hinge_real_fake
from edit.few_step.distribution_matching import DistributionMatching
from edit.few_step.vision import Vision, cropped, feature_distance, late
from edit.losses import Draws, Seen
from edit.stream import Condition


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return dino.write(tmp_path_factory.mktemp("dino"))


@pytest.fixture
def vision(folder):
    return Vision(str(folder), layers=(0, -1), hidden=8)


def given_of(x, condition=None) -> Seen:
    condition = condition or Condition(pooled=torch.randn(len(x), 20))
    draws = Draws(0, torch.arange(len(x)), 0, tuple(x.shape[1:]))
    return Seen(condition, condition, torch.ones(len(x)), draws, 0.5, x)


def absent(*_):
    raise AssertionError("nobody is to be asked for this")


def roles_of(vision, flux, student=absent, teacher=absent, critic=absent) -> Models:
    """Real latents' codec, real eye and heads, fields as given."""
    heads = vision.heads(flux)
    return Models(student, absent, absent, teacher, absent, critic, heads, Codec(), vision.load())


# ---- gradients (oracle 17) ------------------------------------------------------------------------------------------


def test_the_generators_gradient_flows_through_decoder_and_vision_model_and_leaves_both_alone(vision, flux):
    roles, x = roles_of(vision, flux), torch.randn(3, 12, 8, 8, requires_grad=True)
    roles.own.requires_grad_(False)
    hinge_generator(vision.judge(view(roles, given_of(x)), x)).sum().backward()
    assert x.grad.abs().flatten(1).amax(1).gt(0).all()  # of each sample
    assert all(p.grad is None for m in (roles.decode, roles.look, roles.own) for p in m.parameters())
    assert not any(p.requires_grad for p in roles.look.parameters()) and not roles.look.model.training


def test_the_heads_learn_and_the_discriminator_has_no_graph_to_latents(vision, flux):
    roles, x = roles_of(vision, flux), torch.randn(3, 12, 8, 8)
    given = given_of(x)
    assert not any(v.requires_grad for v in vision.see(view(roles, given), x).values())
    fake = torch.randn_like(x)  # not the same samples in another order, whose gradients cancel
    hinge_real_fake(vision.judge(view(roles, given), x), vision.judge(view(roles, given), fake)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for name, p in roles.own.named_parameters() if not name.endswith("outer.bias"))


def test_where_the_discriminator_says_nothing_the_losses_are_two_and_zero(vision, flux):
    x = torch.randn(3, 12, 8, 8)
    method = DistributionMatching(vision=vision, judgement=1.0, simulate=0.0)
    roles = roles_of(vision, flux, *(lambda x_t, t, c: 0.3 * x_t for _ in range(3)))
    for head in roles.own.heads:
        nn.init.zeros_(head.outer.weight)
        nn.init.zeros_(head.outer.bias)
    assert method.critic_losses(view(roles, given_of(x)))["judgement"].tolist() == [2, 2, 2]
    assert not method.student_losses(view(roles, given_of(x)))["vision"].any()


# ---- what is shown --------------------------------------------------------------------------------------------------


def test_crops_are_squares_of_the_sample_at_every_place_and_at_its_edges():
    places = torch.arange(6 * 9).view(1, 1, 6, 9).float().expand(4000, 2, 6, 9)
    row, column = torch.rand(4000), torch.rand(4000)
    found = cropped(places, row, column, 4)
    top = found[:, 0, 0, 0]
    window = torch.arange(4)[:, None] * 9 + torch.arange(4)
    assert torch.equal(found, (top.view(-1, 1, 1, 1) + window).expand(-1, 2, -1, -1))
    assert set(top.long().tolist()) == {9 * y + x for y in range(3) for x in range(6)}  # 18 places, 222 draws each
    with pytest.raises(ValueError, match="vision.crop=7 is more than the 6 x 9 of a sample"):
        cropped(places, row, column, 7)


def test_a_sample_and_its_fake_are_cropped_at_one_place_and_others_elsewhere(vision, flux):
    shown = []
    roles = replace(roles_of(vision, flux), decode=lambda x: shown.append(x) or Codec()(x))
    places = torch.arange(64.0).view(1, 1, 8, 8).expand(16, 12, 8, 8)
    given, small = given_of(places), replace(vision, crop=4)
    small.see(view(roles, given), places)
    small.see(view(roles, given), places + 100)
    assert shown[0].shape == (16, 12, 4, 4) and torch.equal(shown[1], shown[0] + 100)
    assert len(shown[0][:, 0, 0, 0].unique()) > 5  # of 25 places


def test_pixels_are_prepared_as_the_preprocessor_does_and_patches_alone_are_seen(vision):
    from transformers import AutoModel, BitImageProcessorPil

    pixels = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    prepared = BitImageProcessorPil.from_pretrained(vision.path, do_resize=False)(list(pixels), return_tensors="pt")
    states = AutoModel.from_pretrained(vision.path)(**prepared, output_hidden_states=True).hidden_states
    seen = vision.load()(pixels / 127.5 - 1)
    assert list(seen) == ["unit.0", "unit.3"] and seen["unit.0"].shape == (2, 16, 16)
    for name, i in (("unit.0", 1), ("unit.3", 4)):
        torch.testing.assert_close(seen[name], states[i][:, 1:], rtol=1e-4, atol=1e-4)  # pixels came by another way


def test_images_of_any_size_and_of_one_channel_are_seen(vision):
    eye, grey = vision.load(), torch.rand(2, 1, 40, 24) * 2 - 1
    one, three = eye(grey), eye(grey.expand(-1, 3, -1, -1))
    assert all(torch.equal(one[k], three[k]) for k in one)


def test_the_structure_has_no_weights_and_says_what_heads_and_plans_need(vision):
    eye = vision.structure()
    assert all(p.is_meta for p in eye.parameters()) and (eye.tokens, eye.width, eye.layers) == (16, 16, [0, 3])
    assert sum(p.numel() for p in eye.parameters()) == sum(p.numel() for p in vision.load().parameters())


def test_heads_hear_the_pooled_text_where_there_is_one_and_it_is_asked_for(vision, flux, dit):
    assert vision.heads(flux).pooled == 20
    assert replace(vision, told=False).heads(flux).pooled == 0 == vision.heads(dit).pooled
    roles, x = roles_of(vision, flux), torch.randn(2, 12, 8, 8)
    nn.init.normal_(roles.own.code.weight)
    a, b = (vision.judge(view(roles, given_of(x, Condition(pooled=torch.full((2, 20), v)))), x) for v in (0.0, 1.0))
    assert not torch.allclose(a, b)


def test_the_distance_forgets_lengths_and_is_two_between_what_has_nothing_in_common():
    a, b = torch.zeros(1, 5, 4), torch.zeros(1, 5, 4)
    a[..., 0], b[..., 1] = 3.0, 0.5
    assert feature_distance({"unit.0": a, "unit.1": a}, {"unit.0": 7 * a, "unit.1": b}).item() == pytest.approx(
        1.0
    )  # (0 + 2) / 2


# ---- in distribution matching ---------------------------------------------------------------------------------------


def test_the_weight_grows_as_the_students_level_falls():
    assert late(torch.tensor([1.0, 0.75, 0.5, 0.25])).tolist() == [0, 0.125, 0.5, 1.125]


@pytest.mark.parametrize("start", [1.0, 0.5])
def test_the_student_is_judged_by_what_it_makes_weighted_by_the_level_it_starts_from(vision, flux, start):
    method = DistributionMatching(grid=(start,), vision=vision, simulate=0.0)
    x = torch.randn(3, 12, 8, 8)
    shift, given = torch.zeros(1, 12, 1, 1, requires_grad=True), given_of(x)
    eps = given.draws.gaussian(0)
    same = lambda x_t, t, c: x_t  # noqa: E731
    roles = roles_of(vision, flux, lambda x_t, t, c: eps - x - shift, same, same)
    loss = method.student_losses(view(roles, given))["vision"]
    expected = 2 * (1 - start) ** 2 * hinge_generator(vision.judge(view(roles, given), x))  # its step leads to x itself
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)  # fp32 through four layers
    loss.sum().backward()
    assert bool(shift.grad.any()) == (start < 1)


def test_on_the_critics_turn_the_student_gets_nothing_and_critic_and_heads_learn(vision, flux):
    ours, theirs = (torch.full((1,), 0.3, requires_grad=True) for _ in range(2))
    method, x = DistributionMatching(vision=vision), torch.randn(3, 12, 8, 8)
    roles = roles_of(vision, flux, lambda x_t, t, c: ours * x_t, absent, lambda x_t, t, c: theirs * x_t)
    losses = method.critic_losses(view(roles, given_of(x)))
    assert set(losses) == {"velocity", "judgement"}
    sum(losses.values()).sum().backward()
    assert ours.grad is None and theirs.grad.any() and roles.own.heads[0].inner.weight.grad.any()


def test_heads_are_built_for_it_data_are_needed_and_two_discriminators_are_refused(vision, flux):
    method = DistributionMatching(vision=vision, simulate=1.0)
    assert method.needs_data and not DistributionMatching(simulate=1.0).needs_data
    heads = method.build(flux, None)
    assert len(method.judges(heads)) == len(list(heads.parameters()))
    with pytest.raises(ValueError, match=r"taps=\[4\] and vision are two discriminators"):
        DistributionMatching(vision=vision, taps=(4,))


# ---- refusals -------------------------------------------------------------------------------------------------------


def changed(folder, tmp_path, **config):
    place = tmp_path / "other"
    shutil.copytree(folder, place)
    told = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(told | config))
    return place


def test_what_is_no_whole_dinov2_is_refused_in_one_sentence(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no vision model with its preprocessor in .*nowhere: give the folder"):
        Vision(str(tmp_path / "nowhere")).load()
    with pytest.raises(ValueError, match="vision.layers: 23 is none of the 4 of the model: choose 0 to 3"):
        Vision(str(folder), layers=(0, 23)).structure()
    with pytest.raises(ValueError, match="holds a vit, expected one of dinov2"):
        Vision(str(changed(folder, tmp_path, model_type="vit")), layers=(0,)).load()
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(ValueError, match="lacks 18 weights of its DINOv2, such as"):
        Vision(str(changed(folder, tmp_path, num_hidden_layers=5)), layers=(0,)).load()
    (tmp_path / "other/model.safetensors").rename(tmp_path / "other/pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="gave no weights in safetensors"):
        Vision(str(tmp_path / "other"), layers=(0,)).load()
    (tmp_path / "other/preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no vision model with its preprocessor"):
        Vision(str(tmp_path / "other"), layers=(0,)).structure()


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        Vision("somewhere", layers=())
    with pytest.raises(ValueError, match="crop must be at least 1 or None, got 0"):
        Vision("somewhere", crop=0)
