"""Whatever goes wrong in a command is one sentence and an exit code."""

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

import edit
from edit.inputs.command import Failed, guarded, helped
from recipes.cost import main as cost


def test_every_command_has_the_net_below_it():
    """A module with a command line is guarded; eval.py and train.py have nets of their own."""
    root, guards = Path(edit.__file__).parents[1], 0
    for file in [f for package in ("edit", "data", "recipes") for f in (root / package).rglob("*.py")]:
        tree = ast.parse(file.read_text())
        mains = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main"]
        for main in mains:
            outermost = ast.unparse(main.decorator_list[0])
            assert outermost.partition("(")[0] == "guarded", file
            guards += 1
    assert guards >= 7


def test_a_mistake_of_the_user_an_interruption_and_an_unknown_error_have_codes_of_their_own(capsys):
    @guarded(mistakes=(KeyError,), interrupted="interrupted: nothing was written")
    def command(argv: list[str]) -> int:
        if not argv:
            return 0
        errors = {"a": KeyError("one\n two"), "b": ValueError("three"), "c": KeyboardInterrupt, "d": Failed("four")}
        raise errors[argv[0]]

    assert command(["DEBUG=false"]) == 0
    assert command(["a"]) == 2 and capsys.readouterr().err == "error: 'one\\n two'\n"
    assert command(["b"]) == 1 and capsys.readouterr().err.startswith("error: ValueError: three; debug=true")
    assert command(["c"]) == 130 and capsys.readouterr().err == "interrupted: nothing was written\n"
    assert command(["d"]) == 1 and capsys.readouterr().err == "error: four\n"
    assert command(["a", "debug=true"]) == 2 and "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("debug", [False, True])
def test_an_error_that_nobody_foresaw_is_one_sentence_with_its_type(debug, capsys, monkeypatch):
    monkeypatch.setattr("recipes.cost.resolve", lambda args: {}["x"])
    assert cost(["backbone=dit_tiny", *["debug=true"] * debug]) == 1
    err = capsys.readouterr().err
    assert err.endswith("error: KeyError: 'x'; debug=true shows the traceback\n") and ("Traceback" in err) == debug


@pytest.mark.parametrize("words", [["artifact=\udcff"], ["--foo"], ["artifact=/"], ["artifact=."], ["+="]], ids=ascii)
def test_a_word_that_means_nothing_is_one_sentence(words, capsys):
    try:
        code = cost(words)
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_no_words_and_a_call_for_help_show_the_modules_text_and_the_keys_and_do_no_work(capsys):
    @dataclass
    class Settings:
        """Settings.

        Args:
            depth: how deep
        """

        depth: int = 3

    done = []

    @guarded
    @helped(Settings)
    def command(argv: list[str]) -> int:
        done.append(argv)
        return 7

    for words, code in (([], 2), (["--help"], 0), (["depth=2", "-h"], 0)):
        assert command(words) == code
        shown = capsys.readouterr().out
        assert shown.startswith(__doc__) and "depth=" in shown and "how deep (3)" in shown
    assert command(["depth=2"]) == 7 and done == [["depth=2"]]
