"""Qwen-Image: the same function as the stock class, in values, gradients, files and inside the stock pipeline."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from diffusers import QwenImageTransformer2DModel as Stock
from weights import randomise

import edit
from edit.backbones.attached import attached
from edit.backbones.qwen_image import QwenImage, position_angles
from edit.backbones.stock import turn
from edit.pruning.depth import DepthPruning
from edit.stream import Condition, Layout
from recipes.cost import from_file

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = {
    "in_channels": 48,
    "out_channels": 12,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
PADDED = torch.arange(5) < torch.tensor([[5], [3], [1]])
SCATTERED = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]).bool()


def make_stock(**options) -> Stock:
    torch.manual_seed(0)
    model = Stock(**{**TINY, **options})
    randomise(model)
    return model


def make_inputs(mask=None, rows=8, columns=12, channels=12):
    """(x, t, condition) of three samples with five text tokens."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, channels, rows, columns, generator=generator)
    condition = Condition(text=torch.randn(3, 5, 24, generator=generator), text_mask=mask)
    return x, torch.tensor([0.1, 0.5, 1.0]), condition


def close(ours, theirs, digits=1e-6):
    """Equal up to the order of fp32 sums: 1e-6 of the largest value, through three units."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=digits * theirs.abs().max().item())


# ---- the same function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, mask, size",
    [
        ({}, None, (8, 12)),
        ({}, PADDED, (8, 12)),
        ({}, SCATTERED, (8, 12)),
        ({}, SCATTERED.long(), (10, 6)),  # odd rows and columns of tokens; the pipeline's masks are integers
        ({"axes_dims_rope": (2, 2, 12)}, PADDED, (8, 12)),
        ({"in_channels": 16, "out_channels": 4, "num_attention_heads": 3, "num_layers": 1}, None, (8, 12)),
    ],
    ids=["plain", "padded", "scattered", "odd", "axes", "sizes"],
)
def test_output_and_all_gradients_are_those_of_the_stock_forward(options, mask, size):
    stock = make_stock(**options)
    ours = QwenImage.of(deepcopy(stock))
    x, t, condition = make_inputs(mask, *size, channels=stock.config.in_channels // 4)
    results = []
    for call, model in (
        (lambda **n: stock(**n).sample, stock),
        (lambda **n: ours.native(ours.run(ours.embed(**n))), ours.model),
    ):
        native = ours.pack(x, t, condition)
        inputs = [native[k].clone().requires_grad_() for k in ("hidden_states", "encoder_hidden_states", "timestep")]
        native |= dict(zip(("hidden_states", "encoder_hidden_states", "timestep"), inputs, strict=True))
        out = call(**native)
        out.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters()} | {f"input {i}": v.grad for i, v in enumerate(inputs)}
        results.append((out, grads))
    (theirs, their_grads), (mine, my_grads) = results
    close(mine, theirs)
    close(ours(x, t, condition).sample, QwenImagePipeline._unpack_latents(theirs, *size, 1)[:, :, 0])
    # the last unit's text leaves no trace in the output: neither model has gradients there
    missing = {n for n, g in their_grads.items() if g is None}
    assert missing == {n for n, g in my_grads.items() if g is None} and len(missing) < len(their_grads) / 2
    for name in their_grads.keys() - missing:
        close(my_grads[name], their_grads[name], 5e-6)  # sums over batch and tokens, there and back


@torch.no_grad()
def test_frames_are_positions_too():
    stock = make_stock()
    ours = QwenImage.of(stock)
    native = {
        "hidden_states": torch.randn(2, 2 * 3 * 4, 48),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "timestep": torch.tensor([0.3, 0.8]),
        "img_shapes": [[(2, 3, 4)]] * 2,
    }
    close(ours.native(ours.run(ours.embed(**native))), stock(**native).sample)


@pytest.mark.parametrize("grid", [(1, 4, 6), (1, 5, 3), (3, 2, 7)], ids=str)
def test_positions_are_the_stock_table(grid):
    image, text = make_stock().pos_embed([[grid]], device=torch.device("cpu"), max_txt_seq_len=9)
    expected = torch.cat((text, image))
    cos, sin = position_angles(grid, 9, (4, 6, 6), torch.device("cpu"))
    # cosines and sines of the same fp32 angles from another routine
    torch.testing.assert_close(torch.complex(cos, sin), expected, rtol=0, atol=1e-6)


def test_a_compiled_turn_is_the_same():
    layout = Layout(grid=(1, 2, 3), rope=position_angles((1, 2, 3), 4, (4, 6, 6), torch.device("cpu")))
    q = torch.randn(2, 3, 10, 16)
    compiled = torch.compile(turn, backend="eager", fullgraph=True)(q, layout)
    torch.testing.assert_close(compiled, turn(q, layout), rtol=0, atol=1e-6)


@torch.no_grad()
def test_masked_text_is_not_seen():
    ours = QwenImage.of(make_stock())
    x, t, condition = make_inputs(PADDED)
    other = torch.where(PADDED[..., None], condition.text, 100.0)
    out = ours(x, t, condition).sample
    assert torch.equal(ours(x, t, Condition(text=other, text_mask=PADDED)).sample, out)
    assert not torch.allclose(ours(x, t, Condition(text=condition.text)).sample, out, atol=1e-3)
    short = ours(x[1:2], t[1:2], Condition(text=condition.text[1:2, :3])).sample
    close(out[1:2], short)


def test_sixteen_bits_follow_the_stock_model():
    for dtype, digits in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):  # three units at 8 and 11 bits
        stock = make_stock().to(dtype)
        ours = QwenImage.of(stock)
        x, t, condition = make_inputs(PADDED)
        condition = Condition(text=condition.text.to(dtype), text_mask=PADDED)
        out = ours(x.to(dtype), t, condition).sample
        native = ours.pack(x.to(dtype), t, condition)
        theirs = QwenImagePipeline._unpack_latents(stock(**native).sample, 8, 12, 1)[:, :, 0]
        assert out.dtype is dtype
        close(out.float(), theirs.float(), digits)
        out.float().square().mean().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


@torch.no_grad()
def test_half_precision_stays_finite_where_the_stock_block_does():
    stock = make_stock().half()
    block = stock.transformer_blocks[0]
    for mod, mlp in ((block.img_mod, block.img_mlp), (block.txt_mod, block.txt_mlp)):
        mod[1].bias.fill_(1.5)
        mlp.net[2].bias.fill_(6e4)  # times a gate of about 1.5: beyond 65504
    ours = QwenImage.of(stock)
    x, t, condition = make_inputs()
    native = ours.pack(x.half(), t.half(), condition) | {"encoder_hidden_states": condition.text.half()}
    stream = ours.units[0](ours.embed(**native))
    assert stream.image.max() == stream.text.max() == 65504
    assert ours.native(ours.run(ours.embed(**native))).isfinite().all() and stock(**native).sample.isfinite().all()


def test_gradient_checkpointing_changes_nothing():
    ours = QwenImage.of(make_stock())
    results = []
    for ours.gradient_checkpointing in (False, True):
        ours.zero_grad()
        out = ours(*make_inputs(PADDED), taps=(1,))
        (out.sample.square().mean() + out.trace["unit.1"].mean()).backward()
        results.append([out.sample, *(p.grad for p in ours.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ---- units -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_fresh_model_is_the_identity_and_predicts_zero():
    ours = from_file(CONFIGS, "backbone", "qwen_image_tiny").build()
    x, t = torch.randn(2, 12, 8, 8), torch.tensor([0.2, 0.9])
    condition = Condition(text=torch.randn(2, 5, 64))
    assert ours.accepts((12, 8, 8)) and ours.sample_shape == (12, 8, 8)
    stream = ours.embed(**ours.pack(x, t, condition))
    for unit in ours.units:
        after = unit(stream)
        assert torch.equal(after.image, stream.image) and torch.equal(after.text, stream.text)
    assert ours(x, t, condition).sample.count_nonzero() == 0


@torch.no_grad()
def test_branches_are_those_before_the_gate():
    ours = QwenImage.of(make_stock())
    inputs = make_inputs(PADDED)
    out = ours(*inputs, taps=(0, 1), branches=(1,))
    assert torch.equal(out.sample, ours(*inputs).sample)
    trace = out.trace
    stream = ours.embed(**ours.pack(*inputs))
    modulation = ours.units[1].modulate(stream)  # gates depend on the time alone
    for field, suffix in (("image", ""), ("text", ".text")):
        a, f = (getattr(g, field) for g in (modulation.attention_gate, modulation.feed_gate))
        total = a * trace[f"unit.1.attention{suffix}"] + f * trace[f"unit.1.feed{suffix}"]
        close(trace[f"unit.0{suffix}"] + total, trace[f"unit.1{suffix}"])


@torch.no_grad()
def test_slots_replaced_by_the_units_own_equations_change_nothing():
    ours = QwenImage.of(make_stock())
    inputs = make_inputs(PADDED)
    before, unit = ours(*inputs).sample, ours.units[1]
    for slot in ("mixer", "attention", "ffn", "text_ffn"):
        setattr(unit.slots, slot, getattr(unit.slots, slot))
        close(ours(*inputs).sample, before)
        setattr(unit.slots, slot, lambda *arguments: torch.zeros_like(arguments[slot == "mixer"]))  # noqa: B023
        assert (ours(*inputs).sample - before).abs().max() > 1e-3
        delattr(unit.slots, slot)
        assert torch.equal(ours(*inputs).sample, before)


@torch.no_grad()
def test_attention_reads_text_first_after_norm_and_positions():
    ours = QwenImage.of(make_stock())
    seen = {}

    def attention(q, k, v, layout, step):
        seen.update(q=q, k=k, v=v, layout=layout)
        return v

    unit = ours.units[0]
    stream = ours.embed(**ours.pack(*make_inputs(PADDED)))
    unit.slots.attention = attention
    branch = unit.attend(stream, m := unit.modulate(stream))
    image = torch.addcmul(m.shift.image, unit.img_norm1(stream.image), 1 + m.scale.image)
    text = torch.addcmul(m.shift.text, unit.txt_norm1(stream.text), 1 + m.scale.text)
    a = unit.attn
    assert seen["q"].shape == seen["k"].shape == seen["v"].shape == (3, 2, 5 + 24, 16)
    assert seen["layout"].text_length == 5 and torch.equal(seen["layout"].text_mask, PADDED)
    close(branch.text, a.to_add_out(a.add_v_proj(text)))
    close(branch.image, a.to_out[0](a.to_v(image)))
    # turning keeps lengths: those of the normalised queries and keys
    for name, norm, to, tokens in (
        ("q", a.norm_added_q, a.add_q_proj, text),
        ("k", a.norm_added_k, a.add_k_proj, text),
    ):
        expected = norm(to(tokens).unflatten(-1, (2, 16))).norm(dim=-1)
        close(seen[name][:, :, :5].norm(dim=-1).transpose(1, 2), expected)


# ---- weights and files -----------------------------------------------------------------------------------------------


def test_the_real_model_is_described_without_allocating():
    with torch.device("meta"):
        ours = from_file(CONFIGS, "backbone", "qwen_image").build()
        stock = Stock()
    assert {k: v.shape for k, v in ours.model.state_dict().items()} == {
        k: v.shape for k, v in stock.state_dict().items()
    }
    assert all(p.is_meta for p in ours.parameters())
    d, c, depth = 3072, 3584, 60
    unit = 2 * (6 * d * (d + 1) + 4 * d * (d + 1) + 4 * d * (d + 1) + d * (4 * d + 1)) + 4 * 128
    embedders = (64 * d + d) + (c * d + d + c) + (256 * d + d + d * (d + 1))
    count = sum(p.numel() for p in ours.parameters())
    assert count == depth * unit + embedders + 2 * d * (d + 1) + 64 * (d + 1)
    assert count == pytest.approx(20.4e9, rel=2.5e-3)  # as published, one digit after the point


def test_a_denoiser_of_a_stock_model_shares_its_storage_and_leaves_it_alone():
    stock = make_stock()
    before, blocks = stock(**native_of(stock)).sample, [type(b) for b in stock.transformer_blocks]
    ours = QwenImage.of(stock, sample_size=(8, 12))
    mine, theirs = ours.model.state_dict(), stock.state_dict()
    assert list(mine) == list(theirs) and all(mine[k].data_ptr() == theirs[k].data_ptr() for k in mine)
    assert ours.sample_shape == (12, 8, 12)
    assert torch.equal(stock(**native_of(stock)).sample, before)
    assert [type(b) for b in stock.transformer_blocks] == blocks


def native_of(stock, mask=None):
    with torch.device("meta"):
        packer = QwenImage.from_config(dict(stock.config))
    return packer.pack(*make_inputs(mask))


@torch.no_grad()
def test_kept_units_are_a_stock_model_of_those_blocks():
    stock = make_stock(num_layers=5)
    ours = QwenImage.of(stock)
    ours.keep([0, 2, 4])
    short = Stock(**{**TINY, "num_layers": 3})
    short.load_state_dict(ours.model.state_dict())
    for mine, theirs in zip((0, 2, 4), short.transformer_blocks, strict=True):
        block = stock.transformer_blocks[mine]
        assert all(torch.equal(a, b) for a, b in zip(block.parameters(), theirs.parameters(), strict=True))
    native = ours.pack(*make_inputs(PADDED))
    close(ours.native(ours.run(ours.embed(**native))), short(**native).sample)
    assert ours.config["num_layers"] == 3


@torch.no_grad()
def test_saved_folders_are_read_by_both_sides(tmp_path):
    ours = QwenImage.of(make_stock(), sample_size=(8, 12)).eval()
    inputs = make_inputs(PADDED)
    out = ours(*inputs).sample
    edit.save(ours, tmp_path / "ours")
    again = edit.load(tmp_path / "ours").denoiser
    assert torch.equal(again(*inputs).sample, out) and again.config == ours.config
    stock = Stock.from_pretrained(tmp_path / "ours")
    native = ours.pack(*inputs)
    close(stock(**native).sample, ours.native(ours.run(ours.embed(**native))))
    stock.save_pretrained(tmp_path / "stock")
    assert torch.equal(edit.load(tmp_path / "stock").denoiser(*inputs).sample, out)


# ---- inside the stock pipeline ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline() -> QwenImagePipeline:
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=12,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 12,
        latents_std=[1.0] * 12,
    )
    made = QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae.eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=make_stock().eval(),
    )
    made.set_progress_bar_config(disable=True)
    return made


def paint(pipeline, **options):
    prompts = make_inputs()[2].text
    arguments = {
        "prompt_embeds": prompts[:2],
        "prompt_embeds_mask": PADDED[1:].long(),
        "negative_prompt_embeds": prompts[1:],
        "negative_prompt_embeds_mask": PADDED[:2].long(),
        "true_cfg_scale": 2.0,
        "height": 16,
        "width": 24,
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(3),
        "output_type": "pt",
    }
    return pipeline(**{**arguments, **options}).images


def test_the_stock_pipeline_paints_the_same_picture_with_a_denoiser_attached(pipeline):
    stock = pipeline.transformer
    before = paint(pipeline)
    ours = QwenImage.of(stock)
    with attached(pipeline, ours):
        # four evaluations and a decoder after one of them: fp32 differences, not pictures
        close(paint(pipeline), before, 1e-4)
    assert pipeline.transformer is stock and torch.equal(paint(pipeline), before)


def test_edits_work_inside_the_stock_pipeline(pipeline):
    before = paint(pipeline)
    ours = QwenImage.of(pipeline.transformer)
    steps, unit = [], ours.units[0]

    def attention(q, k, v, layout, step):
        steps.append((step.index, step.count, step.branch))
        return v

    unit.slots.attention = attention
    with attached(pipeline, ours):
        assert (paint(pipeline) - before).abs().max() > 1e-3
    assert steps == [(0, 2, "cond"), (0, 2, "uncond"), (1, 2, "cond"), (1, 2, "uncond")]
    del unit.slots.attention
    edit.apply(ours, {"prune": DepthPruning(ratio=0.34)})
    with attached(pipeline, ours):
        assert (paint(pipeline) - before).abs().max() > 1e-3
    assert torch.equal(paint(pipeline), before)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"guidance_embeds": True}, "guidance_embeds must be False"),
        ({"zero_cond_t": True}, "zero_cond_t must be False"),
        ({"use_additional_t_cond": True}, "use_additional_t_cond must be False"),
        ({"use_layer3d_rope": True}, "use_layer3d_rope must be False"),
        ({"patch_size": 1}, "patch_size must be 2, got 1"),
        ({"out_channels": None}, "out_channels must be 12, a quarter of in_channels=48, got None"),
        ({"axes_dims_rope": (4, 6, 8)}, r"attention_head_dim=16, got \[4, 6, 8\]"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_stock_options_that_do_not_fit_are_refused(options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        QwenImage.from_config({**TINY, **options})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"guidance": torch.ones(3)}, "takes no guidance here"),
        ({"controlnet_block_samples": [torch.zeros(1)]}, "takes no controlnet_block_samples"),
        ({"additional_t_cond": torch.zeros(3)}, "takes no additional_t_cond"),
        ({"attention_kwargs": {"scale": 0.5}}, "takes no attention_kwargs here, got scale"),
        ({"img_shapes": [[(1, 4, 6), (1, 2, 2)]] * 3}, "one picture per sample"),
        ({"img_shapes": [[(1, 4, 6)], [(1, 6, 4)], [(1, 4, 6)]]}, "all of one size"),
        ({"img_shapes": [[(1, 4, 5)]] * 3}, "1 x 4 x 5 = 20 image tokens, got 24"),
        ({"encoder_hidden_states_mask": PADDED[:, :4]}, r"shape of the text, \(3, 5\), got \(3, 4\)"),
    ],
    ids=["guidance", "controlnet", "layered", "attention", "editing", "sizes", "tokens", "mask"],
)
def test_native_arguments_that_do_not_fit_are_refused(change, message):
    ours = QwenImage.of(make_stock())
    with pytest.raises(ValueError, match=message):
        ours.embed(**{**ours.pack(*make_inputs()), **change})


def test_conditions_that_do_not_fit_are_refused():
    ours = QwenImage.of(make_stock())
    x, t, condition = make_inputs()
    for bad, message in (
        (Condition(), "needs condition.text"),
        (Condition(text=condition.text[..., :8]), "width 24, got 8"),
        (Condition(text=condition.text, guidance=torch.ones(3)), "not distilled for guidance"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(x, t, bad)
    with pytest.raises(ValueError, match="takes samples of 12x128x128, got 12x7x12"):
        ours(x[:, :, :7], t, condition)
    null = ours.null(Condition(text=condition.text, text_mask=PADDED))
    assert null.text.count_nonzero() == 0 and torch.equal(null.text_mask, PADDED)
