"""Values are compared with annotations and rules."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from recipes.config.mistakes import mistakes
from recipes.config.values import fits, rule, spell


@pytest.mark.parametrize("hint", [int, float, bool, str, int | None])
def test_an_object_that_will_be_built_is_no_scalar(hint):
    node = OmegaConf.create({"_target_": "toy.Net"})
    assert not fits(node, hint), spell(hint)
    assert fits(node, hint | list[int]) and fits(node, Path)


@pytest.mark.parametrize(
    ("value", "hint", "right"),
    [
        (3, float, True),
        (True, int, False),
        (True, float, False),
        (1, bool, False),
        (3.0, int, False),
        (None, int, False),
        (None, int | None, True),
        ("x", Path, True),
        ([1, "a"], list[int], False),
        ([1, 2, 3], tuple[int, int], False),
        ([1, 2, 3], tuple[int, ...], True),
        ({"a": "b"}, dict[str, int], False),
        ("abc", list[str], False),
    ],
)
def test_a_value_is_judged_by_its_annotation(value, hint, right):
    assert fits(OmegaConf.create({"x": value}).x, hint) is right


@dataclass
class Ruled:
    pair: list[float] = rule([0.0, 1.0], low=0, high=1, count=2)
    limit: float | None = rule(1.0, above=0)
    rate: float = rule(1.0, above=0)


@pytest.mark.parametrize(
    ("given", "sentences"),
    [
        ({"pair": [0, 0]}, []),
        ({"pair": [0]}, ["pair: expected 2 values, got 1: [0.0]"]),
        ({"pair": [0, 2]}, ["pair: expected a number from 0 to 1, got 2.0"]),
        ({"limit": None}, []),
        ({"limit": 1e-9}, []),
        ({"limit": 0}, ["limit: expected more than 0 or null, got 0.0"]),
        ({"limit": float("nan")}, ["limit: expected more than 0 or null, got nan"]),
        ({"rate": 0}, ["rate: expected more than 0, got 0.0"]),
    ],
)
def test_a_rule_bounds_each_value_and_their_number(given, sentences):
    assert list(mistakes(OmegaConf.merge(OmegaConf.structured(Ruled), given), "", ())) == sentences
