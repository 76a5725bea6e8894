"""MicroDiT's deferred masking (arXiv 2407.15811): a small mixer sees all tokens of a sample, units a quarter of them.

A dropped patch is lost where tokens are dropped at the input, as each knows its own patch alone. So `depth` narrow
blocks, the patch mixer, run on all T tokens first; then most of them leave (`DeferredMasking`):

    z = LN(x) W_in, width D -> D_m;  z <- block(z), depth times
    T_k = floor(T (1 - rho)) of the tokens, by a random permutation of each sample:  z_k = gather(z)
    x_k = LN(z_k) W_out, D_m -> D;  units and the output layer on T_k tokens;  zeros where tokens were dropped
    L = mean over samples of the mean over kept tokens

There is no mask in the arithmetic: a step costs what T_k tokens cost. Positions are added before the mixer and go along
with the tokens. At the end of a run all tokens are seen (`unmasked`), else generations, which drop none, are off. The
mixer stays; it is not a residual: all that units read has passed it. With D_m = D there are no W_in and W_out.

The blocks are MicroDiT's: in the tokens' place narrower ones, in that of `cond` the stream's `signal` (time, class,
pooled text), cross-attention to LN(text) W_y where the model reads text. W_in, W_out and W_y have no biases; layers of
blocks that write into tokens start at 0.02 / sqrt(2 N), N the units of the model.

Specification: methods/micro-dit.md. Published for a text-to-image model of its own; other families: inferred. Those of
two streams have a mixer of image tokens that read the text, not a joint stack, so that one mixer is for all families;
the units' own text is the family's. Families that turn queries and keys by position alone (FLUX, Qwen-Image, Wan) get
fixed sin-cos positions added to z, without which the mixer would not know places; DiT's optional rotary positions get
them, too. Registers and further tokens pass the mixer by. Tokens of a video are dropped one by one, not as tubes.
With `experts` every second block has experts that choose tokens (`edit.moe.expert_choice`), in the mixer the last, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.backbones.micro_dit_block import STD, MicroDiTBlock, gain_norm
from edit.denoiser import Denoiser, Edit
from edit.grid import Grid, patch_of
from edit.groups import Group
from edit.inputs.limits import Count, Limits, Natural, Positive, Share, Units, check_numbers
from edit.losses import Seen, Term
from edit.moe.expert_choice import put
from edit.moe.routing import loads_of
from edit.scaling.layer_wise import gated_width, round_up
from edit.stream import Condition, Layout, Stream
from edit.structure import entrance, grid_of
from edit.subset import best, gathered, left, thinned
from edit.unit import passed
from edit.widths import Scale

# ---- the mixer -------------------------------------------------------------------------------------------------------


@dataclass
class PatchMixer(Edit):
    """Narrow blocks on all tokens in front of the units; behind them tokens may leave (`DeferredMasking`).

    Args:
        depth: blocks; 6 of XL, 4 of tiny
        width: D_m, a multiple of `head`; None: three quarters of the model's, as in XL, rounded down to heads
        head: width of a head; 32 of tiny
        ratio: of hidden channels to the width, two thirds of which are left to a gated feed-forward
        multiple: hidden channels are rounded up to it
        experts: of every second block, each of `ratio` widths; 8 of XL, 0: none
        capacity: f_c, experts of a token on average
    """

    depth: Units = 6
    width: Count | None = 768
    head: Count = 64
    ratio: Positive = 4.0
    multiple: Count = 256
    experts: Natural = 0
    capacity: Positive = 2.0

    excludes = ("PatchMixer",)

    def __post_init__(self):
        check_numbers(self)
        if self.width is not None and self.width % self.head:
            raise ValueError(
                f"PatchMixer: width must be a multiple of head={self.head}, got {self.width}: change one of the two"
            )
        if self.experts and self.capacity > self.experts:
            raise ValueError(
                f"PatchMixer: a token cannot have {self.capacity:g} of {self.experts} experts: lower capacity"
            )

    def apply(self, denoiser: Denoiser) -> Mixer:
        weight, told = next(denoiser.parameters()), entrance(denoiser)
        with weight.device:
            own = Mixer(self, told, len(denoiser.units))
        return own.to(weight.dtype)

    def embed(self, stream: Stream, t: Tensor, condition: Condition, own: nn.Module | None) -> Stream:
        assert own is not None
        return own(stream, condition.kept)

    def experts_of(self, denoiser: Denoiser) -> dict[str, nn.Parameter]:
        """Routed experts' parameters by their full names."""
        own = denoiser.edits[self.name].get_submodule("experts")
        return {f"edits.{self.name}.experts.{k}": p for k, p in own.named_parameters() if ".experts." in k}

    def activated(self, denoiser: Denoiser) -> Mapping[str, float]:
        """On average over tokens."""
        return dict.fromkeys(self.experts_of(denoiser), self.capacity / max(1, self.experts))

    def groups(self, denoiser: Denoiser) -> Mapping[str, Group]:
        return dict.fromkeys(self.experts_of(denoiser), Group(kind="stack"))

    def shards(self, denoiser: Denoiser) -> Sequence[nn.Module]:
        own = denoiser.edits[self.name]
        return [part for name in ("blocks", "experts") for part in own.get_submodule(name).children()]

    def loads(self, trace: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return loads_of(trace, self.name)


class Mixer(nn.Module):
    """The mixer's layers.

    Args:
        edit: its sizes
        told: a stream that enters the units of the model
        units: N, of the model

    Under muP a width of three quarters grows with the model's. A width that is given is finite: its layers train as
    they do without muP, but for those that read the model's tokens, its text and its signal.
    """

    scales: ClassVar = {
        r"(enter|leave|read)\.1\.weight": Scale("hidden", "xavier"),
        r"adaLN_modulation\.1\.weight": Scale("hidden", "zero"),
        r"(to_q|to_k|to_v|to_out|w13|w2)\.weight": Scale("hidden", "constant"),
        r"(norm\w*|(enter|leave|read)\.0)\.weight": Scale("vector"),
        "bias": Scale("vector", "zero"),
    }

    def __init__(self, edit: PatchMixer, told: Stream, units: int):
        super().__init__()
        assert told.signal is not None
        d, cond = told.image.shape[-1], told.signal.shape[-1]
        self.width = width = edit.width or max(edit.head, 3 * d // 4 // edit.head * edit.head)
        hidden = gated_width(width, edit.ratio, edit.multiple)
        self.enter, self.leave = between(d, width), between(width, d)
        self.read = None if told.text is None else between(told.text.shape[-1], width)
        text = None if told.text is None else width
        blocks = [MicroDiTBlock(width, edit.head, width, hidden, cond, text) for _ in range(edit.depth)]
        self.blocks, self.experts = nn.ModuleList(blocks), nn.ModuleDict()
        std = STD / math.sqrt(2 * units)
        for i, block in enumerate(blocks):
            block.initialise(std)
            if edit.experts and i % 2:
                chosen = round_up(width * edit.ratio, edit.multiple)
                self.experts[str(i)] = put(block, f"{edit.name}.{i}", chosen, edit.experts, edit.capacity, std)
                del block.mlp

    def forward(self, stream: Stream, kept: Tensor | None) -> Stream:
        """The stream with mixed tokens, the kept ones alone; None: all."""
        layout = stream.layout
        z = self.enter(layout.of_image(stream.image))  # b n d_m
        if layout.rope is not None:
            z = z + positions(layout.grid, self.width, z)
        text = None if self.read is None else self.read(stream.text)
        length = 0 if text is None else text.shape[1]
        bare = Layout(layout.grid, text_length=length, text_mask=layout.text_mask, side=layout.side)
        assert stream.signal is not None
        mixed = replace(stream, image=z, text=text, cond=stream.signal, layout=bare)
        for block in self.blocks:
            mixed = passed(block, mixed)
        x = self.leave(mixed.image if kept is None else gathered(mixed.image, kept))
        if layout.registers or layout.further:
            behind = stream.image.shape[1] - layout.further
            x = torch.cat((stream.image[:, : layout.registers], x, stream.image[:, behind:]), 1)
        layout = layout if kept is None else thinned(layout, kept)
        return replace(stream, image=x, layout=layout, trace=mixed.trace)


def between(width: int, other: int) -> nn.Module:
    """LN and a linear layer from one width to another; nothing where they are equal."""
    if width == other:
        return nn.Identity()
    layer = nn.Linear(width, other, bias=False)
    nn.init.xavier_uniform_(layer.weight)
    return nn.Sequential(gain_norm(width), layer)


def positions(grid: Grid, width: int, like: Tensor) -> Tensor:
    """Sin-cos of rows and columns, and of frames where there are several: n width, of the type of `like`."""
    sizes = grid if grid[0] > 1 else grid[1:]
    axes = torch.meshgrid(*(torch.arange(size, device=like.device) for size in sizes), indexing="ij")
    each = width // (2 * len(sizes))  # angles of an axis
    speeds = 10000.0 ** -(torch.arange(each, device=like.device) / each)
    angles = torch.stack(axes, -1).flatten(0, -2)[..., None] * speeds  # n axes each
    table = torch.cat((angles.sin(), angles.cos()), -1).flatten(1)
    return F.pad(table, (0, width - table.shape[1])).to(like.dtype)


# ---- the masking -----------------------------------------------------------------------------------------------------


@dataclass
class DeferredMasking(Term):
    """Units see some of a sample's tokens alone, drawn anew in each step; of itself it adds no loss.

    Without a `PatchMixer` among the edits, masking is naive: what was dropped is lost.

    Args:
        ratio: rho, the share of tokens that is dropped, below 1; 0: none. Above 0.75 a smaller model is the better use
        unmasked: share of the run, at its end, in which all tokens are seen: 30,000 of 280,000 steps
    """

    ratio: Annotated[float, Limits(0, below=1)] = 0.75
    unmasked: Share = 3 / 28

    def __post_init__(self):
        if self.ratio == 1:
            raise ValueError(
                f"DeferredMasking: ratio must be below 1, got {self.ratio}: no token would be left to train on; drop "
                "0.75 of them, as published, or leave the term out"
            )
        check_numbers(self)
        self.drops, self.drops_until = self.ratio, 1 - self.unmasked

    def build(self, student: Denoiser, teacher: Denoiser | None = None) -> Patch:
        return Patch(patch_of(student.sample_shape[1:], grid_of(student)))

    def mixed(self, seen: Seen) -> tuple[Tensor, Condition]:
        x_t, condition = super().mixed(seen)
        count = seen.own.tokens(x_t.shape[2:])
        if not self.ratio or seen.progress >= self.drops_until:
            return x_t, condition
        scores = replace(seen.draws, shape=(count,)).gaussian(0)  # b n, the order of a random permutation
        kept = best(scores, left(count, self.ratio))
        return x_t, replace(condition, kept=kept)

    def losses(self, seen: Seen) -> dict[str, Tensor]:
        return {}

    def metrics(self, seen: Seen) -> dict[str, Tensor]:
        """The share of tokens that this step has seen."""
        output = seen.output
        assert output is not None and seen.t is not None
        share = 1.0 if output.kept is None else output.kept.shape[1] / math.prod(output.grid)
        return {"kept": seen.t.new_full((), share)}


class Patch(nn.Module):
    """How much of a sample is one token; no parameters."""

    def __init__(self, sizes: Grid):
        super().__init__()
        self.sizes = sizes

    def tokens(self, sizes: Sequence[int]) -> int:
        """Of a sample of these sizes."""
        return math.prod(s // p for s, p in zip((*[1] * (3 - len(sizes)), *sizes), self.sizes, strict=True))
