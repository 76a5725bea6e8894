from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from families import CONFIGS, TOLERANCE, difference, family, walk
from offload import offloaded
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import edit
from edit.edits import without
from edit.routing.adapted import Part
from edit.routing.ranking import order
from edit.routing.slices import Narrow, joined_pieces, narrowed, taken, variant
from edit.stream import Routing
from edit.tuning.lora import LoRA
from edit.unit import Features, heads_of, hidden_of

families = pytest.mark.parametrize("name", CONFIGS)
LINEAR = {  # all that a unit's narrow copies touch, as LoRA names it
    "dit": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "flux": ("to_q", "to_k", "to_v", "add_q_proj", "to_out.0", "to_add_out", "proj_mlp", "net.0.proj", "net.2"),
}


def factors(size: int, part: Part) -> Tensor:
    mask = torch.zeros(2, size, dtype=torch.float64)
    mask[:, part] = 1
    return mask


def parts_of(unit) -> tuple[Tensor, Tensor]:
    """Features of heads 0 and 2, and an arbitrary half of the hidden channels."""
    width = heads_of(unit).size // unit.anatomy.heads
    live = torch.cat([torch.arange(h * width, (h + 1) * width) for h in (0, 2)])
    size = hidden_of(unit).size
    return live, torch.cat((torch.arange(size // 4), torch.arange(size // 2, size // 2 + size // 4)))


def masking(unit) -> Callable[[Routing | None], Callable]:
    """The unit, called under some factors."""
    return lambda routing: lambda stream: unit(replace(stream, layout=replace(stream.layout, routing=routing)))


# ---- masked = sliced (oracle 3 of methods/dydit.md) ------------------------------------------------------------------


@families
@torch.no_grad()
def test_masked_is_sliced(name):
    for unit, stream in walk(family(name)):
        h, f, (live, channels) = heads_of(unit), hidden_of(unit), parts_of(unit)
        prefix = slice(0, f.size // 4)
        both = narrowed(unit, ((h, live), (f, channels)), heads=2)
        feed = narrowed(unit, ((f, prefix),))
        attention = narrowed(unit, ((h, live),), heads=2)
        same, before = variant(unit, {}), unit(stream)
        masked = masking(unit)
        head_mask = factors(unit.anatomy.heads, torch.tensor([0, 2]))
        for copy, routing in (
            (both, Routing(heads=head_mask, channels=factors(f.size, channels))),
            (feed, Routing(channels=factors(f.size, prefix))),
            (attention, Routing(heads=head_mask)),
            (same, Routing()),
            (same, None),
        ):
            assert difference(copy(stream), masked(routing)(stream)) < TOLERANCE[name]
        # and what was left out was something: fractions of values of order one
        assert difference(both(stream), before) > 1e-3 and difference(feed(stream), before) > 1e-3
        assert difference(same(stream), before) == 0


@torch.no_grad()
def test_factors_are_each_samples_own():
    unit, stream = next(walk(family("dit")))
    f = hidden_of(unit)
    narrow, mask = narrowed(unit, ((f, slice(0, 64)),)), torch.ones(2, f.size, dtype=torch.float64)
    mask[1, 64:] = 0
    before = unit(stream).image
    after = masking(unit)(Routing(channels=mask))(stream).image
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-12)  # float64 sums in another order
    torch.testing.assert_close(after[1], narrow(stream).image[1], rtol=0, atol=1e-12)


def test_gradients_reach_the_factors_of_what_is_off():
    unit, stream = next(walk(family("dit")))
    head_mask = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    channels = torch.zeros(2, hidden_of(unit).size, dtype=torch.float64, requires_grad=True)
    masking(unit)(Routing(heads=head_mask, channels=channels))(stream).image.square().sum().backward()
    assert head_mask.grad is not None and channels.grad is not None
    assert head_mask.grad.all() and channels.grad.all()


# ---- a copy shares all its weights -----------------------------------------------------------------------------------


@families
@torch.no_grad()
def test_a_copy_sees_what_becomes_of_the_weights_and_owns_none(name):
    denoiser = family(name)
    (unit, stream), *_ = walk(denoiser)
    f = hidden_of(unit)
    state = {k: v.data_ptr() for k, v in denoiser.state_dict().items()}
    narrow = narrowed(unit, ((f, slice(0, f.size // 2)),))
    before = narrow(stream)
    assert {k: v.data_ptr() for k, v in denoiser.state_dict().items()} == state
    assert {id(p) for p in narrow.parameters()} == {id(p) for p in unit.parameters()}
    unit.get_submodule(f.readers[0][0]).weight.mul_(2)
    changed = narrow(stream)
    assert difference(changed, before) > 1e-3
    for layer in unit.modules():  # as FSDP2 does between two passes
        for key, p in list(layer._parameters.items()):
            if p is not None:
                layer.register_parameter(key, nn.Parameter(2 * p))
    assert difference(narrow(stream), changed) > 1e-3
    twin, twin_narrow = deepcopy((unit, narrow))
    changed = narrow(stream)
    for p in twin.parameters():
        p.mul_(2)
    assert difference(twin_narrow(stream), changed) > 1e-3 and difference(narrow(stream), changed) == 0


@torch.no_grad()
def test_a_copy_computes_by_its_own_layers_and_keeps_its_slots_apart():
    unit, stream = next(walk(family("dit")))
    swapped = variant(unit, {"mlp.fc1": nn.Linear(64, 8).double(), "mlp.fc2": nn.Linear(8, 64).double()})
    before = unit(stream)
    unit.slots.ffn = partial(unit.slots.ffn)
    assert "ffn" not in swapped.slots and swapped.mlp.fc1.out_features == 8 and unit.mlp.fc1.out_features == 256
    assert difference(unit(stream), before) == 0 and difference(swapped(stream), before) > 1e-3


@pytest.mark.parametrize("part", [slice(0, 4), torch.tensor([1, 4, 9])], ids=["range", "indices"])
@torch.no_grad()
def test_features_that_are_normalised_together_are_taken_behind_the_norm(part):
    unit = family("dit").units[0]
    unit.across = nn.RMSNorm(256, dtype=torch.float64)
    nn.init.normal_(unit.across.weight)
    f = Features(256, (("mlp.fc1", 1),), (("mlp.fc2", 0),), norms=(("mlp.fc1", "across"),))

    def made(u) -> Tensor:
        return u.across(u.mlp.fc1(x))

    x = torch.randn(3, 64).double()
    whole, narrow = made(unit), narrowed(unit, ((f, part),))
    assert torch.equal(made(narrow), whole[:, part]) and narrow.mlp.fc1 is unit.mlp.fc1
    before = unit.mlp.fc2(whole)
    order(unit, f, 4)
    assert not torch.allclose(made(unit), whole)
    torch.testing.assert_close(unit.mlp.fc2(made(unit)), before, rtol=0, atol=1e-12)  # float64 sums in another order


# ---- Narrow ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(12, 10).double()


def bytes_allocated(run: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    return sum(e.self_cpu_memory_usage for e in seen.events() or () if e.self_cpu_memory_usage > 0)


@pytest.mark.parametrize("part", [slice(2, 7), torch.tensor([0, 3, 9])], ids=["range", "indices"])
@torch.no_grad()
def test_rows_and_columns_of_a_layer(layer, part):
    x = torch.randn(2, 5, 12).double()
    torch.testing.assert_close(Narrow(layer, rows=(part,))(x), layer(x)[..., part], rtol=0, atol=1e-12)  # float64
    kept = torch.zeros(12).double()
    kept[part] = 1
    wanted = layer(x * kept)
    torch.testing.assert_close(Narrow(layer, columns=(part,))(x[..., part]), wanted, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_range_is_a_view_and_indices_are_a_copy():
    layer, x = nn.Linear(256, 256), torch.randn(1, 256)
    for rows in ((slice(0, 64),), (slice(0, 32), slice(32, 64), slice(64, 64))):
        narrow = Narrow(layer, rows=rows)
        assert taken(layer.weight, narrow.rows, 0).data_ptr() == layer.weight.data_ptr()
        assert bytes_allocated(lambda narrow=narrow: narrow(x)) < 64 * 256 * 4  # a copy of these rows
    assert bytes_allocated(lambda: Narrow(layer, rows=(torch.arange(64),))(x)) >= 64 * 256 * 4
    inner = Narrow(layer, columns=(slice(64, 128),))
    assert bytes_allocated(lambda: inner(x[:, :64])) < 64 * 256 * 4


def test_ranges_that_follow_each_other_are_one():
    assert joined_pieces((slice(0, 0), slice(0, 2), slice(2, 5), slice(7, 9))) == (slice(0, 5), slice(7, 9))


@torch.no_grad()
def test_slices_are_made_at_each_call_unless_they_are_kept(layer):
    x, rows = torch.randn(3, 12).double(), (torch.tensor([1, 4]),)
    live, kept = Narrow(layer, rows=rows), Narrow(layer, rows=rows, keep=True)
    before = kept(x)
    assert torch.equal(live(x), before)
    layer.weight.mul_(2)
    assert torch.equal(kept(x), before) and not torch.equal(live(x), before)
    twin = deepcopy(Narrow(layer, rows=rows, keep=True))
    assert torch.equal(twin(x), live(x))


def test_gradients_of_a_part_are_those_of_the_whole(layer):
    x = torch.randn(3, 12).double()
    narrow = Narrow(layer, rows=(slice(2, 5),))
    wanted = torch.autograd.grad(layer(x)[:, 2:5].square().sum(), list(layer.parameters()))
    found = torch.autograd.grad(narrow(x).square().sum(), list(layer.parameters()))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(wanted, found, strict=True))  # float64


def with_lora(name: str):
    """A family in float64 whose LoRA says something on every layer that a narrow copy touches."""
    denoiser = family(name)
    edit.apply(denoiser, {"lora": LoRA(rank=3, alpha=5.0, targets=LINEAR[name])})
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, p in denoiser.named_parameters():
            if ".lora_" in key:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return denoiser.double().eval()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", LINEAR)
@torch.no_grad()
def test_masked_is_sliced_with_a_lora(name, keep):
    for unit, stream in walk(with_lora(name)):
        h, f, (live, channels) = heads_of(unit), hidden_of(unit), parts_of(unit)
        narrow = narrowed(unit, ((h, live), (f, channels)), heads=2, keep=keep)
        masked = masking(unit)(Routing(heads=factors(4, torch.tensor([0, 2])), channels=factors(f.size, channels)))
        assert difference(narrow(stream), masked(stream)) < TOLERANCE[name]
        assert difference(narrow(stream), masked(stream)) < TOLERANCE[name]  # what was kept is the same


@torch.no_grad()
def test_a_lora_that_is_switched_off_or_merged_adds_nothing_more():
    denoiser = with_lora("dit")
    layer = denoiser.units[0].mlp.fc1
    x, narrow = torch.randn(3, 64).double(), Narrow(layer, rows=(slice(0, 5),))
    torch.testing.assert_close(narrow(x), layer(x)[:, :5], rtol=0, atol=1e-12)  # float64
    with without(denoiser):
        plain = narrow(x)
    torch.testing.assert_close(plain, layer.base_layer(x)[:, :5], rtol=0, atol=1e-12)
    assert not torch.allclose(plain, narrow(x), atol=1e-3)
    before = narrow(x)
    layer.merge()
    torch.testing.assert_close(narrow(x), before, rtol=0, atol=1e-12)


@torch.no_grad()
def test_what_can_only_be_called_whole_gives_the_same(layer):
    """As ZeRO-3's layers, whose weights are gathered by a hook of their call."""
    x, part = torch.randn(3, 12).double(), torch.tensor([0, 3, 9])
    rows, columns = Narrow(layer, rows=(part,)), Narrow(layer, columns=(part,))
    wanted = rows(x), columns(x[:, part])
    layer.weight.ds_id = 0
    found = rows(x), columns(x[:, part])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(wanted, found, strict=True))  # float64


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", LINEAR)
@torch.no_grad()
def test_offloaded_layers_are_narrow_all_the_same(name, lora, keep):
    denoiser = with_lora(name) if lora else family(name)
    walked = list(walk(denoiser))
    copies, before = [], []
    for unit, stream in walked:
        live, channels = parts_of(unit)
        copies.append(narrowed(unit, ((heads_of(unit), live), (hidden_of(unit), channels)), heads=2))
        before.append(copies[-1](stream))
    if keep:
        parts = [((heads_of(u), parts_of(u)[0]), (hidden_of(u), parts_of(u)[1])) for u, _ in walked]
        copies = [narrowed(u, part, heads=2, keep=True) for (u, _), part in zip(walked, parts, strict=True)]
    offloaded(denoiser.model)
    for copy, (_, stream), wanted in zip(copies, walked, before, strict=True):
        assert difference(copy(stream), wanted) < TOLERANCE[name]
    assert all(p.is_meta for layer in denoiser.modules() if isinstance(layer, nn.Linear) for p in layer.parameters())


@pytest.mark.parametrize("keep", [False, True])
@torch.no_grad()
def test_a_lora_in_fp32_on_bf16_weights_is_cast_as_peft_does(keep):
    layer, x = with_lora("dit").units[0].mlp.fc1.float(), torch.randn(3, 64).bfloat16()
    layer.base_layer.bfloat16()
    found, wanted = Narrow(layer, rows=(slice(0, 5),), keep=keep)(x), layer(x)[:, :5]
    assert found.dtype == wanted.dtype == torch.bfloat16
    # 8 bits of mantissa, of the sum, and of W + B A where that is kept, whose 64 products add up
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=(2**-6 if keep else 2**-9) * wanted.abs().max().item())


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_layer_that_is_not_linear_is_refused():
    with pytest.raises(ValueError, match="plain linear layer can be run, this is a Conv1d: fold what changed it first"):
        Narrow(nn.Conv1d(2, 2, 1))


def test_features_that_another_edit_replaced_are_refused(dit):
    unit = dit.units[0]
    unit.slots.ffn, unit.slots.mixer = F.silu, F.silu
    with pytest.raises(ValueError, match="replaced the feed-forward of this DiTBlock: leave one of them out"):
        hidden_of(unit)
    with pytest.raises(ValueError, match="replaced the attention of this DiTBlock: leave one of them out"):
        heads_of(unit)


def test_a_feed_forward_of_another_kind_is_refused():
    unit = family("flux").units[0]
    unit.ff = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="feed-forward of a DoubleUnit is not known here: two linear layers"):
        hidden_of(unit)
