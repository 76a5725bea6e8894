"""LESA from the command: a predictor is trained in two stages, and what it leaves samples by a table."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from killed_runs import kill_at
from small_runs import CONFIGS, TWO_RANKS, losses, train, train_ranks
from weights import randomise

import edit
from edit.backbones.dit import DiTConfig
from edit.caching.lesa import LESA, BakedLESA
from edit.sampling import Sampler
from edit.solvers import Euler
from edit.stream import Condition
from recipes.config.check import check
from recipes.config.errors import UserError
from recipes.config.sources import register
from recipes.models import made

SHORT = (
    "before=[]",
    "sampler.solver.steps=8",
    "edits.lesa.interval=3",  # predicted are 4, 6 and 7, one in each stage
    "edits.lesa.boundaries=[0.4,0.2]",
    "+edits.lesa.hidden=8",
    "data.batch_size=4",
)


def words(folder, stage, name, *more):
    keys = (*SHORT, f"world.path={folder}/model", "trainer.max_steps=3")
    changed = {w.split("=")[0] for w in more}
    return (
        f"experiment=dit_digits/{stage}",
        f"name={name}",
        *(w for w in keys if w.split("=")[0] not in changed),
        *more,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a model of random weights and both stages of a predictor."""
    folder = tmp_path_factory.mktemp("lesa")
    model = DiTConfig(8, 1, 4, 32, 2, 2, num_classes=10, learn_sigma=False, time="flow", frequency_shift=1).build()
    for name, seed in (("other", 1), ("model", 0)):
        randomise(model, seed)
        edit.save(model, folder / name, sampler=Sampler(Euler(4)))
    train(folder, *words(folder, "lesa_truth", "it_truth"))
    train(folder, *words(folder, "lesa", "it", "trainer.max_steps=2"))
    train(folder, *words(folder, "lesa_truth", "shifted_truth", "+sampler.solver.shift=1.2"))
    return folder


def test_the_first_stage_leaves_the_network_and_the_second_a_table(folder):
    first, second = (edit.load(folder / name).denoiser for name in ("it_truth", "it"))
    assert type(first.applied["lesa"]) is LESA and type(second.applied["lesa"]) is BakedLESA
    assert first.edits["lesa"].sets[1][2].network[0].base.shape == (8, 9)
    assert {k for k in second.state_dict() if k.startswith("edits")} == {
        f"edits.lesa.{k}" for k in ("mix", "bias", "table")
    }
    model = edit.load(folder / "model").denoiser.state_dict()
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in model.items())
    assert all(float(v) > 0 for name in ("it_truth", "it") for v in losses(folder, name))


def test_the_second_stage_begins_where_the_first_ended(folder):
    """The stage that none of its two updates lies in is the first's, unchanged."""
    first = edit.load(folder / "it_truth").denoiser.edits["lesa"]
    mix = edit.load(folder / "it").denoiser.edits["lesa"].mix
    for c in (0, 1):
        assert torch.equal(mix[c, 2], first.sets[c][2].mix.weight[0])
        assert not torch.equal(mix[c, 0, -4:], first.sets[c][0].mix.weight[0])


def test_the_artifact_samples_with_its_own_sampler_and_refuses_others(folder):
    artifact = edit.load(folder / "it")
    seen = []
    given = artifact.denoiser, artifact.objective, Condition(label=torch.arange(2)), torch.arange(2)
    x = artifact.sampler(
        *given, watch=lambda step, out: seen.append(artifact.denoiser.applied["lesa"].decisions(out.trace))
    )
    assert x.isfinite().all() and [bool(d["executed"].all()) for d in seen] == [s in (0, 1, 2, 3, 5) for s in range(8)]
    for other, said in (
        (Sampler(Euler(10)), "is of generations of 8 evaluations, and this sampler has 10: sample in as many"),
        (Sampler(Euler(8, 2.0)), "choose the same solver and shift, or train another"),
    ):
        with pytest.raises(ValueError, match=said):
            other(*given)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("edits.lesa.start={f}/it",), "has a table under this name: give the run of its first stage"),
        (("edits.lesa.start={f}/model",), "has none under this name: give the run of its first stage"),
        (("edits.lesa.start={f}/it_truth", "edits.lesa.interval=4"), "has interval=3, and this one 4: train both"),
        (("edits.lesa.start={f}/absent",), "there is no such folder"),
        (("recipe.method.interval=5",), "interval is 5, and that of the edit lesa is 3: give one number"),
        (("sampler.guidance=1.0",), "has weights for uncond, which guidance 1 does not train"),
        (("sampler.solver.steps=4", "edits.lesa.interval=1"), "trains none of 4 evaluations: sample in more steps"),
        (("sampler.solver.steps=6", "edits.lesa.start=null"), "of the 6 evaluations none is predicted in stage 0 of 3"),
        (
            ("init={f}/other", "edits.lesa.start={f}/it_truth"),
            "was trained for another model, as its .* tells: train both stages for the same init",
        ),
        (
            ("edits.lesa.start={f}/shifted_truth",),
            "was trained with Euler.steps=8, shift=1.2., and this one is for Euler",
        ),
        (
            ("edits.lesa.site=velocity", "recipe.method.site=velocity", "edits.lesa.start={f}/it_truth"),
            "has site=last_hidden, and this one velocity: train both stages alike",
        ),
        (("edits.lesa.steps=9",), "steps is 9, and schedule has 8 evaluations: give one number"),
    ],
)
def test_parts_that_do_not_fit_are_refused_in_one_sentence(folder, more, said):
    with pytest.raises((UserError, ValueError, FileNotFoundError, InstantiationException), match=said):
        train(folder, *words(folder, "lesa", "refused", *(w.format(f=folder) for w in more)))


# ---- ranks and stops -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_second_stage_on_two_ranks_is_that_of_one_process(folder, strategy):
    """Gradients are of all ranks, and so are norms that are clipped; the artifact is written once."""
    two = (f"trainer={strategy}", *TWO_RANKS[:3], "trainer.gradient_checkpointing=false", "data.batch_size=2")
    start = f"edits.lesa.start={folder}/it_truth"
    train_ranks(folder, *words(folder, "lesa", f"two_{strategy}", start, "trainer.max_steps=6", *two), world=2)
    if not (folder / "whole").exists():
        train(folder, *words(folder, "lesa", "whole", start, "trainer.max_steps=6"))
    one, two = ([float(v) for v in losses(folder, name)] for name in ("whole", f"two_{strategy}"))
    assert one == pytest.approx(two, rel=1e-4) and len(one) == 6  # samples of a batch are summed in another order
    one, two = (edit.load(folder / name).denoiser.edits.state_dict() for name in ("whole", f"two_{strategy}"))
    for key, v in one.items():
        torch.testing.assert_close(two[key], v, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_killed_second_stage_goes_on_bit_equal(folder):
    """Killed after step 6, from the checkpoint of step 4, inside the second generation: three updates in each."""
    more = (f"edits.lesa.start={folder}/it_truth", "trainer.max_steps=12", "checkpoint.every=4")
    train_ranks(folder, *words(folder, "lesa", "unbroken", *more))
    told = words(folder, "lesa", "killed", *more)
    kill_at(folder, "killed", 6, *(w for w in told if not w.startswith("name=")))
    train_ranks(folder, *told)
    assert losses(folder, "killed") == losses(folder, "unbroken") and len(losses(folder, "killed")) == 12
    one, two = (edit.load(folder / name).denoiser.edits.state_dict() for name in ("killed", "unbroken"))
    assert all(torch.equal(v, two[key]) for key, v in one.items())


@pytest.mark.parametrize(
    "world", ["dit_digits", "dit_pixels", "flux_tiny", "flux_wide", "pixart_tiny", "qwen_image_tiny", "sd3_tiny"]
)
def test_both_stages_are_of_the_worlds_sampler(world):
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        cfg = compose("train", [f"experiment={world}/lesa"])
    assert check(cfg) == []
    (lesa,), sampler = made(cfg.edits).values(), made(cfg.sampler)
    objective = made(cfg.objective)
    assert lesa.schedule.times == sampler.solver.times_of(objective, ()) and lesa.steps == 50
    assert {lesa.stage(v) for s, v in enumerate(lesa.schedule.levels[:-1]) if not lesa.computed(s)} == {0, 1, 2}
    assert cfg.before[1]["truth"][0] == f"experiment={world}/lesa_truth"
