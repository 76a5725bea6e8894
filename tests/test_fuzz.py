"""Hundreds of command lines and damaged files, drawn from a seed: each is answered in one sentence that names it.

Slow. Another seed or number: EDIT_FUZZ_SEED=7 EDIT_FUZZ_COUNT=1000 pytest -m slow tests/test_fuzz.py
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from damage import BYTES, changed, huge
from diffusers import AutoencoderKL

import edit
from benchmarks.forked import python
from edit.backbones.dit import DiTConfig
from edit.sampling import Sampler
from edit.solvers import Euler
from edit.tuning.lora import LoRA
from recipes.config.errors import UserError

sys.path += [str(Path(__file__).parent / "data")]
from samples import caption, png, write_tar  # noqa: E402
from small_runs import train as train_here  # noqa: E402

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SEED = int(os.environ.get("EDIT_FUZZ_SEED", "0"))
COUNT = int(os.environ.get("EDIT_FUZZ_COUNT", "330"))
LIMIT = 60  # seconds; the longest allowed line trains one step of a tiny model

TINY = "backbone=dit_tiny backbone.input_size=8 backbone.in_channels=1 backbone.hidden_size=16 backbone.depth=2"
SHORT = "trainer.max_steps=1 evaluate=null preview.every=0 data.batch_size=2 optimizer.warmup=0 checkpoint.every=1"


@dataclass(frozen=True)
class Line:
    """A command with one thing wrong.

    Args:
        words: of the command
        culprit: what the answer must name; None: any answer in a sentence will do, success as well
    """

    words: tuple[str, ...]
    culprit: str | None


# ---- what is drawn ---------------------------------------------------------------------------------------------------

# by kind of value, what cannot be right
WRONG: dict[str, tuple[str, ...]] = {
    "count": ("nan", "inf", "-1", "2.5", "abc", "true", "[1]", "{a: 1}", "1e300", "'4'"),
    "number": ("nan", "inf", "-inf", "abc", "true", "[1, 2]", "{a: 1}", "-3"),
    "seed": ("nan", "-1", "2.5", "abc", "true", "99999999999999999999999"),
    "share": ("nan", "1.5", "-0.1", "abc", "true", "[0.5]"),
    "switch": ("maybe", "3", "[true]", "nan"),
    "choice": ("nope", "3", "[a]", "none_of_these"),
}
TRAIN = {
    "trainer.max_steps": "count",
    "trainer.accumulate": "count",
    "trainer.num_nodes": "count",
    "trainer.compile": "switch",
    "trainer.strategy": "choice",
    "trainer.precision": "choice",
    "trainer.accelerator": "choice",
    "optimizer.lr": "number",
    "optimizer.eps": "number",
    "optimizer.weight_decay": "number",
    "optimizer.warmup": "count",
    "optimizer.kind": "choice",
    "optimizer.schedule": "choice",
    "optimizer.end": "share",
    "optimizer.until": "share",
    "ema.decay": "share",
    "ema.ramp": "switch",
    "checkpoint.every": "count",
    "checkpoint.keep": "count",
    "preview.count": "count",
    "log_every": "count",
    "label_drop": "share",
    "seed": "seed",
    "strata": "count",
    "data.batch_size": "count",
    "data.workers": "count",
    "sampler.guidance": "number",
    "sampler.solver.steps": "count",
    "sampler.solver.shift": "number",
    "objective.time.mean": "number",
    "objective.time.std": "number",
    "backbone.depth": "count",
    "backbone.hidden_size": "count",
    "backbone.num_heads": "count",
    "backbone.time": "choice",
    "teacher.placement": "choice",
    "critic.start": "choice",
    "critic.follow": "share",
}
SIGNED = {"objective.time.mean"}  # may be negative
GROUPS = ("backbone", "data", "objective", "sampler", "edits", "trainer", "logger", "experiment")
EVIL = (
    "torch.load",
    "os.system",
    "torch.distributed.run.main",
    "data.generate.main",
    "builtins.eval",
    "edit.measuring.cost.Path",
    "recipes.training.run",
    "torch.hub.load",
    "subprocess.Popen",
    "nowhere.Nothing",
)
# for the other commands: words that begin a line, and what its keys take
KEYED: dict[str, tuple[str, dict[str, str]]] = {
    "eval": (
        "eval.py artifact={artifact} out=report features=none",
        {"n": "count", "batch": "count", "rounds": "count", "steps": "count", "seed": "seed"},
    ),
    "cost": (
        "-m recipes.cost backbone=dit_tiny",
        {"batch": "count", "backbone.depth": "count", "backbone.num_heads": "count", "sampler.steps": "count"},
    ),
    "plan": (
        "-m recipes.plan",
        {"devices": "count", "gpu": "number", "text": "count", "peak": "number", "mfu": "number"},
    ),
    "generate": (
        "-m data.generate teacher={artifact} prompts=composed:2 out=made",
        {"steps": "count", "images": "count", "seed": "seed", "size": "count", "batch": "count", "guidance": "number"},
    ),
    "prune": (
        "-m recipes.prune model={artifact} by=random out=pruned",
        {"candidates": "count", "samples": "count", "batch": "count", "seed": "seed"},
    ),
}
# whole words that are wrong, with what the answer must name
EXPORT = (
    ("dtype=fp8", "fp8"),
    ("format=onnx", "onnx"),
    ("max_shard_size=0", "max_shard_size"),
    ("push=x", "push"),
    ("artifact=/", None),
    ("artifact={empty}", None),
    ("out=", "out"),
    ("artifcat=x", "artifcat"),
)
PRECOMPUTE = (
    ("--size", "-1", "size"),
    ("--size", "abc", "size"),
    ("--batch", "0", "batch"),
    ("--bucket-ratio", "1e300", "bucket"),
    ("--bucket-ratio", "nan", "bucket"),
    ("--out", "", "out"),
    ("--out", "{images}", None),
    ("--device", "cuda", "cuda"),
    ("--workers", "-1", "workers"),
    ("--shard-size", "0", "shard"),
    ("--vae", "nowhere", "nowhere"),
)
CLAIM = (
    ("nope", "nope"),
    ("flux_tiny_distill seeds=[-1]", "seed"),
    ("flux_tiny_distill seeds=abc", "seeds"),
    ("flux_tiny_distill sedes=[0]", "sedes"),
)
NOISY = (
    "eval.py artifact={artifact} n=2",
    "-m recipes.cost backbone=dit_tiny",
    "-m recipes.plan",
    "-m recipes.export out=made",
)
NOISE = (
    *("=", "+=", "foo", "++", "~", "a.b.c=", "=3", "trainer.=1", "x=${y}", "name=${x}", "-x", "--nope", "seed=["),
    *("a b", "'", '"', "n=${x}", "artifact=", "name=", "\udcff=1", "x=\x01"),
)
KINDS = (*("train",) * 6, "group", "target", "noise", "export", "precompute", "claim", *KEYED)


def typo(key: str, r: random.Random) -> str:
    """Two letters of the last part swapped, or one dropped or doubled."""
    *head, last = key.split(".")
    i = r.randrange(max(1, len(last) - 1))
    swapped = last[:i] + last[i : i + 2][::-1] + last[i + 2 :]
    changed = r.choice((swapped, last[:i] + last[i + 1 :], last[: i + 1] + last[i:]))
    return ".".join((*head, changed if changed not in ("", last) else last + "x"))


def mistakes(key_kinds: dict[str, str], base: Callable[[str], tuple[str, ...]], r: random.Random) -> Line:
    """A value that a key cannot have, or a key that is not there."""
    key = r.choice(sorted(key_kinds))
    kind = key_kinds[key]
    if r.random() < 0.25:
        wrong = typo(key, r)
        return Line((*base(key), f"{wrong}=1"), wrong.split(".")[-1])
    values = [v for v in WRONG[kind] if not (v == "-3" and key in SIGNED)]
    return Line((*base(key), f"{key}={r.choice(values)}"), key.split(".")[-1])


def train(key: str = "") -> tuple[str, ...]:
    words = [*TINY.split(), *SHORT.split(), "name=fuzz"]
    return ("train.py", *(w for w in words if w.partition("=")[0] != key))


def lines(r: random.Random, places: dict[str, str]) -> Iterator[Line]:
    def put(words: str) -> tuple[str, ...]:
        return tuple(words.format(**places).split())

    while True:
        kind = r.choice(KINDS)
        if kind == "train":
            yield mistakes(TRAIN, train, r)
        elif kind in KEYED:
            words, keys = KEYED[kind]
            yield mistakes(keys, lambda key, words=words: put(words), r)
        elif kind == "group":
            group, name = r.choice(GROUPS), r.choice(("nope", "null", "3", "../../x", "dit_digit", "[a]"))
            none = group in ("experiment", "edits", "logger") and name == "null"  # which is none, and right
            culprit = f"no {group} named" if name in ("null", "nope") else group
            yield Line((*train(), f"{group}={name}"), None if none else culprit)
        elif kind == "target":
            place = r.choice(("objective", "sampler", "sampler.solver", "data.set", "backbone"))
            yield Line((*train(), f"{place}._target_={r.choice(EVIL)}"), place.split(".")[-1])
        elif kind == "noise":
            base = r.choice((train(), *map(put, NOISY)))
            yield Line((*base, r.choice(NOISE)), None)
        elif kind == "export":
            word, culprit = r.choice(EXPORT)
            key = word.partition("=")[0]
            words = [w for w in put("artifact={artifact} out=exported") if w.partition("=")[0] != key]
            yield Line(("-m", "recipes.export", *words, word.format(**places)), culprit)
        elif kind == "precompute":
            option, value, culprit = r.choice(PRECOMPUTE)
            given = {"--images": places["images"], "--out": "latents", "--vae": "nowhere"}
            given[option] = value.format(**places)
            yield Line(("-m", "data.precompute", *(w for pair in given.items() for w in pair)), culprit)
        else:
            words, culprit = r.choice(CLAIM)
            yield Line(("-m", "benchmarks.claim", *words.split()), culprit)


# ---- command lines ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """A folder that looks like a clone, with an artifact and a few pictures."""
    from PIL import Image

    import data.generate  # noqa: F401  what each command would import again
    import edit.artifacts.export  # noqa: F401
    import recipes.prune  # noqa: F401
    import recipes.report.evaluate
    import recipes.training  # noqa: F401

    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("train.py", "eval.py", "configs", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    torch.manual_seed(0)
    dit = DiTConfig(input_size=8, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=10).build()
    data = {"_target_": "data.sets.digits.Digits"}
    edit.save(dit.eval(), folder / "artifact", sampler=Sampler(Euler(2)), data=data)
    (folder / "images/a").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(folder / "images/a/b.png")
    (folder / "empty").mkdir()
    return {"root": str(folder), "artifact": "artifact", "images": "images", "empty": "empty"}


def test_every_command_line_with_a_mistake_is_refused_in_a_sentence_that_names_it(places):
    r, root = random.Random(SEED), Path(places["root"])
    drawn = lines(r, places)
    faults: Counter = Counter()
    examples = []
    for _ in range(COUNT):
        line = next(drawn)
        done = python(*line.words, cwd=root, timeout=LIMIT)
        said = done.stderr + done.stdout
        fault = None
        if done.returncode == -9:
            fault = "hangs"
        elif "Traceback" in said:
            fault = "traceback"
        elif line.culprit is not None and done.returncode == 0:
            fault = "accepted"
        elif line.culprit is not None and line.culprit.lower() not in said.lower():
            fault = "unnamed"
        elif done.returncode != 0 and not said.strip():
            fault = "silent"
        if fault:
            faults[fault] += 1
            examples.append(f"{fault}: {' '.join(line.words)}\n    {said.strip()[-400:]}")
        shutil.rmtree(root / "runs", ignore_errors=True)
    assert not faults, f"{dict(faults)} of {COUNT}\n" + "\n".join(examples[:40])


# ---- damaged files ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """Files that are read together.

    Args:
        folder: with all of them, whole
        files: which of them are damaged, as patterns
        read: reads a copy of the folder to the end; what it returns tells whether the content is the same
    """

    folder: Path
    files: tuple[str, ...]
    read: Callable[[Path], object]


def digest(tensors: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].numpy().tobytes())
    return total.hexdigest()


def read_artifact(folder: Path) -> object:
    artifact = edit.load(folder)
    return digest(artifact.denoiser.state_dict()), artifact.sampler, artifact.objective, str(artifact.data)


def read_checkpoint(folder: Path) -> object:
    from recipes.runtime.checkpoint_files import newest

    path = newest(folder)
    assert path is not None
    return path.read_bytes()  # the older one is right, too, if the newer is named


def read_latents(folder: Path) -> object:
    from data.sets.latents import Latents

    split = Latents(str(folder), verify="full").train()
    return digest({str(i): split.sample(i, 0)["x"] for i in range(len(split))})


def read_pictures(folder: Path) -> object:
    """Pictures and text have no checksums: damage that makes another picture or word cannot be told from one."""
    from data.sets.image_folder import ImageFolder

    split = ImageFolder(str(folder), 16, captions=True).train()
    for i in range(len(split)):
        split.sample(i, 0)
    return None


def read_shards(folder: Path) -> object:
    from data.sets.image_shards import ImageShards

    split = ImageShards(str(folder), 16, captions=True).train()
    for i in range(len(split)):
        split.sample(i, 0)
    return None


def read_the_prompts(folder: Path) -> object:
    from data.making.prompts import read_prompts

    read_prompts(str(folder / "prompts.jsonl"))
    return None


@pytest.fixture(scope="module")
def subjects(tmp_path_factory) -> dict[str, Subject]:
    from data.making.job import Job
    from data.making.precomputer import precompute

    place = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    dit = DiTConfig(input_size=8, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=10).build()
    edit.apply(dit, {"lora": LoRA(rank=2)})
    edit.save(dit.eval(), place / "artifact", sampler=Sampler(Euler(2)), data={"_target_": "data.sets.digits.Digits"})
    train_here(place / "runs", "name=a", "trainer.max_steps=2", "checkpoint.every=1")
    for number in range(6):
        kind = place / "pictures" / "ab"[number % 2]
        kind.mkdir(parents=True, exist_ok=True)
        (kind / f"{number}.png").write_bytes(png(number))
        (kind / f"{number}.txt").write_text(caption(number))
    (place / "shards").mkdir()
    samples = [
        {"__key__": str(n), "png": png(n), "cls": str(n % 2).encode(), "json": json.dumps({"caption": caption(n)})}
        for n in range(6)
    ]
    write_tar(place / "shards" / "a.tar", [{**s, "json": s["json"].encode()} for s in samples])
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=16).save_pretrained(
        place / "vae"
    )
    job = {"images": str(place / "pictures"), "vae": str(place / "vae"), "size": 16, "batch": 2, "workers": 1}
    precompute(Job(out=str(place / "latents"), shard_size=3, **job), lambda _: None)
    (place / "prompts").mkdir()
    (place / "prompts" / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": caption(n)}) + "\n" for n in range(6))
    )
    checkpoint = place / "runs" / "a" / "checkpoints"
    return {
        "artifact": Subject(place / "artifact", ("*.json", "*.safetensors"), read_artifact),
        "checkpoint": Subject(checkpoint, ("*.ckpt",), read_checkpoint),
        "latents": Subject(place / "latents", ("manifest.json", "*.tar"), read_latents),
        "pictures": Subject(place / "pictures", ("*/*.png", "*/*.txt"), read_pictures),
        "shards": Subject(place / "shards", ("*.tar",), read_shards),
        "prompts": Subject(place / "prompts", ("*.jsonl",), read_the_prompts),
    }


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


@pytest.mark.filterwarnings("ignore")
def test_every_damaged_file_ends_in_what_was_saved_or_in_a_sentence_that_names_it(subjects, tmp_path, capfd):
    r, faults, examples = random.Random(SEED), Counter[str](), []
    whole = {name: subject.read(subject.folder) for name, subject in subjects.items()}
    known = {name: {value} for name, value in whole.items()}
    for path in subjects["checkpoint"].folder.glob("*.ckpt"):
        known["checkpoint"].add(path.read_bytes())
    for number in range(COUNT):
        name = r.choice(sorted(subjects))
        subject, copy = subjects[name], tmp_path / str(number)
        shutil.copytree(subject.folder, copy)
        path = r.choice(sorted(p for pattern in subject.files for p in copy.glob(pattern)))
        way = r.choice((*BYTES, changed, huge) if path.suffix == ".json" else BYTES)
        way(path, r)
        fault = None
        try:
            with limited(LIMIT):
                if subject.read(copy) not in known[name]:
                    fault = "silent"
        except TimeoutError:
            fault = "hangs"
        except (ValueError, OSError, UserError) as error:
            text = str(error)
            if "\n" in text or not any(part in text for part in (path.name, path.stem, str(copy))):
                fault = f"unnamed {text[:200]}"
        except Exception as error:
            fault = f"generic {type(error).__name__}: {str(error)[:200]}"
        if fault:
            faults[fault.split()[0]] += 1
            examples.append(f"{fault}: {way.__name__} {name}/{path.relative_to(copy)} ({number})")
        shutil.rmtree(copy)
    assert not faults, f"{dict(faults)} of {COUNT}\n" + "\n".join(examples[:40])
