"""What losses ask of the models of a run is found by running them."""

from dataclasses import dataclass, replace

import pytest
import torch
from probes import small
from torch import nn

from edit.few_step.distribution_matching import DistributionMatching
from edit.few_step.endpoint import CachedEndpoint
from edit.few_step.ladd import LADD
from edit.few_step.progressive import Progressive
from edit.losses import Frozen, Seen, Term
from edit.measuring.looks import Look
from edit.measuring.turns import Call, calls_of, phases, turns
from edit.paths import mean


def test_distilling_costs_a_teacher_forward_and_four_of_the_student():
    asked, trained = Call("teacher"), Call("student", reach="weights")
    assert asked.flops(30, False) + trained.flops(10, True) == 2 * (30 + 4 * 10)
    assert trained.flops(10, False) == 2 * 3 * 10
    assert Call("teacher", 2.0).flops(30, True) == 2 * 2 * 30  # classifier-free guidance; nothing to compute again
    assert Call("teacher", reach="input").flops(30, False) == 2 * 2 * 30


def counted(matching, guided: int = 1, rounds: int = 12) -> dict[str, dict[str, float]]:
    student, teacher = small(), small(taps=tuple(matching.teacher_taps))
    own = matching.build(student.denoiser, teacher.denoiser)
    return calls_of(turns(matching, student, teacher, own, guided, rounds=rounds))


def test_a_method_is_counted_by_what_it_asks():
    assert counted(Progressive(4)) == {"student": {"weights": 1}, "teacher": {"nothing": 2}}
    assert counted(Progressive(4), guided=2)["teacher"] == {"nothing": 4}


@pytest.mark.parametrize("starts", [1, 7, 8])
def test_students_of_stored_paths_are_counted_whatever_their_starts(starts):
    assert counted(CachedEndpoint(starts)) == {"student": {"weights": 1}}


def test_distribution_matching_trains_the_critic_on_its_turns_and_sees_rollouts_of_the_mean_length():
    """From a grid of K times 0 to K - 1 steps are rolled out, then comes one more, with a graph or without."""
    found = counted(DistributionMatching(grid=(1.0, 0.5), simulate=1.0, every=5), guided=2, rounds=20)
    assert found["teacher"] == {"nothing": pytest.approx(2 / 5)}
    assert found["critic"] == {"weights": pytest.approx(4 / 5), "nothing": pytest.approx(1 / 5)}
    assert found["student"]["weights"] == pytest.approx(1 / 5)
    # 100 fair draws of 0 or 1 steps: three standard errors
    assert found["student"]["nothing"] == pytest.approx(4 / 5 + 0.5, abs=0.15)


def test_a_judged_student_is_reached_through_the_frozen_teacher():
    ladd = LADD(teacher_taps=(1, 3), hidden=8)
    assert counted(ladd) == {
        "student": {"weights": 0.5, "nothing": 0.5},
        "teacher": {"input": 0.5, "nothing": 1.0},  # a fake on the student's turn; a real and a fake on the heads'
    }


@dataclass
class Asks(Term):
    """The average at another time, with a tap, until a step."""

    ends: int | None = None
    taps = (0,)

    def losses(self, seen: Seen):
        shown = seen.averaged(seen.x, 0.5 * seen.t, seen.whole, taps=(1,)).trace["unit.1"]
        return {"asks": mean((seen.output.trace["unit.0"] - shown).square())}


@dataclass
class Taught(Asks):
    needs_teacher = True

    def losses(self, seen: Seen):
        v = seen.teacher(seen.x, seen.t, seen.condition)
        return {"taught": mean((seen.output.sample - v + seen.predict(seen.x, seen.t, seen.condition).sample).square())}


def phased(terms: dict[str, Term], steps: int = 10, asks: bool = False, guided: int = 1):
    student, teacher = small(taps=(0,)), small() if asks else None
    own = {name: term.build(student.denoiser) for name, term in terms.items()}
    return phases(terms, student, teacher, own, guided, steps, asks)


def test_diffusion_training_without_a_term_that_asks_is_one_forward_and_the_teachers():
    assert calls_of(phased({})) == {"student": {"weights": 1}}
    assert calls_of(phased({}, asks=True, guided=2)) == {"teacher": {"nothing": 2}, "student": {"weights": 1}}


def test_a_term_that_asks_the_average_is_counted_until_it_ends():
    assert calls_of(phased({"a": Asks()})) == {"student": {"weights": 1, "nothing": 1}}
    first, second = phased({"a": Asks(ends=4)})
    assert (first.share, second.share) == (0.4, 0.6)
    assert first.calls == (Call("student", reach="weights"), Call("student")) and second.calls == first.calls[:1]
    assert len(phased({"a": Asks(ends=40)})) == 1  # after the run


def test_the_teacher_is_asked_no_more_after_the_last_term_that_needs_it():
    first, second = phased({"a": Taught(ends=4), "b": Asks()}, asks=True)
    asked = calls_of((first,))["teacher"]["nothing"]
    assert asked == pytest.approx(2 * 0.4)  # at the step's own sample, and by the term
    assert {c.role for c in second.calls} == {"student"} and len(second.calls) == 2
    assert calls_of((first,))["student"]["weights"] == pytest.approx(2 * 0.4)


# ---- frozen models and the decoder ----------------------------------------------------------------------------------


class Twice(nn.Module):
    """A decoder: twice as many rows and columns."""

    def forward(self, x):
        return x[:, :1].repeat_interleave(2, -1).repeat_interleave(2, -2).expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class Eye(Frozen):
    def load(self):
        raise FileNotFoundError("a plan reads no weights")

    def structure(self):
        return nn.Conv2d(1, 8, 2, 2, device="meta")


@dataclass
class Judged(Term):
    """A vision model looks at what is decoded of the data, and of the prediction where gradients reach it."""

    ends: int | None = None
    decodes = True

    @property
    def frozen(self):
        return {"eye": Eye()}

    def losses(self, seen: Seen):
        real = seen.frozen["eye"](seen.decode(seen.x)[:, :1])
        fake = seen.frozen["eye"](seen.decode(seen.output.sample)[:, :1])
        return {"judged": mean((real - fake).square())}


@pytest.mark.parametrize("decoder, side", [(None, 8), (Twice(), 16)], ids=["samples", "decoded"])
def test_a_frozen_model_is_counted_at_the_size_that_it_sees_and_as_far_as_gradients_reach(decoder, side):
    student, term = small(taps=(0,)), Judged(ends=4)
    own = {"a": term.build(student.denoiser)}
    first, second = phases({"a": term}, student, None, own, 1, 10, False, decoder)
    c, *sizes = student.shape
    assert sizes == [8, 8] and {call.role for call in second.calls} == {"student"}
    found = calls_of((replace(first, share=1.0),))
    assert found[f"eye of 1x{side}x{side}"] == {"nothing": 1, "input": 1}
    assert found.get(f"decoder of {c}x8x8") == (None if decoder is None else {"nothing": 1, "input": 1})
    (look,) = {call.look for call in first.calls if call.role.startswith("eye")}
    assert look.macs() == 8 * 2 * 2 * (side // 2) ** 2  # 2 x 2 pixels into 8 channels


def test_a_look_keeps_for_the_backward_what_autograd_keeps():
    """Of a product and a tanh: its output; the product's weights are there anyway."""
    look = Look(lambda: nn.Sequential(nn.Linear(4, 16, device="meta"), nn.Tanh()), (4,))
    found = look.step(8, False, False, torch.float32, True)
    assert 8 * 16 * 4 <= found.stored <= 8 * 16 * 4 + 64  # and the loss, a number or two
    assert found.kept >= found.forward >= found.stored
    assert look.ask(8, False, torch.float32).kept == 8 * 16 * 4
