"""A mistake as one sentence: the exception that carries it, and other exceptions in words."""

from __future__ import annotations

import errno
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from hydra.errors import InstantiationException


class UserError(Exception):
    """A mistake of the user in one sentence: what was given, what was expected, how to correct it."""


def refuse(message: str) -> NoReturn:
    """Replaces `ArgumentParser.error`, which prints the usage and ends the process."""
    raise UserError(message)


# ---- other exceptions -----------------------------------------------------------------------------------------------


def one_line(error: BaseException) -> str:
    """The message on one line, without the search paths, key traces and addresses that frameworks append."""
    text = re.split(r"\n\s*(?:Config search path|full_key:|See https?:)", str(error))[0]
    if "Original Traceback" in text:  # from a DataLoader worker: the last entry is the error itself
        text = re.split(r"\n(?=[\w.]+: )", text)[-1].partition(": ")[2]
    text = re.sub(r"^\w+ raised while resolving interpolation: ", "", text)
    return " ".join(text.split()) or type(error).__name__


class Failure(NamedTuple):
    """Why a task ended."""

    sentence: str
    code: int = 1  # exit code; 130: interrupted
    everywhere: bool = True  # may concern one rank only, so each rank prints it


def failure_of(error: BaseException, folder: str | Path) -> Failure:
    """What ended a task, in words.

    Args:
        error: as raised by the task
        folder: of the run, for sentences that name it
    """
    if isinstance(error, SystemExit):  # Lightning answers Ctrl-C by leaving
        error = typing.cast(KeyboardInterrupt, error.__context__)
    if isinstance(error, KeyboardInterrupt):
        where = f" at {error}" if str(error) else ""
        return Failure(f"interrupted{where}; the same command resumes from what {folder} holds", 130, False)
    key = ""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        key = next(iter(re.findall(r"full_key: (.+)", str(error))), "")
        error = error.__cause__
    sentence = f"{key}: {one_line(error)}" if key else one_line(error)
    if isinstance(error, UserError):
        return Failure(sentence, everywhere=False)
    chain = _chain(error)
    full = next((e for e in chain if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)), None)
    if full is not None:
        return Failure(
            f"the disk is full ({full.filename or folder}); nothing whole was lost: free some space and give the same "
            "command, which resumes from the last whole checkpoint"
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
        return Failure(
            f"out of memory ({one_line(error).split('. ')[0]}); lower data.batch_size and raise trainer.accumulate, "
            "or set trainer.gradient_checkpointing=true"
        )
    if isinstance(error, FileNotFoundError | PermissionError) and error.filename and error.strerror:
        return Failure(f"{error.filename}: {error.strerror.lower()}; correct the path or its permissions")
    if isinstance(error, ValueError | FileNotFoundError | PermissionError):
        return Failure(sentence)
    return Failure(f"{type(error).__name__}: {sentence}; rerun with debug=true for the traceback")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
