"""What a command asks eval.py for: its words, the artifacts that they name, and the folder of the report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.names import legible, matching
from recipes.config.errors import UserError
from recipes.config.schema import Evaluation
from recipes.config.suggestions import suggest

OWN = ("artifact", "out", "reference", "debug")  # keys besides those of `Evaluation`
PLACES = ("artifact", "out", "reference", "cache")  # keys whose values are paths


def parse(words: Sequence[str]) -> dict[str, Any]:
    """`key=value` words as a dict of YAML values; `artifact` may be given several times and is a list.

    Raises:
        UserError: for a word that is no setting, an unknown key or a key given twice
    """
    keys = (*OWN, *(f.name for f in fields(Evaluation)))
    given: dict[str, Any] = {"artifact": []}
    for word in words:
        key, equals, text = word.partition("=")
        key = key.lstrip("+")
        if not equals:
            raise UserError(f"'{word}' is not a setting; settings are written key=value, such as artifact=runs/digits")
        if key not in keys:
            raise UserError(f"unknown key '{key}'{suggest(key, keys)}")
        if "${" in text and not os.path.lexists(text):
            raise UserError(f"'{word}' refers to something, as only a configuration of train.py can: write the value")
        value = _path(word, key, text) if key in PLACES else _value(word, text)
        if key == "artifact":
            values = value if isinstance(value, list) else [value]
            if not values or not all(isinstance(v, str | int | float) for v in values):
                raise UserError(f"'{word}' names no folder; write artifact=runs/<name>")
            given[key] += values
        elif key in given:
            raise UserError(f"{key} is given twice; only artifact may be")
        else:
            given[key] = value
    return given


def _value(word: str, text: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"the value of '{legible(word)}' cannot be read; put it in quotes") from error


def _path(word: str, key: str, text: str) -> Any:
    """A path as it was typed; only lists, quotes and null are read as YAML, which would change numbers and comments."""
    if not text:
        raise UserError(f"{word} is empty: give a folder")
    if text in ("null", "~") and key != "artifact":
        return None
    if os.path.lexists(text):
        return text
    value = _value(word, text) if text[0] in "\"'[" else text
    return value if isinstance(value, list) and key == "artifact" else str(value)


def folders(given: Sequence[Any]) -> list[Path]:
    """The folders of the given artifacts, each once; patterns are expanded.

    Raises:
        UserError: if a pattern matches no artifact, or none is given
        FileNotFoundError: if a folder holds no artifact
    """
    from edit.artifacts.location import find

    found: list[Path] = []
    for text in map(str, given):
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


def default_out(paths: Sequence[Path]) -> Path:
    """The run folder of a single artifact; for several, a folder of reports/ named after them."""
    if len(paths) == 1:
        return run_folder(paths[0])
    return Path("reports") / "_".join(name.replace("/", "-") for name in short_names(paths))[:100]


def run_folder(artifact: Path) -> Path:
    """The folder of the run that made an artifact, or the artifact's own."""
    return artifact.parent if artifact.name == "artifact" else artifact


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the run folders' paths that tell them apart."""
    folders = [run_folder(p.resolve()) for p in paths]
    depth = 1
    while len({f.parts[-depth:] for f in folders}) < len(set(folders)):
        depth += 1
    return [legible("/".join(f.parts[-depth:])) for f in folders]
