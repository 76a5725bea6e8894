"""The recipe: equal losses however the work is divided, what a run leaves, and what stops it."""

import json
import math
import shlex
from dataclasses import dataclass

import pytest
import torch
from ranks import run_ranks
from small_runs import TWO_RANKS, losses, rows, train, train_ranks

import edit
from edit.denoiser import Edit
from edit.losses import Term
from edit.stream import Condition
from recipes.config.errors import UserError
from recipes.runtime.checkpoint_files import newest


def close(a, b, tolerance):
    return max(abs(float(x) - float(y)) for x, y in zip(a, b, strict=True)) < tolerance


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one_process_at_the_same_global_batch(tmp_path, strategy):
    train(tmp_path, "name=one", "data.batch_size=16")
    train_ranks(tmp_path, f"name={strategy}", f"trainer={strategy}", *TWO_RANKS, "data.batch_size=8", world=2)
    # the same samples, times and noise; only the order of fp32 sums differs, which AdamW can amplify a little
    assert close(losses(tmp_path, "one"), losses(tmp_path, strategy), 2e-5)
    assert close(*([r["grad_norm"] for r in rows(tmp_path, n)] for n in ("one", strategy)), 2e-4)
    one, two = (edit.load(tmp_path / n).denoiser.state_dict() for n in ("one", strategy))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=2e-3)  # lr: one AdamW step of noise-level gradients


def test_accumulation_is_the_larger_batch(tmp_path):
    train(tmp_path, "name=large", "data.batch_size=16")
    train(tmp_path, "name=small", "data.batch_size=4", "trainer.accumulate=4")
    assert close(losses(tmp_path, "large"), losses(tmp_path, "small"), 2e-5)


def test_gradient_checkpointing_changes_memory_not_losses(tmp_path):
    train(tmp_path, "name=plain")
    train(tmp_path, "name=recomputed", "trainer.gradient_checkpointing=true")
    assert losses(tmp_path, "plain") == losses(tmp_path, "recomputed")


def test_bf16_trains_near_fp32(tmp_path):
    train(tmp_path, "name=full")
    train(tmp_path, "name=half", "trainer.precision=bf16-mixed")
    assert losses(tmp_path, "full") != losses(tmp_path, "half")
    assert close(losses(tmp_path, "full"), losses(tmp_path, "half"), 0.05)  # bf16 carries 8 bits


def test_the_schedule_warms_up_and_follows_the_cosine_to_zero(tmp_path):
    train(tmp_path, "name=a", "optimizer.warmup=4", "optimizer.lr=0.01")
    rates = [float(r["lr"]) for r in rows(tmp_path, "a")]  # those that the 12 steps were taken with
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    expected = [0.005 * (1 + math.cos(math.pi * (k - 4) / 8)) for k in range(4, 12)]
    assert rates[4:] == pytest.approx(expected, abs=1e-9)


def test_the_logged_rate_is_that_of_the_steps_own_update(tmp_path, monkeypatch):
    taken, step = [], torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        taken.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    words = ("name=a", "optimizer.warmup=3", "optimizer.lr=0.01", "trainer.accumulate=2", "checkpoint.every=2")
    train(tmp_path, *words, "trainer.max_steps=4")
    train(tmp_path, *words, "trainer.max_steps=6")  # goes on
    logged = [float(r["lr"]) for r in rows(tmp_path, "a")]
    assert len(logged) == 6 and logged == pytest.approx(taken)
    assert logged[:3] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])


def test_a_cosine_ends_at_the_part_of_the_rate_that_is_asked_for(tmp_path):
    words = ("optimizer.warmup=0", "optimizer.lr=0.01", "optimizer.end=0.4", "trainer.max_steps=4")
    train(tmp_path, "name=a", *words)
    rates = [float(r["lr"]) for r in rows(tmp_path, "a")]
    assert rates == pytest.approx([0.007 + 0.003 * math.cos(math.pi * k / 4) for k in range(4)])


def test_optimizer_groups_scale_the_rate_of_matching_parameters(tmp_path):
    train(tmp_path, "name=a", "+optimizer.groups.x_embedder={lr_scale: 0.0, weight_decay: 0.0}", "ema.ramp=true")
    trained = edit.load(tmp_path / "a").denoiser.model
    torch.manual_seed(0)
    fresh = (
        edit.artifacts.checkpoint.skeleton(tmp_path / "a").from_config(edit.load(tmp_path / "a").denoiser.config).model
    )
    assert torch.equal(trained.x_embedder.proj.weight, fresh.x_embedder.proj.weight)
    assert not torch.equal(trained.blocks[0].attn.qkv.weight, fresh.blocks[0].attn.qkv.weight)
    with pytest.raises(ValueError, match="no trainable parameter's name matches 'nothing'"):
        train(tmp_path, "name=b", "+optimizer.groups.nothing={lr_scale: 2.0}")


def test_optimizer_groups_have_betas_of_their_own(tmp_path):
    train(tmp_path, "name=a", "+optimizer.groups.x_embedder={betas: [0.0, 0.5]}", "trainer.max_steps=2")
    state = torch.load(newest(tmp_path / "a" / "checkpoints"), weights_only=True)["optimizer_states"][0]
    assert [group["betas"] for group in state["param_groups"]] == [(0.0, 0.5), (0.9, 0.95)]


def test_bf16_without_a_cache_of_weights_has_the_losses_of_bf16_with_one(tmp_path, monkeypatch):
    """As under DeepSpeed, where the recipe casts: each weight is cast to the same numbers however often it is cast."""
    from recipes import assembly
    from recipes.recipe import Recipe

    monkeypatch.setattr(assembly, "recipe_casts", lambda trainer: True)
    words = ("trainer.gradient_checkpointing=true", "trainer.max_steps=4")
    train(tmp_path, "name=uncached", *words)
    monkeypatch.setattr(Recipe, "casting", lambda self: torch.autocast("cpu", torch.bfloat16, cache_enabled=True))
    train(tmp_path, "name=cached", *words)
    monkeypatch.undo()
    train(tmp_path, "name=exact", *words)
    assert losses(tmp_path, "uncached") == losses(tmp_path, "cached") != losses(tmp_path, "exact")


@pytest.mark.slow
def test_a_run_of_any_name_goes_on_and_prints_a_command_that_means_it(tmp_path, capsys):
    for name, hydra in (("run[1]", "name='run[1]'"), (odd := "a=b, {c} café", f"name='{odd}'")):
        plain = ("preview.every=2", "checkpoint.every=2", f"trainer.max_steps={2}")
        train(tmp_path, hydra, *plain)
        train(tmp_path, hydra, *plain, "trainer.max_steps=4")
        said = capsys.readouterr().out
        assert "at step 2 of 4" in said and said.encode()
        assert [int(r["step"]) for r in rows(tmp_path, name)] == [1, 2, 3, 4]
        assert edit.load(tmp_path / name).run["step"] == 4
        following = next(line for line in reversed(said.splitlines()) if line.startswith("next"))
        assert shlex.split(following)[1:] == ["python", "eval.py", f"artifact={tmp_path / name}"]
        train(tmp_path, hydra, *plain, "trainer.max_steps=4")
        assert "is complete (4 steps)" in capsys.readouterr().out


def test_a_file_in_the_place_of_the_run_is_told_before_any_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/below"):
        with pytest.raises(UserError, match="file is no folder; choose another name= or runs="):
            train(tmp_path, f"name={name}")


def test_the_artifact_is_the_average_and_stock_diffusers_loads_it(tmp_path):
    from diffusers import DiTTransformer2DModel

    train(tmp_path, "name=a")
    artifact = edit.load(tmp_path / "a")
    kept = torch.load(newest(tmp_path / "a" / "checkpoints"), weights_only=True)["state_dict"]
    for key, value in artifact.denoiser.state_dict().items():
        assert torch.equal(value, kept[f"ema.{key}"]), key
    stock = DiTTransformer2DModel.from_pretrained(tmp_path / "a" / "artifact")
    x, t, label = torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4)
    with torch.no_grad():
        ours = artifact.denoiser(x, t, Condition(label=label)).sample
        torch.testing.assert_close(ours, stock(x, t, label).sample, rtol=0, atol=1e-5)
    assert "_class_name" not in json.loads((tmp_path / "a" / "artifact" / "edits.json").read_text())
    assert artifact.run["step"] == 12 and artifact.data["_target_"] == "data.sets.digits.Digits"


def test_the_average_follows_its_definition(tmp_path):
    """One step: ema_1 = d ema_0 + (1 - d) p_1 with the ramped decay d = 1 / 10."""
    train(tmp_path, "name=a", "trainer.max_steps=1", "ema.decay=0.5", "ema.ramp=true")
    kept = torch.load(newest(tmp_path / "a" / "checkpoints"), weights_only=True)["state_dict"]
    torch.manual_seed(0)
    fresh = edit.artifacts.checkpoint.skeleton(tmp_path / "a").from_config(edit.load(tmp_path / "a").denoiser.config)
    for key, start in fresh.named_parameters():
        expected = 0.1 * start + 0.9 * kept[f"denoiser.{key}"]
        torch.testing.assert_close(kept[f"ema.{key}"], expected.detach(), rtol=0, atol=1e-6)


def test_edits_and_init_train_only_what_they_leave_open(tmp_path):
    train(tmp_path, "name=base")
    base = edit.load(tmp_path / "base").denoiser.model.state_dict()
    train(tmp_path, "name=lora", "edits=lora", f"init={tmp_path}/base", "edits.lora.rank=2")
    tuned = edit.load(tmp_path / "lora").denoiser
    for key, value in tuned.model.state_dict().items():
        stock = key.replace(".base_layer.", ".")
        if ".lora_" not in key:
            assert torch.equal(value, base[stock]), key
    assert any(".lora_B." in k and v.abs().sum() > 0 for k, v in tuned.model.state_dict().items())


def test_init_from_another_backbone_is_refused_by_the_field_that_differs(tmp_path):
    train(tmp_path, "name=base")
    with pytest.raises(UserError, match="depth=2, the backbone group says 3"):
        train(tmp_path, "name=other", f"init={tmp_path}/base", "backbone.depth=3")


class Explode:
    """Turns the loss into NaN from a step on."""

    def __init__(self, monkeypatch, from_step, to_step=10**9):
        from recipes.steps.diffusion import Diffusion

        step = Diffusion.training_step

        def poisoned(module, batch, index):
            bad = from_step <= module.trainer.global_step < to_step
            return step(module, batch, index) * (math.nan if bad else 1.0)

        monkeypatch.setattr(Diffusion, "training_step", poisoned)


def test_a_step_without_finite_gradient_is_skipped_and_counted(tmp_path, monkeypatch):
    Explode(monkeypatch, 5, 7)
    train(tmp_path, "name=a", "checkpoint.every=1", "checkpoint.keep=20")
    assert [r["skipped_steps"] for r in rows(tmp_path, "a")][3:9] == ["0.0", "0.0", "1.0", "2.0", "2.0", "2.0"]
    states = [
        torch.load(tmp_path / "a" / "checkpoints" / f"step_{k:08d}.ckpt", weights_only=True)["state_dict"]
        for k in (5, 7, 8)
    ]
    key = "denoiser.model.blocks.0.attn.qkv.weight"
    assert torch.equal(states[0][key], states[1][key]), "skipped steps leave the weights alone"
    assert not torch.equal(states[1][key], states[2][key]) and states[2][key].isfinite().all()


def test_gradients_that_stay_infinite_end_the_run_in_one_sentence(tmp_path, monkeypatch):
    Explode(monkeypatch, 3)
    with pytest.raises(UserError, match="gradient was not finite in the last .* steps.*lower optimizer.lr") as error:
        train(tmp_path, "name=a", "trainer.max_steps=40")
    assert "\n" not in str(error.value)


@dataclass
class MeanPixel(Term):
    """A real small term: regress a projection of a unit's tokens onto the mean pixel."""

    taps: tuple = (1,)

    def build(self, student, teacher=None):
        return torch.nn.Linear(32, 1)

    def losses(self, seen):
        guess = seen.own(seen.output.trace["unit.1"]).mean((1, 2))
        return {"mean_pixel": 0.1 * (guess - seen.batch["x"].mean((1, 2, 3))) ** 2}


@dataclass
class Watched(Edit):
    """An edit that reports how large a unit's output is, and asks for it to be small."""

    def apply(self, denoiser):
        unit = denoiser.units[0]
        denoiser.units[0] = lambda stream: (s := unit(stream)).record("size", s.image.square().mean((1, 2)))

    def losses(self, trace):
        return {"size": 1e-3 * trace["size"]}

    def metrics(self, trace):
        return {"rms": trace["size"].sqrt()}


def train_with(folder, overrides, **changes):
    """`train` with further arguments of `Diffusion`."""
    from recipes.steps.diffusion import Diffusion

    build = Diffusion.__init__

    def changed(self, *args, **kwargs):
        build(self, *args, **{**kwargs, **changes})

    Diffusion.__init__ = changed
    try:
        train(folder, *overrides)
    finally:
        Diffusion.__init__ = build


def test_terms_see_taps_and_train_their_own_parameters(tmp_path):
    train_with(tmp_path, ["name=a"], terms={"mean": MeanPixel()})
    first, last = rows(tmp_path, "a")[0], rows(tmp_path, "a")[-1]
    assert {"train/loss", "train/flow", "train/mean/mean_pixel"} <= first.keys()
    total = float(last["train/flow"]) + float(last["train/mean/mean_pixel"])
    assert float(last["train/loss"]) == pytest.approx(total, rel=1e-5)
    kept = torch.load(newest(tmp_path / "a" / "checkpoints"), weights_only=True)["state_dict"]
    assert "own.mean.weight" in kept


def _terms_on_two_ranks(folder, overrides):
    train_with(folder, overrides, terms={"mean": MeanPixel()})


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_parameters_of_terms_are_trained_alike_on_two_ranks(tmp_path, strategy):
    two = ("name=two", f"trainer={strategy}", *TWO_RANKS, "data.batch_size=8")
    run_ranks(_terms_on_two_ranks, 2, args=(tmp_path, two), timeout=120)
    train_with(tmp_path, ["name=one", "data.batch_size=16"], terms={"mean": MeanPixel()})
    assert close(losses(tmp_path, "one"), losses(tmp_path, "two"), 2e-5)


def test_what_edits_report_and_ask_for_is_logged_under_their_name(tmp_path):
    from recipes.steps.diffusion import Diffusion

    build = Diffusion.configure_model

    def with_edit(self):
        plain = self.build
        self.build = lambda: edit.apply(plain(), {"watch": Watched()})
        build(self)

    Diffusion.configure_model = with_edit
    try:
        train(tmp_path, "name=a", "trainer.max_steps=2")
    finally:
        Diffusion.configure_model = build
    last = rows(tmp_path, "a")[-1]
    assert float(last["train/watch/rms"]) > 0
    total = float(last["train/flow"]) + float(last["train/watch/size"])
    assert float(last["train/loss"]) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_fsdp2_previews_and_saves_in_bf16(tmp_path, world):
    overrides = ["trainer=fsdp2", *TWO_RANKS, f"trainer.devices={world}", "trainer.precision=bf16-mixed"]
    overrides += ["preview.every=6", "preview.count=10", "sampler.solver.steps=2", "data.batch_size=8"]
    train_ranks(tmp_path, "name=a", *overrides, world=world)
    assert len(list((tmp_path / "a" / "samples").glob("*.png"))) == 2
    weights = edit.load(tmp_path / "a").denoiser.state_dict()
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in weights.values())


def test_previews_are_pictures_of_the_grid(tmp_path):
    from PIL import Image

    train(tmp_path, "name=a", "preview.every=6", "preview.count=20", "sampler.solver.steps=2")
    pictures = sorted(p.name for p in (tmp_path / "a" / "samples").iterdir())
    assert pictures == ["step_000006.png", "step_000012.png"]
    image = Image.open(tmp_path / "a" / "samples" / "step_000012.png")
    assert image.mode == "RGB" and image.width > image.height  # 10 columns, 2 rows


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (("backbone.input_size=16",), "samples of 1x8x8, the backbone takes 1x16x16"),
        (("backbone.num_classes=5",), "the data has 10 classes, the backbone 5"),
        (("trainer.devices=2",), "strategy=single uses one device.*trainer=ddp"),
        (("trainer.accelerator=gpu",), "torch sees no GPU"),
        (("init=nowhere",), "no artifact at nowhere"),
        (("init=nowhere.pt",), "no checkpoint at nowhere.pt"),
        (("backbone.num_heads=3",), "num_heads 3 does not divide hidden_size 32"),
        (("trainer=zero2", "trainer.accelerator=cpu", "trainer.devices=1"), "runs on GPUs"),
        (("edits=lora", "edits.lora.targets=[nothing]"), "no linear layer's name ends in 'nothing'"),
        (("edits=depth", "edits.depth.ratio=1.5"), "share to drop"),
        (("+evaluate.guidanze=1",), "unknown key 'guidanze'.*guidance"),
        (("sampler=ddpm",), "this model predicts a velocity"),
        (("objective=ddpm", "sampler=ddim"), "backbone predicts a velocity, the objective trains a noise"),
    ],
    ids=lambda v: v[0] if isinstance(v, tuple) else None,
)
def test_impossible_combinations_are_refused_in_one_sentence(tmp_path, overrides, sentence):
    if "accelerator=gpu" in overrides[0] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(Exception, match=sentence) as error:
        train(tmp_path, "name=a", *overrides)
    inner = error.value.__cause__ or error.value
    assert isinstance(inner, UserError | ValueError | FileNotFoundError)


def test_a_launcher_that_starts_too_few_processes_is_caught(tmp_path, monkeypatch):
    """sbatch without srun: one task where two devices were asked for."""
    for name, value in {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "job",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="srun"):
        train(tmp_path, "name=a", "trainer=ddp", *TWO_RANKS)


@pytest.mark.slow
def test_fsdp2_trains_lora_with_accumulation_as_one_process_does(tmp_path):
    train(tmp_path, "name=base")
    lora = ["edits=lora", f"init={tmp_path}/base", "edits.lora.rank=2", "trainer.accumulate=2"]
    train(tmp_path, "name=one", *lora, "data.batch_size=16")
    sharded = ["trainer=fsdp2", *TWO_RANKS, "data.batch_size=8"]
    train_ranks(tmp_path, "name=two", *lora, *sharded, world=2)
    assert close(losses(tmp_path, "one"), losses(tmp_path, "two"), 2e-5)
    one, two = (edit.load(tmp_path / n).denoiser.state_dict() for n in ("one", "two"))
    assert one.keys() == two.keys() and any(".lora_B." in k and v.abs().sum() > 0 for k, v in two.items())


def test_more_gpus_than_the_machine_has_are_refused(monkeypatch):
    from recipes.config.schema import TrainerConfig
    from recipes.runtime.devices import count_devices

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="trainer.devices=8, but this machine has 2 GPUs: ask for at most 2"):
        count_devices(TrainerConfig(max_steps=1, accelerator="gpu", devices=8, strategy="ddp"))
    assert count_devices(TrainerConfig(max_steps=1, accelerator="gpu", devices="auto", strategy="ddp")) == 2


def test_a_run_that_does_not_fit_is_refused_before_it_begins_with_what_to_change(tmp_path):
    with pytest.raises(
        UserError, match="needs .* GB on each device, which has 0.0 GB: use .*; trainer.memory=0"
    ) as error:
        train(tmp_path, "name=a", "trainer.memory=0.001")
    assert "\n" not in str(error.value) and not (tmp_path / "a").exists()
    train(tmp_path, "name=a", "trainer.memory=1", "trainer.max_steps=1")


def test_a_solver_without_the_edit_that_it_asks_is_refused_before_the_training(tmp_path):
    with pytest.raises(
        UserError, match="PolicySolver needs a model that records 'policy'.*edit.few_step.policy tells which"
    ):
        train(tmp_path, "name=a", "sampler=policy")
    assert not (tmp_path / "a").exists()
