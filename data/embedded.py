"""The world of `data.sets.shapes` as files, from which `data.generate` works: text encoders, and captions as prompts.

    python -m data.embedded out=runs/flux_tiny_world count=6144
    python -m data.generate teacher=runs/flux_tiny_teacher prompts=runs/flux_tiny_world/prompts.txt out=made
        text_encoder=runs/flux_tiny_world/text_encoder_2 pooled_encoder=runs/flux_tiny_world/text_encoder max_tokens=16
        padding=zeros

The captions are those of the training pictures, in their order. Files that exist already are not written again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edit.inputs import words
from edit.inputs.command import guarded, helped, working
from edit.inputs.limits import Count


@dataclass(frozen=True)
class Words:
    """What to write.

    Args:
        out: folder to write
        count: how many prompts
    """

    out: str
    count: Count


def write_world(out: Path, count: int) -> Path:
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


def parse(argv: Sequence[str]) -> dict[str, Any]:
    """Arguments of `Asked`; raises ValueError as `words.parse`."""
    return words.parse(Words, argv)


@guarded
@helped(Words)
def main(argv: list[str]) -> int:
    asked = words.read(Words, argv)
    with working(ValueError, OSError):
        print(f"prompts and encoders: {write_world(Path(asked.out), asked.count).parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
