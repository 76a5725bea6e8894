"""The oracles of methods/llsa.md: 1 to 6, 8 and 10; 7 and 9 are those of the kernels."""

import math

import pytest
import torch
import torch.nn.functional as F
from families import BACKBONES, family, inputs
from ranks import run_ranks
from torch import Tensor
from torch.autograd import gradcheck
from weights import randomise

import edit
from benchmarks.llsa_cost import TOKENS, curves, draw, relative, work
from edit.attention.llsa import LLSA, Sparse, deepest, seen_by_images
from edit.attention.orders import morton
from edit.attention.pyramid import pyramid, select
from edit.backbones.dit import DiTConfig
from edit.denoiser import Denoiser
from edit.edits import trains
from edit.kernels.block_sparse import attend
from edit.measuring.cost import macs
from edit.measuring.probe import Probe
from edit.stream import Condition, Layout

ALL = 10**6  # every key of every level
PIXELS = {"input_size": 8, "patch_size": 1, "in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 2}
MODERN = {"rope": True, "qk_norm": True, "qk_rms": True, "num_classes": 3}


def qkv(tokens: int = 64, width: int = 8, heads: int = 2, seed: int = 0, batch: int = 2) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, heads, tokens, width, generator=g, dtype=torch.float64).unbind()


def settings(levels: int, top_k: int, block: int = 4, enrichment: int | None = None, overlap: bool = True) -> LLSA:
    return LLSA(block, top_k, levels, enrichment, overlap, dense_below=0)


def sparse(q: Tensor, k: Tensor, v: Tensor, of: LLSA) -> tuple[Tensor, Tensor]:
    """Without the limit on top_k, which a test of all keys exceeds."""
    assert of.levels is not None
    return attend(q, seen_by_images(q, k, v, of, of.levels), path="plain")


def reference(q: Tensor, k: Tensor, v: Tensor, of: LLSA, weigh: bool = True) -> tuple[Tensor, Tensor]:
    """One softmax over all keys of all levels, with the weight of each for each query, 0 where it is not seen: top down
    over whole rows, as the paper defines it. Returns the output and the weights, b h n (N_0 + .. + N_L)."""
    block, top = of.block, of.levels
    levels = [[x] for x in (q, k, v)]
    for chain in levels:
        for _ in range(top):
            chain.append(chain[-1].unflatten(2, (-1, block)).mean(3))
    queries, keys, values = levels
    seen = [torch.zeros(*q.shape[:2], x.shape[2], x.shape[2], dtype=torch.bool) for x in keys]  # by rows of its level
    picked: dict[int, Tensor] = {}
    seen[top][:] = True
    for level in range(top, 0, -1):
        scores = queries[level] @ keys[level].transpose(-1, -2)
        scores = scores.masked_fill(~seen[level], -math.inf)
        count = min(of.top_k, scores.shape[-1])
        places = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, places, True) & seen[level]
        picked[level] = chosen
        seen[level - 1] = chosen.repeat_interleave(block, 2).repeat_interleave(block, 3)
    kept = top if of.enrichment is None else of.enrichment
    weights = []
    for level in range(top + 1):
        size = block**level
        mine = seen[level] if level else seen[0]
        if level and not of.overlap:
            mine = mine & ~picked[level]
        mine = mine.repeat_interleave(size, 2).double() * (size if weigh else 1)
        weights.append(mine * (level <= kept))
    w = torch.cat(weights, -1)
    logits = q @ torch.cat(keys, 2).transpose(-1, -2) * q.shape[-1] ** -0.5 + w.log()
    return logits.softmax(-1) @ torch.cat(values, 2), w


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def near(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


CASES = [(1, 3), (1, 16), (2, 2), (2, 4), (2, 8)]


# ---- the operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("enrichment", [None, 1, 0])
@pytest.mark.parametrize("levels, top_k", CASES)
def test_it_is_one_softmax_over_the_attended_set_of_the_definition(levels, top_k, enrichment, overlap):
    of = settings(levels, top_k, enrichment=enrichment, overlap=overlap)
    q, k, v = qkv()
    near(sparse(q, k, v, of)[0], reference(q, k, v, of)[0])


def test_with_three_levels_it_is_the_definition_too():
    of = settings(3, 2)
    q, k, v = qkv(256, 4, 1)
    near(sparse(q, k, v, of)[0], reference(q, k, v, of)[0])


@pytest.mark.parametrize("levels", [1, 2])
def test_without_enrichment_and_with_all_blocks_it_is_dense(levels):
    q, k, v = qkv()
    near(sparse(q, k, v, settings(levels, ALL, enrichment=0))[0], dense(q, k, v))


@pytest.mark.parametrize("levels", [1, 2])
def test_without_overlap_and_with_all_blocks_it_is_dense(levels):
    q, k, v = qkv()
    near(sparse(q, k, v, settings(levels, ALL, overlap=False))[0], dense(q, k, v))


def test_every_row_sees_as_many_keys_as_the_formula_says():
    q, k, v = qkv()
    of = settings(2, 2)
    assert of.keys_per_query(64) == 20
    _, w = reference(q, k, v, of)
    assert ((w > 0).sum(-1) == 20).all()
    zero = torch.zeros_like(q)
    _, lse = attend(zero, [*seen_by_images(zero, k, v, of, 2)], path="plain")
    assert lse.exp().isfinite().all()


def test_keys_per_query_grow_by_less_than_a_half_while_tokens_grow_sixteenfold():
    published = LLSA()
    assert published.keys_per_query(16_384) == 320 and published.keys_per_query(262_144) == 448
    assert LLSA(levels=1).keys_per_query(16_384) == 1152 and LLSA(levels=1).keys_per_query(65_536) == 4224
    assert LLSA(levels=2).keys_per_query(262_144) == 1280 and LLSA(levels=3).keys_per_query(65_536) == 400
    assert published.keys_per_query(4095) == 4095  # dense below
    assert settings(2, 8).keys_per_query(64) == 8 * 4 + 4 * 4 + 4  # the top has fewer keys than top_k
    assert LLSA(enrichment=0).keys_per_query(16_384) == 128 and LLSA(enrichment=1).keys_per_query(16_384) == 256


def test_queries_of_zeros_get_the_weighted_mean_and_the_weights_sum_as_told():
    """104 = K B + K B B + N; it fails where weights multiply logits, which are all zero, or are left out."""
    _, k, v = qkv()
    q = torch.zeros_like(k)
    of = settings(2, 2)
    o, lse = sparse(q, k, v, of)
    near(lse.exp().double(), torch.full_like(lse, 104.0).double(), 1e-3)  # lse is fp32
    _, w = reference(q, k, v, of)
    values = torch.cat((v, *(v.unflatten(2, (-1, s)).mean(3) for s in (4, 16))), 2)
    near(o, w @ values / 104)


def test_without_overlap_every_token_counts_once():
    _, k, v = qkv()
    _, lse = sparse(torch.zeros_like(k), k, v, settings(2, 2, overlap=False))
    near(lse, torch.full_like(lse, math.log(64)), 1e-5)


@pytest.mark.parametrize("overlap", [True, False])
def test_of_keys_and_values_that_are_constant_on_top_blocks_all_levels_say_the_same(overlap):
    q, k, v = qkv()
    k, v = (x[:, :, ::16].repeat_interleave(16, 2) for x in (k, v))
    near(sparse(q, k, v, settings(2, ALL, overlap=overlap))[0], dense(q, k, v))
    few = sparse(q, k, v, settings(2, 1, overlap=overlap))[0]
    if overlap:  # the blocks that are selected count more than once
        assert (few - dense(q, k, v)).abs().max() > 1e-3
    else:
        near(few, dense(q, k, v))


def test_values_of_ones_stay_and_swapped_top_blocks_swap_the_output():
    q, k, v = qkv()
    of = settings(2, 2)
    near(sparse(q, k, torch.ones_like(v), of)[0], torch.ones_like(v))
    order = torch.arange(64).unflatten(0, (4, 16))[[2, 0, 3, 1]].flatten()
    near(sparse(q[:, :, order], k[:, :, order], v[:, :, order], of)[0], sparse(q, k, v, of)[0][:, :, order])


@pytest.mark.parametrize("levels, overlap", [(1, True), (2, True), (2, False)])
def test_gradients_are_those_of_the_dense_reference_through_the_pyramid(levels, overlap):
    of = settings(levels, 2, overlap=overlap)
    mine, theirs = ([x.clone().requires_grad_() for x in qkv(64, 4, 1, batch=1)] for _ in range(2))
    seed = torch.randn(1, 1, 64, 4, dtype=torch.float64)
    (sparse(*mine, of)[0] * seed).sum().backward()
    (reference(*theirs, of)[0] * seed).sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        near(a.grad, b.grad)
    # the reference's backward without the weight of coarse keys, which is another function
    wrong = [x.clone().requires_grad_() for x in qkv(64, 4, 1, batch=1)]
    (reference(*wrong, of, weigh=False)[0] * seed).sum().backward()
    assert (wrong[1].grad - mine[1].grad).abs().max() > 1e-3


def test_finite_differences_agree_where_the_selection_stays():
    of = settings(1, 1, block=2)
    inputs = [x.requires_grad_() for x in qkv(8, 2, 1, batch=1, seed=3)]
    assert gradcheck(lambda *x: sparse(*x, of)[0], inputs, eps=1e-6, atol=1e-6)


def test_no_gradient_passes_through_the_selection():
    """Pooled queries select alone: the selection has no graph, though queries have."""
    q, k, v = (x.requires_grad_() for x in qkv())
    index = select(pyramid(q, 4, 2), pyramid(k, 4, 2), 4, 2)
    assert not any(i.requires_grad for i in index) and index[0].dtype == torch.int32
    parts = seen_by_images(q, k, v, settings(2, 2), 2)
    (parts[1].k.sum() + parts[2].v.sum()).backward()
    assert q.grad is None and k.grad.abs().min() > 0 and v.grad.abs().min() > 0


# ---- the selection ---------------------------------------------------------------------------------------------------


def test_refined_keys_are_children_of_the_keys_that_the_parent_selected():
    q, k, _ = qkv(256)
    index = select(pyramid(q, 4, 3), pyramid(k, 4, 3), 4, 2)
    assert [tuple(i.shape[2:]) for i in index] == [(64, 2), (16, 2), (4, 2)]
    for low, high in zip(index, index[1:], strict=False):
        parents = high.repeat_interleave(4, 2)
        assert ((low // 4)[..., None] == parents[..., None, :]).any(-1).all()


def test_with_a_short_last_block_each_query_selects_as_a_loop_does():
    """22 tokens: 6 and 2 pooled ones, of which the second has the children 4 and 5."""
    q, k, _ = qkv(tokens=22)
    (q1, q2), (k1, k2) = pyramid(q, 4, 2), pyramid(k, 4, 2)
    found, top = select((q1, q2), (k1, k2), 4, 1)
    for b, h in ((b, h) for b in range(2) for h in range(2)):
        for u in range(6):
            parent = int((k2[b, h] @ q2[b, h, u // 4]).argmax())
            assert int(top[b, h, u // 4]) == parent
            children = range(4 * parent, min(4 * parent + 4, 6))
            assert int(found[b, h, u]) == max(children, key=lambda c: float(k1[b, h, c] @ q1[b, h, u]))


def test_where_the_top_takes_all_it_is_the_flat_top_k_of_its_children():
    q, k, _ = qkv()
    (flat,) = select(pyramid(q, 4, 1), pyramid(k, 4, 1), 4, 4)
    refined, top = select(pyramid(q, 4, 2), pyramid(k, 4, 2), 4, 4)
    assert top.shape[-1] == 4  # N_2: all of them
    assert torch.equal(refined, flat)


def test_of_equal_scores_the_first_keys_are_selected_at_every_level():
    q = torch.zeros(1, 1, 256, 4)
    for i in select(pyramid(q, 4, 3), pyramid(q, 4, 3), 4, 2):
        assert (i == torch.tensor([0, 1])).all()


def test_under_autocast_the_selection_is_what_it_is_without():
    """Of 64 scores near 100, which bf16 tells apart in steps of a half."""
    g = torch.Generator().manual_seed(0)
    q = torch.ones(1, 1, 256, 8)
    k = 12.5 + 0.1 * torch.randn(1, 1, 256, 8, generator=g)
    alone = select(pyramid(q, 4, 2), pyramid(k, 4, 2), 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        under = select(pyramid(q, 4, 2), pyramid(k, 4, 2), 4, 3)
    assert all(torch.equal(a, b) for a, b in zip(alone, under, strict=True))
    exact = [(x.double() @ y.double().mT) for x, y in zip(pyramid(q, 4, 2), pyramid(k, 4, 2), strict=True)]
    assert torch.equal(alone[1].long(), exact[1].topk(3).indices.sort().values)


def test_pooling_is_in_fp32_whatever_the_inputs_are_and_levels_keep_the_inputs_type():
    q, k, v = (x.bfloat16() for x in qkv(256))
    exact = k.double().unflatten(2, (-1, 16)).mean(3)
    assert (pyramid(k, 4, 2)[1].double() - exact).abs().max() < 1e-6 and pyramid(k, 4, 2)[1].dtype == torch.float32
    parts = seen_by_images(q, k, v, settings(2, 2), 2)
    assert all(p.k.dtype == p.v.dtype == torch.bfloat16 for p in parts)
    o, lse = attend(q, parts, path="plain")
    assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


# ---- tokens that are no multiple of a block --------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [61, 50, 49, 17])
@pytest.mark.parametrize("levels", [1, 2])
def test_short_blocks_count_the_tokens_that_they_have(tokens, levels):
    """With queries of zeros the mean is weighted by true lengths: without overlap it is the mean of all values."""
    _, k, v = qkv(tokens)
    of = settings(levels, 2, overlap=False)
    o, lse = sparse(torch.zeros_like(k), k, v, of)
    near(o, v.mean(2, keepdim=True).expand_as(v))
    near(lse, torch.full_like(lse, math.log(tokens)), 1e-5)
    _, lse = sparse(torch.zeros_like(k), k, v, settings(levels, ALL))
    near(lse, torch.full_like(lse, math.log((levels + 1) * tokens)), 1e-5)


@pytest.mark.parametrize("tokens", [61, 50, 17])
def test_with_all_blocks_ragged_tokens_are_dense_too(tokens):
    q, k, v = qkv(tokens)
    near(sparse(q, k, v, settings(2, ALL, enrichment=0))[0], dense(q, k, v))
    near(sparse(q, k, v, settings(2, ALL, overlap=False))[0], dense(q, k, v))


def test_a_selection_never_names_a_token_that_is_not_there():
    for tokens in (17, 33, 50, 61):
        q, k, _ = qkv(tokens)
        index = select(pyramid(-q, 4, 2), pyramid(k, 4, 2), 4, 3)
        counts = [-(-tokens // 4), -(-tokens // 16)]
        for i, count in zip(index, counts, strict=True):
            assert i.min() >= 0 and i.max() < count
            assert (i[..., 1:] > i[..., :-1]).all()  # each once


# ---- text and registers ----------------------------------------------------------------------------------------------


def joint_reference(q: Tensor, k: Tensor, v: Tensor, of: LLSA, image: slice, mask: Tensor | None = None) -> Tensor:
    """Image queries see their set and all other keys of weight 1; all other queries see all keys."""
    o, w = reference(q[:, :, image], k[:, :, image], v[:, :, image], of)
    keys = [x[:, :, image] for x in (k, v)]
    levels = [torch.cat([x, *(x.unflatten(2, (-1, s)).mean(3) for s in (4, 16))], 2) for x in keys]
    others = [i for i in range(k.shape[2]) if not image.start <= i < image.stop]
    seen = torch.ones(k.shape[0], 1, 1, len(others)).double()
    if mask is not None:
        seen = mask[:, None, None, others].double()
    w = torch.cat((w, seen.expand(*w.shape[:3], -1)), -1)
    all_k, all_v = torch.cat((levels[0], k[:, :, others]), 2), torch.cat((levels[1], v[:, :, others]), 2)
    logits = q[:, :, image] @ all_k.transpose(-1, -2) * q.shape[-1] ** -0.5 + w.log()
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None])
    wanted[:, :, image] = logits.softmax(-1) @ all_v
    return wanted


class OwnUnit:
    """What `Sparse` asks of a unit."""

    class anatomy:
        joint = True

    def own_attention(self, q, k, v, layout, step):
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("side", ["front", "back"])
@pytest.mark.parametrize("masked", [False, True])
def test_text_is_seen_by_every_query_and_sees_every_key(side, masked):
    of = settings(2, 2)
    q, k, v = qkv(64 + 7 + 2)  # two registers
    mask = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
    layout = Layout((1, 8, 8), registers=2, text_length=7, side=side, text_mask=mask)
    image = slice(9, 73) if side == "front" else slice(2, 66)
    found = Sparse(OwnUnit(), of, masks=masked)(q, k, v, layout)
    near(found, joint_reference(q, k, v, of, image, layout.joint_mask(73) if masked else None), 1e-7)


def test_text_that_is_read_aside_is_no_part_of_the_sequence():
    unit = OwnUnit()
    unit.anatomy = type("Aside", (), {"joint": False})
    q, k, v = qkv()
    of = settings(2, 2)
    found = Sparse(unit, of, masks=True)(q, k, v, Layout((1, 8, 8), text_length=7))
    near(found, reference(q, k, v, of)[0])


# ---- as an edit ------------------------------------------------------------------------------------------------------


def pixels(**options) -> Denoiser:
    """A DiT of 64 pixel tokens with random weights."""
    torch.manual_seed(0)
    denoiser = DiTConfig(**PIXELS, **options).build()
    randomise(denoiser)
    return denoiser.eval()


def asked() -> tuple[Tensor, Tensor, Condition]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(3, 1, 8, 8, generator=g), torch.tensor([0.2, 0.5, 0.9]), Condition(label=torch.tensor([0, 1, 2]))


@torch.no_grad()
def test_in_a_pixel_dit_blocks_are_squares_of_the_picture():
    """The slot sees tokens in Morton order, positions with them: with all blocks it is the dense model."""
    whole, llsa = pixels(**MODERN), edit.apply(pixels(**MODERN), {"llsa": settings(2, 16, overlap=False)})
    seen = []
    slot = llsa.units[0].slots.attention
    llsa.units[0].slots.attention = lambda *given: seen.append(given) or slot(*given)
    torch.testing.assert_close(llsa(*asked()).sample, whole(*asked()).sample, rtol=1e-4, atol=1e-5)
    q, *_, layout, _ = seen[0]
    assert torch.equal(layout.permutation, morton((1, 8, 8)))
    whole.units[0].slots.attention = lambda *given: seen.append(given) or whole.units[0].own_attention(*given)
    whole(*asked())
    torch.testing.assert_close(q, seen[1][0][:, :, layout.permutation], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_few_blocks_change_the_prediction_and_raster_order_is_another_one():
    whole, llsa = pixels(**MODERN), edit.apply(pixels(**MODERN), {"llsa": settings(2, 2)})
    one = llsa(*asked()).sample
    assert (one - whole(*asked()).sample).abs().max() > 1e-3
    llsa.applied["llsa"].embed = lambda stream, *_: stream  # in rows a block is a line
    assert (llsa(*asked()).sample - one).abs().max() > 1e-4


def test_executed_macs_are_those_of_the_keys_that_are_seen_and_of_the_selection():
    """64 tokens, width 16 of a head: products of queries with 20 keys and of weights with 20 values, and the scores of
    the selection: 4 x 4 at the top and 16 x 8 below. Pooling multiplies nothing."""
    tokens, heads, e, depth = 64, 2, 16, 2
    before = macs(pixels(), Condition(label=torch.zeros(1, dtype=torch.int64)))
    after = macs(edit.apply(pixels(), {"llsa": settings(2, 2)}), Condition(label=torch.zeros(1, dtype=torch.int64)))
    selection = (4 * 4 + 16 * 8) * e
    assert before - after == depth * heads * (2 * tokens * (tokens - 20) * e - selection)
    assert work(settings(2, 2), 64, e) == 2 * tokens * 20 * e + selection


def test_a_plan_of_memory_sees_the_kernels_and_no_copy_of_keys_for_each_block():
    """Lists and means add a twelfth to the model's own attention; the plain path gathers keys, and doubles it."""

    def bytes_of(*edits: LLSA) -> int:
        def structure() -> Denoiser:
            return edit.apply(
                DiTConfig(**PIXELS | {"input_size": 16}).build(), {f"e{i}": e for i, e in enumerate(edits)}
            )

        return (
            Probe(structure, (1, 16, 16), Condition(label=torch.zeros(1, dtype=torch.int64)))
            .step(4, True, False)
            .flowing
        )

    assert 1 < bytes_of(settings(3, 4)) / bytes_of() < 1.1


def test_counted_work_grows_as_n_log_n_where_levels_grow_with_n_and_as_the_square_with_one(tmp_path):
    """From 1k to 256k tokens: over N log N it stays within 35 %, dense attention's becomes 140 times as much."""
    found = curves()
    growing = relative(found["levels grow with N"])
    assert max(growing) / min(growing) < 1.35
    assert relative(found["dense"])[-1] > 100 and relative(found["one level"])[-1] > 40
    assert max(relative(found["levels of the reference"])) < 3  # in steps: N / B^L quadruples before L grows
    assert [deepest(n, 16) for n in TOKENS] == [1, 1, 2, 2, 2, 2, 3, 3, 3]
    draw(found, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes()[:4] == b"\x89PNG"


def test_below_its_number_of_tokens_attention_is_the_models_own_to_the_bit():
    whole, llsa = pixels(), edit.apply(pixels(), {"llsa": LLSA()})
    with torch.no_grad():
        assert torch.equal(llsa(*asked()).sample, whole(*asked()).sample)
    maps = llsa(*asked(), maps={0: 4}).trace["unit.0.maps"]
    assert maps.shape == (3, 2, 4, 64)
    assert macs(llsa) == macs(whole)


@torch.no_grad()
def test_under_autocast_normalised_queries_and_values_meet_in_one_type():
    llsa = edit.apply(pixels(**MODERN), {"llsa": settings(2, 16, overlap=False)})
    exact = llsa(*asked()).sample
    with torch.autocast("cpu", torch.bfloat16):
        found = llsa(*asked()).sample
    assert (found.float() - exact).norm() < 0.1 * exact.norm()
    q, k, v = qkv()
    o = Sparse(OwnUnit(), settings(2, 2), masks=False)(q.float(), k.float(), v.bfloat16(), Layout((1, 8, 8)))
    assert o.dtype == torch.bfloat16


def test_all_weights_are_trained_and_every_one_gets_a_gradient():
    llsa = edit.apply(pixels(**MODERN), {"llsa": settings(2, 2, overlap=False)})
    assert all(trains(llsa, n) for n, _ in llsa.named_parameters()) and not len(llsa.edits)
    llsa(*asked()).sample.square().sum().backward()
    assert [n for n, p in llsa.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen_image", "pixart", "wan", "dit swiglu"])
@torch.no_grad()
def test_with_all_blocks_every_family_is_as_it_was(name):
    """Text, registers, masks and rotary positions are where they belong: 16 or 32 image tokens."""
    whole, sparse = family(name), family(name)
    x, t, condition = inputs(whole)
    if name == "qwen_image":
        mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
        condition = Condition(text=condition.text, text_mask=mask)
    tokens = math.prod(sparse.embed(**sparse.pack(x, t, condition)).layout.grid)
    edit.apply(sparse, {"llsa": settings(1, tokens // 4, overlap=False)})
    one, other = whole(x, t, condition).sample, sparse(x, t, condition).sample
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)  # lse and stock RoPE are fp32
    edit.apply(few := family(name), {"llsa": settings(1, 1)})
    assert (few(x, t, condition).sample - one).abs().max() > 1e-4


@torch.no_grad()
def test_units_can_be_chosen_and_the_others_stay_dense():
    llsa = edit.apply(pixels(), {"llsa": LLSA(4, 2, 2, dense_below=0, units=(1,))})
    assert "attention" in llsa.units[1].slots and "attention" not in llsa.units[0].slots
    assert llsa(*asked(), taps=(0,)).trace["unit.0"].shape == (3, 64, 32)
    near(llsa(*asked(), taps=(0,)).trace["unit.0"], pixels()(*asked(), taps=(0,)).trace["unit.0"], 1e-5)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad, complaint",
    [
        ({"top_k": 17}, "top_k=17 of 16 blocks, as there are 64 image tokens in blocks of 4: set top_k to at most 16"),
        ({"block": 128, "top_k": 1}, "a block of 128 tokens is more than the 64 that there are: set block to at most"),
        ({"levels": 3}, "levels=3 of blocks of 4 need 256 image tokens and there are 64: set levels to at most 2"),
    ],
)
def test_too_few_tokens_are_refused_before_a_run(bad, complaint):
    with pytest.raises(ValueError, match="this dit has too few image tokens for LLSA: " + complaint):
        edit.apply(pixels(), {"llsa": LLSA(**{"block": 4, "top_k": 2, "dense_below": 0, **bad})})


@pytest.mark.parametrize("block, near_ones", [(12, "8 or 16"), (100, "64 or 128")])
def test_a_block_that_is_no_box_in_morton_order_is_refused(block, near_ones):
    with pytest.raises(ValueError, match=f"block must be a power of two.*got {block}: take {near_ones}"):
        LLSA(block=block)


def test_what_does_not_fit_together_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="block must be at least 2"):
        LLSA(block=1)
    with pytest.raises(ValueError, match="levels must be at least 1"):
        LLSA(levels=0)
    llsa = edit.apply(pixels(), {"llsa": settings(2, 2)})
    with pytest.raises(ValueError, match="another edit has replaced the attention of unit 0 of this dit: leave it out"):
        edit.apply(llsa, {"again": settings(2, 2)})
    with pytest.raises(ValueError, match="attention maps are wanted of permuted tokens"):
        llsa(*asked(), maps={0: 4})
    q, k, v = qkv(63)
    with pytest.raises(ValueError, match="with its text and registers has 64 tokens, queries are of 63"):
        Sparse(OwnUnit(), settings(2, 2), masks=False)(q, k, v, Layout((1, 8, 8)))
    with pytest.raises(ValueError, match="attention in blocks has no map of all tokens"):
        Sparse(OwnUnit(), settings(2, 2), masks=False)(q, k, v, Layout((1, 8, 8), maps=2))
    with pytest.raises(ValueError, match="cannot be folded into the weights"):
        edit.fold(llsa)


@torch.no_grad()
def test_of_another_size_of_picture_the_levels_follow():
    flux = BACKBONES["flux"].build()
    randomise(flux)
    edit.apply(flux.eval(), {"llsa": LLSA(4, 2, dense_below=32)})
    for side, tokens in ((8, 16), (16, 64)):  # dense, and in blocks
        given = inputs(flux)[2].map(lambda v: v.float())
        out = flux(torch.randn(2, 4, side, side), torch.tensor([0.3, 0.7]), given)
        assert out.sample.shape == (2, 4, side, side) and out.grid == (1, side // 2, side // 2)
        assert flux.applied["llsa"].depth(tokens) == (tokens > 32)


def compiled_units_train_as_eager_ones(rank: int = 0) -> None:
    def gradients(model: Denoiser) -> list[Tensor]:
        model(*asked()).sample.square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    eager, compiled = (edit.apply(pixels(**MODERN), {"llsa": settings(2, 2)}) for _ in range(2))
    for unit in compiled.units:
        unit.compile(backend="aot_eager", fullgraph=True)
    pairs = list(zip(gradients(eager), gradients(compiled), strict=True))
    assert len(pairs) > 20
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_unit_compiles_to_one_graph_and_has_the_gradients_of_the_eager_one():
    run_ranks(compiled_units_train_as_eager_ones, 1)  # in a child: what has compiled cannot be forked from
