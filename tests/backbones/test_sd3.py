"""SD3 in our words computes what `diffusers.SD3Transformer2DModel` computes, and stays loadable as one."""

from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
import vaes
from diffusers import SD3Transformer2DModel
from torch import Tensor
from weights import randomise

import edit
from edit.backbones.attached import attached
from edit.backbones.sd3 import SD3, SD3Config
from edit.objectives import FlowMatching
from edit.pruning.depth import DepthPruning
from edit.stream import Branch, Condition, Forced
from edit.tuning.lora import LoRA
from recipes.config.composed import read

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {  # as in SD3.5-medium: QK-norm, a second attention in the first units but not in all
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 12,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (0, 1),
    "qk_norm": "rms_norm",
}


def stock_model(**changes) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(**{**SMALL, **changes})
    randomise(model)  # every weight counts
    return model.eval()


def inputs(channels=4, rows=8, columns=12) -> tuple[Tensor, Tensor, Condition]:
    torch.manual_seed(1)
    x, t = torch.randn(3, channels, rows, columns), torch.tensor([0.1, 0.5, 1.0])
    return x, t, Condition(text=torch.randn(3, 5, 24), pooled=torch.randn(3, 12))


def stock_output(model, x, t, condition):
    return model(
        hidden_states=x,
        encoder_hidden_states=condition.text,
        pooled_projections=condition.pooled,
        timestep=t * 1000,
    ).sample


def close(given: Tensor, expected: Tensor) -> None:
    """1e-6 of the output's scale, and room for another order of sums: our keys put the text first."""
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


OPTIONS = {
    "SD3.5-medium": {},
    "SD3.5-large": {"dual_attention_layers": ()},
    "SD3-medium": {"dual_attention_layers": (), "qk_norm": None},
    "second attention without QK-norm": {"qk_norm": None},
    "second attention in the last unit too": {"dual_attention_layers": (0, 1, 2)},
    "one unit": {"num_layers": 1},
    "one pixel to a patch": {"patch_size": 1, "pos_embed_max_size": 16},
    "larger patches": {"patch_size": 4, "pos_embed_max_size": 3},
    "positions of another sample size": {"sample_size": 16},
    "other channels": {"in_channels": 6, "out_channels": None},
}


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_output_and_gradients_equal_the_stock_forward(changes):
    x, t, condition = inputs(channels=changes.get("in_channels", 4))
    model = stock_model(**changes)
    with torch.no_grad():
        close(SD3.of(model)(x, t, condition).sample, stock_output(model, x, t, condition))
    # gradients in fp64, where equal equations differ by nothing else that could be seen
    results = []
    for net, call in ((stock_model(**changes).double(), stock_output), (SD3.of(model.double()), SD3.__call__)):
        told = condition.map(lambda v: v.double().requires_grad_())
        y = x.double().requires_grad_()
        out = call(net, y, t.double(), told)
        getattr(out, "sample", out).square().mean().backward()
        named = {n.removeprefix("model."): p.grad for n, p in net.named_parameters()}
        results.append({"x": y.grad, "text": told.text.grad, "pooled": told.pooled.grad, **named})
    theirs, mine = results
    assert list(theirs) == list(mine)
    largest = max(g.abs().max() for g in theirs.values())
    for name, g in theirs.items():
        # a gradient that is zero but for roundings (a key's bias, which softmax cannot see) has no scale of its own;
        # the sinusoids of the time are fp32 in both models, so that they agree to the last bit
        scale = max(g.abs().max(), 1e-3 * largest)
        assert (mine[name] - g).abs().max() <= 1e-11 * scale, name


def test_names_of_weights_are_those_of_the_stock_model_and_its_storage_is_shared():
    stock = stock_model()
    ours = SD3.of(stock)
    assert list(ours.model.state_dict()) == list(stock.state_dict())
    assert all(p is q for p, q in zip(ours.model.parameters(), stock.parameters(), strict=True))
    assert ours.model.pos_embed.pos_embed.data_ptr() == stock.pos_embed.pos_embed.data_ptr()
    assert type(stock.transformer_blocks[0]).__name__ == "JointTransformerBlock"


# ---- configurations --------------------------------------------------------------------------------------------------


def configured(name: str) -> SD3Config:
    values = read(CONFIGS, "backbone", name)
    assert values.pop("_target_") == "edit.backbones.sd3.SD3Config"
    return SD3Config(**values)


@pytest.mark.parametrize(
    "name, parameters, depth, published",
    # billions as the model cards print them; SD3.5-medium's counts its position table
    [
        ("sd3_medium", 2_028_328_000, 24, 2.0e9),
        ("sd35_medium", 2_243_171_520, 24, 2.5e9),
        ("sd35_large", 8_056_627_520, 38, 8.1e9),
    ],
)
def test_the_real_models_are_made_without_memory_and_have_their_published_size(name, parameters, depth, published):
    with torch.device("meta"):
        denoiser = configured(name).build()
        stock = SD3Transformer2DModel.from_config(denoiser.model.config)
    assert all(v.is_meta for v in denoiser.state_dict().values())
    assert sum(p.numel() for p in denoiser.parameters()) == parameters == sum(p.numel() for p in stock.parameters())
    assert sum(v.numel() for v in denoiser.state_dict().values()) == pytest.approx(published, rel=0.05)
    assert denoiser.sample_shape == (16, 128, 128) and len(denoiser.units) == depth


def test_a_fresh_model_predicts_zero_and_learns():
    denoiser = configured("sd3_tiny").build()
    assert denoiser.sample_shape == (12, 8, 8) and 1e5 < sum(p.numel() for p in denoiser.parameters()) < 1e6
    assert denoiser.prediction == "velocity"
    x, t = torch.randn(2, 12, 8, 8), torch.tensor([0.3, 0.9])
    condition = Condition(text=torch.randn(2, 5, 64), pooled=torch.randn(2, 64))
    stream = denoiser.embed(**denoiser.pack(x, t, condition))
    assert torch.equal(denoiser.units[0](stream).text, stream.text)
    out = denoiser(x, t, condition)
    assert out.sample.shape == x.shape and not out.sample.any() and out.variance is None
    FlowMatching().losses(out, x, torch.randn_like(x), x, t)["flow"].mean().backward()
    assert denoiser.model.proj_out.weight.grad.any()


def test_the_datas_shape_becomes_the_default_and_is_kept(tmp_path):
    ours = SD3.of(stock_model())
    assert ours.sample_shape == (4, 8, 8)
    ours.settle((4, 6, 12), SD3Config())
    assert ours.sample_shape == (4, 6, 12) and ours.config["latent_size"] == [6, 12] == ours.base["latent_size"]
    edit.save(ours, tmp_path / "a")
    assert edit.load(tmp_path / "a").denoiser.sample_shape == (4, 6, 12)
    assert ours.config["sample_size"] == 8, "the position table's own"


# ---- fewer units, folders --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_kept_units_are_a_smaller_stock_model_whose_image_is_that_of_those_units(tmp_path):
    stock = stock_model(num_layers=4, dual_attention_layers=(0, 2))
    ours = SD3.of(stock)
    x, t, condition = inputs()
    stream = ours.embed(**ours.pack(x, t, condition))
    for unit in ours.units[1:3]:  # neither is the last, so both write text
        stream = unit(stream)
    expected = ours.native(stream)
    edit.apply(ours, {"depth": DepthPruning(pattern="listed", units=(1, 2))})
    assert (ours.config["num_layers"], ours.config["dual_attention_layers"]) == (2, [1])
    assert torch.equal(ours(x, t, condition).sample, expected)
    edit.save(ours, tmp_path / "a")
    pruned = SD3Transformer2DModel.from_pretrained(tmp_path / "a")
    close(stock_output(pruned, x, t, condition), expected)
    assert list(pruned.state_dict()) == list(ours.model.state_dict())
    assert torch.equal(edit.load(tmp_path / "a").denoiser(x, t, condition).sample, expected)


@torch.no_grad()
def test_units_kept_with_the_last_are_the_stock_model_of_those_blocks():
    stock = stock_model()
    ours = SD3.of(stock)
    ours.keep([0, 2])
    shallow = stock_model(num_layers=2, dual_attention_layers=(0,))
    blocks = {"transformer_blocks.0.": "transformer_blocks.0.", "transformer_blocks.2.": "transformer_blocks.1."}
    state = {k: v for k, v in stock.state_dict().items() if not k.startswith("transformer_blocks.")}
    for old, new in blocks.items():
        state |= {k.replace(old, new): v for k, v in stock.state_dict().items() if k.startswith(old)}
    shallow.load_state_dict(state)
    x, t, condition = inputs()
    close(ours(x, t, condition).sample, stock_output(shallow, x, t, condition))


def test_the_new_last_unit_keeps_what_is_frozen_and_refuses_to_lose_an_edit():
    ours = SD3.of(stock_model()).requires_grad_(False)
    ours.keep([0, 1])
    assert not any(p.requires_grad for p in ours.parameters())
    ours = SD3.of(stock_model())
    edit.apply(ours, {"lora": LoRA(rank=2, targets=("norm1_context.linear",))})
    with pytest.raises(ValueError, match=r"norm1_context\.linear is a Linear.*fold them first"):
        ours.keep([0, 1])


@torch.no_grad()
def test_a_saved_folder_is_read_by_us_and_by_stock_diffusers(tmp_path):
    stock = stock_model()
    x, t, condition = inputs()
    expected = SD3.of(stock)(x, t, condition).sample
    edit.save(SD3.of(stock), tmp_path / "ours")
    again = SD3Transformer2DModel.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(stock_output(again, x, t, condition), stock_output(stock, x, t, condition))
    assert torch.equal(edit.load(tmp_path / "ours").denoiser(x, t, condition).sample, expected)
    stock.save_pretrained(tmp_path / "pipe" / "transformer", max_shard_size="100KB")  # a published folder
    assert len(list((tmp_path / "pipe" / "transformer").glob("*.safetensors"))) > 2
    assert torch.equal(edit.load(tmp_path / "pipe").denoiser(x, t, condition).sample, expected)


# ---- precision, memory -----------------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_nothing_and_taps_survive_it():
    x, t, condition = inputs()
    grads = []
    for checkpointing in (False, True):
        ours = SD3.of(stock_model())
        ours.gradient_checkpointing = checkpointing
        out = ours(x, t, condition, taps=(1,), branches=(0, 2))
        (out.sample.square().mean() + sum(v.square().mean() for v in out.trace.values())).backward()
        grads.append([p.grad for p in ours.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@torch.no_grad()
def test_bf16_is_as_close_to_fp32_as_the_stock_model():
    stock = stock_model()
    x, t, condition = inputs()
    exact = stock_output(stock, x, t, condition)
    stock = stock.to(torch.bfloat16)
    half = condition.map(lambda v: v.to(torch.bfloat16))
    theirs = stock_output(stock, x.to(torch.bfloat16), t, half)
    mine = SD3.of(stock)(x, t, condition).sample
    assert mine.dtype == torch.bfloat16
    error = (theirs - exact).abs().mean()
    assert (mine - exact).abs().mean() < 1.2 * error < 0.1 * exact.abs().mean()


# ---- slots, taps -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_branches_before_their_gates_add_up_to_the_unit():
    ours = SD3.of(stock_model())
    x, t, condition = inputs()
    trace = ours(x, t, condition, taps=(0, 1, 2), branches=(1, 2)).trace
    stream = ours.embed(**ours.pack(x, t, condition))
    for i in (1, 2):
        stream = replace(stream, image=trace[f"unit.{i - 1}"], text=trace[f"unit.{i - 1}.text"])
        m = ours.units[i].modulate(stream)
        for end, side in (("", "image"), (".text", "text")):
            if i == 2 and end:
                continue
            new = getattr(stream, side) + getattr(m.attention_gate, side) * trace[f"unit.{i}.attention{end}"]
            if i == 1 and not end:
                new = new + m.second_gate * trace["unit.1.second"]
            close(new + getattr(m.feed_gate, side) * trace[f"unit.{i}.feed{end}"], trace[f"unit.{i}{end}"])
    # the last unit of this model writes no text and attends once
    assert not {"unit.2.text", "unit.2.attention.text", "unit.2.feed.text", "unit.2.second"} & set(trace)
    assert "unit.0.attention" not in trace


@torch.no_grad()
def test_every_slot_reaches_the_output_and_comes_back():
    ours = SD3.of(stock_model())
    x, t, condition = inputs()
    before, unit = ours(x, t, condition).sample, ours.units[1]
    seen = []

    def attention(q, k, v, layout, step):
        seen.append((q.shape, k.shape, v.shape, layout.text_length, layout.grid))
        return v

    slots = {
        "attention": attention,
        "mixer": lambda stream, tokens: tokens,
        "ffn": lambda tokens, layout: tokens,
        "text_ffn": lambda tokens, layout: tokens,
    }
    for name, other in slots.items():
        setattr(unit.slots, name, other)
        assert (ours(x, t, condition).sample - before).abs().max() > 1e-3, name
        delattr(unit.slots, name)
        assert torch.equal(ours(x, t, condition).sample, before)
    shape = (3, 4, 5 + 4 * 6, 8)  # the joint attention alone, text and image
    assert seen == [(shape, shape, shape, 5, (1, 4, 6))]


@torch.no_grad()
def test_the_units_own_mixer_in_its_slot_changes_nothing():
    ours = SD3.of(stock_model())
    x, t, condition = inputs()
    before = ours(x, t, condition).sample
    for unit in ours.units:
        unit.slots.mixer = unit.slots.mixer
        assert "mixer" in unit.slots
    close(ours(x, t, condition).sample, before)


@torch.no_grad()
def test_in_the_joint_order_the_text_comes_first():
    ours = SD3.of(stock_model())
    x, t, condition = inputs()
    tokens = []
    ours.units[0].slots.mixer = lambda stream, joint: tokens.append(joint) or joint
    ours(x, t, condition)
    ours(x + 1, t, condition)
    changed = (tokens[0] - tokens[1]).abs().amax((0, 2)) > 0
    assert changed.tolist() == [False] * 5 + [True] * 24


@torch.no_grad()
def test_a_mixer_that_returns_the_whole_joint_sequence_serves_the_last_unit():
    ours = SD3.of(stock_model())
    x, t, condition = inputs()
    ours.units[-1].slots.mixer = lambda stream, tokens: tokens
    assert ours(x, t, condition).sample.shape == x.shape


@torch.no_grad()
def test_a_forced_unit_reads_what_it_is_given():
    ours = SD3.of(stock_model())
    x, t, condition = inputs()
    out = ours(x, t, condition, taps=(0,))
    tokens = Branch(out.trace["unit.0"], out.trace["unit.0.text"])
    where = torch.tensor([True, False, True])
    assert torch.equal(ours(x, t, condition, forced={1: Forced(tokens, where)}).sample, out.sample)
    for noise in (Branch(torch.randn_like(tokens.image)), Branch(tokens.image, torch.randn_like(tokens.text))):
        other = ours(x, t, condition, forced={1: Forced(noise, where)}).sample
        assert ((other - out.sample).abs().amax((1, 2, 3)) > 1e-3).tolist() == where.tolist()


def test_the_null_condition_is_zeros():
    _, _, condition = inputs()
    null = SD3.of(stock_model()).null(condition)
    assert null.text.shape == condition.text.shape and not null.text.any() and not null.pooled.any()


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"qk_norm": "layer_norm"}, "qk_norm must be None or rms_norm, got layer_norm"),
        ({"out_channels": 8}, "out_channels must be in_channels 4, got 8"),
        ({"caption_projection_dim": 16}, "caption_projection_dim must be the width 32, got 16"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size must be its size in patches"),
    ],
)
def test_models_of_other_kinds_are_refused(changes, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        SD3.from_config({**SMALL, "qk_norm": None, **changes})


def test_what_does_not_fit_is_refused_in_one_sentence():
    ours = SD3.of(stock_model())
    x, t, condition = inputs()
    with pytest.raises(ValueError, match="takes text embeddings of width 24, got 7"):
        ours(x, t, Condition(text=torch.randn(3, 5, 7), pooled=condition.pooled))
    with pytest.raises(ValueError, match="needs condition.pooled"):
        ours(x, t, Condition(text=condition.text))
    with pytest.raises(ValueError, match="not distilled for guidance"):
        ours(x, t, replace(condition, guidance=torch.ones(3)))
    for wrong in ((5, 8, 8), (4, 7, 8), (4, 8, 18)):  # channels, patches, more than the position table holds
        assert not ours.accepts(wrong)
        with pytest.raises(ValueError, match="takes samples of 4x8x8"):
            ours(torch.randn(3, *wrong), t, condition)
    native = ours.pack(x, t, condition)
    for argument, value in (
        ("joint_attention_kwargs", {"scale": 2.0}),
        ("block_controlnet_hidden_states", [x]),
        ("skip_layers", [1]),
    ):
        with pytest.raises(ValueError, match="scale" if "kwargs" in argument else argument):
            ours.embed(**native, **{argument: value})


# ---- inside the stock pipeline ---------------------------------------------------------------------------------------


def pipeline(transformer) -> diffusers.StableDiffusion3Pipeline:
    torch.manual_seed(0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=vaes.flat(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, **options) -> Tensor:
    g = torch.Generator().manual_seed(2)
    embeds = {
        "prompt_embeds": torch.randn(1, 5, 24, generator=g),
        "pooled_prompt_embeds": torch.randn(1, 12, generator=g),
        "negative_prompt_embeds": torch.zeros(1, 5, 24),
        "negative_pooled_prompt_embeds": torch.zeros(1, 12),
    }
    size = {"height": 8, "width": 12, "num_inference_steps": 3, "guidance_scale": 3.0}
    return pipe(**embeds, **size, output_type="pt", generator=torch.Generator().manual_seed(3), **options).images


def test_the_stock_pipeline_draws_the_same_picture_with_ours_attached():
    stock = stock_model()
    pipe = pipeline(stock)
    before = picture(pipe)
    ours = SD3.of(stock)
    with attached(pipe, ours):
        # three guided steps and a decoder on pictures in [0, 1]
        torch.testing.assert_close(picture(pipe), before, rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match="skip_layers"):
            picture(pipe, skip_guidance_layers=[1], skip_layer_guidance_stop=1.0)
    assert pipe.transformer is stock
    assert torch.equal(picture(pipe), before)
    ours.units[1].slots.ffn = lambda tokens, layout: tokens
    with attached(pipe, ours):
        assert (picture(pipe) - before).abs().max() > 1e-3
    del ours.units[1].slots.ffn
    edit.apply(ours, {"depth": DepthPruning(pattern="listed", units=(0, 1))})
    with attached(pipe, ours):
        assert (picture(pipe) - before).abs().max() > 1e-3
    assert torch.equal(picture(pipe), before), "pruning left the stock model's blocks alone"
