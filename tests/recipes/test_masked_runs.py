"""Runs with deferred masking: what they log, what they refuse, what a plan counts."""

import json
from dataclasses import replace

import pytest
import torch
from families import CONFIGS
from hydra import compose, initialize_config_dir
from killed_runs import kill_at
from omegaconf import OmegaConf
from small_runs import CONFIGS as FILES
from small_runs import TWO_RANKS, losses, rows, train, train_ranks
from weights import randomise

import edit
from edit.alignment.encoder import Encoder
from edit.alignment.haste import HASTE
from edit.alignment.repa import REPA
from edit.alignment.sra import SRA
from edit.alignment.token_times import TokenTimes
from edit.backbones.dit import position_table
from edit.backbones.micro_dit import MicroDiTConfig
from edit.distillation.output import OutputKD
from edit.few_step.policy import MixtureHead
from edit.moe.expert_choice import ExpertChoice
from edit.routing.dydit import DyDiT
from edit.scaling.layer_wise import LayerWiseScaling
from edit.tokens.micro_dit import DeferredMasking, PatchMixer
from edit.tuning.lora import LoRA
from recipes.config.errors import UserError
from recipes.config.schema import OptimizerConfig
from recipes.config.sources import register
from recipes.models import Files, made, models_of, refuse_unfit_start, refuse_unmasked
from recipes.plan import main
from recipes.settings import Training
from recipes.stand_ins import Sample

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


# ---- ranks, kills, compilation ---------------------------------------------------------------------------------------

EXPERTS = ("edits=[expert_choice,micro_dit]", "edits.expert_choice.experts=4", "+edits.micro_dit.experts=4")
EXPERTS += ("+edits.expert_choice.units=[0]",)
RUN = (*EXPERTS, "edits.micro_dit.depth=2", "edits.micro_dit.head=16", "backbone.patch_size=2", MASKING)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one_and_go_on_where_they_were_killed(tmp_path, strategy):
    """The kill is in the masked part of the run, and the rest goes through to the end, where all tokens are seen."""
    train(tmp_path, "name=one", *RUN)
    two = (*RUN, f"trainer={strategy}", *TWO_RANKS, "data.batch_size=8")
    train_ranks(tmp_path, "name=two", *two, world=2)
    one, other = ([float(r["train/loss"]) for r in rows(tmp_path, name)] for name in ("one", "two"))
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0, atol=5e-5)  # sums in another order
    kill_at(tmp_path, "killed", 5, *two, world=2)
    train_ranks(tmp_path, "name=killed", *two, world=2)
    assert losses(tmp_path, "killed") == losses(tmp_path, "two")
    assert [float(r["train/masking/kept"]) for r in rows(tmp_path, "killed")] == [0.25] * 9 + [1.0] * 3


@pytest.mark.slow
def test_a_killed_run_of_one_process_goes_on_bit_equal_with_the_same_masks(tmp_path):
    train_ranks(tmp_path, "name=whole", *RUN)
    kill_at(tmp_path, "killed", 6, *RUN)
    train_ranks(tmp_path, "name=killed", *RUN)
    assert losses(tmp_path, "killed") == losses(tmp_path, "whole")


@pytest.mark.slow
def test_checkpointed_and_compiled_a_run_trains_as_an_eager_one(tmp_path):
    """Tokens change in number once, before the last step, which sees all of them."""
    words, saving = (*RUN, "trainer.max_steps=4"), "trainer.gradient_checkpointing=true"
    train(tmp_path, "name=eager", *words)
    train(tmp_path, "name=again", *words, saving)
    assert losses(tmp_path, "again") == losses(tmp_path, "eager")
    train(tmp_path, "name=compiled", *words, saving, "trainer.compile=true")
    pairs = zip(losses(tmp_path, "eager"), losses(tmp_path, "compiled"), strict=True)
    assert all(float(a) == pytest.approx(float(b), rel=1e-4) for a, b in pairs)


# ---- another resolution ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_pictures(tmp_path_factory):
    """An artifact of a MicroDiT with all of its edits, that has been trained on a grid of 4 x 4 tokens."""
    torch.manual_seed(0)
    denoiser = MicroDiTConfig(8, 12, 2, 32, 2, 16, 64, multiple=32).build()
    experts = ExpertChoice(experts=2, multiple=32, units=(1,))
    mixer = PatchMixer(2, 16, 16, multiple=32, experts=2)
    edit.apply(denoiser, {"widths": LayerWiseScaling(multiple=16, hidden_multiple=32), "experts": experts, "it": mixer})
    randomise(denoiser)
    return edit.save(denoiser, tmp_path_factory.mktemp("small") / "a")


class Undrawn(Files):
    """With data of which shapes alone are there: to draw shapes and captions takes seconds."""

    def data(self, spec, start):
        return Sample((12, spec.input_size, spec.input_size), start.structure(), 5)


def from_small(path, *words: str):
    register()
    small = ["backbone.width=32", "backbone.depth=2", "backbone.multiple=32", "backbone.mlp_ratio=4", "edits=none"]
    with initialize_config_dir(version_base="1.3", config_dir=str(FILES)):
        cfg = compose("train", ["experiment=micro_dit_tiny/teacher", *small, f"init={path}", *words])
    return models_of(cfg, Undrawn(cfg))


@torch.no_grad()
def test_a_run_at_twice_the_size_takes_all_weights_and_makes_positions_anew(small_pictures):
    small = edit.load(small_pictures).denoiser
    models = from_small(small_pictures, "backbone.input_size=16", "backbone.pos_interp_scale=2")
    large = models.student.build()
    ours, theirs = dict(large.named_parameters()), dict(small.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(p, theirs[name]) for name, p in ours.items())
    assert list(large.applied) == ["widths", "experts", "it"] and models.skeleton.sample_shape == (12, 16, 16)
    half = position_table(32, 8, 2.0)[None]  # of the specification: the grid divided by 2
    assert torch.equal(large.model.pos_embed, half)
    assert torch.equal(half.view(8, 8, 32)[::2, ::2], small.model.pos_embed.view(4, 4, 32))
    kept = torch.arange(16).expand(2, -1)
    told = replace(large.example(2, 5), kept=kept)
    assert large(torch.randn(2, 12, 16, 16), torch.rand(2), told).sample.shape == (2, 12, 16, 16)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["backbone.pos_interp_scale=2.0"], "holds a micro_dit with pos_interp_scale=1.0, the backbone group says 2.0"),
        (["backbone.input_size=16", "backbone.patch_size=4"], "with patch_size=2, the backbone group says 4: choose"),
        (
            ["backbone.input_size=16", "+terms.o={_target_: edit.distillation.output.OutputKD}", "teacher.path=PATH"],
            "takes samples of 12x8x8, the data has 12x16x16: choose a teacher",
        ),
    ],
)
def test_other_differences_and_teachers_of_another_size_are_refused(small_pictures, words, sentence):
    with pytest.raises(UserError, match=sentence):
        from_small(small_pictures, *(word.replace("PATH", str(small_pictures)) for word in words))


def test_the_published_run_at_512_px_masks_50_000_steps_and_5_000_see_all():
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(FILES)):
        cfg = compose("train", ["experiment=micro_dit_xl_2/micro_dit_512"])
    term, steps = made(cfg.terms)["masking"], cfg.trainer.max_steps
    assert sum(k / steps < term.drops_until for k in range(steps)) == 50_000 == steps - 5_000
    assert (cfg.objective.time.mean, cfg.objective.time.std, cfg.trainer.clip) == (0, 0.6, 0.5)
    assert (cfg.backbone.input_size, cfg.backbone.pos_interp_scale, cfg.edits) == (64, 2, {})
    rates = Training(cfg.optimizer, steps)
    assert rates.rate(499) == rates.rate(steps - 1) == 1 and cfg.optimizer.lr == 8e-5
    assert cfg.data.batch_size * cfg.trainer.devices * cfg.trainer.accumulate == 2048


def test_a_family_that_keeps_the_positions_of_one_size_is_refused_at_another():
    """As one that learned them would be: no hook of its own, so another configuration is another structure."""
    spec = CONFIGS["dit_diffusers geglu"]
    with torch.device("meta"):
        denoiser = spec.build()
    denoiser.resize(large := replace(spec, sample_size=16))
    with pytest.raises(UserError, match="init=a holds a dit_diffusers with sample_size=8, the backbone group says 16"):
        refuse_unfit_start(OmegaConf.create({"init": "a"}), denoiser, large, (4, 16, 16))
