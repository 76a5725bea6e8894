"""The layer of experts against a loop over tokens, in values and gradients, however it is computed."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from edit.measuring.flops import Flops
from edit.moe import grouped as execution
from edit.moe.experts import Experts, FeedForward, MoE
from edit.moe.feeds import Dense, take_neurons
from edit.moe.grouped import evenly, grouped, segmented
from edit.moe.order import ordered
from edit.moe.routing import Choice, Router, choose
from edit.stream import Layout

GRID = Layout((1, 2, 3))


def layer(count=4, k=2, width=16, hidden=24, gated=True, bias=False, shared=8, gate="softmax", dtype=torch.float32):
    torch.manual_seed(0)
    act = F.silu if gated else F.gelu
    experts = Experts(count, width, hidden, act, gated, bias, bias)
    always = FeedForward(width, shared, act, gated, bias, bias) if shared else None
    moe = MoE("moe.0", Router(width, count), experts, always, k, gate)
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(std=0.3)
    return moe.to(dtype)


def by_tokens(moe: MoE, tokens, choice: Choice):
    """Sum of gated experts, one token at a time."""
    e, out = moe.experts, []
    for u, which, gates in zip(tokens, choice.experts.tolist(), choice.gates, strict=True):
        y = torch.zeros_like(u)
        for i, g in zip(which, gates, strict=True):
            hidden = e.into[i] @ u + (0 if e.into_bias is None else e.into_bias[i])
            hidden = (
                e.activation(hidden) if not e.gated else F.silu(hidden[: len(hidden) // 2]) * hidden[len(hidden) // 2 :]
            )
            y = y + g * (e.out[i] @ hidden + (0 if e.out_bias is None else e.out_bias[i]))
        out.append(y)
    return torch.stack(out)


def everywhere(moe: MoE, tokens, choice: Choice):
    """All experts of all tokens, weighted by gates that are zero for those not chosen."""
    e = moe.experts
    weight = torch.zeros(len(tokens), len(e.into), dtype=choice.gates.dtype).scatter(1, choice.experts, choice.gates)
    hidden = torch.einsum("nd,ewd->new", tokens, e.into) + (0 if e.into_bias is None else e.into_bias)
    if e.gated:
        gate, value = hidden.chunk(2, -1)
        hidden = F.silu(gate) * value
    else:
        hidden = e.activation(hidden)
    each = torch.einsum("neh,edh->ned", hidden, e.out) + (0 if e.out_bias is None else e.out_bias)
    return torch.einsum("ned,ne->nd", each, weight)


def compared(moe: MoE, run, tokens, choice_of):
    """Output and all gradients of the routed experts."""
    tokens = tokens.clone().requires_grad_()
    y = run(tokens, choice_of(moe.router(tokens)))
    parameters = [*moe.router.parameters(), *moe.experts.parameters()]
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, [tokens, *parameters], torch.randn_like(y), allow_unused=True)]


@pytest.mark.parametrize("own", [True, False], ids=["torch", "segments"])
@pytest.mark.parametrize("gated, bias", [(True, False), (False, True)])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_experts_equal_a_loop_and_all_at_once_in_values_and_all_gradients(k, gated, bias, own, monkeypatch):
    if not own:
        monkeypatch.setattr(execution, "direct", lambda *_: False)
    moe, tokens = layer(k=k, gated=gated, bias=bias, dtype=torch.float32), torch.randn(11, 16)

    def uneven(logits):  # experts 1 and 3 are left empty where they can be
        return choose(logits - torch.tensor([0.0, 50.0, 0.0, 40.0]), k)

    grouped_, loop, whole = (
        compared(moe, run, tokens, uneven)
        for run in (moe.experts, lambda u, c: by_tokens(moe, u, c), lambda u, c: everywhere(moe, u, c))
    )
    for mine, one, other in zip(grouped_, loop, whole, strict=True):
        torch.testing.assert_close(mine, one, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_an_expert_that_no_token_has_reached_has_a_gradient_of_zero():
    moe = layer(k=1)
    y = moe.experts(torch.randn(5, 16), choose(torch.tensor([[9.0, 0, 0, 0]]).expand(5, 4), 1))
    y.sum().backward()
    for p in moe.experts.parameters():
        assert p.grad is not None and p.grad[0].any() and not p.grad[1:].any()


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [9, 0, 0, 0], [0, 0, 0, 9], [2, 2, 2, 3]])
def test_segments_are_the_product_of_each_group(counts):
    rows, weight = torch.randn(9, 6, dtype=torch.float64), torch.randn(4, 5, 6, dtype=torch.float64)
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    wanted = torch.cat([part @ w.T for part, w in zip(rows.split(counts), weight, strict=True)])
    for run in (segmented, grouped):  # torch's own takes no fp64
        torch.testing.assert_close(run(rows, weight, ends), wanted, rtol=1e-12, atol=1e-12)


def test_rows_stand_by_expert_and_in_the_order_of_tokens():
    order = ordered(torch.tensor([[2, 0], [0, 3], [2, 3]]), 5)
    assert order.experts.tolist() == [0, 0, 2, 2, 3, 3]
    assert order.rows.tolist() == [1, 2, 0, 4, 3, 5]
    assert order.places[order.rows].tolist() == list(range(6))
    assert order.ends.tolist() == [2, 2, 4, 6, 6] and order.ends.dtype == torch.int32


def test_lowering_k_takes_the_least_of_the_chosen_away_and_0_is_the_shared_one_bit_for_bit():
    moe, tokens = layer(count=6, k=3), torch.randn(2, 6, 16)
    choice = choose(moe.router(tokens.flatten(0, 1)), 3)
    outputs = []
    for moe.k in range(4):
        outputs.append(moe(tokens, GRID))
    assert torch.equal(outputs[0], moe.shared(tokens))
    for j in (1, 2, 3):
        one = Choice(choice.experts[:, j - 1 : j], choice.gates[:, j - 1 : j], choice.probabilities)
        each = by_tokens(moe, tokens.flatten(0, 1), one).view(2, 6, 16)
        torch.testing.assert_close(outputs[j] - outputs[j - 1], each, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_neurons_dealt_to_experts_with_gates_of_one_are_the_dense_feed_forward(gated):
    """Also b2, which the shared expert alone has."""
    torch.manual_seed(0)
    whole = FeedForward(8, 20, F.gelu, gated, bias=True, out_bias=True).double()
    for b in (whole.into.bias, whole.out.bias):
        torch.nn.init.normal_(b)
    experts, shared = Experts(4, 8, 4, F.gelu, gated, True), FeedForward(8, 4, F.gelu, gated, True, True)
    moe = MoE("m", Router(8, 4), experts, shared, 4, "ones").double()
    deal = torch.randperm(20)
    source = Dense(whole.into.weight, whole.into.bias, whole.out.weight, whole.out.bias)
    take_neurons(moe, source, deal[:4], deal[4:].view(4, 4))
    tokens = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(moe(tokens, GRID), whole(tokens), rtol=1e-12, atol=1e-12)


def test_autocast_computes_in_bf16_and_routes_in_fp32():
    moe, tokens = layer(), torch.randn(2, 6, 16)
    plain = moe(tokens, GRID)
    with torch.autocast("cpu", torch.bfloat16):
        logits = moe.router(tokens.flatten(0, 1))
        cast = moe(tokens, GRID)
    assert cast.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert torch.equal(logits, moe.router(tokens.flatten(0, 1)))
    torch.testing.assert_close(cast.float(), plain, rtol=0.05, atol=0.1)
    cast.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in moe.parameters())


def test_checkpointing_gives_the_same_gradients():
    moe, tokens = layer(), torch.randn(2, 6, 16)
    found = []
    for run in (moe, lambda *a: checkpoint(moe, *a, use_reentrant=False)):
        moe.zero_grad()
        run(tokens, GRID).square().sum().backward()
        found.append([p.grad.clone() for p in moe.parameters()])
    assert all(map(torch.equal, *found))


def watched():
    """A compiler that keeps graphs, and the graphs that it has kept."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    return keep, graphs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_compiled_layer_is_one_graph_without_a_way_to_the_host(dtype):
    """Oracle 9: fullgraph, and no operator whose shape or value the host would have to wait for."""
    moe, tokens = layer(dtype=dtype), torch.randn(2, 6, 16, dtype=dtype)
    compiler, graphs = watched()
    torch._dynamo.reset()
    compiled = torch.compile(moe, backend=compiler, fullgraph=True)
    answers = []
    for run in (compiled, moe):
        moe.zero_grad()
        (y := run(tokens, GRID)).square().sum().backward()
        answers.append([y, *(p.grad.clone() for p in moe.parameters())])
    for mine, plain in zip(*answers, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)
    (graph,) = graphs
    named = {str(node.target) for node in graph.graph.nodes}
    assert ("grouped_mm" in " ".join(named)) == (dtype == torch.bfloat16)
    forbidden = ("item", "nonzero", "tolist", "bincount", "unique", "repeat_interleave", "cpu", "masked_select")
    assert not [n for n in named for f in forbidden if f == n.rpartition(".")[2]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("fake", [True, False])
def test_without_values_shapes_and_work_are_those_of_the_rows_that_run(dtype, fake):
    moe = layer(dtype=dtype)
    tokens, mode = torch.empty(2, 6, 16, dtype=dtype), FakeTensorMode(allow_non_fake_inputs=True)
    routed = 24 * 3 * 16 * 24
    if fake:
        with mode, Flops() as flops:
            y = moe(mode.from_tensor(tokens), GRID)
    else:
        with Flops() as flops:
            y = moe.to("meta")(tokens.to("meta"), GRID)
    assert y.shape == tokens.shape and y.dtype == dtype
    assert flops.total == 2 * (routed + 12 * 4 * 16 + 12 * 3 * 16 * 8)  # experts, router, shared


def test_work_on_a_device_is_that_without_values():
    moe, tokens = layer(), torch.randn(2, 6, 16)
    with Flops() as flops:
        moe(tokens, GRID)
    assert flops.total == 2 * (24 * 3 * 16 * 24 + 12 * 4 * 16 + 12 * 3 * 16 * 8)
    assert evenly(torch.randn(7, 6), torch.randn(3, 5, 6)).shape == (7, 5)


def test_an_order_of_samples_and_tokens_changes_nothing_else():
    """Oracle 7: no token is dropped, so that no output depends on the rest of the batch."""
    moe, tokens = layer(dtype=torch.float64), torch.randn(3, 6, 16, dtype=torch.float64)
    y = moe(tokens, GRID)
    torch.testing.assert_close(moe(tokens.flip(0), GRID), y.flip(0), rtol=0, atol=1e-12)
    turn = torch.randperm(6)
    torch.testing.assert_close(moe(tokens[:, turn], GRID), y[:, turn], rtol=0, atol=1e-12)
    other = torch.cat((tokens[:1], torch.randn(2, 6, 16, dtype=torch.float64)))
    torch.testing.assert_close(moe(other, GRID)[:1], y[:1], rtol=0, atol=1e-12)
