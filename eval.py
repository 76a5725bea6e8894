"""Quality and cost of artifacts, side by side: `python eval.py artifact=runs/<name>`, `python eval.py --help`."""

from __future__ import annotations

import glob
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipes.check import suggest
from recipes.config import UserError
from recipes.evaluate import DEFAULTS, Settings, run, run_folder, settings, short_names

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
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore
        except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
            raise UserError(f"the value of '{word}' cannot be read; put it in quotes") from error
        if key == "artifact":
            given[key] += value if isinstance(value, list) else [value]
        elif key in given:
            raise UserError(f"{key} is given twice; only artifact may be")
        else:
            given[key] = value
    return given


def folders(given: Sequence[Any]) -> list[Path]:
    """The artifacts that were asked for, each once, patterns replaced by what they match.

    Raises:
        UserError: if a pattern matches none, or none is named
        FileNotFoundError: if one is missing
    """
    from edit.checkpoint import find

    found: list[Path] = []
    for text in map(str, given):
        if not any(c in text for c in "*?["):
            found.append(find(text))
            continue
        matches = [Path(p) for p in sorted(glob.glob(text)) if Path(p).is_dir()]
        artifacts = [p for p in matches if (p / "config.json").is_file() or (p / "artifact" / "config.json").is_file()]
        if not artifacts:
            raise UserError(f"artifact={text} matches no folder with an artifact")
        found += [find(p) for p in artifacts]
    if not found:
        raise UserError("nothing to evaluate: say artifact=runs/<name>, or --help")
    return list(dict.fromkeys(found))


def main(words: Sequence[str]) -> int:
    """Exit code: 0, 2 for a mistake in the command, 1 if an artifact could not be measured, 130 after Ctrl-C."""
    if not words or {"--help", "-h"} & set(words):
        print(HELP + "".join(f"  {line}\n" for line in DEFAULTS.read_text().splitlines() if not line.startswith("#")))
        return 0 if words else 2
    debug = any(word.lower() == "debug=true" for word in words)
    code = 2
    try:
        given = parse(words)
        chosen = settings({k: v for k, v in given.items() if k not in OWN})
        paths = folders(given["artifact"])

        from edit.checkpoint import find  # brings torch: the mistakes above are answered without

        reference = find(str(given["reference"])) if given.get("reference") else None
        out = default_out(paths) if given.get("out") is None else Path(str(given["out"]))
        code = 1
        report = run(paths, chosen, out, reference, debug)
    except (UserError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        print("interrupted: no report was written", file=sys.stderr)
        return 130
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
