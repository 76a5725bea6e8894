"""Conditions, streams and steps by themselves."""

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from edit.stream import Branch, Condition, Layout, Step, Stream, add


def stream(**fields) -> Stream:
    return Stream(image=torch.ones(2, 4, 8), cond=torch.zeros(2, 8), layout=Layout(grid=(1, 2, 2)), **fields)


def test_mapping_a_condition_touches_every_field_that_is_present():
    c = Condition(label=torch.arange(4), text=torch.zeros(4, 3, 2), text_mask=torch.ones(4, 3, dtype=torch.bool))
    half = c.map(lambda v: v[:2])
    assert half.label.tolist() == [0, 1] and half.text.shape == (2, 3, 2) and half.text_mask.shape == (2, 3)
    assert half.pooled is half.guidance is half.end is None
    assert c.label.tolist() == [0, 1, 2, 3]


def test_one_mask_drops_all_fields_of_a_sample_together():
    c = Condition(label=torch.arange(3), text=torch.ones(3, 5, 2), pooled=torch.ones(3, 2), guidance=torch.ones(3))
    null = Condition(label=torch.full((3,), 9), text=torch.zeros(3, 5, 2), pooled=torch.zeros(3, 2))
    mixed = c.where(torch.tensor([False, True, False]), null)
    assert mixed.label.tolist() == [0, 9, 2]
    assert mixed.text.sum((1, 2)).tolist() == [10, 0, 10] and mixed.pooled.sum(1).tolist() == [2, 0, 2]
    assert mixed.guidance.tolist() == [1, 1, 1]  # what the null condition does not speak of stays


def told(length: int, masked: bool = True, **fields) -> Condition:
    mask = torch.ones(2, length, dtype=torch.bool) if masked else None
    return Condition(text=torch.ones(2, length, 3), text_mask=mask, **fields)


def test_texts_of_two_lengths_are_filled_up_where_a_mask_leaves_the_padding_out():
    for long, short in ((told(5), told(2)), (told(2), told(5))):
        a, b, both = long.text.shape[1], short.text.shape[1], long.join(short)
        assert both.text.shape == (4, 5, 3) and both.text_mask.sum(1).tolist() == [a, a, b, b]
        assert torch.equal(both.text.any(-1), both.text_mask)
        mixed = long.where(torch.tensor([False, True]), short)
        assert mixed.text_mask.sum(1).tolist() == [a, b] and torch.equal(mixed.text.any(-1), mixed.text_mask)
    one = told(2).map(lambda v: v[:1])  # one null for all samples
    assert told(5).where(torch.tensor([False, True]), one).text_mask.sum(1).tolist() == [5, 2]


def test_texts_of_two_lengths_without_a_mask_are_refused():
    for act in (Condition.join, lambda a, b: a.where(torch.tensor([True, False]), b)):
        for null in (told(2, masked=False), told(2)):
            with pytest.raises(ValueError, match="texts of 7 and 2 tokens do not fit .* encode both to one length"):
                act(told(7, masked=False), null)
        act(told(7, masked=False), told(7, masked=False))


def test_joining_what_only_one_condition_has_is_refused():
    with pytest.raises(ValueError, match="only one of the two conditions to join has pooled: give it to both"):
        told(3, pooled=torch.ones(2, 4)).join(told(3))
    with pytest.raises(ValueError, match="has text_mask"):
        told(3).join(told(3, masked=False))


def test_a_step_remembers_per_edit_unit_and_branch():
    memory = {}
    cond, uncond = (Step(0, 4, 1.0, branch, memory) for branch in ("cond", "uncond"))
    cond.recall("cache", 0)["out"] = 1
    assert uncond.recall("cache", 0) == {} and cond.recall("cache", 1) == {} and cond.recall("other", 0) == {}
    assert Step(1, 4, 0.7, "cond", memory).recall("cache", 0) == {"out": 1}  # the next step of the same generation
    assert Step(0, 4, 1.0).recall("cache", 0) == {}  # another generation


def test_recording_replaces_the_stream():
    before = stream()
    after = before.record("probability", torch.ones(1))
    assert before.trace == {} and after.trace.keys() == {"probability"}
    assert after.image is before.image
    with pytest.raises(AttributeError):
        before.image = torch.zeros(1)  # type: ignore[misc]


def test_a_stream_is_a_pytree_of_its_tensors():
    # FSDP2 finds what it must cast and synchronise this way
    s = stream(text=torch.zeros(2, 3, 8), step=Step(0, 1, 1.0)).record("a", torch.full((1,), 5.0))
    leaves, spec = tree_flatten(s)
    assert sorted(tuple(v.shape) for v in leaves if v is not None) == [(1,), (2, 3, 8), (2, 4, 8), (2, 8)]
    doubled = tree_unflatten([v if v is None else 2 * v for v in leaves], spec)
    assert torch.equal(doubled.image, 2 * s.image) and doubled.trace["a"].item() == 10
    assert doubled.layout is s.layout and doubled.step is s.step and doubled.time is None


def test_branches_join_image_and_text_through_their_own_gates():
    s = stream(text=torch.ones(2, 3, 8))
    out = add(s, Branch(s.image, s.text), Branch(torch.tensor(2.0), torch.tensor(-1.0)))
    assert (out.image == 3).all() and (out.text == 0).all()
    assert add(s, Branch(s.image), Branch(torch.tensor(2.0))).text is s.text
