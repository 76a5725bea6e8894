"""`python -m recipes.page`."""

from made_runs import made_run

from recipes.page import main


def test_the_page_of_a_run_and_the_list_are_written_again(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made_run(tmp_path / "runs", "sweep/a")
    made_run(tmp_path / "runs", "sweep/b", artifact=False)
    assert main(["run=runs/sweep/a"]) == 0
    assert capsys.readouterr().out == "page      runs/sweep/a/index.html\nlist      runs/index.html\n"
    assert not (tmp_path / "runs/sweep/b/index.html").exists()
    assert main(["runs=runs"]) == 0
    assert (tmp_path / "runs/sweep/b/index.html").exists()
    assert "stopped at step 20" in (tmp_path / "runs/index.html").read_text()


def test_one_page_that_cannot_be_written_keeps_no_other_from_it(tmp_path, capsys):
    made_run(tmp_path, "a")
    (made_run(tmp_path, "b") / "index.html").mkdir()
    made_run(tmp_path, "c")
    assert main([f"runs={tmp_path}"]) == 1
    assert "1 of 3 pages were not written" in capsys.readouterr().err
    assert (tmp_path / "c/index.html").exists() and (tmp_path / "index.html").exists()


def test_mistakes_are_told_in_one_sentence(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for words, said in (
        ([f"run={tmp_path}/nowhere"], "is no run: expected a folder with config.yaml"),
        ([f"runs={tmp_path}/nowhere"], "there is no such folder"),
        ([f"runs={tmp_path}/empty"], "holds no runs"),
        (["rnu=a"], "did you mean run?"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert main([]) == 2 and main(["--help"]) == 0
