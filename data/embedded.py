"""The world of `data.sets.shapes` as files, from which `data.generate` works: text encoders, and captions as prompts.

    python -m data.embedded out=runs/flux_tiny_world count=6144
    python -m data.generate teacher=runs/flux_tiny_teacher prompts=runs/flux_tiny_world/prompts.txt out=made
        text_encoder=runs/flux_tiny_world/text_encoder_2 pooled_encoder=runs/flux_tiny_world/text_encoder max_tokens=16
        padding=zeros

The captions are those that its pictures to train on have, in their order. What is there already is not written again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from edit.inputs.command import guarded


def write(out: Path, count: int) -> Path:
    """Store text_encoder (CLIP), text_encoder_2 (T5), tokenizer, tokenizer_2 and prompts.txt, one caption per line.

    Returns:
        The file of prompts, which is written last.

    Raises:
        ValueError: if count is below 1, or the folder has other prompts
    """
    from data.sets.shapes import Shapes
    from data.sets.toy_text import ToyText

    prompts = out / "prompts.txt"
    captions = "".join(f"{caption}\n" for caption in Shapes(count=count).train().captions)
    if prompts.exists():
        if prompts.read_text() != captions:
            raise ValueError(f"{prompts} holds other prompts than these {count}: choose another out=, or remove it")
        return prompts
    ToyText().write(out)
    temporary = prompts.with_name(f".{prompts.name}.tmp-{os.getpid()}")
    temporary.write_text(captions)
    os.replace(temporary, prompts)
    return prompts


def parse(words: Sequence[str]) -> tuple[Path, int]:
    """Folder and number of prompts; raises ValueError for other words than these two settings."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if given.keys() != {"out", "count"} or len(given) != len(words) or not given["count"].isdecimal():
        raise ValueError(f"expected out=<folder> count=<how many prompts>, got {' '.join(words) or 'nothing'}")
    return Path(given["out"]), int(given["count"])


@guarded
def main(words: Sequence[str]) -> int:
    """Returns the exit code: 0, 1 for what could not be done, 2 for a mistyped command."""
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    try:
        given = parse(words)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        print(f"prompts and encoders: {write(*given).parent}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
