"""FLUX.1 in our words computes what `diffusers.FluxTransformer2DModel` computes, and stays loadable as one."""

from dataclasses import dataclass, replace
from itertools import pairwise

import diffusers
import pytest
import torch
import vaes
from diffusers import FluxTransformer2DModel
from ranks import run_ranks

import edit
from edit.backbones.attached import attached
from edit.backbones.flux import SHIFT, Flux, FluxConfig
from edit.backbones.stock import latent_of, tokens_of
from edit.denoiser import Edit
from edit.few_step.flow_map import IntervalInput
from edit.pruning.depth import DepthPruning
from edit.routing.elastic import Elastic
from edit.solvers import dynamic_shift
from edit.stream import Branch, Condition, Forced, Step
from edit.tuning.lora import LoRA
from edit.tuning.td_lora import TDLoRA

SMALL = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 12,
    "guidance_embeds": False,
    "axes_dims_rope": (4, 6, 6),
}


def stock_model(**changes) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**{**SMALL, **changes})
    for p in model.parameters():  # every weight counts: the modulations of a fresh model hardly do
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def inputs(guidance=False, rows=8, columns=12):
    torch.manual_seed(1)
    x, t = torch.randn(3, 4, rows, columns), torch.tensor([0.1, 0.5, 1.0])
    scale = torch.tensor([1.0, 3.5, 7.0]) if guidance else None
    return x, t, Condition(text=torch.randn(3, 5, 24), pooled=torch.randn(3, 12), guidance=scale)


def stock_output(model, x, t, condition):
    """The stock forward, from latents to latents, with FluxPipeline's own packing."""
    pack, unpack = diffusers.FluxPipeline._pack_latents, diffusers.FluxPipeline._unpack_latents
    b, c, rows, columns = x.shape
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(b, rows // 2, columns // 2, x.device, x.dtype)
    out = model(
        hidden_states=pack(x, b, c, rows, columns),
        encoder_hidden_states=condition.text,
        pooled_projections=condition.pooled,
        timestep=t,
        img_ids=ids,
        txt_ids=torch.zeros(condition.text.shape[1], 3),
        guidance=condition.guidance,
    ).sample
    return unpack(out, rows * 8, columns * 8, 8)


@pytest.mark.parametrize(
    "changes",
    [{}, {"guidance_embeds": True}, {"num_layers": 0}, {"num_single_layers": 0}, {"axes_dims_rope": (2, 4, 10)}],
    ids=str,
)
def test_output_and_gradients_equal_the_stock_forward(changes):
    stock = stock_model(**changes)
    ours = Flux.of(stock_model(**changes))
    x, t, condition = inputs(changes.get("guidance_embeds", False))
    x.requires_grad_()
    y = x.detach().clone().requires_grad_()
    expected, given = stock_output(stock, x, t, condition), ours(y, t, condition).sample
    # 1e-6 of the output's scale, and room for another order of sums
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
    expected.square().mean().backward()
    given.square().mean().backward()
    grads = dict(ours.model.named_parameters())
    for name, p in stock.named_parameters():
        if p.grad is None:  # stock's last double unit has no reader of its text where no single units follow
            assert grads[name].grad is None or not grads[name].grad.any(), name
            continue
        torch.testing.assert_close(grads[name].grad, p.grad, rtol=1e-4, atol=2e-6 * p.grad.abs().max().item() + 1e-9)
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-4, atol=1e-6 * x.grad.abs().max().item())


def test_names_of_weights_are_those_of_the_stock_model_and_its_storage_is_shared():
    stock = stock_model()
    ours = Flux.of(stock)
    assert list(ours.model.state_dict()) == list(stock.state_dict())
    assert all(p is q for p, q in zip(ours.model.parameters(), stock.parameters(), strict=True))
    assert isinstance(stock.transformer_blocks[0], diffusers.models.transformers.transformer_flux.FluxTransformerBlock)


def test_flux_dev_is_made_without_memory_and_has_its_published_size():
    with torch.device("meta"):
        denoiser = FluxConfig().build()
    assert sum(p.numel() for p in denoiser.parameters()) == 11_901_408_320
    assert len(denoiser.units) == 57


def test_kept_units_are_a_smaller_stock_model(tmp_path):
    ours = Flux.of(stock_model())
    edit.apply(ours, {"depth": DepthPruning(pattern="listed", units=(1, 2))})
    assert (ours.config["num_layers"], ours.config["num_single_layers"]) == (1, 1)
    edit.save(ours, tmp_path / "a")
    pruned = FluxTransformer2DModel.from_pretrained(tmp_path / "a")
    x, t, condition = inputs()
    torch.testing.assert_close(stock_output(pruned, x, t, condition), ours(x, t, condition).sample)
    again = edit.load(tmp_path / "a").denoiser
    assert torch.equal(again(x, t, condition).sample, ours(x, t, condition).sample)


def test_a_published_folder_is_read_also_inside_a_pipeline(tmp_path):
    stock = stock_model()
    stock.save_pretrained(tmp_path / "pipe" / "transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "pipe" / "transformer").glob("*.safetensors"))) > 2
    x, t, condition = inputs()
    ours = edit.load(tmp_path / "pipe").denoiser
    torch.testing.assert_close(ours(x, t, condition).sample, Flux.of(stock)(x, t, condition).sample)


def test_branches_before_the_gate_add_up_to_the_unit():
    ours = Flux.of(stock_model())
    x, t, condition = inputs()
    out = ours(x, t, condition, taps=(1, 2), branches=(2,))
    torch.testing.assert_close(out.sample, ours(x, t, condition).sample)
    stream = ours.embed(**ours.pack(x, t, condition))
    for unit in ours.units[:2]:
        stream = unit(stream)
    gate = ours.units[2].modulate(stream).gate
    for end in ("", ".text"):
        branches = out.trace[f"unit.2.attention{end}"] + out.trace[f"unit.2.feed{end}"]
        change = out.trace[f"unit.2{end}"] - out.trace[f"unit.1{end}"]
        torch.testing.assert_close((gate.image if not end else gate.text) * branches, change, rtol=1e-4, atol=1e-5)


def test_a_branch_of_a_single_unit_counts_the_lora_on_its_output_layer():
    ours = Flux.of(stock_model())
    edit.apply(ours, {"lora": LoRA(rank=2, targets=("proj_out",))})
    for name, p in ours.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    x, t, condition = inputs()
    whole = ours(x, t, condition)
    parts = ours(x, t, condition, branches=(2, 3))
    torch.testing.assert_close(parts.sample, whole.sample, rtol=1e-4, atol=1e-5)


def test_a_forced_unit_reads_what_it_is_given():
    ours = Flux.of(stock_model())
    x, t, condition = inputs()
    trace = ours(x, t, condition, taps=(0, 3)).trace
    tokens = Branch(trace["unit.0"], trace["unit.0.text"])
    where = torch.tensor([True, False, True])
    same = ours(x, t, condition, forced={1: Forced(tokens, where)})
    torch.testing.assert_close(same.sample, ours(x, t, condition).sample)
    noise = Branch(torch.randn_like(tokens.image), torch.randn_like(tokens.text))
    other = ours(x, t, condition, taps=(3,), forced={1: Forced(noise, where)})
    changed = (other.trace["unit.3"] - trace["unit.3"]).abs().amax((1, 2)) > 1e-3
    assert changed.tolist() == [True, False, True]


def test_gradient_checkpointing_changes_nothing_and_taps_survive_it():
    x, t, condition = inputs()
    grads = []
    for checkpointing in (False, True):
        ours = Flux.of(stock_model())
        ours.gradient_checkpointing = checkpointing
        out = ours(x, t, condition, taps=(1,), branches=(0, 2))
        (out.sample.square().mean() + sum(v.square().mean() for v in out.trace.values())).backward()
        grads.append([p.grad for p in ours.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_it_runs_in_bf16():
    ours = Flux.of(stock_model()).to(torch.bfloat16)
    x, t, condition = inputs()
    exact = Flux.of(stock_model())(x, t, condition).sample
    # 8 bits of mantissa through four units
    torch.testing.assert_close(
        ours(x, t, condition).sample.float(), exact, rtol=0.1, atol=0.1 * exact.abs().max().item()
    )


def test_what_does_not_fit_is_refused_in_one_sentence():
    ours = Flux.of(stock_model())
    x, t, condition = inputs()
    with pytest.raises(ValueError, match="takes text embeddings of width 24, got 7"):
        ours(x, t, Condition(text=torch.randn(3, 5, 7), pooled=condition.pooled))
    with pytest.raises(ValueError, match="needs condition.pooled"):
        ours(x, t, Condition(text=condition.text))
    with pytest.raises(ValueError, match="not distilled for guidance"):
        ours(x, t, inputs(guidance=True)[2])
    with pytest.raises(ValueError, match="takes samples of 4x"):
        ours(torch.randn(3, 16, 8, 8), t, condition)


def test_the_shift_of_the_steps_is_the_published_one():
    """mu 0.63 at 1024 tokens, 1.15 at 4096; shift exp(mu) (D0 of the specification)."""
    assert dynamic_shift(SHIFT, 1024) == pytest.approx(1.878, abs=1e-3)
    assert dynamic_shift(SHIFT, 2304) == pytest.approx(2.332, abs=1e-3)
    assert dynamic_shift(SHIFT, 4096) == pytest.approx(3.158, abs=1e-3)


# ---- inside the stock pipeline ---------------------------------------------------------------------------------------


def pipeline(transformer) -> diffusers.FluxPipeline:
    torch.manual_seed(0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.FluxPipeline(scheduler, vaes.flat(), None, None, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe):
    embeds = {"prompt_embeds": torch.ones(1, 5, 24), "pooled_prompt_embeds": torch.ones(1, 12)}
    generator = torch.Generator().manual_seed(3)
    return pipe(**embeds, height=16, width=24, num_inference_steps=3, output_type="pt", generator=generator).images


def test_the_stock_pipeline_draws_the_same_picture_with_ours_attached():
    stock = stock_model()
    pipe = pipeline(stock)
    before = picture(pipe)
    ours = Flux.of(stock)
    with attached(pipe, ours):
        torch.testing.assert_close(picture(pipe), before, rtol=0, atol=1e-5)
    assert pipe.transformer is stock
    assert torch.equal(picture(pipe), before)
    edit.apply(ours, {"depth": DepthPruning(pattern="listed", units=(0, 2))})
    with attached(pipe, ours):
        assert (picture(pipe) - before).abs().max() > 1e-3


def test_edits_are_told_the_steps_of_the_pipeline_and_forget_between_pictures():
    ours = Flux.of(stock_model())
    unit, seen = ours.units[1], []

    def watched(stream):
        memory = stream.step.recall("test", 1)
        memory["calls"] = memory.get("calls", 0) + 1
        seen.append((stream.step.index, stream.step.count, round(stream.step.sigma, 3), memory["calls"]))
        return unit(stream)

    ours.units[1] = watched
    with attached(pipeline(stock_model()), ours) as pipe:
        picture(pipe)
        picture(pipe)
    assert [s[0] for s in seen] == [0, 1, 2] * 2 and {s[1] for s in seen} == {3}
    assert [s[3] for s in seen] == [1, 2, 3] * 2, "each picture has a memory of its own"
    assert seen[0][2] == 1.0 and seen[0][2] > seen[1][2] > seen[2][2]


@dataclass
class Hooked(Edit):
    """Adds t to every token, halves what is predicted, and writes down what it is told."""

    def apply(self, denoiser):
        self.told = []

    def embed(self, stream, t, condition, own):
        self.told.append((round(t[0].item(), 3), condition.text.shape[1], condition.pooled.shape[1]))
        return replace(stream, image=stream.image + t.view(-1, 1, 1))

    def readout(self, output, stream, own):
        return output._replace(sample=output.sample / 2)


def test_hooks_of_edits_work_inside_the_stock_pipeline():
    """They do what the same changes do that are written into unit and weights."""
    hooked, written = Flux.of(stock_model()), Flux.of(stock_model())
    edit.apply(hooked, {"hooked": Hooked()})
    unit = written.units[0]
    written.units[0] = lambda stream: unit(replace(stream, image=stream.image + stream.step.sigma))
    for p in written.model.proj_out.parameters():
        p.data /= 2
    pictures = []
    for ours in (hooked, written):
        with attached(pipeline(stock_model()), ours) as pipe:
            pictures.append(picture(pipe))
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-5)  # three steps and a decoder
    assert (pictures[0] - picture(pipeline(stock_model()))).abs().max() > 1e-3
    times, words, pooled = zip(*hooked.applied["hooked"].told, strict=True)
    assert times[0] == 1.0 and times[0] > times[1] > times[2] > 0 and set(words) == {5} and set(pooled) == {12}


@torch.no_grad()
@pytest.mark.parametrize("name", ["elastic", "td_lora"])
def test_routed_and_timed_units_do_inside_the_stock_pipeline_what_they_do_in_a_generation(name):
    edits = {"elastic": Elastic(router=8, band=0.5, reuse=1, cache_from=0.0), "td_lora": TDLoRA()}
    ours = edit.apply(Flux.of(stock_model()), {name: edits[name]})
    generator = torch.Generator().manual_seed(4)
    for key, p in ours.named_parameters():
        if "edits." in key or ".td_" in key:
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    told = {"prompt_embeds": torch.ones(1, 5, 24), "pooled_prompt_embeds": torch.ones(1, 12)}
    noise, stock, seen = torch.randn(1, 96, 16, generator=generator), stock_model(), []
    words = {"height": 16, "width": 24, "num_inference_steps": 4, "output_type": "latent"}
    with attached(pipeline(stock), ours) as pipe:
        painted = pipe(**told, **words, latents=noise).images
    x, memory, sigmas = latent_of(noise, (1, 8, 12)), {}, pipe.scheduler.sigmas.tolist()
    condition = Condition(text=told["prompt_embeds"], pooled=told["pooled_prompt_embeds"])
    for k, (sigma, end) in enumerate(pairwise(sigmas)):
        out = ours(x, torch.tensor([sigma]), condition, step=Step(k, 4, sigma, "cond", memory))
        seen.append(ours.applied[name].decisions(out.trace))
        x = x + (end - sigma) * out.sample
    torch.testing.assert_close(painted, tokens_of(x), rtol=0, atol=1e-5 * x.abs().max().item())  # fp32, four steps
    if name == "elastic":  # something was decided, and something repeated
        assert len({v for d in seen for v in d["width"][d["cached"] == 0].tolist()}) > 1
        assert any(d["cached"].any() for d in seen)
    plain = pipeline(stock)(**told, **words, latents=noise).images
    assert (painted - plain).abs().max() > 1e-3


def test_a_flow_map_is_refused_inside_a_stock_pipeline():
    stock = stock_model()
    ours = edit.apply(Flux.of(stock), {"map": IntervalInput()})
    with pytest.raises(ValueError, match="edit 'map' makes this flux a flow map"), attached(pipeline(stock), ours):
        pass


def test_a_pipeline_of_another_family_is_refused():
    class Other:
        transformer = torch.nn.Linear(1, 1)

    with (
        pytest.raises(ValueError, match="has a Linear, a flux stands in for FluxTransformer2DModel"),
        attached(Other(), Flux.of(stock_model())),
    ):
        pass


def compiled_units_trace_the_same(rank: int = 0) -> None:
    x, t, condition = inputs()
    ours = Flux.of(stock_model(num_layers=1, num_single_layers=1))
    plain = ours(x, t, condition, taps=(0, 1), branches=(0, 1))
    for unit in ours.units:
        unit.compile(backend="aot_eager", fullgraph=True)
    out = ours(x, t, condition, taps=(0, 1), branches=(0, 1))
    assert set(out.trace) == set(plain.trace)
    for name, value in plain.trace.items():
        torch.testing.assert_close(out.trace[name], value, rtol=1e-4, atol=1e-4)
    out.sample.square().mean().backward()
    assert all(p.grad is not None for p in ours.model.single_transformer_blocks.parameters())


def test_taps_survive_compilation_and_a_unit_is_one_graph():
    run_ranks(compiled_units_trace_the_same, 1)  # in a child: what has compiled cannot be forked from


def test_a_scale_for_a_model_without_guidance_input_is_refused():
    with pytest.raises(ValueError, match="guidance=2 is for models with guidance_embeds=true"):
        FluxConfig(guidance=2.0, guidance_embeds=False)
