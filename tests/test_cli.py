"""What only a whole process shows: exit codes, launchers, the quality that the front page promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SMALL = "trainer.max_steps=6 checkpoint.every=3 log_every=1 evaluate=null preview.every=0 data.batch_size=8".split()


def run(*arguments, timeout=300, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["trainer.max_stepz=3"], "max_steps"),
        (["experiment=dit_digits/depht"], "dit_digits/depth"),
        (["init=nowhere"], "no artifact at nowhere"),
    ],
    ids=["mistyped key", "unknown experiment", "missing file"],
)
def test_a_mistake_ends_in_one_sentence_and_a_non_zero_code(tmp_path, arguments, sentence):
    done = run("train.py", f"runs={tmp_path}", *SMALL, *arguments)
    errors = done.stderr.strip().splitlines()
    assert done.returncode != 0
    assert len(errors) == 1 and errors[0].startswith("error: ") and sentence in errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_lightning_starts_the_second_process_by_itself(tmp_path, strategy):
    two = [f"trainer={strategy}", "trainer.devices=2", "trainer.accelerator=cpu"]
    done = run("train.py", f"runs={tmp_path}", "name=two", *SMALL, *two, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "two/metrics.csv").read_text().splitlines()) == 7


@pytest.mark.slow
def test_torchrun_is_recognised(tmp_path):
    two = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run(*torchrun, "train.py", f"runs={tmp_path}", "name=two", *SMALL, *two, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "two/metrics.csv").read_text().splitlines()) == 7


@pytest.mark.slow
def test_the_default_run_keeps_its_promise(tmp_path):
    """98 % class accuracy without guidance; Frechet distance 0.53 +- 0.02 over noise seeds (training digits: 0.33)."""
    threads = str(len(os.sched_getaffinity(0)))
    done = run("train.py", f"runs={tmp_path}", timeout=600, OMP_NUM_THREADS=threads)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "digits/report.json").read_text())
    quality = report["artifacts"][0]["results"][0]["quality"]
    assert report["artifacts"][0]["results"][0]["guidance"] == 1
    assert quality["accuracy"]["value"] >= 0.98
    assert quality["frechet"]["value"] <= 0.62


@pytest.mark.gpu
def test_the_default_run_trains_on_a_gpu_in_bf16(tmp_path):
    assert torch.cuda.is_available()
    done = run("train.py", f"runs={tmp_path}", "trainer=gpu", *SMALL)
    assert done.returncode == 0, done.stderr
