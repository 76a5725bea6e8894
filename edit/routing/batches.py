"""Samples of a batch with the same decision run together, as a batch of their own."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from edit.stream import Stream

Key = TypeVar("Key", bound=Hashable)


def by_key(keys: Sequence[Key]) -> dict[Key, list[int]]:
    """Positions by key, in order of first appearance."""
    groups: dict[Key, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return groups


def rows_on(device: torch.device, members: Sequence[int]) -> Tensor:
    """Positions as int64 on a device."""
    return uploaded(torch.tensor(members, dtype=torch.int64, device="cpu"), device)


def uploaded(x: Tensor, device: torch.device) -> Tensor:
    """From the host to a device; to CUDA from pinned memory, for which the host does not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def run_grouped(stream: Stream, keys: Sequence[Key | None], run: Callable[[Key, Stream], Stream]) -> Stream:
    """Run samples in groups of one key; samples without a key stay as they are.

    Args:
        stream: b samples
        keys: b, on the host
        run: of a key and the samples that have it

    Raises:
        ValueError: if branches or maps are wanted of a unit that is not run on all samples alike
    """
    groups = by_key(keys)
    if len(groups) == 1:
        (key,) = groups
        return stream if key is None else run(key, stream)
    if stream.tap is not None:
        raise ValueError(
            f"branches or maps of {stream.tap} are wanted, but its samples are not run alike: compare its tokens (taps)"
        )
    image, text = stream.image, stream.text
    for key, members in groups.items():
        if key is None:
            continue
        rows = rows_on(image.device, members)
        after = run(key, take(stream, rows))
        image = image.to(after.image.dtype).index_copy(0, rows, after.image)
        if text is not None and after.text is not None:
            text = text.to(after.text.dtype).index_copy(0, rows, after.text)
    return replace(stream, image=image, text=text)


def take(stream: Stream, rows: Tensor) -> Stream:
    """Some samples of a stream, without its trace."""
    return replace(stream.map(lambda v: v.index_select(0, rows)), trace={})


def mean_over_ranks(local: Tensor) -> Tensor:
    """The mean of a number over all ranks, with the gradient of this rank's part.

    A squared error of it has, once gradients are averaged over ranks, the gradient of the whole batch's.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return local
    everywhere = local.detach().clone()
    dist.all_reduce(everywhere)
    return local + (everywhere / dist.get_world_size() - local.detach())


def sharded(unit: nn.Module) -> bool:
    """Whether calling it is a collective (FSDP2, ZeRO-3), which no rank may leave out."""
    return sliced(unit) or hasattr(next(unit.parameters(), None), "ds_id")


def sliced(unit: nn.Module) -> bool:
    """Whether FSDP2 shards its weights. Its class is not imported: a second, which commands that do not train are
    spared."""
    return hasattr(unit, "unshard")


@contextmanager
def gathered(unit: nn.Module) -> Iterator[None]:
    """A block in which the weights of a unit are whole without a call of it (FSDP2); all ranks enter it, or none."""
    if not sliced(unit):
        yield
        return
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()
