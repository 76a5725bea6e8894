"""The sampler of an artifact at another guidance weight or number of steps."""

from dataclasses import replace

import pytest

import edit
from edit.backbones.flux import FluxConfig
from edit.sampling import Sampler
from edit.solvers import Euler, Grid
from recipes.config.errors import UserError
from recipes.report.samples import adjusted


def test_a_model_with_a_guidance_input_is_told_each_weight_and_runs_once(tmp_path, make_dit):
    plain = FluxConfig(48, 1, 1, 32, 2, 32, 32, axes_dims_rope=(8, 12, 12), sample_size=(8, 8), guidance_embeds=False)
    told = replace(plain, guidance_embeds=True)
    samplers = {}
    for name, denoiser in (("told", told.build()), ("flux", plain.build()), ("dit", make_dit())):
        artifact = edit.load(edit.save(denoiser, tmp_path / name, sampler=Sampler(Euler(4), guidance=2.0)))
        samplers[name] = adjusted(artifact, 3, None)
    assert (samplers["told"].guidance, samplers["told"].told) == (1.0, 3.0)
    for name in ("flux", "dit"):
        assert (samplers[name].guidance, samplers[name].told) == (3.0, None)


def test_steps_are_not_asked_of_a_solver_with_times_of_its_own(tmp_path, make_dit):
    artifact = edit.load(edit.save(make_dit(), tmp_path / "few", sampler=Sampler(Grid((1.0, 0.5)))))
    assert adjusted(artifact, 1, None).solver == adjusted(artifact, 1, 2).solver == Grid((1.0, 0.5))
    with pytest.raises(UserError, match=r"steps=8, but this model is sampled at times of its own, Grid\("):
        adjusted(artifact, 1, 8)
