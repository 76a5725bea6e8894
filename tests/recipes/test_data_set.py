"""The data set of an artifact, and the conditions that it gives."""

import pytest
import torch

import edit
from data.sets.digits import Digits
from data.sets.shapes import Shapes
from edit.data_set import captions, conditions
from recipes.config.errors import UserError
from recipes.data_set import build_data


def test_an_artifact_cannot_name_a_data_set_outside_of_the_data_package(make_dit, tmp_path):
    data = {"_target_": "data.sets.digits.Digits"}
    artifact = edit.load(edit.save(make_dit(), tmp_path / "artifact", data=data))
    assert build_data(artifact).num_classes == 10
    for node in ({"_target_": "os.system", "command": "true"}, {"_target_": "data.sets.digits.torch.load"}, {}):
        artifact.data = node
        with pytest.raises(UserError, match="cannot be opened|does not say which data"):
            build_data(artifact)


# ---- reports --------------------------------------------------------------------------------------------------------


def test_samples_are_named_by_the_captions_of_their_conditions_or_numbered():
    shapes = Shapes()
    split, told = shapes.heldout(), captions(shapes, 3)
    assert told == split.captions[:3]
    shown = conditions(shapes)(torch.arange(3))
    assert all(torch.equal(shown.text[k], split.sample(k, 0)["text"]) for k in range(3))
    count = len(split) + 1
    assert captions(shapes, count)[-1] == told[0]
    assert captions(Digits(), 2) == ["sample 0", "sample 1"]
