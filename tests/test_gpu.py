"""`benchmarks.gpu`: entries that fail alone, what is written after each, and what they need. No GPU is used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import ended

from benchmarks import gpu
from benchmarks.common import PUBLISHED, config_of, from_file
from benchmarks.gpu import ENTRIES, Entry, about, main, measure, publish, reason, run, select

ROW = {
    "label": "a row",
    "seconds": {"edit": {"median": 0.5, "low": 0.4, "high": 0.6, "count": 3}},
    "ratios": {"plain": {"median": 1.25, "low": 1.2, "high": 1.3, "count": 3}},
    "macs": 0.5,
}
WRITE = f"import json, sys; open(sys.argv[-1], 'w').write(json.dumps({{'rows': [{ROW!r}]}}))"


def entry(name: str, code: str, limit: float = 60) -> Entry:
    return Entry(name, f"measures {name}", f"table {name}", ("-c", code), ("-c", code), limit)


def told(out: Path) -> dict[str, str]:
    return {e["name"]: e["state"] for e in json.loads((out / "gpu.json").read_text())["entries"]}


def test_entries_fail_alone_and_all_that_is_known_is_written_after_each(tmp_path):
    entries = [
        entry("lacks", "import nowhere_at_all.part"),
        entry("breaks", "print('hello'); raise ValueError('the models disagree | by 3')"),
        entry("silent", "pass"),
        entry("works", WRITE),
    ]
    seen, lines = [], []

    def say(line):
        lines.append(line)
        seen.append(list(told(tmp_path / "out").values()))

    report = measure(entries, tmp_path / "out", "cpu", say=say)
    assert told(tmp_path / "out") == {"lacks": "failed", "breaks": "failed", "silent": "failed", "works": "done"}
    waiting = "not begun"
    assert seen[0] == [waiting] * 4 and seen[2] == ["failed", *[waiting] * 3] and seen[6] == ["failed"] * 3 + [waiting]
    why = [e["why"] for e in report["entries"]]
    assert why[0] == "it needs nowhere_at_all, which is not installed here: install nowhere_at_all, or bring its wheel"
    assert why[1:] == ["ValueError: the models disagree | by 3", "it ended with code 0 and wrote no rows", ""]
    assert "[4/4] works: measures works" in lines[6] and "done in" in lines[7] and "1 rows" in lines[7]
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert "| works | a row | edit 500 ms | plain 1.250 [1.200, 1.300] | macs 0.5 |" in page
    assert "| breaks | failed: ValueError: the models disagree / by 3 | | | fills: table breaks |" in page
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["gpu.json", "gpu.md"]


def test_an_entry_that_hangs_is_ended_with_its_children_and_keeps_its_rows(tmp_path):
    started = tmp_path / "pid"
    child = f"{WRITE}; import subprocess, time; p = subprocess.Popen(['sleep', '300']); "
    found = run(
        entry("hangs", child + f"open({str(started)!r}, 'w').write(str(p.pid)); time.sleep(300)", 3), "cpu", False
    )
    assert found["state"] == "too long" and found["why"] == "it was ended at its limit of 3 s"
    assert found["rows"] == [ROW] and 3 <= found["seconds"] < 60
    assert ended(int(started.read_text()), within=30), "what it started is ended, too"


def test_no_entry_is_begun_after_the_minutes_are_over(tmp_path):
    slow = entry("a", f"{WRITE}; import time; time.sleep(1)")  # longer than the minutes on any machine
    report = measure([slow, entry("b", WRITE)], tmp_path, "cpu", minutes=0.01, say=lambda line: None)
    assert [e["state"] for e in report["entries"]] == ["done", "not begun"]


def test_a_write_that_breaks_leaves_the_files_as_they_were(tmp_path, monkeypatch):
    report = {"about": about("cpu", True), "entries": []}
    publish(report, tmp_path)
    before = (tmp_path / "gpu.json").read_text()
    whole = Path.write_text

    def half(path, text):
        whole(path, text[: len(text) // 2])
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="the disk is full"):
        publish(report | {"about": about("cuda", False)}, tmp_path)
    assert (tmp_path / "gpu.json").read_text() == before


def test_a_signal_is_a_reason():
    assert reason("one\ntwo\n", -9) == "it was ended by signal 9 after: two" and reason("", -11).endswith("signal 11")


def test_entries_are_chosen_by_name_in_their_own_order(capsys, monkeypatch):
    assert [e.name for e in select(ENTRIES, "train_step,graphs")] == ["graphs", "train_step"]
    assert select(ENTRIES, None) == list(ENTRIES) and len({e.name for e in ENTRIES}) == len(ENTRIES)
    assert main(["entries=grafs"]) == 2 and "there is no entry 'grafs': there are graphs, " in capsys.readouterr().err
    monkeypatch.setattr(gpu, "cards", lambda: [])
    assert main([]) == 2 and "no GPU is found here by nvidia-smi: device=cpu small=true" in capsys.readouterr().err


def test_the_help_names_keys_and_entries_with_their_limits(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and all(f"  {e.name} " in said and e.measures in said for e in ENTRIES)
    assert "minutes=" in said and "needs diffusers" in said


def test_what_the_numbers_depend_on_is_told():
    told = about("cpu", False)
    assert told["torch"] == torch.__version__.split("+")[0] or told["torch"] == torch.__version__
    assert len(told["load"]) == 3 and told["einops"] and told["python"] and "small" in told and "gpus" in told


@pytest.mark.parametrize("patch", [2, 8])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_those_of_the_configurations(name, patch):
    ours, file = config_of(f"{name}_{patch}"), from_file("backbone", f"dit_{name}_{patch}")
    keys = ("patch_size", "hidden_size", "depth", "num_heads", "input_size", "in_channels", "num_classes")
    assert [getattr(ours, k) for k in keys] == [getattr(file, k) for k in keys]


BARE = """
import importlib.machinery, sys
HERE = {"torch", "triton", "einops", "edit", "recipes", "benchmarks", "numpy", "sympy", "mpmath", "filelock", "jinja2",
        "networkx", "fsspec", "typing_extensions", "functorch", "torchgen", "markupsafe"}
find = importlib.machinery.PathFinder.find_spec
def bare(name, path=None, target=None):
    spec = find(name, path, target)
    lies = "site-packages" in str(getattr(spec, "origin", ""))
    return None if lies and name.split(".")[0] not in HERE else spec
importlib.machinery.PathFinder.find_spec = staticmethod(bare)
sys.meta_path = [importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter,
                 importlib.machinery.PathFinder]
"""


def test_entries_that_need_nothing_are_imported_with_torch_and_einops_alone():
    modules = sorted({e.command[1] for e in ENTRIES if not e.needs})
    code = BARE + f"from importlib import import_module\nfor m in {modules}: import_module(m)\n"
    code += "import torch\nfrom benchmarks.common import config_of\nfrom benchmarks import graphs\n"
    code += "with torch.device('meta'): net = config_of('xl_2').build()\n"
    code += "import edit; edit.apply(net, {'c': graphs.CACHES['taylorseer_last']})\n"
    code += "for m in ('omegaconf', 'yaml', 'safetensors', 'diffusers', 'rich', 'lightning'):\n"
    code += "    assert m not in sys.modules, m\n    try: import_module(m)\n    except ModuleNotFoundError: pass\n"
    code += "    else: raise AssertionError(m)\n"
    root = Path(gpu.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_all_entries_run_on_a_cpu_at_tiny_sizes(tmp_path):
    assert main(["device=cpu", "small=true", f"out={tmp_path}"]) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert all(e["state"] == "done" and e["rows"] for e in report["entries"]) and len(report["entries"]) == len(ENTRIES)
