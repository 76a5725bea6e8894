"""REPA: its loss against hand-written ones, where its gradient goes, its targets, and a run with it."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import encoders
import pytest
import torch
import torch.nn.functional as F
from small_runs import config, rows, train
from torch import nn
from views import passed
from weights import randomise

import edit
from edit.alignment.encoder import Encoder
from edit.alignment.looker import Encoded
from edit.alignment.repa import REPA, Projectors, projector
from edit.alignment.targets import averaged, resized, standardised
from edit.backbones.dit import DiTConfig
from edit.backbones.pixart import PixArtConfig
from edit.backbones.sd3 import SD3Config
from edit.denoiser import Denoiser
from edit.losses import Seen
from edit.measuring.turns import calls_of
from edit.objectives import FlowMatching
from edit.stream import Condition
from recipes.config.errors import UserError
from recipes.plan import Assumptions, drafted
from recipes.runtime.checkpoint_files import newest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Encoders of 8 x 8 pixels in 4 x 4 patches, 16 and 24 wide, and one of 2 x 2 patches."""
    folder = tmp_path_factory.mktemp("encoders")
    encoders.of_timm(folder / "eye", 8, 2)
    encoders.of_timm(folder / "wide", 8, 2, width=24, registers=0)
    encoders.of_timm(folder / "coarse", 8, 4)
    encoders.of_timm(folder / "placeless", 8, 1, registers=0, class_token=False, global_pool="avg", pos_embed="none")
    return folder


@pytest.fixture
def encoder(folder) -> Encoder:
    return Encoder(str(folder / "eye"))


def colours(x: torch.Tensor) -> torch.Tensor:
    return x[:, :3].tanh()


def seen_of(term: REPA, student: Denoiser, x_t, t, condition, x, own=None, **more) -> Seen:
    """One forward as the recipe makes it, with real frozen encoders."""
    out = student(x_t, t, condition, taps=term.taps)
    frozen = {name: spec.load() for name, spec in term.frozen.items()}
    seen = passed(out, t, own=term.build(student) if own is None else own)
    return replace(seen, x=x, x_t=x_t, frozen=frozen, decode=colours, **more)


def as_it_is(tokens, grids):
    """In place of projectors."""
    return tokens


# ---- the loss -------------------------------------------------------------------------------------------------------


def test_a_target_itself_has_minus_one_its_opposite_one_and_what_is_orthogonal_nothing(encoder):
    """Oracle 1, through the term: P replaced by the identity."""
    h = torch.randn(3, 16, 16)
    out = SimpleNamespace(trace={"unit.1": h}, grid=(1, 4, 4), kept=None)
    term, seen = REPA(encoder, 1, weight=1.0), SimpleNamespace(output=out, progress=0.0)
    orthogonal = torch.stack((-h[..., 1::2], h[..., ::2]), -1).flatten(2)
    for y, expected in ((h, -1), (-h, 1), (orthogonal, 0)):
        scaled = y * (0.1 + 9 * torch.rand(3, 16, 1))
        for target in (y, scaled):
            found = term.loss(seen, [Encoded(target, (4, 4), {})], as_it_is)
            torch.testing.assert_close(found, torch.full((3,), float(expected)), rtol=0, atol=1e-6)
    out.trace["unit.1"] = h * (0.1 + 9 * torch.rand(3, 16, 1))
    y = torch.randn(3, 16, 16)
    before = term.loss(
        SimpleNamespace(output=SimpleNamespace(trace={"unit.1": h}, grid=(1, 4, 4), kept=None), progress=0.0),
        [Encoded(y, (4, 4), {})],
        as_it_is,
    )
    torch.testing.assert_close(term.loss(seen, [Encoded(y, (4, 4), {})], as_it_is), before)


def test_two_encoders_of_two_widths_give_the_mean_of_a_double_loop(folder, dit, batch):
    """Oracle 2."""
    x_t, t, condition = batch
    term = REPA(Encoder(str(folder / "eye")), 1, further=[Encoder(str(folder / "wide"))], hidden=20)
    x = torch.randn_like(x_t)
    seen = seen_of(term, dit, x_t, t, condition, x)
    h, expected = seen.output.trace["unit.1"], []
    for b in range(4):
        total = 0.0
        for name, project in zip(("encoder.0", "encoder.1"), seen.own.maps, strict=True):
            y = seen.frozen[name](colours(x[b : b + 1])).tokens[0]
            for n in range(16):
                total += F.cosine_similarity(project(h[b, n]), y[n], dim=0) / 32
        expected.append(-0.5 * total)
    (loss,) = term.losses(seen).values()
    torch.testing.assert_close(loss, torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert [m[-1].out_features for m in seen.own.maps] == [16, 24]


def test_nt_xent_tells_each_token_from_all_others_of_the_batch(encoder):
    p, y = torch.randn(3, 16, 16), torch.randn(3, 16, 16)
    term = REPA(encoder, 1, similarity="nt_xent")
    a, b = (F.normalize(v.flatten(0, 1), dim=-1) for v in (p, y))
    expected = []
    for i in range(48):
        similar = torch.stack([a[i] @ b[j] for j in range(48)]) / 0.1
        expected.append(-(similar[i] - similar.exp().sum().log()))
    torch.testing.assert_close(term.distance(y, p), torch.stack(expected).view(3, 16).mean(1), rtol=1e-5, atol=1e-5)


def test_defaults_are_the_papers():
    term = REPA(Encoder("x"), 7)
    assert (term.weight, term.hidden, term.similarity, term.projector, term.ends) == (0.5, 2048, "cosine", "mlp", None)
    layers = projector(1152, 768, 2048)
    assert [type(m).__name__ for m in layers] == ["Linear", "SiLU", "Linear", "SiLU", "Linear"]
    assert sum(p.numel() for p in layers.parameters()) == 1152 * 2048 + 2048**2 + 2048 * 768 + 2048 * 2 + 768
    for layer in (layers[0], layers[2], layers[4]):
        limit = (6 / sum(layer.weight.shape)) ** 0.5  # Xavier-uniform
        assert not layer.bias.any() and limit * 0.99 < layer.weight.abs().max() <= limit


# ---- where the gradient goes ----------------------------------------------------------------------------------------


def grads(module: nn.Module) -> list[bool]:
    return [p.grad is not None and bool(p.grad.any()) for p in module.parameters()]


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_the_gradient_reaches_what_is_before_the_unit_and_the_projector_alone(objective, encoder, make_dit, batch):
    """Oracle 3; with noise predictions as with velocities."""
    student = make_dit(time="ddpm", learn_sigma=True) if objective == "ddpm" else make_dit()
    term = REPA(encoder, 1, hidden=20)
    seen = seen_of(term, student, *batch, torch.randn_like(batch[0]))
    term.losses(seen)["repa"].mean().backward()
    model = student.model
    for part in (model.x_embedder, model.t_embedder, seen.own, *model.blocks[:2]):
        assert all(grads(part))
    assert model.y_embedder.embedding_table.weight.grad.any()
    assert not any(grads(model.blocks[2])) and not any(grads(model.final_layer))
    assert all(p.grad is None for look in seen.frozen.values() for p in look.parameters())


def test_at_the_start_gates_the_patch_embedding_and_the_projector_learn_first(encoder, batch):
    """Oracle 4: adaLN-Zero."""
    torch.manual_seed(0)
    student = DiTConfig(input_size=8, hidden_size=32, depth=3, num_heads=4, num_classes=10).build()
    term = REPA(encoder, 1, hidden=20)
    seen = seen_of(term, student, *batch, torch.randn_like(batch[0]))
    term.losses(seen)["repa"].mean().backward()
    for block in student.model.blocks[:2]:
        for part in (block.attn, block.mlp):
            assert all(p.grad is not None and not p.grad.any() for p in part.parameters())
        six = block.adaLN_modulation[1].weight.grad.chunk(6)  # shift, scale, gate of attention; of the feed-forward
        assert [bool(rows.any()) for rows in six] == [False, False, True] * 2
    for part in (student.model.t_embedder, student.model.y_embedder):
        assert all(p.grad is None or not p.grad.any() for p in part.parameters())
    assert all(grads(student.model.x_embedder)) and all(grads(seen.own))


def test_without_a_weight_gradients_are_bit_equal_to_those_of_the_data(encoder, dit, batch):
    """Oracle 5."""
    x_t, t, condition = batch
    target = torch.randn_like(x_t)

    def gradients(term):
        student = deepcopy(dit)
        seen = seen_of(term, student, x_t, t, condition, torch.randn_like(x_t))
        loss = (seen.output.sample - target).square().mean()
        if term.weight is not None:
            loss = loss + term.losses(seen)["repa"].mean()
        loss.backward()
        return [p.grad for p in student.parameters()]

    weightless, vanilla = REPA(encoder, 1, weight=0.0, hidden=20), REPA(encoder, 1, hidden=20)
    vanilla.weight = None
    for a, b in zip(gradients(weightless), gradients(vanilla), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


# ---- targets --------------------------------------------------------------------------------------------------------


def test_targets_are_of_the_clean_sample_whatever_its_time_and_noise(encoder, dit, batch):
    """Oracle 6, first part."""
    x_t, t, condition = batch
    term, x = REPA(encoder, 1, hidden=20), torch.randn_like(x_t)
    one = term.encoded(seen_of(term, dit, x_t, t, condition, x))[0].tokens
    other = term.encoded(seen_of(term, dit, torch.randn_like(x_t), t.flip(0), condition, x))[0].tokens
    moved = term.encoded(seen_of(term, dit, x_t, t, condition, x.roll(1, -1)))[0].tokens
    assert torch.equal(one, other) and not torch.allclose(one, moved, atol=1e-3)


def test_a_flip_of_the_sample_permutes_the_columns_of_its_targets(folder, dit, batch):
    """Oracle 6, second part: exact for an encoder without places and with patches of one pixel."""
    term, x = REPA(Encoder(str(folder / "placeless")), 1, hidden=20), torch.randn_like(batch[0])
    one, other = (term.encoded(seen_of(term, dit, *batch, v))[0].tokens for v in (x, x.flip(-1)))
    torch.testing.assert_close(other.unflatten(1, (8, 8)), one.unflatten(1, (8, 8)).flip(2), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other, one, atol=1e-3)


def test_tokens_are_resized_to_the_encoders_grid_before_the_projector(folder, dit, batch):
    term = REPA(Encoder(str(folder / "coarse")), 1, hidden=20, weight=1.0)
    x = torch.randn_like(batch[0])
    seen = seen_of(term, dit, *batch, x)
    h = seen.output.trace["unit.1"].unflatten(1, (4, 4))
    coarse = h.unflatten(1, (2, 2)).unflatten(3, (2, 2)).mean((2, 4)).flatten(1, 2)  # bilinear from 4 to 2 is the mean
    y = seen.frozen["encoder.0"](colours(x)).tokens
    expected = -F.cosine_similarity(seen.own.maps[0](coarse), y, dim=-1).mean(1)
    torch.testing.assert_close(term.losses(seen)["repa"], expected, rtol=1e-4, atol=1e-5)
    tokens = torch.randn(2, 6, 3)
    assert torch.equal(resized(tokens, (1, 2, 3), (1, 2, 3)), tokens)
    with pytest.raises(ValueError, match="REPA: 5 tokens are no grid of 1 x 2 x 3: align a unit that has all of them"):
        resized(tokens[:, :5], (1, 2, 3), (1, 2, 3))


def test_frames_are_looked_at_alone_and_averaged_over_each_frame_of_tokens():
    seen = torch.randn(2, 4, 6, 5)  # samples, frames of the video, patches, channels
    expected = seen.unflatten(1, (2, 2)).mean(2).flatten(1, 2)
    torch.testing.assert_close(averaged(seen.flatten(0, 1), 2, 2, 6), expected)
    assert torch.equal(averaged(seen.flatten(0, 1), 2, 4, 6), seen.flatten(1, 2))
    tokens = torch.randn(2, 3 * 4, 5)  # of three frames
    apart = torch.stack(
        [resized(f.flatten(1, 2), (1, 2, 2), (1, 4, 4)) for f in tokens.view(2, 3, 2, 2, 5).unbind(1)], 1
    )
    torch.testing.assert_close(resized(tokens, (3, 2, 2), (3, 4, 4)), apart.flatten(1, 2))


def test_irepas_targets_lose_their_mean_and_its_projector_is_a_convolution():
    """Oracle 8, second half."""
    y = 3 + 2 * torch.randn(2, 64, 5)
    plain = standardised(y, 1.0)
    torch.testing.assert_close(plain.mean(1), torch.zeros(2, 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(plain.std(1), torch.ones(2, 5), rtol=0, atol=1e-5)
    expected = (y - 0.6 * y.mean(1, keepdim=True)) / (y.std(1, keepdim=True) + 1e-6)
    assert torch.equal(standardised(y, 0.6), expected)
    own = Projectors([projector(6, 5, None)])
    h = torch.randn(2, 3 * 4 * 2, 6)
    (found,) = own([h], [(2, 3, 4)])
    conv = own.maps[0]
    assert isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3)
    for b in range(2):
        for f in range(2):
            image = h[b].view(2, 3, 4, 6)[f].permute(2, 0, 1)
            assert torch.allclose(found[b].view(2, 3, 4, 5)[f], conv(image).permute(1, 2, 0), atol=1e-6)


def test_irepa_goes_through_the_term(encoder, dit, batch):
    term = REPA(encoder, 1, weight=1.0, projector="conv", standardise=0.6)
    seen = seen_of(term, dit, *batch, torch.randn_like(batch[0]))
    (guess,) = seen.own([seen.output.trace["unit.1"]], [(1, 4, 4)])
    y = standardised(seen.frozen["encoder.0"](colours(seen.x)).tokens, 0.6)
    torch.testing.assert_close(term.losses(seen)["repa"], -F.cosine_similarity(guess, y, dim=-1).mean(1))


def test_of_kept_tokens_alone_targets_are_theirs(encoder, dit, batch):
    x_t, t, condition = batch
    kept = torch.tensor([[0, 5], [3, 4], [14, 15], [1, 9]])
    term = REPA(encoder, 1, weight=1.0, hidden=20)
    assert term.subsets and not REPA(encoder, 1, projector="conv").subsets
    seen = seen_of(term, dit, x_t, t, replace(condition, kept=kept), torch.randn_like(x_t))
    h = seen.output.trace["unit.1"]
    y = seen.frozen["encoder.0"](colours(seen.x)).tokens
    y = torch.stack([rows[places] for rows, places in zip(y, kept, strict=True)])
    expected = -F.cosine_similarity(seen.own.maps[0](h), y, dim=-1).mean(1)
    assert h.shape[1] == 2
    torch.testing.assert_close(term.losses(seen)["repa"], expected)


def test_kept_tokens_have_no_targets_on_another_grid(folder, dit, batch):
    x_t, t, condition = batch
    term = REPA(Encoder(str(folder / "coarse")), 1, hidden=20)
    kept = torch.arange(4).expand(4, -1)
    seen = seen_of(term, dit, x_t, t, replace(condition, kept=kept), torch.randn_like(x_t))
    with pytest.raises(ValueError, match="some of 4 x 4 tokens are kept, and the encoder sees 2 x 2 patches: choose"):
        term.losses(seen)


# ---- families -------------------------------------------------------------------------------------------------------

TEXT = {"joint_attention_dim": 24, "pooled_projection_dim": 20}
HEADS = {"attention_head_dim": 16, "num_attention_heads": 4}
FAMILIES = {
    "sd3": (
        SD3Config(in_channels=4, num_layers=3, sample_size=8, pos_embed_max_size=8, **TEXT, **HEADS),
        Condition(text=torch.ones(2, 5, 24), pooled=torch.ones(2, 20)),
    ),
    "pixart": (
        PixArtConfig(num_layers=3, sample_size=8, cross_attention_dim=64, caption_channels=24, **HEADS),
        Condition(text=torch.ones(2, 5, 24), text_mask=torch.ones(2, 5, dtype=torch.bool)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_image_stream_alone_is_aligned(family, encoder):
    config, condition = FAMILIES[family]
    student = config.build()
    randomise(student, 0)
    term, x = REPA(encoder, 1, hidden=20), torch.randn(2, 4, 8, 8)
    seen = seen_of(term, student, x, torch.tensor([0.3, 0.9]), condition, x)
    term.losses(seen)["repa"].mean().backward()
    assert seen.own.maps[0][0].in_features == student.facts.width == seen.output.trace["unit.1"].shape[-1]
    assert not any(grads(student.units[2])) and any(grads(student.units[1]))


def test_flux_is_aligned_behind_double_and_single_units(encoder, flux, told):
    x_t, t, condition = told
    for unit in (1, 4):
        term = REPA(encoder, unit, hidden=20)
        seen = seen_of(term, flux, x_t, t, condition, torch.randn(3, 4, 8, 8))
        assert term.losses(seen)["repa"].shape == (3,)


# ---- cached features ------------------------------------------------------------------------------------------------


def test_cached_features_take_the_encoders_place(encoder, dit, batch):
    term, x = REPA(encoder, 1, hidden=20), torch.randn_like(batch[0])
    seen = seen_of(term, dit, *batch, x)
    cached = replace(term, cached=True)
    given = {"encoded": term.encoded(seen)[0].tokens.half()}  # as shards keep them
    blind = replace(seen, batch=given, frozen={}, decode=None)
    torch.testing.assert_close(cached.losses(blind), term.losses(seen), rtol=1e-3, atol=1e-4)
    assert cached.frozen == {} and not cached.decodes and cached.reads == {"encoded": (1, 16)} and term.decodes
    coarse = replace(seen, batch={"encoded": torch.randn(4, 4, 16)}, frozen={})
    assert cached.losses(coarse)["repa"].shape == (4,)  # a square of another size
    with pytest.raises(
        ValueError, match="features of 6 patches, which are neither the 4 x 4 of the model nor a square"
    ):
        cached.losses(replace(seen, batch={"encoded": torch.randn(4, 6, 16)}))


def test_features_of_another_encoder_or_none_are_refused(folder, encoder):
    term = REPA(encoder, 1, cached=True)
    mine = encoder.identity()
    term.check_data(SimpleNamespace(encoded={**mine, "name": "elsewhere", "grid": [4, 4]}), [])
    with pytest.raises(ValueError, match="cached=true, and the data give no features: make them with .*--features"):
        term.check_data(SimpleNamespace(), [])
    other = Encoder(str(folder / "wide")).identity()
    with pytest.raises(ValueError, match="features of another encoder: .*wide, sha256 .*, and the term names .*eye"):
        term.check_data(SimpleNamespace(encoded=other), [])
    with pytest.raises(ValueError, match="features of another encoder: .*side 32, and the term names .*side None"):
        term.check_data(SimpleNamespace(encoded={**mine, "side": 32}), [])


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_a_unit_that_does_not_exist_is_refused(encoder, dit):
    with pytest.raises(ValueError, match="REPA: this dit has units 0 to 2, got 7"):
        REPA(encoder, 7).build(dit)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"similarity": "dot"}, "similarity must be cosine or nt_xent, got 'dot'"),
        ({"projector": "mlp3"}, "projector must be mlp or conv, got 'mlp3'"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"unit": -1}, "unit must be at least 0, got -1"),
        ({"cached": True, "further": [Encoder("y")]}, "features of one encoder: leave out further"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        REPA(**{"encoder": Encoder("x"), "unit": 1, **settings})


# ---- in a run -------------------------------------------------------------------------------------------------------


def words(path, *more):
    encoder = f"{{_target_: edit.alignment.encoder.Encoder, path: {path}}}"
    return (f"+terms.repa={{_target_: edit.alignment.repa.REPA, unit: 0, hidden: 24, encoder: {encoder}}}", *more)


def test_a_run_keeps_the_projector_in_its_checkpoint_and_not_in_its_artifact(folder, tmp_path):
    """Oracle 7: sampling does not know of it."""
    train(tmp_path, "name=a", *words(folder / "eye"), "trainer.max_steps=3")
    assert all(-0.5 <= float(r["train/repa/repa"]) <= 0.5 for r in rows(tmp_path, "a"))
    state = torch.load(newest(tmp_path / "a/checkpoints"), weights_only=True)["state_dict"]
    own = {k for k in state if k.startswith("own.repa.maps.0")}
    assert len(own) == 6 and not any("encoder" in k or "eye" in k for k in state)
    artifact = edit.load(tmp_path / "a/artifact")
    ema = {k.removeprefix("ema."): v for k, v in state.items() if k.startswith("ema.")}
    assert ema.keys() == artifact.denoiser.state_dict().keys()
    assert all(torch.equal(v, ema[k]) for k, v in artifact.denoiser.state_dict().items())


def test_a_run_without_its_encoder_or_with_too_small_images_is_refused_in_one_sentence(folder, tmp_path):
    encoders.of_timm(folder / "large", 32, 16)
    with pytest.raises(UserError, match=r"^terms.repa looks with a frozen model: no folder .*/gone: give .*dinov2"):
        train(tmp_path, "name=a", *words(f"{folder}/gone"))
    with pytest.raises(UserError, match="terms.repa .* images of 8 x 8 pixels are smaller than a patch of .*large"):
        train(tmp_path, "name=a", *words(folder / "large"))
    assert not (tmp_path / "a").exists()


def test_a_plan_counts_the_encoder_unless_its_features_are_cached(folder, tmp_path):
    for cached in (False, True):
        settings = config(tmp_path, *words(folder / "eye", f"+terms.repa.cached={cached}", "trainer.devices=1"))
        draft = drafted(Assumptions(), settings, [])
        looks = {} if cached else {f"{name} of 1x8x8": {"nothing": 1.0} for name in ("decoder", "encoder.0")}
        assert calls_of(draft.kinds) == {"student": {"weights": 1.0}, **looks} and draft.own > 0
        assert draft.frozen == (
            0 if cached else sum(p.numel() for p in Encoder(f"{folder}/eye").structure().parameters())
        )


# ---- oracle 9 -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("paired", [True, False])
def test_the_cosine_grows_with_the_right_targets_and_stalls_at_the_mean_with_permuted_ones(paired):
    """What permuted targets leave to learn is their mean at each place, with which they have a cosine of their own."""
    torch.manual_seed(0)
    student = DiTConfig(input_size=8, hidden_size=64, depth=4, num_heads=4, num_classes=10).build()
    eye = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 48)).requires_grad_(False)
    centres = torch.randn(10, 4, 8, 8)

    def drawn(count):
        label = torch.randint(10, (count,))
        x = centres[label] + 0.5 * torch.randn(count, 4, 8, 8)
        patches = x.unflatten(2, (4, 2)).unflatten(4, (4, 2)).permute(0, 2, 4, 1, 3, 5).reshape(count, 16, 16)
        return label, x, eye(patches)

    y = F.normalize(drawn(2000)[2], dim=-1)
    marginal = F.cosine_similarity(y, y.mean(0), dim=-1).mean().item()
    term, objective = REPA(Encoder("none"), 1, cached=True), FlowMatching()
    own = Projectors([projector(64, 48, 256)])
    optimizer = torch.optim.AdamW([*student.parameters(), *own.parameters()], lr=1e-3)
    found = []
    for _ in range(300):
        (label, x, y), noise, t = drawn(32), torch.randn(32, 4, 8, 8), torch.rand(32)
        x_t = objective.corrupt(x, noise, t)
        out = student(x_t, t, Condition(label=label), taps=term.taps)
        given = {"encoded": y if paired else y[torch.randperm(32)]}
        alignment = term.losses(replace(passed(out, t, own=own), batch=given))["repa"].mean()
        found.append(-2 * alignment.item())
        loss = sum(v.mean() for v in objective.losses(out, x, noise, x_t, t).values()) + alignment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    last = sum(found[-10:]) / 10
    assert abs(found[0]) < 0.2 and marginal < 0.45
    assert last > marginal + 0.25 if paired else last < marginal + 0.02, (found[0], last, marginal)
