"""From an artifact to what others load: a `diffusers` folder or pipeline, an original FLUX.1 file, a LoRA.

    python -m recipes.export artifact=runs/student out=student dtype=bf16
    python -m recipes.export artifact=runs/student out=student pipeline=FLUX.1-dev push=me/student
    python -m recipes.export artifact=runs/student out=student-file format=single_file
    python -m recipes.export artifact=runs/lora out=lora format=lora

The work is `edit.artifacts.export`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from edit.artifacts.export import ExportSettings, export
from edit.inputs import words
from edit.inputs.command import guarded, helped


def parse(argv: Sequence[str]) -> ExportSettings:
    """Raises ValueError as `words.read`, and for settings that do not go together."""
    return words.read(ExportSettings, argv)


@guarded(mistakes=(ValueError, TypeError, OSError), interrupted="interrupted: nothing was replaced")
@helped(ExportSettings)
def main(argv: list[str]) -> int:
    print(export(parse(argv), lambda stage: print(stage, file=sys.stderr, flush=True)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
