"""DeepSpeed without a GPU: the strategy of a run, replaced by one that computes on the CPU."""

import os

import torch
from small_runs import train


def on_the_cpu(folder, stage, overrides):
    os.environ["DS_ACCELERATOR"] = "cpu"
    from lightning.pytorch.strategies import DeepSpeedStrategy

    import recipes.runtime.trainer

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

    recipes.runtime.trainer.make_strategy = lambda t, devices, turns: CPUDeepSpeed()
    train(folder, *overrides)
