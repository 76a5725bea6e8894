"""Several ranks inside one test: forked processes with torchrun's variables, talking through gloo.

Forking inherits the imports, so a two-rank test costs 0.2 s. CPU only: CUDA does not survive a fork.
"""

import multiprocessing as mp
import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

_FORK = mp.get_context("fork")


def run_ranks(fn: Callable[..., Any], world: int = 2, timeout: float = 60, args: tuple = ()) -> list[Any]:
    """Call `fn(*args)` on every rank and return what each returned, in rank order.

    `fn` finds RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment and starts its own process group (or
    lets Lightning do so). What it returns must survive a pickle; return numbers or numpy arrays rather than tensors.

    Raises:
        AssertionError: if a rank raised (with its traceback), died, or took longer than `timeout` seconds
    """
    results, port = _FORK.Queue(), _free_port()
    ranks = [_FORK.Process(target=_child, args=(fn, r, world, port, results, args)) for r in range(world)]
    for p in ranks:
        p.start()
    returned: dict[int, Any] = {}
    try:
        for _ in ranks:
            rank, ok, value = results.get(timeout=timeout)
            assert ok, f"rank {rank}:\n{value}"
            returned[rank] = value
    except queue.Empty:
        silent = [f"{r} (exit code {p.exitcode})" for r, p in enumerate(ranks) if r not in returned]
        raise AssertionError(f"no answer within {timeout} s from rank {', '.join(silent)}") from None
    finally:
        for p in ranks:
            p.join(5 if len(returned) == world else 0)  # after a failure the others may wait for it for ever
            if p.is_alive():
                p.kill()
                p.join()
    return [returned[r] for r in range(world)]


def _child(fn: Callable[..., Any], rank: int, world: int, port: int, results: Any, args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",  # Lightning then takes the ranks as given and launches nothing
    )
    torch.set_num_threads(1)
    try:
        results.put((rank, True, fn(*args)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
