"""Which path is taken, what the operator is counted as, and the same by flex_attention."""

import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from attended import case
from torch.utils.flop_counter import FlopCounterMode

from edit.kernels.block_sparse import Part, attend
from edit.kernels.language import HAS_TRITON
from edit.kernels.operator import pairs, part_pairs
from edit.kernels.plans import Plan

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def on_meta(part: Part) -> Part:
    tables = (None if x is None else x.to("meta") for x in (part.index, part.without))
    index, without = tables
    leaves = (x.to("meta", torch.bfloat16).requires_grad_() for x in (part.k, part.v))
    return Part(*leaves, index, part.rows, part.columns, part.bias, without)


def test_on_a_cpu_the_plain_path_is_taken_even_where_kernels_are_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("edit.kernels.block_sparse.attend_kernel", None)
    attend(*case("small levels"))


@needs_triton
@pytest.mark.parametrize(
    ("q", "sentence"),
    (
        (torch.zeros(1, 1, 4, 16), "the kernels run on a GPU, got tensors on cpu"),
        (torch.zeros(1, 1, 4, 16, dtype=torch.float64, device="meta"), "bf16, fp16 or fp32, got torch.float64"),
        (torch.zeros(1, 1, 4, 144, device="meta"), "heads up to 128 wide, got 144"),
        (torch.zeros(1, 1, 2**24, 1, device="meta"), "up to 16777215 tokens, got 16777216"),
    ),
)
def test_kernels_refuse_what_they_do_not_take_and_name_the_way_out(q, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        attend(q, [Part(q, q)], path="kernel")
    assert 'path="plain"' in str(error.value)


def test_an_unknown_path_is_refused():
    with pytest.raises(ValueError, match='path is "kernel", "plain" or None, got \'fast\''):
        attend(*case("dense"), path="fast")


@needs_triton
def test_counted_work_is_two_products_forward_and_seven_backward():
    q, parts = case("levels")  # 64 queries, 2 batches, 2 heads of 16
    q, parts = q.to("meta", torch.bfloat16).requires_grad_(), [on_meta(part) for part in parts]
    seen = 2 * 2 * 64 * (2 * 4 + 2 * 4 + 4)  # K B of the tokens, K B of the first level, and all of the second
    with FlopCounterMode(display=False) as counter:
        o, lse = attend(q, parts, path="kernel")
        assert counter.get_total_flops() == 2 * seen * (16 + 16)
        (o.sum() + lse.sum()).backward()
    assert counter.get_total_flops() == 2 * seen * 16 * (2 + 7)


@needs_triton
def test_counted_work_knows_widths_of_keys_and_of_values():
    """4 queries, 5 keys: q k' and P v forward; q k' twice, dS k and dS' q, dO v' twice, P' dO backward."""
    q, k = (torch.zeros(1, 1, n, 16, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (4, 5))
    v = torch.zeros(1, 1, 5, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        o, _ = attend(q, [Part(k, v)], path="kernel")
        assert counter.get_total_flops() == 2 * 20 * (16 + 8)
        o.sum().backward()
    assert counter.get_total_flops() == 2 * 20 * (16 + 8) + 2 * 20 * (4 * 16 + 3 * 8)


def test_short_groups_are_counted_by_their_tokens():
    q, k = torch.zeros(1, 1, 50, 16), torch.zeros(1, 1, 70, 16)
    one = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    assert part_pairs(q, Part(k, k, one, rows=50, columns=128)) == 50 * 70
    index = torch.tensor([0, 1, 0, 1], dtype=torch.int32).view(1, 1, 4, 1)  # rows of 16, 16, 16 and 2
    cut = torch.tensor([0, 10, 70], dtype=torch.int32).view(1, 1, 3)
    assert part_pairs(q, Part(k, k, index, rows=16, columns=cut)) == 16 * 10 + 16 * 60 + 16 * 10 + 2 * 60


def test_chunks_of_queries_leave_none_out():
    """1100 queries in chunks of eight steps of 64 at most: three, which do not divide them."""
    q, k = torch.zeros(1, 1, 1100, 16, dtype=torch.bfloat16), torch.zeros(1, 1, 5, 16, dtype=torch.bfloat16)
    (_, chunks, _), told = Plan(q, Part(k, k), 1.0).keys(q)
    assert (chunks, told["reach"], told["each"]) == (3, 1100, 367)


def test_a_table_of_some_heads_is_written_out_for_all_and_one_of_none_is_shared():
    q = torch.zeros(3, 2, 4, 16)
    plan, heads = Plan(q, Part(q, q), 1.0), torch.arange(8, dtype=torch.int32).view(1, 2, 4)
    table, step = plan.shared(heads)
    assert step == 4 and torch.equal(table, heads.expand(3, 2, 4)) and table.is_contiguous()
    assert plan.shared(heads[:, :1])[1] == 0 and plan.shared(None) == (None, 0)


def test_the_plain_path_is_counted_as_the_kernels_are():
    q, parts = case("levels")
    with FlopCounterMode(display=False) as counter:
        attend(q, parts)
    assert counter.get_total_flops() == 2 * sum(part_pairs(q, part) for part in parts) * (16 + 16)


def test_groups_of_given_lengths_are_counted_by_these():
    q, (part, _) = case("clusters")
    expected = 0
    for b in range(2):
        for h in range(2):
            rows, columns = part.rows[b, h].diff(), part.columns[b, h].diff()
            for r, row in enumerate(rows):
                expected += int(row) * sum(int(columns[c]) for c in part.index[b, h, r] if c >= 0)
    assert part_pairs(q, part) == expected
    assert pairs(q, [part.k], [part.v], [part.index, part.rows, part.columns, *[None] * 4], [0] * 4, [0.0]) == expected


def test_kernels_can_be_imported_without_triton():
    code = """
        import sys
        sys.modules["triton"] = None
        import torch
        from edit.kernels.block_sparse import Part, attend
        import edit.kernels.backward, edit.kernels.forward
        q = torch.ones(1, 1, 4, 16)
        assert attend(q, [Part(q, q)])[0].shape == q.shape
        try:
            attend(q, [Part(q, q)], path="kernel")
        except ValueError as error:
            assert "need Triton, which is not installed" in str(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_flex_attention_gives_the_same_with_a_mask_and_the_bias_in_its_logits():
    """LLSA's oracle 9: keys and values of all levels in a row, uncompiled, so that only `mask_mod` hides."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, parts = case("levels")
    q, parts = q.float(), [replace(part, k=part.k.float(), v=part.v.float()) for part in parts]
    fine, coarse, top = parts
    first, second = torch.zeros(2, 2, 16, 16 + 1, dtype=torch.bool), torch.zeros(2, 2, 4, 4 + 1, dtype=torch.bool)
    for table, part, last in ((first, fine, 16), (second, coarse, 4)):
        table.scatter_(-1, torch.where(part.index < 0, last, part.index).long(), True)

    def seen(b, h, i, j):
        near = first[b, h, i // 4, (j // 4).clamp_max(15)]
        far = second[b, h, i // 16, ((j - 64) // 4).clamp(0, 3)]
        return torch.where(j < 64, near, torch.where(j < 80, far, j >= 80))

    def biased(score, b, h, i, j):
        return score + torch.where(j < 64, 0.0, torch.where(j < 80, coarse.bias, top.bias))

    mask = create_block_mask(seen, 2, 2, 64, 84, device="cpu")
    k, v = torch.cat([part.k for part in parts], 2), torch.cat([part.v for part in parts], 2)
    reference = flex_attention(q, k, v, score_mod=biased, block_mask=mask, scale=0.3)
    o, _ = attend(q, parts, 0.3)
    torch.testing.assert_close(o, reference, rtol=0, atol=1e-5)
