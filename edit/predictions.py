"""What goes with each quantity that weights predict: the one table that a new kind of prediction extends.

Its name is in `edit.facts.Prediction`, what it means in its objective, which says in `solvers` how it is sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

from edit.denoiser import Denoiser
from edit.edm import EDMHeun
from edit.facts import Prediction
from edit.objectives import DDPM, EDM, FlowMatching, Objective
from edit.solvers import DDIMSolver, Euler, Solver


@dataclass(frozen=True)
class Kind:
    """Of one kind of prediction.

    Args:
        objective: the one of models that come without
        solver: the one of models that come without
        settings: values of a configuration's `objective` that train it, in words
    """

    objective: Objective
    solver: Solver
    settings: str


KINDS: dict[Prediction, Kind] = {
    "velocity": Kind(FlowMatching(), Euler(50), "objective=flow or objective=sit"),
    "noise": Kind(DDPM(), DDIMSolver(50), "objective=ddpm"),
    "mixture": Kind(EDM(), EDMHeun(), "objective=edm"),
}


def default_objective(denoiser: Denoiser) -> Objective:
    """That of the denoiser's convention: of noise, of the velocity, or EDM's of a mixture of data and noise."""
    return KINDS[denoiser.prediction].objective
