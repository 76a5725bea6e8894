"""Every loss term and few-step method in the recipe that trains it, on a tiny world: the properties of all losses.

Losses are found by importing. Each is trained as a file of configs/method says, on the first world that the method
fits; one that no file names stands in another run of its kind, with its defaults. An id is the loss's name.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import dino
import encoders
import pytest
import torch
from every import CONFIGS, classes, opened, sections
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import default_collate
from weights import randomise

from edit.data_set import conditions, null_condition
from edit.denoiser import Denoiser
from edit.few_step.method import FewStepMethod
from edit.losses import Term
from edit.measuring.turns import Turn
from recipes.assembly import Run, make_sight, training_of
from recipes.config import composed
from recipes.config.chosen import procedure_of
from recipes.config.sources import register
from recipes.models import Sources, losses_of, made, models_of
from recipes.plan import draft_of
from recipes.procedure import Fit
from recipes.recipe import Recipe
from recipes.roles import Origin
from recipes.steps.few_step import FewStep

TERMS, METHODS = classes(Term), classes(FewStepMethod)
COUNT = 3  # samples of a batch
WORLDS = ("dit_digits", "flux_tiny")  # by size
SLOW = {"ADD"}  # decodes samples and looks at them; tests/recipes/test_sight.py trains it in small
ENCODED = {"REPA": "terms.repa.encoder", "HASTE": "terms.haste.features.encoder"}  # places of real encoders
names = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in (*TERMS, *METHODS)]
every = pytest.mark.parametrize("name", names)
few_step = pytest.mark.parametrize("name", METHODS)


# ---- the configuration of a loss -------------------------------------------------------------------------------------


@cache
def files() -> dict[str, list[str]]:
    """Import paths of the classes that each file of configs/method names."""
    read = {
        n: OmegaConf.to_container(OmegaConf.load(CONFIGS / f"method/{n}.yaml"))
        for n in composed.names(CONFIGS, "method")
    }
    return {name: [node["_target_"] for node in sections(content)] for name, content in read.items()}


def file_of(path: str) -> tuple[str, str] | None:
    """World and method whose file names a class, the file that names fewest others first; None: there is none."""
    for method in sorted((n for n, paths in files().items() if path in paths), key=lambda n: len(files()[n])):
        for world in WORLDS:
            if composed.unfit(CONFIGS, world, method) is None:
                return world, method
    return None


def words_of(name: str) -> list[str]:
    """What composes a run with this loss: its own file of configs/method, else that of another loss of its module.

    Raises:
        LookupError: if there is no such run, with what to add
    """
    group = TERMS if name in TERMS else METHODS
    cls = group[name]
    path = f"{cls.__module__}.{name}"
    if found := file_of(path):
        return ["experiment={}/{}".format(*found)]
    settings, near = {"_target_": path}, None
    for other in group.values():
        near = near or (file_of(f"{other.__module__}.{other.__name__}") if other.__module__ == cls.__module__ else None)
    for key, hint in opened(cls).items():
        settings[key] = "${world.linear_pairs}" if "Pairs" in str(hint) else None  # units with themselves
    if near is None or None in settings.values():
        raise LookupError(
            f"{name} stands in no file of configs/method, nor can it stand in for another loss of its module: add "
            f"configs/method/<name>.yaml with _target_: {path}"
        )
    said = "{" + ", ".join(f"{k}: {v}" for k, v in settings.items()) + "}"
    base = "experiment={}/{}".format(*near)
    if name in METHODS:
        return [base, f"matching={said}"]
    before = config(base)
    return [base, *(f"~{part}.{key}" for part in ("terms", "edits") for key in before[part] or ()), f"+terms.it={said}"]


@cache
def config(*words: str) -> DictConfig:
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        return compose("train", [*words, "trainer.precision=32-true", "trainer.max_steps=40"])


# ---- a run without files ---------------------------------------------------------------------------------------------


class Random(Sources):
    """The world's data, and models of random weights."""

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg

    def start(self, spec: Any) -> Origin:
        return Origin(lambda: weighted(spec, 0), spec.build)

    def teacher(self, spec: Any, needy: Sequence[str]) -> Origin | None:
        return Origin(lambda: weighted(spec, 1), spec.build) if needy else None

    def data(self, spec: Any, start: Origin) -> Any:
        return world_data(OmegaConf.to_yaml(self.cfg.data.set, resolve=True))


@cache
def world_data(node: str) -> Any:
    return made(OmegaConf.create(node))


def weighted(spec: Any, seed: int) -> Denoiser:
    torch.manual_seed(seed)
    denoiser = spec.build()
    randomise(denoiser, seed)
    return denoiser


@cache
def run_of(name: str, folder: Path) -> Run:
    """Parts that fit each other, as `recipes.assembly` puts them together."""
    words = words_of(name)
    if name == "ADD":
        words += [f"matching.vision.path={dino.write(folder)}", "matching.vision.layers=[1, 3]"]
    if name in ENCODED:
        encoders.of_timm(folder / "encoder", 8, 4)
        words += [f"{ENCODED[name]}.path={folder}/encoder"]
    cfg = config(*words)
    models, objective, sampler = models_of(cfg, Random(cfg)), made(cfg.objective), made(cfg.sampler)
    if models.matching is not None:
        models.matching.check(sampler.solver)
    told = conditions(models.data), null_condition(models.data)
    return Run(cfg, models, objective, sampler, training_of(cfg), *told, make_sight(models.data, losses_of(models)))


@dataclass
class Clock:
    """All that a recipe asks of Lightning's trainer in a step."""

    global_step: int = 0
    global_rank: int = 0
    optimizers: list = field(default_factory=list)


def module_of(run: Run) -> Recipe:
    procedure = procedure_of(run.config)
    assert isinstance(procedure, Fit)
    return procedure.module(run)


@cache
def begun(name: str, folder: Path) -> tuple[Recipe, Clock]:
    """A recipe at its first step, its parts away from their starts. No test changes its weights."""
    module, clock = module_of(run_of(name, folder)), Clock()
    module.trainer = clock
    module.configure_model()
    module.on_train_start()
    for seed, part in enumerate((getattr(module, "critic", None), module.own, module.denoiser)):
        if part is not None:
            moved(part, seed)
    return module, clock


def moved(part: nn.Module, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in part.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=g))


def batch_of(run: Run) -> dict[str, Tensor]:
    """Samples of the data, and a path to each, as a teacher would have stored it."""
    split, g = run.models.data.train(), torch.Generator().manual_seed(5)
    batch = default_collate([split.sample(i, i) for i in range(COUNT)]) | {"draw": torch.arange(COUNT)}
    shape = batch["x"].shape[1:]
    states = getattr(run.models.matching, "starts", 1) - 1
    times = torch.linspace(1, 0, states + 2)[1:-1].expand(COUNT, states)
    path = {"z": (COUNT, *shape), "trajectory": (COUNT, states, *shape)}
    return batch | {key: torch.randn(size, generator=g) for key, size in path.items()} | {"times": times}


# ---- a step ----------------------------------------------------------------------------------------------------------
# A recipe's `training_step` is all that asks a loss: what it hands to terms and methods is its own business.


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("dino")


def turn(run: Run, mine: bool) -> int | None:
    """The first step that is the student's turn, or the critic's alone; None: there is no such step."""
    matching = run.models.matching
    steps = range(1 if matching is None else 2 * matching.every)
    return next((k for k in steps if (matching is None or matching.turns(k)[0]) == mine), None)


def stepped(module: Recipe, clock: Clock, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """Means of all losses of one step; gradients are those of this step alone."""
    clock.global_step = step
    module.losses = {}
    module.zero_grad(set_to_none=True)
    module.training_step(batch, 0).backward()
    return dict(module.losses)


def parts(module: Recipe) -> dict[str, nn.Module | None]:
    teacher = None if module.teacher is None else module.teacher.denoiser
    critic = getattr(module, "critic", None)
    return {"student": module.denoiser, "average": module.ema, "teacher": teacher, "critic": critic, "own": module.own}


def reached(part: nn.Module | None) -> set[str]:
    return set() if part is None else {n for n, p in part.named_parameters() if p.grad is not None and p.grad.any()}


@every
def test_every_loss_has_a_run(name):
    words_of(name)


@every
def test_losses_are_finite_and_gradients_reach_whose_turn_it_is_and_nothing_else(name, folder):
    run = run_of(name, folder)
    module, clock = begun(name, folder)
    state = {k: v.clone() for k, v in module.denoiser.state_dict().items()}
    for mine in (True, False):
        if (step := turn(run, mine)) is None:
            continue
        found = stepped(module, clock, batch_of(run), step)
        assert found and all(v.isfinite() and v.ndim == 0 for v in found.values())
        got = {part: reached(m) for part, m in parts(module).items()}
        judges = {n for n, p in module.own.named_parameters() if belongs(run, module, p)} if module.own else set()
        trained = {n for n, p in module.denoiser.named_parameters() if p.requires_grad}
        assert not got["average"] and not got["teacher"]
        assert (got["student"] and got["student"] <= trained) if mine else not got["student"]
        together = run.models.matching is not None and run.models.matching.turns(step)[1]
        assert bool(got["critic"]) == (together and module_has_critic(module))
        assert got["own"] - judges == set() if not mine else got["own"] & judges == set() or together
        assert all(torch.equal(v, state[k]) for k, v in module.denoiser.state_dict().items())


def belongs(run: Run, module: Recipe, p: nn.Parameter) -> bool:
    """Whether a parameter of a method's own is trained on the critic's turns."""
    assert module.own is not None
    judges = [] if run.models.matching is None else run.models.matching.judges(module.own)
    return any(p is q for q in judges)


def module_has_critic(module: Recipe) -> bool:
    return getattr(module, "critic", None) is not None


@every
def test_a_samples_loss_does_not_depend_on_its_batch(name, folder):
    run = run_of(name, folder)
    (module, clock), batch = begun(name, folder), batch_of(run)
    for mine in (True, False):
        if (step := turn(run, mine)) is None:
            continue
        together = stepped(module, clock, batch, step)
        alone = [stepped(module, clock, {k: v[i : i + 1] for k, v in batch.items()}, step) for i in range(COUNT)]
        for key, value in together.items():
            one = torch.stack([found[key] for found in alone]).mean()
            torch.testing.assert_close(one, value, rtol=1e-3, atol=1e-5, msg=f"{key}: {one} of samples, {value} of all")


@every
def test_own_parameters_come_back_and_have_the_structure_of_the_meta_device(name, folder):
    run = run_of(name, folder)
    (module, clock), batch = begun(name, folder), batch_of(run)
    other = module_of(run)
    other.trainer = clock
    other.configure_model()
    other.on_train_start()
    other.load_state_dict(module.state_dict())
    step = turn(run, True)
    assert stepped(other, clock, batch, step) == stepped(module, clock, batch, step)
    with torch.device("meta"):
        student = run.models.student.structure()
        teacher = None if run.models.teacher is None else run.models.teacher.structure()
        makers = {**run.models.terms} if run.models.matching is None else {"": run.models.matching}
        bare = {key: maker.build(student, teacher) for key, maker in makers.items()}
    found = {f"{k}.{n}".lstrip("."): v for k, m in bare.items() if m is not None for n, v in m.state_dict().items()}
    mine = {} if module.own is None else module.own.state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in mine.items()}
    assert all(v.is_meta for v in found.values())


# ---- the plan --------------------------------------------------------------------------------------------------------


def planned(run: Run) -> tuple[Turn, ...]:
    return draft_of(run.models, run.config, []).turns


def asked(module: FewStep, clock: Clock, batch: dict[str, Tensor], step: int) -> dict[str, float]:
    """Samples that each role was asked for in a step, in units of the batch."""
    seen: dict[str, float] = {}

    def watched(role: str):
        def count(model: nn.Module, given: tuple, out: Any) -> None:
            seen[role] = seen.get(role, 0.0) + len(given[0]) / COUNT

        return count

    of = parts(module)
    roles = {"student": (of["student"], of["average"]), "teacher": (of["teacher"],), "critic": (of["critic"],)}
    models = [(role, model) for role, found in roles.items() for model in found if model is not None]
    models += [(name, module.sight.models[spec]) for name, spec in module.matching.frozen.items()]
    if module.sight.decoder is not None:
        models.append(("decoder", module.sight.decoder))
    hooks = [model.register_forward_hook(watched(role)) for role, model in models]
    try:
        stepped(module, clock, batch, step)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@pytest.mark.slow  # fake models of every step; tests/measuring/test_turns.py counts a few by default
@few_step
def test_a_plan_knows_the_calls_that_a_step_makes(name, folder):
    run = run_of(name, folder)
    module, clock = begun(name, folder)
    assert isinstance(module, FewStep)
    kinds: list[dict[str, float]] = []
    for kind in planned(run):
        found: dict[str, float] = {}
        for call in kind.calls:
            role = call.role.split(" of ")[0]  # frozen models and the decoder with the shape that they see
            found[role] = found.get(role, 0.0) + call.samples
        kinds.append(found)
    for mine in (True, False):
        if (step := turn(run, mine)) is not None:
            assert asked(module, clock, batch_of(run), step) in kinds
