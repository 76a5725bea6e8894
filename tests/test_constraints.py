"""The versions of the last green run fit what the project asks for, and leave nothing of it open."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FROZEN = {
    name: version
    for name, version in re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}
ASKED = [Requirement(r) for r in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"])]


@pytest.mark.parametrize("asked", ASKED, ids=lambda r: r.name)
def test_each_requirement_is_frozen_within_its_bounds(asked):
    assert asked.name in FROZEN, "run `.ci/run --freeze`"
    assert asked.specifier.contains(FROZEN[asked.name]), f"{asked} does not admit {FROZEN[asked.name]}"


@pytest.mark.parametrize("asked", ASKED, ids=lambda r: r.name)
def test_each_requirement_has_a_lower_bound(asked):
    """An open one is whatever a resolver finds, the first release ever included."""
    assert any(s.operator == ">=" for s in asked.specifier)


def test_contributing_names_the_oldest_torch_that_the_project_admits():
    (torch,) = (r for r in ASKED if r.name == "torch")
    (bound,) = (s.version for s in torch.specifier if s.operator == ">=")
    assert f"| {bound}" in (ROOT / "CONTRIBUTING.md").read_text()
