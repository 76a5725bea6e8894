"""Runs whose method looks at decoded images: where decoder and vision model come from, and where they do not go."""

import json
from dataclasses import replace

import dino
import pytest
import torch
from small_runs import config, losses, train

from edit.measuring.turns import calls_of
from recipes.config.errors import UserError
from recipes.plan import Assumptions, drafted
from recipes.runtime.checkpoint_files import newest

GRID = ("sampler=grid", "sampler.solver.renoise=true", "label_drop=0.0", "optimizer.schedule=constant")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sight")
    dino.write(folder / "dino")
    train(folder, "name=t", "trainer.max_steps=1")
    return folder


def student(folder, name, matching, *more, path="dino"):
    eye = f"{{_target_: edit.few_step.vision.Vision, path: {folder}/{path}, layers: [1, 3], hidden: 8}}"
    method = f"matching={{_target_: edit.distillation.{matching}, vision: {eye}}}"
    return (
        f"name={name}",
        f"init={folder}/t",
        f"teacher.path={folder}/t",
        "teacher.guidance=2.0",
        method,
        *GRID,
        *more,
    )


def test_a_run_saves_its_heads_but_neither_decoder_nor_vision_model_and_goes_on_after_a_stop(folder):
    train(folder, *student(folder, "whole", "add.ADD", "trainer.max_steps=4"))
    train(folder, *student(folder, "parts", "add.ADD", "trainer.max_steps=2"))
    names = torch.load(newest(folder / "parts/checkpoints"), weights_only=True)["state_dict"]
    assert {n.split(".")[0] for n in names} == {"denoiser", "ema", "own", "skipped"}
    assert not any("embeddings" in n for n in names)
    train(folder, *student(folder, "parts", "add.ADD", "trainer.max_steps=4"))
    assert losses(folder, "whole") == losses(folder, "parts")
    told = json.loads((folder / "whole/artifact/edits.json").read_text())["run"]["matching"]["vision"]
    assert told["path"] == f"{folder}/dino" and told["layers"] == [1, 3]


def test_distribution_matching_trains_with_it_beside_its_critic(folder):
    words = student(folder, "dm", "distribution_matching.DistributionMatching", "trainer.max_steps=2")
    train(folder, *words, "+matching.every=2", "critic.follow=0.03")
    assert all(float(v) for v in losses(folder, "dm"))


def test_what_cannot_be_looked_at_is_refused_before_anything_is_built(folder):
    with pytest.raises(UserError, match="matching looks with a frozen model: no vision model .*nowhere"):
        train(folder, *student(folder, "gone", "add.ADD", path="nowhere"))
    with pytest.raises(UserError, match="matching .* vision.crop=9 is more than the 8 x 8 of a sample"):
        train(folder, *student(folder, "large", "add.ADD", "+matching.vision.crop=9"))
    assert not (folder / "gone").exists() and not (folder / "large").exists()


def test_the_embedded_world_brings_its_decoder(tmp_path):
    from hydra.utils import instantiate

    from recipes.assembly import make_sight

    path = dino.write(tmp_path / "dino")
    layers = ("matching.vision.layers=[1,3]", "data.set.count=4", "data.set.held=2", "before=[]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("small_runs.SMALL", ())
        cfg = config(tmp_path, "experiment=flux_tiny/add", f"matching.vision.path={path}", *layers)
    data = instantiate(cfg.data.set)
    sight = make_sight(data, {"matching": instantiate(cfg.matching, _convert_="all")})
    (eye,) = sight.models.values()
    seen = eye(sight.decoder(data.train().sample(0, 0)["x"][None]))
    assert {k: tuple(v.shape) for k, v in seen.items()} == {"unit.1": (1, 16, 16), "unit.3": (1, 16, 16)}


def test_the_plan_counts_what_it_looks_with(folder):
    notes: list[str] = []
    draft = drafted(Assumptions(), config(folder, *student(folder, "plan", "add.ADD"), "trainer.devices=1"), notes)
    assert notes == []
    calls = calls_of(draft.kinds)
    assert calls["student"] == {"weights": 0.5, "nothing": 0.5}
    assert calls["teacher"] == {"nothing": 1.0}  # guided: twice, on the student's turns
    assert calls["vision of 1x8x8"] == {"input": 0.5, "nothing": 1.0}  # a fake; and a real and a fake, for the heads
    assert calls["decoder of 1x8x8"] == {"input": 0.5, "nothing": 1.0}  # digits are their own pixels
    vision = dino.Dinov2Model.from_pretrained(folder / "dino")
    count = sum(p.numel() for p in vision.parameters())
    assert draft.plan().weights - replace(draft, frozen=0).plan().weights == 4 * count
    kinds = tuple(replace(t, calls=tuple(c for c in t.calls if c.look is None)) for t in draft.kinds)
    draft = replace(draft, peak=1e12)
    blind = replace(draft, turns=kinds)
    assert draft.plan().activations > blind.plan().activations
    macs = {c.look.macs() for t in draft.kinds for c in t.calls if c.role.startswith("vision")}
    # of a fake forward and backward to it on half of the turns, and a real and a fake forward on the others
    flops = 2 * (0.5 * 2 + 1.0) * macs.pop() * draft.batch * draft.accumulate
    assert not macs and draft.seconds() - blind.seconds() == pytest.approx(flops / (draft.peak * draft.mfu))


def test_a_decoder_that_is_not_here_is_told_and_not_counted(folder):
    notes: list[str] = []
    words = (*student(folder, "plan", "add.ADD"), "trainer.devices=1")
    draft = drafted(Assumptions(image="8"), config(folder, *words), notes)
    assert "the decoder is not here" in notes[-1]
    assert set(calls_of(draft.kinds)) == {"student", "teacher", "vision of 3x8x8"}
