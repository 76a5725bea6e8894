"""What an artifact may ask for: classes of the kind that a place expects, of bounded size; it makes nothing written."""

import json
import os
import re
import time
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import numpy as np
import pytest
from PIL import Image

import data
import edit
from data.sets.digits import Digits
from data.sets.image_folder import ImageFolder
from data.sets.image_shards import ImageShards
from edit.artifacts.description import edits_of
from edit.data_set import Splits, opened
from edit.denoiser import Edit, Spec
from edit.edits import describe, rebuild
from edit.few_step.method import FewStepMethod
from edit.inputs import trust
from edit.losses import Term
from edit.objectives import FlowMatching, Objective, Ramp
from edit.sampling import Sampler
from edit.solvers import Euler, Solver
from recipes.config.errors import UserError
from recipes.cost import main as cost
from recipes.data_set import build_data


@dataclass
class Mine(Edit):
    """An edit of a package of somebody's own, which holds a law of theirs and of ours."""

    law: Any = None
    weight: float | Ramp = 1.0

    def apply(self, denoiser) -> None: ...


@dataclass(frozen=True)
class Law:
    share: float = 0.5


class Sounds:
    """A data set of such a package, which says nowhere that it is one."""

    shape, num_classes, classes = (1, 8, 8), None, None

    def __init__(self, rate: int, cache: str | None = None):
        self.rate, self.cache = rate, cache

    def train(self): ...

    def heldout(self): ...

    def to_frames(self, x): ...


@pytest.fixture
def artifact(tmp_path, dit) -> Path:
    return edit.save(dit, tmp_path / "run" / "artifact", data={"_target_": "data.sets.digits.Digits"})


def rewrite(path: Path, **changes) -> None:
    """As somebody who means harm would: checksums tell damage, and say nothing of who wrote a file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    if (described := path.parent / "edits.json").exists():
        described.write_text(
            json.dumps({k: v for k, v in json.loads(described.read_text()).items() if k != "checksums"})
        )


def refused(artifact: Path) -> str:
    """The one sentence with which an artifact is not read, at once."""
    start = time.process_time()
    with pytest.raises((ValueError, FileNotFoundError, UserError)) as error:
        loaded = edit.load(artifact)
        build_data(loaded)
    sentence = str(error.value)
    assert "\n" not in sentence and len(sentence) < 600 and time.process_time() - start < 2
    return sentence


# ---- names ----------------------------------------------------------------------------------------------------------

COMMANDS = ["data.generate.main", "data.precompute.main", "data.embedded.main", "data.embedded.write_world"]
OTHERS = [
    "data.sets.digits.np.save",
    "data.tar_index.Path",
    "data.sets.latents.Tars",
    "data.making.request.Request",
    "data.sets.tensors.Tensors",
]
OTHERS += [
    "data.split.DataSet",
    "data.pixels",
    "data",
    "data.sets.digits.",
    "data..digits.Digits",
    "data.sets.digits.Digits.train",
]
OTHERS += [
    "edit.artifacts.export.main",
    "os.system",
    "",
    ".",
    "data.\0.x",
    "data.x\ny.Z",
    "data." + "x" * 9999,
    3,
    None,
    ["a"],
]


@pytest.mark.parametrize("path", COMMANDS + OTHERS, ids=lambda p: ascii(p)[:30])
def test_what_is_no_data_set_is_not_called_as_one(path, artifact, tmp_path):
    rewrite(artifact / "edits.json", data={"_target_": path, "argv": [f"out={tmp_path / 'out'}"], "words": ["x"]})
    assert refused(artifact)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "path",
    [
        "edit.measuring.cost.Path",
        "edit.artifacts.checkpoint.Artifact",
        "edit.measuring.memory.Draft",
        "edit.artifacts.card.Card",
    ],
)
@pytest.mark.parametrize("part", ["objective", "sampler", "edits"])
def test_a_part_is_of_its_own_kind(part, path, artifact):
    node = {"_target_": path}
    rewrite(artifact / "edits.json", **{part: {"x": node} if part == "edits" else node})
    assert f"the artifact asks for {path}" in refused(artifact)


NESTED = {
    "a solver that is an objective": {"_target_": "edit.sampling.Sampler", "solver": describe(FlowMatching())},
    "an object for a number": {"_target_": "edit.sampling.Sampler", "guidance": describe(Ramp(1.0))},
    "a command for a solver": {
        "_target_": "edit.sampling.Sampler",
        "solver": {"_target_": "edit.artifacts.export.main"},
    },
    "in a list": {"_target_": "edit.sampling.Sampler", "interval": [describe(Ramp(1.0)), 1.0]},
    "an unknown argument": {"_target_": "edit.sampling.Sampler", "solver": {"_target_": "edit.solvers.Euler", "x": 1}},
    "an argument without a name": {"_target_": "edit.sampling.Sampler", "_args_": [1]},
    "a solver that is a number": {"_target_": "edit.sampling.Sampler", "interval": 3},
    "not a section": {"solver": {"_target_": "edit.solvers.Euler"}},
}


@pytest.mark.parametrize("what", NESTED)
def test_what_stands_at_an_argument_is_what_its_annotation_says(what, artifact):
    rewrite(artifact / "edits.json", sampler=NESTED[what])
    assert re.search("the artifact|edits.json: its objective or sampler cannot be made", refused(artifact))


def test_classes_of_trusted_packages_are_held_to_the_same(artifact):
    mine = Mine(Law(0.2), Ramp(1.0))
    assert rebuild(describe(mine), (__name__,), Edit) == mine
    with pytest.raises(ValueError, match="where an edit.objectives.Objective was expected"):
        rebuild(describe(mine), (__name__,), Objective)
    with pytest.raises(ValueError, match="Law, where an edit.objectives.Ramp was expected"):
        rebuild({**describe(mine), "weight": describe(Law())}, (__name__,), Edit)
    node = {"_target_": f"{__name__}.Sounds", "rate": 3}
    assert opened(node, (__name__,)).rate == 3
    with pytest.raises(ValueError, match="outside of `data`"):
        opened(node)


def test_what_a_module_has_only_imported_is_not_its_own(monkeypatch):
    monkeypatch.setattr("edit.edits.Mine", Mine, raising=False)
    with pytest.raises(ValueError, match=f"edit.edits.Mine, which is a class of {__name__}, outside of `edit`"):
        rebuild({"_target_": "edit.edits.Mine"}, kind=Edit)


def test_a_class_that_has_moved_is_found_under_its_old_path():
    """A module that imports it from its new home names a class of ours."""
    old = {"_target_": "edit.artifacts.checkpoint.Sampler", "solver": {"_target_": "edit.solvers.Euler", "steps": 3}}
    assert rebuild(old, kind=Sampler) == Sampler(import_module("edit.solvers").Euler(3))


KINDS = (Edit, Objective, Sampler, Solver, Term, FewStepMethod, Ramp)


def ours(package, kinds) -> list[type]:
    modules = [import_module(m.name) for m in walk_packages(package.__path__, f"{package.__name__}.")]
    found = {v for m in modules for v in vars(m).values() if isinstance(v, type) and v.__module__ == m.__name__}
    return sorted((c for c in found if issubclass(c, kinds)), key=lambda c: c.__qualname__)


def test_every_field_of_what_an_artifact_may_name_says_what_it_holds():
    """A field whose annotation cannot be read would take any class."""
    found = [c for c in ours(edit, KINDS) if is_dataclass(c)]
    assert {"LoRA", "DyDiT", "FlowMatching", "Sampler", "PolicySolver"} <= {c.__name__ for c in found}
    for cls in found:
        hints = trust.check_arguments(cls, [f.name for f in fields(cls)])
        vague = [n for n, h in hints.items() if object in trust.accepted(h)]
        assert not vague, f"{cls.__name__}: {vague}"


def test_backbones_and_data_sets_are_known_by_their_shape_and_nothing_else_is():
    specs = {c.__name__ for c in ours(edit, (Spec,))} - {"Spec"}
    assert specs >= {"DiTConfig", "DiTDiffusersConfig", "FluxConfig", "PixArtConfig", "QwenImageConfig", "SD3Config"}
    assert all(name.endswith("Config") for name in specs)
    sets = {c.__name__ for c in ours(data, (Splits,)) if not getattr(c, "_is_protocol", False)}
    assert sets >= {"Digits", "MovedDigits", "Shapes", "CaptionedDigits", "ImageFolder", "ImageShards", "Latents"}
    assert sets <= {*(c.__name__ for c in (Digits, ImageFolder, ImageShards)), "MovedDigits", "DigitsAndShades"} | {
        *("Shapes", "LabelledShapes", "CaptionedDigits", "MovingShapes", "Latents", "World", "PictureSet", "TensorSet")
    }


# ---- writing nothing ------------------------------------------------------------------------------------------------


@pytest.fixture
def shard(tmp_path) -> Path:
    import io
    import tarfile

    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for k in range(4):
            image = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), 40 * k, np.uint8)).save(image, "png")
            for name, content in ((f"{k}.png", image.getvalue()), (f"{k}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder / "a.tar"


def everything(folder: Path) -> set[str]:
    return {os.fspath(p) for p in folder.rglob("*")}


def test_the_data_set_of_an_artifact_is_only_read(artifact, shard, tmp_path):
    node = {"_target_": "data.sets.image_shards.ImageShards", "shards": str(shard), "size": 8, "flip": False}
    rewrite(artifact / "edits.json", data={**node, "cache": str(tmp_path / "theirs")})
    before = everything(tmp_path)
    assert len(build_data(edit.load(artifact)).train()) == 4
    assert everything(tmp_path) == before
    ImageShards(str(shard), 8)  # the user's own keeps its index, which is then read
    (index,) = everything(tmp_path) - before
    assert len(build_data(edit.load(artifact)).train()) == 4 and index.endswith(".a.tar.index.npz")


def test_a_place_to_write_is_not_handed_to_a_data_set_of_a_trusted_package():
    node = {"_target_": f"{__name__}.Sounds", "rate": 3, "cache": "/somewhere"}
    assert opened(node, (__name__,)).cache is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sise": 8}, "has no argument 'sise'"),
        ({"_args_": [1]}, "has no argument '_args_'"),
        ({"shards": {"_target_": "os.system"}}, "something to be built at shards"),
        ({"shards": [[{"_target_": "os.system"}]]}, "something to be built at shards"),
        ({"size": 10**6}, "size is 1000000, expected at most 16384"),
        ({"size": 10**4000}, "a number of hundreds of digits"),
        ({"shards": 3}, "cannot be opened"),
        ({"shards": "nowhere.tar"}, "no shard nowhere.tar"),
    ],
)
def test_arguments_of_a_data_set_are_its_own_plain_and_small(changes, sentence, artifact, shard):
    node = {"_target_": "data.sets.image_shards.ImageShards", "shards": str(shard), "size": 8, **changes}
    got = edit.load(artifact)
    got.data = node
    with pytest.raises(UserError, match=sentence) as error:
        build_data(got)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("node", [{"count": 10**7}, {"held": 10**7}], ids=str)
def test_no_world_is_rendered_for_hours(node):
    with pytest.raises(ValueError, match="expected at most 100000"):
        opened({"_target_": "data.sets.shapes.Shapes", **node})


# ---- sizes ----------------------------------------------------------------------------------------------------------

ENORMOUS = {
    "blocks": ({"depth": 99999999}, "depth is 99999999"),
    "millions of blocks": ({"depth": 10**6}, "depth is 1000000"),
    "negative": ({"depth": -(10**30)}, "depth is -1"),
    "channels": ({"hidden_size": 2**40}, "hidden_size is 1099511627776"),
    "classes": ({"num_classes": 2**40}, "num_classes is 1099511627776"),
    "a table": ({"input_size": 2**16, "patch_size": 1}, "more than a model here can hold"),
    "a list": ({"depth": [0] * 10**5}, "has 100000 items"),
    "no number": ({"depth": "many"}, "does not fit"),
    "nothing": ({"patch_size": 0}, "does not fit"),
    "heads": ({"num_heads": 0}, "does not fit"),
}


@pytest.mark.parametrize("what", ENORMOUS)
def test_a_model_that_nobody_has_is_refused_before_it_is_built(what, artifact):
    changes, sentence = ENORMOUS[what]
    base = json.loads((artifact / "edits.json").read_text())["base"]
    rewrite(artifact / "edits.json", base={**base, **changes})
    assert sentence in refused(artifact)


def test_a_published_folder_is_held_to_the_same(artifact):
    (artifact / "edits.json").unlink()
    rewrite(artifact / "config.json", _class_name="DiTTransformer2DModel", num_layers=10**8)
    assert "num_layers is 100000000" in refused(artifact)
    rewrite(artifact / "config.json", num_layers=1, sample_size=2**16, patch_size=1)
    assert "positions of 65536 x 65536 tokens in 1152 channels are more than a model here" in refused(artifact)
    rewrite(artifact / "config.json", _class_name=["x"])
    assert "no backbone here reads a ['x']" in refused(artifact)


@pytest.mark.parametrize(
    ("part", "value", "sentence"),
    [
        (
            "sampler",
            {**describe(Sampler()), "solver": {**describe(Euler()), "steps": 10**9}},
            "steps",
        ),
        ("edits", {"a": {"_target_": "edit.pruning.depth.DepthPruning", "units": list(range(10**5))}}, "100000 items"),
        ("edits", {"a": {"_target_": "edit.tuning.lora.LoRA", "rank": 10**12}}, "rank is"),
        ("edits", {"a": {"_target_": "edit.tuning.lora.LoRA", "rank": -1}}, "rank"),
        ("edits", {"a": {"_target_": "edit.tuning.lora.LoRA", "targets": 3}}, "not fit"),
        ("edits", [1], "holds [1] for edits"),
        ("edits", {"a": 1}, "for edits"),
        ("folded", [{"x": 1}], "for folded"),
        ("folded", 3, "holds 3 for folded"),
        ("base", 3, "holds 3 for base"),
        ("data", [], "holds [] for data"),
        ("run", 3, "holds 3 for run"),
        ("backbone", ["x"], "for backbone"),
        ("objective", "flow", "for objective"),
    ],
    ids=lambda v: str(v)[:24],
)
def test_a_part_is_of_its_type_and_size(part, value, sentence, artifact):
    rewrite(artifact / "edits.json", **{part: value})
    assert sentence in refused(artifact)


@pytest.mark.parametrize("deep", [40, 900, 200_000])
def test_sections_in_sections_without_end_are_refused(deep, artifact):
    text = (artifact / "edits.json").read_text()
    whole = {k: v for k, v in json.loads(text).items() if k != "checksums"}
    data = '{"a": ' * deep + "1" + "}" * deep
    text = json.dumps({**whole, "data": "HERE"}).replace('"HERE"', data)
    (artifact / "edits.json").write_text(text)
    assert "deep" in refused(artifact)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"a": "' + b"x" * 2**24 + b'"}', "more than 16 MB"),
        (b'{"a": "\0"}', "NUL bytes"),
        ('{"a": "ä"}'.encode("utf-16"), "UTF-8"),
        ('{"a": "ä"}'.encode("latin-1"), "UTF-8"),
        (b'{"format": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
    ids=["large", "NUL", "UTF-16", "Latin-1", "digits"],
)
def test_a_description_that_is_no_json_text_is_refused(content, sentence, artifact):
    (artifact / "edits.json").write_bytes(content)
    assert sentence in refused(artifact)


def test_a_pipe_in_place_of_a_description_is_not_waited_for(artifact):
    (artifact / "edits.json").unlink()
    os.mkfifo(artifact / "edits.json")
    assert "is no file" in refused(artifact)


def test_costs_are_not_counted_of_what_nobody_has(capsys):
    assert cost(["backbone=dit_tiny", "backbone.depth=99999999"]) == 2
    assert capsys.readouterr().err == "error: backbone: depth is 99999999, expected at most 1024\n"


# ---- the environment of the reader ----------------------------------------------------------------------------------


def test_a_card_shows_a_reference_to_the_environment_as_it_is_written(artifact, monkeypatch):
    from edit.artifacts.card import recipe

    monkeypatch.setenv("SECRET", "hunter2")
    for written in ("${oc.env:SECRET}", "${${how}:SECRET}", "${oc.${seed}:SECRET}"):
        settings = f"init: '{written}'\nhow: oc.env\nseed: env\ntrainer: {{max_steps: 5}}\n"
        (artifact.parent / "config.yaml").write_text(settings)
        assert recipe(artifact) == {"init": written, "seed": "env", "steps": 5}


def test_the_default_of_an_old_artifact_is_as_it_was(artifact):
    """Nothing that is written today is refused tomorrow: what `save` writes comes back."""
    got = edit.load(artifact)
    assert isinstance(build_data(got), Digits) and isinstance(got.sampler, Sampler)
    assert edits_of(artifact) == [] and got.sampler.solver == Euler(50)
