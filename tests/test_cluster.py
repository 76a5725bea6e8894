"""The README's lines for clusters: the launch on two nodes runs, and the batch script asks for what its run uses."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from small_runs import SMALL, rows

from recipes.config.check import check
from recipes.config.sources import register

ROOT = Path(__file__).parents[1]
SECTION = (ROOT / "README.md").read_text().split("## On a cluster")[1].split("\n## ")[0]
SCRIPT, LAUNCH = re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL)


def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


def composed(words):
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        cfg = compose("train", words)
    assert check(cfg) == []
    return cfg


def test_the_batch_script_starts_as_many_tasks_as_its_run_has_ranks():
    asked = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", SCRIPT))
    line = re.search(r"^srun .*?[^\\]$", SCRIPT, re.MULTILINE | re.DOTALL)[0].replace("\\\n", " ")
    known = {"SLURM_NTASKS_PER_NODE": asked["ntasks-per-node"], "SLURM_JOB_NUM_NODES": asked["nodes"]}
    words = shlex.split(re.sub(r"\$(\w+)", lambda name: known[name[1]], line))
    assert words[:3] == ["srun", "python", "train.py"]
    cfg = composed(words[3:])
    assert (str(cfg.trainer.devices), str(cfg.trainer.num_nodes)) == (asked["gpus-per-node"], asked["nodes"])
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] and cfg.trainer.strategy != "single"
    assert asked["signal"].startswith("USR1@")  # which saves the step, see recipes/runtime/callbacks.py
    assert subprocess.run(["bash", "-n"], input=SCRIPT, text=True).returncode == 0


def test_the_launch_on_two_nodes_starts_as_many_processes_as_its_run_has_ranks():
    before, after = (shlex.split(part) for part in LAUNCH.replace("\\\n", " ").split("train.py"))
    told = dict(word.removeprefix("--").split("=") for word in before[1:])
    cfg = composed(after)
    assert (told["nproc_per_node"], told["nnodes"]) == (str(cfg.trainer.devices), str(cfg.trainer.num_nodes))


@pytest.mark.slow
def test_the_launch_on_two_nodes_trains_one_run(tmp_path):
    """Both nodes are this machine, with one process each on a CPU, and the digits in place of ImageNet."""
    program, *words = shlex.split(LAUNCH.replace("\\\n", " "))
    assert program == "torchrun"
    changed = {"--nproc_per_node": "1", "--master_addr": "127.0.0.1", "--master_port": free_port()}
    changed |= {"trainer.devices": "1"}
    words = [w if (key := w.split("=")[0]) not in changed else f"{key}={changed[key]}" for w in words]
    words = [w for w in words if not w.startswith(("experiment=", "data.set.path="))]
    small = [*SMALL, "trainer.accelerator=cpu", "name=nodes", f"runs={tmp_path}", "trainer.max_steps=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    nodes = []
    for rank in range(2):
        own = [f"--node_rank={rank}" if w.startswith("--node_rank=") else w for w in words]
        command = [sys.executable, "-m", "torch.distributed.run", *own, *small]
        nodes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    said = [node.communicate(timeout=400)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    assert [row["step"] for row in rows(tmp_path, "nodes")] == ["1", "2", "3"]
    assert "artifact  " in said[0] and "artifact  " not in said[1]
