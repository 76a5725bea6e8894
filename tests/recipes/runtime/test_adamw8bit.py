"""AdamW with moments of a byte each: near the exact one, skipped without a trace in the weights, resumed exactly."""

import shutil

import pytest
import torch
from ranks import run_ranks
from small_runs import TWO_RANKS, losses, rows, train
from torch import nn

pytest.importorskip("torchao")

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
WIDE = ("optimizer.kind=adamw8bit", "optimizer.schedule=constant", "backbone.hidden_size=64")  # halves still in bytes


@pytest.fixture(autouse=True)
def eager():
    """The update as it is written: compiling it takes seconds for each shape."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def made(dtype=torch.float32):
    from recipes.runtime.adamw8bit import AdamW8bit

    weight = nn.Parameter(torch.randn(32, 256).to(dtype))
    return weight, AdamW8bit([{"params": [weight], "lr": 2e-3}], **SETTINGS)


def test_steps_are_those_of_adamw_up_to_the_rounding_of_moments():
    weight, optimizer = made()
    twin = nn.Parameter(weight.detach().clone())
    exact, start = torch.optim.AdamW([twin], **{**SETTINGS, "lr": 2e-3}), weight.detach().clone()
    for _ in range(10):
        weight.grad = twin.grad = torch.randn(32, 256)
        optimizer.step(), exact.step()
    apart, way = (weight - twin).norm(), (twin - start).norm()
    assert 0 < apart < 0.05 * way  # found 0.6 %: eight bits, of which a block shares the scale
    assert optimizer.state[weight]["exp_avg"].codes.dtype == torch.uint8
    assert optimizer.param_groups[0]["lr"] == 2e-3


def test_a_skipped_step_leaves_weights_to_the_bit_and_moments_finite():
    weight, optimizer = made()
    weight.grad = torch.randn(32, 256)
    optimizer.step()
    before, momentum = weight.detach().clone(), optimizer.state[weight]["exp_avg"].dequantize()
    weight.grad = torch.full((32, 256), torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(weight, before)
    after = optimizer.state[weight]["exp_avg"].dequantize()
    torch.testing.assert_close(after, 0.9 * momentum, rtol=0, atol=0.02 * momentum.abs().max().item())  # eight bits


def test_small_updates_of_bf16_weights_are_kept_on_average():
    """A thousandth of the weight, a quarter of what bf16 can tell apart at 1: rounded to the nearest nothing moves."""
    weight, optimizer = made(torch.bfloat16)
    weight.data.fill_(1.0)
    optimizer.param_groups[0].update(lr=1e-3, weight_decay=0.0)
    for _ in range(4):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # 8192 weights take four steps of 2^-8 at most, below 1 of 2^-9: a standard error of 4e-5
    assert weight.float().mean().item() == pytest.approx(1 - 4e-3, abs=3e-4)


def test_a_step_without_finite_gradient_is_skipped_in_a_run(tmp_path, monkeypatch):
    from recipes.steps.diffusion import Diffusion

    step = Diffusion.training_step
    poisoned = lambda m, *args: step(m, *args) * (torch.nan if m.trainer.global_step in (2, 3) else 1.0)  # noqa: E731
    monkeypatch.setattr(Diffusion, "training_step", poisoned)
    train(tmp_path, "name=a", *WIDE, "trainer.max_steps=5", "checkpoint.every=1", "checkpoint.keep=9")
    assert [float(r["skipped_steps"]) for r in rows(tmp_path, "a")] == [0, 0, 1, 2, 2]
    folder = tmp_path / "a" / "checkpoints"
    states = [torch.load(folder / f"step_{k:08d}.ckpt", weights_only=True)["state_dict"] for k in (2, 4, 5)]
    key = "denoiser.model.blocks.0.attn.qkv.weight"
    assert torch.equal(states[0][key], states[1][key]) and states[2][key].isfinite().all()
    assert not torch.equal(states[1][key], states[2][key])


def _train(folder, overrides):
    train(folder, *overrides)


@pytest.mark.parametrize("strategy", ["single", "fsdp2"])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path, strategy, capfd):
    world = 1 if strategy == "single" else 2
    words = [*WIDE, "trainer.max_steps=6", "checkpoint.every=3", "checkpoint.keep=9", "optimizer.warmup=0"]
    words += ["optimizer.lr=4e-3", *(() if world == 1 else ("trainer=fsdp2", *TWO_RANKS[:-1], "data.batch_size=8"))]
    run_ranks(_train, world, args=(tmp_path, [*words, "name=whole"]), timeout=120)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "checkpoints" / "step_00000006.ckpt").unlink()
    shutil.rmtree(tmp_path / "parts" / "artifact")
    run_ranks(_train, world, args=(tmp_path, [*words, "name=parts"]), timeout=120)
    assert "at step 3 of 6" in capfd.readouterr().out
    assert losses(tmp_path, "parts") == losses(tmp_path, "whole") and len(losses(tmp_path, "parts")) == 6
