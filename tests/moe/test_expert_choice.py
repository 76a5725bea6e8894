"""Expert choice: what its specification says must hold (methods/micro-dit.md, oracles 5 and 6)."""

import pytest
import torch
import torch.nn.functional as F
from families import BACKBONES, family, inputs
from torch import Tensor, nn

import edit
from edit.caching.toca import ToCa
from edit.denoiser import Denoiser
from edit.edits import grouped, per_token
from edit.measuring.flops import Flops
from edit.moe.expert_choice import IDLE, ExpertChoice, ExpertChoiceFeed, gelu, put
from edit.moe.order import rows_of
from edit.stream import Layout

D, E, H = 16, 4, 24
LAYOUT = Layout((1, 1, 1))


def layer(experts: int = E, capacity: float = 2.0, seed: int = 0) -> ExpertChoiceFeed:
    """In float64, its router in fp32 as always, with weights of ordinary size."""
    torch.manual_seed(seed)
    made = ExpertChoiceFeed("it", D, H, experts, capacity, 0.02)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    made.experts.double()
    return made


def tokens(b: int = 3, t: int = 10, seed: int = 1) -> Tensor:
    return torch.randn(b, t, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probabilities(moe: ExpertChoiceFeed, x: Tensor) -> Tensor:
    return (x.float() @ moe.router.weight.T).softmax(-1)


def outputs(moe: ExpertChoiceFeed, x: Tensor) -> Tensor:
    """Of every expert on every token: b t E d."""
    w1, w2 = moe.experts.into.mT, moe.experts.out.mT  # E d f, E f d
    return torch.einsum("btef,efd->bted", F.gelu(torch.einsum("btd,edf->btef", x, w1), approximate="tanh"), w2)


def one_hot(moe: ExpertChoiceFeed, x: Tensor, k: int) -> Tensor:
    """Dispatch and combine tensors b E k t, as the release has them."""
    gates, chosen = probabilities(moe, x).transpose(1, 2).topk(k, -1)
    dispatch = F.one_hot(chosen, x.shape[1]).to(x.dtype)  # b E k t
    taken = torch.einsum("bekt,btd->bekd", dispatch, x)
    hidden = F.gelu(torch.einsum("bekd,efd->bekf", taken, moe.experts.into), approximate="tanh")
    y = torch.einsum("bekf,edf->bekd", hidden, moe.experts.out)
    return torch.einsum("bekd,bekt,bek->btd", y, dispatch, gates.to(x.dtype))


# ---- the layer -------------------------------------------------------------------------------------------------------


def test_with_capacity_for_all_every_expert_takes_every_token():
    """Oracle 5: f_c = E."""
    moe, x = layer(capacity=E), tokens()
    wanted = (probabilities(moe, x)[..., None] * outputs(moe, x)).sum(2)
    torch.testing.assert_close(moe(x, LAYOUT), wanted, rtol=0, atol=2e-6)


def test_one_expert_with_a_capacity_of_1_is_a_plain_feed_forward():
    """Oracle 5."""
    moe, x = layer(1, 1.0), tokens()
    wanted = gelu(x @ moe.experts.into[0].T) @ moe.experts.out[0].T
    torch.testing.assert_close(moe(x, LAYOUT), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("t", "capacity", "k"), [(10, 2.0, 5), (9, 2.0, 4), (64, 0.5, 8), (1, 2.0, 1), (3, 0.1, 1), (2, 4.0, 2)]
)
def test_every_expert_takes_its_number_of_tokens_in_every_sample(t, capacity, k):
    """Oracle 5: floor(f_c t / E), and one where that is none."""
    moe, x = layer(capacity=capacity), tokens(t=t)
    assert moe.taken(t) == k
    p = probabilities(moe, x)
    floor = p.topk(k, 1).values[:, -1:]  # of each expert in each sample
    wanted = (torch.where(p >= floor, p, 0.0)[..., None] * outputs(moe, x)).sum(2)
    torch.testing.assert_close(moe(x, LAYOUT), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("t", [4, 11, 16])
def test_outputs_and_gradients_are_those_of_the_one_hot_formulation(t):
    """Oracle 6."""
    moe, results = layer(), []
    for run in (lambda x: moe(x, LAYOUT), lambda x: one_hot(moe, x, moe.taken(t))):
        x = tokens(t=t).requires_grad_()
        y = run(x)
        grads = torch.autograd.grad(y.square().sum(), (x, *moe.parameters()))
        results.append((y.detach(), *grads))
    for ours, theirs in zip(*results, strict=True):  # probabilities and the router are fp32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_permuting_tokens_permutes_outputs_and_other_samples_change_nothing():
    """Oracle 5."""
    moe, x = layer(), tokens(4, 12)
    y, order = moe(x, LAYOUT), torch.randperm(12, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(moe(x[:, order], LAYOUT), y[:, order], rtol=0, atol=1e-12)
    torch.testing.assert_close(moe(x[2:3], LAYOUT), y[2:3], rtol=0, atol=1e-12)
    other = x.clone()
    other[1] *= 5
    moved = moe(other, LAYOUT)
    assert torch.equal(moved[[0, 2, 3]], y[[0, 2, 3]]) and not torch.equal(moved[1], y[1])


def test_a_token_that_no_expert_takes_gets_zeros_and_another_token_can_take_its_place():
    """An output depends on the other tokens of its sample."""
    moe, x = layer(capacity=0.5), tokens(1, 16)
    y = moe(x, LAYOUT)
    idle = ~y[0].any(-1)
    assert 0 < idle.sum() < 16
    notes: dict[str, Tensor] = {}
    moe(x, Layout((1, 1, 1), notes=notes))
    assert notes[f"it.{IDLE}"].item() == idle.double().mean() and torch.equal(
        notes["it.loads"], torch.full((1, E), 1 / E)
    )
    fewer = moe(x[:, idle], LAYOUT)
    assert fewer.any()  # without the others it is chosen


def test_gates_are_not_divided_by_their_sum_and_the_router_learns_from_what_is_chosen_alone():
    """Oracle 10: an expert's gate on a token that it does not take has no gradient."""
    moe, x = layer(), tokens(1, 8)
    p = probabilities(moe, x).detach().requires_grad_()
    gates, chosen = p.transpose(1, 2).topk(moe.taken(8), -1)
    y = outputs(moe, x)[0].transpose(0, 1).gather(1, chosen[0][..., None].expand(-1, -1, D))  # E k d
    (gates[0][..., None] * y).sum().backward()
    taken = torch.zeros_like(p).scatter(1, chosen.transpose(1, 2), 1.0)
    assert (p.grad != 0).equal(taken.bool())
    torch.testing.assert_close(moe(x, LAYOUT).sum().item(), (gates[0][..., None] * y).sum().item())


def test_rows_are_by_expert_and_sums_are_in_the_tokens_order():
    chosen = torch.tensor([[[2, 0], [2, 1]], [[0, 1], [1, 0]]])  # b E k, of samples of three tokens
    rows = rows_of(chosen, 3)
    assert rows.tokens.tolist() == [2, 0, 3, 4, 2, 1, 4, 3]  # expert 0 of both samples, expert 1 of both
    assert rows.order.tolist() == [1, 5, 0, 4, 2, 7, 3, 6] and rows.starts.tolist() == [0, 1, 2, 4, 6, 8]


def test_no_loop_over_experts_and_work_of_its_capacity_alone():
    def macs(experts: int, t: int) -> float:
        moe, x = layer(experts), tokens(t=t)
        with Flops() as counter, torch.no_grad():
            moe(x, LAYOUT)
        return counter.total / 2 - 3 * t * D * experts  # of the router

    assert macs(4, 16) == macs(8, 16) == 3 * 16 * 2.0 * 2 * D * H
    assert macs(4, 32) == 2 * macs(4, 16)


# ---- the edit --------------------------------------------------------------------------------------------------------


def applied(name: str, **options) -> Denoiser:
    torch.manual_seed(0)
    return edit.apply(BACKBONES[name].build(), {"moe": ExpertChoice(**{"experts": 4, **options})})


def test_every_second_unit_has_experts_and_the_last_one_never():
    def places(depth: int, **options) -> list[int]:
        with torch.device("meta"):
            denoiser = type(BACKBONES["dit"])(input_size=8, hidden_size=32, depth=depth, num_heads=4).build()
            edit.apply(denoiser, {"moe": ExpertChoice(**options)}, fresh=False)
        return [i for i, unit in enumerate(denoiser.units) if "ffn" in unit.slots]

    assert places(28) == list(range(1, 27, 2)) and places(7) == [1, 3, 5] and places(3) == [1]
    assert places(7, every=3) == [2, 5] and places(6, every=3) == [2] and places(4, units=(0, 3)) == [0, 3]
    with pytest.raises(ValueError, match="every=2 leaves none of the 2 units .*: list some in units"):
        places(2)


def test_experts_are_drawn_by_depth():
    denoiser = applied("sd3", units=(0, 2))
    for i, moe in ((0, denoiser.edits["moe"]["0"]), (2, denoiser.edits["moe"]["2"])):
        assert moe.experts.into.std().item() == pytest.approx(0.02, rel=0.03)
        assert moe.experts.out.std().item() == pytest.approx(0.02 / (2 * (i + 1)) ** 0.5, rel=0.03)
        assert moe.router.weight.abs().max() <= (6 / (4 + 64)) ** 0.5


@pytest.mark.parametrize("name", ["micro_dit", "sd3", "qwen_image", "flux"])
def test_text_streams_and_fused_units_stay_dense(name):
    denoiser = applied(name)
    filled = {i: sorted(unit.filled) for i, unit in enumerate(denoiser.units) if unit.filled}
    assert filled == {1: ["ffn"]}
    whole = family(name)
    x, t, condition = inputs(denoiser)
    out = denoiser.double()(x, t, condition)
    assert out.sample.shape == whole(x, t, condition).sample.shape and f"moe.1.{IDLE}" in out.trace
    assert denoiser.applied["moe"].loads(out.trace)["1"].shape == (2, 4)
    assert 0 <= denoiser.applied["moe"].metrics(out.trace)[IDLE] < 1
    assert not denoiser.applied["moe"].losses(out.trace)
    with pytest.raises(ValueError, match=r"unit 2 of this flux has one output layer .*: list others in units"):
        applied("flux", units=(2,))


def test_what_it_says_of_parameters_is_true():
    denoiser = applied("micro_dit")
    names = {n for n, _ in denoiser.named_parameters()}
    assert not {n for n in names if n.startswith("model.blocks.1.mlp.")}
    experts = [p for n, p in denoiser.named_parameters() if ".experts." in n]
    assert len(experts) == 2 and {g.kind for g in grouped(denoiser).values()} == {"stack"}
    idle = sum(p.numel() for p in experts) // 2  # two of four
    assert per_token(denoiser) == sum(p.numel() for p in denoiser.parameters()) - idle
    assert denoiser.applied["moe"].shards(denoiser) == [denoiser.edits["moe"]["1"]]


def test_experts_can_be_put_into_a_unit_that_is_in_no_backbone():
    """As a patch mixer does."""
    unit = family("micro_dit").units[0]
    moe = put(unit, "mixer.0", 96, 4, 2.0, 0.01)
    assert unit.slots.ffn is moe and moe.experts.into.shape == (4, 96, 64)
    assert moe.experts.into.dtype == torch.float64 and moe.router.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="another edit replaced the feed-forward"):
        put(unit, "again", 96, 4, 2.0, 0.01)


def test_caches_of_single_tokens_are_refused_on_either_side():
    for edits in ({"moe": ExpertChoice(), "toca": ToCa()}, {"toca": ToCa(), "moe": ExpertChoice()}):
        with pytest.raises(ValueError, match="cannot be applied together with"):
            edit.apply(family("micro_dit"), edits)
    with pytest.raises(ValueError, match="cannot have 9 of 8 experts: choose capacity up to experts"):
        ExpertChoice(capacity=9.0)
