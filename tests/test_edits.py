from copy import deepcopy
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn

import edit
from edit.denoiser import Denoiser, Edit
from edit.edits import describe, rebuild
from edit.measuring.flops import Flops
from edit.objectives import FlowMatching, LogitNormal, Shifted
from edit.pruning.depth import DepthPruning
from edit.sampling import Sampler
from edit.solvers import DPMSolver, Heun
from edit.stream import Stream
from edit.tuning.lora import LoRA


@dataclass
class Scale(Edit):
    """Multiplies the tokens after the first unit by a learned number; folds into nothing."""

    factor: float = 2.0

    def apply(self, denoiser: Denoiser) -> nn.Module:
        own, unit = nn.Linear(1, 1, bias=False), denoiser.units[0]

        def scaled(s: Stream) -> Stream:
            s = unit(s)
            return replace(s, image=s.image * own.weight)

        denoiser.units[0] = scaled
        return own

    def initialise(self, denoiser: Denoiser) -> None:
        own = next(m for name, m in denoiser.edits.items() if denoiser.applied[name] is self)
        nn.init.constant_(own.weight, self.factor)


@dataclass
class Shift(Edit):
    """Adds a number to the tokens after the first unit."""

    offset: float = 1.0

    def apply(self, denoiser: Denoiser) -> None:
        unit = denoiser.units[0]

        def shifted(s: Stream) -> Stream:
            s = unit(s)
            return replace(s, image=s.image + self.offset)

        denoiser.units[0] = shifted

    def fold(self, denoiser: Denoiser) -> None:
        denoiser.units[0] = denoiser.model.blocks[0]


@dataclass
class Shy(Edit):
    excludes = ("Shift",)

    def apply(self, denoiser: Denoiser) -> None:
        """Changes nothing."""


class NoData(Edit):
    def apply(self, denoiser: Denoiser) -> None:
        """Changes nothing."""


@dataclass
class Nested:
    law: object = None
    table: dict = field(default_factory=dict)


# ---- apply -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_edits_are_applied_in_order(dit, batch):
    before = dit(*batch, taps=(0,)).trace["unit.0"]
    twin = deepcopy(dit)
    edit.apply(dit, {"twofold": Scale(), "shift": Shift()})
    edit.apply(twin, {"shift": Shift(), "twofold": Scale()})
    torch.testing.assert_close(dit(*batch, taps=(0,)).trace["unit.0"], 2 * before + 1)
    torch.testing.assert_close(twin(*batch, taps=(0,)).trace["unit.0"], 2 * (before + 1))
    assert list(dit.applied) == ["twofold", "shift"] and list(twin.applied) == ["shift", "twofold"]


def test_an_edits_parameters_live_under_its_name(dit):
    keys = set(dit.state_dict())
    assert edit.apply(dit, {"mine": Scale(3.0)}) is dit
    assert set(dit.state_dict()) - keys == {"edits.mine.weight"}
    assert dit.edits["mine"].weight.item() == 3.0
    assert "mine" in repr(dit)


def test_initialise_is_called_on_fresh_edits_alone(dit):
    edit.apply(dit, {"mine": Scale(3.0)}, fresh=False)
    assert dit.edits["mine"].weight.item() != 3.0


def test_a_name_that_is_taken_is_refused(dit):
    edit.apply(dit, {"mine": Scale()})
    with pytest.raises(ValueError, match="an edit named 'mine' is already applied; give the second one another name"):
        edit.apply(dit, {"mine": Shift()})


@pytest.mark.parametrize("order", [("shift", "shy"), ("shy", "shift")])
def test_edits_that_exclude_each_other_are_refused_in_either_order_naming_both(dit, order):
    edits = {"shift": Shift(), "shy": Shy()}
    with pytest.raises(ValueError) as error:
        edit.apply(dit, {name: edits[name] for name in order})
    for name in ("shift", "Shift", "shy", "Shy", "cannot be applied together", "remove one of them"):
        assert name in str(error.value)
    assert list(dit.applied) == [order[0]]


@dataclass
class Adapts(Edit):
    adaptive = True

    def apply(self, denoiser: Denoiser) -> None:
        """Changes nothing."""


@dataclass
class Copies(Adapts):
    last = True


def test_an_edit_that_copies_units_comes_last_and_one_whose_work_differs_need_not(dit):
    edit.apply(dit, {"adapts": Adapts(), "shift": Shift(), "routers": Copies()})
    for late in (Scale(), Copies()):
        with pytest.raises(
            ValueError, match=r"cannot be applied after routers \(Copies\), which copies units .* put it before"
        ):
            edit.apply(dit, {"late": late})
    assert list(dit.applied) == ["adapts", "shift", "routers"]


def test_an_edit_that_is_no_dataclass_is_refused(dit):
    with pytest.raises(TypeError, match="NoData is not a dataclass: an edit is data"):
        edit.apply(dit, {"mine": NoData()})


@pytest.mark.parametrize("name", ["double", "train", "a.b", ""])
def test_a_name_that_torch_keeps_for_itself_is_refused_before_the_surgery(dit, name):
    units = list(dit.units)
    with pytest.raises(ValueError, match=f"an edit cannot be named '{name}'"):
        edit.apply(dit, {name: Scale()})
    assert dit.units == units


def test_what_an_edit_adds_is_in_the_mode_of_the_denoiser(dit):
    edit.apply(dit, {"mine": Scale(), "lora": LoRA(dropout=0.5)})
    assert not any(m.training for m in dit.modules())


# ---- fold ------------------------------------------------------------------------------------------------------------


def test_folding_removes_the_edit_and_keeps_its_provenance(dit):
    edit.apply(dit, {"shift": Shift(0.5), "deep": DepthPruning(pattern="listed", units=(0, 1))})
    edit.fold(dit)
    assert dit.applied == {} and len(dit.edits) == 0
    assert [(f["name"], f["_target_"].rpartition(".")[2]) for f in dit.folded] == [
        ("shift", "Shift"),
        ("deep", "DepthPruning"),
    ]
    assert dit.folded[0]["offset"] == 0.5 and dit.base == dit.config


def test_an_edit_under_a_live_one_cannot_be_folded(dit):
    edit.apply(dit, {"below": Shift(), "above": Shift()})
    with pytest.raises(ValueError, match="cannot fold 'below' under 'above', which was applied later: fold both"):
        edit.fold(dit, "below")
    assert list(dit.applied) == ["below", "above"]
    edit.fold(dit, "above")
    assert list(dit.applied) == ["below"]


def test_an_unknown_name_and_an_edit_that_cannot_fold_are_refused(dit):
    edit.apply(dit, {"twofold": Scale()})
    with pytest.raises(ValueError, match="no edit named 'twice' is applied; there are: twofold"):
        edit.fold(dit, "twice")
    with pytest.raises(ValueError, match="Scale cannot be folded into the weights"):
        edit.fold(dit)
    assert list(dit.applied) == ["twofold"] and "twofold" in dit.edits


@pytest.mark.parametrize("pattern", ["uniform", "listed"])
@torch.no_grad()
def test_a_fold_above_a_live_edit_leaves_an_artifact_that_loads(tmp_path, dit, batch, pattern):
    units = (0, 2) if pattern == "listed" else ()
    edit.apply(dit, {"lora": LoRA(rank=2), "deep": DepthPruning(0.5, pattern, units=units)})
    edit.fold(dit, "deep")
    edit.save(dit, tmp_path / "a")
    loaded = edit.load(tmp_path / "a").denoiser
    assert list(loaded.applied) == ["lora"] and len(loaded.units) == 2
    assert torch.equal(loaded(*batch).sample, dit(*batch).sample)


def test_structural_edits_are_folded_together(dit):
    edit.apply(dit, {"first": DepthPruning(pattern="listed", units=(0, 1)), "second": DepthPruning(0.5)})
    with pytest.raises(ValueError, match="first cannot stay live under what was folded.*fold them together"):
        edit.fold(deepcopy(dit), "second")
    assert edit.fold(dit).base == dit.config


# ---- an edit is data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        DepthPruning(0.3, "random", seed=4),
        DepthPruning(pattern="listed", units=(0, 2)),
        LoRA(4, 8.0, targets=("mlp.fc1",)),
        Shifted(LogitNormal(0.5, 2.0), 3.0),
        FlowMatching(time=Shifted(LogitNormal())),
        Sampler(DPMSolver(7, 3), guidance=2.0, interval=(0.1, 0.9), channels=3),
        Heun(3),
    ],
    ids=lambda v: type(v).__name__,
)
def test_describe_and_rebuild_are_inverse_through_json(value):
    import json

    again = rebuild(json.loads(json.dumps(describe(value))))
    assert again == value and type(again) is type(value)


def test_only_trusted_packages_are_imported():
    node = describe(Nested(Shift(3.0), {"a": [1, Shift(4.0)]}))
    with pytest.raises(ValueError, match=f"the artifact asks for {__name__}.Nested, outside of `edit`"):
        rebuild(node)
    again = rebuild(node, trusted=(__name__,))
    assert again.law == Shift(3.0) and again.table["a"] == (1, Shift(4.0))


@pytest.mark.parametrize("path", ["os.system", "builtins.eval", "subprocess.Popen", "editor.Edit", "eval"])
def test_paths_outside_edit_are_refused_before_anything_is_called(path):
    with pytest.raises(ValueError, match=f"the artifact asks for {path}, outside of `edit`"):
        rebuild({"_target_": path})


@pytest.mark.parametrize(
    "node, complaint",
    [
        ({"_target_": "edit.pruning.depth.torch"}, "edit.pruning.depth.torch, which is not a dataclass"),
        (
            {"_target_": "edit.artifacts.checkpoint.shutil.rmtree", "path": "/"},
            "which this version of edit does not have",
        ),
        (
            {"_target_": "edit.artifacts.checkpoint.load", "path": "/"},
            "edit.artifacts.checkpoint.load, which is not a dataclass",
        ),
        ({"_target_": "edit.denoiser.Denoiser"}, "edit.denoiser.Denoiser, which is not a dataclass"),
        (
            {"_target_": "edit.pruning.width.Width"},
            "edit.pruning.width.Width, which this version of edit does not have",
        ),
        ({"_target_": "edit.pruning.depth.Nope"}, "edit.pruning.depth.Nope, which this version of edit does not have"),
        ({"_target_": "edit.pruning.depth.DepthPruning", "rate": 1}, "does not fit this version of edit: .*'rate'"),
        ({"_target_": "edit.pruning.depth.DepthPruning", "ratio": 3}, "ratio is the share to drop"),
        ({"_target_": ["edit"]}, "import path"),
    ],
    ids=lambda v: v["_target_"] if isinstance(v, dict) and isinstance(v["_target_"], str) else "",
)
def test_an_artifact_cannot_ask_for_anything_but_dataclasses_of_edit(node, complaint):
    with pytest.raises(ValueError, match=complaint):
        rebuild(node)


# ---- every edit on every kind of DiT ---------------------------------------------------------------------------------

MODERN = {"rope": True, "swiglu": True, "rms_norm": True, "qk_norm": True, "registers": 2}
EDITS = {
    "uniform": DepthPruning(0.34),
    "random": DepthPruning(0.6, "random"),
    "listed": DepthPruning(pattern="listed", units=(1,)),
    "lora": LoRA(rank=2),
    "lora everywhere": LoRA(rank=2, alpha=4, targets=("all-linear",)),
    "pruned, then lora": (DepthPruning(0.34), LoRA(rank=2)),
    "lora, then pruned": (LoRA(rank=2), DepthPruning(0.34)),
}
matrix = pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS)
backbones = pytest.mark.parametrize("options", [{}, MODERN], ids=["plain", "modern"])


def applied(dit: Denoiser, edits) -> Denoiser:
    """A copy of `dit` with fresh edits of its own and only what they leave open trainable."""
    dit = deepcopy(dit)
    edits = deepcopy(edits if isinstance(edits, tuple) else (edits,))
    edit.apply(dit, {f"e{i}": e for i, e in enumerate(edits)})
    for name, p in dit.named_parameters():
        p.requires_grad_(all(e.trainable(name) for e in dit.applied.values()))
    return dit


def trained(dit: Denoiser) -> Denoiser:
    """Move what is trainable, so that nothing an edit owns is zero any more."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in dit.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return dit


def kept_of(dit: Denoiser, edits) -> list[int]:
    pruning = [e for e in (edits if isinstance(edits, tuple) else (edits,)) if isinstance(e, DepthPruning)]
    return pruning[0].kept(len(dit.units)) if pruning else list(range(len(dit.units)))


@backbones
@matrix
@torch.no_grad()
def test_a_fresh_edit_leaves_the_output_of_the_units_it_keeps_unchanged(make_dit, batch, options, edits):
    dit = make_dit(**options)
    by_hand = deepcopy(dit)
    by_hand.units = [by_hand.units[i] for i in kept_of(dit, edits)]  # nothing but a shorter list
    assert torch.equal(applied(dit, edits)(*batch).sample, by_hand(*batch).sample)


@backbones
@matrix
def test_gradients_reach_every_trainable_parameter_and_no_frozen_one(make_dit, batch, options, edits):
    dit = trained(applied(make_dit(**options), edits))
    dit(*batch).sample.square().mean().backward()
    params = dict(dit.named_parameters())
    assert [n for n, p in params.items() if p.requires_grad and (p.grad is None or not p.grad.any())] == []
    assert [n for n, p in params.items() if not p.requires_grad and p.grad is not None] == []
    assert any(p.requires_grad for p in params.values())


@backbones
@matrix
@torch.no_grad()
def test_saving_and_loading_is_bit_equal(tmp_path, make_dit, batch, options, edits):
    dit = trained(applied(make_dit(**options), edits))
    edit.save(dit, tmp_path / "a")
    loaded = edit.load(tmp_path / "a").denoiser
    assert loaded.applied == dit.applied and loaded.config == dit.config and loaded.base == dit.base
    assert loaded.state_dict().keys() == dit.state_dict().keys()
    for key, value in dit.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert torch.equal(loaded(*batch).sample, dit(*batch).sample)


@backbones
@matrix
@torch.no_grad()
def test_folding_changes_nothing_but_the_edits(tmp_path, make_dit, batch, options, edits):
    dit = trained(applied(make_dit(**options), edits))
    before = dit(*batch).sample
    edit.fold(dit)
    assert len(dit.applied) == 0 and not any("lora" in k or "base_layer" in k for k in dit.state_dict())
    # a folded low-rank product is added to the weight before the matrix product instead of after
    torch.testing.assert_close(dit(*batch).sample, before, rtol=1e-4, atol=1e-5)
    edit.save(dit, tmp_path / "a")
    loaded = edit.load(tmp_path / "a").denoiser
    assert not (tmp_path / "a" / "edits.safetensors").exists() and loaded.folded == dit.folded
    assert torch.equal(loaded(*batch).sample, dit(*batch).sample)


def macs(dit: Denoiser, batch) -> float:
    with Flops() as counter, torch.no_grad():
        dit(*batch)
    return counter.total / 2


@backbones
@matrix
def test_executed_macs_are_those_of_the_units_that_are_left(make_dit, batch, options, edits):
    whole, shallow = make_dit(**options), make_dit(**options, depth=2)
    unit = macs(whole, batch) - macs(shallow, batch)
    dit = edit.fold(applied(whole, edits))
    assert macs(dit, batch) == macs(whole, batch) - (3 - len(kept_of(whole, edits))) * unit
    if isinstance(edits, DepthPruning):
        assert macs(applied(whole, edits), batch) == macs(dit, batch) < macs(whole, batch)


@backbones
@matrix
def test_a_deepcopy_of_an_edited_denoiser_is_independent(make_dit, batch, options, edits):
    dit = applied(make_dit(**options), edits)
    twin = trained(deepcopy(dit))
    with torch.no_grad():
        assert not torch.equal(twin(*batch).sample, dit(*batch).sample)
    assert all(unit is block for unit, block in zip(twin.units, twin.model.blocks, strict=True))
