import errno
import fcntl
import multiprocessing as mp
import os
import signal
import time
from contextlib import ExitStack

import pytest
from ranks import run_ranks

from recipes.config.errors import UserError
from recipes.runtime import files
from recipes.runtime.files import LOCK, is_first, locked, write

FORK = mp.get_context("fork")


def holding(folder, entered, workers=0):
    with locked(folder):
        children = [FORK.Process(target=time.sleep, args=(60,), daemon=True) for _ in range(workers)]
        for child in children:
            child.start()
        entered.put([child.pid for child in children])
        time.sleep(60)


def refused(folder) -> bool:
    try:
        with locked(folder):
            return False
    except UserError:
        return True


def test_a_folder_is_for_one_process_which_is_named_and_free_again_whenever_that_dies(tmp_path):
    """Also while forked children of it, such as a loader's workers, live on for a moment."""
    entered = FORK.Queue()
    holder = FORK.Process(target=holding, args=(tmp_path, entered, 1))
    holder.start()
    (worker,) = entered.get(timeout=30)
    with pytest.raises(UserError) as error, locked(tmp_path):
        pass
    host = os.uname().nodename
    assert f"is being written by process {holder.pid} on {host}:" in str(error.value) and "\n" not in str(error.value)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    os.kill(worker, 0)  # still there
    assert not refused(tmp_path)
    os.kill(worker, signal.SIGKILL)


def test_one_process_may_write_one_after_the_other_and_into_several_folders(tmp_path):
    for name in "aba":
        with locked(tmp_path / name):
            assert refused(tmp_path / name)  # the same process, but another opening: as a thread would
    with locked(tmp_path / "a"), locked(tmp_path / "b"), pytest.raises(RuntimeError), locked(tmp_path / "c"):
        raise RuntimeError
    assert not any(refused(tmp_path / name) for name in "abc")


def test_a_child_that_leaves_the_folder_closes_nothing_of_others(tmp_path):
    def child() -> bool:
        others = [os.open(tmp_path / f"{k}", os.O_CREAT | os.O_RDWR) for k in range(20)]  # numbers are used again
        held.close()
        return all(os.write(other, b"x") == 1 for other in others) and refused(tmp_path)

    with ExitStack() as held:
        held.enter_context(locked(tmp_path))
        assert run_ranks(child, 1) == [True]
        assert refused(tmp_path)  # the child's end has not let go


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_said_once_and_keeps_nobody_out(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path), locked(tmp_path):
        pass
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[0].startswith(f"warning: {tmp_path} cannot be locked (")


def test_a_folder_that_cannot_hold_a_lock_file_is_said(tmp_path, capsys):
    (tmp_path / LOCK).mkdir()  # for root, permissions stop nothing
    with locked(tmp_path):
        assert "cannot be locked (is a directory)" in capsys.readouterr().out


@pytest.mark.parametrize("name", files.RANKS)
def test_of_a_launch_one_process_is_the_first(name, monkeypatch):
    for other in files.RANKS:
        monkeypatch.delenv(other, raising=False)
    assert is_first()
    monkeypatch.setenv(name, "0")
    assert is_first()
    monkeypatch.setenv(name, "1")
    assert not is_first()


def test_a_failed_write_leaves_what_was_there_and_names_the_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a", "before")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError) as error:
        write(path, "after")
    assert error.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_text() == "before"
