from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.fsdp import fully_shard
from views import passed

import edit
from edit.backbones.dit import DiTConfig
from edit.distillation.features import FeatureKD, inliers
from edit.distillation.pairs import interval_ends, same
from edit.losses import Seen
from edit.objectives import Ramp
from edit.pruning.depth import DepthPruning
from edit.stream import Output


def tokens(student: torch.Tensor, teacher: torch.Tensor, progress: float = 0.0) -> Seen:
    """A pass with these tokens at unit 0: b n d."""
    b = len(student)
    outs = (Output(torch.zeros(b, 1, 2, 2), None, {"unit.0": x}) for x in (student, teacher))
    out, taught = outs
    return passed(out, torch.zeros(b), progress, taught)


VARIANTS = [
    {"norm": "raw"},
    {"norm": "unit"},
    {"norm": "layer"},
    {"norm": "relative"},
    {"norm": "relative", "projector": "linear"},
    {"norm": "layer", "projector": "linear"},
    {"norm": "raw", "sigma": 2.0},
    {"norm": "raw", "sigma": 2.0, "mask": "teacher"},
    {"norm": "raw", "sigma": 2.0, "mask": "intersection"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_copy_of_the_teacher_has_no_loss_and_no_gradient(options, flux, told, see):
    term, student = FeatureKD(same(0, 6), **options), deepcopy(flux)
    own = term.build(student, flux)
    loss = term.losses(replace(see(student, flux, told, term), own=own))["feature_kd"]
    loss.sum().backward()
    assert loss.tolist() == [0, 0, 0]
    for p in (*student.parameters(), *([] if own is None else own.parameters())):
        assert p.grad is None or not p.grad.any()


def test_a_shallower_student_is_pulled_towards_the_ends_of_its_intervals(flux, told, see):
    kept = (0, 2, 4, 6)
    student = edit.apply(deepcopy(flux), {"deep": DepthPruning(pattern="listed", units=kept)})
    term = FeatureKD(interval_ends(kept, (3, 4)))
    assert term.taps == (0, 1, 2, 3) and term.teacher_taps == (1, 2, 5, 6)
    loss = term.losses(replace(see(student, flux, told, term), own=term.build(student, flux)))["feature_kd"]
    loss.sum().backward()
    assert loss.shape == (3,) and (loss > 0).all()
    assert all(p.grad.any() for n, p in student.named_parameters() if "transformer_blocks.0.attn.to_q.weight" in n)
    assert all(p.grad is None for p in flux.parameters())


def test_text_and_image_are_compared_apart_and_averaged_over_all_pairs(flux, make_flux, told, see):
    student = make_flux(seed=5)
    term = FeatureKD(((1, 0), (5, 6)), weight=2.0, weights=(1.0, 0.1), norm="raw", text=0.5)
    seen = see(student, flux, told, term)
    mine, theirs = seen.output.trace, seen.taught.trace

    def mse(s: str, t: str) -> torch.Tensor:
        return ((mine[s] - theirs[t]) ** 2).mean((1, 2))

    expected = mse("unit.1", "unit.0") + 0.5 * mse("unit.1.text", "unit.0.text")
    expected += 0.1 * (mse("unit.5", "unit.6") + 0.5 * mse("unit.5.text", "unit.6.text"))
    found = term.losses(seen)["feature_kd"]
    torch.testing.assert_close(found, 2 * expected / 4, rtol=1e-5, atol=0)  # fp32, sums in another order
    image = FeatureKD(((1, 0),), weight=1.0, norm="raw", text=0.0).losses(seen)["feature_kd"]
    torch.testing.assert_close(image, mse("unit.1", "unit.0"), rtol=1e-5, atol=0)


def test_a_teacher_that_happens_to_have_a_graph_is_not_trained(dit):
    s, t = (torch.randn(2, 5, 8, requires_grad=True) for _ in range(2))
    term = FeatureKD(((0, 0),))
    term.losses(replace(tokens(s, t), own=term.build(dit, dit)))["feature_kd"].sum().backward()
    assert t.grad is None and s.grad.any()


@pytest.mark.parametrize("norm", ["unit", "layer"])
def test_distances_of_normalised_tokens_do_not_see_their_scale(norm):
    s, t = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    term = FeatureKD(((0, 0),), norm=norm)
    a, b = (term.losses(tokens(c * s, t))["feature_kd"] for c in (1, 7))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=0)  # the epsilon inside the layer norm
    assert (a > 0.1).all()


def test_the_relative_distance_divides_by_a_running_mean_that_survives_a_state_dict(dit):
    term = FeatureKD(((0, 0),), weight=1.0, momentum=0.9)
    own = term.build(dit, dit)
    s, t = torch.zeros(2, 5, 8), torch.ones(2, 5, 8)
    first = term.losses(replace(tokens(s, 2 * t), own=own))["feature_kd"]
    assert first.tolist() == [1, 1]  # the first batch divides by its own: 4
    second = term.losses(replace(tokens(s, t), own=own))["feature_kd"]
    running = 0.9 * 4 + 0.1 * 1
    torch.testing.assert_close(second, torch.full((2,), 1 / running))
    resumed = term.build(dit, dit)
    resumed.load_state_dict(own.state_dict())
    torch.testing.assert_close(resumed.mean_square[0], torch.tensor([running, 0.0]))  # no text seen
    third = [term.losses(replace(tokens(s, t), own=o))["feature_kd"] for o in (own, resumed)]
    assert torch.equal(*third)


def _small_dit():
    return DiTConfig(input_size=4, hidden_size=8, depth=1, num_heads=2).build()


def _running_mean_of_a_rank() -> list[float]:
    dist.init_process_group("gloo")
    term = FeatureKD(((0, 0),))
    own = term.build(_small_dit(), _small_dit())
    for scale in (1.0, 3.0):
        t = (scale + dist.get_rank()) * torch.ones(2, 5, 8)
        term.losses(replace(tokens(torch.zeros_like(t), t), own=own))
    dist.destroy_process_group()
    return own.mean_square[0].tolist()


def test_all_ranks_divide_by_the_same_running_mean():
    first, second = run_ranks(_running_mean_of_a_rank)
    assert first == second == pytest.approx([0.99 * (1 + 4) / 2 + 0.01 * (9 + 16) / 2, 0.0])


def _sharded_projector() -> list[float]:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    term, s, t = FeatureKD(((0, 0),), projector="linear"), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    own = term.build(_small_dit(), _small_dit())
    seen = tokens(s, t)
    (plain,) = term.losses(replace(seen, own=deepcopy(own))).values()
    own = fully_shard(own)
    (sharded,) = term.losses(replace(seen, own=own)).values()
    sharded.sum().backward()
    dist.destroy_process_group()
    return [*plain.tolist(), *sharded.tolist(), sum(p.grad is not None for p in own.parameters())]


def test_a_sharded_projector_computes_the_same():
    for a, b, c, d, with_gradient in run_ranks(_sharded_projector):
        assert (a, b) == pytest.approx((c, d)) and with_gradient == 2


# ---- masks -----------------------------------------------------------------------------------------------------------


def test_without_outliers_a_mask_changes_nothing():
    s, t = torch.rand(2, 16, 8), torch.rand(2, 16, 8)  # uniform numbers stay within 1.73 deviations
    plain, *masked = (
        FeatureKD(((0, 0),), norm="raw", **o).losses(tokens(s, t))["feature_kd"]
        for o in ({}, {"sigma": 2.0}, {"sigma": 2.0, "mask": "teacher"})
    )
    assert torch.equal(plain, masked[0]) and torch.equal(plain, masked[1])


def test_an_outlier_that_both_have_does_not_count():
    s, t = torch.rand(1, 64, 8), torch.rand(1, 64, 8)
    term = FeatureKD(((0, 0),), norm="raw", sigma=2.0)
    losses = []
    for mine, theirs in ((50.0, 60.0), (500.0, 6.0e4)):
        s[0, 3, 2], t[0, 3, 2] = mine, theirs
        assert not inliers(s, 2.0)[0, 3, 2] and inliers(s, 2.0).sum() == s.numel() - 1
        losses.append(term.losses(tokens(s, t))["feature_kd"])
    assert torch.equal(*losses)


def test_separate_masks_compare_an_outlier_of_one_with_zero_and_a_shared_one_leaves_it_out():
    s, t = torch.rand(1, 64, 8), torch.rand(1, 64, 8)
    t[0, 3, 2] = 50.0  # of the teacher alone
    rest = inliers(t, 2.0)
    plain = ((s - t)[rest] ** 2).sum() / t.numel()
    shared = FeatureKD(((0, 0),), weight=1.0, norm="raw", sigma=2.0, mask="teacher")
    separate = FeatureKD(((0, 0),), weight=1.0, norm="raw", sigma=2.0)
    torch.testing.assert_close(shared.losses(tokens(s, t))["feature_kd"][0], plain)
    torch.testing.assert_close(separate.losses(tokens(s, t))["feature_kd"][0], plain + s[0, 3, 2] ** 2 / t.numel())


def masked(s: torch.Tensor, t: torch.Tensor, **options) -> torch.Tensor:
    return FeatureKD(((0, 0),), weight=1.0, norm="raw", **options).losses(tokens(s, t))["feature_kd"]


def test_massive_activations_at_one_place_count_only_without_a_mask():
    # oracle 8 of methods/tinyfusion.md
    t = torch.randn(2, 16, 32)
    s = t.clone().requires_grad_()
    with torch.no_grad():
        s[:, 3, 5], t[:, 3, 5] = 900.0, 1000.0
    assert masked(s, t, sigma=2.0).tolist() == [0.0, 0.0]
    assert masked(s, t).tolist() == pytest.approx([19.53125] * 2)  # 100^2 / 512
    assert torch.equal(masked(s, t, sigma=1e9), masked(s, t))
    (masked(s, t, sigma=2.0) + masked(s, torch.randn(2, 16, 32), sigma=2.0)).sum().backward()
    assert s.grad[0, 3, 5] == 0 and (s.grad != 0).sum() > 900


def test_an_outlier_of_the_teacher_alone_leaves_the_students_square_unless_masks_intersect():
    t = torch.randn(2, 16, 32)
    s = t.clone()
    t[:, 3, 5] = 1000.0
    torch.testing.assert_close(masked(s, t, sigma=2.0), s[:, 3, 5] ** 2 / 512 + gap(s, t, 2.0))
    keep = inliers(s, 2.0) & inliers(t, 2.0)
    torch.testing.assert_close(masked(s, t, sigma=2.0, mask="intersection"), (((s - t) * keep) ** 2).mean((1, 2)))


def gap(s: torch.Tensor, t: torch.Tensor, sigma: float) -> torch.Tensor:
    """What the student's own ordinary outliers, which its mask zeroes and the teacher's does not, add: b."""
    lost = ~inliers(s, sigma) & inliers(t, sigma)
    return (t**2 * lost).sum((1, 2)) / s[0].numel()


def test_deviations_are_unbiased():
    x = torch.tensor([[[0.0], [0.0], [3.0]]])  # mean 1, unbiased deviation 1.732, biased 1.414
    assert inliers(x, 1.2).all() and not inliers(x, 1.1).all()  # 1.2 x 1.414 < 2 < 1.2 x 1.732


def test_masked_distillation_fades_out_over_the_run():
    term = FeatureKD(((0, 0),), weight=Ramp(1e-2, 0.0), norm="raw", sigma=2.0)
    s, t = torch.rand(1, 4, 8), torch.rand(1, 4, 8)
    start, middle, end = (term.losses(tokens(s, t, p))["feature_kd"].item() for p in (0.0, 0.5, 1.0))
    assert start > 0 and middle == pytest.approx(start / 2) and end == 0


# ---- widths and taps -------------------------------------------------------------------------------------------------


def test_a_projector_bridges_widths_and_learns(make_dit, batch, see):
    teacher, student = make_dit(hidden_size=64), make_dit()
    term = FeatureKD(same(0, 2), projector="linear")
    own = term.build(student, teacher)
    assert [tuple(m.weight.shape) for m in own.projectors] == [(64, 32)] * 3
    optimizer = torch.optim.Adam(own.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = term.losses(replace(see(student, teacher, batch, term), own=own))["feature_kd"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_projector_between_equal_widths_starts_as_the_identity(flux, make_flux, told, see):
    student, term = make_flux(seed=3), FeatureKD(same(0, 6), norm="raw")
    seen = see(student, flux, told, term)
    mapped = FeatureKD(same(0, 6), norm="raw", projector="linear")
    with_map = mapped.losses(replace(seen, own=mapped.build(student, flux)))["feature_kd"]
    torch.testing.assert_close(with_map, term.losses(seen)["feature_kd"])


def test_parameters_exist_only_where_they_are_needed(flux):
    assert FeatureKD(((0, 0),), norm="raw").build(flux, flux) is None
    assert list(FeatureKD(((0, 0),)).build(flux, flux).parameters()) == []
    both = FeatureKD(same(0, 1), projector="linear").build(flux, flux)
    assert len(list(both.parameters())) == 4 and both.state_dict()["mean_square"].shape == (2, 2)


def test_gradient_checkpointing_changes_neither_taps_nor_gradients(flux, make_flux, told, see):
    term, grads = FeatureKD(same(0, 6), norm="raw"), []
    for checkpointed in (False, True):
        student = make_flux(seed=2).train()
        student.gradient_checkpointing = checkpointed
        loss = term.losses(see(student, flux, told, term))["feature_kd"]
        loss.sum().backward()
        grads.append([loss, *(p.grad for p in student.parameters() if p.grad is not None)])
    assert len(grads[0]) > 50
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"pairs": ()}, "FeatureKD: pairs are"),
        ({"weights": (1.0, 2.0)}, "2 weights for 1 pairs: one each, or none"),
        ({"norm": "l2"}, "norm must be one of raw, unit, layer, relative, got 'l2'"),
        ({"mask": "none"}, "mask must be separate, intersection or teacher"),
        ({"projector": "mlp"}, "projector must be none or linear, got 'mlp'"),
        ({"sigma": 0.0}, "sigma must be positive, got 0.0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_settings_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        FeatureKD(**{"pairs": ((0, 0),), **options})


def test_what_cannot_be_compared_is_refused(flux, make_dit, dit, batch, see):
    with pytest.raises(ValueError, match="tokens of the student are 32 wide, those of the teacher 64"):
        FeatureKD(((0, 0),)).build(dit, make_dit(hidden_size=64))
    with pytest.raises(ValueError, match="the teacher has units 0 to 6, got 9"):
        FeatureKD(((2, 9),)).build(dit, flux)
    term = FeatureKD(((0, 0),), norm="raw")
    coarse = make_dit(patch_size=4)
    with pytest.raises(ValueError, match="unit 0 of the student has 4 tokens, unit 0 of the teacher 16"):
        term.losses(see(coarse, dit, batch, term))
    with pytest.raises(ValueError, match=r"pair \(1, 1\): a pass without these units"):
        FeatureKD(((1, 1),), norm="raw").losses(see(dit, dit, batch, term))
