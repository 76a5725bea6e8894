"""DeepSpeed as far as it runs on a CPU: two gloo ranks, ZeRO-2 and ZeRO-3.

Lightning's strategy refuses a CPU; the subclass below lifts that and nothing else. DeepSpeed compiles an extension.
"""

import os
import shutil

import pytest
import torch
from ranks import run_ranks
from runs import TWO_RANKS, losses, train

import edit

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")
if shutil.which("g++") is None:
    pytest.skip("DeepSpeed needs a C++ compiler on a CPU", allow_module_level=True)


def on_the_cpu(folder, stage, overrides):
    os.environ["DS_ACCELERATOR"] = "cpu"
    from lightning.pytorch.strategies import DeepSpeedStrategy

    import recipes.trainer

    class CPUDeepSpeed(DeepSpeedStrategy):
        def __init__(self):
            super().__init__(stage=stage, zero_allow_untested_optimizer=True, process_group_backend="gloo")
            self.config["zero_force_ds_cpu_optimizer"] = False

        def setup_environment(self):
            super(DeepSpeedStrategy, self).setup_environment()

        def setup_distributed(self):
            self.set_world_ranks()
            self._init_deepspeed_distributed()

        root_device = property(lambda self: torch.device("cpu", 0))

    recipes.trainer.make_strategy = lambda t, devices: CPUDeepSpeed()
    train(folder, *overrides)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_saves_and_resumes_like_one_process(tmp_path, stage):
    train(tmp_path, "name=one", "data.batch_size=16", "optimizer.schedule=constant")
    zero = (f"trainer=zero{stage}", *TWO_RANKS, "data.batch_size=8", "checkpoint.every=5")
    short = [o.replace("max_steps=12", "max_steps=5") for o in zero]
    run_ranks(on_the_cpu, 2, args=(tmp_path, stage, ("name=zero", *short, "optimizer.schedule=constant")), timeout=300)
    run_ranks(on_the_cpu, 2, args=(tmp_path, stage, ("name=zero", *zero, "optimizer.schedule=constant")), timeout=300)
    # digits of fp32 sums in another order, through twelve AdamW steps
    pairs = zip(losses(tmp_path, "one"), losses(tmp_path, "zero"), strict=True)
    assert all(abs(float(a) - float(b)) < 1e-3 for a, b in pairs)
    one, two = (edit.load(tmp_path / n).denoiser.state_dict() for n in ("one", "zero"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=4e-3)
