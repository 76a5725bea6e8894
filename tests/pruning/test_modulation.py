from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import edit
from edit.backbones.flux import FluxConfig
from edit.pruning.depth import DepthPruning
from edit.pruning.modulation import ModulationApproximator, Scalars, Slots, Taught, modulated
from edit.stream import Condition
from edit.tuning.guidance import FixedGuidance, GuidanceInput

SLOTS = 3 * 4 + 12 * 3 + 2  # of the fixture: 4 single and 3 double units


def small(**options) -> ModulationApproximator:
    return ModulationApproximator(**{"depth": 2, "hidden": 24, "steps": 0, **options})


@pytest.fixture
def student(flux):
    return edit.apply(flux, {"small": small()})


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---- what goes and what comes ----------------------------------------------------------------------------------------


def test_flux_dev_loses_its_modulation_layers_for_a_twelfth_of_them(monkeypatch):
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda self: None)  # seconds, of weights that are not there
    with torch.device("meta"):
        flux = FluxConfig().build()
        layers = sum(count(norm.linear) for *_, norm, _ in modulated(flux.model))
        embedders, before = count(flux.model.time_text_embed), count(flux.model)
        edit.apply(flux, {"small": ModulationApproximator()}, fresh=False)
    assert round(layers / 1e9, 3) == 3.247 and count(flux.model) == before - layers - embedders
    h, d = 5120, 3072
    assert count(flux.edits) == 64 * h + h + 5 * (2 * (h * h + h) + h) + h * d + d  # 0.278 B
    assert flux.edits["small"].slots == 344
    assert not any(".linear." in n or "time_text_embed" in n for n, _ in flux.named_parameters())


def test_vectors_are_numbered_as_chroma_numbers_them(student):
    model = student.model
    assert [u.norm.linear.first for u in model.single_transformer_blocks] == [0, 3, 6, 9]
    assert [u.norm1.linear.first for u in model.transformer_blocks] == [12, 18, 24]
    assert [u.norm1_context.linear.first for u in model.transformer_blocks] == [30, 36, 42]
    assert model.norm_out.first == 48 and student.edits["small"].slots == SLOTS == 50


@torch.no_grad()
def test_norms_given_the_vectors_of_the_layers_are_those_of_flux(flux, told):
    x, t, condition = told
    taught = Taught(flux.model.time_text_embed, [norm.linear for *_, norm, _ in modulated(flux.model)])
    pooled = condition.pooled[:1]
    expected = flux(x, t, replace(condition, pooled=pooled.expand(3, -1))).sample
    vectors = taught(t, torch.full((3,), flux.guidance), pooled)
    assert vectors.shape == (3, SLOTS, 32)
    edit.apply(flux, {"small": small()})
    stream = flux.embed(**flux.pack(x, t, condition))
    out = flux.readout(flux.run(replace(stream, cond=vectors)))
    torch.testing.assert_close(out.sample, expected, rtol=1e-5, atol=1e-5)  # fp32, the same sums


@pytest.mark.parametrize("guided", [True, False])
def test_time_and_guidance_reach_the_network_and_the_pooled_text_does_not(guided, make_flux, told):
    x, t, c = told
    flux = edit.apply(make_flux(guidance_embeds=guided), {"small": small()})
    native = flux.pack(x, t, c)
    guidance = torch.full((3,), flux.guidance) if guided else None
    assert torch.equal(flux.embed(**native).cond, Scalars()(t, guidance))
    assert torch.equal(flux(x, t, replace(c, pooled=torch.zeros_like(c.pooled))).sample, flux(x, t, c).sample)
    assert (flux(x, t / 2, c).sample - flux(x, t, c).sample).abs().max() > 1e-3
    if guided:
        assert (flux(x, t, replace(c, guidance=t + 5)).sample - flux(x, t, c).sample).abs().max() > 1e-3


# ---- the fit ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(make_flux, tmp_path_factory):
    """A teacher, its student fitted at one pooled text, and that text."""
    teacher, pooled = make_flux(), torch.randn(20, generator=torch.Generator().manual_seed(5))
    e = teacher.model.time_text_embed
    for embedder in (e.timestep_embedder, e.guidance_embedder):
        # as after training: smooth in t and g. Random weights on sinusoids of up to 1000 t make noise of t
        embedder.linear_1.weight.data.unflatten(1, (2, -1))[:, :, :100] = 0
    path = tmp_path_factory.mktemp("mean") / "mean.safetensors"
    save_file({"pooled": pooled}, path)
    torch.manual_seed(0)
    fit = ModulationApproximator(depth=2, hidden=96, steps=400, batch=8, lr=5e-3, pooled=str(path))
    return teacher, edit.apply(deepcopy(teacher), {"small": fit}), pooled


@torch.no_grad()
def test_a_fitted_student_predicts_what_its_teacher_does_at_that_text(fitted, told):
    teacher, student, pooled = fitted
    x, t, c = told
    drawn = edit.apply(deepcopy(teacher), {"small": small(hidden=96)})

    def error(model, pooled, guidance) -> float:
        told = Condition(text=c.text, pooled=pooled.expand(3, -1), guidance=torch.full((3,), guidance))
        expected = teacher(x, t, told).sample
        return ((model(x, t, told).sample - expected).square().mean() / expected.square().mean()).item()

    for guidance in (1.5, 3.5, 6.0):
        # it has 0.009 to 0.03 of the mean square left here, a drawn network more than all of it
        assert error(student, pooled, guidance) < 0.1 * error(drawn, pooled, guidance)
    assert error(student, pooled, 3.5) < 0.2 * error(student, -pooled, 3.5)  # fitted at this text, not at another


def test_the_fit_moves_the_network_alone_and_says_how_far_it_is(flux, capsys):
    torch.manual_seed(0)
    twin = deepcopy(flux)
    layers = [norm.linear for *_, norm, _ in modulated(flux.model)]
    taught = Taught(flux.model.time_text_embed, layers)
    before = deepcopy(taught.state_dict())
    edit.apply(flux, {"small": small(steps=20, lr=3e-3)})
    torch.manual_seed(0)
    edit.apply(twin, {"small": small()})
    assert all(torch.equal(v, before[k]) for k, v in taught.state_dict().items())
    assert all(p.grad is None for p in (*taught.parameters(), *flux.parameters()))
    mine, other = flux.state_dict(), twin.state_dict()
    moved = {k for k in mine if not torch.equal(mine[k], other[k])}
    assert moved == {k for k in mine if k.startswith("edits.small.")}
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 10 and "modulation fit     20/20" in said[-1]


def test_the_fit_is_decided_by_its_seed(flux):
    def fitted(seed: int):
        torch.manual_seed(0)
        return edit.apply(deepcopy(flux), {"small": small(steps=3, seed=seed)}).edits["small"].out.weight

    assert torch.equal(fitted(1), fitted(1)) and not torch.equal(fitted(1), fitted(2))


# ---- with the rest ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_artifact_brings_the_network_back_without_a_fit(tmp_path, fitted, told, capsys):
    _, student, _ = fitted
    edit.save(student, tmp_path / "a")
    capsys.readouterr()
    loaded = edit.load(tmp_path / "a").denoiser
    assert torch.equal(loaded(*told).sample, student(*told).sample)
    assert capsys.readouterr().out == ""


@torch.no_grad()
def test_it_stands_between_other_edits(tmp_path, flux, told):
    edits = {"told": FixedGuidance(3.5), "small": small(), "deep": DepthPruning(pattern="listed", units=(0, 2, 4))}
    edit.apply(flux, edits)
    assert [type(u.norm1) for u in flux.model.transformer_blocks] == [Slots, Slots]
    edit.save(flux, tmp_path / "a")
    assert torch.equal(edit.load(tmp_path / "a").denoiser(*told).sample, flux(*told).sample)


def test_what_it_costs_is_counted(flux, told):
    from edit.measuring.cost import macs

    layers = sum(norm.linear.weight.numel() for *_, norm, _ in modulated(flux.model))
    embedders = sum(p.numel() for p in flux.model.time_text_embed.parameters() if p.ndim == 2)
    before = macs(flux)
    own = edit.apply(flux, {"small": small()}).edits["small"]
    each = sum(p.numel() for p in own.parameters() if p.ndim == 2)
    assert macs(flux) == before - layers - embedders + SLOTS * each


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"guidance": (3.0, 1.0)}, "guidance is \\(low, high\\) with 0 <= low <= high, got 3.0, 1.0"),
    ],
)
def test_impossible_settings_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        small(**options)


def test_what_cannot_be_is_refused_in_a_sentence(flux, dit, tmp_path):
    with pytest.raises(ValueError, match="compresses the modulation of a flux, this is a dit"):
        edit.apply(dit, {"small": small()})
    save_file({"pooled": torch.zeros(7)}, tmp_path / "mean.safetensors")
    with pytest.raises(ValueError, match=r"`pooled` of shape \(20,\), it has one of shape \(7,\)"):
        edit.apply(deepcopy(flux), {"small": small(steps=1, pooled=str(tmp_path / "mean.safetensors"))})
    with pytest.raises(FileNotFoundError, match="no file nowhere: pooled is a safetensors file"):
        edit.apply(deepcopy(flux), {"small": small(steps=1, pooled="nowhere")})
    edit.apply(flux, {"small": small()})
    with pytest.raises(ValueError, match="compressed already"):
        edit.apply(flux, {"twice": small()})
    with pytest.raises(ValueError, match="cannot be folded into the weights: keep it as an edit"):
        edit.fold(flux)


@pytest.mark.parametrize("other", [FixedGuidance(3.5), GuidanceInput()])
def test_what_changes_the_embedders_must_come_before(make_flux, other):
    flux = make_flux(guidance_embeds=isinstance(other, FixedGuidance))
    with pytest.raises(ValueError, match=f"{type(other).__name__}: another edit has replaced the embedder"):
        edit.apply(flux, {"small": small(), "late": other})
