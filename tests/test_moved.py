"""What older versions wrote is read: each path here stood in a file of version 0.1 and is never changed."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import edit
from edit.denoiser import Edit
from edit.edits import rebuild
from edit.inputs.trust import named
from edit.moved import COMMANDS, current
from recipes.config.older import bring_up_to_date

ROOT = Path(__file__).parents[1]
FROZEN = """
edit.attention.linear.LinearAttention edit.backbones.dit.DiTConfig edit.backbones.dit_diffusers.DiTDiffusersConfig
edit.backbones.flux.FluxConfig edit.backbones.pixart.PixArtConfig edit.backbones.qwen_image.QwenImageConfig
edit.backbones.sd3.SD3Config edit.distillation.add.ADD edit.distillation.attention.AttentionKD
edit.distillation.combined.Combined edit.distillation.consistency.Consistency
edit.distillation.consistency.PhasedConsistency edit.distillation.distribution_matching.DistributionMatching
edit.distillation.endpoint.CachedEndpoint edit.distillation.endpoint.Endpoint edit.distillation.features.FeatureKD
edit.distillation.flash.Flash edit.distillation.flow_map.IntervalInput edit.distillation.intervals.IntervalKD
edit.distillation.ladd.LADD edit.distillation.mean_flow.MeanFlow edit.distillation.modulation.ModulationApproximator
edit.distillation.output.OutputKD edit.distillation.policy.MixtureHead edit.distillation.policy.PolicyImitation
edit.distillation.policy.PolicySolver edit.distillation.progressive.Progressive edit.distillation.reflow.Reflow
edit.distillation.shortcut.Shortcut edit.distillation.student.Collapse edit.distillation.student.FixedGuidance
edit.distillation.student.GuidanceInput edit.distillation.trajectory_matching.TrajectoryMatching
edit.distillation.trig.SCM edit.distillation.vision.Vision edit.objectives.DDPM edit.objectives.FlowMatching
edit.objectives.LogitNormal edit.objectives.Ramp edit.objectives.Shifted edit.objectives.Uniform
edit.pruning.depth.DepthPruning edit.pruning.patterns.aligned edit.pruning.tinyfusion.TinyFusion
edit.pruning.width.FeedForwardWidth edit.pruning.width.TextFeedForwardLinear edit.routing.dydit.DyDiT
edit.routing.elastic.Elastic edit.sampling.DDIMSolver edit.sampling.DDPMSolver edit.sampling.DPMSolver
edit.sampling.Euler edit.sampling.EulerMaruyama edit.sampling.Grid edit.sampling.Heun edit.sampling.Sampler
edit.sampling.StockEuler edit.tuning.lora.LoRA edit.tuning.td_lora.TDLoRA
data.captioned_digits.CaptionedDigits data.digits.Digits data.digits.DigitsAndShades data.digits.MovedDigits
data.image_folder.ImageFolder data.image_shards.ImageShards data.latents.Latents data.shapes.Shapes
""".split()


@pytest.mark.parametrize("path", FROZEN)
def test_a_path_of_version_0_1_names_the_class_that_it_named(path):
    now = current(path)
    found = getattr(import_module(now.rpartition(".")[0]), now.rpartition(".")[2])
    assert found.__name__ == path.rpartition(".")[2] and found.__module__ == now.rpartition(".")[0]
    if isinstance(found, type):
        assert named(path, ("edit", "data")) is found


def test_an_edit_of_an_older_artifact_is_rebuilt():
    written = {"_target_": "edit.distillation.student.FixedGuidance", "guidance": 2.5}
    assert rebuild(written, kind=Edit).guidance == 2.5


def test_a_configuration_of_an_older_run_is_brought_up_to_date():
    cfg = OmegaConf.create({"x": "${y}", "y": [{"_target_": "data.digits.Digits"}], "z": {"_target_": "mine.Net"}})
    OmegaConf.set_readonly(cfg, True)
    bring_up_to_date(cfg)
    assert cfg.y[0]._target_ == "data.sets.digits.Digits" and cfg.z._target_ == "mine.Net"
    assert OmegaConf.is_interpolation(cfg, "x") and OmegaConf.is_readonly(cfg)


def test_a_stage_of_an_older_run_is_brought_up_to_date():
    cfg = OmegaConf.create({"before": [["seed=1"], ["${y}", "a=1"]], "after": [["edit.export", "out=a"]], "y": "???"})
    OmegaConf.set_readonly(cfg, True)
    bring_up_to_date(cfg)
    assert cfg.after == [["recipes.export", "out=a"]] and OmegaConf.is_interpolation(cfg.before[1], 0)


@pytest.mark.parametrize("old", COMMANDS)
def test_a_former_command_tells_its_new_name(old):
    done = subprocess.run([sys.executable, "-m", old], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and f"`python -m {COMMANDS[old]}`" in done.stderr and done.stderr.count("\n") == 1
    assert import_module(COMMANDS[old]).main


def test_no_other_file_knows_a_former_path():
    for file in [f for package in ("edit", "recipes", "data", "configs") for f in (ROOT / package).rglob("*.*")]:
        if file.suffix in (".py", ".yaml") and file != Path(edit.__file__).with_name("moved.py"):
            words = set(file.read_text().replace(",", " ").replace("}", " ").split())
            assert not words & {path for path in FROZEN if current(path) != path}, file
