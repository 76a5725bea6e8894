"""What a probe measures on tensors without memory is what a step computes and keeps."""

import pytest
import torch
from probes import probe

from edit.backbones.dit import DiTConfig
from edit.backbones.flux import FluxConfig
from edit.measuring.memory import GB

TABLE = {64: 21.5, 96: 41.9, 128: 74.4, 192: 191.9, 256: 418.1}  # latent rows, TFLOP of a forward


@pytest.mark.parametrize("latent", [128, *(pytest.param(n, marks=pytest.mark.slow) for n in (64, 96, 192, 256))])
def test_a_forward_of_flux_costs_what_table_d0_says(latent):
    assert 2 * probe(FluxConfig(), latent).macs() / 1e12 == pytest.approx(TABLE[latent], rel=0.01)


@pytest.mark.parametrize(
    "blocks, teraflops",
    [pytest.param((8, 38), 60.0, marks=pytest.mark.slow), ((10, 20), 39.1), ((5, 10), 19.6)],
)
def test_pruned_students_cost_what_table_d0_says(blocks, teraflops):
    spec = FluxConfig(num_layers=blocks[0], num_single_layers=blocks[1])
    assert 2 * probe(spec, 128).macs() / 1e12 == pytest.approx(teraflops, rel=0.01)


@pytest.mark.slow
def test_checkpointing_stores_the_tokens_of_each_unit_and_nothing_else():
    """57 N D 2 bytes at any resolution, plus one unit's own activations: two depths differ by their tokens."""

    def stores(singles: int) -> int:
        small = FluxConfig(16, 1, singles, 32, 2, 32, 32, False, (8, 12, 12), (32, 32))
        return probe(small, text=64).step(3, True, True, torch.bfloat16).forward

    tokens = 3 * (16 * 16 + 64) * 64 * 2
    assert stores(16) - stores(15) == tokens
    assert 57 * (1024 + 512) * 3072 * 2 / GB == pytest.approx(0.54, abs=0.005)  # FLUX.1 at 512 px


def test_a_tap_of_flux_keeps_28_megabytes():
    spec = FluxConfig(num_layers=1, num_single_layers=1)
    plain, tapped = (probe(spec, 128, taps=taps).ask(1, True, torch.bfloat16) for taps in ((), (0,)))
    assert (tapped.kept - plain.kept) / 1e6 == pytest.approx(28.3, abs=0.1)


@pytest.mark.slow  # 15 s
def test_activations_of_flux_are_those_of_d6():
    flux = probe(FluxConfig(), 128)
    kept, recomputed = (flux.step(1, True, c, torch.bfloat16) for c in (False, True))
    assert kept.flowing / GB == pytest.approx(40, rel=0.1)  # inferred there
    unit = (recomputed.flowing - recomputed.forward) / GB
    assert recomputed.stored / GB == pytest.approx(1.6, rel=0.1)  # inputs of units; here with conditioning
    assert recomputed.forward - recomputed.stored < 0.3 * GB  # what a unit needs while it runs forward
    assert 0.5 < unit < 0.9


def test_bf16_copies_of_fp32_weights_live_as_long_as_the_graph_that_holds_them():
    p = probe(DiTConfig(8, 2, 4, hidden_size=256, depth=4, num_heads=4, num_classes=10))
    weights = sum(q.numel() for q in p.denoiser.parameters())
    stored, recomputed = (
        p.step(1, True, checkpointing, torch.float32).flowing - p.step(1, True, checkpointing, torch.bfloat16).flowing
        for checkpointing in (False, True)
    )
    # linear layers are copied, embeddings and norms are not
    assert stored == pytest.approx(2 * weights, rel=0.1)
    unit = max(sum(q.numel() for q in unit.parameters()) for unit in p.denoiser.units)
    # of the unit that is computed again, and gradients of one layer in both types
    assert recomputed < 2 * unit + 4 * 4 * 256 * 256


def test_samples_of_another_size_are_refused():
    with pytest.raises(ValueError, match="takes samples of 2x8x8, got 2x16x16"):
        probe(DiTConfig(8, 2, 4, hidden_size=64, depth=1, num_heads=2), 16)
