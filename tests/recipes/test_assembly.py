"""A configuration becomes one checked run, and what does not fit is refused in the same words wherever it is found."""

import pytest
from small_runs import config

from recipes.assembly import assemble
from recipes.config.errors import UserError
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


def test_a_teacher_that_training_needs_is_stood_in_for_by_planning_alone(tmp_path):
    cfg, notes = config(tmp_path, OUTPUT, "trainer.devices=1"), []
    assert drafted(Assumptions(), cfg, notes).teacher is not None and "stands in" in notes[0]
    settle(cfg)
    with pytest.raises(UserError, match=r"terms.o compares with a teacher: give its folder with teacher.path=\.\.\."):
        assemble(cfg)
