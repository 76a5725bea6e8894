"""Low-rank modulation: the best approximation of its rank, of the layers inside units alone."""

import pytest
import torch
from families import family, inputs

import edit
from edit.pruning.modulation_rank import ModulationRank, factorised, modulations

COUNT = {"dit": 2, "flux": 6, "sd3": 6, "qwen_image": 6}  # layers


@pytest.mark.parametrize("name", COUNT)
@torch.no_grad()
def test_at_full_rank_it_is_the_dense_model(name):
    whole, low = family(name).float(), family(name).float()
    assert len(modulations(low)) == COUNT[name]
    edit.apply(low, {"low": ModulationRank(64)})
    x, t, condition = inputs(whole)
    x = x.float(), t.float(), condition.map(lambda v: v.float() if v.is_floating_point() else v)
    torch.testing.assert_close(low(*x).sample, whole(*x).sample, rtol=1e-3, atol=1e-4)  # an SVD in fp32


def test_it_is_the_nearest_of_its_rank_and_the_bias_stays():
    layer = torch.nn.Linear(12, 30)
    made, s = factorised(layer, 5), torch.linalg.svdvals(layer.weight)
    left = made.rank_out.weight @ made.rank_in.weight - layer.weight
    torch.testing.assert_close(left.square().sum(), s[5:].square().sum())  # Eckart and Young
    assert torch.equal(made.rank_out.bias, layer.bias) and torch.equal(made(torch.zeros(1, 12))[0], layer.bias)


def test_parameters_fall_as_counted_and_an_artifact_comes_back(tmp_path):
    whole, low = family("flux").float(), edit.apply(family("flux").float(), {"low": ModulationRank(4)})
    saved = sum((64 - 4) * k * 64 - 4 * 64 for k in (6, 6, 6, 6, 3, 3))
    assert sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in low.parameters()) == saved
    edit.save(low, tmp_path / "a")
    loaded = edit.load(tmp_path / "a").denoiser
    assert all(torch.equal(v, low.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_it_is_refused_where_there_is_nothing_to_factorise():
    with pytest.raises(
        ValueError, match="ModulationRank: the units of this pixart have no linear modulation: leave it"
    ):
        edit.apply(family("pixart"), {"low": ModulationRank(4)})
    with pytest.raises(ValueError, match="ModulationRank: rank 65 is above the width 64 of this dit: lower it"):
        edit.apply(family("dit"), {"low": ModulationRank(65)})
