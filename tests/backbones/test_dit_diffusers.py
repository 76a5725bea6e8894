"""The family over `diffusers.DiTTransformer2DModel` computes what that class computes, whatever its embedders hold."""

from pathlib import Path

import pytest
import torch
import vaes
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
)
from natives import DIT, close, ours
from torch import Tensor

import edit
from edit.backbones.attached import attached
from edit.backbones.dit import DiT
from edit.backbones.dit_diffusers import DiTDiffusers, DiTDiffusersConfig
from edit.objectives import DDPM
from edit.pruning.depth import DepthPruning
from edit.stream import Condition
from recipes.config.composed import read

CONFIGS = Path(__file__).parents[2] / "configs"
TINY, stock, native = DIT.tiny, DIT.stock, DIT.words


OPTIONS = {
    "plain": {},
    "no learned variance": {"out_channels": None},
    "no attention bias": {"attention_bias": False},
    "another activation": {"activation_fn": "geglu"},
    "affine norms": {"norm_elementwise_affine": True, "norm_eps": 1e-4},
    "large patches": {"patch_size": 4},
    "one patch": {"patch_size": 8},
    "larger": {"size": 12},
    "upcast attention": {"upcast_attention": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_output_and_all_gradients_are_those_of_the_stock_model(options):
    options = dict(options)
    how = {k: options.pop(k) for k in ("size",) if k in options}
    model = stock(**options)
    dit = DiTDiffusers.from_config(model.config).eval()
    dit.load_state_dict({f"model.{k}": v for k, v in model.state_dict().items()})
    with torch.no_grad():
        a = native(model, **how)
        close(ours(dit, a), model(**a).sample)
    # gradients in fp64, where equations that are equal differ by nothing else that could be seen
    results = []
    for net, call in ((model.double(), lambda a: model(**a).sample), (dit.double(), lambda a: ours(dit, a))):
        a = native(model, **how)
        x = a["hidden_states"] = a["hidden_states"].double().requires_grad_()
        call(a).square().mean().backward()
        results.append({"x": x.grad, **{n.removeprefix("model."): p.grad for n, p in net.named_parameters()}})
    theirs, mine = results
    assert list(theirs) == list(mine)
    largest = max(g.abs().max() for g in theirs.values())
    for name, g in theirs.items():
        # A key's bias, which softmax cannot see, and with one patch all of queries and keys have a gradient of zero
        # and show roundings: exact zeros on a CPU with AVX-512, up to 9e-18 with AVX2, where the largest gradient is
        # 0.3. They are measured on the largest gradient.
        unseen = model.config.patch_size == 8 and ("attn1.to_q" in name or "attn1.to_k" in name)
        scale = largest if unseen or name.endswith("to_k.bias") else g.abs().max()
        assert (mine[name] - g).abs().max() <= 1e-12 * scale, name


@torch.no_grad()
def test_forward_packs_times_and_labels_as_the_stock_model_wants_them():
    model = stock()
    a = native(model)
    condition = Condition(label=a["class_labels"])
    out = DiTDiffusers.of(model)(a["hidden_states"], torch.tensor([0.001, 0.501, 1.0]), condition)
    theirs = model(**a).sample
    close(out.sample, theirs[:, :3])
    close(out.variance, theirs[:, 3:])


@torch.no_grad()
def test_labels_are_not_dropped_in_training_mode():
    dit = DiTDiffusers.of(stock())
    a = native(dit.model)
    assert torch.equal(ours(dit.train(), a), ours(dit.eval(), a))


@torch.no_grad()
def test_the_null_condition_is_the_last_row_of_the_tables():
    dit = DiTDiffusers.of(stock())
    null = dit.null(Condition(label=torch.tensor([0, 7])))
    assert torch.equal(null.label, torch.tensor([10, 10]))


@torch.no_grad()
def test_our_own_dit_reads_the_same_folder_where_the_embedders_agree(tmp_path):
    model = stock()
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    model.save_pretrained(tmp_path)
    dit = edit.load(tmp_path).denoiser
    assert isinstance(dit, DiT)  # the default reader
    x, t, condition = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 1.0]), Condition(label=torch.tensor([1, 10]))
    theirs, mine = dit(x, t, condition), DiTDiffusers.of(model)(x, t, condition)
    for a, b in ((theirs.sample, mine.sample), (theirs.variance, mine.variance)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())  # one matrix for q, k and v


def configured(name: str) -> DiTDiffusersConfig:
    values = read(CONFIGS, "backbone", f"dit_diffusers_{name}")
    assert values.pop("_target_") == "edit.backbones.dit_diffusers.DiTDiffusersConfig"
    return DiTDiffusersConfig(**values)


def test_dit_xl_2_is_made_without_memory_and_has_its_size():
    with torch.device("meta"):
        dit = configured("xl_2").build()
    assert all(v.is_meta for v in (*dit.parameters(), *dit.buffers()))
    d = 1152
    published = 675_129_632 - 256 * d  # of the official checkpoint, without its position table
    copies = 27 * (1001 * d + 256 * d + d + d * d + d)  # of the embedders, in all blocks but the first
    assert sum(p.numel() for p in dit.parameters()) == published + copies
    assert dit.prediction == "noise" and len(dit.units) == 28 and dit.sample_shape == (4, 32, 32)


def test_a_fresh_model_is_the_identity_in_every_block_predicts_zero_and_learns():
    dit = configured("tiny").build()
    assert dit.sample_shape == (12, 8, 8) and 1e5 < sum(p.numel() for p in dit.parameters()) < 1e6
    x, t, condition = torch.randn(2, 12, 8, 8), torch.tensor([0.3, 0.9]), Condition(label=torch.tensor([0, 10]))
    start = dit.embed(**dit.pack(x, t, condition))
    assert torch.equal(dit.run(start).image, start.image)
    out = dit(x, t, condition)
    assert out.sample.shape == out.variance.shape == x.shape and not out.sample.any() and not out.variance.any()
    DDPM().losses(out, x, torch.randn_like(x), x, t)["noise"].mean().backward()
    assert dit.model.proj_out_2.bias.grad.any()


# ---- slots, taps ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_first_unit_that_is_skipped_embeds_for_the_readout_all_the_same():
    dit, closed = DiTDiffusers.of(stock()), DiTDiffusers.of(stock())
    a = native(dit.model)
    dit.units[0] = lambda stream: stream
    layer = closed.units[0].norm1.linear  # shift, scale, gate of the attention, then of the MLP
    for rows in (slice(2 * len(layer.bias) // 6, 3 * len(layer.bias) // 6), slice(5 * len(layer.bias) // 6, None)):
        layer.weight[rows] = layer.bias[rows] = 0.0
    torch.testing.assert_close(ours(dit, a), ours(closed, a))


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="in_channels 3, or twice that for a learned variance, got 5"):
        DiTDiffusers.from_config({**TINY, "out_channels": 5})
    dit = DiTDiffusers.of(stock())
    x, t, label = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="condition.label is missing"):
        dit(x, t, Condition())
    with pytest.raises(ValueError, match="not distilled for guidance"):
        dit(x, t, Condition(label=label, guidance=torch.ones(2)))
    with pytest.raises(ValueError, match="takes samples of 3x8x8, got 3x8x12"):  # the stock model would scramble it
        dit(torch.randn(2, 3, 8, 12), t, Condition(label=label))
    a = native(dit.model)
    for change, words in (
        ({"cross_attention_kwargs": {"scale": 1}}, "got scale"),
        ({"timestep": None}, "needs timestep"),
        ({"class_labels": None}, "needs class_labels"),
    ):
        with pytest.raises(ValueError, match=words):
            dit.embed(**{**a, **change})


# ---- inside the stock pipeline --------------------------------------------------------------------------------------


def pipeline(scheduler) -> DiTPipeline:
    torch.manual_seed(0)
    model = stock(num_embeds_ada_norm=1000)  # the pipeline's null class is 1000
    pipe = DiTPipeline(transformer=model, vae=vaes.halved(3), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe: DiTPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    images = pipe([3, 5], guidance_scale=3.0, num_inference_steps=3, generator=generator, output_type="pt").images
    return torch.as_tensor(images)  # NumPy's until diffusers 0.40


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_the_stock_pipeline_paints_the_same_with_us_and_another_picture_with_an_edit(scheduler):
    pipe = pipeline(scheduler())
    model, before = pipe.transformer, paint(pipe)
    dit = DiTDiffusers.of(model)
    with attached(pipe, dit):
        # three steps with guidance 3 multiply the roundings of one evaluation
        torch.testing.assert_close(paint(pipe), before, rtol=0, atol=1e-4)
    edit.apply(dit, {"depth": DepthPruning(ratio=1 / 3)})
    with attached(pipe, dit):
        assert (paint(pipe) - before).abs().max() > 1e-2
    assert pipe.transformer is model and torch.equal(paint(pipe), before)


def test_units_are_told_the_pipelines_steps():
    pipe = pipeline(DDIMScheduler())
    dit = DiTDiffusers.of(pipe.transformer)
    own, steps = dit.units[0], []
    dit.units[0] = lambda stream: steps.append(stream.step) or own(stream)
    with attached(pipe, dit):
        paint(pipe), paint(pipe)
    assert [s.index for s in steps] == [0, 1, 2, 0, 1, 2] and {s.count for s in steps} == {3}
    expected = [(t + 1) / 1000 for t in pipe.scheduler.timesteps.tolist()]
    assert [s.sigma for s in steps] == pytest.approx(2 * expected)
    assert steps[0].memory is steps[2].memory and steps[0].memory is not steps[3].memory
