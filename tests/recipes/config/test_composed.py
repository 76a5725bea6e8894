"""Choices without a file of their own: sizes of a family, methods on worlds; and that no configuration has changed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, ListConfig, OmegaConf

from recipes.config import composed
from recipes.config.check import check
from recipes.config.explain import explain
from recipes.config.sources import register

CONFIGS = Path(__file__).parents[3] / "configs"
WORLDS = sorted(file.stem for file in (CONFIGS / "world").glob("*.yaml"))
METHODS = sorted(file.stem for file in (CONFIGS / "method").glob("*.yaml"))
FROZEN = json.loads(Path(__file__).with_name("frozen.json").read_text())  # what differs from the default's values


def composition(*words: str) -> DictConfig:
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        return compose("train", list(words))


def refusal(*words: str) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of many kinds
        composition(*words)
    return explain(caught.value, CONFIGS, words)


def flat(node, prefix=""):
    """Dotted keys and their values, with references followed; in place of what cannot be, the error's name."""
    found = {}
    for key in node:
        try:
            value = "???" if OmegaConf.is_missing(node, key) else node[key]
        except Exception as error:
            value = f"!{type(error).__name__}"
        if isinstance(value, DictConfig) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = followed(value)
    return found


def followed(value):
    """A list's items, each by itself: one may be missing, as before."""
    if not isinstance(value, ListConfig | DictConfig):
        return value
    items = []
    for i in range(len(value)):
        try:
            item = value[i]
            named = OmegaConf.is_dict(item) and len(item) == 1  # a stage under a name: its words
            items.append(followed(next(iter(item.values())) if named else item))
        except Exception as error:
            items.append(f"!{type(error).__name__}")
    return items if isinstance(value, ListConfig) else {}


# ---- what was there before ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", FROZEN)
def test_a_choice_means_what_it_meant_before_there_were_worlds(choice):
    told = flat(composition(choice))
    assert {key: told.get(key, "gone") for key in FROZEN[choice]} == FROZEN[choice]


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_a_size_is_chosen_by_name_or_beside_the_family_and_single_keys_still_win():
    whole = composition("backbone=dit_xl_2").backbone
    assert composition("backbone=dit", "size=XL/2").backbone == whole == composition("size=xl_2").backbone
    assert composition("backbone=dit", "size=XL/2", "backbone.depth=12").backbone == {**whole, "depth": 12}
    assert composition("backbone=sd3", "size=3.5-large").backbone == composition("backbone=sd35_large").backbone
    assert composition("backbone=dit").backbone == whole  # the family's own `size`


def test_a_size_alone_changes_that_of_an_experiment():
    smaller = composition("experiment=sit_xl_2/baseline", "size=B/4")
    assert smaller.backbone == composition("backbone=sit_b_4").backbone and smaller.objective.time
    assert "learn_sigma" not in smaller.backbone and "frequency_shift" not in smaller.backbone


@pytest.mark.parametrize(
    "words, parts",
    [
        (["backbone=dit", "size=XL/3"], ["dit has no size 'XL/3', did you mean 'XL/", "accepted: S/2, S/4"]),
        (["backbone=flux_dev", "size=XL/2"], ["flux has no size 'XL/2' (accepted: dev, schnell, tiny)"]),
        (["backbone=dit_xl_3"], ["no backbone named 'dit_xl_3'", "'dit_xl_2'"]),
        (["size=2"], ["no size named '2'"]),
        (["sze=B/2"], ["unknown key 'sze'; did you mean 'size'?"]),
    ],
)
def test_a_wrong_size_is_refused_with_those_there_are(words, parts):
    said = refusal(*words)
    assert all(part in said for part in parts), said


def test_a_backbone_of_one_file_has_no_sizes(tmp_path):
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone/mine.yaml").write_text("_target_: a.B\ndepth: 3\n")
    (tmp_path / "train.yaml").write_text("defaults: [{backbone: mine}, {size: null}]\n")
    (tmp_path / "backbone/family.yaml").write_text("_target_: a.B\nsizes: {small: {depth: 1}, large: {depth: 9}}\n")
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
        assert compose("train").backbone == {"_target_": "a.B", "depth": 3}
        assert compose("train", ["backbone=family_large"]).backbone.depth == 9
        assert compose("train", ["backbone=family"]).backbone.depth == 1  # without `size`, the first
        with pytest.raises(ValueError, match="backbone=mine is of one size: leave out size=large"):
            compose("train", ["size=large"])


def test_groups_are_read_without_hydra():
    assert composed.read(CONFIGS, "backbone", "dit", "XL/2") == composed.read(CONFIGS, "backbone", "dit_xl_2")
    assert composed.read(CONFIGS, "backbone", "none_of_ours") is None
    assert {"dit_xl_2", "sd35_large", "qwen_image"} <= set(composed.names(CONFIGS, "backbone"))
    code = "import sys, recipes.config.composed; assert not {'hydra', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONFIGS.parent)


# ---- worlds and methods ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [w if w in WORLDS[:4] else pytest.param(w, marks=pytest.mark.slow) for w in WORLDS])
def test_every_method_fits_every_world_or_says_why_not(world):
    """One in four methods on each of four worlds, so each method on one; all pairs with -m slow."""
    check_methods(world, METHODS[WORLDS.index(world) % 4 :: 4])


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_every_method_fits_every_world(world):
    check_methods(world, METHODS)


def check_methods(world, methods):
    for method in methods:
        words = [f"experiment={world}/{method}", *["matching.vision.path=dino"] * (method == "add")]
        if reason := composed.unfit(CONFIGS, world, method):
            assert refusal(*words) == reason and reason.count("\n") == 0 and "worlds that have it: " in reason
            continue
        cfg = composition(*words)
        assert cfg.world.name == world
        if not composed.about(CONFIGS, "method", method).get("part"):
            assert cfg.name == f"{world}_{method}"
        if (world, method) not in (("dit_digits", "depth"), ("dit_digits", "lora")):  # these ask for a start
            assert check(cfg) == []


@pytest.mark.parametrize("world", WORLDS)
def test_what_a_world_tells_of_its_units_is_true(world):
    cfg = composition(f"experiment={world}/teacher")
    told, about = cfg.world, composed.about(CONFIGS, "world", world)
    depth = sum(cfg.backbone.get(key, 0) for key in ("depth", "num_layers", "num_single_layers"))
    assert sum(told.lengths) == depth == about["units"]
    assert told.kept == list(range(0, depth, 2)) and told.middle == [depth // 2]
    assert told.pairs == [[i, 2 * i + 1] for i in range(depth // 2)]
    assert {*told.taps, *told.linear} <= set(range(depth)) and max(told.taps) == depth - 1
    assert told.linear_pairs == [[unit, unit] for unit in told.linear]
    assert told.teacher == f"{world}/teacher" and told.path == f"runs/{world}_teacher"


def test_a_method_may_build_on_another_and_takes_what_a_world_changes_there():
    random = composition("experiment=dit_digits/tinyfusion_random")
    assert random.optimizer.lr == 1e-3 and random.name == "dit_digits_tinyfusion_random"
    assert random.init == "runs/dit_digits_tinyfusion_random_pruned" and random.after == []


def test_a_name_of_neither_is_refused_with_the_nearest_of_both():
    assert "did you mean 'qwen_image_tiny/lcm'" in refusal("experiment=qwen_image_tiny/lmc")


def test_a_world_by_itself_is_refused_with_how_it_is_chosen():
    assert "write experiment=<world>/<method>" in refusal("world=flux_tiny")
