from copy import deepcopy

import pytest
import torch

import edit
from edit.backbones.flux import FluxConfig
from edit.pruning.collapse import Collapse
from edit.pruning.depth import DepthPruning
from edit.stream import Condition
from edit.tuning.guidance import FixedGuidance, GuidanceInput


def stock(path):
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_pretrained(path).eval()


def assert_stock_computes_the_same(model, flux, batch):
    """The stock model's own forward, at the native arguments of `flux`."""
    native = flux.pack(*batch)
    del native["grid"]
    ours = flux.native(flux.run(flux.embed(**native)))
    torch.testing.assert_close(model(**native).sample, ours, rtol=1e-4, atol=1e-4)  # fp32 through all units


# ---- collapse --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "start, origin", [("middle", [0, 1, 3, 4, 6]), ("first", [0, 1, 3, 4, 6]), ("last", [0, 2, 3, 5, 6])]
)
def test_an_interval_becomes_one_of_its_units(start, origin, flux):
    units, student = flux.units, edit.apply(deepcopy(flux), {"short": Collapse(((1, 2), (4, 5)), start)})
    for unit, i in zip(student.units, origin, strict=True):
        for (name, mine), theirs in zip(unit.named_parameters(), units[i].parameters(), strict=True):
            assert torch.equal(mine, theirs), (i, name)
    assert student.config["num_layers"] == 2 and student.config["num_single_layers"] == 3


def test_the_middle_of_a_long_interval_is_half_way_rounded_down(flux):
    fourth = flux.units[4]
    edit.apply(flux, {"short": Collapse(((3, 6),))})
    assert flux.units[3] is fourth and len(flux.units) == 4


def test_the_mean_of_an_interval_is_the_mean_of_its_weights(flux):
    units = flux.units
    expected = {
        n: torch.stack([u.get_parameter(n) for u in units[4:7]]).mean(0) for n, _ in units[4].named_parameters()
    }
    student = edit.apply(deepcopy(flux), {"short": Collapse(((4, 6),), "mean")})
    assert len(expected) > 8
    for name, p in student.units[4].named_parameters():
        assert torch.equal(p, expected[name])
    assert all(torch.equal(a, b) for a, b in zip(student.units[3].parameters(), units[3].parameters(), strict=True))


def test_collapsing_works_where_nothing_is_allocated():
    with torch.device("meta"):
        flux = FluxConfig(num_layers=3, num_single_layers=4).build()
        edit.apply(flux, {"short": Collapse(((0, 2), (3, 6)), "mean")}, fresh=False)
    assert len(flux.units) == 2 and all(p.is_meta for p in flux.parameters())


@torch.no_grad()
@pytest.mark.parametrize("start", ["middle", "mean"])
def test_a_collapsed_flux_is_a_stock_folder(start, tmp_path, flux, told):
    edit.apply(flux, {"short": Collapse(((0, 1), (3, 5)), start)})
    expected = flux(*told).sample
    edit.save(flux, tmp_path / "a")
    assert torch.equal(edit.load(tmp_path / "a").denoiser(*told).sample, expected)
    (tmp_path / "a" / "edits.json").unlink()
    model = stock(tmp_path / "a")
    assert len(model.transformer_blocks) == 2 and len(model.single_transformer_blocks) == 2
    assert_stock_computes_the_same(model, flux, told)
    assert torch.equal(edit.load(tmp_path / "a").denoiser(*told).sample, expected)


def test_a_listed_subset_of_both_kinds_of_units_keeps_their_weights(flux):
    # FLUX-mini's way to a student: positions count on through both lists
    units = flux.units
    student = edit.apply(deepcopy(flux), {"deep": DepthPruning(pattern="listed", units=(0, 2, 4, 6))})
    assert student.config["num_layers"] == 2 and student.config["num_single_layers"] == 2
    for unit, i in zip(student.units, (0, 2, 4, 6), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(unit.parameters(), units[i].parameters(), strict=True))


@torch.no_grad()
def test_an_interval_up_to_the_last_unit_of_sd3_ends_in_one_that_only_reads_the_text(told):
    from edit.backbones.sd3 import SD3Config

    small = {"attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 24, "in_channels": 4}
    sizes = {"pooled_projection_dim": 20, "pos_embed_max_size": 8}
    sd3 = SD3Config(num_layers=4, **small, **sizes).build()
    with pytest.raises(ValueError, match="start=mean needs units with the same weights, these differ: use middle"):
        edit.apply(deepcopy(sd3), {"short": Collapse(((1, 3),), "mean")})
    edit.apply(sd3, {"short": Collapse(((1, 3),))})
    assert len(sd3.units) == 2 and sd3(*told, taps=(1,)).trace.keys() == {"unit.1"}


def test_impossible_intervals_are_refused(flux):
    with pytest.raises(ValueError, match="start must be middle, first, last or mean, got 'end'"):
        Collapse(((0, 1),), "end")
    with pytest.raises(ValueError, match=r"intervals are \(first, last\), increasing and disjoint"):
        Collapse(((0, 2), (2, 3)))
    with pytest.raises(ValueError, match=r"interval \(2, 3\) mixes DoubleUnit and SingleUnit: split it there"):
        edit.apply(flux, {"short": Collapse(((2, 3),))})
    with pytest.raises(ValueError, match="Collapse: intervals: this flux has units 0 to 6, got 7"):
        edit.apply(flux, {"short": Collapse(((5, 7),))})
    assert len(flux.units) == 7


# ---- fixed guidance --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("g", [1.0, 3.5, 6.25])
def test_folded_guidance_is_the_teacher_at_that_guidance_and_at_no_other(g, flux, told):
    x, _, condition = told
    student = edit.apply(deepcopy(flux), {"fixed": FixedGuidance(g)})
    for t in (0.01, 0.3, 0.77, 1.0):
        at, scale = torch.full((3,), t), torch.full((3,), g)
        mine = student(x, at, condition).sample

        def taught(scale, at=at):
            return flux(x, at, Condition(text=condition.text, pooled=condition.pooled, guidance=scale)).sample

        torch.testing.assert_close(mine, taught(scale), rtol=1e-5, atol=1e-5)  # fp32: the bias is added earlier
        assert (mine - taught(scale + 1)).abs().max() > 1e-3


@torch.no_grad()
def test_a_folded_model_has_no_guidance_input_and_loads_as_stock(tmp_path, flux, told):
    embedder = sum(p.numel() for p in flux.model.time_text_embed.guidance_embedder.parameters())
    before = sum(p.numel() for p in flux.parameters())
    edit.apply(flux, {"fixed": FixedGuidance(3.5)})
    assert sum(p.numel() for p in flux.parameters()) == before - embedder and not flux.config["guidance_embeds"]
    expected = flux(*told).sample
    edit.save(flux, tmp_path / "a")
    assert torch.equal(edit.load(tmp_path / "a").denoiser(*told).sample, expected)  # the fold is not applied twice
    edit.fold(flux)
    edit.save(flux, tmp_path / "b")
    assert torch.equal(edit.load(tmp_path / "b").denoiser(*told).sample, expected)
    for model in (stock(tmp_path / "a"), stock(tmp_path / "b")):
        assert not model.config.guidance_embeds
        assert_stock_computes_the_same(model, flux, told)
    cond = flux.model.time_text_embed(torch.tensor([500.0]), told[2].pooled[:1])  # as the stock forward calls it
    assert cond.shape == (1, 32)


def test_the_fold_works_where_nothing_is_allocated():
    with torch.device("meta"):
        flux = FluxConfig(num_layers=1, num_single_layers=1).build()
        edit.apply(flux, {"fixed": FixedGuidance()}, fresh=False)
    assert not flux.config["guidance_embeds"] and all(p.is_meta for p in flux.parameters())


def test_a_model_without_guidance_has_nothing_to_fold(make_flux, dit):
    for denoiser in (make_flux(guidance_embeds=False), dit):
        with pytest.raises(ValueError, match=f"this {denoiser.name} has no guidance input: there is nothing to fold"):
            edit.apply(denoiser, {"fixed": FixedGuidance()})


# ---- a guidance input ------------------------------------------------------------------------------------------------


def test_a_new_guidance_input_changes_nothing_at_first_and_then_hears_the_scale(make_flux, tmp_path):
    plain = make_flux(guidance_embeds=False)
    x, t, c = torch.randn(3, 4, 8, 8), torch.rand(3), Condition(text=torch.randn(3, 5, 24), pooled=torch.randn(3, 20))
    before = plain(x, t, c).sample
    edit.apply(plain, {"input": GuidanceInput()})
    scales = [Condition(text=c.text, pooled=c.pooled, guidance=torch.full((3,), g)) for g in (1.0, 6.0)]
    for told_ in scales:
        torch.testing.assert_close(plain(x, t, told_).sample, before)
    torch.nn.init.normal_(plain.model.time_text_embed.guidance_embedder.linear_2.weight)
    low, high = (plain(x, t, told_).sample for told_ in scales)
    assert (low - high).abs().max() > 1e-3
    edit.save(plain, tmp_path / "a")
    torch.testing.assert_close(edit.load(tmp_path / "a").denoiser(x, t, scales[1]).sample, high)
    assert stock(tmp_path / "a").config.guidance_embeds


def test_a_model_that_has_a_guidance_input_gets_no_second_one(flux, dit):
    for denoiser in (flux, dit):
        with pytest.raises(ValueError, match="cannot be given a guidance input, or has one"):
            edit.apply(denoiser, {"input": GuidanceInput()})
