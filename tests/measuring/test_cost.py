"""Costs are counted on what runs, measured with their spread, and asked for on one line."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from experts import Experts
from torch import nn

import edit
from edit.backbones.dit import DiTConfig
from edit.denoiser import Denoiser, Edit
from edit.edits import per_token
from edit.measuring.cost import Cost, _Reads, cost, count_forward, macs, twin
from edit.pruning.depth import DepthPruning
from edit.sampling import Sampler
from edit.solvers import DDIMSolver, Euler, Heun
from recipes.cost import main, show
from recipes.report.amounts import short

# methods/sit-dit-baseline.md: width, depth, heads, GMACs of the blocks at 256 px for patches 2, 4, 8
TABLE = {
    "s": (384, 12, (6.05, 1.41, 0.35)),
    "b": (768, 12, (22.99, 5.55, 1.41)),
    "l": (1024, 24, (80.68, 19.68, 5.00)),
    "xl": (1152, 28, (118.60, 29.03, 7.37)),
}
ROWS = [(size, patch, gmacs) for size, (*_, row) in TABLE.items() for patch, gmacs in zip((2, 4, 8), row, strict=True)]
FIRST = [("s", 2), ("b", 4), ("l", 8)]  # each size, but XL/2, which has a test of its own, and each patch
CHOSEN = [r if r[:2] in FIRST else pytest.param(*r, marks=pytest.mark.slow) for r in ROWS]


def backbone(*settings: str, capsys) -> dict:
    """What `python -m recipes.cost ... --json` prints."""
    assert main([*settings, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@dataclass
class Alternate(Edit):
    """Skips unit `unit` at every odd step of a generation: the smallest step-dependent method."""

    unit: int = 1

    def apply(self, denoiser: Denoiser) -> None:
        own = denoiser.units[self.unit]
        denoiser.units[self.unit] = lambda s: s if s.step is not None and s.step.index % 2 else own(s)


@dataclass
class Hesitate(Edit):
    """Skips unit 1 if the stream's mean is negative: a decision that the meta device cannot take."""

    def apply(self, denoiser: Denoiser) -> None:
        own = denoiser.units[1]
        denoiser.units[1] = lambda s: s if s.image.mean().item() < 0 else own(s)


# ---- counting -------------------------------------------------------------------------------------------------------


def test_dit_xl_2_costs_the_published_multiply_accumulates_and_parameters(capsys):
    report = backbone("backbone=dit_xl_2", capsys=capsys)
    assert report["macs"] == pytest.approx(118.64e9, rel=5e-3)
    assert report["parameters"] + report["buffers"] == 675_129_632  # the official count includes the position table
    assert report["activated"] == report["parameters"]
    assert report["training_flops"] == 6 * report["macs"]


@pytest.mark.parametrize(("size", "patch", "gmacs"), CHOSEN)
def test_the_count_is_the_formula_and_its_blocks_are_the_published_row(size, patch, gmacs, capsys):
    width, depth, _ = TABLE[size]
    tokens, channels = (32 // patch) ** 2, 4 * patch**2
    blocks = depth * (tokens * 12 * width**2 + 2 * tokens**2 * width + 6 * width**2)
    embedders = tokens * channels * width + 256 * width + width**2
    head = 2 * width**2 + tokens * width * 2 * channels
    assert backbone(f"backbone=dit_{size}_{patch}", capsys=capsys)["macs"] == blocks + embedders + head
    # 0.5 %, or half of the last digit that the table prints
    assert blocks / 1e9 == pytest.approx(gmacs, rel=5e-3, abs=5e-3)


def test_counting_on_the_meta_device_equals_counting_a_real_run(dit):
    sampler = Sampler(Heun(3), guidance=1.5)
    assert cost(dit, sampler, batch=2) == cost(dit, sampler, batch=2, real=True)


def test_a_generation_costs_all_evaluations_of_all_guidance_branches(dit):
    one = macs(dit)
    plain = cost(dit, Sampler(Euler(10)))
    assert (plain.evaluations, plain.macs_per_image) == (10, 10 * one)
    guided = cost(dit, Sampler(Heun(10), guidance=2.0))
    assert (guided.evaluations, guided.macs_per_image) == (38, 38 * one)
    # times 1, 0.9, ..., 0.1 of which 0.3 to 0.7 are guided
    part = cost(dit, Sampler(Euler(10), guidance=2.0, interval=(0.25, 0.75)))
    assert part.macs_per_image == 15 * one


def test_schedulers_of_diffusers_run_as_they_are(make_dit):
    denoiser = make_dit(time="ddpm", learn_sigma=True)
    counted = cost(denoiser, Sampler(DDIMSolver(7), guidance=1.5))
    assert counted.macs_per_image == 14 * counted.macs


def test_the_batch_does_not_change_the_cost_per_image(dit):
    assert replace(cost(dit, batch=4), batch=1) == cost(dit, batch=1)


def test_dropped_units_are_absent_from_the_count(make_dit):
    whole, pruned = make_dit(depth=4), make_dit(depth=4)
    edit.apply(pruned, {"depth": DepthPruning(ratio=0.5)})
    thin, full = cost(pruned), cost(whole)
    shallow = macs(make_dit(depth=2))
    assert thin.macs == shallow < full.macs
    assert thin.parameters < full.parameters


@pytest.mark.parametrize("real", [False, True])
def test_a_unit_skipped_at_odd_steps_is_not_counted_there(make_dit, real):
    denoiser = edit.apply(make_dit(depth=3), {"alternate": Alternate()})
    full, skipping = macs(make_dit(depth=3)), macs(make_dit(depth=2))
    counted = cost(denoiser, Sampler(Euler(6)), real=real)
    assert counted.macs_per_image == 3 * full + 3 * skipping


def test_a_decision_on_activations_is_refused_without_weights_and_counted_with_them(make_dit):
    denoiser = edit.apply(make_dit(), {"hesitate": Hesitate()})
    with pytest.raises(ValueError, match="cannot be counted without weights, count a real run"):
        cost(denoiser)
    assert cost(denoiser, Sampler(Euler(2)), real=True).macs in (macs(make_dit(depth=2)), macs(make_dit(depth=3)))


def test_counting_leaves_the_denoiser_as_it_was(dit):
    dit.train()
    before = {k: v.clone() for k, v in dit.state_dict().items()}
    cost(dit, Sampler(Euler(2)))
    assert dit.training and next(dit.parameters()).device.type == "cpu"
    assert all(torch.equal(v, before[k]) for k, v in dit.state_dict().items())


def test_a_skipped_unit_activates_none_of_its_parameters(make_dit):
    denoiser = make_dit(depth=3)
    denoiser.units[1] = lambda stream: stream
    counted = count_forward(denoiser, denoiser.example(), 1)
    unit = sum(p.numel() for p in denoiser.model.blocks[1].parameters())
    assert counted.activated == sum(p.numel() for p in denoiser.parameters()) - unit


def test_of_experts_a_token_takes_one_and_a_batch_reads_all(dit, capsys):
    def table() -> tuple[Cost, str]:
        counted = cost(dit, Sampler(Euler(1)))
        show({**counted.as_dict(), "backbone": "dit"})
        return counted, capsys.readouterr().out

    whole, printed = table()
    assert "per_token" not in whole.as_dict() and "per token" not in printed
    edit.apply(dit, {"experts": Experts(count=8, units=(0, 2))})
    stacked = sum(p.numel() for m in dit.edits["experts"].values() for p in (m.up, m.down))
    counted, printed = table()
    assert counted.as_dict()["per_token"] == counted.parameters - stacked * 7 // 8
    assert counted.activated == counted.parameters == sum(p.numel() for p in dit.parameters())
    row = next(line for line in printed.splitlines() if "activated per token" in line)
    assert short(counted.parameters - stacked * 7 // 8) in row and "read by a forward of 1" in printed


@pytest.mark.parametrize("share", [-0.5, 1.5])
def test_a_part_of_a_parameter_that_is_no_part_is_refused(dit, share, monkeypatch):
    edit.apply(dit, {"experts": Experts()})
    monkeypatch.setattr(Experts, "activated", lambda self, d: {"edits.experts.0.up": share})
    with pytest.raises(ValueError, match=f"of edits.experts.0.up it is {share}"):
        per_token(dit)
    monkeypatch.setattr(Experts, "activated", lambda self, d: {"up": 0.5})
    with pytest.raises(ValueError, match="experts: `activated` names up, and this dit has no such parameter"):
        per_token(dit)


def test_of_a_sliced_weight_only_the_slice_is_activated():
    experts = nn.ParameterList([nn.Parameter(torch.randn(4, 6, 8))])
    x = torch.randn(3, 6)
    with _Reads() as reads, torch.no_grad():
        x @ experts[0][1]  # one expert of four
        x @ experts[0][2][:, :5]  # five columns of another
        x @ experts[0][2][:, :3]  # which include these three
    assert reads.elements(experts) == 6 * 8 + 6 * 5


def test_a_twin_has_the_structure_and_no_weights(make_dit):
    denoiser = edit.apply(make_dit(depth=4), {"depth": DepthPruning(ratio=0.5)})
    copy = twin(denoiser)
    assert len(copy.units) == 2 and all(p.is_meta for p in copy.parameters())
    assert [p.shape for p in copy.parameters()] == [p.shape for p in denoiser.parameters()]


# ---- measuring ------------------------------------------------------------------------------------------------------


def test_measuring_reports_time_and_memory_beside_the_counts(dit):
    measured = cost(dit, Sampler(Euler(2)), batch=2, rounds=3)
    assert measured.forward and measured.generation and measured.peak_memory
    assert measured.forward.count == measured.generation.count == 3
    weights = sum(v.nbytes for v in dit.state_dict().values())
    assert weights < measured.peak_memory < 3 * weights
    assert json.loads(json.dumps(measured.as_dict()))["forward"]["median"] > 0
    weights = 4 * sum(v.numel() for v in (*dit.parameters(), *dit.buffers()))
    assert measured.resident == weights < measured.peak_memory


def test_nothing_can_be_timed_on_the_meta_device():
    with torch.device("meta"):
        denoiser = DiTConfig(input_size=8, hidden_size=32, depth=1, num_heads=4).build()
    with pytest.raises(ValueError, match="meta device"):
        cost(denoiser, rounds=1)


# ---- command line ---------------------------------------------------------------------------------------------------


def test_settings_on_the_command_line_change_what_is_counted(capsys):
    settings = ("backbone=dit_tiny", "backbone.depth=3", "sampler=heun", "sampler.steps=4", "guidance=1.5", "batch=2")
    report = backbone(*settings, capsys=capsys)
    tiny = DiTConfig(input_size=8, patch_size=2, hidden_size=64, depth=3, num_heads=4, num_classes=10)
    assert report["macs"] == macs(tiny.build()) and report["evaluations"] == 14 and report["device"] == "meta"


def test_edits_of_the_configuration_are_counted(capsys):
    report = backbone("backbone=dit_tiny", "edits=depth", "edits.depth.ratio=0.25", capsys=capsys)
    assert report["macs"] == backbone("backbone=dit_tiny", "backbone.depth=3", capsys=capsys)["macs"]


def test_an_artifact_is_counted_with_its_own_sampler_and_timed(dit, tmp_path, capsys):
    edit.save(dit, tmp_path / "artifact", sampler=Sampler(Euler(3), guidance=2.0))
    assert main([f"artifact={tmp_path}", "--latency", "--rounds", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["macs_per_image"] == 6 * macs(dit) and report["forward"]["count"] == 2 and report["device"] == "cpu"


def test_a_lower_bound_is_called_one_in_the_table(capsys):
    report = backbone("backbone=dit_tiny", capsys=capsys)
    show(report | {"uncounted": ["aten.mv.default"]})
    text = capsys.readouterr().out
    assert text.count("at least") == 3 and "aten.mv.default" in text
    show(report)
    assert "at least" not in capsys.readouterr().out


def test_the_table_names_its_numbers(capsys):
    assert main(["backbone=dit_tiny"]) == 0
    text = capsys.readouterr().out
    lines = [line.strip("│ ").split("│")[0].strip() for line in text.splitlines()]
    assert "parameters" in lines
    # MACs of 50 forwards and FLOPs of one training step are told apart by what they are for
    generate, train = lines.index("to generate one image: forwards"), lines.index("to train on one sample: forwards")
    assert lines[generate + 1] == "MACs of all of them" and lines[train + 1] == "FLOPs (2 per MAC)"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["backbone=dit_xl"], "no backbone named dit_xl: the nearest are dit_xl_"),
        (["backbone=dit_tiny", "backbone.dept=3"], "backbone.dept: there is no such setting; the nearest are depth"),
        (["backbone=dit_tiny", "backbone.depth=six"], "backbone.depth takes int, such as 4, got 'six'"),
        (["backbone=dit_tiny", "backbone.depth=[1"], "backbone.depth takes int"),
        (["backbone=dit_tiny", "bach=3"], "did you mean batch?"),
        (["backbone=dit_tiny", "batch=0"], "batch must be at least 1, got 0"),
        (["backbone=dit_tiny", "batch=99999999999999"], "batch must be at most 100000, got 999"),
        (["backbone=dit_tiny", "batch=\u00b2"], "batch: expected a whole number, got"),
        (["backbone=dit_tiny", "--latency", "--rounds", "-1"], "--rounds is a number from 1 to 10000, got -1"),
        (["backbone=dit_tiny", "--rounds", "0"], "--rounds is a number from 1 to 10000, got 0"),
        (["backbone=dit_tiny", "--device", "cuda:99"], "device=cuda:99 is not on this machine, which has cpu"),
        (["backbone=dit_tiny", "--device", "meta", "--real"], "device=meta is not on this machine"),
        (["backbone=dit_tiny", "guidance=NaN"], "guidance must be a finite number or None, got nan"),
        (["backbone=dit_tiny", "sampler=euler", "sampler.steps=0"], "Euler: steps must be at least 1, got 0"),
        (["backbone=dit_tiny", "sampler=ddim"], "use Euler, Heun or EulerMaruyama"),
        (["backbone=dit_tiny", "backbone.patch_size=3"], "patch_size 3 does not divide input_size 8"),
        (["artifact=/nowhere"], "no artifact at /nowhere"),
        ([], "say what to count"),
        (["artifact=a", "edits=depth"], "an artifact has its own backbone and edits"),
        (["backbone=dit_tiny", "--configs", "/nowhere"], "give the folder with --configs"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(settings, said, capsys):
    assert main(settings) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and said in printed.err and printed.err.count("\n") == 1


def test_the_module_runs_as_a_program_without_hydra_or_lightning():
    code = (
        "import sys, recipes.cost; assert recipes.cost.main(['backbone=dit_tiny', '--json']) == 0; "
        "assert not {'hydra', 'lightning', 'diffusers'} & set(sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["backbone"] == "dit_tiny"
