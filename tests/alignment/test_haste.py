"""HASTE: the map term against hand-written ones, where its gradient goes, its trigger, and runs across their end."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import encoders
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from ranks import run_ranks
from small_runs import TWO_RANKS, losses, rows, train
from torch import nn
from views import passed

from edit.alignment.encoder import Encoder
from edit.alignment.haste import HASTE, WHOLE, GradientAngle, Watched, by_frame, map_loss, regridded
from edit.alignment.looker import Encoded, Looker
from edit.alignment.repa import REPA
from edit.backbones.dit import DiTConfig
from edit.losses import wanted
from recipes.config.errors import UserError
from recipes.models import refuse_unending, refuse_unstoppable
from recipes.runtime.checkpoint_files import checkpoints, newest, remove, step_of

WORLDS = Path(__file__).parents[2] / "configs/world"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    encoders.of_timm(folder / "eye", 8, 2)
    encoders.of_timm(folder / "coarse", 8, 4)
    return folder


@pytest.fixture
def features(folder) -> REPA:
    return REPA(Encoder(str(folder / "eye")), 1, hidden=20)


def colours(x: torch.Tensor) -> torch.Tensor:
    return x[:, :3].tanh()


def seen_of(term, student, x_t, t, condition, x, **more):
    taps, branches, maps = wanted([term])
    out = student(x_t, t, condition, taps=taps, branches=branches, maps=maps)
    frozen = {name: spec.load() for name, spec in term.frozen.items()}
    seen = passed(out, t, own=term.build(student))
    return replace(seen, x=x, x_t=x_t, frozen=frozen, decode=colours, **more)


def logs(*shape: int) -> torch.Tensor:
    return (2 * torch.randn(*shape)).log_softmax(-1)


# ---- the map term ---------------------------------------------------------------------------------------------------


def test_the_map_loss_is_at_least_the_entropy_and_equal_for_equal_logits():
    """Oracle 1: logits that differ by a constant in each row are the same map."""
    grid, theirs = (4, 4), torch.randn(3, 2, 16, 16)
    entropy = -(theirs.softmax(-1) * theirs.log_softmax(-1)).sum(-1).mean((1, 2))
    same = map_loss((theirs + torch.randn(3, 2, 16, 1)).log_softmax(-1), theirs.log_softmax(-1), grid, grid)
    torch.testing.assert_close(same, entropy)
    assert (map_loss(logs(3, 2, 16, 16), theirs.log_softmax(-1), grid, grid) > entropy + 0.1).all()


def test_a_uniform_student_has_the_logarithm_of_the_number_of_keys(features, dit, batch):
    """Oracle 2, through the model: q = 0."""
    with torch.no_grad():
        dit.model.blocks[2].attn.qkv.weight[:32] = 0
        dit.model.blocks[2].attn.qkv.bias[:32] = 0
    term = HASTE(features, [(2, -1)], weight=1.0)
    found = term.losses(seen_of(term, dit, *batch, torch.randn_like(batch[0])))
    torch.testing.assert_close(found["maps"], torch.full((4,), math.log(16)))


def test_the_term_is_the_mean_of_a_loop_over_pairs_heads_and_rows(features, dit, batch):
    term = HASTE(features, [(0, 1), (2, -1)], weight=0.3)
    seen = seen_of(term, dit, *batch, torch.randn_like(batch[0]))
    encoded, total = seen.frozen["encoder.0"](colours(seen.x)), 0.0
    for unit, layer in term.pairs:
        q, p = seen.output.trace[f"unit.{unit}.maps"], encoded.maps[layer].exp()
        assert q.shape == (4, 4, 16, 16) and p.shape == (4, 2, 16, 16)
        for head in range(2):  # of the student's four: the first follows the first
            for row in range(16):
                total = total - (p[:, head, row] * q[:, head, row]).sum(-1) / (2 * 2 * 16)
    torch.testing.assert_close(term.losses(seen)["maps"], 0.3 * total)
    repa = replace(features).losses(replace(seen, frozen={"encoder.0": features.encoder.load()}))
    torch.testing.assert_close(term.losses(seen)["features"], repa["repa"])


def test_the_first_heads_that_both_have_are_compared():
    few, many = logs(2, 3, 4, 4), logs(2, 5, 4, 4)
    torch.testing.assert_close(map_loss(few, many, (2, 2), (2, 2)), map_loss(few, many[:, :3], (2, 2), (2, 2)))
    torch.testing.assert_close(map_loss(many, few, (2, 2), (2, 2)), map_loss(many[:, :3], few, (2, 2), (2, 2)))


def test_the_students_maps_are_the_attention_it_computes_with(dit, batch):
    """Oracle 6: and its prediction is the same with and without maps."""
    plain, mapped = dit(*batch), dit(*batch, maps={1: WHOLE})
    torch.testing.assert_close(mapped.sample, plain.sample, rtol=1e-5, atol=1e-5)
    given, block = [], dit.model.blocks[1]
    handle = block.attn.qkv.register_forward_hook(lambda module, args, out: given.append(out))
    dit(*batch)
    handle.remove()
    q, k, _ = given[0].unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(mapped.trace["unit.1.maps"], (q @ k.mT / 8**0.5).log_softmax(-1))


# ---- where the gradient goes ----------------------------------------------------------------------------------------


def rows_of(parameter, part: int, parts: int):
    return parameter.grad.chunk(parts)[part]


def test_the_gradient_reaches_queries_and_keys_of_the_first_heads_and_what_is_before(features, dit, batch):
    """Oracle 4: one tapped block."""
    term = HASTE(features, [(1, -1)])
    seen = seen_of(term, dit, *batch, torch.randn_like(batch[0]))
    term.losses(seen)["maps"].mean().backward()
    first, tapped, later = dit.model.blocks
    assert all(p.grad.any() for p in first.parameters())
    q, k, v = (rows_of(tapped.attn.qkv.weight, i, 3).view(4, 8, 32) for i in range(3))  # head, channel, input
    assert q[:2].any() and k[:2].any() and not q[2:].any() and not k[2:].any() and not v.any()
    six = [bool(rows_of(tapped.adaLN_modulation[1].weight, i, 6).any()) for i in range(6)]
    assert six == [True, True, False, False, False, False]  # shift and scale of the attention alone
    for part in (tapped.attn.proj, tapped.mlp, later, dit.model.final_layer, seen.own):
        assert all(p.grad is None or not p.grad.any() for p in part.parameters())


def test_at_the_start_maps_teach_queries_and_keys_behind_the_closed_gate(features, batch):
    """Oracle 5: adaLN-Zero."""
    torch.manual_seed(0)
    student = DiTConfig(input_size=8, hidden_size=32, depth=3, num_heads=4, num_classes=10).build()
    term = HASTE(features, [(1, -1)])
    term.losses(seen_of(term, student, *batch, torch.randn_like(batch[0])))["maps"].mean().backward()
    weight = student.model.blocks[1].attn.qkv.weight
    assert rows_of(weight, 0, 3).any() and rows_of(weight, 1, 3).any() and not rows_of(weight, 2, 3).any()


@pytest.mark.parametrize("weights", [(0.5, 0.0), (0.0, 0.0)], ids=["REPA", "vanilla"])
def test_without_the_weight_of_the_maps_it_is_repa_and_without_both_vanilla(weights, features, make_dit, batch):
    """Oracle 9."""
    x_t, t, condition = batch
    target, x = torch.randn_like(x_t), torch.randn_like(x_t)

    def gradients(term):
        torch.manual_seed(0)
        student = make_dit()
        if term is None:
            loss = (student(x_t, t, condition).sample - target).square().mean()
        else:
            seen = seen_of(term, student, x_t, t, condition, x)
            loss = (seen.output.sample - target).square().mean() + sum(v.mean() for v in term.losses(seen).values())
        loss.backward()
        return [p.grad for p in student.parameters()]

    lambda_r, lambda_a = weights
    haste = gradients(HASTE(replace(features, weight=lambda_r), [(1, -1)], weight=lambda_a, ends=None))
    for a, b in zip(haste, gradients(features if lambda_r else None), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # maps are made in another order of sums


# ---- joint sequences, frames and grids ------------------------------------------------------------------------------


def test_of_a_joint_sequence_image_rows_and_keys_are_renormalised():
    joint = torch.randn(2, 3, 7, 7)  # three text tokens, then four of the image
    found = by_frame(joint.log_softmax(-1), (1, 2, 2))
    torch.testing.assert_close(found, joint[:, :, 3:, 3:].log_softmax(-1))
    whole = joint.log_softmax(-1)
    assert by_frame(whole, (1, 7, 1)).data_ptr() == whole.data_ptr()  # nothing to leave out


def test_text_and_image_of_flux_are_told_apart(features, flux, told):
    """In the model: text first, in double units and in single ones."""
    for unit in (1, 4):
        term = HASTE(features, [(unit, -1)])
        seen = seen_of(term, flux, *told, torch.randn(3, 4, 8, 8))
        maps = seen.output.trace[f"unit.{unit}.maps"]
        assert maps.shape[-2:] == (21, 21)
        p = maps.exp()[:, :2, 5:, 5:]
        theirs = seen.frozen["encoder.0"](colours(seen.x)).maps[-1].exp()
        expected = -(theirs * (p / p.sum(-1, keepdim=True)).log()).sum(-1).mean((1, 2))
        torch.testing.assert_close(term.losses(seen)["maps"], 0.5 * expected)


def test_registers_are_left_out(features, make_dit, batch):
    student = make_dit(registers=2)
    term = HASTE(features, [(1, -1)])
    seen = seen_of(term, student, *batch, torch.randn_like(batch[0]))
    assert seen.output.trace["unit.1.maps"].shape[-1] == 18
    assert by_frame(seen.output.trace["unit.1.maps"], seen.output.grid).shape == (4, 4, 16, 16)
    assert term.losses(seen)["maps"].shape == (4,)


def test_frames_attend_within_themselves_and_each_follows_its_own():
    logits = torch.randn(2, 3, 8, 8)  # two frames of four tokens
    found = by_frame(logits.log_softmax(-1), (2, 2, 2))
    first, second = logits[:, :, :4, :4].log_softmax(-1), logits[:, :, 4:, 4:].log_softmax(-1)
    torch.testing.assert_close(found, torch.stack((first, second), 1).flatten(0, 1))


def test_a_video_with_other_frames_than_tokens_is_refused(features):
    out = SimpleNamespace(trace={"unit.1.maps": logs(2, 2, 32, 32)}, grid=(2, 4, 4), kept=None)
    seen = SimpleNamespace(x=torch.zeros(2, 3, 5, 8, 8), output=out, own=None, progress=0.0, decode=lambda x: x)
    seen.frozen = {"encoder.0": lambda pixels: Encoded(torch.zeros(10, 16, 16), (4, 4), {-1: logs(10, 2, 16, 16)})}
    with pytest.raises(ValueError, match="HASTE: the model has 2 frames of tokens, the video 5 frames"):
        HASTE(features, [(1, -1)]).losses(seen)


def test_maps_of_another_grid_are_resized_over_keys_and_then_queries():
    p = torch.randn(2, 3, 16, 16).softmax(-1)
    assert torch.allclose(regridded(p, (4, 4), (4, 4)), p, atol=1e-6)
    found = regridded(p, (4, 4), (2, 2))
    blocks = p.view(2, 3, 2, 2, 2, 2, 2, 2, 2, 2)  # bilinear from 4 to 2 is the mean of 2 x 2
    mean = blocks.mean((3, 5, 7, 9)).reshape(2, 3, 4, 4)
    torch.testing.assert_close(found, mean / mean.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(regridded(p, (4, 4), (3, 5)).sum(-1), torch.ones(2, 3, 15))
    uneven = torch.zeros(1, 1, 6, 6)
    uneven[..., 5] = 1.0  # everybody attends to the last of 2 x 3 places
    assert regridded(uneven, (2, 3), (4, 6)).view(24, 4, 6)[:, -1, -1].gt(0.2).all()


def test_an_encoder_of_another_grid_goes_through_the_term(folder, dit, batch):
    term = HASTE(REPA(Encoder(str(folder / "coarse")), 1, hidden=20), [(1, -1)])
    found = term.losses(seen_of(term, dit, *batch, torch.randn_like(batch[0])))
    assert all(v.isfinite().all() and v.shape == (4,) for v in found.values())


# ---- settings -------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers(features):
    term, trigger = HASTE(features, [(4, 8), (5, 9)]), GradientAngle()
    assert (term.weight, term.features.weight, term.ends, term.trigger) == (0.5, 0.5, 250_000, None)
    assert (trigger.unit + 1, trigger.below, trigger.first, trigger.period) == (5, -0.05, 50_000, 10_000)
    assert term.maps == {4: WHOLE, 5: WHOLE} and term.encoder.layers == (8, 9) and not term.stops and term.decodes


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"pairs": []}, "pairs are .student unit, encoder layer., at least one"),
        ({"pairs": [(1, 2, 3)]}, "pairs must be a list of 2 numbers in each place"),
        ({"cached": True}, "maps come from the one encoder of the features as it runs"),
        ({"ends": 5}, "features and maps end together: say ends, and leave out features.ends"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, sentence, features):
    pairs = settings.pop("pairs", [(1, -1)])
    with pytest.raises(ValueError, match=sentence):
        HASTE(replace(features, **settings), pairs)


def test_units_and_layers_that_do_not_exist_are_refused(features, dit):
    with pytest.raises(ValueError, match="HASTE: this dit has units 0 to 2, got 3"):
        HASTE(features, [(3, -1)]).build(dit)
    with pytest.raises(ValueError, match="HASTE: this dit has units 0 to 2, got 4"):
        HASTE(features, [(1, -1)], trigger=GradientAngle()).build(dit)
    with pytest.raises(ValueError, match="layers: 3 is none of the 3 of .*eye: choose 0 to 2"):
        HASTE(features, [(1, 3)]).build(dit)
    with pytest.raises(ValueError, match="batches=9 is more than period=8"):
        GradientAngle(period=8, batches=9)


# ---- the trigger ----------------------------------------------------------------------------------------------------


class Quadratic(HASTE):
    """L_align = 1/2 |theta - b|^2 in place of both terms."""

    def losses(self, seen):
        return {"toy": 0.5 * (seen.own.theta - seen.own.b).square().sum()[None]}


def quadratic(theta: float, step: int, own=None):
    """What the trigger sees at a place on the line from a = 0 to b = 1 ."""
    own = Watched(nn.Identity()) if own is None else own
    own.theta, own.b = torch.tensor([theta, 0.1], requires_grad=True), torch.tensor([1.0, 0.0])
    own.a = torch.tensor([0.0, 0.0])
    loss = 0.5 * (own.theta - own.a).square().sum()[None]
    gradient = lambda value, unit: torch.autograd.grad(value, own.theta, retain_graph=True)[0]  # noqa: E731
    return SimpleNamespace(own=own, step=step, data_loss=loss, gradient=gradient)


def test_the_trigger_is_the_cosine_and_fires_between_the_two_minima(features):
    """Oracle 8."""
    term = Quadratic(features, [(1, -1)], trigger=GradientAngle(1, first=11, period=5, batches=1))
    assert term.stops
    for theta, fires in ((-0.5, False), (1.5, False), (0.5, True)):
        seen = quadratic(theta, 11)
        assert term.over(seen) is fires
        expected = F.cosine_similarity(seen.own.theta - seen.own.a, seen.own.theta - seen.own.b, dim=0)
        torch.testing.assert_close(seen.own.mean, expected)
    looked = [term.over(quadratic(0.5, step)) for step in range(8, 18)]
    assert looked == [step in (11, 16) for step in range(8, 18)]


def test_a_look_takes_the_mean_of_its_batches_and_forgets_the_last_look(features):
    term = Quadratic(features, [(1, -1)], trigger=GradientAngle(1, first=0, period=4, batches=2))
    own = Watched(nn.Identity())
    assert not term.over(quadratic(1.5, 0, own)) and not term.over(quadratic(0.5, 1, own))  # +0.99 and -0.92
    assert not term.over(quadratic(0.5, 2, own)) and own.found[1] == 2  # nobody looks
    assert not term.over(quadratic(0.5, 4, own)) and own.found[1] == 1
    assert term.over(quadratic(0.5, 5, own)) and own.found[1] == 2
    with pytest.raises(ValueError, match="no denoising loss whose gradient the trigger could compare"):
        term.over(SimpleNamespace(**{**vars(quadratic(0.5, 5)), "data_loss": None}))


def test_strategies_that_hide_gradients_of_units_are_refused(features):
    trainer = SimpleNamespace(strategy="fsdp2", compile=False)
    terms = {"haste": HASTE(features, [(1, -1)], trigger=GradientAngle(1))}
    with pytest.raises(UserError, match="terms.haste stops by gradients of single units, which trainer=fsdp2 does not"):
        refuse_unstoppable(trainer, terms)
    with pytest.raises(UserError, match="which trainer.compile=true does not let it see"):
        refuse_unstoppable(SimpleNamespace(strategy="ddp", compile=True), terms)
    refuse_unstoppable(SimpleNamespace(strategy="ddp", compile=False), terms)
    refuse_unstoppable(trainer, {"haste": HASTE(features, [(1, -1)])})
    with pytest.raises(UserError, match="terms.haste ends at step 250000, and trainer=zero2 keeps"):
        refuse_unending("zero2", terms)


# ---- runs across the end --------------------------------------------------------------------------------------------


def words(folder, *more, ends="4", trigger="null", weight="0.5"):
    encoder = f"{{_target_: edit.alignment.encoder.Encoder, path: {folder}/eye}}"
    features = f"{{_target_: edit.alignment.repa.REPA, unit: 1, hidden: 24, encoder: {encoder}, weight: {weight}}}"
    settings = f"features: {features}, pairs: [[0, -2], [1, -1]], ends: {ends}, trigger: {trigger}, weight: {weight}"
    return (f"+terms.haste={{_target_: edit.alignment.haste.HASTE, {settings}}}", *more)


SHORT = "trainer.max_steps=7"
# gradients always point apart by this measure: stops at the end of the first look, step 3
TURNED = "{_target_: edit.alignment.haste.GradientAngle, unit: 0, below: 1.01, first: 2, period: 3, batches: 2}"


def looks(folder, overrides) -> int:
    """Train; how often the encoder was asked."""
    count, forward = [0], Looker.forward

    def counted(self, images):
        count[0] += 1
        return forward(self, images)

    Looker.forward = counted
    try:
        train(folder, *overrides)
    finally:
        Looker.forward = forward
    return count[0]


def test_from_its_end_on_neither_encoder_nor_projector_are_left(folder, tmp_path):
    """Oracle 7."""
    assert looks(tmp_path, ("name=a", *words(folder), SHORT)) == 4  # once in each of the steps 0 to 3
    found = rows(tmp_path, "a")
    assert all(float(r["train/haste/maps"]) > 0 for r in found[:4])
    assert not any(r.get("train/haste/maps") or r.get("train/haste/features") for r in found[4:])
    kept = torch.load(newest(tmp_path / "a/checkpoints"), weights_only=True)
    assert not any("own" in k for k in kept["state_dict"])
    (optimizer,) = kept["optimizer_states"]
    assert optimizer["state"].keys() == {place for group in optimizer["param_groups"] for place in group["params"]}


@pytest.mark.slow
def test_from_its_end_on_the_loss_is_the_vanilla_one(folder, tmp_path):
    """Oracle 7: terms with weight 0 train as none, so that losses can be compared bit for bit."""
    train(tmp_path, "name=weightless", *words(folder, weight="0.0"), SHORT)
    train(tmp_path, "name=vanilla", SHORT)
    kept = torch.load(newest(tmp_path / "weightless/checkpoints"), weights_only=True)
    weightless, vanilla = ([r["train/loss"] for r in rows(tmp_path, n)] for n in ("weightless", "vanilla"))
    assert weightless[4:] == vanilla[4:]
    other = torch.load(newest(tmp_path / "vanilla/checkpoints"), weights_only=True)
    counts = [[len(g["params"]) for g in k["optimizer_states"][0]["param_groups"]] for k in (kept, other)]
    assert counts[0] == counts[1] and kept["state_dict"].keys() == other["state_dict"].keys()


@pytest.fixture(scope="module")
def triggered(folder, tmp_path_factory):
    """A run that its trigger has ended: its folder, its words, how often the encoder was asked."""
    runs = tmp_path_factory.mktemp("runs")
    given = ("name=a", *words(folder, "checkpoint.every=1", "checkpoint.keep=20", SHORT, ends="null", trigger=TURNED))
    return runs, given, looks(runs, given)


def test_a_trigger_ends_both_terms_after_its_look(triggered):
    runs, _, asked = triggered
    assert asked == 6  # steps 0 to 3, and once more in each of the two that look
    found = rows(runs, "a")
    assert all(r.get("train/haste/maps") for r in found[:4])
    assert not any(r.get("train/haste/maps") for r in found[4:])
    assert -1 <= float(found[3]["train/haste/angle"]) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 4, 5])
def test_a_run_whose_trigger_has_fired_goes_on_in_the_second_phase_bit_equal(triggered, tmp_path, at):
    """Oracle 7, the latch: stopped while gradients are looked at, just after that, and later."""
    runs, given, _ = triggered
    shutil.copytree(runs / "a", tmp_path / "a", ignore=shutil.ignore_patterns("artifact", "report.json"))
    for file in checkpoints(tmp_path / "a/checkpoints"):
        if step_of(file) > at:
            remove(file)
    asked = looks(tmp_path, given)
    assert asked == (2 if at == 3 else 0)
    assert losses(tmp_path, "a") == losses(runs, "a")


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_step_as_one(folder, tmp_path):
    given = words(folder, ends="null", trigger=TURNED)
    train(tmp_path, "name=one", *given)
    two = ("name=two", *given, "trainer=ddp", *TWO_RANKS, "data.batch_size=8")
    run_ranks(looks, 2, args=(tmp_path, two), timeout=120)
    one, two = (rows(tmp_path, name) for name in ("one", "two"))
    assert [bool(r.get("train/haste/maps")) for r in one] == [bool(r.get("train/haste/maps")) for r in two]
    for key in ("train/loss", "train/haste/angle"):
        values = ([float(r[key]) for r in side[:4]] for side in (one, two))
        assert all(abs(a - b) < 2e-4 for a, b in zip(*values, strict=True))


# ---- worlds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(WORLDS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_worlds_pairs_are_of_units_up_to_the_aligned_one_and_of_the_encoder_that_is_trained_for_it(file):
    depth = OmegaConf.load(WORLDS.parent / "recipe/encoder.yaml").depth
    world = OmegaConf.load(file).world
    for unit, layer in world.get("haste", []):
        assert 0 <= unit <= world.repa and -depth <= layer < depth
