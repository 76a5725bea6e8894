"""Dual times with attention separation: two groups of tokens, each at its own time, neither sees the other."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from self_aligned import gradients, look
from small_runs import losses, rows, train

import edit
from edit.alignment.sra import SRA
from edit.alignment.token_times import Separated, TokenTimes
from edit.attention.linear import LinearAttention
from edit.grid import patches, pixels
from edit.measuring.flops import Flops
from edit.stream import Apart, Condition, Layout
from edit.subset import marked

RUN = "+terms.sra={_target_: edit.alignment.sra.SRA, units: [0, 1], dual: 0.25}"
EDIT = "edits=token_times"
A, B = [0, 1, 2, 3, 4, 5, 6, 8, 9, 11, 12, 14], [13, 7, 10, 15]  # of 16 tokens
OPTIONS = [{}, {"rope": True, "registers": 2, "qk_norm": True}]


def timed(denoiser, **options):
    return edit.apply(deepcopy(denoiser), {"token_times": TokenTimes(**options)})


def groups(batch, second, apart=B):
    x, t, condition = batch
    places = torch.tensor(apart, dtype=torch.int64).expand(len(x), -1)
    return x, t, replace(condition, second=torch.full_like(t, second) if second is not None else t, apart=places)


def changed(x, tokens):
    """Samples in which these tokens' parts are others."""
    n = torch.zeros(len(x), 16, dtype=torch.bool)
    n[:, tokens] = True
    return torch.where(pixels(n, (1, 4, 4), x.shape[2:]), x + 1, x)


@pytest.fixture(params=OPTIONS, ids=["plain", "rope and registers"])
def pair(request, make_dit):
    dit = make_dit(**request.param)
    return dit, timed(dit)


def test_without_a_second_time_the_model_is_the_unedited_one_and_folds(pair, batch):
    dit, model = pair
    with torch.no_grad():
        assert torch.equal(model(*batch).sample, dit(*batch).sample)
        edit.fold(model)
        assert torch.equal(model(*batch).sample, dit(*batch).sample)


@torch.no_grad()
def test_attention_of_one_group_is_full_attention(pair, batch):
    dit, model = pair
    expected = dit(*batch).sample
    for apart in ([], list(range(16))) if not dit.spec.registers else ([],):
        found = model(*groups(batch, None, apart)).sample
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # sums in another order


@torch.no_grad()
def test_conditions_of_tokens_at_one_time_are_the_condition_of_the_sample(make_dit, batch):
    dit = make_dit(registers=1)
    model = timed(dit, separate=False)
    torch.testing.assert_close(model(*groups(batch, None)).sample, dit(*batch).sample, rtol=0, atol=1e-6)


@torch.no_grad()
def test_tokens_of_one_group_see_nothing_of_the_other(pair, batch):
    _, model = pair
    x, t, condition = groups(batch, 0.9)
    before = patches(model(x, t, condition).sample, (1, 4, 4))
    for tokens, others in ((A, B), (B, A)):
        after = patches(model(changed(x, tokens), t, condition).sample, (1, 4, 4))
        assert torch.equal(after[:, others], before[:, others]) and not torch.equal(after[:, tokens], before[:, tokens])
    later = patches(model(x, t, replace(condition, second=t * 0.5)).sample, (1, 4, 4))
    assert torch.equal(later[:, A], before[:, A]) and (later[:, B] - before[:, B]).abs().min() > 0


@torch.no_grad()
def test_groups_that_see_each_other_are_told_apart_by_their_times_alone(dit, batch):
    model = timed(dit, separate=False)
    x, t, condition = groups(batch, 0.9)
    before = patches(model(x, t, condition).sample, (1, 4, 4))
    after = patches(model(changed(x, A), t, condition).sample, (1, 4, 4))
    assert not torch.equal(after[:, B], before[:, B])


def test_segments_are_the_masked_attention_in_values_and_gradients(dit):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 16, 8, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3))
    second = torch.zeros(2, 16, dtype=torch.bool)
    second[0, B], second[1, [0, 3, 4, 9]] = True, True
    layout = Layout((1, 4, 4), apart=Apart(second, second.long().argsort(dim=1, stable=True), 4))
    found = Separated(dit.units[0])(q, k, v, layout)
    mask = second[:, None, :, None] == second[:, None, None, :]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad(found.square().sum(), (q, k, v)),
        torch.autograd.grad(expected.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_attention_costs_the_squares_of_the_segments_and_modulation_two_conditions(dit, batch):
    x, t, condition = groups(batch, 0.9)
    layout = Layout((1, 4, 4))
    q = torch.randn(2, 4, 64, 8)
    second = torch.arange(64).expand(2, -1) >= 48
    with torch.no_grad(), Flops() as full:
        dit.units[0].own_attention(q, q, q, layout, None)
    apart = replace(layout, apart=Apart(second, torch.arange(64).expand(2, -1), 16))
    with torch.no_grad(), Flops() as parts:
        Separated(dit.units[0])(q, q, q, apart)
    assert parts.total / full.total == pytest.approx(0.75**2 + 0.25**2)
    totals = []
    for model, told in ((dit, batch), (timed(dit, separate=False), (x, t, condition))):
        with torch.no_grad(), Flops() as flops:
            model(*told)
        totals.append(flops.total)
    width = dit.facts.width
    embedding = 256 * width + width**2  # of the second time
    assert totals[1] - totals[0] == 2 * len(x) * (embedding + (3 * 6 + 2) * width**2)


def test_families_of_one_condition_and_other_attentions_are_refused(dit, make_dit):
    class Plain(type(dit)):
        facts = replace(dit.facts, tokenwise=False)

    plain = make_dit()
    plain.__class__ = Plain
    with pytest.raises(ValueError, match="take one condition for all tokens: use a DiT or SiT"):
        edit.apply(plain, {"token_times": TokenTimes()})
    linear = edit.apply(dit, {"linear": LinearAttention()})
    with pytest.raises(ValueError, match="has replaced the attention of unit 0"):
        edit.apply(linear, {"token_times": TokenTimes()})


# ---- SRA ------------------------------------------------------------------------------------------------------------


def begun(term, model, **options):
    """What the term sees after a forward on the sample and condition that it made."""
    seen = look(term, model, **options)
    x_t, condition = term.mixed(seen)
    out = model(x_t, seen.t, condition, taps=term.taps)
    return seen, replace(seen, x_t=x_t, condition=condition, output=out)


def test_a_quarter_of_the_tokens_is_at_the_second_time_and_the_average_sees_each_group_at_less_noise(dit):
    term, model = SRA((0, 2), dual=0.25), timed(dit)
    seen, mixed = begun(term, model)
    condition = mixed.condition
    assert condition.apart.shape == (4, 4) and all(len(set(row)) == 4 for row in condition.apart.tolist())
    assert len({tuple(sorted(row)) for row in condition.apart.tolist()}) > 1  # each sample its own
    assert not torch.equal(condition.second, seen.t) and torch.equal(condition.label, seen.condition.label)
    there = patches(marked(condition.apart, (1, 4, 4), (8, 8)).expand_as(seen.x), (1, 4, 4))[..., 0]
    assert (there.sum(1) == 4).all() and there.gather(1, condition.apart).all()
    at = torch.where(there, condition.second[:, None], seen.t[:, None])[..., None]  # b n 1

    def mixture(times):
        x, noise = (patches(v, (1, 4, 4)) for v in (seen.x, seen.noise))
        return (1 - times) * x + times * noise

    torch.testing.assert_close(patches(mixed.x_t, (1, 4, 4)), mixture(at))
    given = []

    def recorded(x_s, s, told, taps):
        given.append((x_s, s, told))
        return seen.tapped_average(x_s, s, told, taps)

    loss = term.losses(replace(mixed, tapped_average=recorded))["sra"]
    loss.sum().backward()
    ((x_s, s, told),) = given
    assert torch.equal(told.apart, condition.apart)
    for mine, theirs in ((s, seen.t), (told.second, condition.second)):
        assert ((theirs - mine >= 0) & (theirs - mine <= 0.2 + 1e-6)).all()
    less = torch.where(there, told.second[:, None], s[:, None])[..., None]
    torch.testing.assert_close(patches(x_s, (1, 4, 4)), mixture(less))
    assert {n.split(".")[2] for n in gradients(model) if ".blocks." in n} == {"0"}


def test_at_equal_times_the_average_that_is_the_student_has_no_loss(dit):
    term, model = SRA((1, 1), dual=0.25, offset=0.0, head=False), timed(dit)
    _, mixed = begun(term, model, average=deepcopy(model))
    assert term.losses(mixed)["sra"].tolist() == [0, 0, 0, 0]


def test_dual_times_need_the_edit_and_velocities(dit, make_dit):
    with pytest.raises(ValueError, match="told one time for all tokens: add .edits.token_times"):
        SRA((0, 1), dual=0.25).build(dit)
    with pytest.raises(ValueError, match="dual times are for velocities"):
        SRA((0, 1), dual=0.25).build(timed(make_dit(time="ddpm")))
    with pytest.raises(ValueError, match="below 1"):
        SRA((0, 1), dual=1.0)


def test_a_run_trains_with_two_times_and_its_artifact_samples_with_one(tmp_path):
    train(tmp_path, "name=a", EDIT, RUN, "trainer.max_steps=4")
    assert all(float(r["train/sra/sra"]) > 0 for r in rows(tmp_path, "a")) and len(losses(tmp_path, "a")) == 4
    model = edit.load(tmp_path / "a/artifact").denoiser
    x = torch.randn(2, *model.sample_shape)
    assert model(x, torch.full((2,), 0.5), Condition(label=torch.tensor([1, 2]))).sample.isfinite().all()
