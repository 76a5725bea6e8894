"""Steps of a stock pipeline, as a card states them, are those of the artifact's sampler."""

import ast
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exports import ABSENT, error_of, make_run, run

import edit
from edit import noise
from edit.artifacts.steps import steps_of
from edit.backbones.flux import Flux
from edit.edits import describe
from edit.few_step.consistency import Consistency
from edit.few_step.flow_map import IntervalInput
from edit.few_step.policy import MixtureHead
from edit.objectives import DDPM, FlowMatching, RescaledFlow
from edit.sampling import Sampler
from edit.solvers import DDIMSolver, DPMSolver, Euler, Grid, Heun, StockEuler, times
from edit.tuning.lora import LoRA
from recipes.cost import from_file

CONFIGS = Path(__file__).parents[2] / "configs"


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


def test_louder_noise_than_a_pipelines_is_remarked(make_flux, tmp_path):
    for scale, remarks in ((1.0, ()), (4.0, ("# trained with 4 times the noise: multiply the first latents by it",))):
        folder = tmp_path / f"{scale}"
        edit.save(make_flux(), folder, objective=RescaledFlow(scale=scale), sampler=Sampler(Euler(4)))
        assert steps_of(edit.load(folder)).remarks == remarks
