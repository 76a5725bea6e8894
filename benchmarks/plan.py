"""The memory that `recipes.plan` predicts for a training step, against the memory that training takes.

    python -m benchmarks.plan                              # CPU: by tensors, and by the process's resident memory
    python -m benchmarks.plan --device cuda --cases flux   # by what the caching allocator has handed out
    python -m benchmarks.plan --cases digits --recipe      # our own recipe under Lightning instead of a bare loop
    python -m benchmarks.plan --cases digits --recipe --method distribution_matching   # with teacher and critic

By tensors: the storages alive at once, counted after every operator (`edit.measuring.cost.peak_memory`). Resident: what
the operating system counts, in a fresh process each, above what it held before the model was built.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from edit.backbones.dit import DiTConfig
from edit.backbones.flux import FluxConfig
from edit.denoiser import Denoiser
from edit.few_step.distribution_matching import DistributionMatching
from edit.few_step.ladd import LADD
from edit.few_step.method import FewStepMethod
from edit.few_step.progressive import Progressive
from edit.measuring.memory import Draft
from edit.measuring.probe import Probe
from edit.measuring.timing import peak_memory
from edit.measuring.turns import turns

STEPS = 3  # the first makes the optimiser's state, the second meets the gradients of the first


@dataclass(frozen=True)
class Case:
    build: Callable[[], Denoiser]
    batch: int
    text: int = 512
    matching: FewStepMethod | None = None  # with the model itself, unguided, as teacher and critic's start

    def probe(self, taps: tuple[int, ...] = ()) -> Probe:
        with torch.device("meta"):
            plain = self.build()
        return Probe(self.build, plain.sample_shape, plain.example(text=self.text), taps)

    def draft(self, checkpointing: bool, half: bool) -> Draft:
        """As `recipes.plan` would draft this run on one device."""
        run = Draft(self.probe(), batch=self.batch, half=half, checkpointing=checkpointing, peak=None)
        if self.matching is None:
            return run
        teacher = self.probe(self.matching.teacher_taps)
        with torch.device("meta"):
            own = self.matching.build(run.student.denoiser, teacher.denoiser)
        return replace(
            run,
            teacher=teacher,
            placement="replicated",
            teacher_bytes=2 if half else 4,
            critic=self.probe() if self.matching.has_critic else None,
            turns=turns(self.matching, run.student, teacher, own, 1),
            own=0 if own is None else sum(p.numel() for p in own.parameters()),
        )


CASES = {
    "digits": Case(DiTConfig(8, 1, 1, 128, 6, 4, num_classes=10).build, 128),
    "dit_s": Case(DiTConfig(8, 1, 1, 384, 12, 6, num_classes=10).build, 64),
    "wide": Case(DiTConfig(8, 1, 1, 768, 4, 12, num_classes=10).build, 4),  # mostly weights
    "flux_small": Case(FluxConfig(48, 4, 4, 32, 4, 64, 64, False, (8, 12, 12), (32, 32)).build, 8, text=64),
    # layers of FLUX.1-dev's true size, as many as fit on one GPU with AdamW and an average
    "flux": Case(FluxConfig(num_layers=3, num_single_layers=6).build, 1),
}

METHODS = {
    "progressive": Progressive(4),
    "distribution_matching": DistributionMatching(grid=(1.0, 0.5), every=2),
    "ladd": LADD(teacher_taps=(1, 3), hidden=32),
}


def train(case: Case, device: torch.device, checkpointing: bool, half: bool) -> None:
    """Steps in the recipe's order: the last gradients are dropped between forward and backward."""
    torch.manual_seed(0)
    with device:
        denoiser = case.build()
    denoiser.train().gradient_checkpointing = checkpointing
    average = deepcopy(denoiser).requires_grad_(False)
    optimizer = torch.optim.AdamW(denoiser.parameters(), fused=True)
    one = denoiser.example(text=case.text)
    told = one.map(lambda v: torch.zeros(case.batch, *v.shape[1:], dtype=v.dtype, device=device))
    for _ in range(STEPS):
        x, noise = (torch.randn(case.batch, *denoiser.sample_shape, device=device) for _ in range(2))
        t = torch.rand(case.batch, device=device)
        at = t.view(-1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=False):  # as our recipe
            out = denoiser((1 - at) * x + at * noise, t, told)
        loss = (out.sample.float() - (noise - x)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(denoiser.parameters()), 0.01)
        del out, loss


def recipe(case: Case, device: torch.device, checkpointing: bool, half: bool) -> None:
    """The same under Lightning, on the digits: the case must be a DiT of 1x8x8 samples."""
    from data.loader import EndlessLoader
    from data.sets.digits import Digits
    from edit.distillation.guidance import TeacherGuidance
    from edit.objectives import FlowMatching
    from recipes.config.schema import OptimizerConfig, TrainerConfig
    from recipes.roles import Teacher
    from recipes.runtime.callbacks import Metrics
    from recipes.runtime.loggers import CSVLogger
    from recipes.runtime.trainer import make_trainer
    from recipes.settings import Training
    from recipes.steps.diffusion import Diffusion
    from recipes.steps.few_step import FewStep
    from recipes.training import quiet

    quiet()
    steps = STEPS if case.matching is None else 4 * STEPS  # each role a few times, over rollouts of each length
    kind = "gpu" if device.type == "cuda" else "cpu"
    config = TrainerConfig(max_steps=steps, accelerator=kind, precision="bf16-mixed" if half else "32-true")
    made = case.build, case.build, FlowMatching()
    settings = Training(OptimizerConfig(lr=1e-4), steps, gradient_checkpointing=checkpointing)
    if case.matching is None:
        module = Diffusion(*made, settings)
    else:
        teacher = Teacher(case.build, case.build, TeacherGuidance(), dtype=torch.bfloat16 if half else torch.float32)
        critic = (case.build, case.build) if case.matching.has_critic else None
        module = FewStep(*made, settings, case.matching, teacher, critic=critic)
    with tempfile.TemporaryDirectory() as folder:
        loggers = [CSVLogger(Path(folder) / "metrics.csv")]
        trainer = make_trainer(config, Path(folder), loggers, [Metrics(1, case.batch)])
        trainer.fit(module, EndlessLoader(Digits().train(), case.batch, steps))


def status(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024


def resident(run: Callable[..., None], case: Case, checkpointing: bool) -> int:
    """What the operating system counts above a process that has trained something tiny already."""
    tiny = replace(CASES["digits"], build=DiTConfig(8, 1, 1, 32, 1, 4, num_classes=10).build, batch=2)
    run(tiny, torch.device("cpu"), checkpointing, False)
    with torch.device("meta"):
        case.build()  # imports what the family needs
    before = status("VmRSS")
    run(case, torch.device("cpu"), checkpointing, False)
    return status("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="digits,dit_s,wide,flux_small", help=f"of {', '.join(CASES)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--recipe", action="store_true", help="train by our recipe under Lightning")
    parser.add_argument("--method", choices=METHODS, help="a few-step run, by --recipe")
    parser.add_argument("--resident", choices=("0", "1"), help="one case's resident bytes, without or with")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    names, run, device = args.cases.split(","), recipe if args.recipe else train, torch.device(args.device)
    if unknown := [n for n in names if n not in CASES]:
        parser.error(f"there is no case {unknown[0]}: known are {', '.join(CASES)}")
    if args.method and not args.recipe:
        parser.error("--method is trained by the recipe: add --recipe")
    cases = {name: replace(CASES[name], matching=METHODS.get(args.method)) for name in names}
    if args.resident:
        print(resident(run, cases[names[0]], args.resident == "1"))
        return
    half, rows = device.type == "cuda", []
    for name in names:
        for checkpointing in (False, True):
            case = cases[name]
            predicted = case.draft(checkpointing, half).plan().total
            measured = peak_memory(lambda c=case, k=checkpointing: run(c, device, k, half), device)
            row = {"case": name, "checkpointing": checkpointing, "predicted": predicted, "measured": measured}
            if device.type == "cpu":
                row["resident"] = _apart(name, checkpointing, args.recipe, args.method)
            rows.append(row)
    table = Table("case", "recomputed", "predicted MB", "by tensors", "predicted / it", "resident", "predicted / it")
    for r in rows:
        p, m, s = r["predicted"], r["measured"], r.get("resident")
        seen = (f"{s / 1e6:.1f}", f"{p / s:.3f}") if s else ("", "")
        kind = "on" if r["checkpointing"] else "off"
        table.add_row(r["case"], kind, f"{p / 1e6:.1f}", f"{m / 1e6:.1f}", f"{p / m:.3f}", *seen)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


def _apart(name: str, checkpointing: bool, by_recipe: bool, method: str | None) -> int:
    """Resident memory of one case in a fresh process, whose allocator gives freed memory back at once."""
    words = [sys.executable, "-m", "benchmarks.plan", "--cases", name, "--resident", str(int(checkpointing))]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [*words, *(["--recipe"] if by_recipe else []), *(["--method", method] if method else [])]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
