"""Accept an artifact that was changed on purpose: its checksums become those of its files as they are now.

    python -m recipes.checksums runs/digits

The work is `edit.artifacts.checksums`.
"""

import sys

from edit.artifacts.checksums import accept
from edit.inputs.command import guarded


@guarded
def main(words: list[str]) -> int:
    if len(words) != 1 or words[0].startswith("-"):
        print(f"{__doc__}")
        return 0 if words in (["-h"], ["--help"]) else 2
    try:
        print(f"accepted  {accept(words[0])}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
