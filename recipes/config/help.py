"""What `--help` of train.py and eval.py prints, made of configuration files alone: torch and Hydra are not asked."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf

from edit.inputs.trust import load_yaml
from recipes.config import composed

LINE = 118  # characters
GROUPS = "$APP_CONFIG_GROUPS"  # in the template: the groups with their choices
PAIRS = ("experiment", "world", "method", "size")  # groups that are told in other words than a list of files


def help_of(config_dir: Path, name: str) -> str:
    """The help of a primary configuration: its `hydra.help.template`; "" if it has none.

    Args:
        config_dir: the folder of the YAML groups
        name: of the primary file, without suffix

    Raises:
        OSError, ValueError: if the file cannot be read
    """
    template = OmegaConf.select(load_yaml(config_dir / f"{name}.yaml"), "hydra.help.template", default="")
    return str(template).replace(GROUPS, "\n".join(choices(config_dir)))


def choices(config_dir: Path) -> Iterator[str]:
    """The groups and what each may be, wrapped."""
    groups = composed.groups(config_dir)
    told: dict[str, str] = {}
    if "experiment" in groups:
        told["experiment"] = "<world>/<method>, or a file of configs/experiment, such as flux_dev/distill"
        told |= {f"  {part}s": ", ".join(_chosen(config_dir, part)) for part in ("world", "method") if part in groups}
    for group in sorted(set(groups) - set(PAIRS)):
        told[group] = ", ".join(sorted(file.stem for file in (config_dir / group).glob("*.yaml")))
    if "edits" in told and "method" in groups:  # most are those of a method of the same name, which is told already
        alone = [n for n in told["edits"].split(", ") if not _is_of_method(config_dir / "method" / f"{n}.yaml", n)]
        told["edits"] = f"those of methods, by the same names, and {', '.join(alone)}"
    if sizes := _sizes(config_dir):
        told["size"] = f"of the backbone's family: {sizes}"
    for group, options in told.items():
        indent = " " * (len(group) - len(group.lstrip()) + 2)
        yield textwrap.fill(f"{group}: {options}", LINE, subsequent_indent=indent + "  ", break_on_hyphens=False)


def _chosen(config_dir: Path, part: str) -> list[str]:
    """Worlds, or the methods that are neither a stage of another nor what others build on."""
    names = composed.names(config_dir, part)
    return [name for name in names if not {"part", "part of"} & composed.about(config_dir, part, name).keys()]


def _is_of_method(file: Path, edits: str) -> bool:
    """Whether there is a method in this file, with these edits."""
    return file.exists() and re.search(rf"^  - override /edits: {edits}$", file.read_text(), re.MULTILINE) is not None


def _sizes(config_dir: Path) -> str:
    """Sizes by family; families with the same sizes are told together."""
    by_sizes: dict[str, list[str]] = {}
    for family in composed.families(config_dir).values():
        ends: dict[str, list[str]] = {}  # S/2, S/4, S/8 are told as S/2|4|8
        for size in family.sizes:
            head, slash, patch = size.partition("/")
            ends.setdefault(head + slash, []).append(patch)
        told = ", ".join(head + "|".join(patches) for head, patches in ends.items())
        by_sizes.setdefault(told, []).append(family.name)
    return "; ".join(f"{' and '.join(names)} {sizes}" for sizes, names in by_sizes.items())


def keys_of(file: Path) -> Iterator[str]:
    """The keys of a flat YAML file with their defaults and what the comments behind them say, in two columns."""
    rows = re.findall(r"^(\w+): (.*?) # (.*)$", file.read_text(), re.MULTILINE)
    wide = max(len(f"{key}={value}") for key, value, _ in rows) + 2
    for key, value, said in rows:
        lines = textwrap.wrap(said, LINE - wide - 2, break_on_hyphens=False)
        yield f"  {f'{key}={value}':<{wide}}" + f"\n{' ' * (wide + 2)}".join(lines)
