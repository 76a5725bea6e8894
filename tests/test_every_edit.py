"""Every edit on every tiny backbone: the properties that all edits have, or a refusal in one sentence.

Edits are found by importing, backbones are those of `families`. An id reads: property[edit-backbone]. The default suite
has, of each edit, the first backbone that takes it and of the others the one that was chosen least; the rest is slow.
"""

from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
from every import classes, small
from families import BACKBONES, inputs
from torch import Tensor
from weights import randomise

import edit
from edit.caching.engine import Cached
from edit.denoiser import Denoiser, Edit
from edit.edits import trains
from edit.measuring.flops import Flops
from edit.predictions import default_objective
from edit.sampling import Sampler, default_sampler
from edit.solvers import Grid
from edit.stream import Condition, Output
from edit.unit import core

EDITS = classes(Edit)
NAME = "it"
IN_FRONT = {"PatchMixer"}  # all that units read has passed the edit's own blocks, as published
DRAWS = 16  # of hard decisions, until each way has been drawn
Batch = tuple[Tensor, Tensor, Condition]


# ---- pairs -----------------------------------------------------------------------------------------------------------


def attempt(name: str, backbone: str) -> tuple[Denoiser, str | None]:
    """A backbone without weights, and what the edit says if it cannot change it."""
    with torch.device("meta"):
        denoiser = BACKBONES[backbone].build()
        try:
            edit.apply(denoiser, {NAME: small(EDITS[name])}, fresh=False)
        except ValueError as error:
            return denoiser, str(error)
    return denoiser, None


def taken(name: str, backbone: str) -> bool:
    try:
        return attempt(name, backbone)[1] is None
    except Exception:  # the tests of this pair tell it
        return True


def representatives() -> list[tuple[str, str]]:
    """Of each edit the first backbone that takes it, and of the others that do the one that was chosen least."""
    found: list[tuple[str, str]] = []
    for name in EDITS:
        first = next((b for b in BACKBONES if taken(name, b)), None)
        times = Counter(b for _, b in found)
        others = sorted((b for b in BACKBONES if b != first), key=lambda b: times[b])
        second = next((b for b in others if first is not None and taken(name, b)), None)
        found += [(name, b) for b in (first, second) if b is not None]
    return found


CHOSEN = representatives()
ALL = [(name, backbone) for name in EDITS for backbone in BACKBONES]
every = pytest.mark.parametrize(
    "name, backbone",
    [pytest.param(*p, marks=() if p in CHOSEN else pytest.mark.slow, id="-".join(p)) for p in ALL],
)


@cache
def dense(backbone: str) -> Denoiser:
    torch.manual_seed(0)
    denoiser = BACKBONES[backbone].build()
    randomise(denoiser)
    return denoiser.eval()


@cache
def prepared(name: str, backbone: str) -> Denoiser:
    """As a recipe prepares it: only what edits leave open is trained."""
    denoiser = deepcopy(dense(backbone))
    torch.manual_seed(0)
    try:
        edit.apply(denoiser, {NAME: small(EDITS[name])})
    except ValueError as error:
        pytest.skip(str(error))
    for key, p in denoiser.named_parameters():
        p.requires_grad_(trains(denoiser, key))
    return denoiser


def fresh(name: str, backbone: str) -> Denoiser:
    return deepcopy(prepared(name, backbone))


@torch.no_grad()
def moved(name: str, backbone: str, undecided: bool = True) -> Denoiser:
    """After some training: nothing is zero any more, and what decides is undecided, so that samples differ."""
    denoiser, g = fresh(name, backbone), torch.Generator().manual_seed(7)
    for key, p in denoiser.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if undecided and denoiser.applied[NAME].adaptive and key.startswith("edits."):
            p.copy_(0.3 * noise)
        elif p.requires_grad:
            p.add_(0.05 * noise)
    return denoiser


def batch(denoiser: Denoiser, count: int = 3) -> Batch:
    """Of different times, with all that the edited model is told."""
    x, t, condition = inputs(denoiser, count)
    condition = condition.map(lambda v: v.float() if v.is_floating_point() else v)
    if denoiser.applied and denoiser.applied[NAME].leads:
        condition = replace(condition, end=t.float() / 2)
    return x.float(), t.float(), condition


def some(batch: Batch, rows: slice) -> Batch:
    x, t, condition = batch
    return x[rows], t[rows], condition.map(lambda v: v[rows])


def signals(denoiser: Denoiser, out: Output) -> dict[str, Tensor]:
    """All that training may be made of: predictions, records and losses of the edit."""
    new = denoiser.applied[NAME]
    found = {"sample": out.sample, **out.trace}
    found |= {f"{k}.further": v.sample for k, v in new.further(out).items()}
    found |= {f"{k}.loss": v for k, v in new.losses(out.trace).items()}
    return {k: v for k, v in found.items() if isinstance(v, Tensor) and v.requires_grad}


def backward(denoiser: Denoiser, given: Batch, seed: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values of all signals, and the gradients of the sum of their squares, in training mode."""
    denoiser.train().zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    if walks(denoiser):
        return walked(denoiser, given)
    found = signals(denoiser, denoiser(*given))
    sum(v.float().square().mean() for v in found.values()).backward()
    return found, {n: p.grad for n, p in denoiser.named_parameters() if p.grad is not None}


def walks(denoiser: Denoiser) -> bool:
    """Whether what is trained has a part in generations alone, as of a cache."""
    return isinstance(denoiser.applied[NAME], Cached) and any(p.requires_grad for p in denoiser.edits.parameters())


def walked(denoiser: Denoiser, given: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same of a generation, in which every evaluation with a graph is an update."""
    found, (_, _, condition) = {}, given
    numbers, objective = torch.arange(len(given[1])), default_objective(denoiser)
    walk = sampler_of(denoiser).walk(denoiser, objective, replace(condition, end=None), numbers)
    for moment in walk:
        prediction = moment.ask()
        if prediction.requires_grad:
            prediction.square().mean().backward()
            found[f"evaluation {moment.step.index}"] = prediction
        moment.give(prediction.detach())
        walk.detach()
    return found, {n: p.grad for n, p in denoiser.named_parameters() if p.grad is not None}


def idle(denoiser: Denoiser) -> set[str]:
    """Modules that no gradient reaches in the plain model of the same structure: SD3's last unit asks for no text."""
    plain = denoiser.family.from_config(denoiser.config)
    randomise(plain)
    plain(*batch(plain)).sample.square().mean().backward()
    unreached = [n for n, p in plain.named_parameters() if p.grad is None or not p.grad.any()]
    return {n.rpartition(".")[0] for n in unreached}


def executed(denoiser: Denoiser, given: Batch) -> float:
    with Flops() as counter, torch.no_grad():
        denoiser(*given)
    return counter.total / 2


def near(a: Tensor, b: Tensor, share: float = 1e-5) -> bool:
    """fp32 products of other shapes are summed in another order."""
    return bool((a - b).abs().max() <= share * b.abs().max())


# ---- the sentence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_can_be_made_for_a_tiny_model_and_some_backbone_takes_it(name):
    small(EDITS[name])
    assert any(pair[0] == name for pair in CHOSEN)


def test_every_backbone_is_in_the_default_suite():
    assert {backbone for _, backbone in CHOSEN} == set(BACKBONES)


@pytest.mark.parametrize("name, backbone", ALL, ids=["-".join(pair) for pair in ALL])
def test_it_is_applied_or_refused_in_one_sentence(name, backbone):
    denoiser, said = attempt(name, backbone)
    if said is not None:
        assert name in said and denoiser.name in said, f"it names the edit and the model: {said}"
        assert "\n" not in said and 40 < len(said) < 300 and ". " not in said, f"it is one sentence: {said}"
        assert ": " in said.removeprefix(f"{name}: "), f"it ends with a remedy: {said}"


# ---- the prediction --------------------------------------------------------------------------------------------------


def left_out(denoiser: Denoiser, whole: Denoiser, given: Batch) -> bool:
    """Whether an edit is seen to compute something else: weights are gone, an operator over tokens is another, or less
    is executed."""
    new, before = denoiser.applied[NAME], whole.state_dict()
    kept = {new.stock_key(k.removeprefix("model.")): v.shape for k, v in denoiser.state_dict().items()}
    gone = any(kept.get(k.removeprefix("model.")) != v.shape for k, v in before.items())
    operators = any({"attention", "cross", "mixer"} & set(core(unit).filled) for unit in denoiser.units)
    return gone or operators or executed(denoiser, given) < executed(whole, batch(whole))


@every
@torch.no_grad()
def test_a_fresh_edit_that_leaves_nothing_out_predicts_what_the_dense_model_does(name, backbone):
    denoiser, whole = fresh(name, backbone), dense(backbone)
    if name in IN_FRONT or left_out(denoiser, whole, batch(denoiser)):
        return
    wanted = whole(*batch(whole)).sample
    assert near(denoiser(*batch(denoiser)).sample, wanted)
    if NAME not in denoiser.edits and denoiser.state_dict().keys() == whole.state_dict().keys():
        for training in (False, True):  # nothing of its own: a cache, which lives in generations alone
            assert torch.equal(denoiser.train(training)(*batch(denoiser)).sample, wanted)


@every
@torch.no_grad()
def test_a_prediction_does_not_depend_on_the_batch_it_is_in(name, backbone):
    denoiser = moved(name, backbone)
    given = batch(denoiser)
    together = denoiser(*given)
    for i in range(3):
        alone = denoiser(*some(given, slice(i, i + 1)))
        assert near(alone.sample[0], together.sample[i])


@every
@torch.no_grad()
def test_in_bf16_it_predicts_what_it_does_in_fp32(name, backbone):
    denoiser = fresh(name, backbone)
    x, t, condition = batch(denoiser)
    wanted = denoiser(x, t, condition).sample

    def cast(v: Tensor) -> Tensor:
        return v.bfloat16() if v.is_floating_point() else v

    found = denoiser.to(torch.bfloat16)(cast(x), t, condition.map(cast)).sample
    assert (found.float() - wanted).norm() < 0.1 * wanted.norm()


# ---- training --------------------------------------------------------------------------------------------------------


@every
def test_gradients_reach_all_that_is_trained_and_nothing_else(name, backbone):
    # by turns, until all was drawn; the last for choices that are drawn by the samples alone
    denoisers = [moved(name, backbone, undecided=False), fresh(name, backbone), moved(name, backbone)]
    before = [{k: v.clone() for k, v in d.state_dict().items()} for d in denoisers]
    open_ = {n for n, p in denoisers[0].named_parameters() if p.requires_grad}
    reached: set[str] = set()
    for seed in range(DRAWS):
        denoiser = denoisers[seed % 3]
        found, gradients = backward(denoiser, batch(denoiser), seed)
        assert all(v.isfinite().all() for v in (*found.values(), *gradients.values()))
        reached |= {n for n, g in gradients.items() if g.any()}
        if seed == 1:
            open_ -= {n for n in open_ - reached if n.startswith(tuple(idle(denoisers[0])))}
        if seed and reached >= open_:
            break
    assert reached <= {n for n, p in denoisers[0].named_parameters() if p.requires_grad}
    assert open_ and sorted(open_ - reached) == []
    for denoiser, state in zip(denoisers, before, strict=True):  # a step is the optimiser's
        assert all(torch.equal(v, state[k]) for k, v in denoiser.state_dict().items())


@every
def test_with_gradient_checkpointing_losses_and_gradients_are_the_same(name, backbone):
    denoiser = moved(name, backbone)
    if walks(denoiser):
        pytest.skip("the rollout recipe refuses gradient checkpointing")
    given = batch(denoiser)
    plain = backward(denoiser, given)
    denoiser.gradient_checkpointing = True
    for one, other in zip(plain, backward(denoiser, given), strict=True):
        assert one.keys() == other.keys()
        assert [k for k in one if not torch.equal(one[k], other[k])] == []


@every
def test_under_bf16_autocast_losses_and_gradients_are_finite(name, backbone):
    denoiser = moved(name, backbone)
    with torch.autocast("cpu", torch.bfloat16):
        found, gradients = backward(denoiser, batch(denoiser))
    assert found and gradients
    assert all(v.isfinite().all() for v in (*found.values(), *gradients.values()))


# ---- copies ----------------------------------------------------------------------------------------------------------


@every
@torch.no_grad()
def test_a_copy_is_independent_and_follows_its_own_weights(name, backbone):
    denoiser = moved(name, backbone)
    given = batch(denoiser)
    wanted = denoiser(*given).sample
    twin = deepcopy(denoiser)
    mine = {v.data_ptr() for v in denoiser.state_dict().values() if v.numel()}
    assert not mine & {v.data_ptr() for v in twin.state_dict().values() if v.numel()}
    randomise(twin)
    assert not torch.equal(twin(*given).sample, wanted) and torch.equal(denoiser(*given).sample, wanted)
    twin.load_state_dict(denoiser.state_dict())
    assert torch.equal(twin(*given).sample, wanted)


@every
@torch.no_grad()
def test_saved_and_loaded_it_is_bit_equal(name, backbone, tmp_path):
    denoiser = moved(name, backbone)
    edit.save(denoiser, tmp_path / "a")
    # a file's weights lie at any multiple of 8 bytes, where products are summed in another order: a copy lies as others
    loaded = deepcopy(edit.load(tmp_path / "a").denoiser)
    assert loaded.applied == denoiser.applied and (loaded.config, loaded.base) == (denoiser.config, denoiser.base)
    mine, other = denoiser.state_dict(), loaded.state_dict()
    assert mine.keys() == other.keys() and [k for k in mine if not torch.equal(mine[k], other[k])] == []
    given = batch(denoiser)
    assert torch.equal(loaded(*given).sample, denoiser(*given).sample)


@every
def test_on_the_meta_device_it_has_the_same_structure(name, backbone):
    denoiser = fresh(name, backbone)
    with torch.device("meta"):
        bare = edit.apply(BACKBONES[backbone].build(), {NAME: small(EDITS[name])}, fresh=False)
    assert bare.config == denoiser.config and len(bare.units) == len(denoiser.units)
    assert layout(bare.state_dict()) == layout(denoiser.state_dict())
    assert all(p.is_meta for p in (*bare.parameters(), *bare.buffers()))


def layout(state: Mapping[str, Tensor]) -> dict[str, tuple]:
    return {k: (v.shape, v.dtype) for k, v in state.items()}


# ---- generations -----------------------------------------------------------------------------------------------------


def sampler_of(denoiser: Denoiser) -> Sampler:
    """The family's own, in the fewest steps that the edit takes, with guidance in every one; even steps of Euler where
    it takes none of these, as a table of ten evaluations none of Heun's."""
    own, counts = default_sampler(denoiser), (2, 3, 6, 10, 12, 50)
    solvers = [replace(own.solver, steps=count) for count in counts]
    solvers += [Grid(tuple(i / count for i in range(count, 0, -1))) for count in counts]
    for solver in solvers:
        sampler = replace(own, solver=solver, guidance=2.0, interval=(0.0, 1.0))
        try:
            sampler.check(denoiser, default_objective(denoiser))
            return sampler
        except ValueError:
            continue
    raise AssertionError(f"{denoiser.applied[NAME]} takes none of these: {solvers}")


def pictures(denoiser: Denoiser, condition: Condition, numbers: Tensor) -> Tensor:
    return sampler_of(denoiser)(denoiser, default_objective(denoiser), condition, numbers)


@every
def test_it_samples_and_a_picture_does_not_depend_on_its_batch(name, backbone):
    denoiser = moved(name, backbone)
    _, _, condition = batch(denoiser)
    condition = replace(condition, end=None)  # the sampler tells it
    together = pictures(denoiser, condition, torch.arange(3))
    assert together.shape == (3, *denoiser.sample_shape) and together.isfinite().all()
    alone = pictures(denoiser, condition.map(lambda v: v[2:]), torch.tensor([2]))
    assert denoiser.applied[NAME].batchwise or near(alone[0], together[2], 1e-3)


def added(denoiser: Denoiser) -> int:
    """Elements of parameters that the dense model does not have."""
    new = denoiser.applied[NAME]
    mine = ((n, p) for n, p in denoiser.named_parameters())
    return sum(p.numel() for n, p in mine if n.startswith("edits.") or new.stock_key(n.removeprefix("model.")) is None)


def tokens(denoiser: Denoiser, given: Batch) -> int:
    """Of the whole batch, with its text."""
    stream = denoiser.embed(**denoiser.pack(*given))
    return sum(v.shape[0] * v.shape[1] for v in (stream.image, stream.text) if v is not None)


@every
def test_executed_macs_are_at_most_the_dense_models_and_what_is_decided_against_does_not_run(name, backbone):
    whole, open_, undecided = dense(backbone), fresh(name, backbone), moved(name, backbone)
    given, new = batch(open_), undecided.applied[NAME]
    most = executed(open_, given)  # two products of each added weight with each token, and 1 % for another operator
    dense_ = executed(whole, batch(whole))
    assert most <= 1.01 * dense_ + 2 * added(open_) * tokens(open_, given)
    shares: list[Tensor] = []

    def watch(step, out: Output) -> None:
        shares.extend(v.flatten() for v in new.decisions(out.trace).values())

    sampler, condition = sampler_of(undecided), replace(given[2], end=None)
    with Flops() as counter:
        sampler(undecided, default_objective(undecided), condition, torch.arange(3), watch=watch)
    # cond and uncond, and what a cache decides by; a fresh mixture of units leaves some out already
    ceiling = 1.02 * 2 * sampler.solver.evaluations * max(most, dense_ * new.adaptive)
    spares = new.adaptive or new.caches  # else decisions are which experts serve, and what runs is the same
    decided = torch.cat(shares).mean().item() if shares and spares else 1.0
    assert decided < 1 or not new.adaptive
    assert counter.total / 2 <= (1 - 0.25 * (1 - decided)) * ceiling
