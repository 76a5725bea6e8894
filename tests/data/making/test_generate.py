"""Self-generated data: what training reads is what the teacher samples, and a cache made otherwise is refused."""

import json
import math
import multiprocessing as mp
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import edit
from data.generate import main, parse
from data.loader import EndlessLoader
from data.making.encoders import TextEncoder
from data.making.frozen import PromptEncoders
from data.making.generator import generate, settings_of
from data.making.pipelines import complete
from data.making.prompts import read_prompts
from data.making.request import Request
from data.making.teacher import default_shift
from data.manifest import teacher_hash
from data.sets.latents import Latents
from edit.artifacts.checkpoint import skeleton
from edit.backbones.dit import DiTConfig
from edit.backbones.flux import FluxConfig
from edit.backbones.qwen_image import QwenImageConfig
from edit.sampling import Sampler
from edit.solvers import Euler, StockEuler
from edit.stream import Condition

PROMPTS = ["red square", "a blue disc", "disc", "red square on a disc", "blue square"]


def quiet(_: str) -> None:
    pass


def flux(folder: Path, seed: int = 0, **options) -> Path:
    """A random Flux for latents 4x8x8, text of width 8 and pooled text of width 12."""
    torch.manual_seed(seed)
    tiny = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 12}
    tiny |= {"num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 12}
    tiny |= {"guidance_embeds": False, "axes_dims_rope": (4, 4, 4), "sample_size": (8, 8)}
    denoiser = FluxConfig(**{**tiny, **options}).build()
    with torch.no_grad():
        for p in denoiser.parameters():
            p.normal_(0, 0.2)  # away from the zeros of a new model
    return edit.save(denoiser, folder, sampler=Sampler(Euler(4, shift=2.0)))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux(tmp_path_factory.mktemp("teachers") / "flux")


@pytest.fixture
def order(teacher: Path, t5: Path, clip: Path, tmp_path: Path):
    """An order at test size; keywords change it."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    tiny = {"teacher": teacher, "prompts": tmp_path / "prompts.txt", "text_encoder": t5, "pooled_encoder": clip}
    settings = {"max_tokens": 8, "steps": 3, "batch": 2, "shard_size": 3, "dtype": "float32", "device": "cpu"}

    def make(out: str = "cache", **options) -> Request:
        given = {**{k: str(v) for k, v in tiny.items()}, **settings, **options}
        return Request(out=str(tmp_path / out), **given)

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*") if ".index." not in p.name}


def embed(order: Request, prompts: list[str]) -> dict[str, torch.Tensor]:
    text = TextEncoder(order.text_encoder, None, order.max_tokens, padding="states").encode(prompts)
    pooled = TextEncoder(order.pooled_encoder).encode(prompts)
    return {"text": torch.stack([e.text for e in text]), "pooled": torch.stack([e.pooled for e in pooled])}


# ---- what is made ---------------------------------------------------------------------------------------------------


def test_generation_equals_sampling_by_hand(order, teacher):
    work = order(guidance=2.5, shift=1.5, seed=7, images=2)
    data = Latents(str(generate(work, quiet).parent))
    denoiser = edit.load(teacher).denoiser
    words, null = embed(work, PROMPTS), embed(work, [""])
    assert len(data.train()) == 10 and data.shape == (4, 8, 8) and data.num_classes is None
    for number in (0, 3, 9):
        k = number // 2
        x = Sampler(Euler(3, shift=1.5), guidance=2.5)(
            denoiser,
            edit.load(teacher).objective,
            Condition(text=words["text"][k : k + 1], pooled=words["pooled"][k : k + 1]),
            torch.tensor([number]),
            seed=7,
            negative=Condition(**null),
        )
        sample = data.train().sample(number, draw=123)
        # 1e-4: matrix products of batches of one and of two round differently, three steps long
        torch.testing.assert_close(sample["x"], x[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sample["text"], words["text"][k], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sample["pooled"], words["pooled"][k], rtol=1e-5, atol=1e-5)
        told = data.train().tars.json(number)
        assert told == {"caption": PROMPTS[k], "prompt": str(k + 1), "number": number, "seed": 7}
    assert not torch.equal(data.train().sample(0, 0)["x"], data.train().sample(1, 0)["x"])  # two of one prompt
    torch.testing.assert_close(data.null["text"], null["text"][0], rtol=1e-5, atol=1e-5)


def test_a_distilled_teacher_is_told_the_scale(order, tmp_path):
    told = flux(tmp_path / "dev", guidance_embeds=True)
    work = order(teacher=str(told), guidance=4.0)
    sample = Latents(str(generate(work, quiet).parent)).train().sample(0, 0)
    artifact, words = edit.load(told), embed(work, PROMPTS[:1])
    x = Sampler(Euler(3, shift=2.0))(  # the shift that the artifact says
        artifact.denoiser,
        artifact.objective,
        Condition(**words, guidance=torch.tensor([4.0])),
        torch.tensor([0]),
    )
    torch.testing.assert_close(sample["x"], x[0], rtol=1e-4, atol=1e-4)  # as above


def test_the_manifest_says_what_made_the_samples(order, teacher, t5):
    made = json.loads(generate(order(guidance=2.0), quiet).read_text())
    told = made["generated"]
    assert told["teacher"] == teacher_hash(teacher) and told["family"] == "flux"
    assert (told["guidance"], told["steps"], told["solver"], told["shift"], told["seed"]) == (2.0, 3, "euler", 2.0, 0)
    assert (made["text"]["max_tokens"], made["text"]["padding"], made["text"]["width"]) == (8, "states", 8)
    assert made["text"]["sha256"] == TextEncoder(str(t5)).description["sha256"]
    assert made["pooled"]["width"] == 12 and made["count"] == 5 == told["prompts"]["count"]


def test_text_has_the_same_length_in_every_batch(order):
    for padding, real in (("states", 8), ("zeros", 3)):
        data = Latents(str(generate(order(padding, padding=padding), quiet).parent))
        for batch in EndlessLoader(data.train(), batch_size=2, total=3):
            assert batch["text"].shape == (2, 8, 8) and batch["text_mask"].shape == (2, 8)
        sample = data.train().sample(0, 0)  # two words and </s>
        assert sample["text_mask"].sum() == real
        assert sample["text"][3:].any() == (padding == "states")
        assert len(data.null["text"]) == len(data.null["text_mask"]) == 8


def qwen(folder: Path) -> Path:
    """A Qwen-Image of the same widths, which masks padding."""
    torch.manual_seed(0)
    tiny = QwenImageConfig(16, 1, 12, 2, joint_attention_dim=8, axes_dims_rope=(4, 4, 4), sample_size=(8, 8))
    return edit.save(tiny.build(), folder, sampler=Sampler(Euler(4)))


def test_a_published_teacher_without_a_scheduler_is_sampled_at_the_shift_of_its_family(order, tmp_path):
    folder = qwen(tmp_path / "made").replace(tmp_path / "transformer")
    (folder / "edits.json").unlink()
    work = order(teacher=str(tmp_path), size=8)
    log = 0.5 + 0.4 * (16 - 256) / (8192 - 256)  # Qwen-Image's, linear in the tokens
    assert default_shift(work, skeleton(tmp_path), 16) == pytest.approx(math.exp(log))


def test_with_masked_prompts_the_length_is_that_of_the_batch(order, tmp_path):
    work = order(padding="none", teacher=str(qwen(tmp_path / "qwen")), pooled_encoder=None)
    data = Latents(str(generate(work, quiet).parent))
    assert [len(data.train().sample(i, 0)["text"]) for i in range(5)] == [3, 4, 2, 6, 3] and data.text_length is None


def test_a_teacher_that_attends_to_padding_is_given_texts_of_one_length(order):
    with pytest.raises(ValueError, match="flux attends to the padding .* padding=states"):
        generate(order(padding="none"), quiet)
    assert Latents(str(generate(order(), quiet).parent)).text_length == 8


@pytest.mark.parametrize(
    ("solver", "shift"),
    [(Euler(4, shift=2.5), 2.5), (StockEuler(4, dynamic=(0.4, 0.9, 64, 1024)), math.exp(0.4 + 0.5 * (16 - 64) / 960))],
)
def test_a_teacher_of_ours_is_sampled_at_the_shift_it_was_saved_with(order, tmp_path, solver, shift):
    teacher = edit.load(flux(tmp_path / "made"))
    edit.save(teacher.denoiser, tmp_path / "teacher", sampler=Sampler(solver))
    work = order(teacher=str(tmp_path / "teacher"), size=8)
    assert default_shift(work, teacher.denoiser, 16) == pytest.approx(shift)


DYNAMIC = {"base_image_seq_len": 64, "max_image_seq_len": 1024, "base_shift": 0.4, "max_shift": 0.9}


@pytest.mark.parametrize(
    ("options", "shift"),
    [
        ({"shift": 3.0}, 3.0),
        ({"use_dynamic_shifting": True, **DYNAMIC}, math.exp(0.4 + 0.5 * (16 - 64) / 960)),
        ({"use_dynamic_shifting": True, **DYNAMIC, "time_shift_type": "linear"}, 0.4 + 0.5 * (16 - 64) / 960),
        (None, 1.0),
    ],
    ids=["fixed", "exponential", "linear", "no scheduler"],
)
def test_a_published_teacher_is_sampled_at_the_shift_of_its_pipeline(order, tmp_path, options, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = flux(tmp_path / "made").replace(tmp_path / "transformer")
    (folder / "edits.json").unlink()
    if options is not None:
        scheduler = FlowMatchEulerDiscreteScheduler(**options)
        scheduler.save_pretrained(tmp_path / "scheduler")
    work = order(teacher=str(tmp_path), size=8)
    assert default_shift(work, skeleton(tmp_path), 16) == pytest.approx(shift)
    if options is None:
        return
    # the scheduler's own times are those of our solver at this shift
    even = [1, 0.75, 0.5, 0.25]
    mu = shift if "time_shift_type" in options else math.log(shift)
    scheduler.set_timesteps(sigmas=even, mu=mu if "use_dynamic_shifting" in options else None)
    expected = [shift * s / (1 + (shift - 1) * s) for s in even]
    assert scheduler.sigmas[:-1].tolist() == pytest.approx(expected, rel=1e-6)  # float32


def test_a_shift_that_is_given_wins_over_that_of_the_pipeline(order, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = flux(tmp_path / "made").replace(tmp_path / "transformer")
    (folder / "edits.json").unlink()
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path / "scheduler")
    for given, used in ((None, 3.0), (1.25, 1.25)):
        work = order(teacher=str(tmp_path), size=8, shift=given)
        told = settings_of(work, PromptEncoders(work, "cpu"), read_prompts(work.prompts))
        assert told["generated"]["shift"] == used


@pytest.mark.parametrize("command", ["generate", "precompute"])
def test_an_environment_that_makes_no_sense_is_one_sentence(command, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "first")
    words = {"generate": ["teacher=a", "prompts=b", "out=c"], "precompute": ["--images=a", "--out=b", "--vae=c"]}
    assert import_module(f"data.{command}").main(words[command])
    assert capsys.readouterr().err == "error: the environment says RANK='first', expected a whole number: unset it\n"


def test_latents_can_be_looked_at_through_the_vae(order, vae, tmp_path):
    out = generate(order(vae=str(vae)), quiet).parent
    images = Latents(str(out)).to_frames(torch.stack([Latents(str(out)).train().sample(0, 0)["x"]]))
    assert images.shape == (1, 1, 16, 16, 3)
    from PIL import Image

    with Image.open(out / "samples.png") as sheet:
        assert sheet.size == (2 * 18, 2 * 18)  # the first shard has three images
    assert not (generate(order("plain"), quiet).parent / "samples.png").exists()
    with pytest.raises(ValueError, match="to look at latents of .*plain, a VAE is needed"):
        Latents(str(tmp_path / "plain")).to_frames(torch.zeros(1, 4, 8, 8))


# ---- a teacher in its pipeline ---------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(tmp_path: Path, t5: Path, clip: Path, vae: Path) -> Path:
    """A FLUX pipeline folder: tokenizers apart from their encoders."""
    from transformers import AutoTokenizer

    folder = tmp_path / "pipe"
    edited = flux(tmp_path / "made")
    edited.rename((folder.mkdir(), folder / "transformer")[1])
    (folder / "transformer/edits.json").unlink()
    shutil.copytree(vae, folder / "vae")
    index: dict = {"_class_name": "FluxPipeline", "_diffusers_version": "0.30.0", "vae": ["diffusers", "AutoencoderKL"]}
    for number, encoder, name in (("", clip, "CLIPTextModel"), ("_2", t5, "T5EncoderModel")):
        for file in ("config.json", "model.safetensors"):
            (folder / f"text_encoder{number}").mkdir(exist_ok=True)
            shutil.copy(encoder / file, folder / f"text_encoder{number}")
        AutoTokenizer.from_pretrained(encoder).save_pretrained(folder / f"tokenizer{number}")
        index |= {f"text_encoder{number}": ["transformers", name], f"tokenizer{number}": ["transformers", "Tokenizer"]}
    (folder / "model_index.json").write_text(json.dumps(index | {"image_encoder": [None, None]}))
    return folder


def test_what_a_pipeline_has_need_not_be_named(order, pipeline, t5, clip, vae):
    named = order("named", teacher=str(pipeline), vae=str(vae), size=8)
    bare = {"text_encoder": None, "pooled_encoder": None, "size": 8}
    for out, teacher in (("whole", pipeline), ("part", pipeline / "transformer")):
        found = complete(order(out, teacher=str(teacher), **bare))
        folders = (found.text_encoder, found.tokenizer, found.pooled_encoder, found.pooled_tokenizer, found.vae)
        names = ("text_encoder_2", "tokenizer_2", "text_encoder", "tokenizer", "vae")
        assert folders == tuple(f"{pipeline}/{name}" for name in names)
    made = [generate(work, quiet).parent for work in (named, order("whole", teacher=str(pipeline), **bare))]
    assert contents(made[0])["shard-000000.tar"] == contents(made[1])["shard-000000.tar"]
    assert (made[1] / "samples.png").exists()


def test_what_is_named_wins_over_the_pipeline(order, pipeline, t5):
    found = complete(order(teacher=str(pipeline), pooled_encoder=None))
    assert (found.text_encoder, found.tokenizer) == (str(t5), None)
    assert found.pooled_encoder == f"{pipeline}/text_encoder"


@pytest.mark.parametrize(
    "encoders",
    [
        ["CLIPTextModelWithProjection", "CLIPTextModelWithProjection", "T5EncoderModel"],
        ["Qwen2_5_VLForConditionalGeneration"],
    ],
    ids=["SD3", "Qwen-Image"],
)
def test_a_pipeline_of_other_encoders_is_refused(order, pipeline, encoders):
    parts = {f"text_encoder_{i}": ["transformers", name] for i, name in enumerate(encoders)}
    (pipeline / "model_index.json").write_text(json.dumps(parts))
    with pytest.raises(
        ValueError, match=rf"told its prompts by {', '.join(encoders)}, and .* one T5 and one CLIP at most"
    ):
        generate(order(teacher=str(pipeline), text_encoder=None, pooled_encoder=None), quiet)


def test_without_encoders_or_pipeline_the_way_out_is_said(order):
    with pytest.raises(ValueError, match="no text encoder: .* is in no pipeline that has one, so give those"):
        generate(order(text_encoder=None, pooled_encoder=None), quiet)


# ---- interruptions --------------------------------------------------------------------------------------------------


def test_killed_and_started_again_it_writes_the_same_bytes(order):
    whole = generate(order("whole", shard_size=1), quiet).parent
    work = order("broken", shard_size=1)
    child = mp.get_context("fork").Process(target=generate, args=(work, quiet), daemon=True)
    child.start()
    records, end = Path(work.out) / "records", time.monotonic() + 60
    while len(list(records.glob("*.json"))) < 2:
        assert child.is_alive() and time.monotonic() < end, "the work was over before it could be killed"
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not (Path(work.out) / "manifest.json").exists()
    made = (Path(work.out) / "shard-000000.tar").stat().st_mtime_ns
    with pytest.raises(FileNotFoundError, match="is unfinished: give the same python -m data.generate command again"):
        Latents(work.out)
    generate(work, quiet)
    assert contents(Path(work.out)) == contents(whole)
    assert (Path(work.out) / "shard-000000.tar").stat().st_mtime_ns == made  # finished shards are not made again


def test_what_is_made_is_not_looked_at_again(order, teacher, tmp_path):
    """Encoders whose weights are gone would be missed by whoever loads them."""
    copies = {}
    for name in ("text_encoder", "pooled_encoder"):
        shutil.copytree(getattr(order(), name), tmp_path / name)
        copies[name] = str(tmp_path / name)
    work = order(**copies)
    generate(work, quiet)
    weights = [tmp_path / name / "model.safetensors" for name in copies]
    for file in weights:  # of the same size and time, and no model
        before = file.stat()
        file.write_bytes(bytes(before.st_size))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    said: list[str] = []
    assert generate(replace(work, batch=1, processes=0), said.append) == Path(work.out) / "manifest.json"
    assert said == [f"{work.out}: all 5 images are there"]
    for change in ({"seed": 1}, {"prompts": "composed:5"}):
        with pytest.raises(SafetensorError):  # which reads them again, to tell what differs
            generate(replace(work, **change), quiet)
    (Path(work.out) / "shard-000001.tar").unlink()
    with pytest.raises(SafetensorError):
        generate(work, quiet)


def test_another_teacher_of_the_same_name_is_refused(order, tmp_path):
    work = order(teacher=str(flux(tmp_path / "mine")))
    generate(work, quiet)
    flux(tmp_path / "mine", seed=1)
    with pytest.raises(ValueError, match="cache was begun with generated.teacher="):
        generate(work, quiet)


def test_composed_prompts_are_counted_in_the_manifest(order):
    made = json.loads(generate(order(prompts="composed:2", long="cut"), quiet).read_text())
    assert made["count"] == made["generated"]["prompts"]["count"] == 2 and made["sources"]["prompts"] == "composed:2"
    with pytest.raises(ValueError, match="begun with generated.prompts.count=2, this command has 3"):
        generate(order(prompts="composed:3", long="cut"), quiet)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.slow  # each process imports torch and diffusers anew
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_command_leaves_no_process_at_work(order, number):
    work = order(shard_size=1, steps=200, batch=1, processes=2)
    names = (
        "teacher",
        "prompts",
        "out",
        "text_encoder",
        "pooled_encoder",
        "max_tokens",
        "steps",
        "processes",
        "device",
    )
    words = [f"{name}={getattr(work, name)}" for name in (*names, "shard_size", "batch")]
    command = subprocess.Popen([sys.executable, "-m", "data.generate", *words], start_new_session=True)
    end = time.monotonic() + 120
    while not list(Path(work.out).glob(".shard-*")):  # at work
        assert command.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    command.send_signal(number)
    assert command.wait(60) == (143 if number == signal.SIGTERM else -9)
    while any(_session(process) == command.pid for process in Path("/proc").glob("[0-9]*")):
        assert time.monotonic() < end, "a process outlived its command"
        time.sleep(0.1)


def _session(process: Path) -> int:
    try:
        state, _, _, session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return 0
    return 0 if state == "Z" else int(session)


def test_ranks_share_the_work_and_write_the_same_bytes(order):
    whole = generate(order("whole"), quiet).parent
    assert generate(order("shared", rank=1, world=2), quiet) is None
    assert contents(generate(order("shared", rank=0, world=2), quiet).parent) == contents(whole)


@pytest.mark.slow  # each process imports torch and diffusers anew
def test_processes_share_the_work(order):
    whole = generate(order("whole"), quiet).parent
    spread = generate(order("spread", processes=2), quiet).parent
    assert contents(spread) == contents(whole)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_cache_made_otherwise_than_expected_is_refused(order, teacher, tmp_path):
    out = str(generate(order(guidance=2.0), quiet).parent)
    Latents(out, generated_by=str(teacher), guidance=2.0, steps=3, shift=2.0)
    Latents(out, generated_by=teacher_hash(teacher))
    other = flux(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"cache was generated with teacher=\w{12}\.\.\., expected is \w{12}\.\.\."):
        Latents(out, generated_by=str(other))
    for name, value in (("guidance", 3.5), ("steps", 4), ("shift", 1.0)):
        with pytest.raises(ValueError, match=f"cache was generated with {name}=.*, expected is {value}"):
            Latents(out, **{name: value})


def test_latents_of_real_images_are_no_teachers(job, folder, teacher):
    from data.making.precomputer import precompute

    out = precompute(job(folder), quiet).parent
    with pytest.raises(ValueError, match="latents holds no generated data"):
        Latents(str(out), generated_by=str(teacher))


def test_the_hash_is_of_the_weights_and_not_of_the_folder(teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "moved")
    assert teacher_hash(tmp_path / "moved") == teacher_hash(teacher)
    assert teacher_hash(flux(tmp_path / "other", seed=1)) != teacher_hash(teacher)
    with pytest.raises(FileNotFoundError, match="no artifact at"):
        teacher_hash(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "change,name",
    [
        ({"guidance": 4.0}, "generated.guidance=3.5"),
        ({"steps": 4}, "generated.steps=3"),
        ({"seed": 1}, "generated.seed=0"),
        ({"padding": "zeros"}, "text.padding=states"),
    ],
)
def test_a_folder_begun_with_other_settings_is_refused(order, change, name):
    generate(order(), quiet)
    with pytest.raises(ValueError, match=f"cache was begun with {name}, this command has .*: choose another out="):
        generate(order(**change), quiet)


def test_prompts_that_are_none_are_refused(order, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"prompts=.*gone\.txt is no file"):
        generate(order(prompts=str(tmp_path / "gone.txt")), quiet)
    for name, content, message in (
        ("empty.txt", "\n \n", "is empty: give one prompt per line"),
        ("bad.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', 'bad.jsonl, line 2: expected {"prompt": "..."}'),
        ("number.jsonl", '{"prompt": 3}\n', "line 1: the prompt is 3, expected words"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            generate(order(prompts=str(tmp_path / name)), quiet)


def test_prompts_with_names_of_their_own(order, tmp_path):
    (tmp_path / "some.jsonl").write_text('{"prompt": "red disc", "id": "x7"}\n\n{"prompt": "disc"}\n')
    split = Latents(str(generate(order(prompts=str(tmp_path / "some.jsonl")), quiet).parent)).train()
    assert [split.tars.json(i)["prompt"] for i in range(2)] == ["x7", "3"]


def test_long_prompts_are_counted_or_cut(order):
    with pytest.raises(ValueError, match=r"2 of 5 prompts have more than 3 tokens \(prompt 2 has 4\)"):
        generate(order(max_tokens=3), quiet)
    data = Latents(str(generate(order(max_tokens=3, long="cut"), quiet).parent))
    assert data.train().sample(3, 0)["text"].shape == (3, 8)


def test_what_does_not_fit_the_teacher_is_refused_before_anything_is_made(order, tmp_path, t5, clip, vae):
    with pytest.raises(FileNotFoundError, match="no artifact at .*gone"):
        generate(order(teacher=str(tmp_path / "gone")), quiet)
    with pytest.raises(ValueError, match="cannot be given prompts .*: flux takes text embeddings of width 8, got 12"):
        generate(order(text_encoder=str(clip), max_tokens=4, long="cut"), quiet)
    with pytest.raises(ValueError, match=r"cannot be given prompts .*: flux needs condition\.pooled, which is missing"):
        generate(order(pooled_encoder=None), quiet)
    wide = flux(tmp_path / "wide", in_channels=48)
    with pytest.raises(ValueError, match="makes latents of 12 channels, the VAE .* has 4"):
        generate(order(teacher=str(wide), vae=str(vae)), quiet)
    spec = DiTConfig(input_size=8, in_channels=4, patch_size=2, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    edit.save(spec.build(), tmp_path / "dit")
    with pytest.raises(ValueError, match="dit cannot be given prompts with these encoders: dit is class-conditional"):
        generate(order(teacher=str(tmp_path / "dit")), quiet)
    with pytest.raises(ValueError, match="makes no latents of 4x7x7: choose another size"):
        generate(order(size=7), quiet)
    with pytest.raises(ValueError, match="DDIMSolver integrates a noise"):
        generate(order(solver="ddim"), quiet)
    assert not Path(order().out).exists()


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_says_what_to_type_next(order, capsys):
    given = order()
    names = ("teacher", "prompts", "out", "text_encoder", "pooled_encoder", "max_tokens", "steps", "device")
    words = [f"{name}={getattr(given, name)}" for name in names]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "5 of 5 images of flux -> latents 4x8x8 float16, euler 3 steps, guidance 3.5, shift 2" in said
    assert f"next: python train.py data=latents data.set.path={given.out} data.set.generated_by={given.teacher}" in said
    assert main([*words, "seed=1"]) == 1
    assert "error: " in (said := capsys.readouterr().err) and "generated.seed=0" in said and "Traceback" not in said


@pytest.mark.parametrize(
    "words,message",
    [
        ("teacher=a prompts=b", "out is missing: out=<folder to write"),
        ("teacher=a prompts=b out=c gudance=2", "there is no key 'gudance': did you mean guidance?"),
        ("teacher=a prompts=b out=c steps=many", "steps: expected a whole number, got 'many'"),
        ("teacher=a prompts=b out=c rank=1", "there is no key 'rank'"),
        ("teacher", "'teacher' is no setting: write key=value"),
        ("teacher=a teacher=b", "teacher is given twice"),
    ],
)
def test_a_mistyped_command_is_refused_in_one_sentence(words, message, capsys):
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err


def test_settings_that_make_no_sense_are_refused():
    assert parse("teacher=a prompts=b out=c shift=null guidance=2".split())["shift"] is None
    base = {"teacher": "a", "prompts": "b", "out": "c", "text_encoder": "d"}
    for change, message in (
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"processes": -1}, "processes must be at least 0, got -1"),
        ({"solver": "rk4"}, "solver is one of euler, .*, got 'rk4'"),
        ({"shift": 0.0}, "shift must be positive"),
        ({"shift": float("nan")}, "shift must be a finite number or None, got nan"),
        ({"guidance": float("nan")}, "guidance must be a finite number, got nan"),
        ({"guidance": -1.0}, "guidance must be at least 0, got -1"),
        ({"steps": 99_999_999}, "steps must be at most 10000, got 99999999"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 2**32}, "seed must be at most 4294967295, got 4294967296"),
        ({"size": 10**9}, "size must be at most 65536 or None, got 1000000000"),
        ({"batch": True}, "batch must be a whole number, got True"),
        ({"points": -1}, "points must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Request(**{**base, **change})


@pytest.mark.parametrize("device", ["cuda:99", "meta", "nonsense"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(device, tmp_path, capsys):
    from data import precompute

    words = ["teacher=/nowhere", "prompts=/nowhere", f"out={tmp_path / 'out'}", f"device={device}"]
    assert main(words) == 1
    assert f"error: device={device} is not on this machine, which has cpu" in capsys.readouterr().err
    words = ["--images", "/nowhere", "--out", str(tmp_path / "out"), "--vae", "/nowhere", "--device", device]
    assert precompute.main(words) == 1
    assert f"error: device={device} is not on this machine, which has cpu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_answers_at_once():
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "data.generate", "--help"], capture_output=True)
    assert done.returncode == 0 and b"pooled_encoder" in done.stdout and b"torch" not in done.stderr


def test_the_embedded_world_needs_no_downloads(tmp_path):
    """Its encoders are ordinary folders; its codec decodes what its teacher makes, and its reader checks it."""
    from data.sets.shapes import Shapes
    from data.sets.toy_text import LENGTH, ToyText

    encoders = ToyText()
    folders = encoders.write(tmp_path / "text")
    sizes = {"in_channels": 48, "joint_attention_dim": 64, "pooled_projection_dim": 64}
    plain = edit.load(flux(tmp_path / "plain", **sizes))
    world = {"_target_": "data.sets.shapes.Shapes", "count": 8, "held": 4}
    teacher = edit.save(plain.denoiser, tmp_path / "toy", sampler=plain.sampler, data=world)
    prompts = ["a red circle above a blue square", "three small green crosses"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    work = Request(
        teacher=str(teacher),
        prompts=str(tmp_path / "prompts.txt"),
        out=str(tmp_path / "cache"),
        text_encoder=str(folders["text_encoder_2"]),
        pooled_encoder=str(folders["text_encoder"]),
        max_tokens=LENGTH,
        padding="zeros",
        steps=2,
        dtype="float32",
        device="cpu",
    )
    data = Latents(str(generate(work, quiet).parent))
    told, null = encoders(prompts), encoders.null()
    for k in range(2):
        sample = data.train().sample(k, 0)
        assert sample["x"].shape == (12, 8, 8) and torch.equal(sample["text_mask"], told.mask[k])
        for name, value in (("text", told.text[k]), ("pooled", told.pooled[k])):
            # 1e-5: sentences of other lengths are padded to other lengths, which sum in another order
            torch.testing.assert_close(sample[name], value, rtol=1e-5, atol=1e-5)
    assert data.null is not None and torch.equal(data.null["text_mask"], null["text_mask"])
    torch.testing.assert_close(data.null["text"], null["text"], rtol=1e-5, atol=1e-5)
    x = torch.stack([data.train().sample(k, 0)["x"] for k in range(2)])
    assert data.to_frames(x).shape == (2, 1, 32, 32, 3)
    assert (tmp_path / "cache" / "samples.png").exists()
    assert isinstance(data.world, Shapes) and len(data.world.heldout().captions) == 4
    half = generate(replace(work, out=str(tmp_path / "half"), dtype="float16"), quiet).parent
    assert isinstance(Latents(str(half)).world, Shapes)
    other = generate(replace(work, out=str(tmp_path / "states"), padding="states"), quiet).parent
    assert Latents(str(other)).world is None  # its prompts were told otherwise


def test_what_is_generated_is_not_written_where_it_is_read_from(order, teacher, t5, tmp_path):
    before = sorted(teacher.rglob("*"))
    for out in (teacher, teacher / "cache", t5):
        with pytest.raises(ValueError, match="is where .* is read from: choose another out="):
            generate(replace(order(), out=str(out)), quiet)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file cannot be written: .* is no folder; correct out="):
        generate(order("file"), quiet)
    assert sorted(teacher.rglob("*")) == before


def test_a_damaged_manifest_is_written_anew_by_the_same_command(order):
    path = generate(order(), quiet)
    whole = path.read_bytes()
    for damage in (b"{", b"[]", whole.replace(b'"seed": 0', b'"seed": 1'), whole[:-40]):
        path.write_bytes(damage)
        generate(order(), quiet)
        assert path.read_bytes() == whole


def test_the_next_command_finds_a_folder_of_any_name(teacher, t5, clip, order, tmp_path, capsys):
    import shlex

    from hydra import compose, initialize_config_dir

    from recipes.config.sources import register

    register()
    given = order("l [v2], it's")
    words = [f"{k}={getattr(given, k)}" for k in ("teacher", "prompts", "out", "text_encoder", "pooled_encoder")]
    assert main([*words, "max_tokens=8", "steps=1", "device=cpu"]) == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next: "))
    configs = Path(__file__).parents[3] / "configs"
    with initialize_config_dir(version_base="1.3", config_dir=str(configs)):
        told = compose("train", shlex.split(said)[3:]).data.set
    assert (told.path, told.generated_by) == (given.out, given.teacher)
    assert len(Latents(told.path, generated_by=told.generated_by).train()) == len(PROMPTS)
