"""LESA on stored trajectories: shards train as the teacher beside the student does, and those that do not fit are
refused."""

import shutil

import pytest
import small_runs
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from small_runs import config, rows, train
from weights import randomise

import edit
from recipes.config.errors import UserError
from recipes.steps.rollout import FEATURES, Rollout

PIXART = (
    "backbone=pixart_tiny",
    "backbone.num_layers=2",
    "backbone.num_attention_heads=2",
    "backbone.cross_attention_dim=32",
    "backbone.attention_head_dim=16",
)
SAMPLER = ("sampler=ddim", "sampler.solver.steps=6", "sampler.guidance=3.0")
# predicted are 4 and 5, at the noise levels 0.26 and 0.01
STAGES = "{steps: 6, interval: 4, hidden: 8, boundaries: [0.1], windows: [3, 4]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a model of random weights, another one, and the trajectories of 8 prompts, in two shards."""
    from data.embedded import main as embed

    folder = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_runs, "SMALL", [w for w in small_runs.SMALL if not w.startswith("backbone.")])
        spec = instantiate(config(folder, *PIXART, "data=shapes", "objective=ddpm").backbone, _convert_="all")
        model = spec.build()
        model.settle((12, 8, 8), spec)
        for name, seed in (("other", 1), ("model", 0)):
            randomise(model, seed)
            edit.save(model, folder / name, data={"_target_": "data.sets.shapes.Shapes", "count": 8, "held": 4})
        assert embed([f"out={folder}/world", "count=8"]) == 0
        made(folder)
        yield folder


def made(folder, *more) -> None:
    from data.generate import main as generate

    keys = {
        "teacher": f"{folder}/model",
        "prompts": f"{folder}/world/prompts.txt",
        "out": f"{folder}/cache",
        "text_encoder": f"{folder}/world/text_encoder_2",
        "max_tokens": 16,
        "padding": "zeros",
        "solver": "ddim",
        "steps": 6,
        "guidance": 3.0,
        "seed": 7,
        "dtype": "float32",
        "device": "cpu",
        "taps": -1,
        "shard_size": 4,
    }
    assert generate([f"{k}={v}" for k, v in {**keys, **dict(w.split("=", 1) for w in more)}.items()]) == 0


def words(folder, name, truth, *more):
    """Of one stage."""
    method = (
        "{_target_: edit.caching.lesa_training.FollowHistory, interval: 4, true_history: " + f"{truth}".lower() + "}"
    )
    data = (
        "data=latents",
        f"data.set.path={folder}/cache",
        "data.set.features=true",
        "data.batch_size=4",
        "data.workers=0",
    )
    start = () if truth else (f"+edits.lesa.start={folder}/{name.removesuffix('_own')}",)
    whole = (
        f"name={name}",
        f"init={folder}/model",
        "recipe=rollout",
        f"+recipe.method={method}",
        *PIXART,
        "objective=ddpm",
        *SAMPLER,
        *data,
        f"+edits.lesa={STAGES}",
        "+edits.lesa._target_=edit.caching.lesa.LESA",
        *start,
        "optimizer.warmup=0",
        "optimizer.lr=0.01",
        "ema.decay=0.0",
        "trainer.max_steps=4",
    )
    changed = {w.split("=")[0].lstrip("+") for w in more}
    return (*(w for w in whole if w.split("=")[0].lstrip("+") not in changed), *more)


def lock_step(patch) -> None:
    """The same runs without what is stored: the teacher generates beside the student, from the same noise."""
    move = Rollout.transfer_batch_to_device

    def bare(self, batch, device, number):
        return move(self, {k: v for k, v in batch.items() if not k.startswith(FEATURES)}, device, number)

    patch.setattr(Rollout, "transfer_batch_to_device", bare)


@pytest.mark.slow
def test_both_stages_learn_from_shards_what_they_learn_beside_the_teacher(folder):
    for name, live in (("shards", False), ("beside", True)):
        with pytest.MonkeyPatch.context() as patch:
            if live:
                lock_step(patch)
            train(folder, *words(folder, name, True))
            train(folder, *words(folder, f"{name}_own", False))
    for end in ("", "_own"):
        one, two = ([float(r["train/loss"]) for r in rows(folder, f"{n}{end}")] for n in ("shards", "beside"))
        assert one == pytest.approx(two, rel=1e-4) and len(one) == 4  # batches of other sizes are summed otherwise
        one, two = (edit.load(folder / f"{n}{end}").denoiser.edits.state_dict() for n in ("shards", "beside"))
        for key, v in one.items():
            torch.testing.assert_close(v, two[key], rtol=1e-3, atol=1e-4)
    first, second = (edit.load(folder / f"shards{end}").denoiser.edits.state_dict() for end in ("", "_own"))
    assert not all(torch.equal(v, second[k]) for k, v in first.items())


def test_an_interrupted_generation_makes_the_missing_shard_alone_and_the_same(folder):
    copy = folder / "again"
    shutil.copytree(folder / "cache", copy)
    kept, lost = copy / "shard-000000.tar", copy / "shard-000001.tar"
    content, changed = lost.read_bytes(), kept.stat().st_mtime_ns
    for gone in (lost, copy / "records/000001.json", copy / "manifest.json"):  # as after a kill inside the second
        gone.unlink()
    with pytest.raises(InstantiationException) as refused:
        train(folder, *words(folder, "refused", True, f"data.set.path={copy}"))
    assert "is unfinished: give the same python -m data.generate command again" in str(refused.value.__cause__)
    made(folder, f"out={copy}")
    assert lost.read_bytes() == content and kept.stat().st_mtime_ns == changed
    assert (copy / "manifest.json").exists()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda shard: shard.unlink(), "shard-000001.tar is missing"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-512]), "bytes, the manifest says"),
        (lambda shard: shard.write_bytes(bytes(shard.stat().st_size)), "shard-000001.tar holds no samples"),
    ],
    ids=["missing", "truncated", "emptied"],
)
def test_shards_that_are_not_as_they_were_made_are_refused_in_one_sentence(folder, tmp_path, harm, said):
    shutil.copytree(folder / "cache", tmp_path / "cache")
    harm(tmp_path / "cache/shard-000001.tar")
    with pytest.raises(InstantiationException) as refused:
        train(folder, *words(folder, "refused", True, f"data.set.path={tmp_path}/cache"))
    sentence = str(refused.value.__cause__)
    assert said in sentence and "repair or remove it" in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("init={f}/other",), "stored features are of the teacher .*, and the run's is .*other, .*: run data.generate"),
        (("data.batch_size=16",), "a batch has 16 generations, and 8 are stored: run data.generate with more prompts"),
        (("sampler.guidance=2.0",), "were made at guidance 3 at all times, and the sampler guides at 2"),
    ],
)
def test_stored_generations_of_another_run_are_refused_in_one_sentence(folder, more, said):
    with pytest.raises(UserError, match=said) as refused:
        train(folder, *words(folder, "refused", True, *(w.format(f=folder) for w in more)))
    assert "\n" not in str(refused.value)
