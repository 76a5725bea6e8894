"""Three lines put a cache into a stock pipeline, and one takes it out again."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from caches import family
from pipelines import painted, pipeline, relative, sampled, stock

import edit
from edit.backbones.attached import attached
from edit.caching.first_block_cache import FirstBlockCache
from edit.caching.reuse import Reuse
from edit.caching.taylorseer import TaylorSeer

README = (Path(edit.__file__).parents[1] / "README.md").read_text()
FAMILIES = ["flux", "sd3", "pixart", "qwen_image", "wan"]
CACHES = {"reuse": Reuse(3), "taylorseer": TaylorSeer(3, 1, first=2, site="last"), "first": FirstBlockCache(9.0)}
FEW = [*((n, "reuse") for n in FAMILIES), ("flux", "first"), ("sd3", "taylorseer")]  # each of both once
PAIRS = [p if p in FEW else pytest.param(*p, marks=pytest.mark.slow) for p in product(FAMILIES, CACHES)]
CLOSE = 2e-5  # of the largest value: 8 guided steps in fp32, whose times the pipelines keep x 1000


class Telling(diffusers.FluxPipeline):
    """Reads text without a text encoder."""

    def encode_prompt(self, prompt, *args, **kwargs):
        words = torch.tensor([ord(c) for c in (prompt if isinstance(prompt, str) else prompt[0])]).float()
        text = torch.outer(words, torch.linspace(-0.01, 0.01, 24))[None]
        return text, text.mean(1)[:, :20], torch.zeros(text.shape[1], 3)


def test_the_lines_of_the_readme_put_a_cache_into_a_stock_pipeline():
    (lines,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "edit.attach(" in b]
    assert len([line for line in lines.splitlines() if line and "import" not in line]) == 3
    pipe = pipeline("flux", Telling)
    pipe.default_sample_size = 16
    runs: dict[str, Any] = {"pipe": pipe}
    torch.manual_seed(0)
    exec(lines, runs)
    assert isinstance(runs["denoiser"].applied["cache"], TaylorSeer)
    edit.detach(pipe)
    torch.manual_seed(0)
    dense = pipe("a cat").images[0]
    change = torch.tensor(np.array(runs["image"])).float() - torch.tensor(np.array(dense))
    assert 0.1 < change.abs().max() < 255


@pytest.mark.parametrize("name, cache", PAIRS)
def test_the_pipeline_paints_what_our_sampler_paints_with_the_same_cache_again_and_again(name, cache):
    pipe = pipeline(name)
    plain = painted(pipe, name)
    denoiser = edit.attach(pipe)
    edit.apply(denoiser, {"cache": replace(CACHES[cache])})
    wanted = sampled(edit.apply(family(name), {"cache": replace(CACHES[cache])}), name)
    first = painted(pipe, name)
    assert relative(first, wanted) < CLOSE < 1e-3 < relative(first, plain)
    painted(pipe, name, num_inference_steps=3)  # a generation of another length leaves nothing behind
    assert torch.equal(painted(pipe, name), first)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_that_predicts_nothing_changes_no_bit_and_removal_brings_back_the_pipelines_own(name):
    pipe = pipeline(name)
    own, before = pipe.transformer, painted(pipe, name)
    forwards = {n: m.forward for n, m in own.named_modules()}  # bound anew at each look: compared by equality
    held = {n: set(vars(m)) for n, m in own.named_modules()}  # with what diffusers has left there
    denoiser = edit.attach(pipe)
    ours = painted(pipe, name)
    assert relative(ours, before) < 1e-6, "our blocks add in another order"
    edit.apply(denoiser, {"cache": TaylorSeer(1)})
    assert torch.equal(painted(pipe, name), ours)
    model = pipe.transformer
    assert model is denoiser.model and model is not own
    assert all(p is q for p, q in zip(model.parameters(), own.parameters(), strict=True)), "no second copy of weights"
    edit.detach(pipe)
    assert pipe.transformer is own and {n: m.forward for n, m in own.named_modules()} == forwards
    assert {n: set(vars(m)) for n, m in own.named_modules()} == held
    assert "forward" not in vars(model) and "cache_context" not in vars(model)
    assert torch.equal(painted(pipe, name), before)


def test_two_pipelines_in_turns_do_not_disturb_one_another():
    pipes = {name: pipeline(name) for name in ("flux", "sd3", "wan")}
    for pipe in pipes.values():
        edit.apply(edit.attach(pipe), {"cache": replace(CACHES["taylorseer"])})
    twin = pipeline("flux")  # another cache on the very same transformer
    twin.transformer = edit.backbones.flux.Flux.of(stock("flux")).model
    edit.apply(edit.attach(twin), {"cache": Reuse(2)})
    alone = {name: painted(pipe, name) for name, pipe in pipes.items()} | {"twin": painted(twin, "flux")}
    found: dict[str, Any] = {}

    def inner(pipe, i, t, kept):
        if i == 3:
            found["wan"] = painted(pipes["wan"], "wan")
            found["twin"] = painted(twin, "flux")
        return kept

    def outer(pipe, i, t, kept):
        if i == 4:
            found["sd3"] = painted(pipes["sd3"], "sd3", callback_on_step_end=inner)
        return kept

    found["flux"] = painted(pipes["flux"], "flux", callback_on_step_end=outer)
    assert found.keys() == alone.keys() and all(torch.equal(found[name], alone[name]) for name in alone)


def test_what_cannot_be_attached_or_detached_is_told_in_one_sentence():
    pipe = pipeline("flux")
    with pytest.raises(ValueError, match="no denoiser is attached to this FluxPipeline"):
        edit.detach(pipe)
    denoiser = edit.attach(pipe)
    with pytest.raises(ValueError, match="has a denoiser attached already"):
        edit.attach(pipe)
    with pytest.raises(ValueError, match="is attached to a pipeline already"), attached(pipeline("flux"), denoiser):
        pass
    edit.detach(pipe)
    with attached(pipe, denoiser), pytest.raises(ValueError, match="has a denoiser attached already"):
        edit.attach(pipe)
    edit.attach(pipe)  # again, after all of that
    wan = pipeline("wan")
    wan.register_modules(transformer_2=stock("wan"))
    with pytest.raises(ValueError, match="has two transformers.*second=low"):
        edit.attach(wan)
    pipe = pipeline("flux")
    pipe.transformer = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="has a Linear as its transformer, and known here are DiT"):
        edit.attach(pipe)
    pipe.transformer = None
    with pytest.raises(ValueError, match="has a NoneType as its transformer"):
        edit.attach(pipe)
