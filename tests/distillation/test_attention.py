from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

import edit
from edit.denoiser import Output
from edit.distillation.attention import AttentionKD, RelationKD, cosines
from edit.distillation.pairs import same
from edit.objectives import Pass, Ramp
from edit.pruning.depth import DepthPruning


@pytest.mark.parametrize("term", [AttentionKD(same(0, 6)), RelationKD(same(0, 6))], ids=["attention", "relation"])
def test_a_copy_of_the_teacher_has_no_loss_and_no_gradient(term, flux, told, see):
    student = deepcopy(flux)
    assert term.build(student, flux) is None
    (loss,) = term.losses(see(student, flux, told, term), None).values()
    loss.sum().backward()
    assert loss.tolist() == [0, 0, 0]
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_the_loss_is_the_mean_square_difference_of_the_branches(flux, make_flux, told, see):
    student, term = make_flux(seed=5), AttentionKD(((0, 1), (5, 6)), weight=Ramp(0.5, 0.1))
    seen = see(student, flux, told, term, progress=0.5)
    expected = 0
    for s, t in term.pairs:
        for stream in ("", ".text"):
            mine, theirs = (
                seen.output.trace[f"unit.{s}.attention{stream}"],
                seen.teacher.trace[f"unit.{t}.attention{stream}"],
            )
            expected = expected + ((mine - theirs) ** 2).mean((1, 2)) / 4
    torch.testing.assert_close(term.losses(seen, None)["attention_kd"], 0.3 * expected)


def test_attention_teaches_another_operator_and_leaves_the_output_layers_alone_that_come_later(flux, told, see):
    student = deepcopy(flux)
    for unit in student.units:  # another operator with the same weights: the mean of the values, a uniform attention
        unit.attention = lambda q, k, v, layout, step: v.mean(2, keepdim=True).expand_as(v)
    term = AttentionKD(same(0, 6, every=2))
    term.losses(see(student, flux, told, term), None)["attention_kd"].sum().backward()
    assert student.units[6].attn.to_v.weight.grad.any()
    assert student.model.proj_out.weight.grad is None


def test_a_student_of_other_depth_and_width_can_match_relations(make_dit, batch, see):
    teacher = make_dit(hidden_size=64)
    student = edit.apply(make_dit(), {"deep": DepthPruning(pattern="listed", units=(0, 2))})
    term = RelationKD(((0, 1), (1, 2)))
    term.build(student, teacher)
    loss = term.losses(see(student, teacher, batch, term), None)["relation_kd"]
    loss.sum().backward()
    assert loss.shape == (4,) and (loss > 0).all() and student.model.blocks[0].attn.qkv.weight.grad.any()
    with pytest.raises(ValueError, match="AttentionKD: tokens of the student are 32 wide, those of the teacher 64"):
        AttentionKD(((0, 1),)).build(student, teacher)


def test_relations_are_cosines_and_large_grids_are_pooled():
    x = torch.randn(2, 6 * 8, 5)
    full, unit = cosines(x, 6 / 8, 16), F.normalize(x, dim=-1)
    torch.testing.assert_close(full, unit @ unit.mT, rtol=1e-4, atol=1e-5)  # fp32, sums in another order
    square = torch.randn(2, 6, 4, 5)
    pooled = F.normalize(square.view(2, 3, 2, 2, 2, 5).mean((2, 4)).flatten(1, 2), dim=-1)  # to 3 x 2
    rows = cosines(square.flatten(1, 2), 6 / 4, 3)  # to 3 x 3, of columns 0-1, 1-2, 2-3
    ends = [0, 2, 3, 5, 6, 8]
    torch.testing.assert_close(rows[:, ends][:, :, ends], pooled @ pooled.mT, rtol=1e-4, atol=1e-5)


def test_tokens_that_make_no_grid_are_refused():
    seen = Pass(
        Output(torch.zeros(1, 1, 2, 2), None, {"unit.0": torch.randn(1, 7, 4)}),
        {"x_t": torch.zeros(1, 1, 2, 2)},
        torch.zeros(1),
        0.0,
        Output(torch.zeros(1, 1, 2, 2), None, {"unit.0": torch.randn(1, 7, 4)}),
    )
    with pytest.raises(ValueError, match="7 image tokens make no grid with 1 times as many rows as columns"):
        RelationKD(((0, 0),)).losses(seen, None)
    with pytest.raises(ValueError, match="size is rows and columns of a grid, at least 1, got 0"):
        RelationKD(((0, 0),), size=0)
