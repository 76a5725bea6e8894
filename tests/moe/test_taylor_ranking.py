"""The Taylor ranking of hidden channels: its formula, and what it is worth for a shared expert."""

from statistics import median

import pytest
import torch
import torch.nn.functional as F
from families import family, inputs
from torch import nn

import edit
from edit import noise
from edit.calibrating import OnData, calibrate
from edit.moe.dense2moe import Dense2MoE
from edit.moe.division import deal
from edit.moe.taylor import TaylorRanking, channels
from edit.predictions import default_objective
from edit.sampling import default_sampler

BATCHES, EACH = 2, 3


def on_data(denoiser, batches=BATCHES):
    """Random samples in place of data, as many as there are numbers."""

    def data():
        for k in range(batches):
            draw = torch.arange(EACH * k, EACH * (k + 1))
            _, _, condition = inputs(denoiser, EACH)
            told = {n: v.float() if v.is_floating_point() else v for n, v in vars(condition).items() if v is not None}
            yield {"draw": draw, "x": noise.gaussian(7, draw, noise.NOISE, denoiser.sample_shape), **told}

    objective = default_objective(denoiser)
    return OnData(denoiser, objective, default_sampler(denoiser), data, batches=BATCHES, samples=1, seed=5)


def ranked(name: str, **options):
    denoiser = edit.apply(family(name).float(), {"ranking": TaylorRanking(**options)}).eval()
    calibrate(denoiser, on_data(denoiser))
    return denoiser


def gradients(denoiser) -> dict[str, torch.Tensor]:
    """Of the loss on all calibration samples, by autograd on the whole model."""
    denoiser.zero_grad(set_to_none=True)
    for noisy, loss in on_data(denoiser).scored():
        loss(denoiser(*noisy)).sum().backward()
    return {n: p.grad for n, p in denoiser.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("terms", ["signed", "absolute"])
def test_importance_is_the_formula(terms):
    denoiser = ranked("dit", terms=terms)
    grads, weights = gradients(denoiser), dict(denoiser.named_parameters())
    for i in range(2):
        at = f"model.blocks.{i}.mlp"
        w1, b1, w2 = (
            (weights[f"{at}.{n}"] * grads[f"{at}.{n}"]).detach() for n in ("fc1.weight", "fc1.bias", "fc2.weight")
        )
        if terms == "absolute":
            w1, b1, w2 = w1.abs(), b1.abs(), w2.abs()
        wanted = (w1.sum(1) + b1 + w2.sum(0)).abs() / (BATCHES * EACH)
        found = denoiser.edits["ranking"].get_buffer(str(i))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * wanted.max().item())


def test_of_fused_and_two_stream_units_the_feed_forwards_own_columns_count():
    denoiser = ranked("flux")
    grads, weights = gradients(denoiser), dict(denoiser.named_parameters())
    names = ("proj_mlp.weight", "proj_mlp.bias", "proj_out.weight")
    w1, b1, w2 = ((weights[n] * grads[n]).detach() for n in (f"model.single_transformer_blocks.1.{n}" for n in names))
    wanted = (w1.sum(1) + b1 + w2[:, 64:].sum(0)).abs() / (BATCHES * EACH)
    found = denoiser.edits["ranking"].get_buffer("3")
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * wanted.max().item())
    assert {n for n, _ in denoiser.edits["ranking"].named_buffers()} == {"0", "0_text", "1", "1_text", "2", "3"}


def test_a_gated_channel_has_the_rows_of_gate_and_value():
    terms = torch.arange(12.0).view(6, 2)  # of two parts, three channels
    assert channels(terms, -1, 3).tolist() == [0 + 1 + 6 + 7, 2 + 3 + 8 + 9, 4 + 5 + 10 + 11]
    assert channels(torch.arange(6.0), -1, 3).tolist() == [3, 5, 7]
    assert channels(torch.arange(8.0).view(2, 4), 1, 3).tolist() == [1 + 5, 2 + 6, 3 + 7]


def test_calibration_changes_no_weight_and_no_flag():
    denoiser = edit.apply(family("dit").float(), {"ranking": TaylorRanking()}).eval()
    first = next(denoiser.parameters()).requires_grad_(False)
    before = {k: v.clone() for k, v in denoiser.model.state_dict().items()}
    calibrate(denoiser, on_data(denoiser))
    assert all(torch.equal(v, before[k]) for k, v in denoiser.model.state_dict().items())
    assert not first.requires_grad and all(p.requires_grad for p in list(denoiser.parameters())[1:])
    assert all(p.grad is None for p in denoiser.parameters())


def test_a_channel_that_nothing_reads_has_no_importance_and_is_never_shared(tmp_path):
    denoiser = family("dit").float()
    dead = torch.tensor([0, 17, 200, 255])
    with torch.no_grad():
        for block in denoiser.model.blocks:
            block.mlp.fc2.weight[:, dead] = 0
            block.mlp.fc1.weight[dead] = 100 * torch.randn(4, 64)
    edit.apply(denoiser, {"ranking": TaylorRanking()}).eval()
    calibrate(denoiser, on_data(denoiser))
    scores = denoiser.edits["ranking"].get_buffer("0")
    assert not scores[dead].any() and (scores > 0).sum() == 252
    assert not set(deal(scores, 64, 12, "snake")[0].tolist()) & set(dead.tolist())
    edit.save(denoiser, tmp_path / "ranked")
    plain = family("dit").float()
    plain.load_state_dict({k: v for k, v in denoiser.state_dict().items() if k.startswith("model.")})
    moe = edit.apply(plain, {"moe": Dense2MoE(start=str(tmp_path / "ranked"))})
    assert all(layer.shared.out.weight.abs().sum(0).min() > 0 for layer in moe.edits["moe"].values())


class Toy(nn.Module):
    """One feed-forward of 32 channels."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 32), nn.Linear(32, 3)

    def forward(self, x: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        h = F.gelu(self.fc1(x))
        h = h if kept is None else h * torch.zeros(32).index_fill(0, kept, 1.0)
        return self.fc2(h)


def test_of_a_trained_toy_the_most_important_channels_alone_lose_less_than_random_ones():
    won = []
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        toy, target = Toy(), torch.randn(6, 3, generator=g)
        x = torch.randn(256, 6, generator=g)
        y = torch.sin(x @ target)
        optimizer = torch.optim.Adam(toy.parameters(), 1e-2)
        for _ in range(60):  # briefly
            optimizer.zero_grad()
            (toy(x) - y).square().mean().backward()
            optimizer.step()
        toy.zero_grad()
        (toy(x) - y).square().mean().backward()
        terms = [(w * w.grad).detach() for w in (toy.fc1.weight, toy.fc1.bias, toy.fc2.weight)]
        scores = sum(channels(t, first, 32) for t, first in zip(terms, (-1, -1, 0), strict=True)).abs()
        losses = []
        for how in (scores, torch.rand(32, generator=g)):
            shared, _ = deal(how, 12, 4, "snake")
            losses.append((toy(x, shared) - y).square().mean().item())
        won.append(losses[1] - losses[0])
    assert median(won) > 0


def test_an_empty_calibration_set_is_refused():
    denoiser = edit.apply(family("dit").float(), {"ranking": TaylorRanking()}).eval()
    with pytest.raises(ValueError) as error:
        calibrate(denoiser, on_data(denoiser, batches=0))
    assert str(error.value) == (
        "ranking (TaylorRanking): the calibration set is empty: give data with samples, and recipe.batches"
    )


def test_a_model_whose_gates_are_zero_is_refused():
    denoiser = family("dit").float()
    with torch.no_grad():
        for block in denoiser.model.blocks:
            for p in block.adaLN_modulation.parameters():
                p.zero_()
    edit.apply(denoiser, {"ranking": TaylorRanking()}).eval()
    with pytest.raises(
        ValueError, match="depends on no feed-forward of this dit, whose gates are zero as in a new model"
    ):
        calibrate(denoiser, on_data(denoiser))


def test_feed_forwards_that_are_not_plain_are_refused():
    from edit.pruning.width import FeedForwardWidth

    narrow = edit.apply(family("dit"), {"width": FeedForwardWidth(), "ranking": TaylorRanking()})
    assert narrow.edits["ranking"].get_buffer("0").shape == (128,)
    moe = edit.apply(family("dit"), {"moe": Dense2MoE(ranking="magnitude")})
    with pytest.raises(
        ValueError, match="TaylorRanking: unit 0 of this dit has no feed-forward of plain linear layers"
    ):
        edit.apply(moe, {"ranking": TaylorRanking()})
    with pytest.raises(ValueError, match="TaylorRanking: terms must be signed or absolute, got 'both'"):
        TaylorRanking(terms="both")
