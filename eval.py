"""Quality and cost of artifacts, side by side: `python eval.py artifact=runs/<name>`, `python eval.py --help`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from edit.inputs.command import Failed, asks_traceback, guarded, working
from edit.inputs.words import asks_help
from recipes.config.errors import UserError
from recipes.config.schema import EVALUATION, Evaluation
from recipes.report.evaluate import run
from recipes.report.request import OWN, default_out, folders, parse

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


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for a mistake in the command, 1 if an artifact could not be measured, 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    debug = asks_traceback(words)

    @guarded(mistakes=(UserError, ValueError, OSError), interrupted="interrupted: no report was written")
    def command(words: list[str]) -> int:
        return compare(words, debug)

    return command(words)


def compare(words: Sequence[str], debug: bool) -> int:
    """Measure the artifacts that the words name.

    Raises:
        UserError, ValueError, OSError: for a mistake in the words
        Failed: if an artifact could not be measured
    """
    if not words or asks_help(words):
        print(HELP + "".join(f"  {line}\n" for line in EVALUATION.read_text().splitlines() if not line.startswith("#")))
        return 0 if words else 2
    given = parse(words)
    chosen = Evaluation.of({k: v for k, v in given.items() if k not in OWN})
    paths = folders(given["artifact"])

    from edit.artifacts.location import find  # brings torch: the mistakes above are answered without

    reference = find(given["reference"]) if given.get("reference") else None
    out = default_out(paths) if given.get("out") is None else Path(given["out"])
    if (there := next(p for p in (out, *out.absolute().parents) if os.path.lexists(p))) and not there.is_dir():
        raise UserError(f"out={out} cannot be written: {there} is no folder; give another out=")
    with working(UserError, ValueError, OSError):
        report = run(paths, chosen, out, reference, debug)
    if failed := [a["name"] for a in report["artifacts"] if "error" in a]:
        raise Failed(f"{len(failed)} of {len(paths)} artifacts could not be measured: {', '.join(failed)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
