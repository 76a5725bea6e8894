"""The request of an eval.py command: its words, the artifacts that they name, and the folder of the report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from data.names import legible, matching
from edit.artifacts.measured import run_folder
from edit.inputs import words as command
from recipes.config.errors import UserError
from recipes.config.schema import Evaluation


@dataclass
class Asked(Evaluation):
    """The keys of eval.py: those of an evaluation, and where it reads and writes."""

    artifact: tuple[str, ...] = ()  # each a folder, a list [a,b] of folders, or a pattern
    out: str | None = None
    reference: str | None = None
    variant: tuple[str, ...] = ()  # only with a name, variant.<name>, which `recipes.variants` reads


OWN = tuple(f.name for f in fields(Asked) if f.name not in Evaluation.__dataclass_fields__)


def parse(words: Sequence[str]) -> dict[str, Any]:
    """The values that `key=value` words give, by key; `artifact` is a tuple, empty where no word names one.

    Raises:
        ValueError: for a word that is no setting, an unknown key, a value of another type or a key given twice
        UserError: for a reference to another key, as only a configuration of train.py has
    """
    for word in words:
        if "${" in word:
            raise UserError(f"'{word}' refers to something, as only a configuration of train.py can: write the value")
        if word.partition("=")[0] == "variant":
            raise UserError(f"variant has no name: write variant.<name>={word.partition('=')[2] or '<edits>'}")
    return {"artifact": ()} | command.parse(Asked, words)


def folders(given: Sequence[str]) -> list[Path]:
    """The folders of the given artifacts, each once; lists and patterns are expanded where no folder has such a name.

    Raises:
        UserError: if a pattern matches no artifact, or none is given
        FileNotFoundError: if a folder holds no artifact
    """
    from edit.artifacts.location import find

    found: list[Path] = []
    parts = (part for text in given for part in ([text] if os.path.lexists(text) else command.listed(text)))
    for text in parts:
        if os.path.lexists(text) or not any(c in text for c in "*?["):
            found.append(find(text))
            continue
        matches = [Path(p) for p in matching(text) if Path(p).is_dir()]
        artifacts = [p for p in matches if (p / "config.json").is_file() or (p / "artifact" / "config.json").is_file()]
        if not artifacts:
            raise UserError(f"artifact={text} matches no folder with an artifact")
        found += [find(p) for p in artifacts]
    if not found:
        raise UserError("nothing to evaluate: say artifact=runs/<name>, or --help")
    once: dict[str, Path] = {}
    for path in found:
        once.setdefault(os.path.realpath(path), path)
    return list(once.values())


def default_out(paths: Sequence[Path], variants: Sequence[str] = ()) -> Path:
    """The run folder of a single artifact; for several, or variants by name, a folder of reports/ named after them."""
    if len(paths) == 1 and not variants:
        return run_folder(paths[0])
    return Path("reports") / "_".join(name.replace("/", "-") for name in (*short_names(paths), *variants))[:100]


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the run folders' paths that tell them apart."""
    folders = [run_folder(p.resolve()) for p in paths]
    depth = 1
    while len({f.parts[-depth:] for f in folders}) < len(set(folders)):
        depth += 1
    return [legible("/".join(f.parts[-depth:])) for f in folders]
