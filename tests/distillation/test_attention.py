from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from views import passed

import edit
from edit.distillation.attention import AttentionKD, MapKD, RelationKD, cosines
from edit.distillation.guidance import TeacherGuidance
from edit.distillation.pairs import same
from edit.losses import Seen, wanted
from edit.objectives import Ramp
from edit.pruning.depth import DepthPruning
from edit.stream import Output


@pytest.mark.parametrize("term", [AttentionKD(same(0, 6)), RelationKD(same(0, 6))], ids=["attention", "relation"])
def test_a_copy_of_the_teacher_has_no_loss_and_no_gradient(term, flux, told, see):
    student = deepcopy(flux)
    assert term.build(student, flux) is None
    (loss,) = term.losses(see(student, flux, told, term)).values()
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
                seen.taught.trace[f"unit.{t}.attention{stream}"],
            )
            expected = expected + ((mine - theirs) ** 2).mean((1, 2)) / 4
    torch.testing.assert_close(term.losses(seen)["attention_kd"], 0.3 * expected)


def test_attention_teaches_another_operator_and_leaves_the_output_layers_alone_that_come_later(flux, told, see):
    student = deepcopy(flux)
    for unit in student.units:  # another operator with the same weights: the mean of the values, a uniform attention
        unit.slots.attention = lambda q, k, v, layout, step: v.mean(2, keepdim=True).expand_as(v)
    term = AttentionKD(same(0, 6, every=2))
    term.losses(see(student, flux, told, term))["attention_kd"].sum().backward()
    assert student.units[6].attn.to_v.weight.grad.any()
    assert student.model.proj_out.weight.grad is None


def test_a_student_of_other_depth_and_width_can_match_relations(make_dit, batch, see):
    teacher = make_dit(hidden_size=64)
    student = edit.apply(make_dit(), {"deep": DepthPruning(pattern="listed", units=(0, 2))})
    term = RelationKD(((0, 1), (1, 2)))
    term.build(student, teacher)
    loss = term.losses(see(student, teacher, batch, term))["relation_kd"]
    loss.sum().backward()
    assert loss.shape == (4,) and (loss > 0).all() and student.model.blocks[0].attn.qkv.weight.grad.any()
    with pytest.raises(ValueError, match="AttentionKD: tokens of the student are 32 wide, those of the teacher 64"):
        AttentionKD(((0, 1),)).build(student, teacher)


def test_relations_are_cosines_and_large_grids_are_pooled():
    x = torch.randn(2, 6 * 8, 5)
    full, unit = cosines(x, (1, 6, 8), 16), F.normalize(x, dim=-1)
    torch.testing.assert_close(full, unit @ unit.mT, rtol=1e-4, atol=1e-5)  # fp32, sums in another order
    square = torch.randn(2, 6, 4, 5)
    pooled = F.normalize(square.view(2, 3, 2, 2, 2, 5).mean((2, 4)).flatten(1, 2), dim=-1)  # to 3 x 2
    rows = cosines(square.flatten(1, 2), (1, 6, 4), 3)  # to 3 x 3, of columns 0-1, 1-2, 2-3
    ends = [0, 2, 3, 5, 6, 8]
    torch.testing.assert_close(rows[:, ends][:, :, ends], pooled @ pooled.mT, rtol=1e-4, atol=1e-5)


def test_frames_are_a_dimension_of_the_grid_and_are_pooled_like_rows_and_columns():
    x = torch.randn(2, 4, 4, 6, 5)  # b f y x d
    unit = F.normalize(x.flatten(1, 3), dim=-1)
    torch.testing.assert_close(cosines(x.flatten(1, 3), (4, 4, 6), 6), unit @ unit.mT, rtol=1e-4, atol=1e-5)
    pooled = F.normalize(x.view(2, 2, 2, 2, 2, 2, 3, 5).mean((2, 4, 6)).flatten(1, 3), dim=-1)
    found = cosines(x.flatten(1, 3), (4, 4, 6), 2)
    torch.testing.assert_close(found, pooled @ pooled.mT, rtol=1e-4, atol=1e-5)


def test_tokens_that_make_no_grid_are_refused():
    out = Output(torch.zeros(1, 1, 2, 2), None, {"unit.0": torch.randn(1, 7, 4)}, (1, 2, 4))
    with pytest.raises(ValueError, match="7 image tokens are no grid of 1 x 2 x 4"):
        RelationKD(((0, 0),)).losses(passed(out, torch.zeros(1), 0.0, out))
    with pytest.raises(ValueError, match="RelationKD: size must be at least 1, got 0"):
        RelationKD(((0, 0),), size=0)


# ---- maps ------------------------------------------------------------------------------------------------------------


def see_maps(student, teacher, batch, term: MapKD, progress: float = 0.0) -> Seen:
    x, t, _ = batch
    with torch.no_grad():
        taught = teacher(*batch, maps=term.teacher_maps)
    return passed(student(*batch, maps=term.maps), t, progress, taught)


def test_the_loss_is_the_cross_entropy_of_the_maps(flux, make_flux, told):
    term = MapKD(((0, 1), (5, 6)), weight=Ramp(0.5, 0.1), rows=6)
    seen = see_maps(make_flux(seed=5), flux, told, term, progress=0.5)
    expected = 0
    for s, t in term.pairs:
        p, q = seen.taught.trace[f"unit.{t}.maps"].exp(), seen.output.trace[f"unit.{s}.maps"].exp()
        assert p.shape == (3, 2, 6, 21)  # b h r s
        expected = expected - (p * q.log()).sum(-1).flatten(1).mean(1) / 2
    torch.testing.assert_close(term.losses(seen)["map_kd"], 0.3 * expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_maps_of_a_copy_cost_their_entropy_and_have_no_gradient(flux, told, checkpointing):
    student, term = deepcopy(flux), MapKD(same(0, 6, every=2), weight=1.0)
    student.gradient_checkpointing = checkpointing
    assert term.build(student, flux) is None
    seen = see_maps(student, flux, told, term)
    (loss,) = term.losses(seen).values()
    maps = [seen.taught.trace[f"unit.{i}.maps"] for i in (0, 2, 4, 6)]
    entropy = torch.stack([-(m.exp() * m).sum(-1).mean((1, 2)) for m in maps]).mean(0)
    torch.testing.assert_close(loss, entropy)
    loss.sum().backward()
    # p_student - p_teacher is what fp32 leaves of 0; with another teacher the same gradients are a million times larger
    assert all(p.grad.abs().max() < 1e-7 for p in student.parameters() if p.grad is not None)
    assert student.units[6].attn.to_q.weight.grad is not None


def test_descent_on_the_term_brings_the_maps_together(make_dit, batch):
    teacher, student, term = make_dit(seed=0), make_dit(seed=1), MapKD(same(0, 2), weight=1.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)

    def apart() -> torch.Tensor:
        seen = see_maps(student, teacher, batch, term)
        floor = term.losses(replace(seen, output=seen.taught))["map_kd"]  # the teacher's own entropy
        return (term.losses(seen)["map_kd"] - floor).mean()

    before = apart().item()
    for _ in range(20):
        optimizer.zero_grad()
        apart().backward()
        optimizer.step()
    assert 0 <= apart().item() < 0.2 * before


def test_the_first_heads_of_models_with_different_numbers_can_be_compared(make_dit, batch):
    student, teacher = make_dit(num_heads=2), make_dit(hidden_size=48, num_heads=4)
    with pytest.raises(
        ValueError, match="student has 2 heads and the teacher 4, and all are to be compared: say heads=2"
    ):
        MapKD(same(0, 1)).build(student, teacher)
    with pytest.raises(ValueError, match="2 heads and the teacher 4, and 3 are to be compared: say heads=2 or fewer"):
        MapKD(same(0, 1), heads=3).build(student, teacher)
    term = MapKD(same(0, 1), heads=2)
    term.build(student, teacher)
    seen = see_maps(student, teacher, batch, term)
    loss = term.losses(seen)["map_kd"]
    trace = {k: v.clone() for k, v in seen.taught.trace.items()}
    for v in trace.values():
        v[:, 2:] = 0
    assert loss.shape == (4,) and torch.equal(loss, term.losses(replace(seen, taught=see_as(trace)))["map_kd"])
    for v in trace.values():
        v[:, 0] -= 1
    assert not torch.equal(loss, term.losses(replace(seen, taught=see_as(trace)))["map_kd"])


def see_as(trace) -> Output:
    return Output(torch.zeros(1), None, trace)


def test_maps_over_other_tokens_are_refused(make_dit, batch):
    student, teacher, term = make_dit(registers=2), make_dit(), MapKD(same(0, 1), rows=4)
    term.build(student, teacher)
    seen = see_maps(student, teacher, batch, term)
    with pytest.raises(ValueError, match="unit 0 of the student attends to 18 tokens, unit 0 of the teacher to 16"):
        term.losses(seen)


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"heads": 0}])
def test_no_rows_and_no_heads_are_refused(wrong):
    with pytest.raises(ValueError, match="MapKD: (rows|heads) must be at least 1"):
        MapKD(same(0, 1), **wrong)


def test_terms_that_want_other_rows_of_one_unit_are_refused():
    terms = MapKD(same(0, 1), rows=8), MapKD(((1, 2), (2, 2)), rows=8)
    assert wanted(terms)[2] == {0: 8, 1: 8, 2: 8}
    with pytest.raises(ValueError, match="terms want 8 and 4 rows of unit 1's attention map"):
        wanted((*terms, MapKD(((1, 1),), rows=4)))


@torch.no_grad()
def test_a_guided_teacher_hands_on_the_maps_of_the_condition(make_flux, told):
    plain, scale = make_flux(guidance_embeds=False), torch.tensor([1.0, 2.0, 4.0])
    x, t, condition = told
    guided = TeacherGuidance(1.0, 4.0)(plain, x, t, condition, plain.null(condition), scale, maps={4: 5})
    alone = plain(x, t, condition, maps={4: 5})
    assert guided.trace.keys() == alone.trace.keys() == {"unit.4.maps"}
    torch.testing.assert_close(guided.trace["unit.4.maps"], alone.trace["unit.4.maps"], rtol=1e-4, atol=1e-4)
