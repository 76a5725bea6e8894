import pytest
import torch

import edit
from edit.backbones.dit import DiTConfig
from edit.pruning.depth import DepthPruning


@pytest.mark.parametrize(
    "depth, ratio, kept",
    [(28, 0.5, 14), (28, 0.25, 21), (12, 1 / 3, 8), (3, 0.99, 1), (1, 0.5, 1), (28, 0.0, 28)],
)
@pytest.mark.parametrize("pattern", ["uniform", "random"])
def test_the_share_that_is_dropped_is_the_ratio(depth, ratio, kept, pattern):
    units = DepthPruning(ratio, pattern).kept(depth)
    assert len(units) == kept == len(set(units)) and units == sorted(units)
    assert all(0 <= i < depth for i in units)


def test_uniform_pruning_keeps_both_ends_and_even_gaps():
    for depth, ratio in ((28, 0.5), (28, 0.25), (12, 0.6)):
        units = DepthPruning(ratio).kept(depth)
        gaps = [b - a for a, b in zip(units, units[1:], strict=False)]
        assert units[0] == 0 and units[-1] == depth - 1 and max(gaps) - min(gaps) <= 1


def test_random_pruning_is_a_function_of_its_seed_alone():
    before = torch.get_rng_state()
    draws = [tuple(DepthPruning(0.5, "random", seed=s).kept(28)) for s in range(20)]
    assert torch.equal(before, torch.get_rng_state())
    assert draws == [tuple(DepthPruning(0.5, "random", seed=s).kept(28)) for s in range(20)]
    assert len(set(draws)) == 20


def test_the_kept_units_are_the_same_objects_and_the_rest_is_gone(dit):
    first, middle, last = dit.units
    size = sum(p.numel() for p in middle.parameters())
    before = sum(p.numel() for p in dit.parameters())
    edit.apply(dit, {"deep": DepthPruning(pattern="listed", units=(0, 2))})
    assert dit.units == [first, last] and dit.config["depth"] == 2
    assert sum(p.numel() for p in dit.parameters()) == before - size


def test_pruning_works_where_nothing_is_allocated():
    with torch.device("meta"):
        dit = DiTConfig().build()
        edit.apply(dit, {"random": DepthPruning(0.5, "random"), "again": DepthPruning(0.5)})
    assert len(dit.units) == 7 and all(p.is_meta for p in dit.parameters())


@torch.no_grad()
def test_a_pruned_dit_is_a_plain_shallower_model_for_stock_diffusers(tmp_path, make_dit, batch):
    from diffusers import DiTTransformer2DModel

    dit = make_dit(frequency_shift=1.0)
    edit.apply(dit, {"deep": DepthPruning(0.34)})
    edit.save(dit, tmp_path / "a")
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "a").eval()
    assert len(model.transformer_blocks) == 2
    x, t, condition = batch
    theirs = model(x, timestep=t, class_labels=condition.label).sample
    torch.testing.assert_close(dit(*batch).sample, theirs, rtol=1e-5, atol=1e-5)  # fp32, sums in another order
    (tmp_path / "a" / "edits.json").unlink()  # and what is left is a stock folder of that depth
    assert len(edit.load(tmp_path / "a").denoiser.units) == 2


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"ratio": 1.0}, r"ratio is the share to drop, in \[0, 1\), got 1.0"),
        ({"ratio": -0.1}, "ratio is the share to drop"),
        ({"pattern": "every"}, "pattern must be uniform, random or listed, got 'every'"),
        ({"pattern": "listed"}, 'give `units` exactly when pattern is "listed"'),
        ({"units": (0, 1)}, 'give `units` exactly when pattern is "listed"'),
        ({"pattern": "listed", "units": (2, 1)}, "units must be increasing without repeats"),
        ({"pattern": "listed", "units": (1, 1)}, "units must be increasing without repeats"),
    ],
)
def test_impossible_settings_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        DepthPruning(**options)


def test_units_that_are_not_there_are_refused(dit):
    with pytest.raises(ValueError, match="keep: this dit has units 0 to 2, got 7"):
        edit.apply(dit, {"deep": DepthPruning(pattern="listed", units=(0, 7))})
