import re
from pathlib import Path
from typing import get_args

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from edit.facts import Prediction
from edit.predictions import KINDS

CONFIGS = Path(__file__).parents[1] / "configs" / "objective"


def test_every_kind_of_prediction_has_a_row():
    assert set(KINDS) == set(get_args(Prediction))


@pytest.mark.parametrize("name", get_args(Prediction))
def test_what_goes_with_a_prediction_fits_it_and_is_among_what_errors_recommend(name):
    kind = KINDS[name]
    assert kind.objective.prediction == name
    kind.solver.check(kind.objective)
    assert type(kind.solver).__name__ in kind.objective.solvers
    named = re.findall(r"objective=(\w+)", kind.settings)
    found = [instantiate(OmegaConf.load(CONFIGS / f"{setting}.yaml")) for setting in named]
    assert found and all(objective.prediction == name for objective in found)
    assert type(kind.objective) in [type(objective) for objective in found]
