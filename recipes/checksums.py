"""Accept an artifact that was changed on purpose: its checksums become those of its files as they are now.

    python -m recipes.checksums runs/digits

The work is `edit.artifacts.checksums`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from edit.artifacts.checksums import accept
from edit.inputs import words
from edit.inputs.command import guarded, helped


@dataclass(frozen=True)
class Words:
    """What to accept.

    Args:
        artifact: artifact or run folder; the key may be left out
    """

    artifact: str


@guarded
@helped(Words)
def main(argv: list[str]) -> int:
    print(f"accepted  {accept(words.read(Words, argv, bare='artifact').artifact)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
