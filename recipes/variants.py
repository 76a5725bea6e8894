"""Training-free edits as words of a command: `variant.fast=reuse variant.fast.reuse.interval=5 variant.few.steps=10`.

`variant.<name>=<edits>` names files of configs/edits, one or [a,b]; `variant.<name>.<edit>.<field>=<value>` changes a
field of such an edit, or, with `_target_`, adds one of another class; `variant.<name>.steps=<n>` changes the sampler.
`edits` may stand after the name, as in train.py's keys: `variant.fast.edits.reuse.interval=5`.

Torch is imported inside: mistakes in names are answered without it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from edit.inputs.words import listed
from recipes.config import composed
from recipes.config.errors import UserError
from recipes.config.mistakes import mistakes
from recipes.config.schema import EVALUATION
from recipes.config.suggestions import LISTS, suggest

if TYPE_CHECKING:
    from edit.denoiser import Edit

CONFIGS = EVALUATION.parent
STEPS = "steps"  # the setting of a variant that is no edit
MOST_STEPS = 10_000


@dataclass(frozen=True)
class Variant:
    """What an artifact is changed by.

    Args:
        name: of the variant
        place: the words before an edit's name, for messages
        nodes: edits by name, in order, as a configuration has them
        steps: of the solver; None: the artifact's
    """

    name: str
    place: str
    nodes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    steps: int | None = None

    @property
    def changes(self) -> str:
        """In a few words: its edits with the fields that their files and the words name, and the steps."""
        said = [
            " ".join([name, *(f"{k}={_short(v)}" for k, v in node.items() if k != "_target_")])
            for name, node in self.nodes.items()
        ]
        return ", ".join([*said, *([f"steps={self.steps}"] if self.steps is not None else [])]) or "nothing"

    def edits(self, trusted: Sequence[str] = ()) -> dict[str, Edit]:
        """The edits, made and checked: as a configuration of train.py, then by their own constructors.

        Args:
            trusted: packages besides `edit` that a `_target_` may name

        Raises:
            UserError: for an unknown or missing field, a value of another type or beyond its limits, a class that is
                no edit, or one outside these packages
        """
        from edit.denoiser import Edit
        from edit.edits import rebuild
        from edit.inputs.trust import refuse_enormous

        made = {}
        for name, node in self.nodes.items():
            place = f"{self.place}.{name}"
            try:
                refuse_enormous(node, place)
                if wrong := next(mistakes(OmegaConf.create(dict(node)), place, ("edit", *trusted), Edit), None):
                    raise UserError(wrong)
                made[name] = rebuild(node, tuple(trusted), Edit)
            except ValueError as error:
                said = str(error)
                raise UserError(said if said.startswith(place) else f"{place}: {said}") from error
        return made


def variants(texts: Mapping[str, str]) -> tuple[Variant, ...]:
    """The variants that words name, in the order of their first words.

    Args:
        texts: by key, `variant.<name>` and what follows it

    Raises:
        UserError: for a key or value that means nothing
    """
    parts: dict[str, dict[str, str]] = {}
    for key, text in texts.items():
        _, name, *rest = key.split(".")
        if not re.fullmatch(r"[A-Za-z0-9][\w-]{0,39}", name, re.ASCII):
            raise UserError(f"{key}: a variant is named by letters, digits, - and _, got {name!r}")
        rest = rest[1:] if rest[:1] == ["edits"] else rest
        spelled = ".".join(rest)
        if spelled in (known := parts.setdefault(name, {})):
            raise UserError(f"{key} is given twice, with edits and without: keep one")
        known[spelled] = text
    return tuple(variant(name, f"variant.{name}", given) for name, given in parts.items())


def variant(name: str, place: str, given: Mapping[str, str]) -> Variant:
    """One variant.

    Args:
        name: of the variant
        place: its key
        given: texts by what follows the place: "" for names of edits, "steps", "<edit>.<field>"

    Raises:
        UserError: for a key or value that means nothing
    """
    nodes = grouped(place, given.get("", "[]"))
    steps = None if STEPS not in given else _steps(f"{place}.{STEPS}", given[STEPS])
    changes = {key: text for key, text in given.items() if key not in ("", STEPS)}
    own = {key.removesuffix("._target_") for key in changes if key.endswith("._target_") and key.count(".") == 1}
    nodes |= {name: {} for name in own if name not in nodes}
    for key, text in changes.items():
        edit, _, path = key.partition(".")
        if edit not in nodes or not path:
            raise UserError(_unknown(place, key, text, nodes))
        _put(nodes[edit], path.split("."), value_of(f"{place}.{key}", text), f"{place}.{key}")
    return Variant(name, place, nodes, steps)


def grouped(place: str, text: str) -> dict[str, dict[str, Any]]:
    """The edits of the named files of configs/edits.

    Raises:
        UserError: if there is no such file, or two have an edit of the same name
    """
    nodes: dict[str, dict[str, Any]] = {}
    for name in listed(text):
        known = composed.names(CONFIGS, "edits")
        if name not in known:
            raise UserError(f"{place}={text}: there is no configs/edits/{name}.yaml{suggest(name, known)}{LISTS}")
        for edit, node in (composed.read(CONFIGS, "edits", name) or {}).items():
            if edit in nodes:
                raise UserError(f"{place}={text}: two of these have an edit named {edit!r}: leave one of them out")
            nodes[edit] = deepcopy(dict(node))  # the file's content is kept
    return nodes


def value_of(place: str, text: str) -> Any:
    """A value as the command line of train.py has it: 5, 0.5, true, null, [1,2], text.

    Raises:
        UserError: if it is empty, or no such value
    """
    if not text:
        raise UserError(f"{place} is empty: write a value, or leave it out")
    if "${" in text:
        raise UserError(f"{place}={text} refers to something, as only a configuration of train.py can: write the value")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"x={text}"]))["x"]  # type: ignore[index, call-overload]
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise UserError(f"{place}: {text!r} is no value: write a number, true, false, null, text or [a,b]") from error
    return value


def _short(value: Any) -> str:
    text = f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _steps(place: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not 1 <= int(text) <= MOST_STEPS:
        raise UserError(f"{place}: expected a whole number from 1 to {MOST_STEPS}, got {text!r}")
    return int(text)


def _unknown(place: str, key: str, text: str, nodes: Mapping[str, Any]) -> str:
    """Why there is nothing at `place`.`key`, and what to write."""
    edit, _, path = key.partition(".")
    said = f"{place}.{key}={text}"
    if not path:
        known = ", ".join(f"{place}.{k}.<field>" for k in nodes) or f"{place}=<edits>"
        return f"{said}: there is no such setting; write {place}.{STEPS}=<n>, or {known}"
    if edit in composed.names(CONFIGS, "edits"):
        return f"{said} changes an edit that {place} does not name: add {place}={edit}"
    if not nodes:
        near = suggest(edit, composed.names(CONFIGS, "edits"))
        return f"{said} changes an edit, and {place} names none: add {place}=<edits>{near}"
    return f"{said}: {place} has no edit named {edit!r}{suggest(edit, nodes)}"


def _put(node: dict[str, Any], path: Sequence[str], value: Any, place: str) -> None:
    """Set a value in nested sections.

    Raises:
        UserError: if the path leads through something that is no section, or has an empty part
    """
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"{place}: {part} is {node!r} and no section")
    if not all(path):
        raise UserError(f"{place}: a part of this key is empty")
    node[path[-1]] = value
