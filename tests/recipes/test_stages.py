"""Runs that a run needs first: each is made once, shares the machine's settings, lives and dies with its command."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.fabric.plugins.environments import SLURMEnvironment
from omegaconf import OmegaConf
from processes import ended
from ranks import run_ranks
from small_runs import CONFIGS, config, rows

from data.names import setting
from recipes import stages
from recipes.config.errors import UserError
from recipes.config.staged import gathered, shared
from recipes.stages import FORWARDED, LAUNCHER, _slurm_tasks, launched, pasteable, run_after, run_before

RECORD = """
import sys
with open({log!r}, "a") as f:
    f.write(" ".join(sys.argv[1:]) + "\\n")
sys.exit(int(dict(w.split("=", 1) for w in sys.argv[1:]).get("seed", 0)))
"""

HELP = ["data.generate", "--help"]  # a module of ours that ends well at once


def recorder(folder: Path) -> tuple[Path, Path]:
    """A script that writes its words into a file, in place of train.py."""
    log, script = folder / "log", folder / "script.py"
    (folder / "configs").symlink_to(CONFIGS)  # beside it, as beside train.py
    script.write_text(RECORD.format(log=str(log)))
    return script, log


def unchecked(folder: Path, **stages: list[list[str]]):
    """A configuration with stages that a check would refuse: they end at once, which is what is looked at."""
    return OmegaConf.merge(config(folder, "name=a"), stages)


def test_runs_come_in_order_with_what_all_share_before_their_own_words(tmp_path):
    script, log = recorder(tmp_path)
    cfg = config(tmp_path, "name=a", "before=[['name=one','trainer.devices=1'],['name=two']]", "trainer.threads=3")
    run_before(cfg, script)
    first, second = log.read_text().splitlines()
    assert first.endswith("name=one trainer.devices=1") and second.endswith("name=two")
    assert f"runs={tmp_path}" in first and "trainer.threads=3" in second and "logger.kinds=[]" in second


def test_what_is_shared_is_accepted_by_train(tmp_path):
    words = ("logger=wandb", "logger.wandb.mode=disabled", "logger.wandb.project=x", "debug=true", "trainer.threads=2")
    cfg = config(tmp_path, "name=a", *words, "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu")
    again, usual = config(tmp_path, "name=b", *shared(cfg)), config(tmp_path, "name=c", "trainer=gpu")
    for key in ("logger.kinds", "logger.wandb.mode", "logger.wandb.project", "debug", "trainer.threads"):
        assert OmegaConf.select(again, key) == OmegaConf.select(cfg, key) != OmegaConf.select(usual, key)
    assert again.trainer.accelerator == "cpu" != usual.trainer.accelerator and again.trainer.devices == 1


def test_words_for_a_stage_reach_the_same_run_where_another_needs_it_and_what_is_to_be_done_is_said(tmp_path, capsys):
    script, log = recorder(tmp_path)
    stages_of_both = "before=[{one: ['name=x']},{two: ['name=y',\"before=[{one: ['name=x']}]\"]}]"
    cfg = config(tmp_path, "name=a", *gathered([stages_of_both, "before.one.trainer.max_steps=3"]))
    run_before(cfg, script)
    first, second = log.read_text().splitlines()
    assert first.endswith("name=x trainer.max_steps=3") and second.endswith("before.one.trainer.max_steps=3")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"before    one: 3 steps of training into {tmp_path}/x")
    assert said[1].startswith("before    two: ")


@pytest.mark.parametrize(
    ("changes", "met"), [({}, True), ({"SLURM_NTASKS": "1"}, False), ({"TORCHELASTIC_RUN_ID": "a"}, False)]
)
def test_tasks_of_slurm_meet_at_a_port_of_each_stage(monkeypatch, changes, met):
    known = {"PROCID": "1", "LOCALID": "1", "NODEID": "0", "NTASKS": "2", "NTASKS_PER_NODE": "2", "JOB_NAME": "job"}
    for name, value in {**{f"SLURM_{k}": v for k, v in known.items()}, "SLURM_NODELIST": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("MASTER_PORT", "20000")
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    first, second = (_slurm_tasks(number) for number in (0, 1))
    assert (first is not None) == met
    if met:
        assert first.endswith("?rank=1&world_size=2") and first != second and ":20000?" not in first


def test_a_stage_that_is_killed_has_the_code_of_a_shell_and_signals_are_as_before():
    before = [signal.getsignal(number) for number in FORWARDED]
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    assert stages._run([sys.executable, "-c", kill]) == 143
    assert [signal.getsignal(number) for number in FORWARDED] == before


def test_a_line_is_pasteable_and_a_stage_finds_our_modules_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "_installed", lambda: False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    words = ["-m", "data.generate", "out=a b"]
    assert pasteable(words) == f"PYTHONPATH={stages.OURS} python -m data.generate 'out=a b'"
    assert pasteable([str(stages.OURS / "train.py")]).startswith("python ")
    assert stages._environment()["PYTHONPATH"] == str(stages.OURS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{stages.OURS}")
    assert pasteable(words).startswith("python -m")
    assert stages._environment()["PYTHONPATH"] == f"{stages.OURS}{os.pathsep}{tmp_path}{os.pathsep}{stages.OURS}"
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.chdir(stages.OURS)
    assert pasteable(words).startswith("python -m")


def test_a_run_that_fails_ends_the_command_with_its_code(tmp_path):
    script, log = recorder(tmp_path)
    cfg = config(tmp_path, "name=a", "before=[['seed=3'],['name=never']]")
    with pytest.raises(SystemExit) as ended:
        run_before(cfg, script)
    assert ended.value.code == 3 and len(log.read_text().splitlines()) == 1


def test_ranks_that_lightning_started_leave_them_to_rank_0(tmp_path, monkeypatch):
    script, log = recorder(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    run_before(config(tmp_path, "name=a", "before=[['name=one']]"), script)
    assert not log.exists()


def test_a_module_of_ours_is_run_with_its_own_words_alone(tmp_path, monkeypatch, capfd):
    """From any folder, also where nothing is installed; its exit code ends the command as that of a run does."""
    script, log = recorder(tmp_path)
    cfg = unchecked(tmp_path, before=[["name=one"], ["data.generate", "teacher=a"], ["name=never"]])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(SystemExit) as ended:
        run_before(cfg, script)
    said, error = capfd.readouterr()
    assert ended.value.code == 2 and "error: prompts is missing" in error  # nothing else was given to it
    assert "python -m data.generate teacher=a\n" in said and len(log.read_text().splitlines()) == 1


def test_what_follows_a_run_comes_in_order_and_ends_the_command_with_its_code(tmp_path, capfd):
    cfg = unchecked(tmp_path, after=[HELP, ["data.generate", "teacher=a"], HELP])
    with pytest.raises(SystemExit) as ended:
        run_after(cfg)
    said, error = capfd.readouterr()
    assert ended.value.code == 2 and "error: prompts is missing" in error
    assert said.count("after     ") == 2 and "Keys and their defaults" in said  # the first had nothing to complain of


def test_a_run_of_its_own_cannot_follow_a_run(tmp_path):
    with pytest.raises(UserError, match="after.0: expected a module of ours and settings"):
        config(tmp_path, "name=a", "after=[['name=one']]")


def test_what_lightning_tells_its_ranks_is_gone_after_the_run(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(RuntimeError), launched():
        os.environ |= {"LOCAL_RANK": "0", "NODE_RANK": "0", "MASTER_PORT": "2"}
        raise RuntimeError
    assert os.environ["MASTER_PORT"] == "1" and not {"LOCAL_RANK", "NODE_RANK"} & os.environ.keys()


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_what_follows_a_run_is_the_first_ranks(tmp_path, monkeypatch, name, capfd):
    cfg = unchecked(tmp_path, after=[HELP])
    for rank, times in (("1", 0), ("0", 1)):
        monkeypatch.setenv(name, rank)
        run_after(cfg)
        assert capfd.readouterr().out.count("after     python -m data.generate") == times


@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("[os.system,'a=b']", "'os.system' is neither a setting, key=value, nor a module that is run; accepted: data."),
        ("[database.drop,'a=b']", "'database.drop' is neither a setting"),
        (
            "[data.generat,'a=b']",
            "'data.generat' is neither a setting, key=value, nor a module that is run; did",
        ),
        ("['','a=b']", "'' is neither a setting"),
        ("[data.generate,'teacher']", "expected settings, key=value, after the first word, got 'teacher'"),
        ("[data.generate]", "data.generate: teacher is missing"),
        ("[data.generate,'teacher=a']", "data.generate: prompts is missing"),
        ("[data.generate,'--teacher=a']", "expected settings, key=value, after the first word, got '--teacher=a'"),
        ("[data.embedded,'out=a']", "data.embedded: count is missing: count=<how many prompts>"),
        ("[data.precompute,'--out=a']", "data.precompute: the following arguments are required: --images, --vae"),
        ("[recipes.export]", "recipes.export: artifact is missing: artifact=<"),
        ("[recipes.prune,'model=a']", "recipes.prune: out has no value"),
        ("[]", "expected a list of settings such as"),
    ],
)
def test_words_that_start_nothing_are_refused(tmp_path, stage, words, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        config(tmp_path, "name=a", f"{stage}=[{words}]")


SLOW = """
import json, os, sys, time
time.sleep(0.5)
with open({log!r}, "a") as f:
    f.write(json.dumps([sys.argv[-1], sorted(k for k in os.environ if k.startswith("TORCHELASTIC") or "RANK" in k
        or "MASTER" in k or "WORLD_SIZE" in k)]) + "\\n")
sys.exit(int("stop" in sys.argv[-1]) * 7)
"""


def slow_script(folder: Path) -> None:
    (folder / "script.py").write_text(SLOW.format(log=str(folder / "log")))
    (folder / "configs").symlink_to(CONFIGS)


def _before(folder: Path, *before: list[str]) -> tuple[int, list[str]]:
    """The exit code that a rank of a torchrun launch ends with, and what it then finds written."""
    cfg = unchecked(folder, before=list(before))
    try:
        run_before(cfg, folder / "script.py")
        code = 0
    except SystemExit as ended:
        code = ended.code
    return code, (folder / "log").read_text().splitlines()


def test_under_torchrun_rank_0_runs_each_once_by_itself_and_all_ranks_wait(tmp_path, capfd):
    slow_script(tmp_path)
    answers = run_ranks(_before, world=3, args=(tmp_path, ["name=one"], ["name=two"]))
    once = [json.dumps([name, []]) for name in ("name=one", "name=two")]  # and without this launch's ranks and port
    assert answers == [(0, once)] * 3
    assert capfd.readouterr().out.count("before    one: ") == 1  # said by the first alone


@pytest.mark.slow
def test_under_torchrun_a_run_that_fails_ends_every_rank_with_its_code(tmp_path):
    slow_script(tmp_path)
    answers = run_ranks(_before, args=(tmp_path, ["name=stop"], ["name=never"]))
    assert [code for code, _ in answers] == [7, 7] and all(len(lines) == 1 for _, lines in answers)


def _under_slurm(folder: Path) -> int:
    """What a task of an srun launch ends with."""
    rank, port = os.environ["RANK"], os.environ["MASTER_PORT"]
    for name in [n for n in os.environ if n in LAUNCHER or n.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    os.environ |= {f"SLURM_{name}": value for name, value in {
        "PROCID": rank, "LOCALID": rank, "NODEID": "0", "NTASKS": "2", "NTASKS_PER_NODE": "2", "JOB_NAME": "job",
        "NODELIST": "localhost"}.items()} | {"MASTER_PORT": port}  # fmt: skip
    assert SLURMEnvironment.detect()
    return _before(folder, *[HELP] * 2, ["data.generate", "teacher=a"], ["name=never"])[0]


def test_under_slurm_the_first_task_runs_modules_one_by_one_and_all_tasks_wait(tmp_path, capfd):
    (tmp_path / "log").touch()
    (tmp_path / "configs").symlink_to(CONFIGS)
    assert run_ranks(_under_slurm, args=(tmp_path,)) == [2, 2]
    assert capfd.readouterr().out.count("before    python -m data.generate") == 3


@pytest.mark.slow
def test_torchrun_trains_a_needed_run_first_and_then_the_run_itself(tmp_path):
    """The needed run has two processes of its own the first time, on a port of its own."""
    small = ["evaluate=null", "preview.every=0", "backbone.hidden_size=32", "backbone.num_heads=2", "backbone.depth=1"]
    ddp = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.max_steps=2", "data.batch_size=16"]
    words = ",".join(f"'{w}'" for w in ["name=first", *small, *ddp])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    command = [*launch, "name=second", f"runs={tmp_path}", *small, *ddp, f"before=[[{words}]]"]
    root = Path(__file__).parents[2]
    for again in (False, True):
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert ("first is complete" in done.stdout) == again
        for name in ("first", "second"):
            assert (tmp_path / name / "artifact" / "config.json").exists()
            assert [row["step"] for row in rows(tmp_path, name)] == ["2"]


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from recipes.stages import _run
print(_run([sys.executable, "-c", {child!r}]), flush=True)
"""
CHILD = """
import os, signal, sys, time
from pathlib import Path
def stop(*_):
    Path({told!r}).touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
Path({pid!r}).write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a child that dies with its parent is Linux's")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_the_run_and_a_kill_leaves_none_behind(tmp_path, number):
    pid, told = tmp_path / "pid", tmp_path / "told"
    child = CHILD.format(told=str(told), pid=str(pid))
    here = str(Path(__file__).parents[2])
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(here=here, child=child)], stdout=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 30
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < end
        time.sleep(0.01)
    driver.send_signal(number)
    out, _ = driver.communicate(timeout=30)
    if number == signal.SIGTERM:
        assert told.exists() and out.splitlines()[-1] == "143"
    assert ended(int(pid.read_text()), within=30), "the run outlived its command"


@pytest.mark.slow
def test_a_needed_run_is_trained_once(tmp_path, capfd):
    words = ["name=first", "trainer.max_steps=2", "evaluate=null", "preview.every=0", "backbone.depth=1"]
    cfg = config(tmp_path, "name=second", "before=[[" + ",".join(f"'{w}'" for w in words) + "]]")
    for again in (False, True):
        run_before(cfg, Path(__file__).parents[2] / "train.py")
        assert ("first is complete" in capfd.readouterr().out) == again
    assert (tmp_path / "first" / "artifact" / "config.json").exists()


def test_runs_in_a_folder_of_any_name_are_what_the_stages_are_told(tmp_path, capsys):
    runs = tmp_path / "my runs [v2], it's"
    runs.mkdir()
    script, log = recorder(tmp_path)
    cfg = config(tmp_path, "name=a", "before=[['name=one',\"init=${runs}/x\"]]")
    cfg.runs = str(runs)
    run_before(cfg, script)
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])[3:]  # printed as they can be typed
    assert words[-1] == setting("init", f"{runs}/x")
    told = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(words)}
    assert (told["runs"], told["init"]) == (str(runs), f"{runs}/x")
    assert len(log.read_text().splitlines()) == 1
