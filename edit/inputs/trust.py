"""What a file from elsewhere may ask for, and how large it may be: artifacts, manifests, configurations.

A file names classes, never functions. A class must be of the kind that its place expects, and its own module must lie
in a trusted package: what a module has only imported is not its own. What may stand at an argument is what the
constructor's annotation says. Sizes are bounded before anything is built. No torch is imported here, and what reads
YAML where it is read alone: models are edited and sampled with torch and einops.
"""

from __future__ import annotations

import inspect
import io
import json
import re
import sys
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edit.moved import current

if TYPE_CHECKING:
    import yaml
    from omegaconf import DictConfig, ListConfig

JSON_BYTES = 2**24  # edits.json, config.json, an index of shards: kilobytes in practice
YAML_BYTES = 2**20
YAML_NODES = 100_000  # after anchors are written out
DEEP = 32  # sections inside sections
LONG = 2**16  # items of a list
LARGE = 2**24  # any whole number but a seed: classes, channels, hidden units
UNITS = 1024  # blocks, layers
STEPS = 10_000  # of a solver

Kinds = tuple[type, ...]


# ---- names ----------------------------------------------------------------------------------------------------------


def named(path: Any, packages: Collection[str], kinds: Kinds = (object,), who: str = "the artifact") -> type:
    """The class that an import path names.

    Args:
        path: as it stands in the file
        packages: that may be imported, ours first
        kinds: the class is a subclass of one of them
        who: asks for it

    Raises:
        ValueError: if it is outside of these packages, not there, no class of their own, or of another kind
    """
    if not isinstance(path, str):
        raise ValueError(f"{who} holds {cut(path)} where an import path was expected")
    path = current(path)
    module, _, name = path.rpartition(".")
    shown, (ours, *_) = cut(path, quoted=False), packages
    if module.split(".")[0] not in packages:
        raise ValueError(f"{who} asks for {shown}, outside of `{ours}`: trust its package to allow that")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError, OSError) as error:
        raise ValueError(f"{who} asks for {shown}, which this version of {ours} does not have") from error
    if not isinstance(found, type):
        raise ValueError(f"{who} asks for {shown}, which is not a dataclass or another class, and is not called")
    if found.__module__.split(".")[0] not in packages:
        raise ValueError(f"{who} asks for {shown}, which is a class of {found.__module__}, outside of `{ours}`")
    if not is_kind(found, kinds):
        raise ValueError(f"{who} asks for {shown}, where {said(kinds)} was expected")
    return found


def is_kind(found: Any, kinds: Kinds) -> bool:
    """Whether this is a class, and of one of the kinds."""

    def derives(kind: type) -> bool:
        try:
            return issubclass(found, kind)
        except TypeError:  # a protocol that cannot be checked
            return False

    return isinstance(found, type) and any(map(derives, kinds))


def said(kinds: Kinds) -> str:
    """'an edit.denoiser.Edit'; 'a plain value' where no class is accepted."""
    names = [f"{k.__module__}.{k.__qualname__}" for k in dict.fromkeys(kinds)]
    return f"{'an' if names[0][0] in 'aeiou' else 'a'} {' or '.join(names)}" if names else "a plain value"


def cut(value: Any, quoted: bool = True) -> str:
    """A value from outside for a sentence: on one line, not longer than a line."""
    if isinstance(value, int) and value.bit_length() > 1000:  # Python does not write out the longest
        return "a number of hundreds of digits"
    text = repr(value)
    if isinstance(value, str) and not quoted:
        text = "".join(c if c.isprintable() else "?" for c in value)
    return text if len(text) <= 100 else f"{text[:97]}..."


# ---- arguments ------------------------------------------------------------------------------------------------------


def hints(target: Any, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Annotations of the parameters; `Any` where one names something that exists for type checkers only."""
    is_class = inspect.isclass(target)
    own = getattr(inspect.unwrap(target.__init__ if is_class else target), "__globals__", {})

    def resolved(parameter: inspect.Parameter) -> Any:
        name, annotation = parameter.name, parameter.annotation
        # a field is read in the module that declares it, which may be another one than that of the class
        declares = (c for c in target.__mro__ if name in c.__dict__.get("__annotations__", {})) if is_class else ()
        scope = next((vars(sys.modules[c.__module__]) for c in declares if c.__module__ in sys.modules), own)
        try:
            described = types.SimpleNamespace(__annotations__={"x": annotation})
            return typing.get_type_hints(described, scope, include_extras=True)["x"]
        except (NameError, TypeError, AttributeError, SyntaxError):
            return Any

    return {n: Any if p.annotation is p.empty else resolved(p) for n, p in parameters.items()}


def accepted(hint: Any) -> Kinds:
    """The classes that an annotation names, at any depth; `object` where it does not say, none for plain values."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in (Any, object, dict, list, tuple):
        return (object,)
    if origin is Literal:
        return ()
    if args:
        return tuple(kind for arg in args for kind in accepted(arg))
    return (hint,) if isinstance(hint, type) and hint.__module__ not in ("builtins", "types") else ()


def check_arguments(cls: type, given: Collection[str], who: str = "the artifact's") -> dict[str, Any]:
    """The annotations of a constructor's arguments.

    Raises:
        ValueError: if it has not those that are given, or needs others
    """
    name, parameters = f"{cls.__module__}.{cls.__qualname__}", inspect.signature(cls).parameters
    named_ = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if unknown := [key for key in given if key not in named_]:
        raise ValueError(f"{who} {name} does not fit this version of edit: it has no argument {cut(unknown[0])}")
    if missing := [n for n, p in named_.items() if p.default is p.empty and n not in given]:
        raise ValueError(f"{who} {name} does not fit this version of edit: {missing[0]} is not given")
    return hints(cls, named_)


# ---- sizes ----------------------------------------------------------------------------------------------------------


def refuse_enormous(node: Any, who: str) -> None:
    """Bounds on the numbers of a description: no model needs more.

    Args:
        node: nested mappings and lists
        who: its file and part

    Raises:
        ValueError: naming the first key that goes beyond
    """
    for place, key, value in walk(node, who):
        if isinstance(value, list | tuple) and len(value) > LONG:
            raise ValueError(f"{who}: {place} has {len(value)} items, expected at most {LONG}")
        if isinstance(value, int) and not isinstance(value, bool):
            limit = LARGE
            if key.endswith("seed"):
                limit = 2**63
            elif key == "depth" or key.endswith("layers"):
                limit = UNITS
            elif key == "steps" and "solver" in place:
                limit = STEPS
            if abs(value) > limit:
                raise ValueError(f"{who}: {place} is {cut(value)}, expected at most {limit}")


def refuse_deep(node: Any, who: str = "the artifact") -> None:
    """Raises ValueError for sections inside sections without end."""
    for _ in walk(node, who):
        pass


def walk(node: Any, who: str) -> Iterator[tuple[str, str, Any]]:
    """Place, key and value of all that is in a node, without recursion."""
    todo: list[tuple[str, str, Any, int]] = [("", "", node, 0)]
    while todo:
        place, key, value, depth = todo.pop()
        if depth > DEEP:
            raise ValueError(f"{who}: {cut(place, quoted=False)} is nested more than {DEEP} deep")
        yield place, key, value
        if isinstance(value, Mapping):
            todo += [(f"{place}.{k}".lstrip("."), str(k), v, depth + 1) for k, v in value.items()]
        elif isinstance(value, list | tuple) and len(value) <= LONG:
            todo += [(place, key, v, depth + 1) for v in value]


# ---- files ----------------------------------------------------------------------------------------------------------


def read(path: Path, limit: int) -> str:
    """A text file.

    Raises:
        OSError: if it cannot be read
        ValueError: if it is larger than `limit` bytes, or no text in UTF-8
    """
    if path.exists() and not path.is_file():  # a device or pipe has no end
        raise ValueError(f"{path} is no file")
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} has more than {limit / 2**20:g} MB, which no such file needs: it is not read")
    if b"\0" in content:
        raise ValueError(f"{path} holds NUL bytes: it is no text file in UTF-8")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file in UTF-8 (byte {error.start}): save it as that") from error


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file; raises as `read` does, and ValueError for other JSON."""
    text = read(path, JSON_BYTES)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path} is not JSON: {why}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, expected an object")
    return content


def load_yaml(path: Path) -> DictConfig | ListConfig:
    """A YAML file of settings; raises as `read` does, and ValueError for other YAML, or endless expansion."""
    import yaml
    from omegaconf import OmegaConf

    try:
        return OmegaConf.load(io.StringIO(read_yaml(path)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where}: this is not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, OSError) as error:  # OmegaConf has an OSError for a file that holds a single value
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{path} holds no settings: {cut(str(error), quoted=False)}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deep: no settings need that") from error


def read_yaml(path: Path) -> str:
    """The text of such a file, which is small once its anchors are written out, too."""
    text = read(path, YAML_BYTES)
    if re.search(r"\*\S", text):  # something refers to an anchor
        _refuse_bomb(text, path)
    return text


def _refuse_bomb(text: str, path: Path) -> None:
    """Raises ValueError if anchors, written out, make a small file large, or endless."""
    import yaml

    sizes: dict[int, int] = {}
    above: set[int] = set()

    def size(node: yaml.Node | None) -> int:
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if id(node) in above:
            raise ValueError(f"{path}{_line(node)}: an anchor that holds itself has no end")
        if id(node) not in sizes:
            above.add(id(node))
            parts = [p for pair in node.value for p in pair] if isinstance(node, yaml.MappingNode) else node.value
            sizes[id(node)] = 1 + sum(map(size, parts))
            above.discard(id(node))
        if sizes[id(node)] > YAML_NODES:
            raise ValueError(f"{path}{_line(node)}: written out, its anchors make more than {YAML_NODES} values")
        return sizes[id(node)]

    size(yaml.compose(text, yaml.SafeLoader))


def _line(node: yaml.Node) -> str:
    return f", line {node.start_mark.line + 1}" if node.start_mark else ""
