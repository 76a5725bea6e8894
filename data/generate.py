"""Let a teacher make the training data of its student: prompts in, shards of latents and text embeddings out.

    python -m data.generate teacher=FLUX.1-dev prompts=prompts.txt out=cache precision=bfloat16 processes=0
    python -m data.generate teacher=runs/teacher prompts=prompts.txt out=cache text_encoder=t5 pooled_encoder=clip

At the end it prints a command that trains a small student on them.
Stop it whenever you like: the same command goes on after the last finished shard, and answers at once when all is made.

On several machines, start the same command on each with RANK and WORLD_SIZE set: shards are divided among them, and the
last to finish writes the manifest.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Any

from data import manifest
from data.making.advice import next_step
from data.making.request import Request
from edit.inputs import words
from edit.inputs.command import guarded, helped, number_of, working


def parse(argv: Sequence[str]) -> dict[str, Any]:
    """Arguments of `Request`; raises ValueError as `words.parse`."""
    return words.parse(Request, argv)


@guarded(interrupted="interrupted: the same command goes on after the last finished shard")
@helped(Request)
def main(argv: list[str]) -> int:
    request = words.read(Request, argv, rank=number_of("RANK", 0), world=number_of("WORLD_SIZE", 1))
    import torch

    from data.making.generator import generate  # after --help and mistyped keys were answered

    with working(ValueError, OSError, RuntimeError):
        done = generate(request)
    if done:
        print(next_step(request.out, manifest.read(done), request.teacher, torch.cuda.is_available()))
    else:
        print(f"{request.out}: other ranks are still at work")
    return 0


def stop(number: int, _: object) -> None:
    """The handler of a signal: exit normally, so that the processes of this command end too."""
    print("stopped: the same command goes on after the last finished shard", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    for told in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(told, stop)
    sys.exit(main())
