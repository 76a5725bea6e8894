"""Some of a sample's image tokens alone: units see these, at the places that they have in the grid.

    x_k = gather(x, kept) in front of the first unit,   y = scatter(y_k, kept) behind the output layer, zeros elsewhere

`Condition.kept` says which, b k, ascending in each sample, as many in every sample. Positions that were added to tokens
go with them, tables of rotary positions become those of the sample; registers, further tokens and text stay. Without
`kept` nothing here computes anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from edit.grid import pixels
from edit.stream import Layout, Output, Stream


def left(count: int, ratio: float) -> int:
    """How many of so many tokens are kept where a share of them is dropped: floor(T (1 - rho)), at least one."""
    return max(1, math.floor(count * (1 - ratio) + 1e-9))  # 1 - 0.9 is a hair less than 0.1


def subset(stream: Stream, kept: Tensor | None) -> Stream:
    """The stream with these image tokens alone; as it is without `kept`, or where an edit has taken tokens out already.

    Args:
        stream: as it enters the first unit, with all tokens
        kept: b k, int64, numbers of image tokens in the order of the grid, ascending; None: all

    Raises:
        ValueError: if `kept` has another shape, or the order or the times of tokens are by place
    """
    layout = stream.layout
    if kept is None or layout.kept is not None:
        return stream
    thin = thinned(layout, kept)
    return replace(stream, image=gathered(stream.image, kept, layout), layout=thin)


def thinned(layout: Layout, kept: Tensor) -> Layout:
    """The layout of the kept image tokens, with the rows of its position table that are theirs: ... s e -> ... b 1 s e.

    Raises:
        ValueError: as of `subset`
    """
    check(layout, kept)
    rope = layout.rope
    if rope is not None:
        start, count = layout.registers, math.prod(layout.grid)
        if rope.shape[-2] > start + count + layout.further and layout.side == "front":
            start += layout.text_length
        rows = places(kept, start, count, rope.shape[-2])  # b s
        rope = rope.index_select(-2, rows.flatten()).unflatten(-2, rows.shape).unsqueeze(-3)
    return replace(layout, kept=kept, rope=rope)


def check(layout: Layout, kept: Tensor) -> None:
    """Raises ValueError for a `kept` of another shape, and for tokens whose order or times are by place."""
    count = math.prod(layout.grid)
    if kept.ndim != 2 or not 1 <= kept.shape[1] <= count:
        raise ValueError(
            f"kept tokens are b k numbers, 1 to {count} of them in each sample, got shape {tuple(kept.shape)}: keep at "
            "least one"
        )
    if layout.permutation is not None or layout.apart is not None:
        what = "in another order" if layout.apart is None else "at two times"
        raise ValueError(f"some tokens are kept, and an edit has put all {what}: leave one of the two out")


def gathered(tokens: Tensor, kept: Tensor, layout: Layout | None = None) -> Tensor:
    """The kept tokens: b n d, b k -> b k d.

    Args:
        tokens: of the image; with a layout, those of a stream, of which registers and further tokens stay
        kept: numbers of image tokens
        layout: of the stream
    """
    if layout is not None and (layout.registers or layout.further):
        kept = places(kept, layout.registers, math.prod(layout.grid), tokens.shape[1])
    return tokens.gather(1, wide(kept, tokens))


def wide(rows: Tensor, like: Tensor) -> Tensor:
    """Numbers of tokens for all channels of these tokens: b k -> b k d."""
    return rows[..., None].expand(-1, -1, like.shape[2])


def best(scores: Tensor, count: int) -> Tensor:
    """The places of the highest scores, in ascending order: ... n -> ... k, int64."""
    return scores.topk(count).indices.sort().values


def places(kept: Tensor, start: int, count: int, total: int) -> Tensor:
    """Rows of a sequence of `total` tokens with `count` image tokens from `start` on, of which some are kept: b s."""
    before = torch.arange(start, device=kept.device).expand(len(kept), -1)
    behind = torch.arange(start + count, total, device=kept.device).expand(len(kept), -1)
    return torch.cat((before, kept + start, behind), 1)


def whole(stream: Stream) -> Stream:
    """Image tokens behind the output layer, b k c, at their places among zeros: b n c; all of them as they are."""
    kept, image = stream.layout.kept, stream.image
    if kept is None:
        return stream
    zeros = image.new_zeros(len(image), math.prod(stream.layout.grid), image.shape[2])
    return replace(stream, image=zeros.scatter(1, wide(kept, image), image))


def covered(output: Output) -> Tensor | None:
    """The places of a prediction that are of kept tokens: b 1 *sizes, bool; None: all."""
    if output.kept is None:
        return None
    assert output.grid is not None, "every forward tells it"
    return marked(output.kept, output.grid, output.sample.shape[2:])


def marked(tokens: Tensor, grid: tuple[int, int, int], sizes: Sequence[int]) -> Tensor:
    """Where tokens are in a sample: b k numbers of tokens -> b 1 *sizes, bool."""
    none = torch.zeros(len(tokens), math.prod(grid), dtype=torch.bool, device=tokens.device)
    return pixels(none.scatter(1, tokens, True), grid, sizes)
