"""The reference of block-sparse attention: visibility written out as a count for each query and key, in fp64."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from edit.kernels.block_sparse import Near, Part


def cuts(cut: int | Tensor, tokens: int, b: int, h: int) -> list[tuple[int, int]]:
    """Ranges of the groups of one sample and head."""
    if isinstance(cut, Tensor):
        ends = cut.expand(max(cut.shape[0], b + 1), max(cut.shape[1], h + 1), -1)[b, h].tolist()
    else:
        ends = [*range(0, tokens, cut), tokens]
    return list(zip(ends, ends[1:], strict=False))


def counts(part: Part, b: int, h: int, n: int) -> Tensor:
    """How often each query sees each key: n m."""
    m = part.k.shape[2]
    seen = torch.zeros(n, m, dtype=torch.float64)
    rows, columns = cuts(part.rows, n, b, h), cuts(part.columns, m, b, h)
    for r, (start, end) in enumerate(rows):
        if part.index is None:
            seen[start:end] += 1
        else:
            for c in part.index[min(b, len(part.index) - 1), min(h, part.index.shape[1] - 1), r].tolist():
                if c >= 0:
                    seen[start:end, slice(*columns[c])] += 1
        if part.without is not None:
            gone = part.without[min(b, len(part.without) - 1), min(h, part.without.shape[1] - 1), r]
            seen[start:end, gone[gone >= 0].long()] = 0
    if part.near is not None:
        apart = (part.near.queries[:, None].long() - part.near.keys[None].long()).abs()
        disc = part.near.shape == "disc"
        seen *= apart.square().sum(-1) <= part.near.limit if disc else apart.amax(-1) <= part.near.limit
    return seen


def dense(q: Tensor, parts: list[Part], scale: float) -> tuple[Tensor, Tensor]:
    """o and lse, in q's precision; a query that sees nothing: 0 and -inf."""
    batch, heads, n, _ = q.shape
    weights, values = [], []
    for part in parts:
        seen = torch.stack([torch.stack([counts(part, b, h, n) for h in range(heads)]) for b in range(batch)])
        bias = (
            part.bias if isinstance(part.bias, Tensor) else torch.tensor(part.bias or 0.0, dtype=q.dtype).view(1, 1, 1)
        )
        weights.append(seen.to(q.dtype) * (scale * q @ part.k.mT + bias.to(q.dtype)[:, :, None]).exp())
        values.append(part.v)
    w = torch.cat(weights, -1)
    total = w.sum(-1)
    some = total > 0
    safe = torch.where(some, total, torch.ones_like(total))
    o = w @ torch.cat(values, 2) / safe.unsqueeze(-1)
    return o, torch.where(some, safe.log(), torch.full_like(total, -torch.inf))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def lists(b: int, h: int, r: int, n: int, top: int) -> Tensor:
    """Distinct numbers under `top`, and -1 at about a fifth of the places."""
    picked = torch.rand(b, h, r, top).argsort(-1)[..., :n]
    return picked.masked_fill(torch.rand(picked.shape) < 0.2, -1).int()


def offsets(b: int, h: int, groups: int, tokens: int) -> Tensor:
    """Groups of unlike lengths, some of them empty."""
    inner = torch.randint(tokens + 1, (b, h, groups - 1)).sort(-1).values
    ends = [torch.zeros(b, h, 1), inner, torch.full((b, h, 1), tokens)]
    return torch.cat(ends, -1).int()


def pair(m: int, e: int = 16, f: int | None = None, b: int = 2, h: int = 2) -> tuple[Tensor, Tensor]:
    return noise(b, h, m, e), noise(b, h, m, f or e)


def grid(y: int, x: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(y), torch.arange(x)).int()


def case(name: str) -> tuple[Tensor, list[Part]]:
    """q and parts in fp64, seeded; small enough for Triton's interpreter."""
    torch.manual_seed(sum(map(ord, name)))
    q = noise(2, 2, 50, 16)
    k, v = pair(70)
    if name == "lists":  # ragged at both ends; a block is listed twice
        index = lists(2, 2, 4, 3, 5)
        index[:, :, 0] = torch.tensor([2, 2, 4])
        return q, [Part(k, v, index, rows=16, columns=16)]
    if name == "empty":  # a row without anything
        index = lists(1, 2, 4, 3, 5)
        index[:, :, 2] = -1
        return q, [Part(k, v, index, rows=16, columns=16)]
    if name == "dense":
        return q, [Part(k, v)]
    if name == "full":
        return q, [Part(k, v, torch.arange(5).int().expand(2, 2, 1, 5).contiguous(), rows=64, columns=16)]
    if name == "odd":  # sizes that no tile divides, another width of values
        k, v = pair(70, 24, 40)
        return noise(2, 2, 50, 24), [Part(k, v, lists(2, 1, 8, 4, 10), rows=7, columns=7)]
    if name == "levels":  # LLSA, two levels: blocks of 4, rows of 4 and 16
        q = noise(2, 2, 64, 16)
        (k, v), (k1, v1), (k2, v2) = pair(64), pair(16), pair(4)
        fine = Part(k, v, lists(2, 2, 16, 2, 16), rows=4, columns=4)
        coarse = Part(k1, v1, lists(2, 2, 4, 2, 4), rows=16, columns=4, bias=1.3863)
        return q, [fine, coarse, Part(k2, v2, bias=2.7726)]
    if name == "means":  # PISA of order 0, last block shorter
        k1, v1 = pair(5)
        index, bias = lists(2, 2, 4, 2, 5), torch.tensor([16.0, 16, 16, 16, 6]).log().view(1, 1, 5)
        return q, [Part(k, v, index, 16, 16), Part(k1, v1, rows=16, without=index, bias=bias)]
    if name == "clusters":  # SVG-EAR
        rows, columns = offsets(2, 2, 5, 50), offsets(2, 2, 6, 70)
        k1, v1 = pair(6)
        index = lists(2, 2, 5, 3, 6)
        bias = columns.diff(dim=-1).double().log()
        return q, [Part(k, v, index, rows, columns), Part(k1, v1, rows=rows, without=index, bias=bias)]
    if name == "clustered rows":
        return q, [Part(k, v, lists(1, 1, 5, 3, 5), offsets(1, 2, 5, 50), 16, without=lists(1, 1, 5, 9, 70))]
    if name == "clustered columns":
        return q, [Part(k, v, lists(1, 1, 4, 3, 5), 16, offsets(2, 1, 5, 70), without=lists(1, 1, 4, 9, 70))]
    if name in ("disc", "box"):  # CLEAR, and a band; text is always seen
        at = grid(5, 10)
        k, v = pair(50)
        near = Near(at, at, 8 if name == "disc" else 2, name)
        border = Part(k, v, lists(1, 1, 4, 4, 4), rows=16, columns=16, near=near)
        return q, [border, Part(*pair(9))]
    if name == "disc of all":
        return q, [Part(*pair(50), near=Near(grid(5, 10), grid(5, 10), 4))]
    if name == "bias":
        bias = noise(2, 1, 70).masked_fill(torch.rand(2, 1, 70) < 0.3, -torch.inf)
        index = lists(2, 2, 4, 3, 5)
        k1, v1 = pair(20)
        return q, [Part(k, v, index, 16, 16, bias), Part(k1, v1, bias=noise(1, 2, 20))]
    if name == "absent":  # a part that is not there, beside one that is
        return q, [Part(k, v, bias=-torch.inf), Part(*pair(9))]
    if name == "nothing":
        return q, [Part(k, v, bias=-torch.inf)]
    if name == "width 72":
        k, v = pair(40, 72, b=1)
        return noise(1, 2, 40, 72), [Part(k, v, lists(1, 2, 3, 2, 3), 16, 16), Part(*pair(10, 72, b=1))]
    if name == "wide rows":  # rows of 64 and more, blocks of 64
        k, v = pair(150, b=1)
        index = torch.tensor([[0, 2], [1, -1], [2, 0]]).int().view(1, 1, 3, 2)
        return noise(1, 2, 150, 16), [Part(k, v, index, 64, 64), Part(*pair(70, b=1), bias=0.5)]
    if name == "small levels":  # fine blocks, and means of the others
        k, v = pair(22, b=1)
        index = torch.tensor([[0, 2], [5, -1], [2, 2], [-1, -1], [1, 0]]).int().view(1, 1, 5, 2)
        means = Part(*pair(6, b=1), rows=4, without=index, bias=1.3863)
        return noise(1, 2, 18, 16), [Part(k, v, index, 4, 4), means]
    if name == "small clusters":  # and a disc
        k, v = pair(20, b=1)
        cluster = Part(
            k, v, lists(1, 1, 2, 2, 3), torch.tensor([[[0, 5, 18]]]).int(), offsets(1, 2, 3, 20), noise(1, 1, 20)
        )
        return noise(1, 2, 18, 16), [cluster, Part(*pair(18, b=1), near=Near(grid(3, 6), grid(3, 6), 4))]
    if name == "small wide":  # rows and blocks of 64, widths that are no powers of two
        index = torch.tensor([[1], [0]]).int().view(1, 1, 2, 1)
        return noise(1, 1, 70, 24), [Part(*pair(66, 24, 40, 1, 1), index, 64, 64, bias=-0.5)]
    raise ValueError(name)


SMALL = ("small levels", "small clusters", "small wide")
CASES = (
    *("lists", "empty", "dense", "full", "odd", "levels", "means", "clusters", "clustered rows", "clustered columns"),
    *("disc", "box", "disc of all", "bias", "absent", "nothing", "width 72", "wide rows"),
)


def moved(part: Part, dtype: torch.dtype) -> Part:
    """A part in another precision, with leaves that take gradients."""
    k, v = (x.to(dtype).clone().requires_grad_() for x in (part.k, part.v))
    bias = part.bias.to(dtype) if isinstance(part.bias, Tensor) else part.bias
    return replace(part, k=k, v=v, bias=bias)


def results(name: str, attend: Callable, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """o, lse and all gradients of one case, by a function (q, parts, scale) -> (o, lse); gradients through both."""
    q, parts = case(name)
    q, parts = q.to(dtype).requires_grad_(), [moved(part, dtype) for part in parts]
    do, dlse = noise(*q.shape[:3], parts[0].v.shape[-1]), noise(*q.shape[:3])
    o, lse = attend(q, parts, 0.3)
    (o * do.to(o.dtype)).sum().add((lse.nan_to_num(neginf=0) * dlse.to(lse.dtype)).sum()).backward()
    keys = {f"d{x}{i}": getattr(part, x).grad for i, part in enumerate(parts) for x in "kv"}
    return {"o": o.detach(), "lse": lse.detach(), "dq": q.grad, **keys}
