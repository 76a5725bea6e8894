"""Oracles 1 to 9 of methods/switch-dit.md, and Switch-DiT as an edit."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from families import CONFIGS, family, inputs
from ranks import run_ranks
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from weights import randomise

import edit
from edit.backbones.dit import DiTConfig
from edit.denoiser import Denoiser
from edit.edits import grouped, per_token, shards
from edit.measuring.flops import Flops
from edit.moe.switch_dit import AGREEMENT, CHOSEN, PRIOR, P, SwitchDiT, Switched, gate_table
from edit.moe.switch_experts import Experts, SwitchExperts
from edit.moe.switch_prior import divergence, matching, shared, starts, top, window
from edit.objectives import DDPM
from edit.pruning.depth import DepthPruning
from edit.pruning.modulation import ModulationApproximator
from edit.pruning.tinyfusion import TinyFusion
from edit.routing.dydit import DyDiT
from edit.routing.elastic import Elastic
from edit.stream import Step, Stream
from edit.unit import Unit
from recipes.export import main as export

TIMES = torch.arange(1000)


def own_of(denoiser: Denoiser) -> SwitchExperts:
    own = denoiser.edits["switch"]
    assert isinstance(own, SwitchExperts)
    return own


def switched(denoiser: Denoiser, still: bool = False, **options) -> Denoiser:
    """With gates that differ between times and, unless they stay zero, experts."""
    edit.apply(denoiser, {"switch": SwitchDiT(**options)})
    own, g = own_of(denoiser), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in own.router.parameters() if still else own.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return denoiser


def small(**options) -> Denoiser:
    """A DiT of 16 tokens, 16 wide, with 3 units, and random weights."""
    options = {"input_size": 8, "hidden_size": 16, "depth": 3, "num_heads": 2, "num_classes": 10, **options}
    torch.manual_seed(0)
    denoiser = DiTConfig(**options).build()
    randomise(denoiser)
    return denoiser.eval()


def batch(count: int = 4, size: int = 8) -> tuple:
    return inputs_of(small(input_size=size), count)


def inputs_of(denoiser: Denoiser, count: int) -> tuple:
    x, t, condition = inputs(denoiser, count)
    return x.float(), torch.linspace(0.05, 0.95, count), condition


def stepped(t: Tensor) -> Step:
    return Step(0, 1, float(t[0]))


def close(a: Tensor, b: Tensor, share: float = 1e-12) -> None:
    assert (a - b).abs().max() <= share * b.abs().max().clamp_min(1e-30)


# ---- 1, 2: the unit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("training", [False, True])
def test_without_experts_it_is_the_plain_model_bit_by_bit_whatever_the_gates(name, training):
    plain, given = family(name), inputs(family(name))
    net = switched(family(name), still=True)
    out, wanted = net.train(training)(*given), plain.train(training)(*given)
    assert torch.equal(out.sample, wanted.sample)
    assert len(out.trace[CHOSEN].unique()) > 3
    with torch.no_grad():
        for step in (stepped(given[1]), None):
            assert torch.equal(net.eval()(*given, step=step).sample, plain.eval()(*given).sample)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_branches_read_the_masked_stream_and_are_added_to_the_stream_as_it_was(name):
    net = switched(family(name))
    stream = net.embed(**net.pack(*inputs(net)))
    p = own_of(net).gates(stream.time)
    fused = []
    for i, unit in enumerate(net.units):
        assert isinstance(unit, Switched) and isinstance(unit.unit, Unit)
        experts, g = own_of(net).experts[i], top(p[:, i], 2)
        assert (g > 0).sum(1).tolist() == [2, 2] and (p[:, i].sum(1) - 1).abs().max() < 1e-6
        stream = stream_in_double(stream)

        def mask(x: Tensor, experts=experts, g=g) -> Tensor:  # as it is written: over experts, one after the other
            parts = [g[:, e, None, None] * (x @ experts.weight[e] + experts.bias[e]) for e in range(3)]
            return 1 + sum(parts)

        m = mask(stream.image)
        both = unit.whole and stream.text is not None
        read = replace(stream, image=stream.image * m, text=stream.text * mask(stream.text) if both else stream.text)
        after, inside = unit(stream.record(CHOSEN, torch.stack([g] * (i + 1), 1))), unit.unit(read)
        close(after.image - stream.image, inside.image - read.image, 1e-7)
        close(after.image, inside.image + (1 - m) * stream.image, 1e-7)
        assert (m - 1).abs().max() > 0.1
        assert (inside.text is None) == (after.text is None)
        if both and inside.text is not None:
            close(after.text - stream.text, inside.text - read.text, 1e-7)
        elif inside.text is not None:
            close(after.text, inside.text, 1e-7)  # text was not masked
        fused.append(both)
        stream = replace(after, trace={})
    assert any(fused) == (name == "flux")  # its single units


def stream_in_double(stream: Stream) -> Stream:
    parts = {name: getattr(stream, name) for name in ("image", "text", "cond", "time", "signal")}
    return replace(stream, **{k: None if v is None else v.double() for k, v in parts.items()})


# ---- 3: the prior ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units, experts, active", [(12, 3, 2), (28, 3, 2), (4, 3, 1), (2, 5, 2), (3, 4, 4), (1, 4, 3)])
def test_the_prior_is_a_window_that_moves_from_the_first_column_to_the_last(units, experts, active):
    size = (units, experts, active)
    pi, s = window(TIMES, torch.arange(units * experts), *size), starts(TIMES, *size)
    assert pi.shape == (1000, units * experts) and (pi.sum(1) == units * active).all()
    assert pi.all(0).sum() == max(0, units * (2 * active - experts))
    assert s[0] == 0 and s[-1] == units * (experts - active) and (s.diff() >= 0).all() and (s.diff() <= 1).all()
    assert pi[0, : units * active].all() and pi[-1, -units * active :].all()


def test_of_twelve_units_the_window_of_24_columns_first_moves_at_452():
    pi, s = window(TIMES, torch.arange(36), 12, 3, 2), starts(TIMES, 12, 3, 2)
    assert pi.shape[1] == 36 and pi[0].sum() == 24 and (s > 0).nonzero()[0] == 452
    assert s.tolist() == [round((n / 999) ** 4 * 12) for n in range(1000)]
    assert pi.all(0).nonzero().flatten().tolist() == list(range(12, 24))


# ---- 4: the divergence -----------------------------------------------------------------------------------------------


def test_the_divergence_is_nothing_of_equals_and_log_2_of_strangers():
    u = torch.tensor([[0.5, 0.5, 0, 0], [0.1, 0.2, 0.3, 0.4]])
    assert divergence(u, u).abs().max() < 1e-7
    apart = divergence(u[:1], torch.tensor([[0, 0, 0.2, 0.8]]))
    assert apart.item() == pytest.approx(math.log(2), abs=1e-5)  # EPS inside of logarithms
    v = torch.tensor([[0.25, 0.25, 0.5, 0], [0.4, 0.3, 0.2, 0.1]])
    z = (u + v) / 2
    known = [sum((a * (a / c).log()).item() for a, c in zip(w, y, strict=True) if a > 0) for w, y in pairs(u, v, z)]
    assert divergence(u, v).tolist() == pytest.approx([sum(known[:2]) / 2, sum(known[2:]) / 2], abs=1e-5)
    assert torch.equal(divergence(u, v), divergence(v, u))


def pairs(u: Tensor, v: Tensor, z: Tensor) -> list:
    return [(w, y) for a, b, y in zip(u, v, z, strict=True) for w in (a, b)]


def test_uniform_gates_are_at_0_1323_from_a_window_of_two_thirds_whatever_is_matched():
    net = edit.apply(small(depth=12), {"switch": SwitchDiT()}).train()
    own = own_of(net)
    torch.nn.init.zeros_(own.router.weight)
    for sigma in (torch.arange(36), torch.randperm(36)):
        own.sigma.copy_(sigma)
        trace = net(*inputs_of(net, 3)).trace
        assert trace[PRIOR].sum(1).tolist() == pytest.approx([1, 1, 1])
        losses = net.applied["switch"].losses(trace)
        assert losses["prior"].tolist() == pytest.approx([0.1323] * 3, abs=5e-5)
    doubled = SwitchDiT(weight=2.0).losses(trace)["prior"]
    assert torch.equal(doubled, 2 * losses["prior"])


# ---- 5: the matching -------------------------------------------------------------------------------------------------


def test_the_matching_finds_any_permutation_of_the_prior_at_no_cost():
    pi = window(TIMES, torch.arange(36), 12, 3, 2).double()
    for seed in range(3):
        order = torch.randperm(36, generator=torch.Generator().manual_seed(seed))
        q = pi[:, order]
        cost = (q[:, :, None] - pi[:, None, :]).abs().sum(0)
        sigma = matching(cost, seed, 5)
        assert sigma.sort().values.tolist() == list(range(36)) and cost[torch.arange(36), sigma].sum() == 0
        assert torch.equal(pi[:, sigma], q)
        u = torch.rand(1000, 36, generator=torch.Generator().manual_seed(9)).softmax(1)
        straight = divergence(u, pi / 24)
        assert torch.allclose(divergence(u[:, order], pi[:, sigma] / 24), straight, atol=1e-6)


def test_ties_are_settled_by_seed_and_step_alone():
    cost = torch.zeros(8, 8)
    drawn = [matching(cost, seed, step).tolist() for seed, step in ((0, 1), (0, 2), (1, 1), (0, 1))]
    assert drawn[0] == drawn[3] and len({tuple(d) for d in drawn}) == 3
    best = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    assert len({tuple(matching(best, 0, step).tolist()) for step in range(5)}) == 1  # without ties it is the same


@pytest.mark.parametrize("time", ["flow", "ddpm"])
def test_a_step_matches_the_present_choices_which_then_lose_nothing(time, monkeypatch):
    net = edit.apply(small(depth=1, time=time, learn_sigma=True), {"switch": SwitchDiT(experts=4)}).train()
    own, order = own_of(net), torch.tensor([2, 0, 3, 1])
    wanted = window(TIMES, order, 1, 4, 2)  # of one unit each row is a choice of k
    monkeypatch.setattr(own, "table", lambda: (0.1 + wanted).div(2.4)[:, None])
    x, t, condition = inputs_of(net, 4)
    net(x, t, condition)
    assert own.sigma.tolist() == [0, 1, 2, 3]  # nobody has begun a step
    net.applied["switch"].advance(0.0, own)
    trace = net(x, t, condition).trace
    assert torch.equal(window(TIMES, own.sigma, 1, 4, 2), wanted)
    assert torch.equal(trace[PRIOR] * 2, wanted[own.bins(t)].float())
    assert divergence(trace[PRIOR], wanted[own.bins(t)] / 2).max() < 1e-6


def test_costs_are_distances_of_columns(monkeypatch):
    net = switched(small())
    own, seen = own_of(net), []
    monkeypatch.setattr("edit.moe.switch_experts.matching", lambda cost, *_: seen.append(cost) or torch.arange(9))
    with torch.autocast("cpu", torch.bfloat16):  # which would round counts above 256
        own.match()
    q = (top(own.table(), 2) > 0).flatten(1).int()
    pi = window(TIMES, torch.arange(9), 3, 3, 2).int()
    assert torch.equal(seen[0], (q[:, :, None] - pi[:, None]).abs().sum(0).double()) and seen[0].max() > 256


# ---- 6: merged and stacked -------------------------------------------------------------------------------------------


def test_merged_and_stacked_experts_are_the_sum_of_the_experts_in_outputs_and_gradients():
    bank = Experts(16, 5).double()
    randomise(bank)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 16, generator=g, dtype=torch.float64)
    gates = top(torch.rand(3, 5, generator=g, dtype=torch.float64), 2)
    upstream = torch.randn(3, 4, 16, generator=g, dtype=torch.float64)

    def defined(x: Tensor, gates: Tensor) -> Tensor:
        return sum(gates[:, e, None, None] * (x @ bank.weight[e] + bank.bias[e]) for e in range(5))

    found = []
    for way in (defined, bank.merged, bank.stacked, bank):
        given = [v.clone().requires_grad_() for v in (x, gates)]
        bank.zero_grad()
        out = way(*given)
        (out * upstream).sum().backward()
        found.append([out, *(v.grad for v in given), bank.weight.grad.clone(), bank.bias.grad.clone()])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            close(a, b)
    one = bank(x, gates[:1])
    close(one, bank.merged(x, gates[:1].expand(3, -1)))


def test_of_few_tokens_experts_are_stacked_and_of_many_merged(monkeypatch):
    ways = []
    monkeypatch.setattr(Experts, "merged", lambda self, x, g: ways.append("merged") or x)
    monkeypatch.setattr(Experts, "stacked", lambda self, x, g: ways.append("stacked") or x)
    bank = Experts(96, 3)
    for tokens, count in ((4, 2), (3, 2), (3, 1)):
        bank(torch.zeros(2, tokens, 96), torch.zeros(count, 3))
    assert ways == ["merged", "stacked", "merged"]


@torch.no_grad()
def test_a_generation_pays_one_matrix_for_all_samples_whatever_k_and_m_are():
    (x, t, condition), b, n, d, u = batch(3), 3, 16, 16, 3
    t = torch.full_like(t, 0.4)
    counted = {}
    for m, k in ((3, 2), (4, 3), (8, 1)):
        net = switched(small(), experts=m, active=k)
        with Flops() as counter:
            made = net(x, t, condition, step=stepped(t)).sample
        counted[m] = counter.total // 2
        # another order of sums
        torch.testing.assert_close(made, net(x, t, condition).sample, rtol=1e-4, atol=1e-5)
        with Flops() as counter:
            small()(x, t, condition)
        once = u * (m * d * d + m * d) + b * d * u * m  # merging, and the gates
        assert counted[m] == counter.total // 2 + b * n * u * d * d + once


# ---- 7: what gates read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_gates_depend_on_the_time_alone(name):
    net = switched(family(name))
    x, _, condition = inputs(net, 3)
    t = torch.tensor([0.3, 0.3, 0.9]).double()
    first = net(x, t, condition).trace
    assert torch.equal(first[P][0], first[P][1]) and not torch.equal(first[P][0], first[P][2])
    other = condition.map(lambda v: v.flip(0) + 1 if v.is_floating_point() else (v + 5) % 10)
    again = net(x.flip(0) * 2, t, other).trace
    assert torch.equal(again[P], first[P]) and torch.equal(again[CHOSEN], first[CHOSEN])


@torch.no_grad()
def test_gates_are_a_softmax_over_the_experts_of_each_unit_and_drawn_for_each_alone():
    net = edit.apply(small(hidden_size=64, num_heads=4), {"switch": SwitchDiT()})
    own, (x, t, condition) = own_of(net), batch()
    e = net.model.t_embedder(t)
    for i in range(3):
        w, c = own.router.weight[3 * i : 3 * i + 3], own.router.bias[3 * i : 3 * i + 3]
        assert 0.97 < w.abs().max() / math.sqrt(6 / (64 + 3)) < 1  # of all nine rows together: at most 0.96
        assert not c.any()
        c.copy_(torch.tensor([0.5, -0.5, 0.0]))
        p = (e / (1 + (-e).exp()) @ w.T + c).softmax(1)
        out = net(x, t, condition)
        torch.testing.assert_close(out.trace[P][:, i], p)
        for row, kept in zip(p, out.trace[CHOSEN][:, i], strict=True):  # the two largest, as they are
            assert kept.tolist() == pytest.approx([v if v > row.min() else 0.0 for v in row.tolist()], abs=1e-6)


@pytest.mark.parametrize("time", ["flow", "sit", "ddpm"])
@torch.no_grad()
def test_the_table_is_what_a_forward_decides_at_each_time(time):
    net = switched(small(time=time, learn_sigma=True))
    own, table = own_of(net), gate_table(net)
    assert table.shape == (1000, 3, 3) and (table.sum(2) - 1).abs().max() < 1e-6
    n = torch.tensor([0, 1, 451, 998, 999])
    t = (n + 1) / 1000 if time == "ddpm" else (n + 0.5) / 1000
    x, _, condition = inputs_of(net, 5)
    out = net(x, t, condition)
    torch.testing.assert_close(out.trace[P], table[n], rtol=1e-5, atol=1e-6)  # rows of another product
    assert own.bins(t).tolist() == n.tolist()


def test_times_fall_into_bins_of_a_thousandth_and_steps_of_ddpm_are_their_own():
    flow, steps = (own_of(switched(small(time=time, learn_sigma=True))) for time in ("flow", "ddpm"))
    assert flow.bins(torch.tensor([0.0, 0.00099, 0.0011, 0.5004, 0.9999, 1.0])).tolist() == [0, 0, 1, 500, 999, 999]
    t = DDPM().times((TIMES + 0.5) / 1000)
    assert torch.equal(steps.bins(t), TIMES) and steps.bins(torch.zeros(1)).tolist() == [0]


def test_without_experts_of_the_time_there_is_no_table():
    with pytest.raises(ValueError, match="this dit has no gates over times: apply SwitchDiT first"):
        gate_table(small())


# ---- 8: gradients ----------------------------------------------------------------------------------------------------


def test_at_first_gates_learn_from_the_prior_alone_and_experts_once_branches_are_open():
    net = DiTConfig(input_size=8, hidden_size=16, depth=2, num_heads=2, num_classes=10).build().train()
    randomise(net.model.final_layer)  # what is read out, so that units have a gradient
    edit.apply(net, {"switch": SwitchDiT()})
    own, new, given = own_of(net), net.applied["switch"], inputs_of(net, 3)

    def gradients(prior: bool) -> tuple[float, float]:
        net.zero_grad()
        out = net(*given)
        loss = new.losses(out.trace)["prior"].mean() if prior else out.sample.square().mean()
        loss.backward()
        found = ([p.grad for p in part.parameters()] for part in (own.router, own.experts))
        return tuple(max(0.0 if g is None else g.abs().max().item() for g in grads) for grads in found)

    assert gradients(prior=False) == (0, 0)  # adaLN-zero: no unit adds anything
    gate, experts = gradients(prior=True)
    assert gate > 0 and experts == 0
    for block in net.model.blocks:
        randomise(block.adaLN_modulation)
    gate, experts = gradients(prior=False)
    assert gate == 0 and experts > 0  # experts are zero: a gate changes nothing
    randomise(own.experts)
    assert min(gradients(prior=False)) > 0


def test_the_prior_trains_the_embedding_of_times_and_all_gates():
    net = edit.apply(small(), {"switch": SwitchDiT()}).train()
    net.applied["switch"].losses(net(*batch()).trace)["prior"].mean().backward()
    assert all(p.grad.abs().max() > 0 for p in (*own_of(net).router.parameters(), *net.model.t_embedder.parameters()))
    assert all(p.grad is None for p in net.model.blocks.parameters())


# ---- 9: sizes --------------------------------------------------------------------------------------------------------

SIZES = {  # width, units, heads, and the increment in millions that is published
    "S": (384, 12, 6, 5.3),
    "B": (768, 12, 12, 21.3),
    "L": (1024, 24, 16, 75.6),
    "XL": (1152, 28, 16, 111.7),
}


@pytest.mark.parametrize("size", SIZES)
def test_the_published_sizes_have_the_parameters_that_they_are_said_to_have(size):
    d, u, heads, millions = SIZES[size]
    with torch.device("meta"):
        plain = DiTConfig(hidden_size=d, depth=u, num_heads=heads, learn_sigma=True, time="ddpm").build()
        count = sum(p.numel() for p in plain.parameters())
        net = edit.apply(plain, {"switch": SwitchDiT()}, fresh=False)
    more = sum(p.numel() for p in net.parameters()) - count
    assert more == u * (3 * (d * d + d) + 3 * (d + 1))
    assert more / 1e6 == pytest.approx(millions, abs=0.1)
    experts = u * 3 * (d * d + d)
    assert per_token(net) == count + more - experts / 3  # two of three
    if size == "B":  # "144M vs 131M" in DiT-MoE's paper
        assert per_token(net) / 1e6 == pytest.approx(144.5, abs=0.5)


# ---- steps, resuming, ranks ------------------------------------------------------------------------------------------


def step(net: Denoiser, number: int, optimizer: torch.optim.Optimizer, micro: int = 1) -> float:
    """One of ten training steps, in micro-batches."""
    new, own = net.applied["switch"], own_of(net)
    for i in range(micro):
        new.advance(number / 10, own)
        x, t, condition = inputs_of(net, 2)
        out = net(x + i, t, condition)
        loss = out.sample.square().mean() + new.losses(out.trace)["prior"].mean()
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def test_a_matching_is_made_once_a_step_or_every_so_many(monkeypatch):
    plain, made = SwitchExperts.match, []
    monkeypatch.setattr(SwitchExperts, "match", lambda self: made.append(self.done) or plain(self))
    for every, micro, wanted in ((1, 1, [1, 2, 3, 4, 5]), (1, 2, [1, 2, 3, 4, 5]), (2, 2, [1, 3, 5])):
        net = switched(small(), every=every).train()
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        made.clear()
        for number in range(5):
            step(net, number, optimizer, micro)
        assert made == wanted and own_of(net).steps == 5
        net.eval()(*batch())
        assert made == wanted


def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit():
    net = switched(small(), every=2).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    for number in range(3):
        step(net, number, optimizer)
    kept = deepcopy(net.state_dict())
    other = edit.apply(small(), {"switch": SwitchDiT(every=2)}).train()
    step(other, 0, torch.optim.SGD(other.parameters(), 0.5))  # a run of its own, before it is given the weights
    other.load_state_dict(kept)
    assert torch.equal(own_of(other).sigma, own_of(net).sigma) and own_of(other).steps == 3
    again = torch.optim.SGD(other.parameters(), 0.5)
    seen = []
    for number in range(3, 7):
        assert step(net, number, optimizer) == step(other, number, again)
        seen.append(own_of(net).sigma.tolist())
        assert own_of(other).sigma.tolist() == seen[-1]
    assert len({tuple(sigma) for sigma in seen}) > 1  # the matching moves
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_copy_reads_its_own_times():
    net = switched(small())
    twin = deepcopy(net)
    with torch.no_grad():
        randomise(twin.model.t_embedder, 5)
    assert own_of(twin).embed_times.__self__ is twin
    assert not torch.equal(gate_table(twin), gate_table(net))


def sharded_training() -> tuple:
    dist.init_process_group("gloo")
    net = switched(small()).train()
    own, new = own_of(net), net.applied["switch"]
    for module in (*(unit.unit for unit in net.units), *shards(net)):
        fully_shard(module)
    fully_shard(net)
    new.advance(0.0, own)
    out = net(*batch())
    (out.sample.square().mean() + new.losses(out.trace)["prior"].mean()).backward()
    grads = {n: p.grad.full_tensor().numpy() for n, p in own.named_parameters()}
    dist.destroy_process_group()
    return out.sample.detach().numpy(), own.sigma.tolist(), grads


def test_two_ranks_that_share_the_weights_find_one_matching_and_the_gradients_of_one():
    net = switched(small()).train()
    own, new = own_of(net), net.applied["switch"]
    new.advance(0.0, own)
    out = net(*batch())
    (out.sample.square().mean() + new.losses(out.trace)["prior"].mean()).backward()
    assert own.sigma.tolist() != list(range(9))
    for sample, sigma, grads in run_ranks(sharded_training):
        torch.testing.assert_close(torch.tensor(sample), out.sample.detach())
        assert sigma == own.sigma.tolist()
        for name, p in own.named_parameters():
            torch.testing.assert_close(torch.tensor(grads[name]), p.grad, rtol=1e-4, atol=1e-6)


# ---- reports ---------------------------------------------------------------------------------------------------------


def test_neighbours_share_experts_as_far_as_the_table_says():
    net = switched(small(time="ddpm", learn_sigma=True)).train()
    own, new = own_of(net), net.applied["switch"]
    new.advance(0.0, own)
    trace = net(*batch()).trace
    chosen = [[set(row.topk(2).indices.tolist()) for row in times] for times in gate_table(net)]
    for name, apart in (("near", 1), ("far", 500)):
        both = zip(chosen, chosen[apart:], strict=False)
        wanted = [len(a & b) / 2 for one, other in both for a, b in zip(one, other, strict=True)]
        assert new.metrics(trace)[name].item() == pytest.approx(sum(wanted) / len(wanted), abs=1e-6)
    assert 0.5 <= new.metrics(trace)["far"] < new.metrics(trace)["near"] <= 1
    assert torch.equal(trace[AGREEMENT], own.agreement) and new.metrics({}) == new.losses({}) == {}
    alike = torch.tensor([[[1.0, 1, 0]], [[1, 0, 1]], [[0, 1, 1]]])
    assert shared(alike, 2, 1) == shared(alike, 2, 2) == 0.5


@torch.no_grad()
def test_decisions_tell_whom_each_expert_serves():
    net = switched(small(), experts=4, active=3)
    out = net(*batch())
    told = net.applied["switch"].decisions(out.trace)
    assert list(told) == [f"expert {i}" for i in range(4)] == list(net.applied["switch"].decides)
    assert all(v.shape == (3, 4) and set(v.unique().tolist()) <= {0.0, 1.0} for v in told.values())
    assert (sum(told.values()) == 3).all()
    for i, v in enumerate(told.values()):
        assert torch.equal(v.T.bool(), out.trace[CHOSEN][:, :, i] > 0)


# ---- as an edit ------------------------------------------------------------------------------------------------------


def test_a_forward_in_training_and_in_a_generation_never_waits_for_the_device():
    with torch.device("meta"):  # which has no values to read
        net = edit.apply(small_config().build(), {"switch": SwitchDiT()}, fresh=False)
        x, t = torch.zeros(2, 4, 8, 8), torch.zeros(2)
        condition = net.example(2).map(lambda v: v.to("meta"))
        trained = net.train()(x, t, condition)
        net.applied["switch"].losses(trained.trace)["prior"].mean().backward()
        net.eval()(x, t, condition, step=Step(0, 1, 0.5))


def small_config() -> DiTConfig:
    return DiTConfig(input_size=8, hidden_size=16, depth=3, num_heads=2, num_classes=10)


def test_stacked_experts_are_told_to_optimisers_and_each_bank_is_gathered_for_its_own_call():
    net = switched(small())
    assert {k: g.kind for k, g in grouped(net).items()} == {
        f"edits.switch.experts.{i}.weight": "stack" for i in range(3)
    }
    assert shards(net) == list(own_of(net).experts)[::-1]


def test_gates_are_in_fp32_in_a_model_of_half_precision():
    net = switched(small().bfloat16())
    own = own_of(net)
    assert own.router.weight.dtype == torch.float32 and own.experts[0].weight.dtype == torch.bfloat16
    x, t, condition = batch()
    out = net.train()(x.bfloat16(), t, condition)
    assert out.sample.dtype == torch.bfloat16 and out.trace[P].dtype == torch.float32


@pytest.mark.parametrize(
    "options, said",
    [
        ({"active": 4}, "SwitchDiT: active is a number of experts, at most all 3, got 4: lower it, or raise experts"),
        ({"experts": 0}, "SwitchDiT: experts must be at least 1, got 0; the default is 3"),
        ({"active": 0}, "SwitchDiT: active must be at least 1, got 0; the default is 2"),
        ({"weight": -1.0}, "SwitchDiT: weight must be at least 0, got -1.0; the default is 1.0"),
        ({"every": 0}, "SwitchDiT: every must be at least 1, got 0; the default is 1"),
    ],
)
def test_impossible_numbers_are_refused_in_one_sentence(options, said):
    with pytest.raises(ValueError) as error:
        SwitchDiT(**options)
    assert str(error.value) == said


def test_a_family_that_embeds_no_times_alone_is_refused_and_stays_as_it_was(monkeypatch):
    net = small()
    monkeypatch.setattr(type(net), "embed_times", Denoiser.embed_times)
    with pytest.raises(
        ValueError, match="^SwitchDiT: gates read the embedded time, and this dit embeds no times alone: "
    ):
        edit.apply(net, {"switch": SwitchDiT()})
    assert all(isinstance(unit, Unit) for unit in net.units) and not net.applied


@pytest.mark.parametrize("other", [SwitchDiT(), DyDiT(), Elastic(), TinyFusion(), DepthPruning()])
@pytest.mark.parametrize("first", [True, False])
def test_it_does_not_live_with_what_changes_the_list_of_units(other, first):
    new = {"switch": SwitchDiT(), "other": replace(other)}
    with pytest.raises(ValueError, match=r"cannot be applied together with .*: remove one of them$"):
        edit.apply(small(depth=4), new if first else dict(reversed(new.items())))


def test_compressed_modulation_has_no_time_for_it(make_flux):
    net = edit.apply(make_flux(), {"modulation": ModulationApproximator(depth=1, hidden=8, steps=0)})
    with pytest.raises(ValueError, match=r"cannot be applied together with modulation \(ModulationApproximator\)"):
        edit.apply(net, {"switch": SwitchDiT()})


def test_a_stranger_in_the_list_of_units_is_named():
    net = small()
    net.units[1] = lambda stream: stream
    with pytest.raises(ValueError, match="a function stands in place of a unit and is no edit.unit.Wrapper: wrap the"):
        edit.apply(net, {"switch": SwitchDiT()})


def test_units_without_the_forward_around_them_say_so():
    net = switched(small())
    with pytest.raises(RuntimeError, match="SwitchDiT: units were run without the denoiser's forward, which decides"):
        net.units[0](net.embed(**net.pack(*batch())))


@torch.no_grad()
def test_it_is_given_to_a_pruned_model_whose_pruning_is_folded():
    net = edit.fold(edit.apply(small(depth=4), {"depth": DepthPruning()}))
    assert len(own_of(switched(net)).experts) == 2
    assert net(*batch()).sample.isfinite().all()


def test_stock_diffusers_cannot_express_it_and_an_export_says_so(make_dit, tmp_path, capsys):
    edit.save(edit.apply(make_dit(), {"switch": SwitchDiT()}), tmp_path / "a")
    assert export([f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert "switch" in said and not (tmp_path / "out").exists()


def compiled_units_train_the_same() -> list:
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        net = switched(small()).train()
        for unit in net.units if compiled else ():
            unit.unit.compile(backend="eager", fullgraph=True)
        out = net(*batch())
        out.sample.square().mean().backward()
        found.append([out.sample.detach().numpy(), *(p.grad.numpy() for p in net.parameters() if p.grad is not None)])
    return found


@pytest.mark.slow
def test_compiled_units_train_the_same():
    plain, compiled = run_ranks(compiled_units_train_the_same, 1)[0]  # what has compiled cannot be forked from
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-5, atol=1e-6)
