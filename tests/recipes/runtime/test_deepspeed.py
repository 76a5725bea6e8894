"""DeepSpeed as far as it runs on a CPU: two gloo ranks, ZeRO-2 and ZeRO-3.

Lightning's strategy refuses a CPU; the subclass below lifts that and nothing else. DeepSpeed compiles an extension.
"""

import shutil

import pytest
import torch
from cpu_deepspeed import on_the_cpu
from ranks import run_ranks
from small_runs import TWO_RANKS, losses, train

import edit

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")
if shutil.which("g++") is None:
    pytest.skip("DeepSpeed needs a C++ compiler on a CPU", allow_module_level=True)


@pytest.mark.parametrize(
    "stage, precision, tolerance",
    [
        (2, "32-true", 1e-3),  # sums in another order, through twelve AdamW steps
        (3, "32-true", 1e-3),
        (2, "bf16-mixed", 0.05),  # against one process in fp32: bf16 carries 8 bits
    ],
)
def test_zero_trains_previews_saves_and_resumes_like_one_process(tmp_path, stage, precision, tolerance):
    train(tmp_path, "name=one", "data.batch_size=16", "optimizer.schedule=constant")
    zero = ["name=zero", f"trainer=zero{stage}", *TWO_RANKS, "data.batch_size=8", "checkpoint.every=5"]
    zero += [f"trainer.precision={precision}", "optimizer.schedule=constant"]
    zero += ["preview.every=4", "preview.count=10", "sampler.solver.steps=1"]
    short = [o.replace("max_steps=12", "max_steps=5") for o in zero]
    for overrides in (short, zero):
        run_ranks(on_the_cpu, 2, args=(tmp_path, stage, overrides), timeout=300)
    pairs = zip(losses(tmp_path, "one"), losses(tmp_path, "zero"), strict=True)
    assert all(abs(float(a) - float(b)) < tolerance for a, b in pairs)
    assert (tmp_path / "zero" / "samples" / "step_000012.png").exists()
    one, two = (edit.load(tmp_path / n).denoiser.state_dict() for n in ("one", "zero"))
    for key, value in one.items():  # twelve steps of at most the learning rate, where gradients are mostly rounding
        torch.testing.assert_close(two[key], value, rtol=0, atol=4 * tolerance)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_distils_from_a_whole_teacher_like_one_process(tmp_path, stage):
    train(tmp_path, "name=teacher", "trainer.max_steps=60", "optimizer.warmup=5")
    told = [f"teacher.path={tmp_path}/teacher", f"init={tmp_path}/teacher", "edits=depth", "data_weight=0"]
    told += ["+terms.kd._target_=edit.distillation.output.OutputKD"]
    told += ["+terms.f._target_=edit.distillation.features.FeatureKD", "+terms.f.pairs=[[0,1]]"]
    told += ["optimizer.schedule=constant", "optimizer.lr=1e-3"]
    train(tmp_path, "name=one", "data.batch_size=16", *told)
    zero = ["name=zero", f"trainer=zero{stage}", *TWO_RANKS, "data.batch_size=8", *told]
    run_ranks(on_the_cpu, 2, args=(tmp_path, stage, zero), timeout=500)
    one, two = ([float(v) for v in losses(tmp_path, n)] for n in ("one", "zero"))
    assert two == pytest.approx(one, rel=5e-3)  # sums in another order, through twelve AdamW steps


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_student_and_critic_in_one_step_like_one_process(tmp_path, stage):
    """Every parameter moves in every step there, so both roles are trained in each."""
    train(tmp_path, "name=teacher", "trainer.max_steps=60", "optimizer.warmup=5")
    told = [f"teacher.path={tmp_path}/teacher", f"init={tmp_path}/teacher", "teacher.guidance=2.0"]
    method = "edit.few_step.distribution_matching.DistributionMatching"
    told += [f"matching={{_target_: {method}, every: 1, together: true}}"]
    told += ["sampler=grid", "sampler.solver.renoise=true"]
    told += ["optimizer.schedule=constant", "optimizer.lr=1e-3", "trainer.clip=null"]  # DeepSpeed clips both together
    train(tmp_path, "name=one", "data.batch_size=16", *told)
    zero = ["name=zero", f"trainer=zero{stage}", *TWO_RANKS, "data.batch_size=8", *told]
    run_ranks(on_the_cpu, 2, args=(tmp_path, stage, zero), timeout=500)
    one, two = ([float(v) for v in losses(tmp_path, n)] for n in ("one", "zero"))
    assert two == pytest.approx(one, rel=1e-2)  # as above; a rollout amplifies
