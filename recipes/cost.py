"""What a backbone or an artifact costs, told before anything is trained.

    python -m recipes.cost backbone=dit_xl_2                                    # no weights, no data, no GPU
    python -m recipes.cost backbone=dit_xl_2 backbone.depth=14 sampler=ddim sampler.steps=50 guidance=1.5
    python -m recipes.cost artifact=runs/digits --latency --json

Counting is `edit.measuring.cost`.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from edit import edits as editing
from edit.artifacts.checkpoint import load
from edit.denoiser import Spec
from edit.inputs import trust, words
from edit.inputs.command import Parser, guarded
from edit.inputs.limits import Limits
from edit.measuring.cost import cost
from edit.measuring.devices import find_device, mfu
from edit.predictions import default_objective
from edit.sampling import Sampler, default_sampler
from recipes.config import composed
from recipes.report.amounts import short

GROUPS = ("backbone", "sampler", "edits")  # of configs/
SHORT = {"sampler.steps": "sampler.solver.steps"}
MOST_SAMPLES, MOST_ROUNDS = 100_000, 10_000
EXAMPLES = """examples:
  python -m recipes.cost backbone=dit size=XL/2
  python -m recipes.cost backbone=dit_xl_2 edits=depth edits.depth.ratio=0.5 sampler=ddpm sampler.steps=50 guidance=1.5
  python -m recipes.cost backbone=dit_s_2 batch=8 --latency --device cuda
  python -m recipes.cost artifact=runs/digits --latency --json
"""


@dataclass(frozen=True)
class Words:
    """What to count.

    Args:
        backbone: a family of configs/backbone, or one of its sizes (dit_xl_2); backbone.FIELD=VALUE changes it
        size: of the backbone's family, such as XL/2
        artifact: instead of a backbone: what a run has left
        edits: a file of configs/edits, applied to the backbone; edits.EDIT.FIELD=VALUE changes it
        sampler: a file of configs/sampler, else the artifact's, the stock pipeline's, or 50 steps of Euler or DDIM;
            sampler.steps=N changes it
        guidance: 1: the conditional prediction alone; null: as the sampler says
        batch: samples at a time; counts are per sample
    """

    backbone: str | None = None
    size: str | None = None
    artifact: str | None = None
    edits: str | None = None
    sampler: str | None = None
    guidance: float | None = None
    batch: Annotated[int, Limits(1, MOST_SAMPLES)] = 1


@guarded(mistakes=(ValueError, TypeError, OSError))
def main(argv: list[str]) -> int:
    parser = Parser(
        prog="python -m recipes.cost",
        description="Parameters, executed MACs and, if asked, latency and memory of a backbone or an artifact.",
        epilog=EXAMPLES + "\n" + words.explained(Words),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="what to count, see below")
    parser.add_argument("--latency", action="store_true", help="time forward and generation, measure peak memory")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each (10)")
    parser.add_argument("--real", action="store_true", help="count a run with weights: for data-dependent edits")
    parser.add_argument("--device", default="cpu", help="to run on with --latency or --real (cpu)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    configs = Path(__file__).parents[1] / "configs"
    parser.add_argument("--configs", type=Path, default=configs, help="folder of the configuration groups")
    args = parser.parse_intermixed_args(argv)
    try:
        with Console(stderr=True).status("counting"):
            report = resolve(args)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise ValueError(f"out of memory ({str(error).splitlines()[0]}): lower batch") from error
    print(json.dumps(report, indent=2)) if args.json else show(report)
    return 0


def resolve(args: argparse.Namespace) -> dict[str, Any]:
    """Build what the settings name, and count it."""
    own, texts = words.apart(args.settings, GROUPS)
    asked = words.read(Words, own)
    changes = {SHORT.get(key, key): parsed(text) for key, text in texts.items()}
    changes |= {} if asked.guidance is None else {"sampler.guidance": asked.guidance}
    if (asked.backbone is None) == (asked.artifact is None):
        raise ValueError("say what to count: backbone=<name> or artifact=<folder>, one of the two")
    if not 1 <= args.rounds <= MOST_ROUNDS:
        raise ValueError(f"--rounds is a number from 1 to {MOST_ROUNDS}, got {args.rounds}")
    device = find_device(args.device)

    def group(name: str, default: Any = None) -> Any:
        mine = {k: v for k, v in changes.items() if k.startswith(f"{name}.")}
        file = getattr(asked, name)
        size = asked.size if name == "backbone" else None
        value = default if file is None else from_file(args.configs, name, file, size)
        return changed(value, name, mine)

    if asked.artifact is not None:
        given = [k for k in ("edits", "size") if getattr(asked, k) is not None]
        if fixed := given + [k for k in changes if not k.startswith("sampler.")]:
            raise ValueError(f"an artifact has its own backbone and edits: leave {fixed[0]} out, or count a backbone")
        artifact = load(asked.artifact, device)
        denoiser, objective, default = artifact.denoiser, artifact.objective, artifact.sampler
    else:
        spec, edits = group("backbone"), group("edits", {})
        weights = args.latency or args.real
        with torch.device(device if weights else "meta"):
            denoiser = editing.apply(spec.build(), edits, fresh=weights).eval()
        objective = default_objective(denoiser)
        default = default_sampler(denoiser, objective)
    sampler = group("sampler", default)
    counted = cost(
        denoiser, sampler, objective, batch=asked.batch, real=args.real, rounds=args.rounds if args.latency else 0
    )
    what = {k: v for k in ("backbone", "size", "artifact", "edits") if (v := getattr(asked, k)) is not None}
    return {**what, **changes, "sampler": editing.describe(sampler), **counted.as_dict()}


def parsed(text: str) -> Any:
    """A number, true, false, null or a list as JSON writes it; anything else is a word."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def from_file(configs: Path, group: str, name: str, size: str | None = None) -> Any:
    """The object that a configuration of a group describes.

    Raises:
        FileNotFoundError: if there is none of that name, with the nearest names
        ValueError: for a size that the backbone's family does not have
    """
    node = composed.read(configs, group, name, size)
    if node is None:
        names = composed.names(configs, group)
        if not names:
            raise FileNotFoundError(f"no {group} files in {configs / group}: give the folder with --configs")
        close = difflib.get_close_matches(name, names, 3) or names
        raise FileNotFoundError(f"no {group} named {name}: the nearest are {', '.join(close)}")
    return built(group, OmegaConf.to_container(OmegaConf.create(node), resolve=True))


def built(group: str, node: Any) -> Any:
    """What a configuration group describes. Raises ValueError if it describes something else, or more than can be."""
    trust.refuse_enormous(node, group)
    if group != "edits":
        return editing.rebuild(node, kind={"backbone": Spec, "sampler": Sampler}[group])
    if not isinstance(node, Mapping) or "_target_" in node:
        raise ValueError(f"edits: expected edits by their names, got {trust.cut(node)}")
    return {name: editing.rebuild(edit, kind=editing.Edit) for name, edit in node.items()}


def changed(value: Any, name: str, changes: Mapping[str, Any]) -> Any:
    """A dataclass, or a mapping of them, with fields changed by their dotted names.

    Raises:
        ValueError: if there is no such field, or it is of another type
    """
    if not changes:
        return value
    tree = {
        name: {k: editing.describe(v) for k, v in value.items()}
        if isinstance(value, Mapping)
        else editing.describe(value)
    }
    for path, new in changes.items():
        *parents, last = path.split(".")
        node: Any = tree
        for key in parents:
            node = node.get(key, {}) if isinstance(node, Mapping) else {}
        if last not in node:
            options = [k for k in node if k != "_target_"]
            close = difflib.get_close_matches(last, options, 3) or options
            raise ValueError(f"{path}: there is no such setting; the nearest are {', '.join(close) or 'none'}")
        old = node[last]
        number = isinstance(old, float) and isinstance(new, int) and not isinstance(new, bool)
        if old is not None and not number and type(new) is not type(old):
            raise ValueError(f"{path} takes {type(old).__name__}, such as {old}, got {new!r}")
        node[last] = new
    return built(name, tree[name])


def show(report: Mapping[str, Any]) -> None:
    """Print a report as a table."""
    r, n = report, report["batch"]
    table = Table("cost", "", title=f"{r.get('backbone') or r.get('artifact')} on {r['device']}", title_justify="left")
    table.add_row("parameters", short(r["parameters"]))
    if "per_token" in r:
        table.add_row("  activated per token", short(r["per_token"]))
    table.add_row("  read by a forward" + (f" of {n}" if "per_token" in r else ""), short(r["activated"]))
    table.add_row("elements of fixed tables", short(r["buffers"]))
    least = "at least " if r["uncounted"] else ""
    table.add_row("MACs per forward", least + short(r["macs"]), end_section=True)
    table.add_row("to generate one image: forwards", f"{r['evaluations']}")
    table.add_row("  MACs of all of them", least + short(r["macs_per_image"]), end_section="held" not in r)
    if "held" in r:
        table.add_row("  held by caches in between", f"{r['held'] / 2**20:,.3g} MiB", end_section=True)
    table.add_row("to train on one sample: forwards", "1, and its backward pass as 2")
    table.add_row("  FLOPs (2 per MAC)", least + short(r["training_flops"]), end_section=True)
    if least:
        table.add_row("operators nobody counts", ", ".join(r["uncounted"]))
    for key, label in (("forward", f"seconds per forward of {n}"), ("generation", f"seconds per image, {n} at a time")):
        if r[key]:
            s = r[key]
            table.add_row(label, f"{s['median']:.4g} (quartiles {s['low']:.4g} to {s['high']:.4g}, n={s['count']})")
    if r["forward"] and (share := mfu(2 * r["macs"] * n, r["forward"]["median"], r["device"])) is not None:
        table.add_row("share of the bf16 peak", f"{share:.1%}")
    if r["peak_memory"]:
        table.add_row(f"peak memory, generating {n}", f"{r['peak_memory'] / 2**20:,.1f} MiB")
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
