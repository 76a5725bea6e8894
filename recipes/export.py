"""From an artifact to what others load: a `diffusers` folder or pipeline, an original FLUX.1 file, a LoRA.

    python -m recipes.export artifact=runs/student out=student dtype=bf16
    python -m recipes.export artifact=runs/student out=student pipeline=FLUX.1-dev push=me/student
    python -m recipes.export artifact=runs/student out=student-file format=single_file
    python -m recipes.export artifact=runs/lora out=lora format=lora

The work is `edit.artifacts.export`.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from dataclasses import fields

from edit.artifacts.export import ExportSettings, export
from edit.inputs.command import Parser, guarded

KEYS = """keys:
  artifact=FOLDER        artifact, run or diffusers folder, hub id, or an original FLUX.1 .safetensors file
  out=FOLDER             to write; new, empty, or a former export, which is replaced
  format=NAME            diffusers (the default), single_file (the original FLUX.1 layout), lora
  dtype=NAME             bf16, fp16 or fp32; left out, weights keep theirs
  max_shard_size=SIZE    of one weight file, such as 5GB (the default) or 500MB
  pipeline=FOLDER        a stock pipeline whose other components are taken over
  teacher=FOLDER|ID      what the weights were made from, if it is not what the run says
  license=ID             such as apache-2.0; left out, the teacher's, or unknown
  push=OWNER/NAME        upload to the hub, into a private repository if it is new
  trusted=PACKAGE,...    further packages whose edits may be imported

examples:
"""


@guarded
def main(argv: list[str]) -> int:
    """The command line: 0 if all went well, 2 after one sentence on stderr about what the user can mend."""
    description, examples, _ = (__doc__ or "").split("\n\n", 2)
    parser = Parser(
        prog="python -m recipes.export",
        description=description,
        epilog=KEYS + examples.replace("    ", "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="what to export, see below")
    args = parser.parse_args(argv)
    try:
        out = export(parsed(args.settings), lambda stage: print(stage, file=sys.stderr, flush=True))
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was replaced", file=sys.stderr)
        return 130
    print(out)
    return 0


def parsed(words: list[str]) -> ExportSettings:
    """Settings from key=value words.

    Raises:
        ValueError: if a word is no setting, or a needed one is missing
    """
    known = [f.name for f in fields(ExportSettings)]
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in known or not equals or not value:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]}=...?" if close else f"known are {', '.join(known)}"
            raise ValueError(f"{word} is no setting of the form key=value: {hint}")
        given[key] = value
    if missing := [k for k in ("artifact", "out") if k not in given]:
        raise ValueError(f"{missing[0]}= is missing: give artifact=<folder> and out=<folder>")
    return ExportSettings(**given)


if __name__ == "__main__":
    raise SystemExit(main())
