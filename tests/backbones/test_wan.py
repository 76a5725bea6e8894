"""The Wan family computes what `diffusers.WanTransformer3DModel` computes, and stands in for it everywhere."""

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from natives import SIZE, WAN, close, ours
from torch import Tensor, nn
from views import passed

import edit
from edit import noise
from edit.artifacts.description import readers
from edit.artifacts.export import ExportSettings, export
from edit.attention.linear import LinearAttention
from edit.backbones.attached import attached
from edit.backbones.wan import Wan, WanConfig
from edit.denoiser import Denoiser, Edit
from edit.distillation.attention import AttentionKD, MapKD, RelationKD
from edit.distillation.features import FeatureKD
from edit.distillation.output import OutputKD
from edit.distillation.pairs import same
from edit.losses import wanted
from edit.measuring.cost import count_generation, macs
from edit.measuring.flops import Flops
from edit.objectives import FlowMatching
from edit.pruning.depth import DepthPruning
from edit.pruning.width import FeedForwardWidth
from edit.routing.dydit import RATIO, DyDiT
from edit.routing.elastic import Elastic
from edit.routing.elastic_routers import forced
from edit.sampling import Sampler
from edit.solvers import Euler
from edit.stream import Condition, Step, Stream
from edit.tuning.td_lora import TDLoRA
from recipes.config.composed import read

CONFIGS = Path(__file__).parents[2] / "configs"
TINY, stock, native, made = WAN.tiny, WAN.stock, WAN.words, WAN.made


def batch(b: int = 2) -> tuple[Tensor, Tensor, Condition]:
    """(x, t, condition) of samples at different times."""
    g = torch.Generator().manual_seed(2)
    x, text = torch.randn(b, 3, *SIZE, generator=g), torch.randn(b, 5, 20, generator=g)
    return x, torch.linspace(0.3, 0.9, b), Condition(text=text)


# ---- the stock model's equations ------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "no norm before the text": {"cross_attn_norm": False},
    "another epsilon": {"eps": 1e-3},
    "one frame": {"size": (1, 8, 8)},
    "patches along time": {"patch_size": (2, 2, 2), "size": (4, 8, 4)},
    "patches of rows alone": {"patch_size": (1, 4, 1), "size": (2, 8, 3)},
    "one head": {"num_attention_heads": 1},
    "odd shares of the positions": {"attention_head_dim": 14},
    "a text of one token": {"length": 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_output_and_all_gradients_are_those_of_the_stock_model(options):
    options = dict(options)
    how = {k: options.pop(k) for k in ("size", "length") if k in options}
    model = stock(**options)
    wan = Wan.from_config(model.config).eval()
    wan.load_state_dict({f"model.{k}": v for k, v in model.state_dict().items()})
    results = []
    for net, call in ((model, lambda a: model(**a).sample), (wan, lambda a: ours(wan, a))):
        arguments = native(model, **how)
        inputs = [arguments[k].requires_grad_() for k in ("hidden_states", "encoder_hidden_states")]
        out = call(arguments)
        out.square().mean().backward()
        named = {n.removeprefix("model."): p.grad for n, p in net.named_parameters()}
        results.append({"out": out.detach(), "x": inputs[0].grad, "text": inputs[1].grad, **named})
    theirs, mine = results
    assert list(theirs) == list(mine)
    close(mine.pop("out"), theirs.pop("out"))
    largest = max(g.abs().max() for g in theirs.values())
    for name, g in theirs.items():
        # In fp32, for stock rounds to that itself, also in a model of fp64: sums over 3 samples and up to 72 tokens.
        # What softmax hardly sees (a key's bias, all keys of a text of one token) shows roundings of the others.
        assert (mine[name] - g).abs().max() <= max(1e-5 * g.abs().max(), 1e-7 * largest), name


@torch.no_grad()
def test_forward_packs_times_as_the_stock_model_wants_them():
    model = stock()
    a = native(model)
    out = Wan.of(model)(a["hidden_states"], a["timestep"] / 1000, Condition(text=a["encoder_hidden_states"]))
    close(out.sample, model(**a).sample)
    assert out.variance is None and out.grid == (3, 4, 6)


def test_norms_and_modulations_may_stay_in_fp32_as_published_folders_load(tmp_path):
    """`from_pretrained(torch_dtype=...)` keeps some modules in fp32."""
    stock().save_pretrained(tmp_path)
    model = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    assert model.scale_shift_table.dtype == torch.float32 and model.proj_out.weight.dtype == torch.bfloat16
    a = {k: v if k == "timestep" else v.to(torch.bfloat16) for k, v in native(model).items()}
    with torch.no_grad():
        theirs = model(**a).sample
        # bf16 has 8 bits; a rounding that goes the other way is 2^-8 of a value, and there are few
        assert ((ours(Wan.of(model), a) - theirs).abs() > 2**-7 * theirs.abs().max()).float().mean() < 1e-2


def test_autocast_trains():
    wan, (x, t, condition) = made().train(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        wan(x, t, condition).sample.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wan.parameters())


# ---- sizes, folders -------------------------------------------------------------------------------------------------

PUBLISHED = {"1.3b": 1_418_996_800, "14b": 14_288_491_584}  # as the published folders' weights count


def configured(name: str) -> WanConfig:
    values = read(CONFIGS, "backbone", f"wan_{name}")
    assert values.pop("_target_") == "edit.backbones.wan.WanConfig"
    return WanConfig(**values)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_real_models_are_made_without_memory_and_have_their_published_size(name):
    with torch.device("meta"):
        wan = configured(name).build()
    assert all(v.is_meta for v in (*wan.parameters(), *wan.buffers()))
    assert sum(p.numel() for p in wan.parameters()) == PUBLISHED[name]
    assert wan.prediction == "velocity" and wan.sample_shape == (16, 21, 60, 104)


def test_a_fresh_model_predicts_zero_and_learns():
    wan = configured("tiny").build()
    assert wan.sample_shape == (12, 4, 8, 8) and 1e5 < sum(p.numel() for p in wan.parameters()) < 1e6
    x, t = torch.randn(2, 12, 4, 8, 8), torch.tensor([0.3, 0.9])
    out = wan(x, t, Condition(text=torch.randn(2, 5, 64)))
    assert out.sample.shape == x.shape and not out.sample.any()
    FlowMatching().losses(out, x, torch.randn_like(x), x, t)["flow"].mean().backward()
    assert wan.model.proj_out.weight.grad.any()


def test_samples_of_any_size_within_the_table_of_positions_are_taken():
    wan = made(patch_size=(1, 2, 2))
    assert wan.accepts((3, 5, 32, 2)) and wan.accepts((3, 16, 2, 2))
    for shape in ((3, 5, 34, 2), (3, 17, 2, 2), (3, 2, 7, 8), (4, 2, 8, 8), (3, 8, 8)):
        assert not wan.accepts(shape)
    wan.settle((3, 2, 4, 6), None)
    assert wan.sample_shape == (3, 2, 4, 6) and wan.base["sample_size"] == [2, 4, 6]


def test_published_folders_have_one_reader():
    assert readers({"_class_name": "WanTransformer3DModel"}) == [Wan]


def test_an_export_makes_videos_and_says_so(tmp_path):
    edit.save(made(), tmp_path / "wan")
    export(ExportSettings(str(tmp_path / "wan"), str(tmp_path / "out"), format="diffusers"))
    page = (tmp_path / "out/README.md").read_text()
    assert "WanTransformer3DModel.from_pretrained" in page and "pipeline_tag: text-to-video" in page
    assert "video = pipe(" in page and "guidance_scale=5).frames[0]" in page
    assert WanTransformer3DModel.from_pretrained(tmp_path / "out").config.num_layers == 3


def test_a_copy_is_its_own():
    wan = made()
    twin = deepcopy(wan)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.1)
        before = wan(*batch()).sample
        assert torch.equal(made()(*batch()).sample, before) and not torch.equal(twin(*batch()).sample, before)


# ---- slots, taps, orders --------------------------------------------------------------------------------------------


def test_the_child_called_ffn_is_no_slot():
    unit = made().units[1]
    with pytest.raises(AttributeError, match="no slot 'text_ffn'"):
        unit.slots.text_ffn = nn.Identity()
    assert isinstance(unit.ffn, nn.Module)


@torch.no_grad()
def test_maps_are_those_of_the_self_attention():
    wan = made()
    out = wan(*batch(), maps={1: 3})
    rows = out.trace["unit.1.maps"]
    assert rows.shape == (2, 4, 3, 72)
    torch.testing.assert_close(rows.exp().sum(-1), torch.ones(2, 4, 3))


@dataclass
class Shuffled(Edit):
    """Image tokens in another order while the units run."""

    def apply(self, denoiser: Denoiser) -> None:
        """Nothing to change."""

    def embed(self, stream: Stream, t: Tensor, condition: object, own: object) -> Stream:
        order = torch.randperm(stream.image.shape[1], generator=torch.Generator().manual_seed(0))
        return replace(stream, layout=replace(stream.layout, permutation=order))


@torch.no_grad()
def test_an_order_of_the_tokens_changes_nothing_as_positions_follow():
    wan = made()
    before = wan(*batch(), taps=(1,))
    edit.apply(wan, {"order": Shuffled()})
    after = wan(*batch(), taps=(1,))
    torch.testing.assert_close(after.sample, before.sample, rtol=0, atol=1e-5)  # fp32 sums in another order
    torch.testing.assert_close(after.trace["unit.1"], before.trace["unit.1"], rtol=0, atol=1e-5)
    seen = []
    wan.units[0].slots.branch = lambda stream, name, run: seen.append(stream) or run(stream)
    wan(*batch())
    plain = wan.embed(**wan.pack(*batch()))
    assert not torch.equal(seen[0].image, plain.image) and not torch.equal(seen[0].layout.rope, plain.layout.rope)


# ---- edits ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_elastic_units_execute_is_what_they_mask_and_costs_less():
    wan, g = edit.apply(made(), {"it": Elastic(router=8, reuse=0)}), torch.Generator().manual_seed(1)
    for key, p in wan.edits.named_parameters():
        p.add_(0.3 * torch.randn(p.shape, generator=g))
        if ".gate." in key:
            p.sub_(p.mean())  # p around 1/2
    routed = wan.train()(*batch(4)).sample
    with Flops() as counter:
        executed = wan.eval()(*batch(4)).sample
    torch.testing.assert_close(executed, routed, rtol=0, atol=1e-5)  # fp32 sums of slices
    with forced(wan, lambda i, p, q: torch.full_like(p, 4)), Flops() as whole:
        wan(*batch(4))
    assert counter.total < 0.9 * whole.total


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "td_lora"])
@torch.no_grad()
def test_dydit_computes_by_slices_what_factors_compute_and_executes_what_it_says(lora):
    """Queries and keys are normalised across all heads, those that are left out included."""
    wan = made()
    if lora:
        edit.apply(wan, {"td_lora": TDLoRA(rank=2)})
    edit.apply(wan, {"it": DyDiT(bias=0.0, token_bias=0.0)})
    for key, p in wan.named_parameters():
        if key.startswith("edits.") or ".td_" in key:
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(key))))
    x, t, condition = (v[:1] if isinstance(v, Tensor) else v.map(lambda w: w[:1]) for v in batch())
    executed, step = wan(x, t, condition), Step(0, 1, 0.3)
    factors = wan(x, t, condition, branches=(0, 1, 2))  # masks where branches are traced
    torch.testing.assert_close(executed.sample, factors.sample, rtol=0, atol=1e-5)  # fp32 sums of slices
    heads = executed.trace["dydit.widths"][..., 0, :]
    assert 0 < heads.mean() < 1
    if lora:
        return
    own: Any = wan.edits["it"]
    stream = wan.applied["it"].embed(wan.embed(**wan.pack(x, t, condition)), t, condition, own)
    with Flops() as counter:
        wan.run(replace(stream, step=step))
    routers = sum(72 * (r.into.weight.numel() + r.out.weight.numel()) for r in own.tokens)
    whole = 0
    for w in own.works:
        fixed, attended, always = w.parts(72, 0, 5)  # image tokens, registers, text
        whole += fixed + attended + (always + 72) * (w.out + w.feed)
    assert counter.total // 2 - routers == pytest.approx(executed.trace[RATIO].item() * whole, rel=1e-6)  # fp32 shares


def test_executed_macs_fall_by_what_edits_leave_out():
    whole = macs(made(), made().example(1, text=5))
    n, d, hidden = 72, 32, 64
    narrow = edit.apply(made(), {"it": FeedForwardWidth(0.5)})
    shallow = edit.apply(made(), {"it": DepthPruning(ratio=1 / 3)})
    assert macs(narrow, narrow.example(1, text=5)) == whole - 3 * n * 2 * d * hidden // 2
    projections, pairs = 4 * n * d * d + 2 * n * d * d + 2 * 5 * d * d, 2 * n * n * d + 2 * n * 5 * d
    unit = projections + pairs + 2 * n * d * hidden
    assert macs(shallow, shallow.example(1, text=5)) == whole - unit
    linear = edit.apply(made(), {"it": LinearAttention(units=(1,))})
    assert macs(linear, linear.example(1, text=5)) < whole
    guided = Sampler(Euler(2), guidance=3.0)
    assert count_generation(made(), guided, FlowMatching(), made().example(1, text=5), 1).macs == 4 * whole


# ---- distillation ---------------------------------------------------------------------------------------------------

TERMS = {
    "features": FeatureKD(same(0, 1), norm="layer", projector="linear"),
    "output": OutputKD(),
    "attention": AttentionKD(same(0, 1)),
    "maps": MapKD(((1, 2),)),
    "relations": RelationKD(((0, 0), (1, 2)), size=4),
}


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_terms_teach_a_shallower_student_for_two_steps(term):
    teacher, student = made(), edit.apply(made(seed=5), {"deep": DepthPruning(pattern="listed", units=(0, 1))})
    own = term.build(student, teacher)
    parameters = [*student.parameters(), *([] if own is None else own.parameters())]
    optimizer, losses = torch.optim.SGD(parameters, lr=1e-2), []
    x, t, condition = batch()
    for _ in range(2):
        asked = (wanted([term]), wanted([term], teacher=True))
        (out, taught) = (
            m(x, t, condition, taps=taps, branches=branches, maps=maps)
            for m, (taps, branches, maps) in zip((student, teacher), asked, strict=True)
        )
        taught = taught._replace(sample=taught.sample.detach(), trace={k: v.detach() for k, v in taught.trace.items()})
        (loss,) = term.losses(replace(passed(out, t, 0.0, taught), own=own)).values()
        assert loss.shape == (2,) and (loss > 0).all()
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(loss.mean().item())
    assert losses[1] < losses[0] and student.model.blocks[0].attn1.to_q.weight.grad.any()


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"image_dim": 8}, "wan reads no images here: image_dim must be None, got 8"),
        ({"added_kv_proj_dim": 32}, "added_kv_proj_dim must be None, got 32"),
        ({"pos_embed_seq_len": 4}, "pos_embed_seq_len must be None, got 4"),
        ({"in_channels": 7}, "out_channels must be in_channels 7, got 3"),
    ],
)
def test_models_of_other_kinds_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Wan.from_config({**TINY, **options})


def test_conditions_that_do_not_fit_are_refused():
    wan, (x, t, condition) = made(), batch()
    with pytest.raises(ValueError, match="needs condition.text"):
        wan(x, t, Condition())
    with pytest.raises(ValueError, match="width 20, got 24"):
        wan(x, t, Condition(text=torch.randn(2, 5, 24)))
    with pytest.raises(ValueError, match="not distilled for guidance"):
        wan(x, t, replace(condition, guidance=torch.ones(2)))
    with pytest.raises(ValueError, match="takes samples of 3x3x8x12, got 3x3x7x12"):
        wan(x[:, :, :, :7], t, condition)
    with pytest.raises(ValueError, match="attends to the padding of its text"):
        wan.need_length(None)
    a = native(wan.model)
    for change, words in (
        ({"timestep": torch.ones(3, 72)}, r"one timestep per sample here, got shape \(3, 72\): .*expand_timesteps"),
        ({"encoder_hidden_states_image": torch.ones(3, 4, 32)}, "leave encoder_hidden_states_image out"),
        ({"attention_kwargs": {"scale": 0.5}}, "takes no attention_kwargs here, got scale"),
    ):
        with pytest.raises(ValueError, match=words):
            wan.embed(**{**a, **change})


# ---- inside the stock pipeline --------------------------------------------------------------------------------------

SCHEDULERS = {
    "UniPC": lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    "Euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def pipeline(scheduler: str = "UniPC") -> WanPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=3,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, 0.0, -0.1],
        latents_std=[1.0, 2.0, 3.0],
    )
    pipe = WanPipeline(None, None, vae.eval(), SCHEDULERS[scheduler](), stock())  # type: ignore[arg-type]
    pipe.set_progress_bar_config(disable=True)
    return pipe


def film(pipe: WanPipeline) -> Tensor:
    g = torch.Generator().manual_seed(2)
    return pipe(
        prompt_embeds=torch.randn(1, 5, 20, generator=g),
        negative_prompt_embeds=torch.randn(1, 5, 20, generator=g),
        guidance_scale=3.0,
        num_inference_steps=3,
        num_frames=9,
        height=32,
        width=48,
        generator=g,
        output_type="pt",
    ).frames


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_stock_pipeline_films_the_same_with_us_and_another_film_with_an_edit(scheduler):
    pipe = pipeline(scheduler)
    model, before = pipe.transformer, film(pipe)
    wan = Wan.of(model)
    assert before.shape == (1, 9, 3, 32, 48)
    with attached(pipe, wan):
        # three steps with guidance 3 multiply the roundings of one evaluation
        torch.testing.assert_close(film(pipe), before, rtol=0, atol=1e-4)
    edit.apply(wan, {"depth": DepthPruning(ratio=1 / 3)})
    with attached(pipe, wan):
        assert (film(pipe) - before).abs().max() > 1e-2
    assert pipe.transformer is model and torch.equal(film(pipe), before)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_units_are_told_the_pipelines_steps_and_branches(scheduler):
    pipe = pipeline(scheduler)
    wan, steps = Wan.of(pipe.transformer), []
    own = wan.units[0]
    wan.units[0] = lambda stream: steps.append((stream.step, stream.step.sigma)) or own(stream)
    with attached(pipe, wan):
        film(pipe)
    assert [(s.index, s.count, s.branch) for s, _ in steps] == [
        (i, 3, branch) for i in range(3) for branch in ("cond", "uncond")
    ]
    times = (pipe.scheduler.timesteps / 1000).tolist()
    assert [sigma for _, sigma in steps[::2]] == pytest.approx(times, abs=1e-3)  # UniPC's times are whole numbers
    assert len({id(s.memory) for s, _ in steps}) == 1


def test_a_time_per_token_is_refused_in_the_pipeline_too():
    pipe = pipeline()
    pipe.register_to_config(expand_timesteps=True)
    with attached(pipe, Wan.of(pipe.transformer)), pytest.raises(ValueError, match="one timestep per sample here"):
        film(pipe)


@torch.no_grad()
def test_the_familys_sampler_takes_the_steps_of_the_pipelines_euler():
    pipe, steps = pipeline("Euler"), 3
    wan = Wan.of(pipe.transformer, sample_size=(3, 4, 6))
    sampler = wan.sampler()
    assert (sampler.guidance, sampler.solver.steps) == (5.0, 50)
    sampler = replace(sampler, solver=replace(sampler.solver, steps=steps))
    told = [Condition(text=torch.randn(1, 5, 20)) for _ in range(2)]
    mine = sampler(wan, FlowMatching(), told[0], torch.arange(1), negative=told[1])
    latents = noise.gaussian(0, torch.arange(1), noise.NOISE, (3, 3, 4, 6))
    words = {"prompt_embeds": told[0].text, "negative_prompt_embeds": told[1].text, "latents": latents}
    size = {"num_frames": 9, "height": 32, "width": 48}
    theirs = pipe(**words, **size, num_inference_steps=steps, guidance_scale=5.0, output_type="latent").frames
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)  # three guided steps of fp32
