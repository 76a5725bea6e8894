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


def undecodable(words: Sequence[str]) -> str | None:
    """A sentence about the first word that is no text, such as a file name of another encoding."""
    odd = next((w for w in words if any("\ud800" <= c <= "\udfff" for c in w)), None)
    if odd is None:
        return None
    return f"{odd.encode('utf-8', 'backslashreplace').decode()} is no text in UTF-8: rename the file that it names"


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
        if sentence := undecodable(words):
            print(f"error: {sentence}", file=sys.stderr)
            return 2
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
