"""What every command does around its work: words that can be read, and one sentence for whatever goes wrong."""

from __future__ import annotations

import argparse
import functools
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

DEBUG = ("debug=true", "debug=false")  # words of every command


class Parser(argparse.ArgumentParser):
    """One whose complaints are a sentence, without all that there is."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; --help shows what there is", file=sys.stderr)
        sys.exit(2)


def print_any_name() -> None:
    """Let this process print names of files that are no UTF-8, escaped, instead of ending with a UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def unexpected(error: BaseException) -> str:
    """A sentence about an error that nobody has put into words."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' * bool(said)}{said}; debug=true shows the traceback"


def guarded(main: Callable[[list[str]], int]) -> Callable[[Sequence[str] | None], int]:
    """The command line of `main`, which answers the mistakes it knows; any other error is a sentence and exit code 1.

    With debug=true among the words its traceback is shown, too.
    """

    @functools.wraps(main)
    def command(argv: Sequence[str] | None = None) -> int:
        words = list(sys.argv[1:] if argv is None else argv)
        print_any_name()
        try:
            return main([word for word in words if word.lower() not in DEBUG])
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            if DEBUG[0] in map(str.lower, words):
                traceback.print_exc()
            print(f"error: {unexpected(error)}", file=sys.stderr)
            return 1

    return command
