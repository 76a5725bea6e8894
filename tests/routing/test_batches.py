import os
from dataclasses import fields, replace

import pytest
import torch
from families import difference, family, walk
from ranks import run_ranks
from torch import Tensor

from edit.routing.batches import by_key, mean_over_ranks, rows_on, run_grouped, take
from edit.stream import Layout, Stream


def stream_of(count: int, text: bool = True) -> Stream:
    mask = torch.arange(3)[None] < torch.arange(1, count + 1)[:, None]
    layout = Layout((1, 2, 2), text_length=3, text_mask=mask)
    words = torch.randn(count, 3, 8) if text else None
    time, signal = torch.randn(2, count, 8)
    return Stream(torch.randn(count, 4, 8), torch.randn(count, 8), layout, words, time, signal)


def shift(key: int, stream: Stream) -> Stream:
    """Something that depends on all that a sample is told."""
    layout = stream.layout
    assert layout.text_mask is not None and stream.time is not None
    told = layout.text_mask.sum(1) + stream.time.sum(1) + stream.cond.sum(1)
    return replace(stream, image=stream.image + key * told[:, None, None], text=last(stream.text, key))


def last(text: Tensor | None, key: int) -> Tensor | None:
    return None if text is None else text * key


def test_groups_keep_their_order():
    assert by_key([2, None, 2, 1, None]) == {2: [0, 2], None: [1, 4], 1: [3]}
    assert by_key([]) == {}


@pytest.mark.parametrize("keys", [(1, None, 2, 1, None), (3, 3, 3, 3, 3), (None,) * 5, (5, 4, 3, 2, 1)])
@pytest.mark.parametrize("text", [True, False])
def test_grouped_is_one_by_one_and_without_a_key_bit_for_bit_as_before(keys, text):
    stream, calls = stream_of(5, text), []

    def run(key, part):
        calls.append((key, len(part.image)))
        return shift(key, part)

    after = run_grouped(stream, keys, run)
    assert sorted(calls) == sorted((k, len(v)) for k, v in by_key(keys).items() if k is not None)
    for i, key in enumerate(keys):
        alone = take(stream, torch.tensor([i]))
        wanted = alone if key is None else shift(key, alone)
        assert torch.equal(after.image[i], wanted.image[0])
        assert after.text is None or torch.equal(after.text[i], wanted.text[0])
    for f in fields(stream):
        assert f.name in ("image", "text") or getattr(after, f.name) is getattr(stream, f.name)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dit", "flux", "sd3", "pixart", "qwen_image"])
def test_units_run_in_groups_as_they_do_alone(name):
    for unit, stream in walk(family(name)):
        after = run_grouped(stream, (None, 0), lambda key, part, unit=unit: unit(part))
        alone = unit(take(stream, torch.tensor([1])))
        assert torch.equal(after.image[0], stream.image[0])
        assert difference(take(after, torch.tensor([1])), alone) < 1e-6  # stock RoPE is fp32


@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_positions_are_whole_numbers_on_their_device_however_few(device):
    for members in ([], [3, 1]):
        rows = rows_on(torch.device(device), members)
        assert rows.dtype == torch.int64 and rows.device.type == device and rows.shape == (len(members),)
        assert device == "meta" or rows.tolist() == members


def test_the_type_is_that_of_what_was_run():
    after = run_grouped(stream_of(2), (None, 1), lambda key, s: replace(s, image=s.image.bfloat16()))
    assert after.image.dtype == torch.bfloat16 and after.text is not None and after.text.dtype == torch.float32


def test_gradients_pass_through_groups():
    stream = stream_of(3)
    image = stream.image.requires_grad_()
    run_grouped(stream, (None, 2, 3), lambda key, s: replace(s, image=s.image * key)).image.sum().backward()
    assert torch.equal(image.grad[:, 0, 0], torch.tensor([1.0, 2.0, 3.0]))


def test_branches_of_a_unit_that_is_not_run_alike_are_refused():
    stream = replace(stream_of(2), tap="unit.3")
    with pytest.raises(ValueError, match=r"branches or maps of unit.3 are wanted.*compare its tokens \(taps\)"):
        run_grouped(stream, (1, None), shift)
    assert run_grouped(stream, (1, 1), shift).tap == "unit.3"


def test_some_samples_have_all_that_is_theirs_and_no_trace():
    stream = stream_of(4).record("seen", torch.ones(4))
    part, rows = take(stream, torch.tensor([2, 0])), [2, 0]
    for name in ("image", "text", "cond", "time", "signal"):
        assert torch.equal(getattr(part, name), getattr(stream, name)[rows])
    assert torch.equal(part.layout.text_mask, stream.layout.text_mask[rows])
    assert not part.trace and part.layout.grid == stream.layout.grid


# ---- over ranks ------------------------------------------------------------------------------------------------------

RATES = (0.2, 0.9)  # a number of each rank's


def _gradient_of_a_squared_error() -> tuple[float, float]:
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    w = torch.tensor(1.0, requires_grad=True)
    mean = mean_over_ranks(w * RATES[rank])
    (mean - 0.4).square().backward()
    assert w.grad is not None
    dist.all_reduce(w.grad)  # as DDP averages it
    dist.destroy_process_group()
    return mean.item(), w.grad.item() / 2


def test_a_squared_error_of_the_mean_over_ranks_has_the_gradient_of_the_whole_batch():
    w = torch.tensor(1.0, requires_grad=True)
    whole = w * torch.tensor(RATES).mean()
    (whole - 0.4).square().backward()
    assert w.grad is not None
    for mean, gradient in run_ranks(_gradient_of_a_squared_error):
        assert mean == pytest.approx(whole.item()) and gradient == pytest.approx(w.grad.item())  # fp32


def test_alone_a_mean_is_what_it_was():
    x = torch.tensor(0.3)
    assert mean_over_ranks(x) is x
