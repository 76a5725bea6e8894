"""A sum of methods: what is added, what is kept apart, whose turn it is."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from views import Models, view

from edit.edits import describe, rebuild
from edit.few_step.combined import Combined, Parts
from edit.few_step.distribution_matching import DistributionMatching
from edit.few_step.ladd import LADD
from edit.few_step.method import FewStepMethod
from edit.few_step.progressive import Progressive
from edit.few_step.trig import SCM
from edit.few_step.vision import Vision
from edit.losses import Draws, Seen
from edit.objectives import Ramp
from edit.paths import mean
from edit.solvers import Euler, Grid
from edit.stream import Condition, Output


@dataclass(frozen=True)
class Scaled(FewStepMethod):
    """|e^u v - noise|^2 with a learned u: a method with parameters and no turn but the student's."""

    needs_teacher: bool = False
    needs_data: bool = False

    def build(self, student, teacher):
        return Factor()

    def student_losses(self, seen):
        eps = seen.draws.gaussian(0)
        v = seen.student(eps, torch.ones(seen.count), seen.condition)
        return {"scaled": seen.own.weight * mean((seen.own(v) - eps).square())}


class Factor(nn.Module):
    weight = 1.0

    def __init__(self):
        super().__init__()
        self.u = nn.Parameter(torch.zeros(()))

    def forward(self, v):
        return self.u.exp() * v


def absent(*_):
    raise AssertionError("this model is not asked")


def half(x_t, t, condition):
    return 0.5 * x_t


def roles_of(own=None) -> Models:
    """Linear fields, and features with one token per place."""
    features = {"unit.0": 0}
    return Models(
        half,
        absent,
        half,
        lambda x_t, t, c: 0.25 * x_t,
        lambda x_t, t, c: Output(
            x_t, None, {unit: x_t.flatten(2).transpose(1, 2) for unit in features}, (1, *x_t.shape[2:])
        ),
        absent,
        own,
    )


@pytest.fixture
def given() -> Seen:
    x = torch.randn(6, 32, 2, 2)
    draws = Draws(3, torch.arange(6), 0, (32, 2, 2))
    return Seen(Condition(), Condition(), torch.ones(6), draws, 0.5, x)


LATENT = LADD(teacher_taps=(0,), hidden=8)


def test_one_part_alone_is_the_method_itself(given):
    method = Progressive(steps=4)
    losses = Combined({"only": method}).student_losses(view(roles_of(), given))
    assert list(losses) == ["only/progressive"]
    assert torch.equal(losses["only/progressive"], method.student_losses(view(roles_of(), given))["progressive"])


def test_parts_are_weighted_and_ramps_follow_the_run(given):
    parts = {"a": Progressive(steps=4), "b": Progressive(steps=2)}
    plain = Combined(parts).student_losses(view(roles_of(), given))
    weighted = Combined(parts, {"a": 100.0, "b": Ramp(0.0, 1.0)}).student_losses(view(roles_of(), given))
    assert torch.allclose(weighted["a/progressive"], 100 * plain["a/progressive"])
    assert torch.allclose(weighted["b/progressive"], 0.5 * plain["b/progressive"])  # halfway


def test_parts_draw_numbers_of_their_own(given):
    method = Progressive(steps=4)
    losses = Combined({"a": method, "b": method}).student_losses(view(roles_of(), given))
    assert not torch.isclose(losses["a/progressive"], losses["b/progressive"]).any()


def test_each_part_has_its_own_parameters_and_learns_them(dit, given):
    both = Combined({"a": LATENT, "b": LATENT}, critic_weights={"b": 0.5})
    own = both.build(dit, dit)
    assert {name.split(".")[1] for name, _ in own.named_parameters()} == {"a", "b"}
    losses = both.critic_losses(view(roles_of(own), given))
    losses["a/heads"].sum().backward()
    assert own.parts["a"].heads[0].inner.weight.grad.any()
    assert all(p.grad is None for p in own.parts["b"].parameters())
    whole = Combined({"a": LATENT, "b": LATENT}).critic_losses(view(roles_of(own), given))
    assert torch.allclose(losses["b/heads"], 0.5 * whole["b/heads"])


def test_own_parameters_are_called_through_their_owner(dit, given):
    """Sharding gathers parameters around the owner's forward: a part that goes around it would find shards."""
    both = Combined({"a": LATENT, "b": Scaled()})
    own, calls = both.build(dit, dit), []
    own.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0]))
    both.student_losses(view(roles_of(own), given))
    both.critic_losses(view(roles_of(own), given))
    assert calls == ["a", "b", "a", "a"]  # heads see the fake; on the critic's turn, the real and the fake


def test_parameters_of_a_part_without_turns_learn_on_the_students_though_the_rest_is_frozen(dit, given):
    both = Combined({"adversarial": LATENT, "scaled": Scaled()})
    own = both.build(dit, dit)
    for p in both.judges(own):  # as the recipe does on this turn
        p.requires_grad_(False)
    losses = both.student_losses(view(roles_of(own), given))
    sum(v.sum() for v in losses.values()).backward()
    assert own.parts["scaled"].u.grad.abs() > 0
    assert all(p.grad is None for p in own.parts["adversarial"].parameters())
    assert list(both.critic_losses(view(roles_of(own), given))) == ["adversarial/heads"]


def test_needs_and_turns_are_those_of_the_parts():
    both = Combined({"a": Progressive(), "b": replace(LATENT, teacher_taps=(-1, 2), every=5, together=True)})
    assert both.needs_teacher and both.needs_data and both.adversarial and not both.has_critic
    assert both.teacher_taps == (-1, 2)
    assert [both.turns(k) for k in (0, 1, 5)] == [(True, True), (False, True), (True, True)]
    alone = Combined({"a": Scaled()})
    assert not (alone.needs_teacher or alone.needs_data or alone.adversarial)
    assert alone.turns(3) == (True, False) and alone.build(None, None).parts["a"]
    assert Combined({"a": Progressive()}).build(None, None) is None


def test_rcm_has_both_losses_on_the_students_turn_and_the_critics_alone_on_the_others(dit, given):
    scm, dmd = SCM(sigma=1.0), DistributionMatching(grid=(1.0, 0.5))
    rcm = Combined({"scm": scm, "dmd": dmd}, {"scm": 100.0})
    rcm.check(Grid(times=(1.0, 0.5), renoise=True))
    with pytest.raises(ValueError, match="choose sampler=grid"):
        rcm.check(Grid(times=(1.0, 0.4), renoise=True))
    assert rcm.has_critic and [rcm.turns(k) for k in (0, 1, 5)] == [(True, False), (False, True), (True, False)]
    own = rcm.build(dit, dit)
    assert rcm.judges(own) == [] and list(own.parts) == ["scm"]  # the weight u is the student's
    models = replace(roles_of(own), critic=lambda x_t, t, c: 0.1 * x_t)
    losses = rcm.student_losses(view(models, given))
    alone = scm.student_losses(view(replace(models, own=own.parts["scm"]), given))["scm"]
    assert list(losses) == ["scm/scm", "dmd/distribution"] and torch.allclose(losses["scm/scm"], 100 * alone)
    assert list(rcm.critic_losses(view(models, given))) == ["dmd/velocity"]


def test_parts_with_other_turns_are_refused():
    with pytest.raises(ValueError, match="a takes turns by every=2 together=False, b by every=5 together=True"):
        Combined({"a": LATENT, "b": replace(LATENT, every=5, together=True)})


def test_parts_look_with_one_vision_model():
    one, other = Vision("here", layers=(0, 1)), Vision("there", layers=(0, 1))
    seeing = DistributionMatching(vision=one, every=2)
    both, blind = Combined({"dm": seeing, "scm": SCM()}), Combined({"scm": SCM()})
    assert both.frozen == {"vision": one} and both.decodes and not blind.frozen and not blind.decodes
    with pytest.raises(ValueError, match="dm and again look with two vision models"):
        Combined({"dm": seeing, "again": replace(seeing, vision=other)})


def test_a_sampler_must_suit_every_part():
    both = Combined({"a": Progressive(steps=4), "b": LATENT})
    both.check(Grid())
    with pytest.raises(ValueError, match="Progressive trains 4"):
        both.check(Grid(times=(1.0, 0.5)))
    with pytest.raises(ValueError, match="LADD trains steps from"):
        Combined({"a": Progressive(steps=8), "b": LATENT}).check(Euler(steps=8))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"parts": {}}, "parts are methods by names"),
        ({"parts": {"a.b": LATENT}}, "without dots"),
        ({"parts": {"a": LATENT}, "weights": {"b": 1.0}}, "a weight for 'b', the parts are a"),
        ({"parts": {"a": LATENT}, "critic_weights": {"b": 1.0}}, "a weight for 'b'"),
    ],
)
def test_impossible_sums_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Combined(**settings)


def test_an_artifact_can_name_it():
    both = Combined({"a": Progressive(steps=4), "b": LATENT}, {"b": Ramp(0.0, 1.0)})
    assert rebuild(describe(both)) == both


def test_parts_are_stored_under_their_names(dit):
    both = Combined({"a": LATENT})
    stored = both.build(dit, dit).state_dict()
    assert all(key.startswith("parts.a.") for key in stored)
    Parts({"a": LATENT.build(dit, dit)}).load_state_dict(stored)
