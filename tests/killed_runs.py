"""Training runs in the background, slowed down and killed at a step."""

import multiprocessing as mp
import signal
import socket

from ranks import _child
from small_runs import _train, kill_when, losses

FORK = mp.get_context("fork")


def start(folder, *overrides, world=1, before=None):
    """Start a run in the background: its processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def body():
        if before is not None:
            before()
        _train(folder, overrides)

    processes = [FORK.Process(target=_child, args=(body, r, world, port, FORK.Queue(), ())) for r in range(world)]
    for p in processes:
        p.start()
    return processes


def slow_steps(say=lambda *_, **__: None):
    """Make a step last long enough to be killed inside the run, and say so."""
    import time

    from recipes.steps.diffusion import Diffusion
    from recipes.steps.rollout import Rollout

    for recipe in (Diffusion, Rollout):

        def slow(self, batch, index, step=recipe.training_step):
            time.sleep(0.05)
            say("slow", flush=True)
            return step(self, batch, index)

        recipe.training_step = slow


def kill_at(folder, name, step, *overrides, world=1):
    processes = start(folder, f"name={name}", *overrides, world=world, before=slow_steps)
    path = folder / name / "metrics.csv"

    def reached():
        assert any(p.is_alive() for p in processes), "the run ended by itself"
        return path.exists() and any(line.startswith(f"{step},") for line in path.read_text().splitlines())

    kill_when(reached, *[p.pid for p in processes])
    for p in processes:
        p.join()
        assert p.exitcode == -signal.SIGKILL
    assert len(losses(folder, name)) < 12
