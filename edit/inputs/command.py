"""What every command does around its work: it reads any word, and answers in one sentence whatever goes wrong."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, overload

from edit.inputs.words import asks_help, explained

DEBUG = ("debug=true", "debug=false")  # words of every command
Main = Callable[[list[str]], int]  # words -> exit code
Command = Callable[[Sequence[str] | None], int]


class Parser(argparse.ArgumentParser):
    """One whose complaints are a sentence, without all that there is."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; --help shows what there is", file=sys.stderr)
        sys.exit(2)


def asks_traceback(words: Sequence[str]) -> bool:
    return DEBUG[0] in map(str.lower, words)


def print_any_name() -> None:
    """Let this process print names of files that are no UTF-8, escaped, instead of ending with a UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def unexpected(error: BaseException) -> str:
    """A sentence about an error that nobody has put into words."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' * bool(said)}{said}; debug=true shows the traceback"


def number_of(variable: str, default: int) -> int:
    """An environment variable. Raises ValueError if it is set to something else than a whole number."""
    text = os.environ.get(variable, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"the environment says {variable}={text!r}, expected a whole number: unset it") from error


class Failed(Exception):
    """Work that could not be done; the sentence tells why. A command then has exit code 1, and 2 for its own words."""


@contextmanager
def working(*expected: type[Exception]) -> Iterator[None]:
    """Turn the expected errors of the work inside into `Failed`."""
    try:
        yield
    except expected as error:
        raise Failed(str(error)) from error


@overload
def guarded(main: Main) -> Command: ...
@overload
def guarded(*, mistakes: tuple[type[Exception], ...] = ..., interrupted: str = ...) -> Callable[[Main], Command]: ...
def guarded(
    main: Main | None = None,
    *,
    mistakes: tuple[type[Exception], ...] = (ValueError, OSError),
    interrupted: str = "interrupted",
) -> Command | Callable[[Main], Command]:
    """Make a command of `main`: whatever goes wrong is one sentence on stderr and an exit code.

    The code is 2 for an error that tells the user what to mend, 130 after Ctrl-C, and 1 for `Failed` and any other
    error. The word debug=true, which `main` does not see, shows the traceback of an error.

    Args:
        main: takes the words, returns the exit code
        mistakes: errors whose own sentence tells what to mend
        interrupted: sentence after Ctrl-C
    """
    if main is None:
        return functools.partial(_guard, mistakes=mistakes, interrupted=interrupted)
    return _guard(main, mistakes, interrupted)


def _guard(main: Main, mistakes: tuple[type[Exception], ...], interrupted: str) -> Command:
    @functools.wraps(main)
    def command(argv: Sequence[str] | None = None) -> int:
        words = list(sys.argv[1:] if argv is None else argv)
        print_any_name()
        try:
            return main([word for word in words if word.lower() not in DEBUG])
        except KeyboardInterrupt:
            print(interrupted, file=sys.stderr)
            return 130
        except Exception as error:
            if asks_traceback(words):
                traceback.print_exc()
            known = isinstance(error, (*mistakes, Failed))
            said = " ".join(str(error).split()) if known else unexpected(error)
            print(f"error: {said}", file=sys.stderr)
            return 2 if isinstance(error, mistakes) else 1

    return command


def helped(settings: type) -> Callable[[Main], Main]:
    """Answer no words at all, and words that ask for help, with the help of a command; the exit code is 2 for none.

    Args:
        settings: its keys, the fields of a dataclass; before them the help has the text of the command's module
    """

    def wrap(main: Main) -> Main:
        @functools.wraps(main)
        def answered(argv: list[str]) -> int:
            if argv and not asks_help(argv):
                return main(argv)
            print(f"{main.__globals__['__doc__']}\n{explained(settings)}")
            return 0 if argv else 2

        return answered

    return wrap
