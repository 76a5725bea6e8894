"""An endless loader: batches of tensors in the order of `data.order`, with an exact resume at any step.

A checkpoint stores how far the global sequence of samples has been used, so a run may go on with other numbers of ranks
and other batch sizes and still sees every sample in the same order. With aspect-ratio buckets the batch of all ranks
together must stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from data.order import BucketBatches, EndlessBatches
from edit.data_set import Split, collate


class EndlessLoader(DataLoader):
    """Batches as dicts of tensors, with `draw` (b int64), the running number of each sample in the run.

    Texts are padded to the longest of the batch; `text_mask` tells real tokens. Lightning saves and restores the
    position through `state_dict` and `load_state_dict`.

    Args:
        split: what to read; where it has `groups`, the bucket of each sample, batches are of one bucket each
        batch_size: per rank
        total: batches that one iteration yields, and the length; a sized loader is not read ahead by Lightning
        seed: of the order
        rank: this process
        world: number of processes
        workers: processes that read ahead; 0 reads in this one
        start: samples of the global sequence that were used already
        repeats: how often each batch is given, in a row

    Raises:
        ValueError: if the split is empty or a number makes no sense
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        total: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        start: int = 0,
        repeats: int = 1,
    ):
        if not len(split):
            raise ValueError("the data set has no samples to train on")
        numbers = {"batch_size": (batch_size, 1), "total": (total, 0), "workers": (workers, 0), "repeats": (repeats, 1)}
        for name, (value, least) in numbers.items():
            if value < least:
                raise ValueError(f"{name} is at least {least}, got {value}")
        if not 0 <= rank < world:
            raise ValueError(f"rank is one of 0 to {world - 1} (world={world}), got {rank}")
        self.total, self.used = total, start
        self.repeats = repeats
        self.begun = self.given = 0  # how often the first batch and the one under way were given; 0: none is under way
        groups = getattr(split, "groups", None)
        order: Any = (
            EndlessBatches(len(split), batch_size, seed, rank, world, start)
            if groups is None
            else BucketBatches(groups, batch_size, seed, rank, world, start)
        )
        super().__init__(
            _Numbered(split),
            batch_sampler=order,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(seed),  # else every iterator draws from the global one
        )

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order: Any = self.batch_sampler
        self.used, self.given, left = order.start, self.begun, self.total
        batches = super().__iter__()
        while left:
            batch = next(batches)
            for given in range(self.given + 1, min(self.repeats, self.given + left) + 1):
                self.given = given % self.repeats
                self.used += 0 if self.given else order.batch_size * order.world
                left -= 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        """Samples of the global sequence used on all ranks, and the size of the data set, which decides the order.

        With buckets also the batch of all ranks together, which decides the order too; with `repeats` how often the
        batch under way was given, whose samples are used when it was given for the last time.
        """
        order: Any = self.batch_sampler
        whole = {"batch": order.batch_size * order.world} if isinstance(order, BucketBatches) else {}
        given = {"given": self.given} if self.given else {}
        return {"samples": self.used, "size": order.size, **whole, **given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: if the data set or, with buckets, the batch of all ranks has another size: another order
        """
        order: Any = self.batch_sampler
        size, whole = order.size, order.batch_size * order.world
        if state.get("size", size) != size:
            raise ValueError(
                f"the checkpoint was made with {state['size']} training samples, the data set now has {size}: "
                f"restore the data set, or start a new run"
            )
        if state.get("batch", whole) != whole:
            raise ValueError(
                f"the checkpoint was made with {state['batch']} samples per step, now it is {whole}: with aspect-ratio "
                f"buckets keep data.batch_size times the number of devices"
            )
        order.start = self.used = state["samples"]
        self.begun = self.given = state.get("given", 0)


class _Numbered(Dataset):
    """Adds its running number to each sample."""

    def __init__(self, split: Split):
        self.split = split

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        index, draw = place
        return {**self.split.sample(index, draw), "draw": draw}
