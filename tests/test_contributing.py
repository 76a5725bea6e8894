"""The examples of CONTRIBUTING.md are complete: as the files that they name, they train, load and are measured."""

import re
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import data.sets
import edit
import edit.backbones
import edit.caching
import edit.distillation
import edit.few_step
import edit.pruning
import recipes
from recipes.config.check import check
from recipes.config.sources import register
from recipes.training import run

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
EXAMPLES = dict(re.findall(r"```(?:python|yaml)\n# ([\w/]+\.(?:py|yaml))\n(.*?)```", PAGE, re.DOTALL))
PACKAGES = (data.sets, edit.backbones, edit.caching, edit.distillation, edit.few_step, edit.pruning, recipes)
SHORT = ("trainer.max_steps=2", "trainer.accelerator=cpu", "evaluate=null", "preview.every=0", "optimizer.warmup=0")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the configurations with the examples in their places; our packages find the examples' modules."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for path, text in EXAMPLES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    before = {package: list(package.__path__) for package in PACKAGES}
    for package in PACKAGES:
        package.__path__.append(str(folder / package.__name__.replace(".", "/")))
    yield folder
    for package, path in before.items():
        package.__path__[:] = path


def config(clone, *words):
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(clone / "configs")):
        cfg = compose("train", [*words, f"runs={clone / 'runs'}", *SHORT])
    assert check(cfg) == []
    return cfg


@pytest.fixture(scope="module")
def teacher(clone):
    run(config(clone, "experiment=stripes/teacher"))
    return clone / "runs/stripes_teacher"


def rows(folder):
    return (folder / "metrics.csv").read_text().splitlines()


def test_every_kind_of_addition_has_an_example():
    assert sorted(EXAMPLES) == [
        "configs/method/skip.yaml",
        "configs/world/stripes.yaml",
        "data/sets/stripes.py",
        "edit/backbones/plain.py",
        "edit/caching/follow.py",
        "edit/distillation/small.py",
        "edit/few_step/mimic.py",
        "edit/pruning/skip.py",
        "recipes/one_level.py",
        "tests/pruning/test_skip.py",
    ]


def test_the_walk_leads_through_as_many_files_and_lines_as_it_says():
    """To a twentieth: every change of one of them would be a change of the page otherwise."""
    walk = PAGE.split("### A newcomer's walk")[1].split("\n\n")[1]
    files = list(dict.fromkeys(re.findall(r"`([\w/]+\.py)`", walk)))
    names = "one two three four five six seven eight nine ten".split()
    told, lines = re.search(r"That is (\w+) files of ([\d,]+) lines", walk).groups()
    assert told == names[len(files) - 1]
    assert sum(len((ROOT / file).read_text().splitlines()) for file in files) == pytest.approx(
        int(lines.replace(",", "")), rel=0.05
    )
    assert "def run(" in (ROOT / files[2]).read_text() and files[2] == "recipes/training.py"
    (algorithm,) = re.findall(r"`([\w/]+\.py)`\s\(`training_step` is the algorithm", walk)
    assert "def training_step(" in (ROOT / algorithm).read_text() and files[-1] == "edit/denoiser.py"


def test_a_world_is_trained_and_a_method_of_three_files_works_on_it(clone, teacher):
    run(config(clone, "experiment=stripes/skip", "before=[]"))
    whole, half = (edit.load(folder).denoiser for folder in (teacher, clone / "runs/stripes_skip"))
    assert (len(whole.units), len(half.units)) == (4, 2)


def test_the_test_of_the_method_passes(clone, make_dit):
    scope = {}
    exec(compile(EXAMPLES["tests/pruning/test_skip.py"], "test_skip.py", "exec"), scope)  # our own page
    (proved,) = (f for name, f in scope.items() if name.startswith("test_"))
    proved(make_dit)


def test_a_loss_is_put_beside_any_objective(clone):
    run(
        config(
            clone,
            "experiment=stripes/teacher",
            "name=small",
            "+terms.small._target_=edit.distillation.small.Small",
            "log_every=1",
        )
    )
    assert "train/small/small" in rows(clone / "runs/small")[0]


def test_a_few_step_method_learns_from_a_teacher(clone, teacher):
    method = ("experiment=stripes/teacher", "matching={_target_: edit.few_step.mimic.Mimic}")
    words = (*method, f"init={teacher}", f"teacher.path={teacher}", "log_every=1")
    run(config(clone, *words, "name=mimic"))
    losses = [float(row.split(",")[1]) for row in rows(clone / "runs/mimic")[1:]]
    assert losses[0] < 1e-9  # the student is the teacher still
    run(config(clone, *words, "+edits.skip._target_=edit.pruning.skip.Skip", "name=half"))
    # half of it is not; units that were trained for two steps from zero gates say little yet
    assert float(rows(clone / "runs/half")[1].split(",")[1]) > 1e-9


def test_a_rollout_method_trains_a_cached_model_on_its_own_path(clone, teacher):
    words = ("recipe=rollout", "recipe.method={_target_: edit.caching.follow.Follow}", "log_every=1")
    edits = (
        "+edits.lora._target_=edit.tuning.lora.LoRA",
        "+edits.reuse={_target_: edit.caching.reuse.Reuse, units: [0, 1]}",
    )
    places = (f"init={teacher}", f"teacher.path={teacher}", "sampler.solver.steps=4")
    run(config(clone, "experiment=stripes/teacher", "name=follow", *words, *edits, *places))
    found = [float(row.split(",")[1]) for row in rows(clone / "runs/follow")[1:]]
    assert len(found) == 2 and found[0] > 0
    moved = [v for k, v in edit.load(clone / "runs/follow").denoiser.state_dict().items() if "lora" in k]
    assert moved and any(v.any() for v in moved)


def test_a_backbone_trains_is_pruned_and_loads_again(clone):
    backbone = (
        "~backbone",
        "+backbone={_target_: edit.backbones.plain.PlainConfig}",
        "+edits.skip._target_=edit.pruning.skip.Skip",
        "+edits.lora._target_=edit.tuning.lora.LoRA",
    )
    run(config(clone, "experiment=stripes/teacher", "name=plain", *backbone))
    plain = edit.load(clone / "runs/plain").denoiser
    assert len(plain.units) == 1 and plain.applied["lora"].targets == ("qkv", "out")


def test_a_recipe_is_a_step_on_what_all_recipes_share_and_a_run_names_it(clone):
    node = "recipe={_target_: recipes.one_level.AtOneLevel, level: 0.3}"
    run(config(clone, "experiment=stripes/teacher", "name=one_level", node, "log_every=1"))
    assert len(rows(clone / "runs/one_level")) == 3  # with the head
    run(config(clone, "experiment=stripes/teacher", "name=other_level", node.replace("0.3", "0.9"), "log_every=1"))
    # the second step: a fresh model predicts zeros at every level
    first, other = (rows(clone / f"runs/{name}")[2].split(",")[1] for name in ("one_level", "other_level"))
    assert first != other
