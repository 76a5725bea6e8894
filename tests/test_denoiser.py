from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from families import BACKBONES, inputs
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from weights import randomise

import edit
from edit.backbones.flux import FluxConfig
from edit.denoiser import Denoiser, Edit
from edit.state_dicts import check_layout
from edit.stream import Branch, Condition, Forced, Layout, Step, Stream, add


def stream(**fields) -> Stream:
    return Stream(image=torch.ones(2, 4, 8), cond=torch.zeros(2, 8), layout=Layout(grid=(1, 2, 2)), **fields)


@pytest.mark.parametrize(
    "given, complaint",
    [
        ({}, r"the file does not fit this model: 2 keys are missing, such as a, b$"),
        ({"a": (2,), "b": (3,), "c": (1,)}, r"the file does not fit this model: it has 1 unknown keys, such as c$"),
        ({"a": (2,), "b": (4,)}, r"the file does not fit this model: b has shape \(4,\), expected \(3,\)$"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_in_one_sentence(given, complaint):
    meta = {k: torch.empty(v, device="meta") for k, v in given.items()}
    with pytest.raises(ValueError, match=complaint):
        check_layout({"a": torch.zeros(2), "b": torch.zeros(3)}, meta, "the file")


# ---- the forward pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_times_are_embedded_alone_as_they_are_with_their_samples(name):
    torch.manual_seed(0)
    denoiser = BACKBONES[name].build()
    randomise(denoiser)
    x, t, condition = inputs(denoiser, 3)
    wanted = denoiser.embed(**denoiser.pack(x.float(), t.float(), condition.map(whole))).time
    assert torch.equal(denoiser.embed_times(t.float()), wanted)


def whole(v: Tensor) -> Tensor:
    return v.float() if v.is_floating_point() else v


@torch.no_grad()
def test_a_denoiser_is_embed_units_readout(dit, batch):
    x, t, condition = batch
    s = dit.embed(**dit.pack(x, t, condition))
    for unit in dit.units:
        modulation = unit.modulate(s)
        s = add(s, unit.attend(s, modulation), modulation.attention_gate)
        s = add(s, unit.feed(s, unit.modulate(s)), modulation.feed_gate)
    assert torch.equal(dit.readout(s).sample, dit(*batch).sample)


@torch.no_grad()
def test_taps_are_the_image_tokens_after_a_unit(make_dit, batch):
    dit = make_dit(registers=2)
    out = dit(*batch, taps=(0, -1))
    assert out.trace.keys() == {"unit.0", "unit.2"}
    s = dit.embed(**dit.pack(*batch))
    for i, unit in enumerate(dit.units):
        s = unit(s)
        if i in (0, 2):
            assert torch.equal(out.trace[f"unit.{i}"], s.image[:, 2:])
    assert torch.equal(out.sample, dit(*batch).sample) and dit(*batch).trace == {}


@torch.no_grad()
def test_a_batch_is_its_samples(dit, batch):
    x, t, condition = batch
    alone = [dit(x[i : i + 1], t[i : i + 1], condition.map(lambda v, i=i: v[i : i + 1])).sample for i in range(4)]
    # another batch size is another matrix multiplication, with sums in another order
    torch.testing.assert_close(torch.cat(alone), dit(*batch).sample, rtol=1e-5, atol=1e-5)


def test_wrong_shapes_and_taps_are_refused_in_one_sentence(dit, batch):
    x, t, condition = batch
    with pytest.raises(ValueError, match="dit takes samples of 4x8x8, got 3x8x8: change the backbone or the data"):
        dit(x[:, :3], t, condition)
    with pytest.raises(ValueError, match=r"t must be one time per sample, shape \(4,\), got \(4, 1\)"):
        dit(x, t[:, None], condition)
    with pytest.raises(ValueError, match="taps: this dit has units 0 to 2, got 3"):
        dit(*batch, taps=(3,))
    with pytest.raises(ValueError, match="taps: this dit has units 0 to 2, got -4"):
        dit(*batch, taps=(-4,))


def test_the_step_reaches_the_attention_slot(dit, batch):
    seen = []

    def attention(q, k, v, layout, step):
        seen.append(step)
        return F.scaled_dot_product_attention(q, k, v)

    dit.units[1].slots.attention = attention
    step = Step(2, 5, 0.4, "uncond")
    with torch.no_grad():
        dit(*batch, step=step)
        dit(*batch)
    assert seen == [step, None]


# ---- gradient checkpointing ------------------------------------------------------------------------------------------


class Watched(torch.nn.Module):
    """A unit that records an auxiliary output, as routers do."""

    def __init__(self, unit):
        super().__init__()
        self.unit, self.calls = unit, 0

    def forward(self, s: Stream) -> Stream:
        self.calls += 1
        s = self.unit(s)
        return s.record("energy", s.image.square().mean())


def backward(dit, batch) -> tuple[dict, dict]:
    out = dit(*batch, taps=(1,))
    (out.sample.square().mean() + out.trace["unit.1"].mean() + out.trace["energy"]).backward()
    return {n: p.grad for n, p in dit.named_parameters()}, dict(out.trace)


def test_gradient_checkpointing_recomputes_and_changes_neither_gradients_nor_trace(dit, batch):
    dit.units[2] = Watched(dit.units[2])
    twin = deepcopy(dit)
    twin.gradient_checkpointing = True
    (grads, trace), (again, kept) = backward(dit, batch), backward(twin, batch)
    assert trace.keys() == kept.keys() == {"unit.1", "energy"}
    for a, b in ((grads, again), (trace, kept)):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)  # the same operations in the same order
    assert (dit.units[2].calls, twin.units[2].calls) == (1, 2)
    with torch.no_grad():
        twin(*batch)
    assert twin.units[2].calls == 3  # nothing to recompute without gradients


# ---- slots -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "slot, replacement",
    [
        ("attention", lambda q, k, v, layout, step: v),
        ("mixer", lambda stream, tokens: tokens),
        ("ffn", lambda tokens, layout: tokens),
    ],
)
@torch.no_grad()
def test_a_slot_changes_one_unit_and_comes_back(dit, batch, slot, replacement):
    before, keys = dit(*batch, taps=range(3)), list(dit.state_dict())
    setattr(dit.units[1].slots, slot, replacement)
    changed = dit(*batch, taps=range(3))
    assert torch.equal(changed.trace["unit.0"], before.trace["unit.0"])
    assert not torch.allclose(changed.trace["unit.1"], before.trace["unit.1"])
    assert list(dit.state_dict()) == keys
    delattr(dit.units[1].slots, slot)
    assert torch.equal(dit(*batch).sample, before.sample)


class Routed(torch.nn.Linear):
    """A linear layer with the signature of the slot `ffn`."""

    def forward(self, tokens, layout):
        return super().forward(tokens)


def test_a_module_in_a_slot_is_not_registered_there(dit, batch):
    own = torch.nn.Linear(32, 32)
    before = set(dit.state_dict())
    dit.units[0].slots.ffn = lambda tokens, layout: own(tokens)
    dit.units[1].slots.ffn = Routed(32, 32)
    assert set(dit.state_dict()) == before and len(list(dit.units[1].children())) == 5
    dit.edits["mine"] = own  # where an edit's parameters belong
    assert set(dit.state_dict()) - before == {"edits.mine.weight", "edits.mine.bias"}
    dit(*batch).sample.mean().backward()
    assert own.weight.grad is not None


def test_a_slot_shares_its_module_with_the_edits_after_a_deepcopy(dit, batch):
    dit.edits["mine"] = torch.nn.Linear(32, 32)
    dit.units[1].slots.mixer = Mixer(dit.edits["mine"])
    twin = deepcopy(dit)
    assert twin.units[1].slots.mixer.own is twin.edits["mine"] is not dit.edits["mine"]


class Mixer(torch.nn.Module):
    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, stream: Stream, tokens: torch.Tensor) -> torch.Tensor:
        return self.own(tokens)


def test_a_deepcopy_keeps_units_and_blocks_the_same_objects(dit, batch):
    twin = deepcopy(dit)
    assert all(unit is block for unit, block in zip(twin.units, twin.model.blocks, strict=True))
    assert not set(map(id, twin.units)) & set(map(id, dit.units))
    with torch.no_grad():
        before = dit(*batch).sample
        twin.units[0].mlp.fc1.weight.zero_()
        assert not torch.equal(twin(*batch).sample, before) and torch.equal(dit(*batch).sample, before)


def test_the_family_is_known_under_a_sharding_subclass(dit):
    assert dit.family is type(dit)
    before = type(dit)
    dit.__class__ = type("FSDPDiT", (before,), {})  # what fully_shard does to a module
    assert type(dit) is not before and dit.family is before


def test_replacing_a_unit_needs_no_word_with_the_model(dit, batch):
    with torch.no_grad():
        tapped = dit(*batch, taps=(0,)).trace["unit.0"]
        dit.units[1] = lambda s: replace(s, image=tapped)
        assert torch.equal(dit(*batch, taps=(1,)).trace["unit.1"], tapped)


# ---- branches and forced inputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("registers", [0, 3])
def test_traced_branches_are_what_the_gates_are_applied_to(make_dit, batch, registers):
    dit = make_dit(registers=registers)
    x, t, condition = batch
    out = dit(x, t, condition, taps=(0, 1), branches=(1,))
    assert set(out.trace) == {"unit.0", "unit.1", "unit.1.attention", "unit.1.feed"}
    torch.testing.assert_close(out.sample, dit(x, t, condition).sample)
    stream = dit.units[0](dit.embed(**dit.pack(x, t, condition)))
    gates = dit.units[1].modulate(stream)
    change = (
        gates.attention_gate.image * out.trace["unit.1.attention"] + gates.feed_gate.image * out.trace["unit.1.feed"]
    )
    torch.testing.assert_close(out.trace["unit.1"] - out.trace["unit.0"], change)


@pytest.mark.parametrize("registers", [0, 3])
def test_a_forced_unit_reads_other_tokens_on_the_marked_samples_alone(make_dit, batch, registers):
    dit = make_dit(registers=registers)
    x, t, condition = batch
    trace = dit(x, t, condition, taps=(0, 1)).trace
    where = torch.tensor([True, False, True, False])
    same = dit(x, t, condition, forced={1: Forced(Branch(trace["unit.0"]), where)})
    torch.testing.assert_close(same.sample, dit(x, t, condition).sample)
    other = dit(x, t, condition, taps=(1,), forced={1: Forced(Branch(2 * trace["unit.0"]), where)}).trace["unit.1"]
    assert ((other - trace["unit.1"]).abs().amax((1, 2)) > 1e-4).tolist() == where.tolist()


@dataclass
class Doubles(Edit):
    """Runs every sample twice."""

    def apply(self, denoiser: Denoiser) -> None:
        """Changes nothing."""

    def embed(self, stream: Stream, t: Tensor, condition: Condition, own: nn.Module | None) -> Stream:
        return stream.map(lambda v: torch.cat((v, v)))


@pytest.mark.parametrize(("alone", "remedy"), [("", "leave the edit out"), ("twice=0", "set edits.it.twice=0")])
def test_forcing_tokens_on_more_samples_is_refused_with_the_edits_own_remedy(dit, batch, monkeypatch, alone, remedy):
    monkeypatch.setattr(Doubles, "alone", alone)
    edit.apply(dit, {"it": Doubles()})
    forced = {1: Forced(Branch(torch.zeros(4, 16, 32)), torch.ones(4, dtype=torch.bool))}
    with pytest.raises(ValueError, match=f"edit 'it' makes 8 samples of 4.*: {remedy}, or leave out what forces them"):
        dit(*batch, forced=forced)


def test_no_gradient_passes_a_forced_input(make_dit, batch):
    dit = make_dit()
    x, t, condition = batch
    tokens = Branch(torch.randn(4, 16, 32))
    dit(x, t, condition, forced={1: Forced(tokens, torch.ones(4, dtype=torch.bool))}).sample.sum().backward()
    assert not any(p.grad.any() for p in dit.units[0].attn.parameters())
    assert any(p.grad.any() for p in dit.units[1].attn.parameters())


def test_a_branch_of_no_unit_is_refused(dit, batch):
    with pytest.raises(ValueError, match="taps: this dit has units 0 to 2, got 3"):
        dit(*batch, branches=(3,))


# ---- attention maps --------------------------------------------------------------------------------------------------


def watched(dit, unit: int) -> dict:
    """Queries and keys of one unit, kept while its attention stays what it is."""
    seen, own = {}, dit.units[unit].slots.attention

    def attention(q, k, v, layout, step):
        seen.update(q=q, k=k)
        return own(q, k, v, layout, step)

    dit.units[unit].slots.attention = attention
    return seen


@pytest.mark.parametrize("options", [{}, {"registers": 3, "rope": True, "qk_norm": True}], ids=["plain", "modern"])
@torch.no_grad()
def test_maps_are_rows_of_the_softmax_and_change_nothing(make_dit, batch, options):
    dit = make_dit(**options)
    plain = dit(*batch, taps=(1,), branches=(2,))
    seen = watched(dit, 1)
    out = dit(*batch, taps=(1,), branches=(2,), maps={1: 5, -1: 99})
    assert set(out.trace) == {*plain.trace, "unit.1.maps", "unit.2.maps"}  # and no branch that nobody asked for
    for name, value in plain.trace.items():
        assert torch.equal(out.trace[name], value)
    assert torch.equal(out.sample, plain.sample)
    q, k = seen["q"], seen["k"]
    s = 16 + options.get("registers", 0)
    whole = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    rows = [i * s // 5 for i in range(5)]
    # the scale is applied before the product rather than after
    torch.testing.assert_close(out.trace["unit.1.maps"].exp(), whole[:, :, rows], rtol=1e-4, atol=1e-6)
    assert out.trace["unit.2.maps"].shape == (4, 4, s, s)  # no more rows than there are


@torch.no_grad()
def test_double_and_single_units_map_the_joint_sequence_and_change_nothing():
    flux, batch = tiny_flux()
    plain, seen = flux(*batch), [watched(flux, i) for i in range(3)]
    out = flux(*batch, maps={0: 7, 1: 7, 2: 7})
    # a single unit whose attention is looked at adds attention and MLP one after the other
    torch.testing.assert_close(out.sample, plain.sample, rtol=1e-4, atol=1e-4)
    for i, unit in enumerate(seen):
        whole = (unit["q"] @ unit["k"].mT / 4).softmax(-1)  # heads of 16
        torch.testing.assert_close(out.trace[f"unit.{i}.maps"].exp(), whole[:, :, ::3], rtol=1e-4, atol=1e-6)


def test_maps_are_the_same_under_gradient_checkpointing_and_so_are_their_gradients(dit, batch):
    def gradients(checkpointing: bool) -> list:
        twin = deepcopy(dit)
        twin.gradient_checkpointing = checkpointing
        out = twin(*batch, maps={0: 4, 2: 4})
        assert set(out.trace) == {"unit.0.maps", "unit.2.maps"}
        (out.trace["unit.0.maps"][..., 0].sum() + out.trace["unit.2.maps"][..., 3].sum()).backward()
        return [out.trace["unit.2.maps"].detach(), *(p.grad for p in twin.parameters() if p.grad is not None)]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(again) > 20 and plain[1].any()
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)  # the same operations in the same order


@pytest.mark.parametrize("slot", ["attention", "mixer"])
def test_a_unit_that_attends_in_another_way_has_no_map(dit, batch, slot):
    replacement = {"attention": lambda q, k, v, layout, step: v, "mixer": lambda stream, tokens: tokens}[slot]
    setattr(dit.units[1].slots, slot, replacement)
    assert "unit.0.maps" in dit(*batch, maps={0: 4}).trace
    with pytest.raises(ValueError, match="unit 1 of this dit has another attention than plain softmax .* name other"):
        dit(*batch, maps={0: 4, 1: 4})


def test_a_map_of_no_unit_is_refused(dit, batch):
    with pytest.raises(ValueError, match="taps: this dit has units 0 to 2, got 3"):
        dit(*batch, maps={3: 4})


def test_nothing_of_a_map_stays_with_the_stream(dit, batch):
    start = dit.embed(**dit.pack(*batch))
    end = dit.run(start, maps={1: 4})
    assert start.layout.maps is end.layout.maps is None and start.trace == {}


def compiled_units_trace_their_maps(rank: int = 0) -> None:
    dit, batch = tiny_flux()
    wanted = {"branches": (1,), "maps": {0: 4, 2: 4}}
    plain = dit(*batch, **wanted)
    for unit in dit.units:
        unit.compile(backend="aot_eager", fullgraph=True)
    out = dit(*batch, **wanted)
    assert set(out.trace) == set(plain.trace) >= {"unit.0.maps", "unit.2.maps"}
    for name, value in plain.trace.items():
        torch.testing.assert_close(out.trace[name], value, rtol=1e-4, atol=1e-4)
    out.trace["unit.2.maps"][..., 0].sum().backward()
    assert dit.model.single_transformer_blocks[1].attn.to_k.weight.grad.any()


def sharded_units_trace_their_maps() -> list[float]:
    dit, batch = tiny_flux()
    dist.init_process_group("gloo")
    maps = {0: 4, 2: 4}

    def gradient(model) -> torch.Tensor:
        model(*batch, maps=maps).trace["unit.2.maps"][..., 0].sum().backward()
        return model.model.single_transformer_blocks[0].attn.to_k.weight.grad

    expected = gradient(deepcopy(dit))
    for unit in (*dit.units, dit):
        fully_shard(unit)
    found = gradient(dit).full_tensor()
    dist.destroy_process_group()
    return [expected.abs().max().item(), (found - expected).abs().max().item()]


def tiny_flux():
    flux = FluxConfig(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
    ).build()
    randomise(flux, 0)
    g = torch.Generator().manual_seed(1)
    text, pooled = torch.randn(3, 5, 24, generator=g), torch.randn(3, 20, generator=g)
    x, t = torch.randn(3, 4, 8, 8, generator=g), torch.tensor([0.2, 0.5, 0.9])
    return flux, (x, t, Condition(text=text, pooled=pooled))


@pytest.mark.slow
def test_a_compiled_unit_traces_its_map_and_is_one_graph():
    run_ranks(compiled_units_trace_their_maps, 1)  # in a child: what has compiled cannot be forked from


def test_a_sharded_unit_hands_the_gradient_of_its_map_on():
    for size, error in run_ranks(sharded_units_trace_their_maps):
        assert error < 1e-4 * size  # the same batch on both ranks: their mean is the gradient, summed in another order
