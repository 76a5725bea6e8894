"""The settings of an evaluation: defaults, one value for a list, and a sentence for each mistake."""

from math import inf, nan

import pytest
from omegaconf import OmegaConf

from recipes.config.errors import UserError
from recipes.config.schema import EVALUATION, Evaluation


def test_the_defaults_are_complete_and_pass_their_own_rules():
    assert Evaluation.of({}).n == OmegaConf.load(EVALUATION).n


def test_one_value_stands_for_a_list():
    chosen = Evaluation.of({"guidance": 2, "seed": 3})
    assert chosen.guidance == [2.0] and chosen.seed == [3]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"guidence": 1.5}, "unknown key 'guidence'; did you mean 'guidance'?"),
        ({"n": "many"}, "n: expected int, got 'many'"),
        ({"guidance": ["strong"]}, "guidance: expected list of float, got .'strong'."),
        ({"n": 2}, "n: expected a number from 8 to 1000000, got 2"),
        ({"steps": 0}, "steps: expected a number from 1 to 10000 or null, got 0"),
        ({"seed": []}, "seed: expected at least one value"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_sentence(overrides, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        Evaluation.of(overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        *(({"n": n}, "n: expected") for n in (0, -1, nan, 10**9, 1e9, True, None, 100.0)),
        *(({"guidance": g}, "guidance: expected") for g in ([nan], -1, inf, [1.0, inf], [])),
        *(({"seed": s}, "seed: expected") for s in (-1, 2**32, [0.5], True)),
        *(({"batch": b}, "batch: expected") for b in (0, 10**9)),
        *(({"steps": s}, "steps: expected") for s in (0, 99_999_999)),
        ({"rounds": -1}, "rounds: expected"),
        *(({key: "4"}, f"{key}: expected .*, got") for key in ("n", "rounds", "batch", "seed", "steps")),
        ({"reference_guidance": nan}, "reference_guidance: expected"),
        ({"n": "${x}"}, "n: Interpolation key 'x' not found"),
        ({"guidance": "${x}"}, "Interpolation key 'x' not found"),
    ],
)
def test_a_number_that_no_evaluation_can_have_is_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        Evaluation.of(changes)
