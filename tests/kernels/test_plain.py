"""The plain path of block-sparse attention against visibility written out densely."""

import math

import pytest
import torch
from attended import CASES, SMALL, case, dense, grid, noise, offsets, pair, results

from edit.kernels.block_sparse import Near, Part, attend


@pytest.mark.parametrize("name", CASES + SMALL)
def test_values_and_all_gradients_equal_a_dense_softmax_in_fp64(name):
    ours, reference = results(name, attend), results(name, dense)
    for key, value in reference.items():
        value = torch.zeros_like(ours[key]) if value is None else value
        torch.testing.assert_close(ours[key], value, rtol=1e-10, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ("empty", "nothing"))
def test_a_query_that_sees_nothing_gives_zero_minus_infinity_and_no_gradients(name):
    q, parts = case(name)
    q.requires_grad_()
    o, lse = attend(q, parts)
    blind = lse == -math.inf
    assert blind.any() and (o[blind] == 0).all()
    (o.sum() + lse[~blind].sum()).backward()
    assert (q.grad[blind] == 0).all() and q.grad.isfinite().all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_half_precisions_are_computed_in_fp32(dtype):
    q, parts = case("levels")
    q, parts = q.to(dtype), [Part(p.k.to(dtype), p.v.to(dtype), p.index, p.rows, p.columns, p.bias) for p in parts]
    o, lse = attend(q, parts)
    exact = [Part(p.k.double(), p.v.double(), p.index, p.rows, p.columns, p.bias) for p in parts]
    reference, other = attend(q.double(), exact)
    assert o.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), other, rtol=0, atol=1e-5)
    torch.testing.assert_close(o, reference.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_autocast_outside_changes_nothing():
    q, parts = case("levels")
    q, parts = q.float(), [Part(p.k.float(), p.v.float(), p.index, p.rows, p.columns, p.bias) for p in parts]
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(q, parts)
    for ours, other in zip(found, attend(q, parts), strict=True):
        assert torch.equal(ours, other)


def test_the_scale_that_is_not_given_is_that_of_the_head_width():
    expected = torch.nn.functional.scaled_dot_product_attention(Q, K, V)
    torch.testing.assert_close(attend(Q, [Part(K, V)])[0], expected, rtol=1e-12, atol=1e-12)


def test_two_calls_merged_by_their_lse_equal_one_with_gradients():
    q, (first, second, third) = case("levels")
    q.requires_grad_()
    o, lse = attend(q, [first, second, third])
    expected = torch.autograd.grad(o.square().sum() + lse.sum(), q)[0]
    (o1, lse1), (o2, lse2) = attend(q, [first]), attend(q, [second, third])
    both = torch.logaddexp(lse1, lse2)
    merged = (lse1 - both).exp().unsqueeze(-1) * o1 + (lse2 - both).exp().unsqueeze(-1) * o2
    torch.testing.assert_close(merged, o, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(merged.square().sum() + both.sum(), q)[0]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_the_order_of_parts_and_of_lists_does_not_matter():
    q, parts = case("bias")
    o, lse = attend(q, parts)
    turned = [Part(p.k, p.v, None if p.index is None else p.index.flip(-1), 16, 16, p.bias) for p in reversed(parts)]
    for x, y in zip((o, lse), attend(q, turned), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_ones_as_values_give_one_whatever_is_seen():
    q, parts = case("clusters")
    o, _ = attend(q, [Part(p.k, torch.ones_like(p.v), p.index, p.rows, p.columns, p.bias, p.without) for p in parts])
    torch.testing.assert_close(o, torch.ones_like(o))


def test_shapes_are_found_without_values():
    q, parts = case("clusters")
    shapes = attend(
        q.to("meta"),
        [
            Part(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in (p.k, p.v, p.index, p.rows, p.columns)))
            for p in parts[:1]
        ],
    )
    assert [tuple(x.shape) for x in shapes] == [(2, 2, 50, 16), (2, 2, 50)]


K, V = pair(70)
Q = noise(2, 2, 50, 16)
INDEX = torch.zeros(2, 2, 4, 2, dtype=torch.int32)
GRID = grid(5, 10)


@pytest.mark.parametrize(
    ("q", "parts", "sentence"),
    (
        (Q[0], [Part(K, V)], "q is b h n e in floating point"),
        (Q, [], "at least one part"),
        (Q, [Part(K[..., :8], V)], r"parts\[0\].k is b h m e with q's batch, heads and width"),
        (Q, [Part(K, V[:, :, :9])], r"parts\[0\].v is as k"),
        (Q, [Part(K, V), Part(K, V[..., :8])], r"parts\[1\].v is as k, and as wide as that of the first part \(16\)"),
        (Q, [Part(K.float(), V)], r"k has q's type and device"),
        (Q, [Part(K, V, INDEX.long(), 16, 16)], "index is int32 on cpu, got torch.int64"),
        (Q, [Part(K, V, INDEX[0], 16, 16)], "index has 4 axes"),
        (Q, [Part(K, V, INDEX, 10, 16)], "a list of 1 or more for each of 5 rows"),
        (Q, [Part(K, V, INDEX[..., :0], 16, 16)], "a list of 1 or more"),
        (Q, [Part(K, V, INDEX + 5, 16, 16)], "index counts from 0 to 4, got 5"),
        (Q, [Part(K, V, rows=16, without=INDEX + 70)], "without counts from 0 to 69, got 70"),
        (Q, [Part(K, V, INDEX, 0, 16)], "rows is a number of tokens from 1, or offsets, got 0"),
        (Q, [Part(K, V, INDEX, 16, 16.0)], "columns is a number of tokens from 1, or offsets, got 16.0"),
        (Q, [Part(K, V, INDEX, offsets(2, 2, 4, 49), 16)], "rows are offsets that ascend from 0 to 50"),
        (Q, [Part(K, V, INDEX, 16, offsets(2, 2, 4, 70).flip(-1))], "columns are offsets that ascend from 0 to 70"),
        (Q, [Part(K, V, bias=math.nan)], "bias is a logarithm"),
        (Q, [Part(K, V, bias=noise(2, 2, 69))], "bias is b h m"),
        (Q, [Part(K, V, bias=noise(2, 2, 70).requires_grad_())], "takes no gradient"),
        (Q, [Part(K, V, near=Near(GRID, GRID, 4))], "near.keys is 70 x axes"),
        (Q, [Part(K[:, :, :50], V[:, :, :50], near=Near(GRID, GRID, -1))], "limit is 0 or more, got -1"),
        (Q, [Part(K[:, :, :50], V[:, :, :50], near=Near(GRID, GRID, 1, "ball"))], 'is "disc" or "box"'),
    ),
)
def test_bad_input_is_refused_in_one_sentence(q, parts, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        attend(q, parts)
    assert "\n" not in str(error.value)
