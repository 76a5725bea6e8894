"""A wrong name is answered with the names that may be meant, and methods with the command that lists them."""

import pytest
from hydra import compose, initialize_config_dir
from small_runs import CONFIGS

from recipes.config.check import check
from recipes.config.errors import UserError
from recipes.config.explain import explain
from recipes.config.sources import register
from recipes.config.suggestions import LISTS
from recipes.variants import grouped


@pytest.mark.parametrize(
    ("word", "near", "listed"),
    [
        ("experiment=dit_digits/depht", "dit_digits/depth", True),
        ("edits=lroa", "lora", True),
        ("backbone=flx", "flux", True),
        ("sampler=hen", "heun", True),
        ("trainer=gpux", "gpu", False),
        ("data=digts", "digits", False),
    ],
)
def test_an_unknown_method_is_answered_with_the_command_that_lists_them(word, near, listed):
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)), pytest.raises(Exception) as error:
        compose("train", [word])
    said = explain(error.value, CONFIGS, [word])
    assert repr(near) in said and said.endswith(LISTS) == listed


def test_so_is_an_unknown_class_of_edit_and_an_unknown_edit_of_a_variant():
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        (said,) = check(compose("train", ["matching={_target_: edit.few_step.ladd.LAD}", "init=x"]))
    assert said.endswith(f"did you mean 'LADD'?{LISTS}")
    with pytest.raises(UserError, match="did you mean 'reuse'.*recipes.list lists them"):
        grouped("variant.a", "ruse")
