"""muP: classes, groups and first values as the table says, in every family; what carries the readout's multiplier."""

import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from families import CONFIGS, inputs
from torch import Tensor, nn

import edit
from edit.alignment.repa import Projectors, projector
from edit.alignment.self_transcendence import FeatureHead, PatchHead
from edit.alignment.sra import SRA
from edit.artifacts.export import ExportSettings, export
from edit.backbones.dit import DiTConfig
from edit.backbones.pixart import PixArtConfig
from edit.caching.lesa import LESA
from edit.denoiser import Denoiser
from edit.edits import fold, grouped
from edit.groups import PLAIN, Group
from edit.moe.dit_moe import DiTMoE
from edit.moe.expert_choice import ExpertChoice
from edit.moe.switch_dit import SwitchDiT
from edit.scaling.mup import MuP, Readout
from edit.scaling.mup_rules import factors
from edit.stream import Condition
from edit.tokens.micro_dit import PatchMixer
from edit.tuning.lora import LoRA
from edit.widths import Scale, scales_of

DIT = {"input_size": 8, "depth": 2, "num_classes": 10, "patch_size": 4}


def made(width: int = 64, base: int = 32, heads: int = 4, seed: int = 0, **options) -> Denoiser:
    torch.manual_seed(seed)
    denoiser = DiTConfig(**{**DIT, "hidden_size": width, "num_heads": heads, **options}).build()
    return edit.apply(denoiser, {"mup": MuP(base_width=base)})


@torch.no_grad()
def moved(denoiser: Denoiser) -> Denoiser:
    """After some training: the readout is not zero any more."""
    for p in denoiser.parameters():
        p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return denoiser.eval()


def batch(denoiser: Denoiser) -> tuple[Tensor, Tensor, Condition]:
    x, t, condition = inputs(denoiser)
    return x.float(), t.float(), condition.map(lambda v: v.float() if v.is_floating_point() else v)


def rules_of(denoiser: Denoiser):
    return denoiser.applied["mup"].rules(denoiser)  # type: ignore[attr-defined]


# ---- the base is the reference --------------------------------------------------------------------------------------


def test_at_the_base_width_nothing_differs_from_the_usual_parametrisation():
    denoiser = moved(made(base=64))
    plain = DiTConfig(**{**DIT, "hidden_size": 64, "num_heads": 4}).build().eval()
    plain.load_state_dict(denoiser.state_dict())
    assert grouped(denoiser) == {}
    assert torch.equal(denoiser(*batch(denoiser)).sample, plain(*batch(denoiser)).sample)
    assert all(rule.r == 1 and rule.group == PLAIN for rule in rules_of(denoiser).values())


def test_first_values_at_another_base_are_those_of_the_base_times_the_factors_of_the_table():
    one, four = made(base=64), made(base=16)  # the same draws
    for (name, a), b in zip(one.named_parameters(), four.parameters(), strict=True):
        scale = rules_of(four)[name].scale
        # N(0, 1 / inputs) is the law of every hidden matrix: sigma_b r^(-1/2) is 1 / sqrt(inputs) at any base
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0) if scale.kind != "output" else None
    assert one.model.final_layer.linear.weight.count_nonzero() == 0


# ---- classes --------------------------------------------------------------------------------------------------------

TABLE = {
    "input": "x_embedder.proj t_embedder.mlp.0 y_embedder.embedding_table",
    "hidden": "t_embedder.mlp.2 attn.qkv attn.proj mlp.fc1 mlp.fc2 adaLN_modulation.1",
    "output": "final_layer.linear",
}


def test_every_matrix_of_dit_xl_is_of_the_class_in_the_table_and_trains_as_it_says():
    with torch.device("meta"):
        denoiser = edit.apply(
            DiTConfig(depth=4, patch_size=2, learn_sigma=True, time="ddpm").build(), {"mup": MuP()}, fresh=False
        )
    assert denoiser.facts.width == 1152 and denoiser.ends["output"] == Readout(0.25)
    rules, groups, eta, decay, seen = rules_of(denoiser), grouped(denoiser), 2**-10, 0.03, set()
    for name, p in denoiser.named_parameters():
        group = groups.get(name, PLAIN)
        if p.ndim > 1:
            kind = next(k for k, names in TABLE.items() if any(f"{n}.weight" in name for n in names.split()))
            seen.add(kind)
        else:
            kind = "vector"
        assert rules[name].scale.kind == kind, name
        lr, wd = eta * group.lr, decay * group.decay
        assert (lr, wd) == ((eta / 4, 4 * decay) if kind == "hidden" else (eta, decay)), name
        assert lr * wd == pytest.approx(eta * decay, rel=1e-12)
    assert seen == set(TABLE)


def attached(name: str) -> Denoiser:
    """A family of `CONFIGS`, or a model with an edit in front of muP, on the meta device."""
    choice = ExpertChoice(experts=4, units=(1,), multiple=16)
    mixer = PatchMixer(2, None, 8, multiple=8, experts=2)
    edits = {"moe": DiTMoE(experts=4), "choice": choice, "switch": SwitchDiT(), "lora": LoRA(rank=2), "mixer": mixer}
    family = {**dict.fromkeys(edits, "dit"), "mixer": "micro_dit"}
    with torch.device("meta"):
        denoiser = CONFIGS[family.get(name, name)].build()
        new = {name: edits[name]} if name in edits else {}
        return edit.apply(denoiser, {**new, "mup": MuP(base_width=32)}, fresh=False)


def inferred(scale: Scale, shape, other) -> str:
    """The class by the dimensions that differ between two widths."""
    if len(shape) - scale.stack < 2:
        return "vector"
    (i, o), (j, p) = scale.fans(shape), scale.fans(other)
    return {(True, True): "hidden", (True, False): "output", (False, True): "input"}.get((i != j, o != p), "finite")


@pytest.mark.parametrize("name", [*CONFIGS, "moe", "choice", "switch", "lora", "mixer"])
def test_declared_classes_are_those_that_shapes_of_two_widths_tell(name):
    denoiser = attached(name)
    delta = denoiser.applied["mup"].structure(denoiser, 5)  # one head more
    rules, shapes = rules_of(denoiser), {n: p.shape for n, p in delta.named_parameters()}
    for key, p in denoiser.named_parameters():
        assert key in rules, f"nobody tells the class of {key}"
        assert rules[key].scale.kind == inferred(rules[key].scale, p.shape, shapes[key]), key
        assert rules[key].r == (2 if rules[key].scale.kind in ("hidden", "output") else 1), key


HEADS = {
    "repa": lambda student: Projectors(
        [projector(student.facts.width, 24, 48), projector(student.facts.width, 20, 48)]
    ),
    "irepa": lambda student: Projectors([projector(student.facts.width, 24, None)]),
    "sra": lambda student: SRA((0, 1)).build(student),
    "patches": lambda student: PatchHead(student, 40),
    "features": lambda student: FeatureHead(student.facts.width, 40, 56),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_losses_declare_the_classes_that_shapes_tell(name):
    one, two = (HEADS[name](made(width, 32, width // 16)) for width in (64, 80))
    scales, shapes = scales_of(one), {n: p.shape for n, p in two.named_parameters()}
    for key, p in one.named_parameters():
        assert scales[key].kind == inferred(scales[key], p.shape, shapes[key]), key


# ---- first values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 2, 4])
def test_constant_deviations_of_pixart_fall_with_the_root_of_r_in_hidden_matrices_alone(r):
    torch.manual_seed(0)
    size = {"num_layers": 1, "sample_size": 8, "attention_head_dim": 16, "caption_channels": 64}
    denoiser = PixArtConfig(num_attention_heads=4 * r, cross_attention_dim=64 * r, **size).build()
    edit.apply(denoiser, {"mup": MuP(base_width=64)})
    m, block = denoiser.model, denoiser.model.transformer_blocks[0]
    time, caption = m.adaln_single.emb.timestep_embedder, m.caption_projection
    close = {"rel": 5 / (2 * 64**2) ** 0.5}  # five standard errors of the smallest one's deviation
    assert time.linear_1.weight.std().item() == pytest.approx(0.02, **close)
    assert caption.linear_1.weight.std().item() == pytest.approx(0.02, **close)
    for layer in (time.linear_2, caption.linear_2, m.adaln_single.linear):
        assert layer.weight.std().item() == pytest.approx(0.02 * r**-0.5, **close)
    assert block.scale_shift_table.std().item() == pytest.approx(0.02, rel=5 / (2 * 6 * 64) ** 0.5)
    assert block.attn1.to_q.weight.std().item() == pytest.approx((2 / 128) ** 0.5 * r**-0.5, **close)
    assert block.attn2.to_out[0].weight.count_nonzero() == m.proj_out.weight.count_nonzero() == 0
    # Xavier of the base: its bound does not fall with the outputs
    assert m.pos_embed.proj.weight.abs().max() <= (6 / (16 + 64)) ** 0.5
    assert m.pos_embed.proj.weight.std().item() == pytest.approx((2 / (16 + 64)) ** 0.5, rel=5 / (2 * 16 * 64) ** 0.5)


def test_first_values_of_dit_are_the_published_ones_and_modulations_may_start_at_zero():
    denoiser = made(width=128, base=32, heads=8)
    m, block = denoiser.model, denoiser.model.blocks[0]
    for layer in (m.t_embedder.mlp[0], m.t_embedder.mlp[2], block.attn.qkv, block.mlp.fc2, block.adaLN_modulation[1]):
        assert layer.weight.std().item() == pytest.approx(layer.in_features**-0.5, rel=0.05)
        assert layer.bias.count_nonzero() == 0
    assert m.x_embedder.proj.weight.std().item() == pytest.approx((4 * 16) ** -0.5, rel=0.05)
    assert m.y_embedder.embedding_table.weight.std().item() == pytest.approx(1, rel=0.1)
    plain = DiTConfig(**{**DIT, "hidden_size": 64, "num_heads": 4}).build()
    edit.apply(plain, {"mup": MuP(base_width=32, adaln_init="zero", label_std=0.02)})
    assert all(b.adaLN_modulation[1].weight.count_nonzero() == 0 for b in plain.model.blocks)
    assert plain.model.final_layer.adaLN_modulation[1].weight.count_nonzero() == 0
    assert plain.model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.15)


def test_the_initial_loss_is_that_of_a_zero_prediction_at_every_width():
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(64, 4, 8, 8, generator=g), torch.randn(64, 4, 8, 8, generator=g)
    for width in (32, 64, 128):
        denoiser = made(width, 32, width // 16)
        out = denoiser(x, torch.rand(64, generator=g), Condition(label=torch.zeros(64, dtype=torch.int64))).sample
        assert (out - (noise - x)).square().mean().item() == pytest.approx(2.0, rel=0.05)  # of 16384 numbers


# ---- what other methods add -----------------------------------------------------------------------------------------


def test_layers_of_the_output_class_without_a_multiplier_train_as_those_with_one():
    """y = V x a / r with rate eta, and y = W x with first values s / r, rate eta / r: the same function after Adam."""
    torch.manual_seed(0)
    r, lr, decay, steps = 4.0, 0.01, 0.1, 5
    start, _ = 1 / r, None
    factor, group = factors(Scale("output"), r, multiplied=False)
    assert factor == start and factors(Scale("output"), r, multiplied=True) == (1.0, PLAIN)
    v = nn.Parameter(torch.randn(3, 32))
    w = nn.Parameter(v.detach() * factor)
    x, y = torch.randn(16, 32), torch.randn(16, 3)
    one = torch.optim.AdamW([v], lr=lr, weight_decay=decay, eps=1e-20)
    two = torch.optim.AdamW([w], lr=lr * group.lr, weight_decay=decay * group.decay, eps=1e-20)
    for _ in range(steps):
        for p, factor, optimizer in ((v, 1 / r, one), (w, 1.0, two)):
            optimizer.zero_grad()
            (x * factor @ p.T - y).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(v / r, w, rtol=1e-5, atol=1e-6)  # fp32


def test_a_head_of_repa_starts_as_at_the_base_and_trains_as_an_output_layer():
    denoiser = made(64, 16)
    build = HEADS["repa"]
    torch.manual_seed(3)
    own = build(denoiser)
    before = {n: p.detach().clone() for n, p in own.named_parameters()}
    groups = denoiser.applied["mup"].adopt(denoiser, build, own)
    assert groups == {f"maps.{i}.0.weight": Group(lr=0.25, decay=4.0) for i in (0, 1)}
    for name, p in own.named_parameters():
        ratio = 1.0
        if name in groups:  # Xavier of D -> K at the base, over r; at this width sqrt(2 / (64 + 48))
            ratio = (2 / (16 + 48)) ** 0.5 / 4 / (2 / (64 + 48)) ** 0.5
        torch.testing.assert_close(p, before[name] * ratio, rtol=1e-6, atol=0)


def test_routers_and_experts_in_front_of_mup_are_scaled_and_grouped():
    torch.manual_seed(0)
    denoiser = DiTConfig(**{**DIT, "hidden_size": 64, "num_heads": 4}).build()
    edit.apply(denoiser, {"moe": DiTMoE(experts=4)})
    router, experts = denoiser.edits["moe"]["0"].router, denoiser.edits["moe"]["0"].experts
    before = router.weight.detach().clone(), experts.into.detach().clone()
    edit.apply(denoiser, {"mup": MuP(base_width=16)})
    torch.testing.assert_close(router.weight, before[0] / 2, rtol=1e-6, atol=0)  # r^(-1/2): their law is 1 / sqrt(d)
    torch.testing.assert_close(experts.into, before[1], rtol=1e-6, atol=0)  # both fans grow
    groups = grouped(denoiser)
    assert groups["edits.moe.0.router.weight"] == Group(0.25, 4.0)
    assert groups["edits.moe.0.experts.into"] == groups["edits.moe.0.experts.out"] == Group(0.25, 4.0, kind="stack")
    assert groups["edits.moe.0.shared.into.weight"] == Group(0.25, 4.0)
    assert not any("blocks" in name and ".mlp." in name for name in groups)  # gone


def test_experts_that_start_alike_at_every_width_fall_with_the_root_of_r():
    denoiser = DiTConfig(**{**DIT, "hidden_size": 64, "num_heads": 4}).build()
    edit.apply(denoiser, {"choice": ExpertChoice(experts=4, units=(1,), multiple=16)})
    before = denoiser.edits["choice"]["1"].experts.into.detach().clone()
    edit.apply(denoiser, {"mup": MuP(base_width=16)})
    torch.testing.assert_close(denoiser.edits["choice"]["1"].experts.into, before / 2, rtol=1e-6, atol=0)


def test_a_patch_mixer_starts_as_at_the_base_whether_its_width_grows_or_not():
    for width, entering, inside in ((None, 4.0, 4.0), (48, 4.0, 1.0)):
        torch.manual_seed(0)
        denoiser = DiTConfig(**{**DIT, "hidden_size": 128, "num_heads": 8}).build()
        edit.apply(denoiser, {"mixer": PatchMixer(1, width, 8, multiple=8)})
        own = denoiser.edits["mixer"]
        enter, q = own.enter[1].weight, own.blocks[0].attn1.to_q.weight
        before, drawn = q.detach().clone(), enter.detach().clone()
        edit.apply(denoiser, {"mup": MuP(base_width=32)})
        torch.testing.assert_close(q, before / inside**0.5, rtol=1e-6, atol=0)  # 0.02 at the base
        wide, narrow = ((2 / (d + (width or 3 * d // 4))) ** 0.5 for d in (128, 32))
        torch.testing.assert_close(enter, drawn / wide * narrow / entering**0.5, rtol=1e-6, atol=0)
        assert own.enter[0].weight.eq(1).all() and not own.blocks[0].adaLN_modulation[1].weight.any()
        groups = grouped(denoiser)
        assert groups["edits.mixer.enter.1.weight"] == Group(1 / entering, entering)
        assert groups.get("edits.mixer.blocks.0.attn1.to_q.weight", PLAIN) == Group(1 / inside, inside)
    plain = edit.apply(DiTConfig(**{**DIT, "hidden_size": 64, "num_heads": 4}).build(), {"it": PatchMixer(1, 32, 8)})
    with pytest.raises(ValueError, match="edits.it.enter.0.weight is not in the base model, whose layers must be"):
        edit.apply(plain, {"mup": MuP(base_width=32)})  # of width 32, as the mixer: no layer is between


def test_a_matrix_of_which_nobody_tells_the_class_is_refused():
    class Silent(nn.Linear):
        """A head without scales."""

    denoiser = made()
    with pytest.raises(ValueError, match=r"nobody tells how weight follows the width, which has shape \(5, 64\)"):
        denoiser.applied["mup"].adopt(denoiser, lambda student: Silent(student.facts.width, 5), Silent(64, 5))
    assert denoiser.applied["mup"].adopt(denoiser, lambda student: Silent(7, 5), Silent(7, 5)) == {}


# ---- what carries the multiplier ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_copies_state_dicts_artifacts_and_the_folded_model_predict_the_same(alpha, tmp_path):
    denoiser = moved(made())
    denoiser.ends["output"] = Readout(alpha / 2)
    denoiser.applied["mup"].alpha_out = alpha
    given = batch(denoiser)
    expected = denoiser(*given).sample
    without = deepcopy(denoiser)
    without.ends.clear()
    if alpha != 2.0:
        assert not torch.allclose(without(*given).sample, expected)  # it is what is carried
    twin = deepcopy(denoiser)
    assert torch.equal(twin(*given).sample, expected) and twin.ends["output"] == Readout(alpha / 2)
    fresh = DiTConfig(**{**DIT, "hidden_size": 64, "num_heads": 4}).build()
    edit.apply(fresh, {"mup": MuP(base_width=32, alpha_out=alpha)}, fresh=False)
    fresh.load_state_dict(denoiser.state_dict())
    assert torch.equal(fresh.eval()(*given).sample, expected)
    edit.save(denoiser, tmp_path / "artifact")
    read = edit.load(tmp_path / "artifact").denoiser
    assert torch.equal(read.eval()(*given).sample, expected)  # nothing is drawn or scaled again
    assert grouped(read) == grouped(denoiser)
    bias = denoiser.model.final_layer.linear.bias.detach().clone()
    fold(denoiser)
    assert not denoiser.ends and not denoiser.applied
    torch.testing.assert_close(denoiser(*given).sample, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(denoiser.model.final_layer.linear.bias, bias)


def test_the_exported_model_is_a_plain_one_that_predicts_the_same(tmp_path):
    denoiser = moved(made(frequency_shift=1.0))
    given = batch(denoiser)
    edit.save(denoiser, tmp_path / "artifact")
    export(ExportSettings(artifact=str(tmp_path / "artifact"), out=str(tmp_path / "plain")))
    plain = edit.load(tmp_path / "plain").denoiser.eval()
    assert not plain.applied
    torch.testing.assert_close(plain(*given).sample, denoiser(*given).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_unit_and_a_compiled_model_predict_the_same():
    denoiser = moved(made())
    given = batch(denoiser)
    expected = denoiser(*given).sample
    whole = torch.compile(denoiser, backend="eager")
    torch.testing.assert_close(whole(*given).sample, expected, rtol=1e-6, atol=1e-6)
    for unit in denoiser.units:
        unit.compile(backend="eager")
    torch.testing.assert_close(denoiser(*given).sample, expected, rtol=1e-6, atol=1e-6)


def test_a_cache_around_the_output_layer_keeps_the_multiplier():
    denoiser = moved(made())
    given = batch(denoiser)
    expected = denoiser(*given).sample
    edit.apply(denoiser, {"cache": LESA(site="velocity")})
    assert "output" in denoiser.ends and not isinstance(denoiser.ends["output"], Readout)
    assert torch.equal(denoiser(*given).sample, expected)


def test_what_stood_around_the_output_layer_stands_inside_and_is_back_after_folding():
    seen = []

    def inner(stream, run):
        seen.append(stream.image.detach().clone())
        return run(stream)

    torch.manual_seed(0)
    denoiser = DiTConfig(**{**DIT, "hidden_size": 64, "num_heads": 4}).build()
    denoiser.ends["output"] = inner
    edit.apply(denoiser, {"mup": MuP(base_width=32)})
    out = denoiser(*batch(denoiser), taps=("norm",))
    assert torch.equal(seen[0], out.trace["end.norm"] * 0.5)  # the multiplier comes first
    fold(denoiser)
    assert denoiser.ends == {"output": inner}


# ---- schedule -------------------------------------------------------------------------------------------------------


def test_groups_keep_their_ratio_over_warm_up_and_decay():
    from recipes.settings import Training

    class Settings:
        warmup, schedule, end, until = 3, "cosine", 0.1, 1.0

    denoiser = made(64, 16)
    groups = grouped(denoiser)
    parts = [{"params": [p], "lr": 0.01 * groups.get(n, PLAIN).lr} for n, p in denoiser.named_parameters()]
    optimizer = torch.optim.AdamW(parts)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, Training(Settings(), max_steps=10).rate)
    seen = set()
    for _ in range(10):
        rates = {g["lr"] for g in optimizer.param_groups}
        assert max(rates) / min(rates) == pytest.approx(4, rel=1e-12) and len(rates) == 2
        seen.add(round(max(rates), 9))
        optimizer.step()
        schedule.step()
    assert len(seen) > 5


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"base_width": 128},
            "base_width=128 is above the width 64 of this dit: choose at most 64; the narrowest",
        ),
        (
            {"base_width": 40},
            "heads of one width, 16 in this dit, which does not divide base_width=40: choose",
        ),
        ({"adaln_init": "ones"}, "adaln_init must be normal or zero, got 'ones'"),
        ({"alpha_out": 0.0}, "alpha_out must be positive"),
    ],
)
def test_impossible_settings_are_refused_with_a_cure(settings, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        edit.apply(DiTConfig(**{**DIT, "hidden_size": 64, "num_heads": 4}).build(), {"mup": MuP(**settings)})


def test_a_trained_model_is_refused_and_left_as_it_is(dit):
    before = {n: p.clone() for n, p in dit.named_parameters()}
    with pytest.raises(ValueError, match="has been trained, which would be lost: apply it to a new model"):
        edit.apply(dit, {"mup": MuP(base_width=16)})
    assert all(torch.equal(p, before[n]) for n, p in dit.named_parameters())


def test_a_width_that_the_family_cannot_have_is_refused():
    denoiser = replace(CONFIGS["wan"], ffn_dim=130).build()
    with pytest.raises(ValueError, match="ffn_dim=130 of this wan has no whole value at 3 of its 4 heads"):
        edit.apply(denoiser, {"mup": MuP(base_width=48)})
