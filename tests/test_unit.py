"""The contract of a unit, on every family: slots, the seam of residual branches, notes, orders of tokens, wrappers."""

import ast
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from families import CONFIGS, family, inputs, walk
from operators import Operators
from torch import Tensor, nn

import edit
from edit.denoiser import Denoiser, Edit
from edit.stream import Branch, Stream
from edit.unit import SLOTS, Unit, Wrapper, core

families = pytest.mark.parametrize("name", CONFIGS)
CROSS = ("attention", "cross", "feed")
BRANCHES = {"flux": ("attention", "feed", "fused"), "pixart": CROSS, "wan": CROSS, "micro_dit": CROSS}


def units_of_all_families() -> list[type[Unit]]:
    return sorted({type(u) for name in CONFIGS for u in family(name).units}, key=lambda cls: cls.__name__)


# ---- slots ----------------------------------------------------------------------------------------------------------


def test_nothing_that_a_unit_defines_has_the_name_of_a_child_of_a_stock_block():
    import diffusers

    own = {n for cls in units_of_all_families() for c in cls.__mro__ if issubclass(c, Unit) for n in vars(c)}
    own = {n for n in own if not n.startswith("_")} | {"filled"}
    children: dict[str, str] = {}
    for file in (Path(diffusers.__file__).parent / "models" / "transformers").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    children[node.attr] = file.name
    assert len(children) > 500
    clash = {n: children[n] for n in own - {"forward"} if n in children}
    assert not clash, clash
    assert "ffn" in children and "attention" in children  # which a slot as an attribute of the unit would hide


def test_a_slot_is_assigned_in_its_namespace_alone(dit):
    unit = dit.units[0]
    for name in SLOTS:
        with pytest.raises(AttributeError, match=f"{name} is a slot: assign to unit.slots.{name}"):
            setattr(unit, name, nn.Identity())
    for name in ("attend", "feed", "modulate", "compute", "own_ffn"):
        with pytest.raises(AttributeError, match=f"{name} is a method of DiTBlock, .* never run: fill a slot"):
            setattr(unit, name, nn.Identity())
    with pytest.raises(AttributeError, match="a DiTBlock has no slot 'text_ffn'; there are attention, mixer, ffn, br"):
        unit.slots.text_ffn = nn.Identity()
    with pytest.raises(AttributeError, match="has no slot 'atention'"):
        unit.slots.atention = nn.Identity()
    with pytest.raises(TypeError, match="the slot ffn takes a function or a module, got NoneType"):
        unit.slots.ffn = None
    assert not unit.filled


# ---- the seam of residual branches ----------------------------------------------------------------------------------


@families
@torch.no_grad()
def test_every_branch_passes_the_slot_and_adds_up_to_the_unit(name):
    seen = set()
    for unit, stream in walk(family(name)):
        before, answers = unit(stream), {}

        def keep(stream, branch, run, answers=answers):
            answers[branch] = run(stream)
            return answers[branch]

        unit.slots.branch = keep
        after = unit(stream)
        assert torch.equal(after.image, before.image)
        assert after.text is before.text is None or torch.equal(after.text, before.text)
        assert set(answers) == ({"fused"} if unit.anatomy.fused else {"attention", "feed"}) | (
            {"cross"} if unit.anatomy.cross else set()
        ) | ({"second"} if unit.anatomy.second else set())
        seen |= set(answers)
        unit.slots.branch = lambda stream, branch, run, answers=answers: Branch(
            torch.zeros_like(answers[branch].image),
            None if answers[branch].text is None else torch.zeros_like(answers[branch].text),
        )
        closed = unit(stream)
        assert torch.equal(closed.image, stream.image)  # nothing reaches the tokens beside the branches
        if unit.anatomy.text == "along":
            assert torch.equal(closed.text, stream.text)
        del unit.slots.branch
        assert torch.equal(unit(stream).image, before.image)
    assert seen == set(BRANCHES.get(name, ("attention", "feed")))


@families
@torch.no_grad()
def test_a_branch_that_is_not_run_costs_neither_norm_nor_matmul_of_tokens(name):
    for unit, stream in walk(family(name)):
        answers = {}
        unit.slots.branch = lambda stream, branch, run, answers=answers: (
            answers.get(branch) or (answers.setdefault(branch, run(stream)))
        )
        unit(stream)
        with Operators() as modulation:
            unit.modulate(stream)
        with Operators() as repeated:
            unit(stream)
        for op in ("native_layer_norm", "_fused_rms_norm", "rsqrt", "mm", "addmm", "bmm", "gelu"):
            assert repeated.seen[op] == modulation.seen[op], op
        assert not any("attention" in op for op in repeated.seen)


# ---- notes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_slot_that_sees_tokens_alone_hands_values_to_the_trace(dit, batch, checkpointing):
    unit = dit.units[1]
    own = unit.slots.ffn

    def ffn(tokens, layout):
        layout.note("load", tokens.mean((1, 2)))
        return own(tokens, layout)

    unit.slots.ffn, dit.gradient_checkpointing = ffn, checkpointing
    out = dit(*batch)
    assert out.trace["load"].shape == (len(batch[0]),)
    out.trace["load"].sum().backward()
    assert dit.model.x_embedder.proj.weight.grad.abs().max() > 0  # of the trace, not of a copy
    stream = dit.embed(**dit.pack(*batch))
    after = unit(stream)
    assert all(getattr(after, name) is getattr(stream, name) for name in ("cond", "time", "signal", "layout", "step"))
    assert dit.run(stream).layout.notes is None
    with pytest.raises(RuntimeError, match="load was noted outside of a unit's call"):
        ffn(stream.image, stream.layout)


# ---- the order of tokens --------------------------------------------------------------------------------------------


@dataclass
class Shuffled(Edit):
    """Image tokens in another order while the units run."""

    def apply(self, denoiser: Denoiser) -> None:
        pass

    def embed(self, stream: Stream, t: Tensor, condition: object, own: object) -> Stream:
        n = stream.layout.of_image(stream.image).shape[1]
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        return replace(stream, layout=replace(stream.layout, permutation=order))


@families
@torch.no_grad()
def test_units_see_the_order_and_positions_of_a_permutation_and_nobody_else_does(name):
    denoiser = family(name)
    batch, seen = inputs(denoiser), []
    plain = denoiser(*batch, taps=(0,), branches=(-1,))
    stream = denoiser.embed(**denoiser.pack(*batch))
    edit.apply(denoiser, {"order": Shuffled()})
    unit = denoiser.units[0]
    unit.slots.branch = lambda stream, branch, run: seen.append(stream) or run(stream)
    out = denoiser(*batch, taps=(0,), branches=(-1,))
    order = seen[0].layout.permutation
    assert not torch.equal(order, torch.arange(len(order)))
    assert torch.equal(seen[0].layout.of_image(seen[0].image), stream.layout.of_image(stream.image)[:, order])
    torch.testing.assert_close(out.sample, plain.sample, rtol=1e-6, atol=1e-6)  # stock RoPE is fp32
    assert set(out.trace) == set(plain.trace)
    for key in plain.trace:
        torch.testing.assert_close(out.trace[key], plain.trace[key], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="attention maps are wanted of permuted tokens"):
        denoiser(*batch, maps={0: 2})


@dataclass
class Reminder(Edit):
    """Two tokens of its own behind the image tokens."""

    def apply(self, denoiser: Denoiser) -> nn.Module:
        width = denoiser.units[0].anatomy.attention.size
        return nn.ParameterDict({"tokens": nn.Parameter(torch.randn(1, 2, width, dtype=torch.float64))})

    def embed(self, stream: Stream, t: Tensor, condition: object, own: nn.Module | None) -> Stream:
        assert own is not None
        image = torch.cat((stream.image, own["tokens"].expand(len(stream.image), -1, -1)), 1)
        layout, rope = stream.layout, stream.layout.rope
        if rope is not None:
            rope = torch.cat((rope, rope[..., -2:, :]), -2)
        return replace(stream, image=image, layout=replace(layout, rope=rope, further=2))


@families
def test_further_tokens_are_attended_to_and_gone_after_the_last_unit(name):
    denoiser = family(name)
    batch = inputs(denoiser)
    plain = denoiser(*batch, taps=(0,))
    edit.apply(denoiser, {"reminder": Reminder()})
    out = denoiser(*batch, taps=(0,))
    assert out.sample.shape == plain.sample.shape and out.trace["unit.0"].shape == plain.trace["unit.0"].shape
    assert (out.sample - plain.sample).abs().max() > 1e-4
    out.sample.sum().backward()
    assert denoiser.edits["reminder"]["tokens"].grad.abs().max() > 0


# ---- wrappers and names ---------------------------------------------------------------------------------------------


class Twice(Wrapper):
    def __call__(self, stream: Stream) -> Stream:
        return self.unit(self.unit(stream))


def test_the_unit_inside_wrappers_is_found_and_its_slots_reach_through(dit, batch):
    inner, before = dit.units[1], dit(*batch).sample
    dit.units[1] = Twice(Twice(inner))
    assert core(dit.units[1]) is inner
    core(dit.units[1]).slots.branch = lambda stream, name, run: Branch(torch.zeros_like(stream.image))
    closed = dit(*batch).sample
    dit.units[1] = lambda stream: stream
    assert torch.equal(closed, dit(*batch).sample) and not torch.equal(closed, before)
    with pytest.raises(ValueError, match="a function stands in place of a unit"):
        core(dit.units[1])


@dataclass
class Seen(Edit):
    """Records under its own name."""

    unit: int = 0

    def apply(self, denoiser: Denoiser) -> None:
        slots, before = core(denoiser.units[self.unit]).slots, core(denoiser.units[self.unit]).slots.branch

        def branch(stream, name, run):
            stream.layout.note(f"{self.name}.{name}", stream.image.mean())
            return before(stream, name, run)

        slots.branch = branch


def test_two_edits_of_one_class_record_under_their_names(dit, batch):
    edit.apply(dit, {"first": Seen(), "second": Seen()})
    trace = dit(*batch).trace
    assert set(trace) == {"first.attention", "first.feed", "second.attention", "second.feed"}
    assert dit.applied["first"].name == "first"
    with pytest.raises(ValueError, match="this Seen is applied as 'first' already: make another for 'third'"):
        edit.apply(dit, {"third": dit.applied["first"]})
