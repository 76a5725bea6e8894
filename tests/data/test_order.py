"""Batches of one bucket each: every rank has the same work, no sample is left out, a resumed run sees the same."""

import numpy as np
import pytest
import torch

from data.loader import EndlessLoader
from data.order import bucket_turns


class Bucketed:
    """Sample i is the number i, repeated as often as its bucket is large."""

    def __init__(self, counts: tuple[int, ...] = (23, 7, 2)):
        self.groups = np.repeat(np.arange(len(counts)), counts)[np.random.default_rng(0).permutation(sum(counts))]

    def __len__(self) -> int:
        return len(self.groups)

    def sample(self, index: int, draw: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((1, 1, 1 + int(self.groups[index])), float(index))}


def batches(total: int, batch_size: int = 4, **options) -> list[tuple[int, list[int], list[int]]]:
    """Bucket, samples and draws of each batch."""
    loader = EndlessLoader(Bucketed(), batch_size, total, **options)
    return [(b["x"].shape[-1] - 1, b["x"][:, 0, 0, 0].int().tolist(), b["draw"].tolist()) for b in loader]


def test_a_bucket_has_its_share_at_all_times():
    for seed, counts in ((0, (23, 7, 2)), (1, (1000, 1, 300, 77, 450))):
        chosen = bucket_turns(seed, np.arange(3000), counts)
        for bucket, count in enumerate(counts):
            share = np.arange(1, 3001) * count / sum(counts)
            # a golden-ratio sequence strays by about log(steps); sampling at random would by 25 in 3000 steps
            assert np.abs(np.cumsum(chosen == bucket) - share).max() < 4


def test_within_a_bucket_every_sample_comes_once_before_any_comes_again():
    seen: dict[int, list[int]] = {}
    for bucket, samples, _ in batches(200):
        seen.setdefault(bucket, []).extend(samples)
    for bucket, count in enumerate((23, 7, 2)):
        members = np.flatnonzero(Bucketed().groups == bucket).tolist()
        epochs = [seen[bucket][i : i + count] for i in range(0, len(seen[bucket]) - count, count)]
        assert len(epochs) > 5 and all(sorted(e) == members for e in epochs)
        assert count == 2 or len({tuple(e) for e in epochs}) > 2  # each in another order


def test_ranks_have_the_same_bucket_and_divide_the_batch_of_one():
    one = batches(60, batch_size=4)
    ranks = [batches(60, batch_size=2, rank=r, world=2) for r in range(2)]
    for whole, first, second in zip(one, *ranks, strict=True):
        assert whole[0] == first[0] == second[0]
        pairs = [p for part in (first, second) for p in zip(part[2], part[1], strict=True)]
        assert sorted(pairs) == list(zip(whole[2], whole[1], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_what_an_unbroken_one_would_have(workers):
    whole = batches(40)
    for cut in (1, 17, 39):
        first = EndlessLoader(Bucketed(), 4, cut, workers=workers)
        list(first)
        assert batches(40 - cut, workers=workers, start=first.state_dict()["samples"]) == whole[cut:]
        second = EndlessLoader(Bucketed(), 2, 40 - cut, rank=1, world=2, workers=workers)
        second.load_state_dict(first.state_dict())  # on two ranks with half the batch each
        assert [b["draw"].tolist() for b in second] == [draws[1::2] for _, _, draws in whole[cut:]]


def test_the_order_depends_on_the_seed_alone():
    assert batches(30, seed=1) == batches(30, seed=1) != batches(30, seed=2)


def test_a_checkpoint_of_another_whole_batch_is_refused():
    first = EndlessLoader(Bucketed(), 4, 3)
    list(first)
    with pytest.raises(ValueError, match="made with 4 samples per step, now it is 6: with aspect-ratio buckets keep"):
        EndlessLoader(Bucketed(), 3, 3, rank=0, world=2).load_state_dict(first.state_dict())
