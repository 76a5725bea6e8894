"""The artifacts that words name, and what a report calls them."""

import shutil
from pathlib import Path

import pytest

import edit
from recipes.report.request import default_out, folders, parse, run_folder, short_names


def test_names_are_as_short_as_they_can_be():
    assert short_names([Path("runs/a/artifact"), Path("runs/b")]) == ["a", "b"]
    assert short_names([Path("x/a/artifact"), Path("y/a/artifact")]) == ["x/a", "y/a"]
    assert run_folder(Path("runs/a/artifact")) == Path("runs/a")


def test_a_report_of_variants_has_a_folder_of_its_own():
    one, two = Path("runs/a/artifact"), Path("runs/b")
    assert default_out([one]) == Path("runs/a") and default_out([one, two]) == Path("reports/a_b")
    assert default_out([one], ["fast", "few"]) == Path("reports/a_fast_few")
    assert default_out([one, two], ["fast"]) == Path("reports/a_b_fast")


def test_paths_are_taken_as_they_are_typed_and_patterns_only_where_there_is_no_such_folder(
    make_dit, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    edit.save(make_dit(), Path("whole/artifact"))
    for name in ("run[1]", "run1", "run2", "a,b", "x #1", "1_0", "[1]", "null"):
        shutil.copytree("whole", name)

    def found(*words):
        return [str(p.parent) for p in folders(parse([f"artifact={word}" for word in words])["artifact"])]

    for name in ("run[1]", "a,b", "x #1", "1_0", "[1]", "null"):
        assert found(name) == [name]
    Path("empty[1]").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no artifact at empty\[1\]: neither it nor"):
        found("empty[1]")
    assert found("[run1,run2]") == ["run1", "run2"] == found("run[12]")
    assert found("run*", "run1") == ["run1", "run2", "run[1]"]
    assert found("[run1, run[1]]") == ["run1", "run[1]"]
    Path("same").symlink_to("run1")
    assert found("run1", "same") == ["run1"]
    assert parse(["artifact=run1", "out=1_0 #2"])["out"] == "1_0 #2"
    assert parse(["artifact=run1", "out=null", "cache=null"]) == {"artifact": ("run1",), "out": None, "cache": None}
