"""Quality and cost of artifacts, side by side: `python eval.py artifact=runs/<name>`, `python eval.py --help`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any, NoReturn

from edit.inputs.command import Failed, asks_traceback, guarded, working
from edit.inputs.words import apart, asks_help
from recipes.config.errors import UserError
from recipes.config.help import keys_of
from recipes.config.schema import EVALUATION, Evaluation
from recipes.report.evaluate import run
from recipes.report.page import write_json, write_report
from recipes.report.request import OWN, default_out, folders, parse
from recipes.report.run_index import renew_pages
from recipes.variants import variants

HELP = """Measure quality and cost of artifacts, print a comparison, write report.json and report.html.

Examples
  python eval.py artifact=runs/digits                            one, into its run folder
  python eval.py artifact=runs/a artifact=runs/b out=reports/ab  side by side, same noise and labels
  python eval.py 'artifact=runs/*' n=5000 seed=[0,1,2]           more images, spread between seeds
  python eval.py artifact=runs/fast reference=runs/digits        image by image: PSNR, SSIM, feature distance
  python eval.py artifact=runs/digits variant.fast=reuse variant.fast.reuse.interval=5 variant.few.steps=10
                                                                 with training-free edits, beside the plain one

Keys
  artifact   run or artifact folder, a list [a,b] or a pattern; may be given several times
  out        folder of the report; left out: the run folder, or reports/<names> for several or with variants
  reference  artifact to compare images with, made from the same noise by its own sampler
  variant.<name>=<edits>                  a row with training-free edits (configs/edits): one or [a,b]
  variant.<name>.<edit>.<field>=<value>   changes such an edit; <edit>._target_=<class> adds one
  variant.<name>.steps=<n>                solver steps of a variant
  debug=true                              shows tracebacks

Keys and their defaults
{keys}

Read on
  The report is written after every row: what was measured stays when the command is stopped.
  python train.py evaluate.n=100     the same keys for the report at the end of a run
  python -m recipes.list caching     edits that need no training
  python -m recipes.apply --help     keeps a variant as an artifact
"""


class Kept:
    """The report on disk: report.json whenever it has grown; the page, which takes a second to draw, now and then.

    Args:
        out: folder of the report
        pause: seconds between two pages
    """

    def __init__(self, out: Path, pause: float = 30.0):
        self.out, self.pause = out, pause
        self.drawn: float | None = None  # when the last page was
        self.report: dict[str, Any] | None = None  # the last that came

    def take(self, report: dict[str, Any]) -> None:
        """A report that has grown."""
        self.report = deepcopy(report)  # it goes on growing, row by row
        if self.drawn is not None and monotonic() - self.drawn < self.pause:
            write_json(report, self.out)
        else:
            self.draw()

    def draw(self) -> str:
        """Write report and page; what is in them, for someone who has stopped the work."""
        if self.report is None:
            return "interrupted: no row was measured, and no report was written"
        page, count = write_report(self.report, self.out)[-1], self.report["rows"]
        self.drawn = monotonic()
        return f"interrupted: {count['measured']} of {count['planned']} rows are in {page}"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for a mistake in the command, 1 if something could not be measured, 130 when it was stopped."""
    words = sys.argv[1:] if argv is None else argv
    debug = asks_traceback(words)

    @guarded(mistakes=(UserError, ValueError, OSError), interrupted="interrupted: no report was written")
    def command(words: list[str]) -> int:
        with stopped_like_ctrl_c():
            return compare(words, debug)

    return command(words)


def compare(words: Sequence[str], debug: bool) -> int:
    """Measure the artifacts that the words name.

    Raises:
        UserError, ValueError, OSError: for a mistake in the words
        Failed: if an artifact or variant could not be measured
    """
    if not words or asks_help(words):
        print(HELP.format(keys="\n".join(keys_of(EVALUATION))))
        return 0 if words else 2
    own, texts = apart(words, ("variant",))
    given, asked = parse(own), variants(texts)
    chosen = Evaluation.of({k: v for k, v in given.items() if k not in OWN})
    paths = folders(given["artifact"])

    from edit.artifacts.location import find  # brings torch: the mistakes above are answered without

    for one in asked:
        one.edits(chosen.trusted)
    reference = find(given["reference"]) if given.get("reference") else None
    out = default_out(paths, [one.name for one in asked]) if given.get("out") is None else Path(given["out"])
    if (there := next(p for p in (out, *out.absolute().parents) if os.path.lexists(p))) and not there.is_dir():
        raise UserError(f"out={out} cannot be written: {there} is no folder; give another out=")
    kept = Kept(out)
    try:
        with working(UserError, ValueError, OSError):
            report = run(paths, chosen, out, reference, debug, asked, kept.take, ("eval.py", *words))
    except KeyboardInterrupt:
        print(kept.draw(), file=sys.stderr)
        return 130
    except Exception:
        kept.draw()  # with the reasons of the last rows
        raise
    finally:
        if kept.report is not None:
            renew_pages(out)  # that of the run shows its report
    if failed := [a["name"] for a in report["artifacts"] if "error" in a]:
        what = f"{len(paths)} artifacts" + (f" and {len(paths) * len(asked)} variants" if asked else "")
        raise Failed(f"{len(failed)} of {what} could not be measured: {', '.join(failed)}")
    return 0


@contextmanager
def stopped_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, as a cluster sends it, end the work as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
