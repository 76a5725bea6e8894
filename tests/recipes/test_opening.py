"""The first words of a run, and the answers that need neither models nor Lightning."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_runs import SMALL, config, train

from recipes.opening import announced, answer, finished, known
from recipes.runtime import devices

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "diffusers", "lightning", "torchmetrics", "transformers")
# train.py in a process of its own, which tells on stderr what of HEAVY was imported in the end
CODE = """
import atexit, runpy, sys
atexit.register(lambda: print("LOADED", *(m for m in %r if m in sys.modules), file=sys.stderr))
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def command(*words: str, code: str = CODE % (HEAVY,)) -> tuple[subprocess.CompletedProcess, set[str]]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, env=env)
    loaded = [line.split()[1:] for line in done.stderr.splitlines() if line.startswith("LOADED")]
    return done, set(loaded[0]) if loaded else set()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train(folder, "name=done", "trainer.max_steps=1")
    return folder


def test_a_finished_run_is_answered_without_torch(runs):
    done, loaded = command(f"runs={runs}", "name=done", *SMALL, "trainer.max_steps=1")
    assert done.returncode == 0 and f"{runs}/done is complete (1 steps)" in done.stdout
    assert not loaded & set(HEAVY)
    assert f"next      python eval.py artifact={runs}/done" in done.stdout


def test_a_missing_gpu_is_told_without_models_or_lightning(tmp_path):
    done, loaded = command(f"runs={tmp_path}", "name=a", "trainer=gpu")
    assert done.returncode == 2 and "torch sees no GPU here" in done.stderr
    assert (
        not loaded & (set(HEAVY) - (set() if not devices.may_have_gpu() else {"torch"}))
        and not (tmp_path / "a").exists()
    )


def test_the_first_words_come_before_torch_is_imported(tmp_path):
    block = """
import sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise SystemExit(77)
sys.meta_path.insert(0, Stop())
"""
    done, _ = command(f"runs={tmp_path}", "name=a", code=block + CODE % ((),))
    assert done.returncode == 77  # torch would have been imported next
    assert done.stdout == f"training  a: dit_digits on digits, 1700 steps of 128, into {tmp_path}/a\n"


def test_other_ranks_say_nothing(tmp_path, monkeypatch, capsys):
    from recipes.opening import announce

    cfg = config(tmp_path, "name=a")
    announce(cfg, {})
    assert capsys.readouterr().out.startswith("training  a: dit on digits, 12 steps of 16, into ")
    monkeypatch.setenv("LOCAL_RANK", "1")
    announce(cfg, {})
    assert capsys.readouterr().out == ""


def test_a_wrong_configuration_is_left_to_the_check(tmp_path, capsys):
    from recipes.opening import announce

    cfg = config(tmp_path, "name=a")
    cfg.backbone = None
    cfg.name = "${nowhere}"
    announce(cfg, {})
    assert capsys.readouterr().out == ""


def test_a_run_that_goes_on_tells_from_where(runs):
    cfg = config(runs, "name=done", "trainer.max_steps=9")
    line = announced(cfg, runs / "done", {"backbone": "dit", "size": "digits", "data": "digits"})
    assert line == f"training  done: dit digits on digits, 9 steps of 16 from step 1, into {runs}/done"


def test_only_a_whole_run_is_finished(runs):
    cfg = config(runs, "name=done", "trainer.max_steps=1")
    out = runs / "done"
    assert finished(cfg, out) == 1 and answer(cfg)
    assert finished(config(runs, "name=done", "trainer.max_steps=2"), out) is None
    (checkpoint,) = out.glob("checkpoints/*.ckpt")
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:-1] + b"x")
    assert finished(cfg, out) is None  # its procedure looks at older ones
    checkpoint.write_bytes(whole)
    (out / "artifact").rename(out / "elsewhere")
    assert finished(cfg, out) is None
    (out / "elsewhere").rename(out / "artifact")
    assert finished(cfg, out) == 1


def test_a_finished_run_is_known_by_the_same_settings_alone_whatever_this_machine_has(runs, monkeypatch):
    monkeypatch.setattr(devices, "gpus", lambda: pytest.fail("the machine was asked"))
    cfg = config(runs, "name=done", "trainer.max_steps=1")
    cfg.trainer.accelerator = "gpu"  # of the run there is nothing left to do on one
    assert known(cfg.copy())
    for word in ("trainer.max_steps=2", "optimizer.lr=0.5", "trainer.precision=bf16-mixed"):
        assert not known(config(runs, "name=done", "trainer.max_steps=1", word)), word
    assert not known(config(runs, "name=nowhere", "trainer.max_steps=1"))
    cfg.edits = {"a": {"_target_": "no.Such"}}  # nothing that is named is imported
    assert not known(cfg)


@pytest.mark.parametrize(
    ("version", "driver", "may"),
    [
        ("cuda = '13.0'; hip = None", False, False),
        ("cuda = '13.0'; hip = None", True, True),
        ("cuda = None; hip = None", True, False),
        ("cuda = None; hip = '6.4'", False, True),
        ("cuda = None; hip = None; xpu = '2025'", False, True),
        ("debug = False", False, True),
    ],
)
def test_torch_is_asked_for_gpus_unless_it_cannot_have_any(tmp_path, monkeypatch, version, driver, may):
    (tmp_path / "version.py").write_text(version)
    origin = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(devices, "find_spec", lambda name: origin)
    monkeypatch.setattr(devices.sys, "platform", "linux")

    def load(name: str) -> None:
        if not driver:
            raise OSError(name)

    monkeypatch.setattr(devices.ctypes, "CDLL", load)
    assert devices.may_have_gpu() == may


def test_a_run_with_stages_or_without_its_report_is_not_answered_at_once(runs):
    assert not answer(config(runs, "name=done", "trainer.max_steps=1", "before=[['name=other']]"))
    cfg = config(runs, "name=done", "trainer.max_steps=1")
    cfg.evaluate = {"n": 8}
    assert not answer(cfg)


def test_the_models_tell_parameters_trained_and_whole_samples_device_and_precision(tmp_path, capsys):
    train(tmp_path, "name=base", "trainer.max_steps=1")
    (whole,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("model"))
    assert "parameters, all trained; 1,437 samples; cpu, 32-true" in whole
    train(tmp_path, "name=lora", "edits=lora", f"init={tmp_path}/base", "trainer.max_steps=1")
    (part,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("model"))
    count, trained = [int(word.replace(",", "")) for word in part.split() if word.replace(",", "").isdigit()][:2]
    assert "of them trained" in part and 0 < trained < count
