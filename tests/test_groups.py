"""What edits say of the optimiser's treatment of parameters: it multiplies, and names what is there."""

from dataclasses import dataclass

import pytest
from experts import Experts
from torch import nn

import edit
from edit.denoiser import Denoiser, Edit
from edit.edits import grouped
from edit.groups import PLAIN, Group


@dataclass
class Says(Edit):
    """One group for one parameter."""

    of: str = "edits.experts.0.up"
    lr: float = 3.0
    kind: str | None = None

    def apply(self, denoiser: Denoiser) -> nn.Module | None:
        """Changes nothing."""

    def groups(self, denoiser: Denoiser) -> dict[str, Group]:
        return {self.of: Group(self.lr, kind=self.kind)}


def test_factors_of_several_edits_multiply_and_what_one_says_holds():
    one, two = Group(0.5, 2.0, kind="stack"), Group(3.0, 0.0, betas=(0.9, 0.99))
    assert one.joined(two) == two.joined(one) == Group(1.5, 0.0, (0.9, 0.99), "stack")
    assert one.joined(PLAIN) == one


def test_parameters_of_which_no_edit_speaks_are_not_named(dit):
    assert grouped(dit) == {}
    edit.apply(dit, {"experts": Experts(units=(0,)), "says": Says()})
    assert grouped(dit) == {
        "edits.experts.0.up": Group(1.5, 2.0, kind="stack"),
        "edits.experts.0.down": Group(0.5, 2.0, kind="stack"),
        "edits.experts.0.router.bias": Group(decay=0.0),
    }


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (Says("edits.experts.0.wp"), "says: `groups` names edits.experts.0.wp, and this dit has no such parameter"),
        (
            Says(kind="matrix"),
            "group of edits.experts.0.up: one edit asks for kind stack, another for matrix; leave one",
        ),
    ],
)
def test_contradictions_and_unknown_names_are_refused(dit, said, sentence):
    edit.apply(dit, {"experts": Experts(units=(0,)), "says": said})
    with pytest.raises(ValueError, match=sentence):
        grouped(dit)


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"decay": float("inf")}, {"betas": (0.9, 1.0)}, {"kind": "tensor"}])
def test_impossible_groups_are_refused(wrong):
    with pytest.raises(ValueError, match="Group: "):
        Group(**wrong)


def test_the_order_of_groups_is_that_of_their_values():
    groups = [Group(2.0), Group(0.5, kind="stack"), PLAIN, Group(0.5, betas=(0.9, 0.9)), Group(0.5)]
    assert sorted(groups, key=lambda g: g.place) == sorted(groups[::-1], key=lambda g: g.place)
    assert min(groups, key=lambda g: g.place) == PLAIN
