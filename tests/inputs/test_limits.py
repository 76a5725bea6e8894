"""Numbers that no setting may be, tried on every setting of every method, solver, term, law and objective."""

import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from importlib import import_module
from math import inf, nan
from typing import Any, get_args

import pytest

import edit
from edit.alignment.encoder import Encoder
from edit.alignment.haste import HASTE
from edit.alignment.repa import REPA
from edit.alignment.self_transcendence import SelfTranscendence, VAEWarmUp
from edit.alignment.sra import SRA
from edit.backbones.dit import DiTConfig
from edit.backbones.flux import FluxConfig
from edit.caching.delta_dit import DeltaDiT
from edit.caching.table_reuse import TableReuse
from edit.denoiser import Edit
from edit.distillation.attention import AttentionKD, MapKD, RelationKD
from edit.distillation.balanced_features import BalancedFeatureKD
from edit.distillation.features import FeatureKD
from edit.distillation.guidance import TeacherGuidance
from edit.distillation.intervals import IntervalKD
from edit.edits import rebuild
from edit.few_step.add import ADD
from edit.few_step.combined import Combined
from edit.few_step.method import FewStepMethod
from edit.few_step.policy import PolicySolver
from edit.few_step.progressive import Progressive
from edit.few_step.vision import Vision
from edit.inputs.limits import hint_of
from edit.losses import Term
from edit.moe.mixture_of_blocks import MixtureOfBlocks
from edit.objectives import DDPM, LogitNormal, Objective, Ramp, Shifted
from edit.pruning.collapse import Collapse
from edit.pruning.width import TextFeedForwardLinear
from edit.sampling import Sampler
from edit.solvers import Euler, EulerMaruyama, Solver, StockEuler
from edit.tuning.lora import LoRA

FAMILIES = (Edit, FewStepMethod, Objective, Solver, Term)
OTHERS = (LogitNormal, Shifted, Ramp, Sampler, TeacherGuidance, Vision)
NEEDED = {  # of those that cannot do without a setting
    ADD: {"vision": Vision("eye")},
    AttentionKD: {"pairs": ((0, 0),)},
    BalancedFeatureKD: {"pairs": ((0, 0),)},
    Encoder: {"path": "eye"},
    HASTE: {"features": REPA(Encoder("eye"), 1), "pairs": ((0, 0),)},
    REPA: {"encoder": Encoder("eye"), "unit": 1},
    Collapse: {"intervals": ((0, 1),)},
    DeltaDiT: {"blocks": 1},
    Combined: {"parts": {"a": Progressive()}, "weights": {"a": 1.0}, "critic_weights": {"a": 1.0}},
    FeatureKD: {"pairs": ((0, 0),), "weights": (1.0,)},
    IntervalKD: {"intervals": ((0, 1),)},
    MapKD: {"pairs": ((0, 0),), "heads": 1},
    MixtureOfBlocks: {"blocks": ((0, 2, 1),)},
    Ramp: {"start": 1.0, "levels": 2},
    RelationKD: {"pairs": ((0, 0),)},
    SRA: {"units": (0, 1), "weight": 0.2},
    Sampler: {"channels": 3, "told": 3.5, "norm_patch": 2},
    SelfTranscendence: {"units": (0, 1)},
    StockEuler: {"dynamic": (0.5, 1.15, 256, 4096), "terminal": 0.02},
    TableReuse: {"rows": ("1",)},
    TextFeedForwardLinear: {"units": (0,)},
    VAEWarmUp: {"unit": 0},
    Vision: {"path": "eye", "crop": 8},
}


def settings() -> Iterator[type]:
    for module in pkgutil.walk_packages(edit.__path__, "edit."):
        for cls in vars(import_module(module.name)).values():
            own = inspect.isclass(cls) and cls.__module__ == module.name and is_dataclass(cls)
            if own and not inspect.isabstract(cls):
                if issubclass(cls, FAMILIES) or cls in OTHERS or cls.__name__.endswith("Config"):
                    yield cls


def wrong(hint: Any) -> tuple:
    """Numbers that a field with this annotation cannot be; none where it takes no number."""
    if hint is int:
        return nan, inf, True, 1.5, "4", 10**30, -(10**30)
    if hint is float:
        return nan, inf, -inf, True, "1.0", 1e300, -1e300, 10**400
    return next((found for arg in get_args(hint) if (found := wrong(arg))), ())


def placed(value: Any, bad: Any) -> Any:
    """A setting with one of its numbers replaced."""
    if isinstance(value, Mapping):
        return {name: bad for name in value}
    return (placed(value[0], bad), *value[1:]) if isinstance(value, tuple) and value else bad


CASES = [
    pytest.param(cls, f.name, bad, id=f"{cls.__name__}.{f.name}={str(bad)[:8]}")
    for cls in settings()
    for f in fields(cls)
    for bad in wrong(hint_of(cls, f.name))
    if not (isinstance(bad, str) and str in get_args(hint_of(cls, f.name)))
]


@pytest.mark.parametrize(("cls", "name", "bad"), CASES)
def test_what_is_no_number_of_its_kind_or_too_large_is_refused_by_name(cls, name, bad):
    given = cls(**NEEDED.get(cls, {}))  # right as it is
    field = next(f for f in fields(cls) if f.name == name)
    value = getattr(given, name) if field.default is MISSING or name in NEEDED.get(cls, {}) else field.default
    if isinstance(value, tuple) and not value:
        value = (0,)
    with pytest.raises(ValueError, match=rf"{cls.__name__}: {name} must be .*, got ") as error:
        cls(**{**NEEDED.get(cls, {}), name: placed(value, bad)})
    assert len(str(error.value)) < 1000


def test_the_kinds_of_settings_are_all_found():
    found = set(settings())
    assert (
        len(found) > 60
        and {DiTConfig, FluxConfig, PolicySolver, Combined, LoRA, Euler, DDPM, FeatureKD, *OTHERS} <= found
    )


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Euler(steps=0), r"^Euler: steps must be at least 1, got 0; the default is 50$"),
        (lambda: Euler(steps=99_999_999), r"^Euler: steps must be at most 10000, got 99999999; the default is 50$"),
        (lambda: EulerMaruyama(steps=1), "steps must be at least 2, got 1"),
        (lambda: Euler(shift=0), r"^Euler: shift must be positive, got 0; the default is 1.0$"),
        (lambda: Euler(shift=nan), "shift must be a finite number, got nan"),
        (lambda: Euler(steps=4.0), "steps must be a whole number, got 4.0"),
        (lambda: Euler(steps=True), "steps must be a whole number, got True"),
        (lambda: Sampler(guidance=-1), "guidance must be at least 0, got -1"),
        (lambda: LogitNormal(std=-1), "std must be positive, got -1"),
        (lambda: DDPM(beta_end=1.0), "beta_end must be below 1, got 1.0"),
        (lambda: Ramp(nan), "start must be a finite number, got nan"),
        (lambda: Ramp(1.0, -0.5), "end must be at least 0, got -0.5"),
        (lambda: FeatureKD(((0, 0),), weight=-1.0), "weight must be at least 0 or a Ramp, got -1.0"),
        (lambda: FeatureKD(((0, 0),), weights=(1.0, nan)), "weights must be a finite number in each place"),
        (lambda: Combined({"a": Progressive()}, {"a": inf}), "weights must be a finite number or a Ramp in each"),
        (lambda: StockEuler(dynamic=(1.0, 2.0)), "dynamic must be a list of 4 numbers or None"),
        (lambda: LoRA(dropout=1.0), "dropout must be below 1, got 1.0"),
    ],
)
def test_a_number_outside_of_its_limits_is_refused_with_the_limit_that_it_breaks(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_no_guidance_and_whole_numbers_where_numbers_are_wanted_are_fine():
    assert replace(Sampler(), guidance=0).guidance == 0
    assert Euler(shift=3).shift == 3
    assert FeatureKD(((0, 0),), weight=Ramp(0.01)).weight == Ramp(0.01)


def test_an_artifact_cannot_bring_such_numbers_in():
    with pytest.raises(ValueError, match="Euler: shift must be a finite number, got nan"):
        rebuild({"_target_": "edit.solvers.Euler", "shift": nan})
