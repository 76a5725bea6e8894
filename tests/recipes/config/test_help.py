"""What a newcomer reads first is right, short, and there at once."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import eval as evaluation
from recipes.config import composed
from recipes.config.check import check
from recipes.config.help import LINE, choices, help_of, keys_of
from recipes.config.schema import EVALUATION, Root
from recipes.config.sources import register

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture(scope="module")
def train_help() -> str:
    return help_of(CONFIGS, "train")


def test_the_help_is_no_longer_than_a_screen_and_a_half(train_help, capsys):
    evaluation.main(["--help"])
    for text in (train_help, capsys.readouterr().out):
        lines = text.splitlines()
        assert 20 < len(lines) <= 56 and max(map(len, lines)) <= LINE + 2


def test_its_examples_are_composed_and_fit(train_help):
    register()
    commands = re.findall(r"^  python train.py (.*?)(?:  |$)", train_help.partition("Groups")[0], re.MULTILINE)
    assert len(commands) == 6
    for words in map(shlex.split, commands):
        single = [word.split(",")[0] for word in words if word != "-m"]  # of a sweep its first run
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
            assert check(compose("train", single)) == [], words


def test_its_keys_are_keys(train_help):
    keys = train_help.partition("Most used keys\n")[2].partition("\n\n")[0]
    names = [line.split()[0].split("=")[0] for line in keys.splitlines() if not line.strip().startswith("+")]
    assert len(names) == 11
    known = OmegaConf.to_container(OmegaConf.structured(Root)) | {"evaluate": OmegaConf.load(EVALUATION)}
    for section, _, key in (name.partition(".") for name in names):
        assert section in known and (not key or "<" in key or key in known[section])  # <stage>: any


def test_every_group_is_told_with_all_that_may_be_chosen():
    told = " ".join("\n".join(choices(CONFIGS)).split())
    for group in composed.groups(CONFIGS):
        if group not in ("world", "method"):
            assert f"{group}: " in told
    for name in ("dit_diffusers", "td_lora", "zero3", "B/2", "3.5-large", "pixart_tiny", "tinyfusion_random"):
        assert name in told
    methods = told.partition("methods: ")[2].partition(" backbone:")[0].split(", ")
    runs = {name.partition("/")[2] for name in composed.names(CONFIGS, "experiment")}
    assert set(methods) <= runs and "student" not in methods  # those that only others build on are not told, nor stages
    assert "tinyfusion_search" not in methods


def test_keys_of_an_evaluation_are_told_with_their_defaults():
    text = "\n".join(keys_of(EVALUATION))
    for key in OmegaConf.load(EVALUATION):
        assert re.search(rf"^  {key}=\S", text, re.MULTILINE), key
    assert "  n=1000 " in text and "  steps=null " in text
