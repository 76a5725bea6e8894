"""Weights that an edit replaces are gone: from the model, its counts, its artifact and its training."""

import json
from dataclasses import dataclass

import pytest
import torch
from experts import Experts, layers
from families import CONFIGS, TOLERANCE, family, inputs
from torch import nn

import edit
from edit.artifacts.checkpoint import skeleton
from edit.denoiser import Denoiser, Edit
from edit.pruning.width import FeedForwardWidth
from edit.replaced import Gone
from edit.tuning.lora import LoRA
from edit.tuning.td_lora import TDLoRA


@dataclass
class Replaces(Edit):
    """Says that something is replaced, and replaces nothing."""

    what: str = "model.blocks.0.mlp.fc1"

    def apply(self, denoiser: Denoiser) -> nn.Module | None:
        """Changes nothing."""

    def replaces(self, denoiser: Denoiser) -> tuple[str, ...]:
        return (self.what,)

    def fold(self, denoiser: Denoiser) -> None:
        """Puts nothing back."""


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_of_every_family_an_artifact_without_the_replaced_weights_computes_the_same(name, tmp_path):
    denoiser = family(name)
    batch = inputs(denoiser)
    replaced = [p for path in layers(denoiser, 0) for p in denoiser.get_submodule(path).parameters()]
    before = sum(p.numel() for p in denoiser.parameters())
    edit.apply(denoiser, {"experts": Experts(units=(0,))})
    own = sum(p.numel() for p in denoiser.edits.parameters())
    assert sum(p.numel() for p in denoiser.parameters()) == before + own - sum(p.numel() for p in replaced)
    edit.save(denoiser, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["_needs_edits"] == ["experts"]
    bare = skeleton(tmp_path / "a", ("experts",))
    assert {k: v.shape for k, v in bare.state_dict().items()} == {k: v.shape for k, v in denoiser.state_dict().items()}
    read = edit.load(tmp_path / "a", trusted=("experts",)).denoiser
    # not to the bit: weights that were read lie at other addresses, and kernels may sum otherwise
    torch.testing.assert_close(read(*batch).sample, denoiser(*batch).sample, rtol=0, atol=10 * TOLERANCE[name])


def test_an_artifact_of_which_nothing_is_gone_needs_no_edit(dit, tmp_path):
    edit.save(dit, tmp_path / "a")
    assert "_needs_edits" not in json.loads((tmp_path / "a" / "config.json").read_text())


@torch.no_grad()
def test_what_is_new_may_start_from_what_it_replaces(dit):
    fc1 = dit.units[1].mlp.fc1.weight.clone()
    edit.apply(dit, {"experts": Experts(units=(1,))})
    assert all(torch.equal(one, fc1.T) for one in dit.edits["experts"]["1"].up)
    assert isinstance(dit.units[1].mlp.fc1, Gone) and isinstance(dit.units[0].mlp.fc1, nn.Linear)


def test_every_parameter_that_is_left_gets_a_gradient(dit, batch):
    edit.apply(dit, {"experts": Experts()})
    dit(*batch).sample.square().sum().backward()
    assert [n for n, p in dit.named_parameters() if p.grad is None] == []


def test_the_anatomy_can_still_be_read_and_weights_are_told_to_be_gone(dit):
    before = dit.units[0].anatomy
    edit.apply(dit, {"experts": Experts(units=(0,))})
    assert dit.units[0].anatomy == before
    with pytest.raises(
        AttributeError, match="blocks.0.mlp.fc1 has no weight: the edit 'experts' has replaced the layer"
    ):
        _ = dit.units[0].mlp.fc1.weight
    del dit.units[0].slots.ffn
    with pytest.raises(RuntimeError, match="blocks.0.mlp.fc1 was run, but the edit 'experts' has replaced it"):
        dit.units[0].mlp.fc1(torch.zeros(1, 32))


def test_later_edits_pass_by_what_is_gone(dit):
    edit.apply(dit, {"experts": Experts(units=(0,)), "lora": LoRA(targets=("mlp.fc1",))})
    adapted = [n for n, _ in dit.named_parameters() if ".lora_A." in n]
    assert adapted == [f"model.blocks.{i}.mlp.fc1.lora_A.default.weight" for i in (1, 2)]
    with pytest.raises(ValueError, match="unit 0 of this dit has no feed-forward network of plain linear layers"):
        edit.apply(dit, {"narrow": FeedForwardWidth()})


@pytest.mark.parametrize("addition", [LoRA(targets=("mlp.fc1",)), TDLoRA(targets=("mlp.fc1",))])
def test_weights_that_an_edit_before_has_changed_are_not_replaced(dit, addition):
    edit.apply(dit, {"added": addition})
    with pytest.raises(ValueError, match=r"replaces blocks.0.mlp.fc1.*which added .* has changed: put it before"):
        edit.apply(dit, {"it": Replaces("model.blocks.0.mlp")})


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("model.blocks.7", r"it \(Replaces\) cannot replace what is not there: model.blocks.7 is no parameter"),
        ("edits.experts", r"replaces edits.experts, which is no weight of the model"),
        ("modelled", "which is no weight of the model"),
    ],
)
def test_only_weights_of_the_model_are_replaced(dit, what, sentence):
    edit.apply(dit, {"experts": Experts(units=(0,))})
    with pytest.raises(ValueError, match=sentence):
        edit.apply(dit, {"it": Replaces(what)})


def test_one_of_a_layers_parameters_can_be_replaced(dit):
    edit.apply(dit, {"it": Replaces("model.blocks.0.mlp.fc1.bias")})
    layer = dit.units[0].mlp.fc1
    assert isinstance(layer, nn.Linear) and layer.bias is None and layer.weight is not None


def test_a_fold_that_puts_nothing_back_is_refused(dit):
    edit.apply(dit, {"it": Replaces()})
    with pytest.raises(ValueError, match="it cannot be folded: it has replaced blocks.0.mlp.fc1, and nothing has come"):
        edit.fold(dit)


@torch.no_grad()
def test_a_dit_that_is_stored_under_stock_names_leaves_out_what_is_gone(make_dit, batch, tmp_path):
    dit = edit.apply(make_dit(frequency_shift=1.0), {"experts": Experts(units=(1,))})
    edit.save(dit, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["_class_name"] == "DiTTransformer2DModel"
    read = edit.load(tmp_path / "a", trusted=("experts",)).denoiser
    assert torch.equal(read(*batch).sample, dit(*batch).sample)
