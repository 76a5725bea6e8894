from copy import deepcopy

import pytest
import torch
from families import CONFIGS, TOLERANCE, difference, family, walk
from torch import Tensor, nn

import edit
from edit.backbones.dit import DiTConfig
from edit.pruning.width import FeedForwardWidth
from edit.routing.ranking import check_order, order_channels, order_heads
from edit.tuning.lora import LoRA
from edit.unit import Features, Unit, heads_of, hidden_of

families = pytest.mark.parametrize("name", CONFIGS)


def magnitudes(unit: Unit, features: Features, groups: int) -> Tensor:
    """|rows in| x |columns out| of each group, by a loop over groups."""
    width, sizes = features.size // groups, []
    for g in range(groups):
        rows = torch.arange(g * width, (g + 1) * width)
        into, out = [], []
        for path, parts in features.writers:
            layer = unit.get_submodule(path)
            for part in range(parts):
                into.append(layer.weight[part * features.size + rows].flatten())
                if layer.bias is not None:
                    into.append(layer.bias[part * features.size + rows])
        for path, first in features.readers:
            out.append(unit.get_submodule(path).weight[:, first + rows].flatten())
        sizes.append(torch.cat(into).norm() * torch.cat(out).norm())
    return torch.stack(sizes)


@families
@torch.no_grad()
def test_an_ordered_unit_computes_what_it_did_and_its_magnitudes_fall(name):
    for unit, stream in walk(family(name)):
        before, state = unit(stream), {k: v.clone() for k, v in unit.state_dict().items()}
        pointers = {k: p.data_ptr() for k, p in unit.named_parameters()}
        for order, features, groups in (
            (order_heads, heads_of(unit), unit.anatomy.heads),
            (order_channels, hidden_of(unit), hidden_of(unit).size),
        ):
            sizes = magnitudes(unit, features, groups)
            order(unit)
            after = magnitudes(unit, features, groups)
            # ranked in fp32: of two that are equal there, either may come first
            torch.testing.assert_close(after, sizes.sort(descending=True).values, rtol=1e-6, atol=0)
            assert (after[1:] <= after[:-1] * (1 + 1e-6)).all()
            norms = {n for _, n in features.norms if [*unit.get_submodule(n).parameters()]}  # others have no order
            touched = {path for path, _ in (*features.writers, *features.readers)} | norms
            changed = {k.rpartition(".")[0] for k, v in unit.state_dict().items() if not torch.equal(v, state[k])}
            assert changed == touched
            state = {k: v.clone() for k, v in unit.state_dict().items()}
        assert difference(unit(stream), before) < TOLERANCE[name]
        assert pointers == {k: p.data_ptr() for k, p in unit.named_parameters()}


@torch.no_grad()
def test_the_first_channels_are_those_that_width_pruning_keeps(dit):
    ordered, pruned = dit, deepcopy(dit)
    for unit in ordered.units:
        order_channels(unit)
    edit.apply(pruned, {"narrow": FeedForwardWidth(0.5)})
    for a, b in zip(ordered.units, pruned.units, strict=True):
        rows = {tuple(r) for r in a.mlp.fc1.weight[:64].tolist()}
        assert rows == {tuple(r) for r in b.mlp.fc1.weight.tolist()}


@torch.no_grad()
def test_ordering_twice_changes_nothing(dit):
    unit = dit.units[0]
    order_heads(unit)
    order_channels(unit)
    once = {k: v.clone() for k, v in unit.state_dict().items()}
    order_heads(unit)
    order_channels(unit)
    assert all(torch.equal(v, once[k]) for k, v in unit.state_dict().items())


def test_without_weights_there_is_nothing_to_order():
    with torch.device("meta"):
        unit = DiTConfig(depth=1).build().units[0]
    order_heads(unit)
    order_channels(unit)
    assert all(p.is_meta for p in unit.parameters())


def test_layers_that_are_not_plain_are_refused(dit):
    edit.apply(dit, {"lora": LoRA(rank=2, targets=("attn.proj", "mlp.fc1"))})
    before = {k: v.clone() for k, v in dit.state_dict().items()}
    with pytest.raises(ValueError, match="attn.proj .* is a peft.*: fold the LoRA first, or set order=false"):
        order_heads(dit.units[0])
    with pytest.raises(ValueError, match="mlp.fc1 of this DiTBlock is a peft."):
        order_channels(dit.units[0])
    with pytest.raises(ValueError, match="attn.proj of this DiTBlock is a peft."):
        check_order(dit.units[0])
    with pytest.raises(ValueError, match="mlp.fc1 of this DiTBlock is a peft."):
        check_order(dit.units[0], hidden_of(dit.units[0]))
    assert all(torch.equal(v, before[k]) for k, v in dit.state_dict().items())


@families
@torch.no_grad()
def test_what_can_be_ordered_passes_the_check_unchanged(name):
    for unit in family(name).units:
        before = {k: v.clone() for k, v in unit.state_dict().items()}
        check_order(unit)
        assert all(torch.equal(v, before[k]) for k, v in unit.state_dict().items())


def test_a_replaced_feed_forward_is_not_ordered(dit):
    dit.units[0].slots.ffn = nn.Identity()
    with pytest.raises(ValueError, match="another edit replaced the feed-forward"):
        order_channels(dit.units[0])
