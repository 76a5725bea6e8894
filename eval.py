"""Quality and cost of artifacts, side by side: `python eval.py artifact=runs/<name>`, `python eval.py --help`."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.names import legible, matching
from edit.inputs.command import print_any_name, unexpected
from recipes.config.check import suggest
from recipes.config.schema import UserError
from recipes.report.evaluate import DEFAULTS, Settings, run, run_folder, settings, short_names

HELP = """Measure quality and cost of artifacts; write report.json and report.html.

Examples
  python eval.py artifact=runs/digits                          one artifact, into its run folder
  python eval.py artifact=runs/a artifact=runs/b out=reports/ab  side by side, same noise and labels
  python eval.py 'artifact=runs/*' n=5000 seed=[0,1,2]         more images, spread between seeds
  python eval.py artifact=runs/fast reference=runs/digits      PSNR, SSIM, feature distance to another run
  python eval.py artifact=runs/digits steps=8 reference=runs/digits

Keys
  artifact    run or artifact folder, a list [a,b] or a pattern; may be given several times
  out         folder of the report; default: the run folder, or reports/<names> for several
  reference   artifact to compare images with, generated from the same noise by its own sampler
  debug       true: show tracebacks

and, with their defaults,

"""
OWN = ("artifact", "out", "reference", "debug")
PLACES = ("artifact", "out", "reference", "cache")


def parse(words: Sequence[str]) -> dict[str, Any]:
    """`key=value` words as a dict of YAML values; `artifact` may come several times and is a list.

    Raises:
        UserError: for a word that is no setting, an unknown key or a key given twice
    """
    keys = (*OWN, *(f.name for f in fields(Settings)))
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
    """A path as it was typed: YAML, which knows numbers and comments, is only asked about lists, quotes and null."""
    if not text:
        raise UserError(f"{word} is empty: give a folder")
    if text in ("null", "~") and key != "artifact":
        return None
    if os.path.lexists(text):
        return text
    value = _value(word, text) if text[0] in "\"'[" else text
    return value if isinstance(value, list) and key == "artifact" else str(value)


def folders(given: Sequence[Any]) -> list[Path]:
    """The artifacts that were asked for, each once, patterns replaced by what they match.

    Raises:
        UserError: if a pattern matches none, or none is named
        FileNotFoundError: if one is missing
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


def main(words: Sequence[str]) -> int:
    """Exit code: 0, 2 for a mistake in the command, 1 if an artifact could not be measured, 130 after Ctrl-C."""
    if not words or {"--help", "-h"} & set(words):
        print(HELP + "".join(f"  {line}\n" for line in DEFAULTS.read_text().splitlines() if not line.startswith("#")))
        return 0 if words else 2
    print_any_name()
    debug = any(word.lower() == "debug=true" for word in words)
    code = 2
    try:
        given = parse(words)
        chosen = settings({k: v for k, v in given.items() if k not in OWN})
        paths = folders(given["artifact"])

        from edit.artifacts.location import find  # brings torch: the mistakes above are answered without

        reference = find(str(given["reference"])) if given.get("reference") else None
        out = default_out(paths) if given.get("out") is None else Path(str(given["out"]))
        if (there := next(p for p in (out, *out.absolute().parents) if os.path.lexists(p))) and not there.is_dir():
            raise UserError(f"out={out} cannot be written: {there} is no folder; give another out=")
        code = 1
        report = run(paths, chosen, out, reference, debug)
    except (UserError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        print("interrupted: no report was written", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"error: {unexpected(error)}", file=sys.stderr)
        return 1
    failed = [a["name"] for a in report["artifacts"] if "error" in a]
    if failed:
        print(
            f"error: {len(failed)} of {len(paths)} artifacts could not be measured: {', '.join(failed)}",
            file=sys.stderr,
        )
    return 1 if failed else 0


def default_out(paths: Sequence[Path]) -> Path:
    """The run folder of a single artifact; for several, a folder of reports/ named after them."""
    if len(paths) == 1:
        return run_folder(paths[0])
    return Path("reports") / "_".join(name.replace("/", "-") for name in short_names(paths))[:100]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
