"""The command line plans the run that train.py would make of the same words."""

import json
from pathlib import Path

import pytest
import torch

from edit.backbones.flux import FluxConfig
from edit.measuring.memory import seconds
from recipes.plan import main

TINY = ["backbone.depth=2", "data.batch_size=8"]


def report(*settings: str, capsys) -> dict:
    code = main([*settings, "--json"])
    captured = capsys.readouterr()
    assert captured.out, captured.err
    out = json.loads(captured.out)
    assert code == (0 if out["fits"] else 1)
    return out


def test_the_command_line_plans_what_train_would_run(capsys):
    r = report(*TINY, "trainer=ddp", "devices=4", "peak=100", capsys=capsys)
    assert (r["devices"], r["batch"], r["strategy"], r["precision"]) == (4, 8, "ddp", "bf16-mixed")
    assert r["sample"] == [1, 8, 8] and r["notes"] == []  # the digits' own
    assert r["total"] == pytest.approx(sum(r["memory"].values())) and r["fits"]
    assert r["activations_with_checkpointing"] < r["activations_without_checkpointing"]
    flops = 2 * 3 * r["macs"]
    assert r["seconds_per_step"] == pytest.approx(seconds(flops * 8, 100e12))
    assert r["seconds"] == pytest.approx(r["seconds_per_step"] * r["steps"])


def test_moments_of_a_byte_leave_10_bytes_per_fp32_parameter_of_a_run(capsys):
    exact, small = (report(*TINY, f"optimizer.kind={kind}", capsys=capsys) for kind in ("adamw", "adamw8bit"))
    assert exact["memory"]["optimizer"] == 8 * exact["parameters"]
    assert small["memory"]["optimizer"] == 2 * small["parameters"]
    assert exact["total"] - small["total"] == 6 * small["parameters"]


def test_on_a_cpu_time_is_not_guessed(capsys):
    assert report(*TINY, capsys=capsys)["seconds"] is None


def test_a_teacher_that_is_not_here_is_stood_in_for_and_said_so(capsys):
    r = report(*TINY, "teacher={path: not_here, placement: replicated}", capsys=capsys)
    assert r["teacher_parameters"] == r["parameters"] and r["memory"]["teacher"] == 4 * r["parameters"]
    assert "teacher.path=not_here cannot be read here" in r["notes"][0] and "stands in" in r["notes"][0]
    tied = report(*TINY, "edits=lora", "teacher={placement: tied}", capsys=capsys)
    assert tied["memory"]["teacher"] == 0 and tied["trained"] < tied["parameters"]


def test_a_few_step_run_is_planned_with_its_critic(capsys):
    method = "matching={_target_: edit.few_step.distribution_matching.DistributionMatching, grid: [1.0, 0.5]}"
    r = report(*TINY, "teacher.path=not_here", method, capsys=capsys)
    assert r["critic_parameters"] == r["parameters"] and r["memory"]["critic"] == 12 * r["parameters"]
    assert r["calls"]["critic"]["weights"] == pytest.approx(0.8)
    assert main([*TINY, "teacher.path=not_here", method]) in (0, 1)
    out = " ".join(capsys.readouterr().out.split())
    assert "critic (" in out and "critic 0.8 and 0.2 without gradient" in out


def test_an_edit_is_planned_without_the_artifact_that_it_will_edit(capsys):
    whole = report("data.batch_size=8", capsys=capsys)
    pruned = report("experiment=dit_digits/depth", "data.batch_size=8", capsys=capsys)
    assert pruned["parameters"] < 0.6 * whole["parameters"] and pruned["macs"] < 0.6 * whole["macs"]


def test_a_search_over_flux_trains_its_lora_and_the_logits_of_its_pairs_of_units(capsys):
    less = ("backbone.path=not_here", "backbone.num_layers=1", "backbone.num_single_layers=2", "devices=8")
    r = report("experiment=flux_dev/tinyfusion_search", *less, capsys=capsys)
    with torch.device("meta"):
        flux = FluxConfig(num_layers=1, num_single_layers=2).build()
    lora = sum(8 * (m.in_features + m.out_features) for m in flux.modules() if isinstance(m, torch.nn.Linear))
    assert r["trained"] == lora + 2 * 2  # a pair of single units, and a double one by itself
    assert r["parameters"] == sum(p.numel() for p in flux.parameters()) + r["trained"]


def test_settings_that_do_not_decide_the_structure_may_be_missing(capsys):
    words = ["backbone=flux_tiny", "data=latents", "objective=flow", "trainer=zero3", "devices=2", "data.batch_size=1"]
    r = report(*words, "image=256", "text=16", capsys=capsys)
    assert r["sample"] == [12, 32, 32] and r["text_per_prompt"] == 16 * 64 * 2
    assert r["memory"]["transients"] > 0


def test_the_table_says_whether_it_fits_and_what_would_help(capsys):
    assert main([*TINY, "gpu=0.001"]) == 1
    out = capsys.readouterr().out
    assert "It does not fit" in out and "gradient_checkpointing=true" in out and "optimiser" in out
    assert main([*TINY, "peak=100"]) == 0
    assert "seconds per step" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (["bakbone=dit_tiny"], "unknown key 'bakbone'; did you mean 'backbone'"),
        (["backbone=dit_digitz"], "there is no backbone named 'dit_digitz'"),
        (["backbone.depth=deep"], "backbone.depth: expected int at least 1 and at most 1024, got 'deep'"),
        (["gpu=big"], "gpu: expected a number, got 'big'"),
        (["gpu=-1"], "gpu must be positive, got -1.0; the default is 80"),
        (["image=big"], "image is a number of pixels, or rows x columns as in 1024x768, got 'big'"),
        (["image=16"], "takes samples of 1x8x8, got 1x16x16"),
        (["devices=2"], "uses 1 device, got 2: choose trainer=ddp or fsdp2"),
        (["devices=0"], "devices is a number from 1 to 1000000, or auto, got 0"),
        (["devices=true"], "devices is a number from 1 to 1000000, or auto, got True"),
        (["peak=nan"], "peak must be a finite number or None, got nan"),
        (["text=99999999999"], "text must be at most 100000, got 99999999999"),
        (["seed=-1"], "seed: expected a number from 0 to 4294967295, got -1"),
        (["mfu=2"], "mfu must be at most 1, got 2"),
        (["experiment=sd3_tiny/add"], "matching.vision.path has no value; give one with matching.vision.path="),
        (["teacher={path: x,placement: sharded}"], "teacher.placement=sharded needs several devices"),
    ],
)
def test_a_mistake_ends_in_one_sentence(settings, sentence, capsys):
    assert main(settings) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and err[0].startswith("error: ") and sentence in err[0]


def test_what_a_stage_will_make_is_refused_with_the_command_of_that_stage(tmp_path, capsys):
    assert main(["experiment=dit_digits/repa", f"runs={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert f"no folder {tmp_path}/dit_digits_encoder/encoder" in said
    assert said.strip().endswith(f"python train.py experiment=dit_digits/encoder runs={tmp_path}")


def test_devices_that_cannot_be_counted_are_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["trainer=ddp"]) == 2
    assert "say devices=8" in capsys.readouterr().err


def test_help_is_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert "devices=N" in out and "experiment=" in out


# ---- rollouts, of toys ----------------------------------------------------------------------------------------------

SMALL = ["backbone.hidden_size=32", "backbone.num_heads=2", "backbone.depth=2", "data.batch_size=4", "recipe=rollout"]
SMALL += ["sampler.solver.steps=4", "sampler.guidance=2.0", "trusted=[toy_rollouts]"]
LESSON = ["+edits.ahead={_target_: toy_rollouts.Ahead}", "recipe.method={_target_: toy_rollouts.Lesson}"]
ROUTED = ["+edits.mixed={_target_: toy_rollouts.Mixed}", "recipe.method={_target_: toy_rollouts.Harmony, every: 4}"]


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "toys"))


def test_of_a_rollout_the_forwards_of_an_update_are_counted_and_what_its_edits_remember(toys, capsys):
    r = report(*SMALL, *LESSON, capsys=capsys)
    # an update: a full and a cached evaluation, each with its teacher, all with guidance in one batch
    assert r["calls"] == {"student": {"nothing": 6.0, "input": 2.0}}
    tokens = 4 * 32 * 4  # of one branch, bytes
    assert r["memory"]["caches"] == 4 * 2 * 4 * tokens  # samples, branches, evaluations
    megabytes = 4 * (64 + 2 * 4 * 32) * 2 / 1e6  # evaluations; pixels; branches, tokens, width; bytes
    assert any(f"would take {megabytes:.3g} MB per sample" in n for n in r["notes"])
    main([*SMALL, *LESSON])
    out = " ".join(capsys.readouterr().out.split())
    assert "student 2 to its input and 6 without gradient" in out and "memory of edits between evaluations" in out


def test_the_plan_of_a_rollout_says_what_it_does_not_know_and_counts_another_teacher(toys, capsys):
    r = report(*SMALL, *ROUTED, "teacher.path=not_here", capsys=capsys)
    assert r["calls"]["teacher"] == {"nothing": 2.0}
    assert r["calls"]["student"] == {"nothing": pytest.approx(2 / 3), "input": 2.0}
    assert any("neither known nor counted" in n for n in r["notes"]) and any("every 4 updates" in n for n in r["notes"])


def test_calibration_is_no_training_to_plan(capsys):
    assert main(["recipe=calibrate", "init=not_here", "edits=reuse"]) == 2
    assert "Calibrating trains nothing, so there is no training to plan" in capsys.readouterr().err
