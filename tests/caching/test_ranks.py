"""Gates that read numbers, on ranks that share units: all ranks call them, or none does."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from caches import family, sampler, told
from ranks import run_ranks
from torch.distributed.fsdp import fully_shard

from edit.caching.cg_taylor import CGTaylor
from edit.caching.engine import EXECUTED, anywhere, quotient
from edit.caching.first_block_cache import FirstBlockCache
from edit.caching.tea_cache import TeaCache
from edit.predictions import default_objective
from edit.unit import core

GATES = {  # of which two samples that are apart would decide differently
    "first_block_cache": FirstBlockCache(0.2),
    "tea_cache": TeaCache(0.25, (1.0, 0.0)),
    "cg_taylor": CGTaylor(0.007, order_gate=1),
    "cg_taylor max": CGTaylor(0.0078, order_gate=1, reduction="batch_max"),
    "cg_taylor each": CGTaylor(0.0078, order_gate=1, reduction="per_sample"),
}


def painted(net, rows) -> tuple[torch.Tensor, list]:
    """Images of some of four samples, and of each evaluation how much of each sample was computed."""
    net.applied["cache"].separate = True
    condition, decided = told(net, 4).map(lambda v: v[rows]), []

    def watch(step, out):
        decided.append(net.applied["cache"].decisions(out.trace)[EXECUTED][0].tolist())

    given = default_objective(net), condition, torch.arange(4)[rows]
    return sampler(net, 10, guidance=1.0)(net, *given, watch=watch), decided


def rows_of(rank: int) -> slice:
    return slice(0, 1) if rank == 0 else slice(1, 4)  # one sample and three


def shared(cache) -> list:
    dist.init_process_group("gloo")
    net = family("dit", cache=cache)
    for unit in map(core, net.units):
        fully_shard(unit)
    fully_shard(net)
    images, decided = painted(net, rows_of(dist.get_rank()))
    dist.barrier()
    dist.destroy_process_group()
    return [images.tolist(), decided]


@pytest.mark.parametrize(
    "name", [n if n in ("tea_cache", "cg_taylor each") else pytest.param(n, marks=pytest.mark.slow) for n in GATES]
)
def test_ranks_with_other_samples_decide_as_one_batch(name):
    cache = GATES[name]
    alone = [painted(family("dit", cache=replace(cache)), rows_of(r))[1] for r in range(2)]
    wanted, decided = painted(family("dit", cache=replace(cache)), slice(0, 4))
    if name != "cg_taylor each":
        assert [d[0] for d in alone[0]] != [d[0] for d in alone[1]], "else nothing is to be agreed upon"
    found = run_ranks(shared, timeout=60, args=(cache,))
    for rank, (images, mine) in enumerate(found):
        assert mine == [d[rows_of(rank)] for d in decided]
        ours = wanted[rows_of(rank)]
        # fp32 products of other batches are summed in another order, which the extrapolation enlarges
        torch.testing.assert_close(torch.tensor(images), ours, rtol=0, atol=1e-3 * wanted.abs().max().item())


def agreed() -> tuple[float, bool, bool]:
    """Rank 0 has one sample, rank 1 three."""
    dist.init_process_group("gloo")
    rank, unit = dist.get_rank(), SimpleNamespace(unshard=None)
    share = quotient(unit, torch.tensor([1.0, 4.0][rank]), torch.tensor(2.0), [1, 3][rank]).item()
    found = share, *(anywhere(unit, flag, torch.device("cpu")) for flag in (rank == 1, False))
    dist.barrier()
    dist.destroy_process_group()
    return found


def test_means_weigh_by_samples_and_a_flag_of_one_rank_is_that_of_all():
    assert run_ranks(agreed) == [((1 + 3 * 4) / (2 + 3 * 2), True, False)] * 2
