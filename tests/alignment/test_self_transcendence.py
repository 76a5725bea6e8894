"""Self-Transcendence: a shallow unit learns the clean sample, then guided features of the model that did."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from families import family
from killed_runs import kill_at
from probes import small
from self_aligned import gradients, look
from small_runs import TWO_RANKS, losses, rows, train, train_ranks
from torch import nn

from edit.alignment.self_transcendence import SelfTranscendence, VAEWarmUp, grid_of, patches, within
from edit.backbones.dit import DiTConfig
from edit.measuring.turns import Call, phases
from edit.objectives import DDPM
from edit.paths import mean
from recipes.roles import Teacher
from recipes.runtime.checkpoint_files import newest

ALL = {"trange": None, "width": 8}
WARM = "+terms.warm={_target_: edit.alignment.self_transcendence.VAEWarmUp, unit: 0, width: 8}"
FEATURES = "+terms.st={_target_: edit.alignment.self_transcendence.SelfTranscendence, units: [0, 1], width: 8, ends: 6}"


# ---- stage 1 --------------------------------------------------------------------------------------------------------


def test_the_heads_velocity_error_is_the_error_of_the_clean_sample_over_t_squared(dit):
    term = VAEWarmUp(1, weight=1.0, **ALL)
    seen = look(term, dit)
    v = seen.own(seen.output.trace["unit.1"])  # b n (c p q)
    t = seen.t.view(-1, 1, 1)
    clean = patches(seen.x_t, seen.output.grid) - t * v
    expected = mean((clean - patches(seen.x, seen.output.grid)).square()) / seen.t**2
    torch.testing.assert_close(term.losses(seen)["warm_up"], expected, rtol=1e-5, atol=0)


def test_the_head_learns_from_step_0_and_no_unit_behind_it_does():
    torch.manual_seed(0)
    student = DiTConfig(
        8, 2, 4, hidden_size=32, depth=3, num_heads=4, num_classes=10, time="sit"
    ).build()  # as it starts
    term = VAEWarmUp(1, **ALL)
    seen = look(term, student)
    term.losses(seen)["warm_up"].sum().backward()
    found = gradients(student)
    assert not [n for n in found if "blocks.2" in n or "final_layer" in n]
    assert {n for n in found if "adaLN" in n} == {
        f"model.blocks.{i}.adaLN_modulation.1.{part}" for i in (0, 1) for part in ("weight", "bias")
    }
    assert "model.x_embedder.proj.weight" in found
    width = student.facts.width
    for i in (0, 1):  # gates alone move while they are zero
        rows = student.get_submodule(f"model.blocks.{i}.adaLN_modulation.1").weight.grad.view(6, width, width)
        assert [bool(part.any()) for part in rows] == [False, False, True, False, False, True]
    assert gradients(seen.own) == {n for n, _ in seen.own.named_parameters()}


@pytest.mark.parametrize("name", ["dit swiglu", "sd3", "pixart", "wan"])
def test_the_target_has_the_order_of_the_tokens_in_every_family(name):
    """The first token of the second row has the sample's part there."""
    model = family(name).float()
    grid = grid_of(model)
    x = torch.arange(2.0 * torch.tensor(model.sample_shape).prod()).view(2, *model.sample_shape)
    found = patches(x, grid)
    sizes = (1, *x.shape[2:])[-3:]
    a, p, q = (s // g for s, g in zip(sizes, grid, strict=True))
    frames = x if x.ndim == 5 else x[:, :, None]
    assert torch.equal(found[:, grid[2]], frames[:, :, :a, p : 2 * p, :q].flatten(1))
    seen = look(VAEWarmUp(0, **ALL), model, count=2)
    assert seen.own(seen.output.trace["unit.0"]).shape == found.shape


def test_a_model_of_noise_learns_the_noise(make_dit):
    dit, term = make_dit(time="ddpm", learn_sigma=True), VAEWarmUp(0, weight=1.0, **ALL)
    seen = look(term, dit, objective=DDPM())
    expected = mean((seen.own(seen.output.trace["unit.0"]) - patches(seen.noise, seen.output.grid)).square())
    torch.testing.assert_close(term.losses(seen)["warm_up"], expected)


def test_the_range_selects_samples_and_the_released_one_scales_all():
    t, each = torch.tensor([0.1, 0.5, 0.6, 0.9]), torch.tensor([1.0, 2, 3, 8])
    mask = within(t, (0.4, 0.7), legacy=False)
    assert mask.tolist() == [0, 1, 1, 0] and (mask * each).mean() == 1.25
    assert (each * mask.view(4, 1, 1, 1)).mean() == 1.75 == each.mean() * mask.mean()  # as released
    torch.testing.assert_close(within(t, (0.4, 0.7), legacy=True), torch.full((4,), 0.3))
    assert within(t, None, legacy=False).tolist() == [1, 1, 1, 1]
    # the released product is the constant in the mean over uniform times
    t = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    assert abs(within(t, (0.4, 0.7), legacy=False).mean() - 0.3) < 0.005


# ---- stage 2 --------------------------------------------------------------------------------------------------------


def test_features_are_extrapolated_from_the_null_conditions_to_the_conditions(make_dit):
    student, teacher = make_dit(), make_dit(1)
    seen = look(SelfTranscendence((0, 1), **ALL), student, teacher=teacher)
    told = (seen.x_t, seen.t)
    with torch.no_grad():
        f_c, f_u = (teacher(*told, c, taps=(1,)).trace["unit.1"] for c in (seen.whole, seen.null))

    def target(omega):
        return SelfTranscendence((0, 1), omega=omega, **ALL).target(seen)

    # fp32, a batch twice as large
    torch.testing.assert_close(target(1.0), f_c, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(target(0.0), f_u, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(target(30.0), f_u + 30 * (f_c - f_u), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(target(3.0) - target(1.0), target(7.0) - target(5.0), rtol=1e-3, atol=1e-4)
    expected = (target(7.0).flatten(1).norm(dim=1) / target(1.0).flatten(1).norm(dim=1)).mean()
    target(7.0)
    torch.testing.assert_close(SelfTranscendence((0, 1), **ALL).metrics(seen)["longer"], expected, rtol=1e-4, atol=0)


def watched(teacher):
    """Units that run, and the sample and time of each call."""
    ran, given = [], []
    for i, unit in enumerate(teacher.units):
        unit.register_forward_hook(lambda *_, i=i: ran.append(i))
    embed = teacher.embed
    teacher.embed = lambda **native: given.append(native) or embed(**native)
    return ran, given


def test_the_teacher_sees_the_students_sample_and_time_and_stops_behind_its_unit(make_dit):
    student, teacher = make_dit(), make_dit(1, depth=5)
    ran, given = watched(teacher)
    term = SelfTranscendence((0, 2), **ALL)
    seen = look(term, student, teacher=teacher)
    term.losses(seen)["transcendence"].sum().backward()
    assert ran == [0, 1, 2] and len(given) == 1
    (native,) = given
    for half in native["sample"].chunk(2):
        assert hash(half.numpy().tobytes()) == hash(seen.x_t.numpy().tobytes())
    assert all(torch.equal(half, seen.t) for half in native["timestep"].chunk(2))
    assert native["label"].tolist() == [0, 1, 2, 3, 10, 10, 10, 10]
    assert all(p.grad is None for p in teacher.parameters())
    assert {n.split(".")[2] for n in gradients(student) if ".blocks." in n} == {"0"}
    assert gradients(seen.own) == {n for n, _ in seen.own.named_parameters()}
    with torch.no_grad():
        whole = teacher(seen.x_t, seen.t, seen.whole, taps=(2,)).trace["unit.2"]
        part = seen.tapped_teacher(seen.x_t, seen.t, seen.whole, (2,))["unit.2"]
    assert torch.equal(part, whole)


def test_a_copy_of_the_teacher_without_guidance_and_head_has_no_loss(dit):
    term = SelfTranscendence((1, 1), omega=1.0, **ALL)
    own = nn.Identity()
    own.register_buffer("longer", torch.ones(()))
    loss = term.losses(look(term, dit, teacher=deepcopy(dit), own=own))["transcendence"]
    assert loss.max() < 1e-10  # squares of roundings: one batch is twice the other's size


def test_the_students_dropped_labels_do_not_change_the_target(make_dit):
    student, teacher = make_dit(), make_dit(1)
    term = SelfTranscendence((0, 1), omega=3.0, **ALL)
    kept = term.target(look(term, student, teacher=teacher))
    dropped = term.target(look(term, student, teacher=teacher, drop=torch.ones(4, dtype=torch.bool)))
    assert torch.equal(kept, dropped)


def test_a_teacher_that_is_told_nothing_has_nothing_to_guide_by(make_dit):
    student, teacher = make_dit(), make_dit(1)
    term = SelfTranscendence((0, 1), **ALL)
    seen = look(term, student, teacher=teacher)
    untold = replace(seen, whole=seen.null)
    one, other = (SelfTranscendence((0, 1), omega=w, **ALL).target(untold) for w in (0.0, 30.0))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # 30 times a rounding


def test_text_is_guided_by_the_empty_caption():
    student, teacher = (family("sd3").float() for _ in range(2))
    term = SelfTranscendence((0, 2), omega=5.0, **ALL)
    loss = term.losses(look(term, student, teacher=teacher))["transcendence"]
    assert loss.shape == (4,) and loss.isfinite().all() and (loss > 0).all()


def test_a_teacher_of_another_width_is_met_by_the_last_layer(make_dit):
    student, teacher = make_dit(), make_dit(1, hidden_size=64)
    term = SelfTranscendence((0, 1), **ALL)
    seen = look(term, student, teacher=teacher)
    assert seen.own.mlp[-1].out_features == 64 and term.losses(seen)["transcendence"].shape == (4,)


def test_the_plan_counts_two_batches_to_the_unit_until_the_end_and_no_guided_prediction():
    term, probe = SelfTranscendence((0, 3), ends=4, width=8), small(taps=(0,))
    with torch.device("meta"):
        own = term.build(probe.denoiser, probe.denoiser)
    live, over = phases({"st": term}, probe, small(), {"st": own}, 2, 10, True)
    student = Call("student", reach="weights")
    assert live.calls == (student, Call("teacher", 2.0, share=4 / 6)) and live.share == 0.4
    assert over.calls == (student,)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: SelfTranscendence((2, 1)), "no shallower"),
        (lambda: SelfTranscendence((0, 1), trange=(0.7, 0.4)), "first < last"),
        (lambda: SelfTranscendence((0, 1), trange=None, legacy_trange=True), "which is null"),
        (lambda: VAEWarmUp(-1), "at least 0"),
        (lambda: VAEWarmUp(0, width=0), "at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_models_that_cannot_teach_are_refused(make_dit, make_flux):
    dit, term = make_dit(), SelfTranscendence((0, 2))
    with pytest.raises(ValueError, match="there is none: give it with teacher.path"):
        term.build(dit, None)
    with pytest.raises(ValueError, match="the teacher has units 0 to 1, got 2"):
        term.build(dit, make_dit(depth=2))
    with pytest.raises(ValueError, match="this dit has units 0 to 2, got 5"):
        VAEWarmUp(5).build(dit)
    with pytest.raises(ValueError, match="knows no null condition"):
        term.build(make_flux(guidance_embeds=True), make_flux(guidance_embeds=True))
    with pytest.raises(ValueError, match="tokens of the student are .1, 4, 4., of the teacher .1, 8, 8."):
        term.build(dit, make_dit(patch_size=1))


def test_a_model_without_a_condition_is_refused(dit):
    class Plain(type(dit)):
        facts = replace(dit.facts, classes=None)

    dit.__class__ = Plain
    with pytest.raises(ValueError, match="has none: use a model of classes or text"):
        SelfTranscendence((0, 1)).build(dit, dit)


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run without an average, and a student that it teaches until step 6 of 12."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder, "name=none", "ema.decay=0", "ema.ramp=false", "trainer.max_steps=8")
    taught = (FEATURES, f"teacher.path={folder}/none")
    calls, tapped, guided = [], Teacher.tapped, Teacher.__call__
    try:
        Teacher.tapped = lambda self, *a: calls.append("tapped") or tapped(self, *a)
        Teacher.__call__ = lambda self, *a: calls.append("guided") or guided(self, *a)
        train(folder, "name=st", *taught)
    finally:
        Teacher.tapped, Teacher.__call__ = tapped, guided
    return folder, calls


def test_the_first_run_leaves_its_raw_weights(folder):
    state = torch.load(newest(folder[0] / "none/checkpoints"), weights_only=True)["state_dict"]
    raw = {k.removeprefix("denoiser."): v for k, v in state.items() if k.startswith("denoiser.")}
    assert raw and all(torch.equal(state[f"ema.{k}"], v) for k, v in raw.items())


def test_after_the_stop_the_teacher_is_gone_and_the_loss_is_the_objectives(folder):
    path, calls = folder
    assert calls == ["tapped"] * 6
    found = rows(path, "st")
    assert all(r["train/st/transcendence"] and r["train/st/longer"] for r in found[:6])
    assert not any(r["train/st/transcendence"] or r["train/flow"] for r in found[6:])
    state = torch.load(newest(path / "st/checkpoints"), weights_only=True)
    assert not [k for k in state["state_dict"] if k.startswith("own.") or "teacher" in k]


@pytest.mark.slow
def test_weights_of_zero_are_training_without_the_two_terms_to_the_bit(folder, tmp_path):
    weightless = (WARM, "+terms.warm.weight=0.0", "+terms.st.weight=0.0")
    train(tmp_path, "name=zero", FEATURES, f"teacher.path={folder[0]}/none", *weightless, "trainer.max_steps=8")
    assert losses(tmp_path, "zero") == losses(folder[0], "none")


@pytest.mark.slow
@pytest.mark.parametrize("at", [5, 8], ids=["before the stop", "after it"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_before_or_after_the_stop_goes_on_bit_equal(folder, tmp_path, at, world):
    words = (FEATURES, f"teacher.path={folder[0]}/none", *(["trainer=fsdp2", *TWO_RANKS] if world == 2 else []))
    train_ranks(tmp_path, "name=whole", *words, world=world)
    kill_at(tmp_path, "killed", at, *words, world=world)
    train_ranks(tmp_path, "name=killed", *words, world=world)
    assert losses(tmp_path, "killed") == losses(tmp_path, "whole")
