"""DuCa: turns, random picks, picks by norm, costs. `test_toca` has what both do with tokens, `test_engine` the rest."""

import pytest
import torch
from caches import FEW, branches_of, executed, family, generated, paint, told
from operators import Operators

import edit
from edit.caching.duca import DuCa, norms
from edit.stream import Branch, Layout, Step, Stream
from edit.subset import best
from edit.unit import core


def kinds(interval: int, count: int) -> str:
    return "".join(DuCa(interval).kind(Step(i, count, 0.5))[0] for i in range(count))


def test_between_computed_evaluations_all_is_replayed_and_tokens_renewed_by_turns():
    assert kinds(5, 11) == "crprpcrprpc"
    assert kinds(2, 4) == "crcr" and kinds(1, 3) == "ccc"


def picked(index: int, unit: int = 0, seed: int = 0, count: int = 3) -> torch.Tensor:
    stream = Stream(torch.zeros(count, 16, 1), torch.zeros(1, 1), Layout((1, 4, 4)), step=Step(index, 9, 0.5))
    scores = DuCa(seed=seed).scores(stream, unit, {}, Branch(torch.zeros(count, 16)))
    return best(scores.image, 4)


def test_random_picks_are_those_of_seed_evaluation_and_unit_and_the_same_for_all_samples():
    before = torch.get_rng_state()
    first = picked(2)
    assert torch.equal(first, first[:1].expand_as(first)) and torch.equal(first[:1], picked(2, count=1))
    for other in (picked(4), picked(2, unit=1), picked(2, seed=1)):
        assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before), "no generator is advanced"


def test_in_time_every_token_is_picked():
    seen = torch.cat([picked(i, count=1).flatten() for i in range(40)]).bincount(minlength=16)
    assert seen.min() >= 3 and seen.sum() == 160


def test_text_tokens_are_picked_apart():
    stream = Stream(torch.zeros(2, 16, 1), torch.zeros(1, 1), Layout((1, 4, 4)), step=Step(2, 9, 0.5))
    image, text = DuCa().scores(stream, 0, {}, Branch(torch.zeros(2, 16), torch.zeros(2, 5)))
    assert image.shape == (2, 16) and text.shape == (2, 5)


def test_the_largest_values_are_picked_by_norm():
    v = torch.zeros(1, 2, 4, 3)  # b h s e
    v[0, 0, 2], v[0, 1, 1], v[0, 1, 3] = 1.0, 2.0, 0.5
    found = norms(v, v, v, Layout((1, 2, 2)))
    assert found[0].tolist() == pytest.approx([0, 12**0.5, 3**0.5, 0.75**0.5])
    scores = DuCa(by="norm").scores(None, 0, {"norm": Branch(found)}, Branch(found))
    assert best(scores.image, 2).tolist() == [[1, 2]]


@pytest.mark.parametrize("by", ["random", "norm"])
@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_the_attention_stays_the_fused_kernel_and_nothing_is_chosen_by_a_map(name, by):
    net, plain = family(name, cache=DuCa(3, 0.25, by)), family(name)
    given = torch.randn(2, *net.sample_shape), torch.full((2,), 0.5), told(net)
    seen = []
    for model in (net, plain):
        with Operators() as ops:
            model(*given, step=Step(0, 6, 0.5, memory={}))
        seen.append(ops.seen)
    mine, other = seen
    attention = [op for op in {*mine, *other} if "attention" in op or "softmax" in op]
    assert attention and all(mine[op] == other[op] for op in attention)


@pytest.mark.parametrize("name, by", [("dit", "norm"), ("pixart", "random"), ("flux", "random")])
def test_a_generation_executes_less_by_what_is_repeated_and_by_the_tokens_that_are_not_run(name, by):
    plain, tokens, run = family(name), 16, 4
    if name == "flux":  # five tokens of the text, of which one is run
        tokens, run = tokens + 5, run + 1
    whole, parts = branches_of(plain)
    feed, every = len(plain.units) * parts[0, "feed"], sum(parts.values())  # those of fused units cost as much
    cost = generated(family(name, cache=DuCa(4, 0.25, by)), 4)
    assert cost == 2 * (4 * whole - 3 * every + feed * run // tokens)


def test_fused_units_renew_tokens_of_a_branch_of_their_own():
    rows = executed(family("flux", cache=DuCa(4, 0.25)), 4, "cache")["joint"]
    assert rows == [[1.0] * 4, [0.0] * 4, [0.125] * 4, [0.0] * 4]


def test_units_that_are_not_chosen_always_run():
    net = family("dit", cache=DuCa(4, 0.25, units=(1,)))
    assert "branch" not in core(net.units[0]).slots
    assert executed(net, 3, "cache")["joint"] == [[1.0], [0.0], [0.125]]


def test_settings_that_cannot_be_are_refused(make_dit):
    with pytest.raises(ValueError, match="DuCa: interval must be at least 1, got 0; the default is 5"):
        DuCa(0)
    with pytest.raises(ValueError, match="DuCa: ratio must be at least 0, got -0.1"):
        DuCa(ratio=-0.1)
    with pytest.raises(ValueError, match="DuCa: by must be one of random, norm, got 'map'"):
        DuCa(by="map")
    net = make_dit()
    core(net.units[0]).slots.mixer = lambda stream, tokens: tokens
    with pytest.raises(ValueError, match="DuCa: another edit has filled the slot mixer of unit 0 of this dit, which"):
        edit.apply(net, {"cache": DuCa(by="norm")})
    edit.apply(net, {"cache": DuCa()})


def test_a_picture_does_not_depend_on_its_seeds_neighbours_but_on_the_seed():
    first, again, other = (paint(family("dit", cache=DuCa(3, 0.25, seed=s)), 6) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
