"""Choices of experts, their gates, loads and the balance loss."""

import pytest
import torch

from edit.moe.routing import Router, balance, check_gate, choose, counted, record, recorded, unevenness
from edit.stream import Layout

LOGITS = torch.tensor([[1.0, 3.0, 2.0, 0.0], [0.0, -1.0, 4.0, 1.0]])


def test_gates_are_probabilities_renormalised_each_by_itself_or_one():
    p = LOGITS.softmax(-1)
    soft = choose(LOGITS, 2)
    assert soft.experts.tolist() == [[1, 2], [2, 3]]
    torch.testing.assert_close(soft.gates, p.gather(1, soft.experts))
    assert (soft.gates.sum(1) < 1).all()
    torch.testing.assert_close(choose(LOGITS, 2, "softmax_renorm").gates.sum(1), torch.ones(2))
    torch.testing.assert_close(choose(LOGITS, 2, "sigmoid").gates, LOGITS.sigmoid().gather(1, soft.experts))
    assert choose(LOGITS, 2, "ones", scale=0.5).gates.eq(0.5).all()
    for gate in ("softmax", "softmax_renorm", "sigmoid", "ones"):
        choice = choose(LOGITS.bfloat16(), 2, gate)
        assert choice.gates.dtype == choice.probabilities.dtype == torch.float32
        torch.testing.assert_close(choice.probabilities.sum(1), torch.ones(2))
        assert torch.equal(choice.experts, soft.experts)


def test_a_router_starts_as_a_linear_layer_and_computes_in_fp32():
    torch.manual_seed(0)
    router = Router(64, 8)
    assert 0.11 < router.weight.abs().max() <= 1 / 8
    with torch.autocast("cpu", torch.bfloat16):
        assert router(torch.randn(3, 64)).dtype == torch.float32
    assert abs(Router(64, 512, std=0.02).weight.std().item() - 0.02) < 1e-3


def test_the_balance_loss_is_1_where_experts_are_alike_and_e_over_k_where_k_have_everything():
    """Oracle 4 of dit-moe, oracle 5 of dense2moe."""
    even = torch.full((12,), 1 / 12)
    assert balance(even, even).item() == pytest.approx(1)
    full = torch.tensor([0.5, 0.5, *[0.0] * 10])
    assert balance(full, full).item() == pytest.approx(6)
    assert unevenness(full).item() == 6 and unevenness(even).item() == pytest.approx(1)


def test_the_balance_loss_reaches_probabilities_and_nothing_through_loads():
    loads, p = torch.rand(4, requires_grad=True), torch.rand(4, requires_grad=True)
    balance(loads, p).backward()
    assert loads.grad is None
    torch.testing.assert_close(p.grad, 4 * loads.detach())


def test_loads_and_probabilities_of_each_sample_are_recorded_padding_left_out():
    logits = torch.randn(2 * 3, 4)
    choice = choose(logits, 2)
    layout = Layout((1, 1, 3), notes={})
    record(layout, "moe.0", choice, 2)
    loads = recorded(layout.notes, ["moe.0"], "loads")
    assert loads.shape == (1, 2, 4)
    for b in range(2):
        wanted = torch.bincount(choice.experts[3 * b : 3 * b + 3].flatten(), minlength=4) / 6
        torch.testing.assert_close(loads[0, b], wanted)
    torch.testing.assert_close(layout.notes["moe.0.probabilities"], choice.probabilities.view(2, 3, 4).mean(1))
    kept = torch.tensor([[True, False, True], [False, False, False]])
    record(layout, "moe.1", choice, 2, kept)
    wanted = torch.bincount(choice.experts[[0, 2]].flatten(), minlength=4) / 4
    torch.testing.assert_close(layout.notes["moe.1.loads"], torch.stack((wanted, torch.zeros(4))))
    torch.testing.assert_close(layout.notes["moe.1.probabilities"][0], choice.probabilities[[0, 2]].mean(0))
    record(Layout((1, 1, 3)), "moe.0", choice, 2)  # outside of a unit's call nobody would find it


def test_counts_are_whole_numbers_of_each_sample():
    found = counted(torch.tensor([[0, 2], [2, 1], [2, 0], [2, 0]]), 4, samples=2)
    assert found.tolist() == [[1, 1, 2, 0], [2, 0, 2, 0]] and found.dtype == torch.int32


def test_a_token_cannot_take_more_experts_than_there_are():
    with pytest.raises(ValueError, match="DiTMoE: a token cannot take 9 of 8 experts: choose 0 to 8"):
        check_gate("DiTMoE", "softmax", 8, 9)
    with pytest.raises(ValueError, match="gate must be one of softmax, softmax_renorm, sigmoid, ones, got 'top'"):
        check_gate("DiTMoE", "top", 8, 2)
