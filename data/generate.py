"""Let a teacher make the training data of its student: prompts in, shards of latents and text embeddings out.

    python -m data.generate teacher=FLUX.1-dev prompts=prompts.txt out=cache precision=bfloat16 processes=0
    python -m data.generate teacher=runs/teacher prompts=prompts.txt out=cache text_encoder=t5 pooled_encoder=clip
    python train.py data=latents data.set.path=cache data.set.generated_by=runs/teacher

Stop it whenever you like: the same command goes on after the last finished shard, and answers at once when all is made.
"""

from __future__ import annotations

import difflib
import os
import signal
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any, get_args, get_type_hints

from data.names import setting, typed
from edit.inputs.command import guarded
from edit.inputs.limits import Count, Limits, NotNegative, Positive, Seed, Side, Steps, check_numbers

SOLVERS = ("euler", "heun", "dpm", "ddim", "ddpm")
CHOICES = {
    "solver": SOLVERS,
    "padding": ("none", "states", "zeros"),
    "long": ("refuse", "cut"),
    "dtype": ("float16", "float32"),
    "precision": ("float32", "bfloat16", "float16"),
}

SEVERAL = """On several machines, start the same command on each with RANK and WORLD_SIZE set: shards are divided among
them, and the last to finish writes the manifest."""


def key(text: str, default: Any = MISSING) -> Any:
    return field(metadata={"help": text}) if default is MISSING else field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Order:
    """What to generate with what, and how. The fields are the command's keys."""

    teacher: str = key("artifact, run or diffusers folder, or hub id, of a text-conditioned model")
    prompts: str = key(
        "text file with one prompt per line, or .jsonl with a 'prompt' and perhaps an 'id' in each line; or "
        "composed:<count>, so many different ones made of words, for want of such as the student will be given"
    )
    out: str = key("folder to write; one begun with another teacher or other settings is refused")
    text_encoder: str | None = key(
        "T5 or CLIP of transformers, folder or hub id; its token states. Encoders, tokenizers and VAE that are not "
        "named are found where the teacher is, or lies in, a pipeline of FLUX or PixArt",
        None,
    )
    tokenizer: str | None = key("its tokenizer, if it lies elsewhere", None)
    pooled_encoder: str | None = key("CLIP for the pooled embedding, if the text encoder has none", None)
    pooled_tokenizer: str | None = key("its tokenizer, if it lies elsewhere", None)
    max_tokens: Count = key("of the text encoder; the pooled encoder always cuts at its own length", 512)
    padding: str = key(
        "states: prompts are padded to max_tokens and the states of the padding kept, as FLUX and SD3 are trained; "
        "zeros: filled up with zeros; none: real tokens only, for teachers that mask",
        "states",
    )
    long: str = key("prompts of more tokens: refuse, or cut", "refuse")
    vae: str | None = key("the teacher's VAE, folder or hub id: for pictures, and as the identity of the latents", None)
    guidance: NotNegative = key("scale; told to a guidance-distilled teacher, else applied with the empty prompt", 3.5)
    steps: Steps = key("of the solver", 28)
    solver: str = key("euler, heun or dpm; for teachers that predict noise dpm, ddim or ddpm", "euler")
    shift: Positive | None = key(
        "of the times towards noise; null: what the artifact says, else its pipeline's scheduler, for FLUX.1-dev "
        "without one its own rule, else 1",
        None,
    )
    seed: Seed = key("of the noise; image k of the file has noise number k of this seed", 0)
    images: Count = key("per prompt", 1)
    points: Annotated[int, Limits(0, 10_000)] = key(
        "states of each solve to store beside its latent, evenly between noise and sample: for students that learn "
        "from the teacher's paths; with euler or heun, whose steps must be a multiple of points + 1",
        0,
    )
    size: Side | None = key("rows and columns of a latent; null: the teacher's default", None)
    dtype: str = key("stored as: float16 or float32", "float16")
    precision: str = key("the models compute in: float32, bfloat16 or float16", "float32")
    batch: Count = key("images at once", 8)
    shard_size: Count = key("images per shard; an interruption loses at most one shard's work per process", 256)
    processes: Annotated[int, Limits(0, 1024)] = key("spread over the GPUs; 0: one for each GPU of this machine", 1)
    device: str = key("cpu, cuda or gpu, cuda:1, ...; auto: cuda if there is one", "auto")
    rank: int = 0  # of this command among `world` such commands
    world: Count = 1

    def __post_init__(self):
        check_numbers(self)
        for name in ("teacher", "prompts", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give {KEYS[name].metadata['help']}")
        if self.steps % (self.points + 1):
            raise ValueError(
                f"points={self.points} does not divide steps={self.steps} evenly: steps must be a multiple of "
                "points + 1, and 0 stores none"
            )
        if self.points and self.solver not in ("euler", "heun"):
            raise ValueError(f"points={self.points} needs solver euler or heun, got {self.solver}: set points=0")
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank is one of 0 to {self.world - 1} (world={self.world}), got {self.rank}")
        for name, accepted in CHOICES.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} is one of {', '.join(accepted)}, got {getattr(self, name)!r}")


KEYS = {f.name: f for f in fields(Order) if f.metadata}


def parse(words: Sequence[str]) -> dict[str, Any]:
    """`key=value` words as arguments of `Order`.

    Raises:
        ValueError: for a word that is no setting, an unknown or repeated key, a value of another type, a missing key
    """
    hints, given = get_type_hints(Order), {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is no setting: write key=value, such as teacher=runs/teacher")
        if name not in KEYS:
            near = difflib.get_close_matches(name, KEYS, 1)
            raise ValueError(f"there is no key {name!r}: " + (f"did you mean {near[0]}?" if near else "see --help"))
        if name in given:
            raise ValueError(f"{name} is given twice: keep one of {name}={given[name]} and {word}")
        kinds = get_args(hints[name]) or (hints[name],)
        if type(None) in kinds and text in ("null", "none"):
            given[name] = None
            continue
        try:
            given[name] = kinds[0](text)
        except ValueError as error:
            raise ValueError(f"{name}: expected {kinds[0].__name__}, got {text!r}") from error
    if missing := [n for n, f in KEYS.items() if f.default is MISSING and not given.get(n)]:
        raise ValueError(f"{missing[0]} is missing: {missing[0]}=<{KEYS[missing[0]].metadata['help']}>")
    return given


def explained() -> str:
    lines = []
    for name, f in KEYS.items():
        default = "" if f.default is MISSING else f" ({'null' if f.default is None else f.default})"
        text = textwrap.wrap(f.metadata["help"] + default, 96)
        lines += [f"  {name:<18}{text[0]}", *(" " * 20 + t for t in text[1:])]
    return "\n".join(lines)


def number_of(variable: str, default: int) -> int:
    """An environment variable. Raises ValueError if it is set to something else than a whole number."""
    text = os.environ.get(variable, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"the environment says {variable}={text!r}, expected a whole number: unset it") from error


@guarded
def main(words: Sequence[str]) -> int:
    """Returns the exit code: 0, 1 for what could not be done, 2 for a mistyped command, 130 if interrupted."""
    if not words or {"-h", "--help"} & set(words):
        print(f"{__doc__}\nKeys and their defaults\n{explained()}\n\n{SEVERAL}")
        return 0
    try:
        options = parse(words)
        order = Order(**options, rank=number_of("RANK", 0), world=number_of("WORLD_SIZE", 1))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from data.making.generator import generate  # after --help and mistyped keys were answered

    try:
        done = generate(order)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on after the last finished shard", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    words = (setting("data.set.path", order.out), setting("data.set.generated_by", order.teacher))
    if done:
        print("next: " + typed("python", "train.py", "data=latents", *words))
    else:
        print(f"{order.out}: other ranks are still at work")
    return 0


def stop(number: int, _: object) -> None:
    """What a signal does: leave in good order, so that the processes of this command end with it."""
    print("stopped: the same command goes on after the last finished shard", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    for told in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(told, stop)
    sys.exit(main())
