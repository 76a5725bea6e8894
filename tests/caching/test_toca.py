"""ToCa: schedule, scores, which tokens are run and what they cost. `test_engine` has what all caches have in common."""

import pytest
import torch
from caches import FEW, MADE, branches_of, executed, family, generated, paint
from torch.utils._python_dispatch import TorchDispatchMode

import edit
from edit.caching.reuse import Reuse
from edit.caching.toca import ToCa, column_sums, entropies, spread
from edit.stream import Branch, Layout, Step, Stream
from edit.subset import best
from edit.unit import core

ALL = {"ratio": 1.0, "by_unit": 0.0, "by_step": 0.0}  # every token is run


# ---- the schedule ----------------------------------------------------------------------------------------------------


def computed(interval: int, count: int) -> list[int]:
    """Evaluations counted down."""
    steps = [Step(i, count, 0.5) for i in range(count)]
    return [count - 1 - step.index for step in steps if ToCa(interval).kind(step) == "computed"]


def test_intervals_shrink_along_the_generation_and_are_two_where_it_is_sensitive():
    """By hand, of round(4 / (1.4 - 0.8 s / 50)): 6 at 49 and 48, 5 from 42, 4 from 30, 2 from 19 to 10, 3 from 8."""
    assert computed(4, 50) == [49, 48, 42, 40, 35, 30, 28, 24, 20, 16, 14, 12, 10, 8, 6, 3, 0]
    assert [ToCa(4).interval_at(s, 250) for s in (100, 99, 50, 49)] == [4, 2, 2, 3]
    assert computed(1, 6) == [5, 4, 3, 2, 1, 0]


def test_later_units_and_later_evaluations_renew_more():
    """0.07 * 2.5 * (0.8 to 1.2) * (3 - 4 s / T), within 0 and 1."""
    cache, last, first = ToCa(), Step(9, 10, 0.1), Step(0, 10, 1.0)
    assert [cache.share(last, i, 28) for i in (0, 27)] == pytest.approx([0.42, 0.63])
    assert cache.share(Step(4, 10, 0.5), 27, 28) == pytest.approx(0.07 * 2.5 * 1.2)
    assert cache.share(first, 0, 28) == 0 and ToCa(ratio=1.0).share(last, 0, 28) == 1
    assert cache.share(last, 0, 1) == pytest.approx(0.42)


# ---- scores ----------------------------------------------------------------------------------------------------------

G = torch.Generator().manual_seed(0)
Q, K = torch.randn(2, 3, 10, 4, generator=G), torch.randn(2, 3, 10, 4, generator=G)  # b h s e
MAP = (Q @ K.transpose(-1, -2) / 2).softmax(-1)


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("most", [1, 130, 10**6])
def test_column_sums_and_entropies_are_those_of_the_map_which_is_never_whole(most):
    with Largest() as seen:
        sums, entropy = column_sums(Q, K, most=most), entropies(Q, K, most=most)
    torch.testing.assert_close(sums, MAP.sum(2).mean(1))
    mean = MAP.mean(1)
    torch.testing.assert_close(entropy, -(mean * mean.log()).sum(-1))
    whole = MAP.numel()
    assert seen.elements == whole if most > whole else seen.elements <= max(most, Q.numel(), 6 * 10)


def test_keys_that_a_mask_leaves_out_are_read_by_nobody():
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, :4] = False
    sums = column_sums(Q, K, mask)
    assert (sums[1, :4] == 0).all() and (sums[0] > 0).all() and sums.sum(1).tolist() == pytest.approx([10, 10])
    assert entropies(0 * Q, K, mask)[:, 0].exp().tolist() == pytest.approx([10, 6])


def test_the_bonus_spreads_picks_over_the_grid():
    """Scores that fall from one corner: the four best are one block without it, and one of each block with it."""
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    scores = 1.0 - 0.1 * torch.maximum(rows, columns).flatten()[None]  # 1 n
    layout = Layout((1, 4, 4))
    blocks = (rows // 2 * 2 + columns // 2).flatten()
    assert blocks[best(spread(scores, layout, 0.0), 4)[0]].tolist() == [0, 0, 0, 0]
    with_bonus = spread(scores, layout, 0.6)
    assert sorted(blocks[best(with_bonus, 4)[0]].tolist()) == [0, 1, 2, 3]
    order = torch.randperm(16, generator=G)
    assert torch.equal(spread(scores[:, order], Layout((1, 4, 4), permutation=order), 0.6), with_bonus[:, order])


def test_blocks_at_the_edge_and_of_other_frames_have_a_best_token_too_and_registers_none():
    scores = torch.arange(1.0, 19.0)[None]  # 2 frames of 3 x 3
    raised = spread(scores, Layout((2, 3, 3)), 1.0) / scores
    best_of_frame = [False, False, False, False, True, True, False, True, True]  # of 2 x 2, 2 x 1, 1 x 2 and 1 x 1
    assert raised[0].tolist() == [1.0 + float(b) for b in best_of_frame * 2]
    more = torch.cat((torch.tensor([[50.0, 60.0]]), scores, torch.tensor([[70.0]])), 1)
    raised = spread(more, Layout((2, 3, 3), registers=2, further=1), 1.0) / more
    assert raised[0, :2].tolist() == [1, 1] and raised[0, -1] == 1 and raised[0, 2:-1].mean() > 1


def scored(cache: ToCa, read, age, entropy=None) -> torch.Tensor:
    memory = {"read": Branch(torch.tensor([read]))}
    if entropy is not None:
        memory["entropy"] = Branch(torch.tensor([entropy]))
    stream = Stream(torch.zeros(1, 4, 1), torch.zeros(1, 1), Layout((1, 2, 2)))
    return cache.scores(stream, 0, memory, Branch(torch.tensor([age]))).image[0]


def test_a_score_is_the_sum_of_its_parts():
    """Of a block of four, the best is raised."""
    found = scored(ToCa(4, spread=0.0), [3.0, 0.0, 4.0, 0.0], [0.0, 2.0, 0.0, 4.0])
    assert found.tolist() == pytest.approx([0.6, 0.25 * 2 / 4, 0.8, 0.25])
    raised = scored(ToCa(4), [3.0, 0.0, 4.0, 0.0], [0.0, 2.0, 0.0, 4.0])
    assert raised.tolist() == pytest.approx([0.6, 0.125, 1.6 * 0.8, 0.25])
    crossed = scored(ToCa(4, spread=0.0, cross=2.0), [3.0, 0.0, 4.0, 0.0], [0.0] * 4, [0.0, 1.0, 0.0, 0.0])
    assert crossed.tolist() == pytest.approx([0.6, 2.0, 0.8, 0.0])


# ---- what is run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_with_all_tokens_a_partial_evaluation_runs_the_whole_feed_forward_bit_for_bit(name):
    """Attentions alone are repeated, at the same evaluations."""
    toca, reuse = family(name, cache=ToCa(3, **ALL)), family(name)
    for unit in map(core, reuse.units):
        if unit.anatomy.fused:
            unit.slots.ffn = unit.own_ffn
    others = dict.fromkeys(("pixart", "wan", "micro_dit"), ("attention", "cross"))
    others["sd3 dual"] = ("attention", "second")
    edit.apply(reuse, {"cache": Reuse(3, branches=others.get(name, ("attention",)))})
    reuse.applied["cache"].due = lambda step, branch: toca.applied["cache"].kind(step) == "computed"
    images = paint(toca, 7)
    assert torch.equal(images, paint(reuse, 7)) and not torch.equal(images, paint(family(name), 7))


@pytest.mark.parametrize("name", MADE)
@torch.no_grad()
def test_the_best_tokens_are_run_and_the_others_stay(name):
    net, memory = family(name, cache=ToCa(8, ratio=0.1, by_unit=0.0, by_step=0.0)), {}
    cache, branches = net.applied["cache"], []
    for i, unit in enumerate(map(core, net.units)):
        slot = unit.slots.branch

        def spy(stream, branch, run, i=i, slot=slot):
            state = memory.get(("cache", i, "cond"), {}).get(branch)
            old = None if state is None else state["value"]
            out = slot(stream, branch, run)
            branches.append((i, branch, stream, old, out, run(stream)))
            return out

        unit.slots.branch = spy
    x, condition = torch.randn(2, *net.sample_shape, generator=G), net.example(2, text=5)
    for index, t in ((1, 0.6), (2, 0.5)):  # of 20, counted down 18 and 17: the second is partial
        branches.clear()
        net(x + index, torch.full((2,), t), condition, step=Step(index, 20, t, memory=memory))
    assert cache.kind(Step(2, 20, 0.5)) == "partial"
    for i, branch, stream, old, out, dense in branches:
        if branch != "feed":
            assert torch.equal(out.image, old.image), branch
            continue
        for was, now, whole, at in zip(old, out, dense, memory["cache", i, "cond"]["feed"]["run"], strict=True):
            if was is None:
                continue
            changed = (was != now).any(-1)  # b n
            assert changed.sum(1).tolist() == [int(0.25 * was.shape[1])] * 2 and torch.equal(changed, at == 2)
            torch.testing.assert_close(now[changed], whole[changed], rtol=1e-4, atol=1e-5)
        age = Branch(*(None if v is None else v.new_ones(v.shape[:2]) for v in old))
        scores = cache.scores(stream, i, memory["cache", i, "cond"], age)
        found = (old.image != out.image).any(-1).nonzero()[:, 1].reshape(2, -1)
        assert torch.equal(found, best(scores.image, found.shape[1]))


def test_where_age_decides_tokens_are_run_by_turns():
    """A quarter at each of the evaluations 1 to 4, and again from 5 on."""
    net, runs = family("dit", cache=ToCa(8, ratio=0.1, by_unit=0.0, by_step=0.0, age=1e3, spread=0.0)), []
    paint(net, 12, lambda step, out: runs.append(step.memory["cache", 0, "joint"]["feed"]["run"].image))
    assert computed(8, 12) == [11, 0]
    for at, first in ((4, 1), (7, 4)):
        assert all(sorted(row) == [float(first + i // 4) for i in range(16)] for row in runs[at].tolist())


def test_attention_runs_at_computed_evaluations_alone_and_the_feed_forward_on_fewer_tokens_at_the_others():
    net = family("dit", cache=ToCa(4, ratio=0.1, by_unit=0.0, by_step=0.0))
    sizes: dict[str, list[int]] = {"attn.qkv": [], "mlp.fc1": [], "mlp.fc2": []}
    for name, seen in sizes.items():
        core(net.units[0]).get_submodule(name).register_forward_pre_hook(
            lambda m, a, seen=seen: seen.append(a[0].shape[1])
        )
    paint(net, 6)
    assert computed(4, 6) == [5, 0]
    assert sizes == {"attn.qkv": [16, 16], "mlp.fc1": [16, 4, 4, 4, 4, 16], "mlp.fc2": [16, 4, 4, 4, 4, 16]}


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_a_generation_executes_less_by_what_is_repeated_and_by_the_tokens_that_are_not_run(name):
    whole, parts = branches_of(family(name))
    feed = sum(macs for (_, branch), macs in parts.items() if branch == "feed")
    tokens, text, width = 16, 5, 64
    scoring = 2 * tokens * (tokens + (text if name == "pixart" else 0)) * width  # of two units
    cost = generated(family(name, cache=ToCa(4, ratio=0.1, by_unit=0.0, by_step=0.0)), 6)
    repeated = sum(parts.values()) - feed + feed * (tokens - 4) // tokens
    assert cost == 2 * (6 * whole - 4 * repeated + scoring)  # none follows the last


def test_the_executed_part_of_a_unit_is_told():
    rows = executed(family("dit", cache=ToCa(4, ratio=0.1, by_unit=0.0, by_step=0.0)), 6, "cache")["joint"]
    assert rows == [[1.0] * 2] + [[0.125] * 2] * 4 + [[1.0] * 2]  # a quarter of one of two branches
    assert executed(family("sd3 dual", cache=ToCa(1)), 2, "cache")["joint"][0] == [1.0, 1.0]


@pytest.mark.parametrize("name", FEW)
def test_guidance_branches_in_one_batch_and_apart_make_the_same_images(name):
    together, apart = (family(name, cache=ToCa(3, ratio=0.2)) for _ in range(2))
    apart.applied["cache"].separate = True
    wanted = paint(apart, 7)
    # fp32 products of larger batches are summed in another order
    torch.testing.assert_close(paint(together, 7), wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_settings_that_cannot_be_are_refused(make_dit, make_flux):
    with pytest.raises(ValueError, match="ToCa: interval must be at least 1, got 0; the default is 4"):
        ToCa(0)
    with pytest.raises(ValueError, match="ToCa: ratio must be at most 1, got 1.5"):
        ToCa(ratio=1.5)
    with pytest.raises(ValueError, match="ToCa: this dit has units 0 to 2, got 3"):
        edit.apply(make_dit(), {"cache": ToCa(units=(3,))})
    net = edit.apply(make_dit(), {"reuse": Reuse(units=(1,), branches=("feed",))})
    with pytest.raises(ValueError, match="ToCa: 'reuse' caches feed of unit 1 already: choose other"):
        edit.apply(net, {"cache": ToCa()})
    for slot in ("attention", "ffn"):
        net = make_flux()
        setattr(core(net.units[1]).slots, slot, lambda *given: given[0])
        with pytest.raises(ValueError, match=f"ToCa: another edit has filled the slot {slot} of unit 1 of this flux, "):
            edit.apply(net, {"cache": ToCa()})


def test_a_family_whose_feed_forward_may_mix_tokens_is_refused():
    net = family("pixart")
    unit = core(net.units[1])
    unit.ff.net = unit.ff.net[:2]
    assert unit.anatomy.feed is None
    with pytest.raises(ValueError, match="ToCa: the feed-forward of unit 1 of this pixart is not two linear layers"):
        edit.apply(net, {"cache": ToCa()})
