"""A configuration becomes one checked run, and what does not fit is refused in the same words wherever it is found."""

import re

import pytest
from hydra import compose, initialize_config_dir
from small_runs import CONFIGS, config

from recipes.assembly import assemble
from recipes.config.errors import UserError
from recipes.config.sources import register
from recipes.models import cures
from recipes.plan import Assumptions, drafted
from recipes.training import settle

LADD = "matching={_target_: edit.few_step.ladd.LADD, teacher_taps: [0], hidden: 8}"
OUTPUT = "+terms.o={_target_: edit.distillation.output.OutputKD}"


def test_a_run_holds_what_its_configuration_names_and_builds_no_weights(tmp_path):
    cfg = config(tmp_path, "edits=lora", "edits.lora.rank=2", "seed=3")
    settle(cfg)
    run = assemble(cfg)
    assert all(p.is_meta for p in run.models.skeleton.parameters())
    assert list(run.models.skeleton.applied) == ["lora"] and run.models.data.shape == (1, 8, 8)
    assert (run.models.terms, run.models.matching, run.models.teacher, run.models.critic) == ({}, None, None, None)
    assert (
        run.training.seed == 3 and run.training.max_steps == 12 and not run.sight.models and run.sight.decoder is None
    )
    built, again = run.models.student.build(), run.models.student.build()
    state = again.state_dict()
    assert all(v.equal(state[k]) for k, v in built.state_dict().items())  # its seed decides the weights


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("backbone.input_size=12",), "the data has samples of 1x8x8, the backbone takes 1x12x12: set backbone.input"),
        (("backbone.num_classes=5",), "the data has 10 classes, the backbone 5: build it for as many"),
        ((LADD, "edits=lora", "teacher.placement=tied"), "LADD looks at the teacher's tokens, whose weights must stay"),
    ],
)
def test_training_and_planning_refuse_in_the_same_words(tmp_path, words, sentence):
    cfg = config(tmp_path, *words, "sampler=grid", "sampler.solver.renoise=true", "trainer.devices=1")
    with pytest.raises(UserError, match=sentence) as planned:
        drafted(Assumptions(), cfg, [])
    settle(cfg)
    with pytest.raises(UserError, match=sentence) as refused:
        assemble(cfg)
    assert str(planned.value) == str(refused.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("backbone=sit", "size=S/2"),
            "takes 4x32x32: set backbone.in_channels=1 backbone.input_size=8, choose another backbone= and size=",
        ),
        (("backbone=dit_pixel_32", "backbone.in_channels=1"), "takes 1x32x32: set backbone.input_size=8, choose"),
        (
            ("backbone=flux", "size=tiny", "data=shapes", "backbone.in_channels=192"),
            "takes 48x8x8: set backbone.in_channels=48, choose",
        ),
    ],
)
def test_samples_that_do_not_fit_are_refused_with_the_keys_that_make_them_fit(words, sentence):
    """What the sentence says to set does fit."""
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        cfg = compose("train", [*words, "trainer.devices=1"])
    with pytest.raises(UserError, match=re.escape(sentence)) as refused:
        settle(cfg)
        assemble(cfg)
    told = re.search(r": set (.*?), choose", str(refused.value))[1].split()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        cfg = compose("train", [*words, *told])
    settle(cfg)
    assert assemble(cfg).models.skeleton.accepts(assemble(cfg).models.data.shape)


def test_data_that_are_made_in_any_size_name_theirs(tmp_path):
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        cfg = compose(
            "train", ["backbone=sd3_tiny", "data=shapes", "data.set.size=64", "backbone.pos_embed_max_size=4"]
        )
    assert list(cures(cfg, (12, 8, 8), (12, 16, 16))) == ["set data.set.size=32"]
    cfg.init = "runs/a"
    assert list(cures(cfg, (12, 8, 8), (3, 16, 16))) == ["choose data that init=runs/a was made for"]


def test_a_teacher_that_training_needs_is_stood_in_for_by_planning_alone(tmp_path):
    cfg, notes = config(tmp_path, OUTPUT, "trainer.devices=1"), []
    assert drafted(Assumptions(), cfg, notes).teacher is not None and "stands in" in notes[0]
    settle(cfg)
    with pytest.raises(UserError, match=r"terms.o compares with a teacher: give its folder with teacher.path=\.\.\."):
        assemble(cfg)
