"""A teacher beside the model: asked at the same point, never trained, never saved, wherever its weights are."""

from copy import deepcopy
from math import prod

import pytest
import torch
from ranks import run_ranks
from small_runs import losses, rows, train, train_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from weights import randomise

from edit.backbones.dit_diffusers import DiTDiffusersConfig
from edit.denoiser import Denoiser
from edit.distillation.guidance import TeacherGuidance
from edit.stream import Condition
from recipes.config.errors import UserError
from recipes.roles import Teacher, shard

OUTPUT = "+terms.kd._target_=edit.distillation.output.OutputKD"
PIXART = {"caption_channels": 16, "sample_size": 8, "cross_attention_dim": 16}
FEATURES = ("+terms.f._target_=edit.distillation.features.FeatureKD", "+terms.f.pairs=[[0,1]]", "+terms.f.norm=raw")


def teacher_of(folder):
    """A trained small digits model, the settings that make it a teacher, and half of it the student."""
    train(folder, "name=teacher", "trainer.max_steps=60", "optimizer.warmup=5")
    return (f"teacher.path={folder}/teacher", f"init={folder}/teacher", "data_weight=0")


def test_a_copy_of_the_teacher_has_nothing_to_learn(tmp_path):
    told = teacher_of(tmp_path)
    train(
        tmp_path,
        "name=a",
        *told,
        OUTPUT,
        "+terms.f._target_=edit.distillation.features.FeatureKD",
        "+terms.f.pairs=[[0,0],[1,1]]",
    )
    assert set(losses(tmp_path, "a")) == {"0.0"}


def test_a_shallower_student_learns_from_the_teacher_and_the_teacher_is_not_saved(tmp_path):
    told = teacher_of(tmp_path)
    longer = ("trainer.max_steps=40", "optimizer.lr=2e-3", "optimizer.warmup=5")
    train(tmp_path, "name=a", *told, OUTPUT, *FEATURES, "edits=depth", *longer)
    values = [float(v) for v in losses(tmp_path, "a")]
    assert sum(values[-5:]) < 0.8 * sum(values[:5])
    assert {"train/kd/output_kd", "train/f/feature_kd"} <= set(rows(tmp_path, "a")[0])
    newest = max((tmp_path / "a" / "checkpoints").glob("*.ckpt"))
    state = torch.load(newest, weights_only=True)["state_dict"]
    assert not [k for k in state if "teacher" in k]
    blocks = {k.split(".")[3] for k in state if k.startswith("denoiser.model.blocks")}
    assert blocks == {"0"}, "one block of two: the teacher's second is nowhere"


@pytest.mark.slow
def test_guidance_of_the_teacher_is_distilled_into_a_single_pass(tmp_path):
    told = teacher_of(tmp_path)
    train(tmp_path, "name=plain", *told, OUTPUT)
    train(tmp_path, "name=guided", *told, OUTPUT, "teacher.guidance=3")
    assert set(losses(tmp_path, "plain")) == {"0.0"} and float(losses(tmp_path, "guided")[0]) > 0


def test_a_tied_teacher_is_the_student_without_its_lora(tmp_path):
    teacher_of(tmp_path)
    told = ("teacher.placement=tied", f"init={tmp_path}/teacher", "edits=lora", OUTPUT)
    train(tmp_path, "name=a", *told, "optimizer.lr=1e-2")
    values = [float(r["train/kd/output_kd"]) for r in rows(tmp_path, "a")]
    assert values[0] == 0, "a fresh LoRA is the identity"
    assert max(values) > 0, "the data's own loss moves the LoRA, and the teacher stays where it was"


@pytest.mark.parametrize("family", ["flux", "pixart"])  # PixArt has parameters directly on the model
def test_an_offloaded_teacher_answers_to_the_bit_and_its_layers_are_fetched(family):
    from edit.backbones.flux import FluxConfig
    from edit.backbones.pixart import PixArtConfig

    configs = {
        "flux": FluxConfig(16, 1, 1, 16, 2, 16, 16, False, (4, 6, 6), (8, 8)),
        "pixart": PixArtConfig(in_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, **PIXART),
    }

    source = configs[family].build()
    randomise(source)

    def answer(placement):
        teacher = Teacher(lambda: deepcopy(source), None, TeacherGuidance(), placement)
        model = teacher.configure(source, (0, -1), (0,))
        teacher.place(torch.device("cpu"))
        told, x = model.example(2, text=3), torch.linspace(-1, 1, 2 * prod(model.sample_shape))
        t = torch.tensor([0.3, 0.8])
        out = teacher(model, x.view(2, *model.sample_shape), t, told, model.null(told), torch.ones(2))
        return model, out

    (whole, expected), (model, found) = answer("replicated"), answer("offloaded")
    assert torch.equal(found.sample, expected.sample) and found.trace.keys() == expected.trace.keys()
    assert all(torch.equal(found.trace[k], v) for k, v in expected.trace.items()) and len(found.trace) >= 4
    linear = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert linear and all(hasattr(m, "_diffusers_hook") for m in linear)
    assert not any(hasattr(m, "_diffusers_hook") for m in whole.modules())


@pytest.mark.slow
def test_a_run_with_an_offloaded_teacher_has_the_losses_of_one_with_a_replicated(tmp_path):
    told = (*teacher_of(tmp_path), OUTPUT, *FEATURES, "edits=depth", "trainer.max_steps=3")
    for placement in ("replicated", "offloaded"):
        train(tmp_path, f"name={placement}", *told, f"teacher.placement={placement}")
    assert losses(tmp_path, "replicated") == losses(tmp_path, "offloaded")


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_two_ranks_with_a_teacher_have_the_losses_of_one(tmp_path, placement):
    told = (*teacher_of(tmp_path), OUTPUT, *FEATURES, "edits=depth")
    train(tmp_path, "name=one", *told)
    two = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true", "data.batch_size=8")
    for strategy in ("ddp", "fsdp2"):
        name = f"{strategy}"
        train_ranks(
            tmp_path, f"name={name}", *told, f"trainer={strategy}", *two, f"teacher.placement={placement}", world=2
        )
        a, b = ([float(v) for v in losses(tmp_path, n)] for n in ("one", name))
        # sums in another order
        assert a == pytest.approx(b, rel=2e-4)


@pytest.mark.slow
def test_a_resumed_distillation_has_the_losses_of_an_uninterrupted_one(tmp_path):
    told = (
        *teacher_of(tmp_path),
        OUTPUT,
        "edits=depth",
        "+terms.f._target_=edit.distillation.features.FeatureKD",
        "+terms.f.pairs=[[0,1]]",
    )
    train(tmp_path, "name=whole", *told)
    train(tmp_path, "name=parts", *told)
    for step in (12, 8):
        (tmp_path / "parts" / "checkpoints" / f"step_{step:08d}.ckpt").unlink()
    import shutil

    shutil.rmtree(tmp_path / "parts" / "artifact")
    train(tmp_path, "name=parts", *told, "checkpoint.keep=9")
    assert losses(tmp_path, "parts") == losses(tmp_path, "whole")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((OUTPUT,), "terms.kd compares with a teacher"),
        (("teacher.path=nowhere", OUTPUT), "no artifact at nowhere"),
        (("teacher.placement=tied",), "needs an edit that can be switched off"),
        (("teacher.path=x", "teacher.guidance=[3,1]"), r"expected a number of at least 0 or \[low, high\]"),
        (("teacher.path=x", "teacher.placement=sharded"), "needs several devices"),
        (("data_weight=-1",), "data_weight: expected a number"),
        (("before=[experiment]",), "expected a list of settings"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_in_one_sentence(tmp_path, words, sentence):
    with pytest.raises(Exception, match=sentence) as error:
        train(tmp_path, "name=a", *words)
    assert "\n" not in str(error.value).strip() or not isinstance(error.value, UserError)


def test_a_term_that_names_no_unit_of_the_teacher_is_refused(tmp_path):
    told = teacher_of(tmp_path)
    with pytest.raises((UserError, ValueError), match="the teacher has units 0 to 1, got 7"):
        train(
            tmp_path,
            "name=a",
            *told,
            "+terms.f._target_=edit.distillation.features.FeatureKD",
            "+terms.f.pairs=[[0,7]]",
        )


def test_a_tied_teacher_must_have_the_structure_of_the_student(tmp_path):
    teacher_of(tmp_path)
    lora = "+edits.lora={_target_: edit.tuning.lora.LoRA, rank: 2}"
    with pytest.raises((UserError, ValueError), match=r"another edit \(depth\) changes it"):
        train(tmp_path, "name=a", "teacher.placement=tied", f"init={tmp_path}/teacher", "edits=depth", lora, OUTPUT)


def test_a_tied_teacher_must_not_have_another_attention_than_before(tmp_path):
    """Its shapes would not tell: the student's own operator would be what it is taught by."""
    teacher_of(tmp_path)
    edits = (
        "+edits.lora={_target_: edit.tuning.lora.LoRA, rank: 2}",
        "+edits.swap._target_=edit.attention.linear.LinearAttention",
    )
    with pytest.raises((UserError, ValueError), match=r"another edit \(swap\) changes it"):
        train(tmp_path, "name=a", "teacher.placement=tied", f"init={tmp_path}/teacher", *edits, OUTPUT)


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    train(tmp_path, "name=teacher", "trainer.max_steps=1", "backbone.num_classes=12")
    with pytest.raises(UserError, match="knows 12 classes, the backbone 10"):
        train(tmp_path, "name=a", f"teacher.path={tmp_path}/teacher", OUTPUT)


@pytest.mark.slow
def test_two_ranks_train_where_no_loss_reaches_the_last_unit(tmp_path):
    told = (*teacher_of(tmp_path), "+terms.f._target_=edit.distillation.features.FeatureKD", "+terms.f.pairs=[[0,0]]")
    two = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true", "data.batch_size=8")
    train_ranks(tmp_path, "name=a", *told, "trainer=ddp", *two, "trainer.max_steps=3", world=2)
    assert len(losses(tmp_path, "a")) == 3


def test_a_teacher_of_another_family_is_refused_though_it_takes_the_same_samples(tmp_path):
    small = [f"backbone.{k}=1" for k in ("num_layers", "num_single_layers")]
    run_text(tmp_path, *TEXT, *small, "name=flux")
    sd3 = ("backbone=sd3_tiny", *TEXT[1:], "backbone.in_channels=12", f"teacher.path={tmp_path}/flux", OUTPUT)
    with pytest.raises(UserError, match="holds a flux, the student is a sd3"):
        run_text(tmp_path, *sd3, "name=a")


def test_a_range_of_guidance_needs_a_student_that_is_told_the_scale(tmp_path):
    told = teacher_of(tmp_path)
    with pytest.raises((UserError, ValueError), match="student has no guidance input that could be told the scale"):
        train(tmp_path, "name=a", *told, OUTPUT, "teacher.guidance=[2,4]")


TEXT = ("backbone=flux_tiny", "data=shapes", "data.set.count=32", "data.set.held=8", "trainer.max_steps=1")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["backbone.joint_attention_dim=32"],
            "cannot be told what this data tells: flux takes text embeddings of width 32",
        ),
        (["backbone.in_channels=16"], "the data has samples of 12x8x8, the backbone takes 4x8x8"),
        (["teacher.path={folder}/digits"], "holds a dit, the student is a flux: choose a teacher of its family"),
        (["teacher.path={folder}/digitz"], "teacher.path: no artifact at .*; did you mean .*/digits?"),
        (["+sampler.told=2.0"], "this flux has no guidance input: use sampler.guidance"),
        (["teacher.path={folder}/digits", "data=digits", "backbone=pixart_tiny"], "has no labels|predicts a|takes"),
    ],
)
def test_text_models_that_do_not_fit_their_data_or_teacher_are_refused(tmp_path, words, sentence):
    train(tmp_path, "name=digits", "trainer.max_steps=1")
    words = [w.format(folder=tmp_path) for w in words]
    chosen = {w.split("=")[0]: w for w in (*TEXT, *words)}
    if "digits" in chosen["data"]:
        chosen = {k: w for k, w in chosen.items() if not k.startswith("data.set")}
    with pytest.raises(UserError, match=sentence):
        run_text(tmp_path, *chosen.values())


def run_text(folder, *words):
    """`small_runs.train` without what is said there about our own DiT."""
    from hydra import compose, initialize_config_dir
    from small_runs import CONFIGS

    from recipes.config.sources import register
    from recipes.training import run

    register()
    groups = [w for w in words if "." not in w.split("=")[0]]
    keys = [w for w in words if w not in groups]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        name = [] if any(w.startswith("name=") for w in words) else ["name=a"]
        run(compose("train", [*groups, f"runs={folder}", *name, "evaluate=null", "preview.every=0", *keys]))


def test_a_flux_learns_captions_and_its_half_learns_from_it(tmp_path):
    small = [
        "backbone.num_layers=1",
        "backbone.num_single_layers=1",
        "backbone.num_attention_heads=1",
        "data.batch_size=8",
    ]
    small += ["backbone.axes_dims_rope=[8,12,12]", "trainer.max_steps=3", "optimizer.warmup=1"]
    run_text(tmp_path, *TEXT[:4], *small, "name=teacher")
    told = [f"teacher.path={tmp_path}/teacher", f"init={tmp_path}/teacher", "edits=depth", "edits.depth.pattern=listed"]
    told += ["+edits.depth.units=[1]", "teacher.guidance=3", OUTPUT]
    run_text(tmp_path, *TEXT[:4], *small, *told, "name=student")
    config_ = (tmp_path / "student" / "artifact" / "config.json").read_text()
    assert '"num_layers": 0' in config_ and '"num_single_layers": 1' in config_


# ---- sharded by FSDP2 ------------------------------------------------------------------------------------------------


def _embedded_by_the_first_block() -> float:
    torch.distributed.init_process_group("gloo")
    spec = DiTDiffusersConfig(4, 8, 2, 2, 8, 8, 2, 10)

    def build() -> Denoiser:
        torch.manual_seed(0)
        denoiser = spec.build()
        randomise(denoiser)
        return denoiser.eval()

    mesh = init_device_mesh("cpu", (2,))
    batch = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), Condition(label=torch.tensor([1, 7]))
    sharded = shard(build, build().state_dict(), torch.device("cpu"), mesh, MixedPrecisionPolicy())
    with torch.no_grad():
        return (sharded(*batch).sample - build()(*batch).sample).abs().max().item()


def test_what_a_denoiser_calls_apart_from_a_units_forward_gathers_its_weights_too():
    assert max(run_ranks(_embedded_by_the_first_block)) < 1e-6
