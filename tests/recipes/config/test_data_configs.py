"""The data group: every file builds what it names."""

import inspect
from importlib import import_module
from pathlib import Path

import pytest
import yaml

FILES = sorted((Path(__file__).parents[3] / "configs" / "data").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_data_config_names_every_argument_of_its_class_and_no_other(file):
    config = yaml.safe_load(file.read_text())
    assert set(config) == {"set", "batch_size", "workers"}
    module, name = config["set"].pop("_target_").rsplit(".", 1)
    parameters = inspect.signature(getattr(import_module(module), name)).parameters
    assert set(config["set"]) == set(parameters)
    for key, value in config["set"].items():
        if value not in ("???", "${seed}") and key != "size":  # the size is the config's choice
            default = parameters[key].default
            assert value == (list(default) if isinstance(default, tuple) else default)


def test_there_are_the_ten_data_sets():
    digits = ["captioned_digits", "digits", "digits_and_shades", "digits_moved"]
    shapes = ["labelled_shapes", "latents", "moving_shapes", "shapes"]
    assert [f.stem for f in FILES] == [*digits, "image_folder", *shapes, "webdataset"]
