"""The processes of a command: their devices, the shards of each, a common progress bar."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from data.making.job import Job
from data.making.request import Request
from edit.inputs.command import number_of

Writer = Callable[[int, Callable[[float], None]], None]  # (shard, advance)


def device_of(job: Job | Request, process: int) -> str:
    """The device of one of a command's processes: "cuda" spreads them over the GPUs."""
    if job.device != "cuda":
        return job.device
    first = number_of("LOCAL_RANK", 0) * job.processes
    return f"cuda:{(first + process) % torch.cuda.device_count()}"


def in_processes(
    prepare: Callable[[Any, int], Writer],
    job: Any,
    count: int,
    pending: Sequence[int],
    advance: Callable[[float], None],
) -> None:
    """Spread the shards over processes.

    Args:
        prepare: function or class of a module, called in each process as (job, process); returns the process's Writer
        job: its first argument
        count: of processes
        pending: shards
        advance: called with the number of images done

    Raises:
        RuntimeError: with the message of a process that failed, or if one died
    """
    context = torch.multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    news = context.Queue()
    arguments = [(prepare, job, i, list(pending[i::count]), news) for i in range(count)]
    processes = [context.Process(target=_process, args=a, daemon=True) for a in arguments if a[3]]
    for p in processes:
        p.start()
    try:
        while any(p.is_alive() for p in processes) or not news.empty():
            try:
                said = news.get(timeout=0.5)
            except queue.Empty:
                said = 0
            if isinstance(said, str):
                raise RuntimeError(said)
            advance(said)
            if died := next((p for p in processes if p.exitcode), None):
                raise RuntimeError(
                    f"a process ended with code {died.exitcode} (out of memory?): the same command goes on from the "
                    f"finished shards; try fewer --processes or a smaller --batch"
                )
    finally:
        for p in processes:
            p.terminate()
            p.join()


def _process(prepare: Callable[[Any, int], Writer], job: Any, number: int, shards: list[int], news: Any) -> None:
    try:
        write = prepare(job, number)
        for k in shards:
            write(k, news.put)
    except KeyboardInterrupt:
        pass  # the first process tells the user
    except (ValueError, OSError, RuntimeError) as error:
        news.put(str(error))


class Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:.1f} images/s")


@contextmanager
def progress(total: int) -> Iterator[Callable[[float], None]]:
    """A live bar with images/s and the time left; yields a function that advances it by a number of images."""
    with Progress("images", BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn(), "left") as bar:
        task = bar.add_task("images", total=total)
        yield lambda count: bar.advance(task, count)
