"""Runs with deferred masking: what they log, what they refuse, what a plan counts."""

import json
from dataclasses import replace

import pytest
import torch
from families import CONFIGS
from small_runs import rows, train

import edit
from edit.alignment.encoder import Encoder
from edit.alignment.haste import HASTE
from edit.alignment.repa import REPA
from edit.alignment.sra import SRA
from edit.alignment.token_times import TokenTimes
from edit.distillation.output import OutputKD
from edit.few_step.policy import MixtureHead
from edit.routing.dydit import DyDiT
from edit.tokens.micro_dit import DeferredMasking, PatchMixer
from edit.tuning.lora import LoRA
from recipes.config.errors import UserError
from recipes.config.schema import OptimizerConfig
from recipes.models import refuse_unmasked
from recipes.plan import main
from recipes.settings import Training

WORDS = ("edits=micro_dit", "edits.micro_dit.depth=1", "edits.micro_dit.head=16", "backbone.patch_size=2")
MASKING = "+terms.masking={_target_: edit.tokens.micro_dit.DeferredMasking, unmasked: 0.25}"


def test_a_run_drops_tokens_until_its_last_part_and_says_so(tmp_path):
    train(tmp_path, "name=masked", *WORDS, MASKING)
    assert [float(r["train/masking/kept"]) for r in rows(tmp_path, "masked")] == [0.25] * 9 + [1.0] * 3


def test_the_rate_of_the_unmasked_phase_is_the_last_of_a_cosine_that_ended_before():
    settings = OptimizerConfig(lr=2.4e-4, warmup=10, schedule="cosine", end=1 / 3, until=0.5)
    rates = [Training(settings, 280).rate(step) for step in range(280)]
    assert rates[9] == 1 and rates[139] > rates[140] == pytest.approx(1 / 3) and set(rates[140:]) == {rates[140]}
    whole = Training(replace(settings, until=1.0), 140)
    assert rates[:140] == [whole.rate(step) for step in range(140)]


def student(**edits):
    with torch.device("meta"):
        return edit.apply(CONFIGS["dit"].build(), edits, fresh=False)


EYE = Encoder("eye")
NEEDY = {
    "terms.other .SRA.": SRA((0, 1)),
    "terms.other .HASTE.": HASTE(REPA(EYE, 1), ((0, 1),)),
    "terms.other .REPA.": REPA(EYE, 1, projector="conv"),
    "terms.other .OutputKD.": OutputKD(),
}


@pytest.mark.parametrize("who", NEEDY)
def test_a_term_that_needs_all_tokens_is_refused(who):
    terms = {"masking": DeferredMasking(), "other": NEEDY[who]}
    with pytest.raises(UserError, match=f"{who} needs all tokens .* terms.masking drops .*: leave one of the two out"):
        refuse_unmasked(student(), terms)
    refuse_unmasked(student(), {"masking": DeferredMasking(0), "other": NEEDY[who]})


@pytest.mark.parametrize("new", [TokenTimes(), DyDiT(), MixtureHead()], ids=lambda e: type(e).__name__)
def test_an_edit_that_needs_all_tokens_is_refused(new):
    with pytest.raises(UserError, match=f"edits.it .{type(new).__name__}. needs all tokens"):
        refuse_unmasked(student(it=new), {"masking": DeferredMasking()})
    refuse_unmasked(student(it=new), {})


def test_what_works_on_any_tokens_is_not_refused():
    refuse_unmasked(student(lora=LoRA(), mixer=PatchMixer()), {"masking": DeferredMasking(), "repa": REPA(EYE, 1)})
    with pytest.raises(UserError, match="terms.a and terms.b both drop tokens: leave one of the two out"):
        refuse_unmasked(student(), {"a": DeferredMasking(), "b": DeferredMasking(0.5)})


def planned(capsys, *words: str) -> dict:
    assert main(["backbone.depth=2", "data.batch_size=8", *WORDS, "trainer.max_steps=40", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_counts_the_work_of_kept_tokens(capsys):
    plain, masked = planned(capsys), planned(capsys, MASKING)
    share = masked["calls"]["student"]["weights"]
    assert plain["calls"]["student"]["weights"] == 1 and masked["macs"] == plain["macs"]
    assert 0.25 + 0.75 * 0.3 < share < 0.25 + 0.75 * 0.7  # a mixer of all tokens, then a quarter of them


def test_a_ratio_of_one_is_refused_before_anything_is_built(tmp_path):
    with pytest.raises(UserError, match=r"terms.masking.ratio: expected float at least 0 and below 1, got 1"):
        train(tmp_path, "name=a", *WORDS, MASKING.replace("unmasked: 0.25", "ratio: 1"))


def test_few_steps_take_no_masking(tmp_path):
    method = "matching={_target_: edit.few_step.progressive.Progressive}"
    with pytest.raises(UserError, match=r"matching and terms are two ways to train: leave out terms.masking"):
        train(tmp_path, "name=a", *WORDS, MASKING, method)
