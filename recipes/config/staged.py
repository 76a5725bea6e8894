"""The stages of a run by their names, and words for them: `before.teacher.trainer.max_steps=6` on a command line.

`before` is a list, in order. A stage is a list of words, or such a list under a name: `teacher: [experiment=...]`. One
without a name is called after its module, its `name=` or its experiment: `data.generate` is generate. Words that a
command line gives for a stage are kept in `stages`, by that name, and replace or follow the stage's own. A stage of a
stage is reached through it: `before.search.before.teacher.trainer.max_steps=6`.

Torch is not imported: most mistakes are answered without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from data.names import in_quotes, setting
from edit.inputs.trust import cut
from recipes.config.errors import UserError
from recipes.config.suggestions import suggest

# settings that all runs of train.py from one command share unless a run's own words say otherwise
SHARED = ("runs", "logger.kinds", "logger.wandb.mode", "logger.wandb.project", "debug")
SHARED += ("trainer.accelerator", "trainer.threads")  # not devices: their number decides the batch, and with it the run
NAME = re.compile(r"[A-Za-z_][\w-]*")  # of a stage: no index of a list
FOR_A_STAGE = re.compile(rf"(?P<prefix>\+{{1,2}}|~)?before\.(?P<stage>{NAME.pattern})(?P<rest>[^\w-].*|$)", re.DOTALL)
GATHERED = re.compile(rf"\+\+stages\.({NAME.pattern})=")
DASHED = ("data.precompute",)  # modules whose words are --key=value


@dataclass(frozen=True)
class Stage:
    """One command before or after a run.

    Args:
        name: by which the command line reaches it
        words: of the configuration: settings of train.py, or a module of ours and its settings
        given: by the command line, for this stage
    """

    name: str
    words: tuple[str, ...]
    given: tuple[str, ...] = ()

    @property
    def module(self) -> str | None:
        """None: it is a run of train.py."""
        return None if "=" in self.words[0] else self.words[0]

    @property
    def all(self) -> list[str]:
        """The words that it is started with: those given replace others of the same key, or follow."""
        words, fixed = list(self.words), int(self.module is not None)
        for word in self.given:
            if self.module in DASHED and not word.startswith("-"):
                key, equals, value = word.partition("=")
                word = f"--{key.replace('_', '-')}{equals}{value}"
            keys = [key_of(other) for other in words[fixed:]]
            if key_of(word) in keys:
                words[fixed + keys.index(key_of(word))] = word
            else:
                words.append(word)
        return words

    def value(self, key: str) -> str | None:
        """The text that its words give a key; None: they do not name it."""
        return next((word.partition("=")[2] for word in reversed(self.all) if key_of(word) == key), None)


def key_of(word: str) -> str:
    return word.partition("=")[0].lstrip("+~-")


def gathered(words: Iterable[str]) -> list[str]:
    """The settings of a command line with those for stages as settings of `stages`, which Hydra can read.

    Raises:
        UserError: for a word that names a stage, but no key of it
    """
    others, stages = list[str](), dict[str, list[str]]()
    for word in words:
        found = FOR_A_STAGE.fullmatch(word)
        if found is None:
            others.append(word)
            continue
        name, rest = found["stage"], found["rest"]
        if not rest.startswith(".") or "=" not in rest or rest.startswith(".="):
            raise UserError(
                f"{cut(word, quoted=False)}: a word for a stage is before.{name}.<key>=<value>, such as "
                f"before.{name}.seed=1; before=[] leaves out all stages"
            )
        stages.setdefault(name, []).append((found["prefix"] or "") + rest[1:])
    return [*others, *(f"++stages.{name}=[{','.join(map(in_quotes, told))}]" for name, told in stages.items())]


def as_given(words: Iterable[str]) -> list[str]:
    """The words that `gathered` was given, but for the places of those for stages, which come last."""
    found = list[str]()
    for word in words:
        if own := GATHERED.match(word):
            given: Any = OverridesParser.create().parse_override(word).value()  # a list, as `gathered` writes it
            found += [for_stage(f"before.{own[1]}", one) for one in given]
        else:
            found.append(word)
    return found


def is_swept(word: str) -> bool:
    """Whether a word for train.py gives several values, for a job each."""
    try:
        return OverridesParser.create().parse_override(word).is_sweep_override()
    except HydraException:  # told when it is read
        return False


def for_stage(path: str, word: str) -> str:
    """The word of a command line that gives `word` to the stage at a path such as before.search.before.teacher."""
    prefix = re.match(r"\+{0,2}~?", word)
    assert prefix is not None
    return f"{prefix[0]}{path}.{word[prefix.end() :]}"


def stages_of(cfg: DictConfig, when: str = "before") -> list[Stage]:
    """The stages before or after a run, in order.

    Raises:
        UserError: for one that is no list of words, for two of one name, and for given words of no stage
        omegaconf.errors.InterpolationResolutionError: for a reference that leads nowhere
    """
    given = dict(cfg.get("stages") or {}) if when == "before" else {}
    found: dict[str, Stage] = {}
    for index, entry in enumerate(cfg[when]):
        told, words = read_stage(f"{when}.{index}", entry)
        name = told or free(derived(words), found)
        if name in found:
            raise UserError(f"{when}.{index}: two stages are called {name}: give each a name of its own")
        found[name] = Stage(name, tuple(words), tuple(given.pop(name, ())))
    if lost := next(iter(given), None):
        raise UserError(f"before.{lost}: {no_stage(str(lost), list(found))}")
    return list(found.values())


def read_stage(place: str, entry: Any) -> tuple[str | None, list[str]]:
    """Name, if it has one, and words of an entry of `before` or `after`.

    Raises:
        UserError: if it is no such entry
    """
    name = None
    if OmegaConf.is_dict(entry) and len(entry) == 1:
        ((name, entry),) = entry.items()
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(
                f"{place}: expected a stage's name of letters, digits, - and _ that begins with a letter, got {name!r}"
            )
    words = [*entry] if OmegaConf.is_list(entry) else []
    if not words or not all(isinstance(word, str) for word in words):
        raise UserError(
            f"{place}: expected a list of settings such as [experiment=flux_tiny/teacher], or one under a name, got "
            f"{cut(entry)}"
        )
    return name, words


def derived(words: Sequence[str]) -> str:
    """What a stage without a name is called: its module, its `name=` or its experiment, each the last part."""
    stage = Stage("", tuple(words))
    told = (stage.module or "").rpartition(".")[2] or stage.value("name") or stage.value("experiment") or "run"
    name = re.sub(r"[^\w-]", "_", told.rpartition("/")[2].strip("'\""))
    return name if NAME.fullmatch(name) else f"run_{name}"


def free(name: str, taken: Iterable[str]) -> str:
    """The name, or with the first number from 2 that makes it new."""
    return next(n for n in (name, *(f"{name}_{i}" for i in range(2, 1000))) if n not in taken)


def no_stage(name: str, known: Sequence[str]) -> str:
    """The sentence about words for a stage that a run does not have."""
    if not known:
        return f"this run has no stage {name!r}, as there is nothing before it: leave those words out"
    return (
        f"this run has no stage {name!r} before it{suggest(name, known)}; one that a stage needs itself is reached "
        f"through that stage: before.<stage>.before.{name}.<key>=..."
    )


def shared(cfg: DictConfig) -> list[str]:
    """The settings that all runs share, as words of a command line."""
    return list(_shared(cfg))


def _shared(cfg: DictConfig) -> Iterator[str]:
    for key in SHARED:
        value = OmegaConf.select(cfg, key)
        if OmegaConf.is_list(value):
            value = "[" + ",".join(map(str, value)) + "]"
        elif isinstance(value, str):
            yield setting(key, value)
            continue
        yield f"{key}={'null' if value is None else value}"


def readable(word: str) -> str:
    """A word for train.py, in quotes where Hydra cannot read it otherwise, such as a path with odd characters."""
    try:
        OverridesParser.create().parse_override(word)
        return word
    except HydraException:
        key, equals, value = word.partition("=")
        return setting(key, value) if equals else word
