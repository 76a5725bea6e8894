"""Choices without a file of their own: the sizes of a backbone's family, and a method on a world.

- `backbone/dit_xl_2` is `backbone/dit.yaml` with the keys under `sizes: XL/2`; `size=B/2` asks for another size.
- `experiment/flux_tiny/lcm` is `world/flux_tiny.yaml`, then `method/lcm.yaml`, unless a file of that name exists.
- `about` in a world or a method is for this module and `recipes.list`: Hydra does not see it.

`made` answers Hydra's file source (`Files`); `read` and `names` answer everyone who reads a group without Hydra.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf

from edit.inputs.trust import cut, load_yaml
from recipes.config.suggestions import nearest

SIZE = "size=${oc.select:size,None}"  # the choice of the group `size`, in a defaults list
NONE = "None"  # no choice, or a primary file without that group
RESERVED = ("name", "without")  # in a size: its whole name, and keys of the family that it does not have


class Made(NamedTuple):
    """A configuration as Hydra's source hands it out."""

    content: dict[str, Any]
    package: str | None = None


# ---- families of backbones ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A file of configs/backbone with `sizes`.

    Args:
        name: of the file
        base: the keys that its sizes share
        sizes: the keys that differ, by size
        default: the size that the family's name alone means
    """

    name: str
    base: Mapping[str, Any]
    sizes: Mapping[str, Mapping[str, Any]]
    default: str
    names: Mapping[str, str] = field(init=False)  # of whole backbones, in file-name spelling -> size

    def __post_init__(self):
        whole = {str(keys.get("name") or f"{self.name}_{spelling(size)}"): size for size, keys in self.sizes.items()}
        object.__setattr__(self, "names", whole)

    def size(self, given: str) -> str:
        """The size as the file spells it: `xl_2` is `XL/2`.

        Raises:
            ValueError: naming the family's sizes
        """
        known = {spelling(size): size for size in self.sizes}
        if spelling(given) not in known:
            near = " or ".join(map(repr, nearest(given, self.sizes)))
            hint = f", did you mean {near}?" if near else ""
            raise ValueError(f"{self.name} has no size {given!r}{hint} (accepted: {', '.join(self.sizes)})")
        return known[spelling(given)]

    def keys(self, size: str) -> dict[str, Any]:
        """The whole backbone of a size."""
        own = self.sizes[size]
        left_out = (*RESERVED, *map(str, own.get("without") or ()))
        return {k: v for k, v in {**self.base, **own}.items() if k not in left_out}


def spelling(size: str) -> str:
    """A size as a file name has it: XL/2 -> xl_2."""
    return size.lower().replace("/", "_")


def families(configs: Path) -> dict[str, Family]:
    """The families of a configuration folder, by name."""
    known = {}
    for file in sorted((configs / "backbone").glob("*.yaml")):
        content = _content(file)
        if isinstance(content.get("sizes"), Mapping | str):
            known[file.stem] = content
    return {name: _family(name, content, known) for name, content in known.items()}


def _family(name: str, content: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> Family:
    sizes = content["sizes"]
    if isinstance(sizes, str):  # those of another family
        sizes = known.get(sizes, {}).get("sizes")
    if not sizes or not isinstance(sizes, Mapping) or not all(isinstance(keys, Mapping) for keys in sizes.values()):
        raise ValueError(f"backbone/{name}.yaml: sizes: expected a section of keys for each size, got {cut(sizes)}")
    base = {k: v for k, v in content.items() if k not in ("sizes", "size")}
    sizes = {str(size): keys for size, keys in sizes.items()}
    return Family(name, base, sizes, default=str(content.get("size") or next(iter(sizes))))


def _backbone(configs: Path, choice: str, size: str) -> dict[str, Any] | None:
    """The keys of a backbone, by the name of a family or of one of its sizes; None if no family has that name.

    Raises:
        ValueError: for a size that the family does not have
    """
    for family in families(configs).values():
        if choice == family.name or choice in family.names:
            own = family.names.get(choice, family.default)
            if size != NONE:
                own = family.size(size)
            return family.keys(own)
    return None


# ---- worlds and methods ---------------------------------------------------------------------------------------------


def _experiment(configs: Path, name: str) -> Made | None:
    """World and method as one experiment; None unless both files exist.

    Raises:
        ValueError: if the method needs something that the world does not have
    """
    world, _, method = name.partition("/")
    files = configs / "world" / f"{world}.yaml", configs / "method" / f"{method}.yaml"
    if not method or not all(file.is_file() for file in files):
        return None
    if reason := unfit(configs, world, method):
        raise ValueError(reason)
    base = about(configs, "method", method).get("base")
    defaults = [f"/experiment/{world}/{base}" if base else f"/world/{world}", f"/method/{method}", "_self_"]
    own = {} if about(configs, "method", method).get("part") else {"name": f"{world}_{method}"}
    return Made({"defaults": defaults, **own}, "_global_")


def unfit(configs: Path, world: str, method: str) -> str | None:
    """Why a method does not work on a world, in one sentence; None if it does."""
    needs = _needs(configs, method)

    def missing(name: str) -> list[str]:
        has = about(configs, "world", name).get("has", ())
        return [what for what in needs if what not in has]

    if not (lacking := missing(world)):
        return None
    others = [name for name in _stems(configs, "world") if not missing(name)]
    return (
        f"experiment={world}/{method}: {method} needs {needs[lacking[0]]}, which {world} has not; worlds that have it: "
        f"{', '.join(others) or 'none'}"
    )


def _needs(configs: Path, method: str) -> dict[str, str]:
    """What a method and those that it builds on need of a world, with the words for it."""
    told, needs = about(configs, "method", method), {}
    defaults = _content(configs / "method" / f"{method}.yaml").get("defaults") or ()
    below = [entry.removeprefix("/method/") for entry in map(str, defaults) if entry.startswith("/method/")]
    for base in (*below, *([told["base"]] if "base" in told else [])):
        needs |= _needs(configs, base)
    return needs | dict(told.get("needs") or {})


def about(configs: Path, group: str, name: str) -> dict[str, Any]:
    """What a world's or a method's file says of itself."""
    told = _content(configs / group / f"{name}.yaml").get("about")
    return told if isinstance(told, dict) else {}


# ---- answers --------------------------------------------------------------------------------------------------------


def made(configs: Path, path: str) -> Made | None:
    """The configuration at a path such as `backbone/dit_xl_2`; None if it is a plain file's, or nobody's.

    Raises:
        ValueError: in one sentence, for a size or a pair of world and method that do not exist
    """
    group, _, name = path.removesuffix(".yaml").partition("/")
    if group == "size":  # says nothing itself: the backbone looks at what was chosen
        return Made({}, "_global_") if name and families(configs) else None
    if group == "backbone":
        choice, _, size = name.partition("/size=")
        return _sized(configs, choice, size) if size else _unsized(configs, choice)
    if group == "experiment" and not (configs / f"{path.removesuffix('.yaml')}.yaml").is_file():
        return _experiment(configs, name)
    return None


def _unsized(configs: Path, choice: str) -> Made | None:
    """A backbone as it is chosen: it refers to itself at the size that was chosen."""
    known = any(choice == family.name or choice in family.names for family in families(configs).values())
    return Made({"defaults": [{f"{choice}@_here_": SIZE}]}) if known and not _plain(configs, choice) else None


def _sized(configs: Path, choice: str, size: str) -> Made | None:
    if not _plain(configs, choice):
        keys = _backbone(configs, choice, size)
        return None if keys is None else Made(keys)
    if size != NONE:
        raise ValueError(f"backbone={choice} is of one size: leave out size={size}")
    return Made({})


def _plain(configs: Path, choice: str) -> bool:
    """Whether a file of configs/backbone is one backbone."""
    file = configs / f"backbone/{choice}.yaml"
    return file.is_file() and not isinstance(_content(file).get("sizes"), Mapping | str)


def finish(path: str, content: Any) -> None:
    """Change what Hydra has read from a plain file: `about` goes, and a backbone looks at the size that was chosen."""
    group, _, name = path.removesuffix(".yaml").partition("/")
    if group in ("world", "method"):
        content.pop("about", None)
    if group == "backbone" and isinstance(content, DictConfig):
        content["defaults"] = [*content.get("defaults", ()), {f"{name}@_here_": SIZE}]


def read(configs: Path, group: str, name: str, size: str | None = None) -> dict[str, Any] | None:
    """A configuration of a group, as plain values and without its defaults list; None if there is none of that name.

    Raises:
        ValueError: for a size that the family does not have, or for a family without a size
    """
    file = configs / group / f"{name}.yaml"
    if group == "backbone" and (keys := _backbone(configs, name, size or NONE)) is not None:
        return keys
    if not file.is_file():
        return None
    if size is not None:
        raise ValueError(f"{group}={name} is of one size: leave out size={size}")
    return _content(file)


def names(configs: Path, group: str) -> list[str]:
    """Everything that may be chosen in a group; experiments with their folder."""
    own = set(_stems(configs, group))
    if group == "size":
        own |= {size for family in families(configs).values() for size in family.sizes}
    if group == "backbone":
        own |= {name for family in families(configs).values() for name in family.names}
    if group == "experiment":
        methods = [m for m in _stems(configs, "method") if not about(configs, "method", m).get("part")]
        pairs = ((w, m) for w in _stems(configs, "world") for m in methods)
        own |= {f"{world}/{method}" for world, method in pairs if not unfit(configs, world, method)}
    return sorted(own)


def groups(configs: Path) -> list[str]:
    """All groups of a configuration folder."""
    folders = [folder.name for folder in configs.iterdir() if folder.is_dir()] if configs.is_dir() else []
    return [*folders, *(["size"] if families(configs) else [])]


def _stems(configs: Path, group: str) -> list[str]:
    folder = configs / group
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


def _content(file: Path) -> dict[str, Any]:
    """A file's mapping, read once as long as it stays as it is; empty where it is something else."""
    state = file.stat()
    return _parsed(file, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=512)
def _parsed(file: Path, changed: int, length: int) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(load_yaml(file))
    except (yaml.YAMLError, ValueError, RecursionError):  # told when the file itself is chosen
        return {}
    return typing.cast(dict[str, Any], content) if isinstance(content, dict) else {}
