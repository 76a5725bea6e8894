"""Experts divided among ranks are one layer: outputs and gradients of two processes are those of one."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_experts import GRID, layer
from torch.distributed.device_mesh import init_device_mesh

from edit.moe.parallel import divide


def given():
    torch.manual_seed(3)
    return torch.randn(4, 6, 16)


def whole(bias, skewed):
    moe = layer(count=4, k=2, gated=not bias, bias=bias)
    if skewed:  # experts 2 and 3, the second rank's, have nothing to do
        with torch.no_grad():
            moe.router.weight[2:] = 0
            moe.router.weight[:2] = moe.router.weight[:2].abs() * 9
    return moe, given().abs() if skewed else given()


def divided(bias, skewed):
    """Each rank has half of the batch and half of the experts: outputs, and gradients of the mean of both losses."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "expert"))
    moe, tokens = whole(bias, skewed)
    mine = tokens.chunk(2)[dist.get_rank()].clone().requires_grad_()
    divide(moe, mesh, "expert")
    y = moe(mine, GRID)
    y.square().mean().backward()
    shared = [moe.router.weight, *moe.shared.parameters()]
    for p in shared:
        dist.all_reduce(p.grad)
        p.grad /= 2  # as data parallelism has it
    experts = [p.grad for p in moe.experts.local.parameters()]
    return [t.detach().numpy() for t in (y, mine.grad / 2, *(p.grad for p in shared), *experts)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("skewed", [False, True])
def test_two_processes_equal_one_in_outputs_and_gradients(bias, skewed):
    moe, tokens = whole(bias, skewed)
    tokens.requires_grad_()
    y = moe(tokens, GRID)
    y.square().mean().backward()
    shared = [p.grad.numpy() for p in (moe.router.weight, *moe.shared.parameters())]
    found = run_ranks(divided, args=(bias, skewed))
    for rank, (out, grad, *rest) in enumerate(found):
        np.testing.assert_allclose(out, y.chunk(2)[rank].detach().numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(grad, tokens.grad.chunk(2)[rank].numpy(), rtol=1e-5, atol=1e-6)
        own = [p.grad.chunk(2)[rank].numpy() for p in moe.experts.parameters()]
        for mine, one in zip(rest, [*shared, *own], strict=True):
            np.testing.assert_allclose(mine, one, rtol=1e-4, atol=1e-5)
    idle = [not g.any() for g in found[1][-2:]]
    assert idle == [skewed] * 2


def refused():
    dist.init_process_group("gloo")
    try:
        divide(layer(count=5), init_device_mesh("cpu", (2,), mesh_dim_names=("expert",)), "expert")
    except ValueError as error:
        return str(error)


def test_experts_that_cannot_be_divided_among_the_ranks_are_refused():
    said, _ = run_ranks(refused)
    assert said.startswith("moe.0: 5 experts cannot be divided among 2 ranks of the dimension 'expert': choose")
