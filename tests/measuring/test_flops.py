"""Every attention operator is counted, on any release; what nobody can count is named."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.flop_counter import flop_registry

from edit.denoiser import Denoiser
from edit.measuring.cost import Cost, cost, count_forward
from edit.measuring.flops import FORMULAS, Flops, Uncounted, uncounted
from edit.sampling import Sampler
from edit.solvers import Euler

B, H, N, M, E = 2, 3, 256, 128, 16
WHOLE = 2 * 2 * B * H * N * M * E  # two products of N M E multiply-adds


def tensors(device="cpu"):
    return torch.randn(B, H, N, E, device=device), *(torch.randn(B, H, M, E, device=device) for _ in range(2))


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_fused_and_plain_attention_cost_the_same(backend, graph):
    q, k, v = (x.requires_grad_(graph) for x in tensors())
    with sdpa_kernel(backend), Flops() as flops:
        F.scaled_dot_product_attention(q, k, v)
    assert flops.total == WHOLE


def test_a_backward_of_fused_attention_is_counted():
    """Five products where the forward has two: scores again, and one for each of q, k, v and the probabilities."""
    q, k, v = (x.requires_grad_() for x in tensors())
    with Flops() as flops:
        out = F.scaled_dot_product_attention(q, k, v)
        out.sum().backward()
    assert flops.total == WHOLE + WHOLE * 5 // 2


def test_an_attention_operator_of_this_torch_has_a_formula_or_is_named():
    """Releases add operators; none that does attention may be passed over in silence."""
    names = {n.partition(".")[0].removeprefix("aten::") for n in torch._C._dispatch_get_all_op_names()}
    composite = {"scaled_dot_product_attention", "_scaled_dot_product_attention_math"}  # made of others
    operators = {n: getattr(torch.ops.aten, n) for n in names if "attention" in n and n not in composite}
    assert len(operators) > 15
    for name, op in operators.items():
        assert op in flop_registry or op in FORMULAS or uncounted(op), name


ON_OTHER_DEVICES = {  # shapes of arguments: the operators themselves do not run here
    "_scaled_dot_product_fused_attention_overrideable": [(B, H, N, E), (B, H, M, E), (B, H, M, E)],
    "_scaled_dot_product_attention_math_for_mps": [(B, H, N, E), (B, H, M, E), (B, H, M, E)],
    "_scaled_dot_product_flash_attention_for_cpu": [(B, H, N, E), (B, H, M, E), (B, H, M, E)],
    "_cudnn_attention_forward": [(B, H, N, E), (B, H, M, E), (B, H, M, E), None, None, None, N, M],
    "_flash_attention_forward_no_dropout_inplace": [(B, N, H, E), (B, N, H, E), *[(B, M, H, E)] * 2, None, None, N, M],
}


@pytest.mark.parametrize(("name", "arguments"), ON_OTHER_DEVICES.items(), ids=ON_OTHER_DEVICES)
def test_operators_of_other_devices_count_what_the_plain_one_does(name, arguments):
    op = getattr(torch.ops.aten, name, None)
    if op not in FORMULAS:
        pytest.skip("this torch has no such operator, or counts it by itself")
    given = [torch.empty(a, device="meta") if isinstance(a, tuple) else a for a in arguments]
    if not hasattr(FORMULAS[op], "_get_raw"):
        given = [g.shape for g in given]
    assert FORMULAS[op](*given) == WHOLE


@pytest.mark.parametrize(
    ("name", "before", "between"),
    [
        ("_cudnn_attention_forward", 0, 1),
        ("_flash_attention_forward_no_dropout_inplace", 1, 0),
        ("_cudnn_attention_forward_no_dropout_inplace", 1, 0),
    ],
)
def test_of_sequences_end_to_end_each_attends_to_itself(name, before, between):
    op = getattr(torch.ops.aten, name, None)
    if op not in FORMULAS:
        pytest.skip("this torch has no such operator, or counts it by itself")
    tokens = torch.empty(10, H, E, device="meta")
    starts = torch.tensor([0, 4, 10])  # 4 tokens and 6
    counted = FORMULAS[op](*[tokens] * before, tokens, tokens, tokens, *[None] * between, starts, starts, 6, 6)
    assert counted == 2 * 2 * H * E * (4 * 4 + 6 * 6)


def test_attention_in_one_operator_is_counted_with_its_projections():
    layer, x = nn.MultiheadAttention(E, 2, batch_first=True).eval(), torch.randn(B, N, E)
    with torch.no_grad(), Flops() as fused:
        layer(x, x, x, need_weights=False)
    # with a graph it is done by separate products
    with Flops() as plain:
        layer(x.requires_grad_(), x, x, need_weights=False)
    assert fused.total == plain.total == 2 * B * (4 * N * E * E + 2 * N * N * E)


@pytest.mark.parametrize("compiled", [False, True])
def test_flex_attention_costs_the_blocks_that_its_mask_leaves(compiled):
    run = torch.compile(flex_attention) if compiled else flex_attention
    q = k = v = torch.randn(1, 2, 256, E)
    dense = 2 * 2 * 2 * 256 * 256 * E
    diagonal = create_block_mask(lambda b, h, i, j: i // 64 == j // 64, None, None, 256, 256, "cpu", BLOCK_SIZE=64)
    # 16 blocks of 64: each row of blocks sees itself and its neighbours, so 4 + 2 * 3
    band = create_block_mask(lambda b, h, i, j: (i - j).abs() < 40, 1, 2, 256, 256, "cpu", BLOCK_SIZE=64)
    for mask, share in ((None, 1), (diagonal, 4 / 16), (band, 10 / 16)):
        with torch.no_grad(), Flops() as flops:
            out = run(q, k, v, block_mask=mask)
        assert flops.total == dense * share
        with torch.no_grad():
            torch.testing.assert_close(out, flex_attention(q, k, v, block_mask=mask), rtol=1e-5, atol=1e-6)


def test_flex_attention_inside_a_unit_is_counted_in_a_run_and_refused_without_weights(make_dit):
    plain, flex = make_dit(), make_dit()
    for unit in flex.units:
        unit.slots.attention = lambda q, k, v, layout, step: flex_attention(q, k, v)
    count = count_forward(flex, flex.example(), 1)
    assert count.macs == count_forward(plain, plain.example(), 1).macs and count.uncounted == ()
    with pytest.raises(ValueError, match="cannot be counted without weights, count a real run .*: .*meta device"):
        count_forward(flex.to("meta"), flex.example(), 1)


def with_a_product_nobody_counts(denoiser: Denoiser) -> Denoiser:
    unit = denoiser.units[0]

    def slow(stream):
        torch.mv(stream.image[0], stream.image[0, 0])  # a matrix by a vector
        return unit(stream)

    denoiser.units[0] = slow
    return denoiser


def test_an_operator_without_a_formula_is_a_named_warning_that_makes_the_count_a_lower_bound(make_dit):
    known = cost(make_dit(), Sampler(Euler(2)), real=True)
    with pytest.warns(Uncounted, match=r"no FLOP formula for aten\.mv\.default: MACs are a lower bound"):
        found = cost(with_a_product_nobody_counts(make_dit()), Sampler(Euler(2)), real=True)
    assert found.uncounted == ("aten.mv.default",) and known.uncounted == ()
    assert found.macs == known.macs and found.as_dict()["uncounted"] == ["aten.mv.default"]


def test_counting_leaves_the_registry_of_torch_alone():
    before = dict(flop_registry)
    with Flops():
        F.scaled_dot_product_attention(*tensors())
    assert flop_registry == before


def test_nothing_is_warned_of_where_all_is_counted(dit):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(cost(dit, Sampler(Euler(2)), real=True), Cost)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_product_for_each_group_of_rows_counts_every_row_once(device):
    """As experts are computed, forward and backward; on the meta device it takes bf16 alone."""
    a = torch.randn(8, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
    b = torch.randn(3, 16, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    ends = torch.tensor([2, 2, 8], dtype=torch.int32, device=device)
    with Flops() as forward:
        out = torch.nn.functional.grouped_mm(a, b, offs=ends)
    assert forward.total == 2 * 8 * 16 * 32
    with Flops() as backward:
        out.backward(torch.ones_like(out))
    assert backward.total == 2 * forward.total
