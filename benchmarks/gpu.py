"""All that waits for a GPU, in one command of a few minutes.

    python -m benchmarks.gpu
    python -m benchmarks.gpu entries=graphs,train_step out=results
    python -m benchmarks.gpu device=cpu small=true

Each entry is a command of its own, with its own time limit, and fails alone. After each, gpu.json and gpu.md in `out`
are written anew, so what was measured before a crash is there. Torch, triton and einops are enough; an entry that needs
more says which library is missing. With device=cpu small=true the same code runs at tiny sizes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edit.inputs import words
from edit.inputs.command import Parser, guarded

ROOT = Path(__file__).parents[1]
TAIL = 2000  # characters of an entry's output that are kept


@dataclass(frozen=True)
class Entry:
    """One command that measures.

    Args:
        name: chooses it
        measures: what, in a few words
        fills: tables or sentences of benchmarks/README.md
        command: arguments of Python
        small: instead of these, at tiny sizes
        limit: seconds
        needs: libraries besides torch, triton and einops
    """

    name: str
    measures: str
    fills: str
    command: tuple[str, ...]
    small: tuple[str, ...]
    limit: float
    needs: str = ""


def module(name: str, text: str) -> tuple[str, ...]:
    return ("-m", f"benchmarks.{name}", *text.split())


FEW = "--rounds 1 --warmup 0 --batch 1"
ENTRIES = (
    Entry(
        "graphs",
        "guided generations of DiT with static caches, as CUDA graphs and without",
        "caches as CUDA graphs",
        module("graphs", "--sizes s_2,xl_2 --precision bf16 --steps 50 --rounds 5 --warmup 1"),
        module("graphs", f"--sizes tiny --steps 10 --caches dense,reuse,taylorseer_last {FEW}"),
        180,
    ),
    Entry(
        "routing",
        "E-DiT and DyDiT on DiT-S/2",
        "part of the work, one step",
        module("routing", "--families dit --precision bf16 --batches 1,16 --rounds 20"),
        module("routing", f"--families dit_tiny --batches 1 --budgets 1.0,0.5 {FEW}"),
        60,
    ),
    Entry(
        "routing_flux1",
        "E-DiT and DyDiT on true blocks of FLUX.1",
        "FLUX.1's true blocks wait for a GPU",
        module("routing", "--families flux1 --precision bf16 --batches 1 --rounds 10"),
        module("routing", f"--families flux --methods elastic --batches 1 --budgets 0.5 {FEW}"),
        120,
        "diffusers",
    ),
    Entry(
        "experts",
        "a layer of experts against dense feed-forwards, at FLUX.1's widths",
        "experts against dense feed-forwards",
        module(
            "experts", "--precision bf16 --tokens 1024,4096,8192,16384,65536 --layouts dense2moe,dit_moe --rounds 10"
        ),
        module("experts", "--width 64 --tokens 128 --layouts dense2moe,dit_moe --rounds 1 --warmup 0"),
        180,
    ),
    Entry(
        "attention",
        "LLSA on our block-sparse kernels against flash attention and flex_attention",
        "LLSA against flash attention",
        module(
            "attention",
            "--precision bf16 --tokens 4096,16384,32768,65536,131072 --flex --rounds 10 --warmup 3 --batch 1",
        ),
        module("attention", "--tokens 256 --block 4 --top_k 2 --rounds 1 --warmup 0"),
        240,
    ),
    Entry(
        "caching_flux1",
        "interval reuse on true blocks of FLUX.1",
        "interval reuse, six guided steps",
        module("caching", "--families flux1 --precision bf16 --batch 1 --rounds 10"),
        module("caching", f"--families flux_tiny --intervals 1,2 {FEW}"),
        90,
        "diffusers",
    ),
    Entry(
        "train_step",
        "the compiled train step against the plain DiT",
        "training step, on a GPU",
        module("train_step", "--sizes s_2,xl_2 --batch 32 --precision bf16 --compile --rivals plain"),
        module("train_step", f"--sizes tiny --rivals plain {FEW}"),
        240,
    ),
    Entry(
        "train_step_diffusers",
        "the compiled train step against that of diffusers and the plain DiT",
        "training step, on a GPU",
        module("train_step", "--sizes s_2 --batch 32 --precision bf16 --compile"),
        module("train_step", f"--sizes tiny {FEW}"),
        180,
        "diffusers",
    ),
    Entry(
        "sample",
        "our sampler against the loop around the plain DiT",
        "sampling, on a GPU",
        module("sample", "--sizes s_2,xl_2 --batch 4 --steps 20 --precision bf16 --rounds 10 --rivals plain"),
        module("sample", f"--sizes tiny --steps 2 --rivals plain {FEW}"),
        60,
    ),
)


@dataclass(frozen=True)
class Words:
    """What to measure, and where to write it.

    Args:
        entries: names, with commas; null: all
        out: folder of gpu.json and gpu.md; null: $OUT, or runs/gpu
        device: to measure on
        small: tiny sizes, to see that all of it runs
        minutes: no entry is begun after so many; null: no limit but those of the entries
    """

    entries: str | None = None
    out: str | None = None
    device: str = "cuda"
    small: bool = False
    minutes: float | None = None


@guarded
def main(argv: list[str]) -> int:
    names = "\n".join(f"  {e.name:22}{e.measures}; {e.limit:g} s{', needs ' * bool(e.needs)}{e.needs}" for e in ENTRIES)
    parser = Parser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        epilog=f"{words.explained(Words)}\n\nEntries, with their limits\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="see below")
    asked = words.read(Words, parser.parse_intermixed_args(argv).settings)
    chosen = select(ENTRIES, asked.entries)
    if asked.device.startswith("cuda") and not cards():
        raise ValueError(
            f"device={asked.device}, and no GPU is found here by nvidia-smi: device=cpu small=true shows that all runs"
        )
    out = Path(asked.out or os.environ.get("OUT") or ROOT / "runs" / "gpu")
    report = measure(chosen, out, asked.device, asked.small, asked.minutes)
    return 0 if all(e["state"] == "done" for e in report["entries"]) else 1


def select(entries: Sequence[Entry], names: str | None) -> list[Entry]:
    """Those that are named, in their own order; raises ValueError for a name that there is not."""
    known = {e.name: e for e in entries}
    wanted = list(known) if names is None else [n.strip() for n in names.strip("[]").split(",")]
    if unknown := [n for n in wanted if n not in known]:
        raise ValueError(f"there is no entry {unknown[0]!r}: there are {', '.join(known)}")
    return [e for e in entries if e.name in wanted]


def measure(
    entries: Sequence[Entry],
    out: Path,
    device: str,
    small: bool = False,
    minutes: float | None = None,
    say: Callable[[str], object] = lambda line: print(line, flush=True),
) -> dict[str, Any]:
    """Run entries one after the other; write gpu.json and gpu.md before the first and after each.

    Args:
        entries: to run
        out: folder, made where it does not exist
        device: to measure on
        small: with their small commands
        minutes: after which none is begun
        say: takes a line of progress

    Returns:
        The report, as in gpu.json.
    """
    report: dict[str, Any] = {"about": about(device, small), "entries": []}
    report["entries"] = [
        {"name": e.name, "measures": e.measures, "fills": e.fills, "state": "not begun", "rows": []} for e in entries
    ]
    publish(report, out)
    begin = time.monotonic()
    for k, (entry, found) in enumerate(zip(entries, report["entries"], strict=True), 1):
        if minutes is not None and time.monotonic() - begin > 60 * minutes:
            break
        say(f"[{k}/{len(entries)}] {entry.name}: {entry.measures}, at most {entry.limit:g} s")
        found |= run(entry, device, small)
        publish(report, out)
        why = f": {found['why']}" if found["why"] else ""
        say(f"      {found['state']} in {found['seconds']:.0f} s, {len(found['rows'])} rows{why}")
    say(f"results in {out / 'gpu.json'} and {out / 'gpu.md'}")
    return report


def run(entry: Entry, device: str, small: bool) -> dict[str, Any]:
    """One entry in a process of its own, which is ended with all that it started at its limit.

    Returns:
        state: "done", "failed" or "too long"; seconds; why, a sentence or ""; rows, as far as they were written; tail
        of the output; load of the machine before
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, *(entry.small if small else entry.command), "--device", device, "--json", str(path)]
        load, begin = os.getloadavg()[0], time.monotonic()
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            output, state = child.communicate(timeout=entry.limit)[0], "done"
        except BaseException as error:
            os.killpg(child.pid, signal.SIGKILL)
            output, state = child.communicate()[0], "too long"
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
        seconds = time.monotonic() - begin
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
    why = f"it was ended at its limit of {entry.limit:g} s" if state == "too long" else ""
    if state == "done" and (child.returncode or not rows):
        state, why = "failed", reason(output, child.returncode)
    return {
        "state": state,
        "seconds": round(seconds, 1),
        "why": why,
        "rows": rows,
        "load": round(load, 2),
        "command": ["python", *command[1:-2]],
        "tail": output[-TAIL:],
    }


def reason(output: str, code: int) -> str:
    """Why a command failed, from the end of its output."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if missing := re.search(r"No module named '([^'.]+)", lines[-1] if lines else ""):
        name = missing[1]
        return f"it needs {name}, which is not installed here: install {name}, or bring its wheel"
    if code < 0:
        return f"it was ended by signal {-code}" + (f" after: {lines[-1]}" if lines else "")
    return lines[-1] if lines else f"it ended with code {code} and wrote no rows"


# ---- what is written ------------------------------------------------------------------------------------------------


def cards() -> list[str]:
    """Name, driver and memory of each GPU, as nvidia-smi tells them."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return [line.strip() for line in shell(*query).splitlines() if line.strip()]


def shell(*command: str) -> str:
    """What a command prints; "" if it cannot be run."""
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout if found.returncode == 0 else ""


def about(device: str, small: bool) -> dict[str, Any]:
    """All that the numbers depend on; of libraries, their metadata, so that no GPU is used here."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    revision = shell("git", "rev-parse", "HEAD").strip()
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "small": small,
        "gpus": cards(),
        "processor": f"{platform.processor() or platform.machine()}, {os.cpu_count()} threads",
        "load": [round(v, 2) for v in os.getloadavg()],
        "revision": revision + "+changes" * bool(revision and shell("git", "status", "--porcelain").strip()) or None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "einops", "diffusers")},
    }


def publish(report: Mapping[str, Any], out: Path) -> None:
    """Both files, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("gpu.json", json.dumps(report, indent=1) + "\n"), ("gpu.md", markdown(report))):
        temporary = out / f"{name}.tmp-{os.getpid()}"
        temporary.write_text(text)
        os.replace(temporary, out / name)


def markdown(report: Mapping[str, Any]) -> str:
    """A table of all rows: times, and ratios, which are above 1 where the first of the times is the smallest."""
    known = "; ".join(f"{k} {shown(v)}" for k, v in report["about"].items() if v not in (None, [], False))
    lines = ["# Measured on a GPU" if not report["about"]["small"] else "# Tiny sizes: no measurement", "", known, ""]
    lines += ["| entry | row | median times | ratios: median [quartiles] | more |", "|---|---|---|---|---|"]
    for entry in report["entries"]:
        for row in entry["rows"]:
            times = ", ".join(f"{n} {1e3 * s['median']:.3g} ms" for n, s in row["seconds"].items())
            ratios = ", ".join(
                f"{n} {r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for n, r in row["ratios"].items()
            )
            more = ", ".join(f"{k} {shown(v)}" for k, v in row.items() if k not in ("label", "seconds", "ratios"))
            lines.append(f"| {entry['name']} | {row['label']} | {times} | {ratios} | {more} |")
        if entry["state"] != "done":
            told = f"{entry['state']}: {entry['why']}" if entry.get("why") else entry["state"]
            lines.append(f"| {entry['name']} | {told.replace('|', '/')} | | | fills: {entry['fills']} |")
    return "\n".join(lines) + "\n"


def shown(v: Any) -> str:
    if isinstance(v, float):
        return f"{v:.4g}"
    if isinstance(v, Mapping):
        return " ".join(f"{k}={shown(w)}" for k, w in v.items())
    return ", ".join(map(str, v)) if isinstance(v, list) else str(v)


if __name__ == "__main__":
    raise SystemExit(main())
