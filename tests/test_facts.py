"""No file outside `edit.backbones` knows a family: families tell facts, and are found by their modules.

The text of every file is read as a syntax tree. What the last tests add is a family of one new file.
"""

import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from shutil import copytree

import diffusers
import pytest
import torch
from families import CONFIGS, family, inputs
from torch import nn

import edit
from edit import backbones
from edit.artifacts.checkpoint import skeleton
from edit.artifacts.description import families, readers
from edit.artifacts.export import ExportSettings, export
from edit.denoiser import Denoiser
from edit.stream import Condition
from edit.tuning.guidance import FixedGuidance, GuidanceInput
from edit.tuning.lora import LoRA
from recipes.plan import main as plan

ROOT = Path(edit.__file__).parents[1]
FILES = [
    file
    for package in ("edit", "recipes", "data")
    for file in sorted((ROOT / package).rglob("*.py"))
    if "backbones" not in file.parts
]
# files that test for a family, and how often: formats of one family, and an edit of one family
KEPT = {"edit/artifacts/formats.py": 1, "edit/artifacts/official.py": 1, "edit/pruning/modulation.py": 1}
# known and going: each asks a unit for its anatomy
FOREIGN = {"edit/few_step/vision.py", "edit/alignment/looker.py"}  # read configurations of vision models


# ---- the text of every file ------------------------------------------------------------------------------------------


def classes_of_backbones() -> set[str]:
    trees = [ast.parse(file.read_text()) for file in (ROOT / "edit/backbones").glob("*.py")]
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def type_tests(tree: ast.Module, classes: set[str], names: set[str]) -> Iterator[str]:
    """Classes of families that a file tests for: by isinstance, issubclass, match, type(x) is, or a family's name."""
    for node in ast.walk(tree):
        asked: list[ast.expr] = []
        match node:
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kinds]):
                asked = [kinds]
            case ast.MatchClass(cls=cls):
                asked = [cls]
            case ast.Compare(left=ast.Call(func=ast.Name(id="type")), comparators=kinds):
                asked = kinds
            case ast.Compare(left=ast.Attribute(attr="name" | "stock"), comparators=[ast.Constant(value=str(name))]):
                if name in names:
                    yield name
        found = {n.id if isinstance(n, ast.Name) else n.attr for kind in asked for n in parts(kind)}
        if found & classes:
            yield " | ".join(sorted(found & classes))


def parts(node: ast.AST) -> list[ast.Name | ast.Attribute]:
    return [n for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute)]


def keys_of_families() -> set[str]:
    """Fields of all configurations, ours and the stock classes'."""
    keys: set[str] = set()
    for spec in CONFIGS.values():
        with torch.device("meta"):
            keys |= {f.name for f in fields(spec)} | set(spec.build().config)
    return keys


# keys that name one thing wherever they stand
OWN = ("_dim", "_embeds", "_channels", "num_heads", "num_attention_heads", "hidden_size", "num_layers", "_ada_norm")


def reads(tree: ast.Module, keys: set[str]) -> Iterator[str]:
    """Places where a key is read off a configuration c, which ends in `config`, `spec` or, before a string, `base`.

    c["k"], c.get("k"), "k" in c, getattr(c, "k"), c.k; of the keys in `OWN` every f("k") and every ["k"].
    """
    for node in ast.walk(tree):
        ends = ("config", "spec", "base")
        match node:
            case ast.Subscript(value=of, slice=ast.Constant(value=str(key)), ctx=ast.Load()):
                pass
            case ast.Call(func=ast.Attribute(value=of), args=[ast.Constant(value=str(key)), *_]):
                pass
            case ast.Call(func=of, args=[ast.Constant(value=str(key)), *_]):
                pass
            case ast.Compare(left=ast.Constant(value=str(key)), ops=[ast.In() | ast.NotIn()], comparators=[of]):
                pass
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[of, ast.Constant(value=str(key)), *_]):
                pass
            case ast.Attribute(value=of, attr=key, ctx=ast.Load()):
                ends = ("config", "spec")
            case _:
                continue
        told = key.endswith(OWN) and not isinstance(node, ast.Attribute)
        if key in keys and (told or ast.unparse(of).endswith(ends)):
            yield ast.unparse(node)


def found_in(find) -> dict[str, list[str]]:
    found = {file.relative_to(ROOT).as_posix(): list(find(ast.parse(file.read_text()))) for file in FILES}
    return {name: hits for name, hits in found.items() if hits}


def test_at_most_five_type_tests_on_families_are_left_outside_of_them():
    classes, names = classes_of_backbones(), {f.name for f in families()} | {str(f.stock) for f in families()}
    found = {name: len(hits) for name, hits in found_in(lambda tree: type_tests(tree, classes, names)).items()}
    assert found == KEPT and sum(KEPT.values()) <= 5


def test_no_key_of_a_family_is_read_outside_of_them():
    keys = keys_of_families()
    assert {"hidden_size", "guidance_embeds", "num_embeds_ada_norm", "caption_channels"} <= keys
    found = found_in(lambda tree: reads(tree, keys))
    assert {name: hits for name, hits in found.items() if name not in FOREIGN} == {}


# ---- what families tell ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_facts_are_those_of_the_model_as_it_runs(name):
    denoiser = family(name)
    facts, (x, t, condition) = denoiser.facts, inputs(denoiser)
    stream = denoiser.embed(**denoiser.pack(x, t, condition))
    assert stream.image.shape[-1] == facts.width
    if denoiser.name != "qwen_image":  # which masks text, in an attention of its own
        assert denoiser(x, t, condition, maps={0: 2}).trace["unit.0.maps"].shape[1] == facts.heads
    told = {k: v.shape[-1] for k, v in vars(condition).items() if v is not None and v.is_floating_point()}
    assert facts.text == told and (facts.classes is None) == bool(told)
    if facts.classes is not None:
        assert facts.classes == 10 and denoiser.null(condition).label.eq(10).all()  # the class after the last


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_is_told_its_guidance_and_no_other_takes_a_scale(name):
    denoiser = family(name)
    x, t, condition = inputs(denoiser)
    scaled = Condition(**{**vars(condition), "guidance": torch.full_like(t, 2.0)})
    if denoiser.facts.told:
        assert not torch.equal(denoiser(x, t, scaled).sample, denoiser(x, t, condition).sample)
        usual = Condition(**{**vars(condition), "guidance": torch.full_like(t, denoiser.facts.scale)})
        assert torch.equal(denoiser(x, t, usual).sample, denoiser(x, t, condition).sample)
    else:
        with pytest.raises(ValueError, match="has no guidance input"):
            edit.apply(denoiser, {"fixed": FixedGuidance()})
    edits = {"fixed": FixedGuidance(), "input": GuidanceInput()} if name == "flux" else {}
    edit.apply(denoiser, edits)
    assert denoiser.facts.told == (name == "flux")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_lora_without_targets_adapts_the_projections_of_all_attentions_and_writes_them_down(name):
    denoiser = family(name)
    attentions = [n for n, _ in denoiser.model.named_modules() if n.rpartition(".")[2] in ("attn", "attn1", "attn2")]
    linear = {n for n, m in denoiser.model.named_modules() if isinstance(m, nn.Linear)}
    wanted = {n for n in linear if n.startswith(tuple(f"{a}." for a in attentions))}
    edit.apply(denoiser, {"lora": LoRA(rank=2)})
    adapted = {n.removeprefix("model.").split(".lora_")[0] for n, _ in denoiser.named_parameters() if ".lora_" in n}
    assert adapted == wanted and wanted
    assert set(denoiser.applied["lora"].targets) <= set(denoiser.facts.lora)  # those that there are


@pytest.mark.parametrize("name", ["dit", "dit_diffusers geglu", "pixart", "sd3"])
def test_a_table_of_positions_that_no_machine_holds_is_refused_before_it_is_computed(name):
    config = family(name).config
    large = {key: 2**16 for key in ("input_size", "sample_size", "pos_embed_max_size") if key in config}
    with pytest.raises(ValueError, match="positions of .* are more than a model here can hold"):
        type(family(name)).from_config({**config, **large})


def test_no_two_families_read_the_same_published_folder():
    found = families()
    assert {f.name for f in found} >= {"dit", "dit_diffusers", "flux", "pixart", "qwen_image", "sd3"}
    assert len({f.name for f in found}) == len(found)
    for one in found:
        for stock, settings in one.reads.items():
            assert readers({"_class_name": stock, **settings}) == [one]
        if one.reads:
            assert hasattr(diffusers, next(iter(one.reads)))
    assert not readers({"_class_name": "Transformer2DModel", "norm_type": "layer_norm"})


def test_a_folder_that_two_families_read_is_refused_naming_both(new):
    (new / "edit/backbones/second.py").write_text(BRIA.replace('name = "bria"', 'name = "second"'))
    folder = new / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "BriaTransformer2DModel"}))
    with pytest.raises(ValueError, match="backbones bria and second both read a BriaTransformer2DModel"):
        skeleton(folder)


# ---- a family of one new file ----------------------------------------------------------------------------------------

BRIA = '''"""Bria 3 over `diffusers.BriaTransformer2DModel`: FLUX.1's units, told neither pooled text nor guidance."""

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from edit.backbones.flux import Flux
from edit.facts import Facts
from edit.inputs.limits import Count, check_numbers
from edit.stream import Layout, Stream


@dataclass(frozen=True)
class BriaConfig:
    in_channels: Count = 16
    num_layers: int = 2
    num_single_layers: int = 2
    attention_head_dim: Count = 16
    num_attention_heads: Count = 2
    joint_attention_dim: Count = 24
    axes_dims_rope: tuple[int, ...] = (4, 6, 6)
    sample_size: tuple[int, int] = (8, 8)

    def __post_init__(self):
        check_numbers(self)

    def build(self) -> "Bria":
        return Bria.from_config(asdict(self)).initialise()


class Bria(Flux):
    name = "bria"
    stock = "BriaTransformer2DModel"
    reads: ClassVar = {"BriaTransformer2DModel": {}}
    extras: ClassVar = {"sample_size": (128, 128)}

    @property
    def facts(self) -> Facts:
        return replace(super().facts, text={"text": self.model.config.joint_attention_dim})

    def embed(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, img_ids: Tensor,
              txt_ids: Tensor, grid: tuple[int, int, int], **unused: Any) -> Stream:
        m = self.model
        image, text = m.x_embedder(hidden_states), m.context_embedder(encoder_hidden_states)
        cond = m.time_embed(timestep.float() * 1000, dtype=image.dtype)
        cos, sin = m.pos_embed(torch.cat((txt_ids, img_ids)))
        layout = Layout(grid=grid, text_length=text.shape[1], rope=torch.stack((cos[:, ::2], sin[:, ::2])))
        return Stream(image=image, text=text, cond=cond, time=cond, layout=layout)
'''
YAML = """_target_: edit.backbones.bria.BriaConfig
num_layers: 2
num_single_layers: 2
"""


@pytest.fixture
def new(tmp_path):
    """A folder with the configurations and two more files: a family and its configuration."""
    (tmp_path / "edit/backbones").mkdir(parents=True)
    (tmp_path / "edit/backbones/bria.py").write_text(BRIA)
    copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "configs/backbone/bria.yaml").write_text(YAML)
    backbones.__path__.append(str(tmp_path / "edit/backbones"))
    yield tmp_path
    backbones.__path__.remove(str(tmp_path / "edit/backbones"))
    for name in ("bria", "second"):
        sys.modules.pop(f"edit.backbones.{name}", None)
        vars(backbones).pop(name, None)


def published(folder: Path) -> nn.Module:
    """A stock folder with random weights, as its makers would publish it."""
    options = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    stock = diffusers.BriaTransformer2DModel(
        in_channels=16, joint_attention_dim=24, axes_dims_rope=[4, 6, 6], **options
    )
    for p in stock.parameters():
        nn.init.normal_(p, std=0.2)
    stock.save_pretrained(folder)
    return stock.eval()


@torch.no_grad()
def test_a_family_of_one_new_file_is_read_adapted_saved_loaded_and_exported(new):
    stock = published(new / "published")
    denoiser: Denoiser = edit.load(new / "published").denoiser
    assert denoiser.name == "bria" and denoiser.facts.text == {"text": 24} and not denoiser.facts.told
    denoiser.settle((4, 8, 8), None)
    x, t, condition = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.7]), Condition(text=torch.randn(2, 5, 24))
    before, packed = denoiser(x, t, condition).sample, denoiser.pack(x, t, condition)
    asked = {k: packed[k] for k in ("hidden_states", "encoder_hidden_states", "img_ids", "txt_ids")}
    tokens = stock(**asked, timestep=t * 1000).sample  # b (y x) (c p q)
    theirs = tokens.view(2, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
    torch.testing.assert_close(before, theirs, rtol=1e-5, atol=1e-5)
    edit.apply(denoiser, {"lora": LoRA(rank=2)})
    for name, p in denoiser.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(p, std=0.2)
    after = denoiser(x, t, condition).sample
    assert not torch.allclose(after, before)
    edit.save(denoiser, new / "adapted")
    assert torch.equal(edit.load(new / "adapted").denoiser(x, t, condition).sample, after)
    for layout in ("lora", "diffusers"):
        export(ExportSettings(str(new / "adapted"), str(new / layout), format=layout))
    assert "BriaTransformer2DModel.from_pretrained" in (new / "diffusers/README.md").read_text()
    whole = diffusers.BriaTransformer2DModel.from_pretrained(new / "diffusers")
    assert not torch.allclose(whole(**asked, timestep=t * 1000).sample, tokens)


def test_a_run_of_a_family_of_one_new_file_is_planned(new, capsys):
    words = ["backbone=bria", "data=latents", "edits=lora", "image=64", "trainer.accelerator=cpu"]
    assert plan([*words, "--json", "--configs", str(new / "configs")]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["sample"] == [4, 8, 8] and 0 < made["trained"] < made["parameters"]
