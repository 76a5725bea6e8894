"""`recipe` chooses the procedure by its class; without it, a run does what it always did."""

import sys
import textwrap

import pytest
from small_runs import config, losses, train

import edit
from recipes.calibrate import Calibrating
from recipes.config.chosen import procedure_of
from recipes.config.errors import UserError
from recipes.diffusion import Denoising
from recipes.few_step import FewSteps

MATCHING = "matching={_target_: edit.few_step.progressive.Progressive}"


def test_without_a_recipe_a_matching_means_few_steps_and_else_diffusion_is_trained(tmp_path):
    assert procedure_of(config(tmp_path)) == Denoising() == procedure_of(config(tmp_path, "recipe=diffusion"))
    few = (MATCHING, "teacher.path=x")
    assert procedure_of(config(tmp_path, *few)) == FewSteps() == procedure_of(config(tmp_path, *few, "recipe=few_step"))
    chosen = procedure_of(config(tmp_path, "recipe=calibrate", "init=x", "edits=reuse", "recipe.samples=3"))
    assert chosen == Calibrating(batches=16, samples=3)


def test_a_run_is_the_same_whether_its_recipe_is_named(tmp_path):
    train(tmp_path, "name=plain", "trainer.max_steps=2")
    train(tmp_path, "name=named", "recipe=diffusion", "trainer.max_steps=2")
    assert losses(tmp_path, "plain") == losses(tmp_path, "named")


def test_a_run_of_a_version_without_recipes_goes_on(tmp_path):
    train(tmp_path, "name=old", "trainer.max_steps=2")
    written = tmp_path / "old/config.yaml"
    text = written.read_text()
    assert "\nrecipe: null\n" in text
    written.write_text(text.replace("\nrecipe: null\n", "\n"))
    train(tmp_path, "name=old", "trainer.max_steps=3")
    assert len(losses(tmp_path, "old")) == 3


MINE = """
    from dataclasses import dataclass
    from pathlib import Path

    from recipes.procedure import Procedure, Result, Stand


    @dataclass(frozen=True)
    class AsItIs(Procedure):
        word: str = "none"
        optimises = False

        def check(self, cfg):
            if cfg.terms:
                yield "as it is, nothing is lost: leave the terms out"

        def stand(self, cfg, out):
            return Stand(finished=(out / "artifact").is_dir())

        def perform(self, run, out, stand):
            denoiser = run.models.student.build()
            return Result(denoiser, denoiser.state_dict(), {"word": self.word})
"""


def test_a_new_procedure_is_one_file_of_a_trusted_package(tmp_path, monkeypatch):
    (tmp_path / "my_procedure.py").write_text(textwrap.dedent(MINE))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_procedure", raising=False)
    node = "recipe={_target_: my_procedure.AsItIs, word: told}"
    train(tmp_path, "name=a", node, "trusted=[my_procedure]", "trainer.max_steps=1")
    assert edit.load(tmp_path / "a").run["word"] == "told"
    terms = "+terms.a={_target_: edit.distillation.output.OutputKD}"
    with pytest.raises(UserError, match="as it is, nothing is lost"):
        config(tmp_path, node, "trusted=[my_procedure]", terms)
    with pytest.raises(UserError, match="my_procedure.AsItIs is in none of the trusted packages"):
        config(tmp_path, node)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["recipe=few_step"], "recipe trains by a few-step method, and there is none"),
        (["recipe=diffusion", MATCHING], "leave one of the two out"),
        (["recipe={_target_: recipes.list.main}"], "recipes.procedure.Procedure was expected, got recipes.list.main"),
        (["recipe={_target_: recipes.assembly.Run}"], "a recipes.procedure.Procedure was expected, got"),
        (["recipe={_target_: recipes.steps.diffusion.Diffusion}"], "a recipes.procedure.Procedure was expected, got"),
        (["recipe={_target_: recipes.procedure.Procedure}"], "recipe: .*abstract"),
        (["recipe={_target_: os.system}"], "in none of the trusted packages"),
        (["recipe={_target_: edit.caching.reuse.Reuse}"], "a recipes.procedure.Procedure was expected"),
        (["recipe={word: 1}"], "recipe: expected a section with _target_"),
        (["+edits.a={_target_: recipes.calibrate.Calibrating}"], "is in none of the trusted packages"),
        (["recipe=calibrate", "+recipe.steps=3"], "Calibrating has no argument 'steps'"),
    ],
)
def test_what_is_no_procedure_is_refused_in_one_sentence(tmp_path, words, sentence):
    with pytest.raises(UserError, match=sentence) as refused:
        config(tmp_path, *words)
    assert "\n" not in str(refused.value)
