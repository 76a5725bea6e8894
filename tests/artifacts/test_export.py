import ast
import json
import math
import re
import shutil
import subprocess
import sys
import threading
from base64 import b64decode
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from weights import randomise

import edit
from edit import noise
from edit.artifacts import card
from edit.artifacts.checksums import accept
from edit.artifacts.flux_single_file import from_original, original_config, read_original, to_original
from edit.artifacts.lora import LORA_WEIGHTS
from edit.backbones.flux import Flux, FluxConfig
from edit.denoiser import Edit
from edit.edits import describe
from edit.few_step.consistency import Consistency
from edit.few_step.flow_map import IntervalInput
from edit.few_step.policy import MixtureHead
from edit.objectives import DDPM, FlowMatching
from edit.pruning.depth import DepthPruning
from edit.sampling import Sampler
from edit.solvers import DDIMSolver, DPMSolver, Euler, Grid, Heun, StockEuler, times
from edit.stream import Condition
from edit.tuning.lora import LoRA
from recipes.config.composed import names
from recipes.cost import from_file
from recipes.export import main as command

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = [name for name in names(CONFIGS, "backbone") if name.endswith("_tiny") and name != "sit_tiny"]
ABSENT = {"text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}  # of the tiny pipeline
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass
class Stubborn(Edit):
    """An edit that stays."""

    def apply(self, denoiser) -> None:
        pass


def make_flux(seed: int = 0, **options) -> Flux:
    tiny = {"in_channels": 16, "num_layers": 3, "num_single_layers": 3, "attention_head_dim": 16}
    tiny |= {"num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 20}
    denoiser = FluxConfig(**{**tiny, "axes_dims_rope": (4, 6, 6), "sample_size": (8, 8), **options}).build()
    randomise(denoiser, seed)
    return denoiser.eval()  # type: ignore[return-value]


@pytest.fixture
def flux() -> Flux:
    """3 double and 3 single units of width 32, samples of 4 channels, told their guidance."""
    return make_flux()


@pytest.fixture
def asked() -> tuple[torch.Tensor, torch.Tensor, Condition]:
    g = torch.Generator().manual_seed(1)
    text, pooled = torch.randn(2, 5, 24, generator=g), torch.randn(2, 20, generator=g)
    condition = Condition(text=text, pooled=pooled, guidance=torch.tensor([1.0, 3.5]))
    return torch.randn(2, 4, 8, 8, generator=g), torch.tensor([0.3, 0.9]), condition


@torch.no_grad()
def stock_output(model, flux: Flux, asked) -> torch.Tensor:
    """What a stock transformer predicts for the same question, as latents."""
    native = flux.pack(*asked)
    grid = native.pop("grid")
    tokens = model(**native, return_dict=False)[0]
    x = tokens.view(2, *grid[1:], 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(2, 4, 8, 8)


def run(*words: str) -> int:
    return command([str(w) for w in words])


def load_stock(folder: Path):
    import diffusers

    name = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, name).from_pretrained(folder)


def randomise_lora(denoiser) -> None:
    with torch.no_grad():
        for name, p in denoiser.named_parameters():
            if ".lora_" in name:
                p.normal_(std=0.2)


def error_of(capsys) -> str:
    """The one sentence on stderr."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


# ---- diffusers folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_stock_diffusers_loads_every_family_bit_equal(name, tmp_path, capsys):
    denoiser = from_file(CONFIGS, "backbone", name).build()
    randomise(denoiser)
    edit.save(denoiser, tmp_path / "a")
    code = run(f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}")
    stock = denoiser.to_stock(denoiser.config, denoiser.model.state_dict())
    if stock[0]["_class_name"].startswith("edit."):  # told why
        assert code == 2 and stock[0]["_not_diffusers_because"] in error_of(capsys)
        return
    got = load_stock(tmp_path / "out")
    assert code == 0 and got.state_dict().keys() >= stock[1].keys()
    assert all(torch.equal(got.state_dict()[k], v) for k, v in stock[1].items())


@torch.no_grad()
def test_live_edits_are_folded_and_stock_outputs_are_ours(flux, asked, tmp_path):
    edit.apply(flux, {"shallow": DepthPruning(pattern="listed", units=(0, 2, 3, 5))})
    edit.apply(flux, {"lora": LoRA(rank=2, alpha=3, targets=("attn.to_q", "ff.net.2", "proj_out"))})
    randomise_lora(flux)
    edit.save(flux, tmp_path / "a")
    assert run(f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}") == 0
    got, expected = load_stock(tmp_path / "out"), flux(*asked).sample
    assert (got.config.num_layers, got.config.num_single_layers) == (2, 2)
    # fp32: W + B A is rounded once before, our live LoRA adds afterwards
    torch.testing.assert_close(stock_output(got, flux, asked), expected, rtol=1e-4, atol=1e-4)
    again = edit.load(tmp_path / "out").denoiser
    assert not again.applied and [f["name"] for f in again.folded] == ["shallow", "lora"]
    torch.testing.assert_close(again(*asked).sample, expected, rtol=1e-4, atol=1e-4)


def test_shards_and_bf16_are_read_back_by_stock_diffusers(tmp_path):
    flux = make_flux(attention_head_dim=32, num_attention_heads=4, axes_dims_rope=(8, 12, 12))
    edit.save(flux, tmp_path / "a")
    words = (f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}", "dtype=bf16", "max_shard_size=1MB")
    assert run(*words) == 0
    index = json.loads((tmp_path / "out" / f"{WEIGHTS}.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    got = load_stock(tmp_path / "out").to(torch.bfloat16).state_dict()
    assert all(torch.equal(got[k], v.to(torch.bfloat16)) for k, v in flux.model.state_dict().items())


def test_an_edit_that_cannot_be_folded_is_named_and_nothing_is_written(flux, tmp_path, capsys):
    edit.apply(flux, {"mine": Stubborn(), "lora": LoRA(rank=2, targets=("attn.to_q",))})
    edit.save(flux, tmp_path / "a")
    words = (f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}", f"trusted={__name__}")
    assert run(*words) == 2 and "'mine'" in (said := error_of(capsys)) and "Stubborn cannot be folded" in said
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# ---- pipelines -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A stock FluxPipeline folder with a tiny real VAE, CLIP and scheduler, without tokenizers."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 20, "intermediate_size": 20, "num_attention_heads": 2, "num_hidden_layers": 1}
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=20000, max_position_embeddings=8, projection_dim=20, **sizes))
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, shift_factor=0.1)
    scheduler, flux = FlowMatchEulerDiscreteScheduler(shift=2.0), make_flux(seed=3)
    parts = {"text_encoder": clip, **ABSENT}
    flux_class = Flux.stock_class()
    stock = flux_class(**{k: v for k, v in flux.config.items() if k not in Flux.extras})
    stock.load_state_dict(flux.model.state_dict())
    folder = tmp_path_factory.mktemp("teacher") / "pipeline"
    FluxPipeline(scheduler=scheduler, vae=vae, transformer=stock, **parts).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: toy-licence\nlicense_link: LICENSE.md\n---\n")
    (folder / "LICENSE.md").write_text("for toys only\n")
    return folder


@torch.no_grad()
def test_a_whole_pipeline_folder_samples_in_stock_diffusers_with_our_transformer(flux, asked, tmp_path, pipeline):
    from diffusers import FluxPipeline

    edit.apply(flux, {"shallow": DepthPruning(pattern="listed", units=(0, 2, 5))})
    edit.save(flux, tmp_path / "a", sampler=edit.load(pipeline).sampler)
    out = tmp_path / "out"
    assert run(f"artifact={tmp_path / 'a'}", f"out={out}", f"pipeline={pipeline}") == 0
    pipe = FluxPipeline.from_pretrained(out, **ABSENT)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.transformer.config.num_single_layers, pipe.scheduler.config.shift) == (1, 2.0)
    x, _, condition = asked
    torch.testing.assert_close(stock_output(pipe.transformer, flux, asked), flux(*asked).sample, rtol=1e-5, atol=1e-5)
    noise = pipe._pack_latents(x, 2, 4, 8, 8)
    settings = {"num_inference_steps": 2, "output_type": "latent", "latents": noise, "height": 8, "width": 8}
    got = pipe(prompt_embeds=condition.text, pooled_prompt_embeds=condition.pooled, **settings).images
    assert got.shape == noise.shape and got.isfinite().all() and not torch.equal(got, noise)
    # weights are linked, what somebody may edit is copied
    weights = [folder / "text_encoder" / "model.safetensors" for folder in (pipeline, out)]
    settings = [folder / "vae" / "config.json" for folder in (pipeline, out)]
    assert weights[0].samefile(weights[1]) and not settings[0].samefile(settings[1])
    # the weights come from nowhere we know of: the licence of what is around them does not cover them
    assert (metadata_load(out / "README.md") or {})["license"] == "unknown"
    assert "other components are those of `pipeline`: [toy-licence]" in (out / "README.md").read_text()


def test_a_pipeline_that_does_not_fit_is_refused_in_one_sentence(make_dit, tmp_path, pipeline, capsys):
    edit.save(make_dit(frequency_shift=1), tmp_path / "a")
    words = (f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}")
    assert run(*words, f"pipeline={pipeline}") == 2
    assert "FluxTransformer2DModel as its transformer, the artifact is a DiTTransformer2DModel" in error_of(capsys)
    assert run(*words, f"pipeline={tmp_path}") == 2 and "no model_index.json" in error_of(capsys)
    index = tmp_path / "model_index.json"
    parts = {"transformer": ["diffusers", "X"], "vae": ["diffusers", "AutoencoderKL"]}
    index.write_text(json.dumps(parts))
    assert run(*words, f"pipeline={tmp_path}") == 2 and "its vae is missing" in error_of(capsys)
    index.write_text(json.dumps({**parts, "../a": ["diffusers", "X"]}))
    assert run(*words, f"pipeline={tmp_path}") == 2 and "outside its folder: ../a" in error_of(capsys)
    assert not (tmp_path / "out").exists()


# ---- few-step students -----------------------------------------------------------------------------------------------

RUN = {"matching": describe(Consistency()), "teacher": {"path": "owner/teacher", "guidance": 3.5}}


def exported(flux: Flux, sampler: Sampler, folder: Path, *words: str) -> str:
    """Writes an artifact of a few-step student and its export, folder / "out". Returns its card."""
    edit.save(flux, folder / "a", sampler=sampler, run=RUN)
    assert run(f"artifact={folder / 'a'}", f"out={folder / 'out'}", *words) == 0
    return (folder / "out" / "README.md").read_text()


def stock_pipe(folder: Path):
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder, **ABSENT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stated(text: str) -> dict:
    """The settings of a card's example call, as the user would give them."""
    (settings,) = re.findall(r"^image = pipe\(\S.*?\", (.*)\)\.images\[0\]$", text, re.MULTILINE)
    call = ast.parse(f"pipe({settings})", mode="eval").body
    assert isinstance(call, ast.Call)
    return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}


@torch.no_grad()
def both(flux: Flux, sampler: Sampler, asked, pipe, settings: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of the stock pipeline, given the settings, and of our sampler, from the same noise."""
    condition, samples = replace(asked[2], guidance=None), torch.arange(2)
    expected = sampler(flux, FlowMatching(), condition, samples, seed=5)
    x = noise.gaussian(5, samples, noise.NOISE, (4, 8, 8))
    places = {"latents": pipe._pack_latents(x, 2, 4, 8, 8), "output_type": "latent", "height": 8, "width": 8}
    got = pipe(prompt_embeds=condition.text, pooled_prompt_embeds=condition.pooled, **places, **settings).images
    return got, pipe._pack_latents(expected, 2, 4, 8, 8)


@pytest.mark.parametrize(
    ("solver", "told", "said"),
    [
        (Grid((1.0, 0.75, 0.5, 0.25), shift=3.0), 2.0, "num_inference_steps=4, guidance_scale=2)"),
        (Grid((1.0, 0.75, 0.5, 0.25), shift=3.0), 0.0, "num_inference_steps=4, guidance_scale=0)"),
        (Grid((1.0, 0.6, 0.15), shift=3.0), None, "num_inference_steps=3, sigmas=[1, 0.6, 0.15], guidance_scale=3.5)"),
        (Grid((0.9,), renoise=True), None, "num_inference_steps=1, sigmas=[0.9], guidance_scale=3.5)"),
        (Euler(3, shift=1.5), None, "num_inference_steps=3, guidance_scale=3.5)"),
    ],
)
def test_a_stock_pipeline_called_as_the_card_says_samples_a_few_step_student_as_we_do(
    solver, told, said, flux, asked, tmp_path, pipeline
):
    sampler = Sampler(solver, told=told)
    text = exported(flux, sampler, tmp_path, f"pipeline={pipeline}")
    assert f", {said}" in text and stated(text)["num_inference_steps"] == solver.steps
    got, expected = both(flux, sampler, asked, stock_pipe(tmp_path / "out"), stated(text))
    # fp32: diffusers rounds times to float32 and keeps time x 1000; latents are of size 1 to 10
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_without_the_students_scheduler_its_pipeline_would_sample_something_else(flux, asked, tmp_path, pipeline):
    """The comparison above can fail: the teacher's pipeline has another shift."""
    sampler = Sampler(Grid((1.0, 0.75, 0.5, 0.25), shift=3.0))
    settings = stated(exported(flux, sampler, tmp_path, f"pipeline={pipeline}"))
    pipe = stock_pipe(tmp_path / "out")
    pipe.scheduler = stock_pipe(pipeline).scheduler
    got, expected = both(flux, sampler, asked, pipe, settings)
    assert (got - expected).abs().max() > 0.01


def test_a_scheduler_of_fresh_noise_steps_as_the_grid_does(flux, tmp_path, pipeline):
    grid = Grid((1.0, 0.7, 0.2), renoise=True, shift=3.0)
    text = exported(flux, Sampler(grid), tmp_path, f"pipeline={pipeline}")
    assert "torch.manual_seed(0)" in text and "each step but the first from fresh noise" in text
    scheduler = stock_pipe(tmp_path / "out").scheduler
    assert scheduler.config.stochastic_sampling and not scheduler.config.use_dynamic_shifting
    g = torch.Generator().manual_seed(2)
    x, *velocities = torch.randn(4, 1, 4, 8, 8, generator=g).unbind()
    drawn = []

    def draw(step: int) -> torch.Tensor:
        drawn.append(torch.randn(x.shape, generator=torch.Generator().manual_seed(step)))
        return drawn[-1]

    asked_at = []

    def predict(x: torch.Tensor, t: float, end: float | None = None) -> torch.Tensor:
        asked_at.append(t)
        return velocities[len(asked_at) - 1]

    expected = grid.integrate(predict, x, FlowMatching(), draw)
    scheduler.set_timesteps(sigmas=stated(text)["sigmas"])
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * t for t in asked_at])
    for k, (t, v) in enumerate(zip(scheduler.timesteps, velocities, strict=True)):
        x = scheduler.step(v, t, x, generator=torch.Generator().manual_seed(k), return_dict=False)[0]
    assert len(drawn) == 2  # the last step's noise counts for nothing
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)  # fp32, times rounded there


def test_no_setting_of_the_teachers_scheduler_bends_the_students_times(flux, tmp_path, pipeline):
    bent = tmp_path / "bent"
    shutil.copytree(pipeline, bent)
    file = bent / "scheduler" / "scheduler_config.json"
    other = {"use_dynamic_shifting": True, "shift_terminal": 0.02, "use_karras_sigmas": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), **other, "num_train_timesteps": 500}))
    file.chmod(0o444)  # as the hub's cache may have it
    exported(flux, Sampler(Grid((1.0, 0.5), shift=3.0)), tmp_path, f"pipeline={bent}")
    scheduler = stock_pipe(tmp_path / "out").scheduler
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    assert scheduler.timesteps.tolist() == pytest.approx([500, 375])  # 3 x 0.5 / (1 + 2 x 0.5) = 0.75


def test_a_scheduler_of_another_class_is_left_and_the_card_says_what_was_trained_for(flux, tmp_path, pipeline):
    from diffusers import DPMSolverMultistepScheduler

    other = tmp_path / "other"
    shutil.copytree(pipeline, other)
    DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=2.0).save_pretrained(other / "scheduler")
    index = json.loads((other / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DPMSolverMultistepScheduler"]
    (other / "model_index.json").write_text(json.dumps(index))
    text = exported(flux, Sampler(Grid((1.0, 0.5), shift=3.0)), tmp_path, f"pipeline={other}")
    assert "# trained for the times 1, 0.75 (1 is noise): the DPMSolverMultistepScheduler makes its own" in text
    assert "sigmas" not in stated(text)
    kept = [(folder / "scheduler" / "scheduler_config.json").read_bytes() for folder in (other, tmp_path / "out")]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("lora", [False, True])
def test_beside_anothers_pipeline_the_card_gives_method_times_and_the_scheduler_to_put_in(lora, flux, tmp_path):
    if lora:
        edit.apply(flux, {"lora": LoRA(rank=2, targets=("attn.to_q",))})
    sampler = Sampler(Grid((1.0, 0.6), renoise=True, shift=3.1582), told=2.5)
    text = exported(flux, sampler, tmp_path, *(["format=lora"] if lora else []))
    assert "- method: Consistency, of a teacher at guidance 3.5" in text
    assert "- trained for the times 1, 0.8257 (1 is noise), each step but the first from fresh noise" in text
    assert "pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.1582, stochastic_sampling=True)" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = re.findall(r"^from diffusers import (.*)$", code, re.MULTILINE)[0].split(", ")
    assert "FlowMatchEulerDiscreteScheduler" in names
    assert stated(text) == {"num_inference_steps": 2, "sigmas": [1, 0.6], "guidance_scale": 2.5}
    assert not (tmp_path / "out" / "scheduler").exists()


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"placement": "tied", "guidance": [1.0, 5.0]}, "Consistency, of a teacher at guidance 1.0 to 5.0"),
        ({"path": None, "placement": "replicated", "guidance": 1.0}, "Consistency"),
    ],
)
def test_the_card_says_which_guidance_was_learned_and_nothing_of_a_teacher_that_was_not_there(
    teacher, said, flux, tmp_path
):
    student = make_run(flux, tmp_path / "student", matching=RUN["matching"], critic={"follow": 0.03})
    edit.save(flux, student / "artifact", sampler=Sampler(Grid()), run={**RUN, "teacher": teacher})
    assert run(f"artifact={student}", f"out={tmp_path / 'out'}") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"- method: {said}\n" in text and "follow: 0.03" in text and "edit.few_step.consistency" in text


def test_pipelines_whose_own_times_end_elsewhere_are_always_given_ours(tmp_path):
    """Stock SD3 spaces its times down to the last of 1000, not to 1 / steps; given ours, it shifts them once."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    sd3, grid = from_file(CONFIGS, "backbone", "sd3_tiny").build(), Grid(shift=3.0)
    settings = stated(exported(sd3, Sampler(grid), tmp_path))
    assert settings == {"num_inference_steps": 4, "sigmas": [1, 0.75, 0.5, 0.25], "guidance_scale": 1}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=settings["sigmas"])
    assert scheduler.sigmas.tolist() == pytest.approx(grid.grid)
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() != pytest.approx(grid.grid, abs=0.1)


# ---- many steps ------------------------------------------------------------------------------------------------------

DYNAMIC = (0.5, 1.15, 256, 4096)


def saved(flux: Flux, sampler: Sampler, folder: Path, *words: str) -> str:
    """Of a model that was trained by no few-step method: its card."""
    edit.save(flux, folder / "a", sampler=sampler)
    assert run(f"artifact={folder / 'a'}", f"out={folder / 'out'}", *words) == 0
    return (folder / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("solver", "asked_for"),
    [
        (StockEuler(5, shift=2.0), None),  # the pipeline's own
        (Euler(5, shift=2.0), None),
        (Euler(5), {"shift": 1.0}),
        (StockEuler(5, dynamic=DYNAMIC), {"use_dynamic_shifting": True, "max_shift": 1.15}),
        (StockEuler(5, dynamic=DYNAMIC, terminal=0.1), {"use_dynamic_shifting": True, "shift_terminal": 0.1}),
        (StockEuler(5, shift=3.0, even=False), {"shift": 3.0}),
    ],
)
def test_a_stock_pipeline_called_as_the_card_says_takes_the_steps_that_were_evaluated(
    solver, asked_for, flux, asked, tmp_path, pipeline
):
    sampler = Sampler(solver)
    settings = stated(saved(flux, sampler, tmp_path, f"pipeline={pipeline}"))
    config = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert config["shift"] == 2.0 if asked_for is None else asked_for.items() <= config.items()
    assert ("sigmas" in settings) == (getattr(solver, "even", True) is False)
    got, expected = both(flux, sampler, asked, stock_pipe(tmp_path / "out"), settings)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # as above


def test_beside_another_pipeline_the_card_gives_a_scheduler_only_where_the_familys_steps_otherwise(flux, tmp_path):
    text = saved(flux, flux.sampler(), tmp_path)
    assert "pipe.scheduler" not in text and stated(text)["num_inference_steps"] == 28
    # 16 tokens: the dynamic shift there
    text = saved(flux, Sampler(Euler(28, shift=math.exp(0.5 + 0.65 * (16 - 256) / 3840))), tmp_path)
    assert "pipe.scheduler" not in text
    text = saved(flux, Sampler(Euler(20)), tmp_path)
    assert "pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1)" in text and "sigmas" not in stated(text)
    text = saved(flux, Sampler(Heun(20)), tmp_path)
    assert "# evaluated with Heun(steps=20, shift=1.0): the FlowMatchEulerDiscreteScheduler steps otherwise" in text


def test_sd3_is_given_its_sigmas_unless_it_is_sampled_as_its_pipeline_does(tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    sd3 = from_file(CONFIGS, "backbone", "sd3_tiny").build()
    text = saved(sd3, sd3.sampler(), tmp_path)
    assert stated(text) == {"num_inference_steps": 28, "guidance_scale": 7} and "pipe.scheduler" not in text
    text = saved(sd3, Sampler(Euler(5, shift=3.0)), tmp_path)
    assert "pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3)" in text
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=stated(text)["sigmas"])
    assert scheduler.sigmas.tolist() == pytest.approx(times(5, 3.0), abs=1e-6)


def test_settings_that_a_pipeline_does_not_have_are_told(flux, tmp_path):
    text = saved(flux, Sampler(StockEuler(5), guidance=2.0, interval=(0.2, 0.8), norm_patch=2), tmp_path)
    assert "# evaluated with interval=(0.2, 0.8), norm_patch=2, which the pipeline does otherwise" in text


def test_a_noise_model_is_told_of_a_solver_that_is_not_its_pipelines(tmp_path):
    pixart = from_file(CONFIGS, "backbone", "pixart_tiny").build()
    for solver, told in ((DPMSolver(20), False), (DDIMSolver(20), True)):
        edit.save(pixart, tmp_path / "a", DDPM(), Sampler(solver, 4.5))
        assert run(f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}") == 0
        text = (tmp_path / "out" / "README.md").read_text()
        assert (
            "# evaluated with DDIMSolver(steps=20): the scheduler of the pipeline may step otherwise" in text
        ) == told


def test_a_student_that_predicts_noise_keeps_its_pipelines_scheduler_and_the_card_says_its_times(tmp_path):
    pixart = from_file(CONFIGS, "backbone", "pixart_tiny").build()
    edit.save(pixart, tmp_path / "a", DDPM(), Sampler(Grid((1.0, 0.5), renoise=True)), run=RUN)
    assert run(f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# trained for the times 1, 0.5 (1 is noise): the scheduler of the pipeline makes its own" in text
    assert "FlowMatchEulerDiscreteScheduler" not in text


@pytest.mark.parametrize("own", [IntervalInput(), MixtureHead(components=2)])
def test_students_that_stock_diffusers_cannot_express_are_refused_by_name(own, flux, tmp_path, pipeline, capsys):
    edit.apply(flux, {"own": own})
    edit.save(flux, tmp_path / "a", sampler=Sampler(Euler(4)), run=RUN)
    for words in ((), (f"pipeline={pipeline}",), ("format=single_file",), ("format=lora",)):
        assert run(f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}", *words) == 2
        said = error_of(capsys)
        assert type(own).__name__ in said and ("'own' stays live" in said or "takes an artifact with a LoRA" in said)
    assert not (tmp_path / "out").exists()


# ---- the original single file ----------------------------------------------------------------------------------------


def thin_state(doubles: int, singles: int, guidance: bool) -> dict[str, torch.Tensor]:
    """State dict of a FLUX.1 of the true width with 2 columns to each matrix: rows are all that a layout moves."""
    with torch.device("meta"):
        model = FluxConfig(num_layers=doubles, num_single_layers=singles, guidance_embeds=guidance).build().model
    g = torch.Generator().manual_seed(0)
    shapes = {k: (v.shape[0], *(min(s, 2) for s in v.shape[1:])) for k, v in model.state_dict().items()}
    return {k: torch.randn(shape, generator=g, dtype=torch.bfloat16) for k, shape in shapes.items()}


@pytest.mark.parametrize(("doubles", "singles", "guidance"), [(3, 2, True), (1, 4, False), (12, 1, True)])
def test_the_converter_of_diffusers_gives_back_the_stock_state_dict_bit_equal(doubles, singles, guidance):
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    state = thin_state(doubles, singles, guidance)
    original = to_original(state)
    for back in (from_original(original), convert_flux_transformer_checkpoint_to_diffusers(dict(original))):
        assert back.keys() == state.keys()
        assert all(torch.equal(back[k], v) for k, v in state.items())
    prefixed = {f"model.diffusion_model.{k}": v for k, v in original.items()}
    assert from_original(prefixed).keys() == state.keys()


def test_original_names_rows_and_the_swapped_last_modulation_are_those_of_the_release(flux):
    state = flux.model.state_dict()
    original = to_original(state)
    joined = [state[f"transformer_blocks.1.attn.{n}.weight"] for n in ("to_q", "to_k", "to_v")]
    assert torch.equal(original["double_blocks.1.img_attn.qkv.weight"], torch.cat(joined))
    assert original["single_blocks.2.linear1.weight"].shape == (3 * 32 + 4 * 32, 32)
    scale, shift = state["norm_out.linear.weight"].chunk(2)
    assert torch.equal(original["final_layer.adaLN_modulation.1.weight"], torch.cat((shift, scale)))
    assert "double_blocks.0.txt_attn.norm.key_norm.scale" in original
    assert sum(v.numel() for v in original.values()) == sum(v.numel() for v in state.values())


@torch.no_grad()
def test_a_single_file_of_a_pruned_depth_is_read_back_with_equal_outputs(flux, asked, tmp_path):
    edit.apply(flux, {"shallow": DepthPruning(pattern="listed", units=(1, 3, 4))})
    edit.save(flux, tmp_path / "a")
    assert run(f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'file'}", "format=single_file") == 0
    file = tmp_path / "file" / "file.safetensors"
    assert torch.equal(read_original(file)(*asked).sample, flux(*asked).sample)
    assert run(f"artifact={file}", f"out={tmp_path / 'back'}") == 0  # and as a diffusers folder again
    got, stock = load_file(tmp_path / "back" / WEIGHTS), flux.model.state_dict()
    assert got.keys() == stock.keys() and all(torch.equal(got[k], v) for k, v in stock.items())


def test_the_configuration_of_the_releases_is_read_off_shapes():
    for config in (FluxConfig(), FluxConfig(guidance_embeds=False)):  # dev, schnell
        with torch.device("meta"):
            flux = config.build()
            read = original_config(to_original(flux.model.state_dict()))
        assert all(flux.config[k] == v for k, v in read.items())


def test_what_is_not_the_original_layout_is_refused_in_one_sentence(flux, dit, tmp_path, capsys):
    original = to_original(flux.model.state_dict())
    file, words = tmp_path / "x.safetensors", (f"artifact={tmp_path / 'x.safetensors'}", f"out={tmp_path / 'out'}")
    axes = {"edit.axes_dims_rope": "[4, 6, 6]"}
    cases = {
        "has no txt_in.weight": {k: v for k, v in original.items() if not k.startswith("txt_in")},
        "double_blocks.1 is missing": {k: v for k, v in original.items() if not k.startswith("double_blocks.1.")},
        "lora_unet.up are unknown": {**original, "lora_unet.up": torch.ones(1)},
        "has no img_in.weight": {k: v.contiguous() for k, v in flux.model.state_dict().items()},
    }
    for said, state in cases.items():
        save_file(state, file, axes)
        assert run(*words) == 2 and said in error_of(capsys)
    save_file(original, file)
    assert run(*words) == 2 and "heads of 16 channels" in error_of(capsys)
    file.write_bytes(file.read_bytes()[:100])
    assert run(*words) == 2 and "not a whole safetensors file" in error_of(capsys)
    file.unlink()
    assert run(*words) == 2 and "no file at" in error_of(capsys)
    edit.save(dit, tmp_path / "dit")
    assert run(f"artifact={tmp_path / 'dit'}", f"out={tmp_path / 'out'}", "format=single_file") == 2
    assert "original layout of FLUX.1, this is dit" in error_of(capsys)


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ("5", "got 5"),
        ('"abc"', "got 'abc'"),
        ("null", "does not say how"),
        ("{}", "got {}"),
        ("[]", "three even numbers"),
        ("[4, 6]", "three even numbers"),
        ('[4, 6, "6"]', "three even numbers"),
        ("[5, 5, 6]", "three even numbers"),
        ("[-4, 10, 10]", "three even numbers"),
        ("[true, 9, 6]", "three even numbers"),
        ("[4, 6, 8]", "the 16 channels"),
        ("[4,", "Expecting"),
    ],
)
def test_metadata_of_another_program_is_refused_in_one_sentence(axes, said, flux, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(to_original(flux.model.state_dict()), file, {"edit.axes_dims_rope": axes})
    with pytest.raises(ValueError, match=f"x.safetensors cannot be read: .*{said}") as error:
        read_original(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("img_in.weight", torch.ones(())),
        ("img_in.weight", torch.ones(32)),
        ("txt_in.weight", torch.ones(32)),
        ("final_layer.linear.weight", torch.ones(())),
        ("img_in.weight", torch.ones(0, 16)),
        ("img_in.weight", torch.ones(30, 16)),
        ("img_in.weight", torch.ones(8, 16)),
        ("img_in.bias", torch.ones(32, dtype=torch.int8)),
        ("double_blocks.0.img_attn.norm.query_norm.scale", torch.ones(0)),
        ("double_blocks.0.img_attn.norm.query_norm.scale", torch.ones(())),
        ("double_blocks.1.img_attn.qkv.weight", torch.ones(())),
        ("double_blocks.1.img_attn.qkv.weight", torch.ones(3, 32)),
        ("final_layer.adaLN_modulation.1.bias", torch.ones(1)),
        ("vector_in.in_layer.weight", torch.ones(2, 2, 2)),
    ],
    ids=lambda v: str(tuple(v.shape)) if isinstance(v, torch.Tensor) else v,
)
def test_tensors_of_another_model_are_refused_in_one_sentence(key, value, flux, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({**to_original(flux.model.state_dict()), key: value}, file, {"edit.axes_dims_rope": "[4, 6, 6]"})
    with pytest.raises(ValueError, match="x.safetensors cannot be read: ") as error:
        read_original(file)
    assert "\n" not in str(error.value) and "unpack" not in str(error.value)


# ---- weights that no file should hold --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words", "sentence"),
    [
        (float("nan"), [], "{} has weights that are not finite, 1 of"),
        (float("-inf"), ["dtype=bf16"], "{} has weights that are not finite, 1 of"),
        (-70000.0, ["dtype=fp16"], "{} has a weight of 7e+04 in size, and float16 ends at 6.55e+04"),
        (3.4e38, ["dtype=bf16"], "{} has a weight of 3.4e+38 in size, and bfloat16 ends at 3.39e+38"),
    ],
)
@pytest.mark.parametrize("layout", ["diffusers", "single_file", "lora"])
def test_weights_that_are_not_finite_or_that_a_type_cannot_hold_are_refused_by_name(
    layout, value, words, sentence, flux, tmp_path, capsys
):
    if layout == "lora":
        edit.apply(flux, {"lora": LoRA(rank=2, alpha=2, targets=("attn.to_q",))})
    edit.save(flux, tmp_path / "a")
    for file in (tmp_path / "a").glob("*.safetensors"):  # as another program may have written it
        if (layout == "lora") == (file.name == "edits.safetensors"):
            state = load_file(file)
            state[sorted(state)[-1]].view(-1)[0] = value
            save_file(state, file, {"format": "pt"})
    accept(tmp_path / "a")
    out = ["artifact=" + str(tmp_path / "a"), f"out={tmp_path / 'out'}", f"format={layout}"]
    assert run(*out, *words) == 2
    said = error_of(capsys)
    assert re.search(sentence.split("{} ")[1].replace("+", r"\+"), said) and re.match(r"[\w.]+ has ", said)
    assert not words or "not finite" in said or "use bf16 or fp32" in said
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_a_type_holds_is_exported_in_it(flux, tmp_path):
    with torch.no_grad():
        next(flux.parameters()).view(-1)[0] = -65504.0
    edit.save(flux, tmp_path / "a")
    assert run(f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}", "dtype=fp16") == 0
    assert all(v.isfinite().all() for v in load_file(tmp_path / "out" / WEIGHTS).values())


def test_an_artifact_of_weights_that_are_not_finite_is_not_saved(flux, tmp_path):
    with torch.no_grad():
        next(flux.parameters()).view(-1)[0] = float("inf")
    with pytest.raises(ValueError, match=r"^[\w.]+ has weights that are not finite, 1 of \d+$"):
        edit.save(flux, tmp_path / "a")
    assert not any(tmp_path.iterdir())


# ---- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [("attn.to_q", "proj_out", "norm1.linear"), "all-linear"])
@torch.no_grad()
def test_diffusers_loads_a_lora_with_outputs_equal_to_ours(targets, asked, tmp_path, pipeline):
    from diffusers import FluxPipeline

    flux = edit.load(pipeline).denoiser
    base = flux(*asked).sample
    edit.apply(flux, {"lora": LoRA(rank=4, alpha=6, targets=targets)})  # alpha / rank = 1.5
    randomise_lora(flux)
    edit.save(flux.eval(), tmp_path / "a")
    assert run(f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'lora'}", "format=lora") == 0
    expected = flux(*asked).sample
    assert (expected - base).abs().max() > 0.1

    pipe = FluxPipeline.from_pretrained(pipeline, **ABSENT)
    pipe.load_lora_weights(tmp_path / "lora", weight_name=LORA_WEIGHTS)
    alone = load_stock(pipeline / "transformer")
    alone.load_lora_adapter(tmp_path / "lora", weight_name=LORA_WEIGHTS, use_safetensors=True)
    with safe_open(tmp_path / "lora" / LORA_WEIGHTS, "pt") as f:
        state = {k: f.get_tensor(k) for k in f.keys()}
    bare = load_stock(pipeline / "transformer")
    bare.load_lora_adapter(state)  # a reader that sees no metadata
    for model in (pipe.transformer, alone, bare):
        # fp32: alpha / rank is applied to B here, to the product there
        torch.testing.assert_close(stock_output(model, flux, asked), expected, rtol=1e-4, atol=1e-4)


def test_only_a_lora_on_stock_layers_is_exported_as_one(flux, dit, tmp_path, capsys):
    edit.save(flux, tmp_path / "plain")
    edit.apply(flux, {"shallow": DepthPruning(), "lora": LoRA(rank=2, targets=("attn.to_q",))})
    edit.save(flux, tmp_path / "both")
    edit.apply(dit, {"lora": LoRA(rank=2)})
    edit.save(dit, tmp_path / "dit")
    cases = {"plain": "has none", "both": "shallow (DepthPruning), lora (LoRA)", "dit": "other layers than our dit"}
    for name, said in cases.items():
        assert run(f"artifact={tmp_path / name}", f"out={tmp_path / 'out'}", "format=lora") == 2
        assert said in error_of(capsys) and not (tmp_path / "out").exists()


# ---- the model card --------------------------------------------------------------------------------------------------


def make_run(flux: Flux, folder: Path, **config) -> Path:
    """A run folder as train.py leaves it."""
    sampler = Sampler(Euler(4))
    run_of = {"name": folder.name, "step": 1200, "images": 38400}
    edit.save(flux, folder / "artifact", sampler=sampler, data={"_target_": "data.sets.shapes.Shapes"}, run=run_of)
    settings = {"name": folder.name, "seed": 0, "trainer": {"max_steps": 1200}, "init": None, **config}
    OmegaConf.save(OmegaConf.create(settings), folder / "config.yaml")
    return folder


def test_the_card_tells_recipe_metrics_use_and_the_teachers_licence(flux, tmp_path, pipeline):
    student = make_run(
        edit.apply(flux, {"shallow": DepthPruning(0.5)}),
        tmp_path / "student",
        teacher={"path": str(pipeline), "guidance": 3.5},
        init="${teacher.path}",
        terms={"output": {"_target_": "edit.distillation.output.OutputKD"}},
    )
    measures = {"prompt_accuracy": {"value": 0.8125, "spread": 0.01}, "frechet": {"value": 3.25, "spread": None}}
    results = [{"guidance": 1.0, "n": 64, "quality": measures, "compared": {"psnr": {"value": 21.5, "spread": 0.3}}}]
    entry = {"name": "student", "path": str(student), "results": results}
    (student / "report.json").write_text(json.dumps({"artifacts": [entry]}))
    assert run(f"artifact={student}", f"out={tmp_path / 'out'}") == 0
    text, matter = (tmp_path / "out" / "README.md").read_text(), metadata_load(tmp_path / "out" / "README.md")
    assert matter == {
        "library_name": "diffusers",
        "license": "other",
        "license_name": "toy-licence",
        "license_link": "LICENSE.md",
        "pipeline_tag": "text-to-image",
        "tags": ["edit", "diffusion-transformer"],
    }
    assert (tmp_path / "out" / "LICENSE.md").read_text() == "for toys only\n"
    assert "| guidance | images | prompt_accuracy | frechet | psnr |" in text
    assert "| 1 | 64 | 0.8125 ± 0.01 | 3.25 | 21.5 ± 0.3 |" in text
    for word in ("training steps: 1200", "edit.pruning.depth.DepthPruning", "ratio: 0.5", "OutputKD", "guidance: 3.5"):
        assert word in text
    assert str(tmp_path) not in text and str(pipeline.parent) not in text  # folders of this machine
    assert "FluxTransformer2DModel.from_pretrained" in text and "num_inference_steps=4, guidance_scale=3.5" in text


@pytest.mark.parametrize(
    ("teacher", "licence", "name"),
    [
        ("black-forest-labs/FLUX.1-dev", "other", "flux-1-dev-non-commercial-license"),
        ("black-forest-labs/FLUX.1-schnell", "apache-2.0", None),
        ("somebody/else", "unknown", None),
    ],
)
def test_the_licence_of_a_published_teacher_covers_what_is_made_from_it(teacher, licence, name, flux, tmp_path):
    first = make_run(flux, tmp_path / "first", teacher={"path": teacher})
    second = make_run(flux, tmp_path / "second", teacher={"path": str(first)}, init=str(first / "artifact"))
    assert run(f"artifact={second}", f"out={tmp_path / 'out'}") == 0  # through the run in between
    matter = metadata_load(tmp_path / "out" / "README.md")
    assert matter is not None and (matter["license"], matter.get("license_name")) == (licence, name)
    assert (matter["base_model"], matter["base_model_relation"]) == (teacher, "finetune")


@torch.no_grad()
def test_a_lora_on_a_run_of_ours_needs_that_run_and_not_what_the_run_started_from(asked, tmp_path):
    """Pruned and tuned further by the run, so its layers and weights are nobody else's."""
    root = "black-forest-labs/FLUX.1-dev"
    flux = edit.apply(make_flux(), {"shallow": DepthPruning(pattern="listed", units=(0, 2, 3))})
    tuned = make_run(flux, tmp_path / "tuned", init=root)
    assert run(f"artifact={tuned}", f"out={tmp_path / 'base'}") == 0
    edit.apply(flux, {"lora": LoRA(rank=2, targets=("attn.to_q", "proj_out"))})
    randomise_lora(flux)
    for start in (tuned, tuned / "artifact"):
        adapter = make_run(flux, tmp_path / "adapter", init=str(start), teacher={"path": root})
        assert run(f"artifact={adapter}", f"out={tmp_path / 'lora'}", "format=lora") == 0
        text, matter = (tmp_path / "lora" / "README.md").read_text(), metadata_load(tmp_path / "lora" / "README.md")
        assert matter is not None and "base_model" not in matter and matter["license"] == "other"  # FLUX.1-dev's
        assert "This adapter needs `tuned`, the model that it was trained on. It is a run" in text
        assert 'FluxTransformer2DModel.from_pretrained("<export of tuned>"' in text and str(tmp_path) not in text
        assert f'from_pretrained("{root}"' not in text
    base = load_stock(tmp_path / "base")
    base.load_lora_adapter(tmp_path / "lora", weight_name=LORA_WEIGHTS, use_safetensors=True)
    # fp32: alpha / rank is applied to B here, to the product there
    torch.testing.assert_close(stock_output(base, flux, asked), flux.eval()(*asked).sample, rtol=1e-4, atol=1e-4)
    words = (f"artifact={adapter}", f"out={tmp_path / 'lora'}", "format=lora", f"teacher={tuned}")
    assert run(*words) == 0 and "needs `tuned`" in (tmp_path / "lora" / "README.md").read_text()  # said by hand


def test_a_lora_on_a_published_model_names_it_as_its_base(flux, tmp_path):
    edit.apply(flux, {"lora": LoRA(rank=2, targets=("attn.to_q",))})
    adapter = make_run(flux, tmp_path / "adapter", init="owner/model", teacher={"path": "owner/teacher"})
    assert run(f"artifact={adapter}", f"out={tmp_path / 'lora'}", "format=lora") == 0
    text, matter = (tmp_path / "lora" / "README.md").read_text(), metadata_load(tmp_path / "lora" / "README.md")
    assert matter is not None and (matter["base_model"], matter["base_model_relation"]) == ("owner/model", "adapter")
    assert "This adapter needs [owner/model]" in text and 'DiffusionPipeline.from_pretrained("owner/model"' in text


@pytest.mark.parametrize(
    "report",
    [
        "{",
        "[1]",
        '{"artifacts": 5}',
        '{"artifacts": [5]}',
        '{"accuracy": 0.9}',
        '{"artifacts": [{"results": 3}]}',
        '{"artifacts": [{"results": [{"quality": {}}]}]}',
        '{"artifacts": [{"results": [{"quality": [], "guidance": 1, "n": 1}]}]}',
        '{"artifacts": [{"results": [{"quality": {"psnr": 3}, "guidance": 1, "n": 1}]}]}',
        '{"artifacts": [{"results": [{"quality": {"psnr": {"value": "high"}}, "guidance": 1, "n": 1}]}]}',
        '{"artifacts": [{"name": "a"}, {"name": "b"}]}',
        '{"artifacts": [{"path": 3}, {"path": null}]}',
    ],
)
def test_a_report_of_another_program_is_left_out_of_the_card_which_says_so(report, flux, tmp_path):
    trained = make_run(flux, tmp_path / "run")
    (trained / "report.json").write_text(report)
    assert run(f"artifact={trained}", f"out={tmp_path / 'out'}") == 0
    measured = (tmp_path / "out" / "README.md").read_text().partition("## Measured\n\n")[2].partition("\n\n")[0]
    assert measured == "Parts of `report.json` were not written by `edit` and are left out."


def test_what_fits_of_a_report_is_kept(flux, tmp_path):
    trained = make_run(flux, tmp_path / "run")
    good = {"guidance": 1.0, "n": 64, "quality": {"psnr": {"value": 21.5}}}
    entries = [{"path": str(trained), "results": [good, {}]}, {"results": [good]}]
    (trained / "report.json").write_text(json.dumps({"artifacts": entries}))
    (trained / "config.yaml").write_text("a: [")  # nor was this
    assert run(f"artifact={trained}", f"out={tmp_path / 'out'}") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.count("| 1 | 64 | 21.5 |") == 1 and "Parts of `report.json`" in text
    (trained / "report.json").unlink()
    assert run(f"artifact={trained}", f"out={tmp_path / 'out'}") == 0
    assert "Measured" not in (tmp_path / "out" / "README.md").read_text()


def test_no_licence_is_claimed_that_nobody_has_given(flux, tmp_path, pipeline, capsys):
    trained = make_run(flux, tmp_path / "scratch")
    out, readme = f"out={tmp_path / 'out'}", tmp_path / "out" / "README.md"
    assert run(f"artifact={trained}", out) == 0 and "the licence is unknown" in capsys.readouterr().err
    assert (metadata_load(readme) or {})["license"] == "unknown" and "Licence: unknown" in readme.read_text()
    assert run(f"artifact={trained}", out, "license=MIT") == 0 and (metadata_load(readme) or {})["license"] == "mit"
    assert run(f"artifact={trained}", out, "license=House rules") == 0
    assert (metadata_load(readme) or {})["license_name"] == "House rules"
    mixed = make_run(flux, tmp_path / "mixed", teacher={"path": str(pipeline)}, init=str(trained))
    assert run(f"artifact={mixed}", out) == 0 and (metadata_load(readme) or {})["license"] == "unknown"
    assert "toy-licence" in readme.read_text()


def test_a_published_model_without_a_run_of_ours_is_its_own_origin(pipeline, tmp_path):
    assert run(f"artifact={pipeline}", f"out={tmp_path / 'out'}", "format=single_file") == 0
    matter = metadata_load(tmp_path / "out" / "README.md")
    assert matter is not None and matter["license_name"] == "toy-licence"


def test_hub_ids_are_told_from_folders_and_found_in_the_hubs_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert card.hub_id("owner/name") == "owner/name"
    assert card.hub_id("runs/gone") is None  # a run that was removed
    assert card.hub_id("/x/hub/models--owner--a-name/snapshots/0123/transformer") == "owner/a-name"
    (tmp_path / "config.json").write_text('{"_name_or_path": "owner/name"}')
    assert card.hub_id(str(tmp_path)) == "owner/name"


# ---- the folder, the hub, the command line ---------------------------------------------------------------------------


def test_only_a_former_export_is_replaced_and_an_error_leaves_it_whole(flux, tmp_path, capsys, monkeypatch):
    edit.save(flux, tmp_path / "a")
    out, words = tmp_path / "out", (f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}")
    out.mkdir()
    assert run(*words) == 0 and run(*words, "dtype=bf16") == 0
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    assert len({f.stat().st_mode for f in out.iterdir()}) == 1  # whoever may read one may read all

    def fail(self) -> str:
        raise OSError("No space left on device")

    capsys.readouterr()
    with monkeypatch.context() as m:
        m.setattr(card.Card, "front_matter", fail)  # the last thing written
        assert run(*words) == 2 and error_of(capsys) == "No space left on device"
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out"]
    assert run(f"artifact={out}", f"out={tmp_path / 'a'}") == 2 and "not a former export" in error_of(capsys)


def test_without_the_hub_the_folder_stays_and_one_sentence_says_so(flux, tmp_path, capsys):
    edit.save(flux, tmp_path / "a")
    out = tmp_path / "out"
    assert run(f"artifact={tmp_path / 'a'}", f"out={out}", "push=me/student") == 2  # conftest: HF_HUB_OFFLINE
    said = error_of(capsys)
    assert f"{out} is written but was not uploaded to me/student (OfflineModeIsEnabled" in said
    assert load_stock(out).config.num_layers == 3


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files asks for; what it was sent is kept on the server."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.seen.append((self.path, body))  # type: ignore[attr-defined]
        here = "http://{}:{}".format(*self.server.server_address)
        if self.headers["Authorization"] != "Bearer hf_good":
            return self.answer(401, {"error": "Invalid credentials"})
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return self.answer(200, {"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        commit = {"commitUrl": f"{here}/me/student/commit/0", "commitOid": "0", "success": True}
        self.answer(200, {"url": f"{here}/me/student", "errors": [], "warnings": [], **commit})

    def do_GET(self) -> None:
        self.answer(200, {"id": "me/student", "sha": "0", "siblings": []})

    def answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.seen = []  # type: ignore[attr-defined]
        monkeypatch.setattr(constants, "ENDPOINT", "http://{}:{}".format(*server.server_address))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_push_uploads_the_folder_into_a_private_repository_without_local_paths(flux, tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    edit.save(flux, tmp_path / "a")
    assert run(f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}", "push=me/student") == 0
    sent = dict(hub.seen)
    created = json.loads(sent["/api/repos/create"])
    assert (created["name"], created["organization"]) == ("student", "me")
    assert created.get("private") or created.get("visibility") == "private"
    lines = [json.loads(line) for line in sent["/api/models/me/student/commit/main"].splitlines()]
    files = {x["value"]["path"]: b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
    assert files.keys() == {"README.md", "config.json", "export.json", WEIGHTS}
    assert files[WEIGHTS] == (tmp_path / "out" / WEIGHTS).read_bytes()
    assert b'from_pretrained("me/student"' in files["README.md"]


def test_a_wrong_token_is_one_sentence_and_the_folder_stays(flux, tmp_path, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    edit.save(flux, tmp_path / "a")
    assert run(f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}", "push=me/student") == 2
    assert "was not uploaded to me/student" in (said := error_of(capsys)) and "401" in said
    assert (tmp_path / "out" / "README.md").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "artifact is missing: artifact=<"),
        (("artifact=x",), "out is missing: out=<"),
        (("artifact=x", "out=y", "dytpe=bf16"), "did you mean dtype?"),
        (("artifact=x", "out=y", "dtype=int4"), "dtype is one of bf16, fp16, fp32, got int4"),
        (("artifact=x", "out=y", "format=gguf"), "format is one of diffusers, single_file, lora, got gguf"),
        (("artifact=x", "out=y", "max_shard_size=big"), "max_shard_size is a size such as 5GB or 500MB, got big"),
        (("artifact=x", "out=y", "format=lora", "pipeline=p"), "pipeline= makes a diffusers folder"),
        (("artifact=x", "out=y", "push=name"), "owner/name, got name"),
        (("artifact=/no/where", "out=y"), "no artifact at /no/where"),
    ],
)
def test_mistakes_end_in_one_sentence(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2 and said in error_of(capsys) and not any(tmp_path.iterdir())


def test_the_command_line_prints_only_the_folder_and_starts_without_heavy_imports(flux, tmp_path, capsys):
    edit.save(flux, tmp_path / "a")
    assert run(f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}") == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'out'}\n" and f"writing {tmp_path / 'out'}" in said.err
    code = "import sys, recipes.export; assert not {'lightning', 'hydra', 'diffusers', 'peft'} & set(sys.modules); "
    code += "recipes.export.main(['--help'])"
    helped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONFIGS.parent)
    assert helped.returncode == 0 and "pipeline=" in helped.stdout
