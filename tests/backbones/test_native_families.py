"""What holds of every family that is asked in the stock forward's own words: it is that model, in our words."""

from dataclasses import replace

import families
import pytest
import torch
from natives import DIT, PIXART, WAN, Native, close, ours

import edit
from edit.pruning.depth import DepthPruning
from edit.stream import Branch, Forced

every = pytest.mark.parametrize("native", [DIT, PIXART, WAN], ids=lambda native: native.family.name)


def floats(arguments: dict, dtype: torch.dtype) -> dict:
    """The arguments in another type, but for times."""
    given = {k for k, v in arguments.items() if torch.is_tensor(v) and v.is_floating_point() and k != "timestep"}
    return {k: v.to(dtype) if k in given else v for k, v in arguments.items()}


def batch(denoiser):
    """(x, t, condition) of two samples at different times."""
    x, t, condition = families.inputs(denoiser)
    return x.float(), t.float(), condition.map(lambda v: v.float() if v.is_floating_point() else v)


@every
def test_names_are_the_stock_models_and_of_shares_its_storage(native: Native):
    model = native.stock()
    before = list(model.state_dict())
    denoiser = native.family.of(model)
    assert list(denoiser.model.state_dict()) == before == list(model.state_dict())
    assert type(getattr(model, native.blocks)[0]).__name__ == native.block  # it stays as it is
    for (_, mine), (_, theirs) in zip(denoiser.model.named_parameters(), model.named_parameters(), strict=True):
        assert mine is theirs
    for (_, mine), (_, theirs) in zip(denoiser.model.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(mine, theirs)  # no state dict holds all of them
    if hasattr(model, "pos_embed"):
        assert denoiser.model.pos_embed.pos_embed.data_ptr() == model.pos_embed.pos_embed.data_ptr()


# ---- fewer units, folders -------------------------------------------------------------------------------------------


@every
@torch.no_grad()
def test_keep_leaves_the_stock_model_of_those_blocks(native: Native):
    model, before = native.stock(), f"{native.blocks}."
    denoiser = native.family.of(model)
    denoiser.keep(native.kept)
    assert denoiser.config["num_layers"] == len(denoiser.units) == 2
    shallow, whole = native.stock(num_layers=2), model.state_dict()
    state = {k: v for k, v in whole.items() if not k.startswith(before)}
    for new, old in enumerate(native.kept):
        state |= {k.replace(f"{before}{old}.", f"{before}{new}."): whole[k] for k in whole if f"{before}{old}." in k}
    shallow.load_state_dict(state)
    a = native.words(model)
    close(ours(denoiser, a), shallow(**a).sample)


@every
@torch.no_grad()
def test_a_saved_folder_is_read_by_us_and_by_stock_diffusers(native: Native, tmp_path):
    model = native.stock()
    a = native.words(model)
    edit.save(native.family.of(model), tmp_path / "ours")
    again = native.kind.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(**a).sample, model(**a).sample)
    loaded = edit.load(tmp_path / "ours").denoiser
    assert isinstance(loaded, native.family)
    close(ours(loaded, a), model(**a).sample)


@pytest.mark.parametrize("native", [PIXART, WAN], ids=["pixart", "wan"])  # the DiT class's own folders are read by DiT
@torch.no_grad()
def test_a_published_folder_is_read(native: Native, tmp_path):
    model = native.stock()
    a = native.words(model)
    model.save_pretrained(tmp_path)
    close(ours(edit.load(tmp_path).denoiser, a), model(**a).sample)


@every
@torch.no_grad()
def test_an_edited_model_comes_back_from_its_folder(native: Native, tmp_path):
    denoiser = native.made()
    edit.apply(denoiser, {"depth": DepthPruning(ratio=1 / 3)})
    edit.save(denoiser, tmp_path)
    a = native.words(denoiser.model)
    loaded = edit.load(tmp_path).denoiser
    assert len(loaded.units) == 2
    assert torch.equal(ours(loaded, a), ours(denoiser, a))


# ---- memory, precision ----------------------------------------------------------------------------------------------


@every
def test_gradient_checkpointing_changes_no_gradient(native: Native):
    denoiser = native.made()
    grads = []
    for on in (False, True):
        denoiser.gradient_checkpointing = on
        denoiser.zero_grad()
        ours(denoiser, native.words(denoiser.model)).square().mean().backward()
        grads.append([p.grad for p in denoiser.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@every
@torch.no_grad()
def test_bf16_is_as_close_to_fp32_as_the_stock_model(native: Native):
    model = native.stock()
    a = native.words(model)
    exact = model(**a).sample
    model, half = model.to(torch.bfloat16), floats(a, torch.bfloat16)
    denoiser = native.family.of(model)
    theirs, mine = model(**half).sample, ours(denoiser, half)
    stream = denoiser.run(denoiser.embed(**half), taps=(0,), branches=(0,))
    assert {v.dtype for v in (mine, stream.image, *stream.trace.values())} == {torch.bfloat16}
    error = (theirs - exact).abs().mean()
    assert (mine - exact).abs().mean() < 1.2 * error < 0.1 * exact.abs().mean()


# ---- slots, taps ----------------------------------------------------------------------------------------------------


@every
@torch.no_grad()
def test_branches_before_their_gates_add_up_to_the_unit(native: Native):
    denoiser = native.made()
    a = native.words(denoiser.model)
    stream = denoiser.run(denoiser.embed(**a), taps=(0, 1), branches=(1,))
    start = replace(denoiser.embed(**a), image=stream.trace["unit.0"])
    m = denoiser.units[1].modulate(start)
    x = start.image + m.attention_gate.image * stream.trace["unit.1.attention"]
    x = x + stream.trace.get("unit.1.cross", 0) + m.feed_gate.image * stream.trace["unit.1.feed"]
    close(x, stream.trace["unit.1"])
    cross = denoiser.units[1].anatomy.cross is not None
    assert ("unit.1.cross" in stream.trace) == cross and "unit.0.attention" not in stream.trace
    if cross:
        assert torch.equal(stream.trace["unit.1.text"], start.text)  # the text is the same in all units


SLOTS = {
    "attention": lambda q, k, v, layout, step: v,
    "mixer": lambda stream, tokens: tokens,
    "cross": lambda q, k, v, layout, step: q,
    "ffn": lambda tokens, layout: tokens,
    "branch": lambda stream, name, run: Branch(2 * run(stream).image),
}


@every
@torch.no_grad()
def test_every_slot_reaches_the_output_and_comes_back(native: Native):
    denoiser = native.made()
    a = native.words(denoiser.model)
    before, unit = ours(denoiser, a), denoiser.units[1]
    for name, other in SLOTS.items():
        if name == "cross" and unit.anatomy.cross is None:
            continue
        setattr(unit.slots, name, other)
        assert (ours(denoiser, a) - before).abs().max() > 1e-3
        delattr(unit.slots, name)
        assert torch.equal(ours(denoiser, a), before)


@every
@torch.no_grad()
def test_forcing_a_units_input_makes_the_rest_follow(native: Native):
    denoiser, teacher = native.made(), native.made(seed=5)
    given = batch(denoiser)
    tokens = teacher(*given, taps=(0,)).trace["unit.0"]
    free = denoiser(*given).sample
    forced = denoiser(*given, forced={1: Forced(Branch(tokens), torch.tensor([True, False]))}).sample
    assert (forced[0] - free[0]).abs().max() > 1e-3 and torch.equal(forced[1], free[1])
