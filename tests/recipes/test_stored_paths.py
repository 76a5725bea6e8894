"""A student that learns from stored paths: the stages of its experiment, and a run without a teacher."""

from importlib import import_module

import pytest
import small_runs
import torch
from hydra.utils import instantiate
from small_runs import config, losses, train
from weights import randomise

import edit
from edit.backbones.flux import Flux
from recipes.config.errors import UserError
from recipes.config.staged import stages_of

EXPERIMENT = "experiment=flux_tiny/endpoint_cached"
TINY = ("backbone.num_layers=1", "backbone.num_single_layers=1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder where the stages of the experiment have run: random teacher, world of 8 captions, paths of 4 steps."""
    folder = tmp_path_factory.mktemp("runs")
    short = [w for w in small_runs.SMALL if not w.startswith("backbone.")]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(small_runs, "SMALL", (*short, *TINY, "trainer.max_steps=3", "data.set.steps=4"))
        make(config(folder, EXPERIMENT), folder)
        yield folder


def make(cfg, folder):
    spec = instantiate(cfg.backbone, _convert_="all")
    teacher = spec.build()
    teacher.settle((12, 8, 8), spec)
    randomise(teacher)
    world = {"_target_": "data.sets.shapes.Shapes", "count": 8, "held": 4}
    edit.save(teacher, folder / "flux_tiny_teacher", data=world)
    first, *stages = stages_of(cfg)
    assert (first.name, first.all) == ("teacher", ["experiment=flux_tiny/teacher"])
    for module, *words in (stage.all for stage in stages):
        words = ["count=8" if w.startswith("count=") else "device=cpu" if w.startswith("device=") else w for w in words]
        for _ in range(2):  # a finished stage answers, and changes nothing
            assert import_module(module).main(words) == 0


def test_the_stages_make_what_the_run_reads_and_no_teacher_is_loaded(runs, monkeypatch):
    asked, forward = [], Flux.forward

    def watching(self, x, t, condition, *args, **kwargs):
        asked.append((self, t, condition.end))
        return forward(self, x, t, condition, *args, **kwargs)

    monkeypatch.setattr(Flux, "forward", watching)
    train(runs, EXPERIMENT)
    assert len({m for m, *_ in asked}) == 1 and asked[0][0].training  # the student
    allowed = torch.tensor([1.0, 15 / 16, 5 / 6, 5 / 8])  # quarters with shift 5
    seen = torch.cat([t for _, t, _ in asked])
    assert ((seen[:, None] - allowed).abs().min(1).values < 1e-6).all() and len(seen.unique()) == 4
    assert all(float(v) > 0 for v in losses(runs, "flux_tiny_endpoint_cached"))


def test_reflow_takes_the_same_folder(runs):
    words = ("matching._target_=edit.few_step.reflow.CachedReflow", "~matching.starts", "~matching.shift")
    train(runs, EXPERIMENT, "name=reflow", *words, "sampler.solver.renoise=false")
    assert len(losses(runs, "reflow")) == 3


def test_a_student_of_stored_paths_is_not_guided_a_second_time(runs):
    with pytest.raises(UserError, match="learns the teacher's guidance of 3, and sampler.guidance=2"):
        train(runs, EXPERIMENT, "name=twice", "sampler.guidance=2.0")


def test_stored_paths_of_another_shift_are_refused(runs):
    with pytest.raises((UserError, ValueError), match="set matching.shift to the shift they were generated with"):
        train(runs, EXPERIMENT, "name=shift", "matching.shift=1.0", "sampler.solver.shift=1.0")
