"""Every mistake in a configuration ends in one sentence and an exit code, before anything is built."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from benchmarks.forked import python
from edit.denoiser import Spec
from edit.inputs.trust import load_yaml
from recipes.config import composed
from recipes.config.check import check
from recipes.config.errors import UserError
from recipes.config.launch import launch
from recipes.config.schema import Evaluation
from recipes.config.sources import register
from recipes.cost import from_file

ROOT = Path(__file__).parents[3]
FILES = {
    "train.yaml": """
defaults:
  - root_schema
  - eval@evaluate
  - _self_
  - backbone: tiny
  - data: toy
  - trainer: cpu
  - experiment: null
  - override hydra/job_logging: none
  - override hydra/hydra_logging: none
name: digits
objective: {_target_: toy.Flow}
sampler: {_target_: toy.Paint}
optimizer: {lr: 1e-3}
trusted: [toy]
hydra:
  output_subdir: null
  job: {chdir: false, config: {override_dirname: {kv_sep: "-", item_sep: _}}}
  run: {dir: "${runs}/${name}"}
  sweep: {dir: "${runs}/${name}", subdir: "${hydra:job.override_dirname}"}
  help:
    template: |
      Train something.

      $APP_CONFIG_GROUPS
""",
    "eval.yaml": (ROOT / "configs/eval.yaml").read_text(),
    "backbone/tiny.yaml": "_target_: toy.Net\ndepth: 2\nwidth: 8\n",
    "backbone/small.yaml": "_target_: toy.Net\ndepth: 4\nwidth: 16\n",
    "data/toy.yaml": "set: {_target_: toy.Data, name: a}\nbatch_size: 4\n",
    "trainer/cpu.yaml": "max_steps: 5\naccelerator: cpu\n",
    "trainer/ddp.yaml": "max_steps: 5\nstrategy: ddp\ndevices: 2\n",
    "experiment/dit_digits/diffusion.yaml": "# @package _global_\ntrainer: {max_steps: 7}\n",
    "experiment/typo.yaml": "# @package _global_\ntrainer: {max_stepz: 7}\n",
    "experiment/top.yaml": "# @package _global_\nsead: 7\n",
    "experiment/type.yaml": "# @package _global_\ntrainer: {max_steps: lots}\n",
    "experiment/section.yaml": "# @package _global_\noptimizer: adam\n",
    "experiment/headless.yaml": "seed: 3\n",
    "experiment/group.yaml": "# @package _global_\ndefaults: [{override /backbone: tny}]\n",
    "experiment/silent.yaml": "# @package _global_\nevaluate: null\n",
    "experiment/started.yaml": "# @package _global_\ninit: ''\n",
    "experiment/regex.yaml": "# @package _global_\noptimizer: {groups: {'blocks.(0': {lr_scale: 0.1}}}\n",
    "experiment/groups.yaml": "# @package _global_\noptimizer: {groups: {'blocks\\.[01]': {lr_scale: 0.1}}}\n",
    "experiment/broken.yaml": "# @package _global_\na: [1\nb: 2\n",
}
TOY = """
from __future__ import annotations
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Optional

from edit.denoiser import Edit
from edit.objectives import Objective
from edit.sampling import Sampler

if TYPE_CHECKING:
    from nowhere import Thing

@dataclass
class Net:
    depth: int
    width: int = 8
    ratio: float = 4.0
    time: Literal["flow", "ddpm"] = "flow"
    drop: float | None = None
    sizes: Sequence[int] = ()
    pair: tuple[int, int] = (1, 1)
    label: Optional[str] = None
    thing: Thing = None
    def __post_init__(self):
        if self.width % 2:
            raise ValueError(f"Net: width must be even, got {self.width}")
    def build(self): ...

class Flow(Objective):
    def __init__(self, scale: float = 1.0): ...

class Paint(Sampler):
    def __init__(self, scale: float = 1.0): ...

class Open(Edit):
    def __init__(self, known: int = 0, **rest): ...

class Data:
    def __init__(self, name: str, size: int = 8): ...
    def train(self): ...
    def heldout(self): ...
    def to_frames(self, x): ...

LEVEL = 3
"""
# the task is chosen by the environment, so that one script shows every way of failing
TRAIN = """
import errno, os, sys
from pathlib import Path
from recipes.config.errors import UserError
from recipes.config.launch import launch

def task(cfg):
    print("RAN", cfg.name, cfg.seed, os.path.isdir(os.path.join(cfg.runs, cfg.name)), flush=True)
    exec_ = os.environ.get("FAIL")
    if exec_ == "build":
        from hydra.utils import instantiate
        instantiate(cfg.backbone)
    if exec_ == "hang":
        import time
        time.sleep(30)
    if exec_ == "first" and cfg.seed == 0:
        raise UserError("the first one fails")

launch(task, "train", Path(__file__).parent / "configs")
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    for name, text in FILES.items():
        file = tmp_path / "configs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for variable in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(variable, raising=False)
    yield tmp_path
    sys.modules.pop("toy", None)


def environment(project, **extra):
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{project}", **extra}


def train(project, *words, **extra):
    command = [sys.executable, "train.py", *words]
    return subprocess.run(
        command, cwd=project, env=environment(project, **extra), capture_output=True, text=True, timeout=60
    )


def forked(project, monkeypatch, *words, **extra):
    """The same in a fork, which has imported torch."""
    for name, value in extra.items():
        monkeypatch.setenv(name, value)
    return python("train.py", *words, cwd=project)


def run(project, *words, task=lambda cfg: None):
    """Exit code of a launch in this process."""
    try:
        launch(task, "train", project / "configs", words)
    except SystemExit as stop:
        return stop.code
    return 0


def checked(project, *words):
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(project / "configs")):
        return check(compose("train", list(words)))


# ---- what is refused before the task runs ---------------------------------------------------------------------------

REFUSED = {
    "mistyped key": (["trainer.max_stepz=3"], ["unknown key 'trainer.max_stepz'", "did you mean 'max_steps'"]),
    "mistyped key of a node": (["backbone.widht=3"], ["unknown key 'backbone.widht'", "did you mean 'width'"]),
    "mistyped top key": (["sead=3"], ["unknown key 'sead'", "'seed'"]),
    "mistyped top key, forced": (["+sead=3"], ["unknown key 'sead'", "'seed'"]),
    "mistyped added argument": (["+backbone.ratoi=3"], ["backbone.ratoi: Net has no argument 'ratoi'", "'ratio'"]),
    "mistyped key in a file": (["experiment=typo"], ["experiment/typo.yaml", "trainer.max_stepz", "'max_steps'"]),
    "mistyped top key in a file": (["experiment=top"], ["experiment/top.yaml", "'sead'", "'seed'"]),
    "wrong type": (["trainer.max_steps=abc"], ["trainer.max_steps: expected int, got 'abc'"]),
    "wrong type, optional": (["trainer.clip=abc"], ["trainer.clip: expected float or None, got 'abc'"]),
    "wrong type in a list": (["optimizer.betas=[a]"], ["optimizer.betas[0]: expected float, got 'a'"]),
    "wrong type in a file": (
        ["experiment=type"],
        ["experiment/type.yaml", "trainer.max_steps: expected int", "'lots'"],
    ),
    "wrong type of an argument": (["backbone.depth=four"], ["backbone.depth: expected int, got 'four'"]),
    "null": (["seed=null"], ["seed: expected int, got None"]),
    "one beta": (["optimizer.betas=[0.9]"], ["optimizer.betas: expected 2 values, got 1: [0.9]"]),
    "three betas": (["optimizer.betas=[0,0,0]"], ["optimizer.betas: expected 2 values, got 3"]),
    "gradients clipped to nothing": (["trainer.clip=0"], ["trainer.clip: expected more than 0 or null, got 0"]),
    "negative clip": (["trainer.clip=-1"], ["trainer.clip: expected more than 0 or null, got -1"]),
    "broken regex": (
        ["experiment=regex"],
        ["optimizer.groups.blocks.(0: expected a regular expression", "'blocks.(0'"],
    ),
    "mistyped key of a group": (
        ["+optimizer.groups={bias: {lr_scal: 1}}"],
        ["unknown key 'optimizer.groups.bias.lr_scal'", "did you mean 'lr_scale'"],
    ),
    "words in a group": (
        ["+optimizer.groups={bias: {lr_scale: fast}}"],
        ["optimizer.groups.bias.lr_scale: expected a number", "'fast'"],
    ),
    "a switch in a group": (
        ["+optimizer.groups={bias: {weight_decay: true}}"],
        ["optimizer.groups.bias.weight_decay: expected a number", "True"],
    ),
    "a beta that forgets nothing, in a group": (
        ["+optimizer.groups={bias: {betas: [0.9, 1.0]}}"],
        ["optimizer.groups.bias.betas: expected two numbers of at least 0 and below 1, got [0.9, 1.0]"],
    ),
    "one beta in a group": (["+optimizer.groups={bias: {betas: 0.9}}"], ["bias.betas: expected two numbers", "0.9"]),
    "an optimizer that DeepSpeed cannot divide": (
        ["optimizer.kind=adamw8bit", "trainer.strategy=zero3"],
        ["optimizer.kind=adamw8bit does not fit trainer=zero3", "use trainer=fsdp2"],
    ),
    "negative number in a group": (["+optimizer.groups={bias: {lr_scale: -1}}"], ["at least 0, got -1"]),
    "a number for a group": (["+optimizer.groups={bias: 3}"], ["optimizer.groups.bias: expected a section", "3"]),
    "mistyped key of evaluate": (["evaluate.stepz=5"], ["unknown key 'evaluate.stepz'; did you mean 'steps'?"]),
    "mistyped key of evaluate, forced": (["+evaluate.stepz=5"], ["unknown key 'stepz'; did you mean 'steps'?"]),
    "wrong type in evaluate": (["evaluate.steps=few"], ["evaluate: steps: expected int or None, got 'few'"]),
    "out of range in evaluate": (["evaluate.n=1"], ["evaluate: n: expected a number from 8 to 1000000, got 1"]),
    "a value for evaluate": (["evaluate=judge"], ["evaluate: expected a section", "null", "'judge'"]),
    "a key of no evaluation": (["experiment=silent", "evaluate.n=9"], ["'evaluate.n'", "write +evaluate.n=..."]),
    "absolute name": (["name=/tmp/a"], ["name=/tmp/a: expected a folder below runs"]),
    "name that climbs": (["name=a/../../b"], ["name=a/../../b: expected a folder below runs"]),
    "empty name": (["name="], ["name=: expected a folder below runs"]),
    "no trained start": (["experiment=started"], ["init is missing", "init=..."]),
    "a value for a section": (["optimizer=adam"], ["optimizer: expected a section", "'adam'"]),
    "a value for a section in a file": (["experiment=section"], ["section.yaml", "optimizer: expected a section"]),
    "unknown experiment": (
        ["experiment=dit_digits/difusion"],
        ["no experiment named 'dit_digits/difusion'", "did you mean 'dit_digits/diffusion'"],
    ),
    "unknown option": (["backbone=tny"], ["no backbone named 'tny'", "'tiny'", "accepted: small, tiny"]),
    "unknown option in a file": (["experiment=group"], ["no backbone named 'tny'", "'tiny'"]),
    "a number for an option": (["backbone=3"], ["no backbone named '3'", "small, tiny"]),
    "unknown group": (["bakbone=tiny"], ["'bakbone'", "did you mean 'backbone'"]),
    "no equals sign": (["max_steps", "5"], ["'max_steps' is not a setting", "key=value"]),
    "no key": (["=5"], ["'=5' does not begin with a key"]),
    "dashes": (["--max_steps", "5"], ["no option --max_steps", "key=value"]),
    "unquoted value": (["name=a=b"], ["'name=a=b' cannot be read", "\"name='a=b'\""]),
    "list without -m": (["seed=1,2"], ["seed=1,2", "-m", "seed=[1,2]"]),
    "plus too many": (["+seed=1"], ["seed is in the config already"]),
    "no package header": (["experiment=headless"], ["experiment/headless.yaml", "# @package _global_"]),
    "broken YAML": (["experiment=broken"], ["broken.yaml, line 3", "not valid YAML"]),
    "unknown primary config": (["-cn", "trian"], ["no trian.yaml", "'train'"]),
    "not one of the choices": (["trainer.strategy=dpp"], ["trainer.strategy: expected one of single", "'ddp'"]),
    "not one of the literals": (["+backbone.time=flw"], ["backbone.time: expected one of 'flow', 'ddpm'", "'flow'?"]),
    "out of range": (["label_drop=2"], ["label_drop: expected a number from 0 to 1, got 2"]),
    "below the least": (["checkpoint.every=0"], ["checkpoint.every: expected at least 1, got 0"]),
    "too many devices for one": (["trainer.devices=2"], ["trainer.strategy=single", "trainer=ddp"]),
    "devices in words": (["trainer.devices=two"], ["trainer.devices: expected", "'two'"]),
    "a file where runs should be": (["runs=train.py/runs"], ["runs=train.py/runs", "train.py is a file"]),
    "missing argument": (["~backbone.depth"], ["backbone.depth: Net needs it"]),
    "nothing chosen": (["optimizer.lr=???"], ["optimizer.lr has no value"]),
    "edit without target": (["+edits.a={depth: 3}"], ["edits.a: expected a section with _target_"]),
    "untrusted target": (["backbone._target_=os.system"], ["none of the trusted packages"]),
    "untrusted target by a detour": (["backbone._target_=toy.os.system"], ["comes from posix"]),
    "no such class": (["backbone._target_=toy.Nett"], ["toy has no 'Nett'", "'Net'"]),
    "no such module": (["backbone._target_=edit.backbnes.dit.DiT"], ["edit has no 'backbnes'", "'backbones'"]),
    "not a class": (["backbone._target_=toy.LEVEL"], ["toy.LEVEL is a int, not a class"]),
    "dangling reference": (["backbone.depth=${nothing}"], ["backbone.depth", "nothing"]),
    "mistake in a later job of a sweep": (["-m", "seed=0,1", "backbone.depth=1,x"], ["backbone.depth: expected int"]),
    "unknown option in a sweep": (["-m", "backbone=tiny,smal"], ["no backbone named 'smal'", "'small'"]),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_one_sentence_with_given_and_accepted_and_nothing_runs(mistake, project, capsys):
    words, expected = REFUSED[mistake]
    assert run(project, *words, task=lambda cfg: pytest.fail("the task ran")) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert all(part in err for part in expected), err
    assert not (project / "runs").exists()


def test_an_optimizer_whose_package_is_missing_is_refused_with_what_to_install(project, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    (mistake,) = checked(project, "optimizer.kind=adamw8bit")
    assert "needs the package torchao, which is not installed: pip install 'edit-dit[quant]'" in mistake


def test_several_mistakes_are_all_named_at_once(project, capsys):
    assert run(project, "backbone.depth=four", "label_drop=2") == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_a_right_configuration_passes_the_check(project):
    good = ["+backbone.ratio=2", "+backbone.drop=null", "+backbone.sizes=[1,2]", "+backbone.pair=[1,2]"]
    good += ["+backbone.label=x", "+backbone.thing={a: 1}", "+edits.a={_target_: toy.Open, other: 1}", "trainer=ddp"]
    assert checked(project, *good) == []


@pytest.mark.parametrize(
    "words",
    [
        ("trainer.clip=null",),
        ("name=sweep/a..b",),
        ("name='${hydra:job.num}'", "evaluate.cache='${hydra:runtime.output_dir}'"),
        ("experiment=groups",),
        ("+optimizer.groups={bias: {weight_decay: 0, lr_scale: 0.5, betas: [0, 0.99]}}",),
        ("experiment=started", "init=runs/a"),
        ("evaluate=null",),
        ("evaluate.features=none", "evaluate.steps=5", "evaluate.guidance=1.5"),
        ("experiment=silent", "+evaluate.n=9"),
    ],
    ids=" ".join,
)
def test_what_lies_beside_a_mistake_is_accepted(project, words):
    assert checked(project, *words) == []


def test_references_that_only_the_running_job_can_resolve_are_left_alone(project):
    assert checked(project, "init='${hydra:runtime.output_dir}/a'", "+backbone.label='${init}'") == []


# ---- what happens to a task that fails ------------------------------------------------------------------------------


def failing(error):
    def task(cfg):
        raise error

    return task


class OutOfMemoryError(RuntimeError):
    """Named as torch names it; the launcher knows it by name, to answer without importing torch."""


def while_saving():
    try:
        raise OSError(28, "No space left on device", "runs/digits/last.ckpt")
    except OSError as error:
        wrapped = RuntimeError("unexpected pos 64 vs 0")
        wrapped.__context__ = error
        return wrapped


FAILED = {
    "user": (UserError("no checkpoint fits"), ["error: no checkpoint fits"]),
    "value": (ValueError("width 3\nis odd"), ["error: width 3 is odd"]),
    "no file": (FileNotFoundError(2, "No such file or directory", "a/b.tar"), ["a/b.tar: no such file"]),
    "permission": (PermissionError(13, "Permission denied", "/root/x"), ["/root/x: permission denied"]),
    "disk full": (OSError(28, "No space left on device", "runs/x.ckpt"), ["disk is full (runs/x.ckpt)", "resumes"]),
    "disk full in torch.save": (while_saving(), ["disk is full (runs/digits/last.ckpt)", "resumes"]),
    "out of memory": (OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), ["out of memory", "data.batch_size"]),
    "bug": (KeyError("x"), ["KeyError: 'x'", "debug=true"]),
}


@pytest.mark.parametrize("kind", FAILED)
def test_a_failed_task_is_one_sentence_and_exit_code_one(kind, project, capsys):
    error, expected = FAILED[kind]
    assert run(project, task=failing(error)) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert all(part in err for part in expected), err


class Broken:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise ValueError("shard 3.tar has no samples:\nexpected .jpg members")


def test_an_error_in_a_data_worker_is_its_own_sentence_without_the_workers_traceback(project, capsys):
    def task(cfg):
        from torch.utils.data import DataLoader

        list(DataLoader(Broken(), num_workers=1))

    assert run(project, task=task) == 1
    assert capsys.readouterr().err == "error: shard 3.tar has no samples: expected .jpg members\n"


def test_debug_shows_the_traceback_and_keeps_the_sentence(project, capsys, monkeypatch):
    assert run(project, "debug=true", task=failing(ValueError("odd"))) == 1
    assert "Traceback" in (err := capsys.readouterr().err) and "error: odd" in err
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert run(project, task=failing(ValueError("odd"))) == 1
    assert "Traceback" in capsys.readouterr().err


def test_lightnings_exit_after_ctrl_c_counts_as_an_interruption(project, capsys):
    def task(cfg):
        try:
            raise KeyboardInterrupt("step 12")
        except KeyboardInterrupt:
            sys.exit(1)

    assert run(project, task=task) == 130
    assert capsys.readouterr().err.startswith("interrupted at step 12; the same command resumes")


def test_other_ranks_are_silent_about_mistakes_and_speak_about_failures_of_their_own(project, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run(project, "sead=1") == 2
    assert run(project, task=failing(UserError("all ranks see this"))) == 1
    assert capsys.readouterr().err == ""
    assert run(project, task=failing(OSError(5, "Input/output error"))) == 1
    assert capsys.readouterr().err.startswith("rank 1: error: ")


# ---- runs and sweeps ------------------------------------------------------------------------------------------------


def test_a_run_has_its_folder_and_repeats_into_the_same_one(project):
    seen = []
    for _ in range(2):
        assert run(project, "name=mine", task=lambda cfg: seen.append(HydraConfig.get().runtime.output_dir)) == 0
    assert seen == [str(project / "runs/mine")] * 2
    assert sys.argv[1:] == ["name=mine"]  # what Lightning's launcher repeats for the other ranks


def test_each_job_of_a_sweep_has_a_name_and_folder_of_its_own_after_what_was_swept(project):
    seen = {}

    def task(cfg):
        seen[cfg.name] = (cfg.seed, cfg.optimizer.lr, Path(cfg.runs, cfg.name).is_dir())

    # flags between settings, which Hydra alone refuses; the fixed setting stays out of the names
    assert run(project, "trainer.max_steps=3", "-m", "seed=0,1", "optimizer.lr=0.1,0.2", task=task) == 0
    assert seen == {f"digits/optimizer.lr-{lr}_seed-{seed}": (seed, lr, True) for seed in (0, 1) for lr in (0.1, 0.2)}


def test_a_swept_name_is_the_folder(project, capsys):
    seen = []
    assert run(project, "-m", "name=a,b", task=lambda cfg: seen.append(cfg.name)) == 0
    assert seen == ["a", "b"]
    assert "recipes.sweep" not in capsys.readouterr().out  # which folder would it be


def test_a_run_writes_down_the_command_that_makes_it_alone(project):
    from recipes.runtime.run_folder import command_of

    seen, script = [], sys.argv[0]
    words = ["seed=0,1", "-m", "+backbone.label='a b'", "name=x"]
    assert run(project, *words, task=lambda cfg: seen.append(command_of(cfg))) == 0
    assert seen == [[script, f"seed={k}", "+backbone.label='a b'", f"name=x/seed-{k}"] for k in (0, 1)]
    again = []
    for command in list(seen):
        assert run(project, *command[1:], task=lambda cfg: again.append((cfg.seed, cfg.backbone.label, cfg.name))) == 0
    assert again == [(k, "a b", command[-1].removeprefix("name=")) for k, command in enumerate(seen)]
    (project / "mine/experiment").mkdir(parents=True)
    (project / "mine/experiment/own.yaml").write_text("# @package _global_\nseed: 9\n")
    seen.clear()
    assert run(project, "--config-dir", "mine", "experiment=own", task=lambda cfg: seen.append(command_of(cfg))) == 0
    assert seen == [[script, "experiment=own", "name=digits", "--config-dir", "mine"]]


def test_lightnings_child_command_lands_in_the_same_folder(project):
    seen = []
    words = ["name=mine", 'hydra.run.dir="runs/mine"', "hydra.job.name=train_ddp_process_1", "hydra.output_subdir=null"]
    assert run(project, *words, task=lambda cfg: seen.append(HydraConfig.get().runtime.output_dir)) == 0
    assert seen == [str(project / "runs/mine")]


def test_a_folder_of_ones_own_experiments_is_searched(project):
    (project / "mine/experiment").mkdir(parents=True)
    (project / "mine/experiment/own.yaml").write_text("# @package _global_\nseed: 9\n")
    seen = []
    words = ["--config-dir", "mine", "experiment=own"]
    assert run(project, *words, task=lambda cfg: seen.append(cfg.seed)) == 0
    assert seen == [9]


# ---- the real process -----------------------------------------------------------------------------------------------


def test_help_and_mistakes_answer_quickly_and_without_torch(project):
    (project / "torch.py").write_text("raise SystemExit('torch was imported')")
    start = processor_time()
    shown = train(project, "--help")
    middle = processor_time()
    wrong = train(project, "backbone=tny")
    end = processor_time()
    assert shown.returncode == 0 and "Train something." in shown.stdout and "backbone: small, tiny" in shown.stdout
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: there is no backbone named 'tny'")
    # 0.4 s each; this only catches a heavy import (torch alone takes 1.5 s)
    assert min(middle - start, end - middle) < 1.5


def processor_time():
    """Of the processes that have ended: a busy machine does not slow it down."""
    return sum(os.times()[2:4])


def test_an_error_inside_a_constructor_names_the_key_and_the_reason(project, monkeypatch):
    result = forked(project, monkeypatch, "backbone.width=7", FAIL="build")
    assert result.returncode == 1
    assert result.stderr == "error: backbone: Net: width must be even, got 7\n"


def test_a_failing_job_does_not_stop_the_sweep_but_shows_in_the_exit_code(project, monkeypatch):
    result = forked(project, monkeypatch, "-m", "seed=0,1", FAIL="first")
    assert result.returncode == 1
    ran = ["RAN digits/seed-0 0 True", "RAN digits/seed-1 1 True"]
    assert result.stdout.splitlines() == [*ran, "next      python -m recipes.sweep runs=runs/digits"]
    assert result.stderr == "error: the first one fails\n"


def test_ctrl_c_says_how_to_go_on(project):
    process = subprocess.Popen(
        [sys.executable, "train.py"],
        cwd=project,
        env=environment(project, FAIL="hang"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell has what it runs in the background ignore Ctrl-C, and so would a child of the suite
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline().startswith("RAN")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == "interrupted; the same command resumes from what runs/digits holds\n"


def test_cfg_shows_the_composed_configuration(project):
    result = train(project, "--cfg", "job", "seed=4")
    assert result.returncode == 0 and OmegaConf.create(result.stdout).seed == 4


# ---- the configurations we ship -------------------------------------------------------------------------------------

CONFIGS = ROOT / "configs"
CHOSEN = (
    "data",
    "edits",
    "experiment",
    "logger",
    "objective",
    "sampler",
    "trainer",
)
SHIPPED = [
    f"{group}={file.relative_to(CONFIGS / group).with_suffix('').as_posix()}"
    for group in CHOSEN
    for file in sorted((CONFIGS / group).rglob("*.yaml"))
]
FAMILIES = composed.families(CONFIGS).values()
BETWEEN = {name for family in FAMILIES for name in list(family.names)[1:]} - {family.name for family in FAMILIES}
SHIPPED += [
    pytest.param(f"backbone={name}", marks=[pytest.mark.slow] if name in BETWEEN else [])
    for name in composed.names(CONFIGS, "backbone")
]


NEED_A_START = ("experiment=dit_digits/depth", "experiment=dit_digits/lora")
NEED_A_START += (
    "experiment=dit_xl_2/harmonica",
    "experiment=dit_xl_2/tinyfusion_search",
    "experiment=sit_xl_2/tinyfusion_search",
    "experiment=sit_xl_2/dydit",
)
# what only the user knows
OWN = ("data.set.path", "data.set.shards", "matching.vision.path", "backbone.path", "teacher.path")


@pytest.mark.parametrize("choice", SHIPPED)
def test_each_shipped_option_composes_and_fits_the_signatures(choice):
    """Paths that only the user knows are filled in (`???`, and "" for the start of some experiments): nothing else."""
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        cfg = compose("train", [choice])
        while unset := [e.split(" has no value")[0] for e in check(cfg) if " has no value" in e]:
            assert unset[0] in OWN
            OmegaConf.update(cfg, unset[0], "somewhere")
        if choice in NEED_A_START:
            assert [e.split(":")[0] for e in check(cfg)] == ["init is missing"]
            cfg.init = "somewhere"
        assert check(cfg) == []


def test_every_size_of_every_family_makes_its_backbone():
    """Those behind the first of a family are composed whole with -m slow alone."""
    for name in composed.names(CONFIGS, "backbone"):
        assert isinstance(from_file(CONFIGS, "backbone", name), Spec), name


def test_unset_keys_of_evaluate_are_those_of_eval_py():
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        chosen = compose("train", ["evaluate.steps=5"]).evaluate
    assert Evaluation.of(chosen) == replace(Evaluation.of({}), steps=5)


# ---- what a configuration may ask for -------------------------------------------------------------------------------


def refused(project, capsys, *words, code=2):
    """The sentences that a launch ends with; nothing is run."""
    assert run(project, *words, task=lambda cfg: pytest.fail("the task ran")) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "Traceback" not in err
    return err


def experiment(project, text):
    (project / "configs/experiment/theirs.yaml").write_text(f"# @package _global_\n{text}\n")
    return "experiment=theirs"


RUNS_SOMETHING = {
    "a function": "backbone: {_target_: edit.artifacts.checkpoint.load, path: x}",
    "a function that torch has": "trusted: [toy, torch]\nbackbone: {_target_: torch.load, f: x, weights_only: false}",
    "a package that only the file trusts": "trusted: [subprocess]\nbackbone: {_target_: subprocess.Popen, args: ls}",
    "a command of ours": "data: {set: {_target_: data.generate.main, words: [out=x]}}",
    "a class of another kind": "backbone: {_target_: edit.artifacts.export.ExportSettings, artifact: a, out: b}",
    "an edit for a backbone": "backbone: {_target_: edit.tuning.lora.LoRA}",
    "a method of a class": "data: {set: {_target_: toy.Data.train}}",
    "a class that was imported": "backbone: {_target_: edit.measuring.cost.Path}",
    "a function below a node": "edits: {a: {_target_: edit.tuning.lora.LoRA, rank: {_target_: edit.edits.apply}}}",
    "a node where no object goes": "optimizer: {groups: {a: {_target_: toy.Net, depth: 1}}}",
    "the section of all edits": "edits: {_target_: toy.Net, depth: 1}",
    "in place of a value": "name: {_target_: toy.Net, depth: 1}",
    "arguments without names": "backbone: {_args_: [1]}",
    "arguments that are given later": "backbone: {_partial_: true}",
    "nodes that stay unbuilt": "backbone: {_recursive_: false}",
    "callbacks": "hydra: {callbacks: {a: {_target_: toy.Net, depth: 1}}}",
    "a launcher": "hydra: {launcher: {_target_: toy.Net}}",
    "a sweeper": "hydra: {sweeper: {_target_: toy.Net}}",
    "words of a sweeper": "hydra: {mode: MULTIRUN, sweeper: {params: {+hydra.callbacks.x._target_: toy.Net}}}",
    "the environment of a job": "hydra: {job: {env_set: {LD_PRELOAD: x.so}}}",
    "a logging factory": "hydra: {job_logging: {handlers: {a: {(): os.getcwd}}}}",
    "no hydra": "hydra: null",
    "a module that is no stage": "before: [[edit.artifacts.checkpoint, a=b]]",
    "an option in a stage": "before: [['--config-dir=/tmp', seed=1]]",
    "a stage without its words": "before: [[data.generate]]",
    "a stage without its words, of flags": "before: [[data.precompute, --out=x]]",
    "the environment": "name: ${oc.env:HOME}",
    "the environment by a detour": "backbone: {label: '${oc.${seed}:HOME}'}\nseed: env",
    "millions of blocks": "backbone: {depth: 99999999}",
    "millions of blocks by reference": "seed: 99999999\nbackbone: {depth: '${seed}'}",
}


@pytest.mark.parametrize("what", RUNS_SOMETHING)
def test_an_experiment_file_cannot_run_anything_but_what_a_run_is_made_of(what, project, capsys, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("something was started"))
    refused(project, capsys, experiment(project, RUNS_SOMETHING[what]))
    assert not (project / "runs").exists()


@pytest.mark.parametrize("group", ["backbone", "data", "sampler", "objective", "trainer"])
def test_a_choice_of_nothing_is_blamed_whatever_is_said_beside_it(group, tmp_path, capsys):
    words = [f"runs={tmp_path}", "seed=3", "evaluate=null", f"{group}=null"]
    with pytest.raises(SystemExit) as stop:
        launch(lambda cfg: None, "train", ROOT / "configs", words)
    assert stop.value.code == 2 and f"error: there is no {group} named 'null'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("backbone: null", "backbone=null: a run needs one"),
        ("data: null", "data"),
        ("sampler: null", "sampler=null: a run needs one"),
        ("data: {set: null}", "data.set: expected a section with _target_"),
        ("objective: {a: {_target_: toy.Flow}}\n", "objective._target_"),
    ],
)
def test_a_part_without_which_there_is_no_run_is_missed_before_it_begins(text, culprit, project, capsys):
    if text.startswith("objective"):  # replaced as a whole
        text = "objective: null"
        culprit = "objective=null: a run needs one"
    assert culprit in refused(project, capsys, experiment(project, text))


def test_a_class_of_a_trusted_package_is_built_where_its_kind_is_expected(project):
    good = "edits: {a: {_target_: toy.Open}}\nobjective: {_target_: toy.Flow, scale: 2.0}\ntrusted: [toy]"
    assert checked(project, experiment(project, good)) == []


def test_the_one_function_of_shipped_experiments_stands_only_where_its_value_does(project, capsys):
    node = "{_target_: edit.pruning.patterns.aligned, pattern: '2:4', lengths: [8]}"
    term = f"+terms.f={{_target_: edit.distillation.features.FeatureKD, pairs: {node}}}"
    assert checked(project, term) == []
    assert "which is no class" in refused(project, capsys, f"+terms.f={node}")


def test_a_reference_that_only_the_running_job_can_follow_is_looked_at_then(project, capsys):
    theirs = "hydra: {runtime: {choices: {_target_: subprocess.Popen}}}\nbackbone: {thing: '${hydra:runtime.choices}'}"
    words = experiment(project, theirs)
    assert checked(project, words) == []
    assert "error: backbone.thing._target_: subprocess.Popen" in refused(project, capsys, words, code=1)


# ---- whatever else stands on the line -------------------------------------------------------------------------------

WORDS = ["+=", "=", "foo", "++", "~", "a.b.c=", "backbone..depth=3", "backbone.depth.x=1", "@=3", "hydra=null"]
WORDS += ["backbone=null", "data=null", "trainer=null", "experiment=../../x", "~hydra", "evaluate=[]", "optimizer=null"]
WORDS += ["--cfg=foo", "--info=foo", "--resolve", "--config-dir=/nowhere", "--config-name=/etc/passwd", "--foo"]
WORDS += ["--config-name=eval", "--experimental-rerun=x", "name=\udcff", "seed=${x}", "hydra.run.dir=/proc/x"]
WORDS += ["-m seed=interval(0,1)", "-m seed=1,x", "-m --cfg=job", "-sc foo=bash", "hydra/launcher=foo"]


@pytest.mark.parametrize("word", WORDS, ids=ascii)
def test_any_word_that_is_none_of_ours_ends_in_one_sentence(word, project, capsys):
    err = refused(project, capsys, *word.split(" "), code=1 if "/proc" in word else 2)
    assert err.count("\n") == 1, err


def test_an_error_that_nobody_foresaw_is_one_sentence_with_its_type(project, capsys, monkeypatch):
    monkeypatch.setattr("recipes.config.words.get_args_parser", lambda: 1 / 0)
    err = refused(project, capsys, "seed=1", code=1)
    assert err == "error: ZeroDivisionError: division by zero; debug=true shows the traceback\n"


@pytest.mark.parametrize("words", [["--cfg", "job"], ["--info", "config"], ["--cfg", "job", "--resolve"], ["--help"]])
def test_what_hydra_shows_is_still_shown(words, project):
    done = python("train.py", *words, cwd=project)  # --info turns on logging, for good
    assert done.returncode == 0 and "RAN" not in done.stdout
    assert ("seed" if words != ["--help"] else "Train something.") in done.stdout


# ---- files that are no settings -------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
FILES_OF_OTHERS = {
    "tags": (b"name: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
    "laughs": (BOMB.encode(), "its anchors make more than"),
    "an anchor in itself": (b"a: &a [*a]\n", "has no end"),
    "a large one": (b"#" + b"x" * 2**20, "more than 1 MB"),
    "NUL bytes": (b"name: a\0b\n", "NUL bytes"),
    "UTF-16": ("name: ä\n".encode("utf-16"), "UTF-8"),
    "Latin-1": ("name: ä\n".encode("latin-1"), "no text file in UTF-8"),
    "depth": (b"a: " + b"[" * 5000 + b"]" * 5000, "nested too deep"),
}


@pytest.mark.parametrize("kind", FILES_OF_OTHERS)
def test_an_experiment_file_that_is_no_settings_is_refused_before_it_grows(kind, project, capsys):
    content, sentence = FILES_OF_OTHERS[kind]
    (project / "configs/experiment/theirs.yaml").write_bytes(b"# @package _global_\n" + content)
    err = refused(project, capsys, "experiment=theirs")
    assert sentence in err and "theirs.yaml" in err and err.count("\n") == 1


@pytest.mark.parametrize("kind", FILES_OF_OTHERS)
def test_a_runs_own_file_is_read_as_carefully(kind, tmp_path):
    content, sentence = FILES_OF_OTHERS[kind]
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as error:
        load_yaml(tmp_path / "config.yaml")
    assert "config.yaml" in str(error.value) and "\n" not in str(error.value)
