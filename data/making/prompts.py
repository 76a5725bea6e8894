"""The prompts of self-generated data: from a file, or composed of words.

`composed:20000` stands for the first 20,000 of a fixed sequence of different prompts, made of the words below. They let
a run begin without a file. A student learns the prompts that it is trained on, so real work deserves prompts like those
of its use: one per line of a text file, better a hundred thousand than ten.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

from data.plain_text import read_text, words

COMPOSED = "composed:"

MEDIUMS = """a photograph of|a close-up photograph of|a wide-angle photograph of|a black-and-white photograph of|
a watercolour of|an oil painting of|a pencil drawing of|an ink drawing of|a woodcut of|a linocut poster of|
a pastel sketch of|a flat vector illustration of|a children's book illustration of|a clay model of|a paper collage of|
a pixel-art scene of|a 3D rendering of|a still from an animated film of|a stained-glass window of|an embroidery of"""
ATTRIBUTES = """a young|an old|a tall|a tiny|a cheerful|a tired|a curious|a sleepy|an elegant|a shabby|a freckled|
a muddy|a striped|a bright red|a deep blue|a pale green|a golden|a silver|a purple|an orange|a black|a white|a wooden|
a transparent|a furry|a glittering|a dusty|a brave|a grumpy|a dancing"""
SUBJECTS = """fox|owl|elephant|tortoise|octopus|tabby cat|sheepdog|rabbit|horse|parrot|crocodile|hedgehog|bear|penguin|
frog|goldfish|bee|dragon|robot|astronaut|knight|wizard|fisherman|nurse|baker|violinist|gardener|postman|ballerina|
grandmother|schoolboy|mechanic|scarecrow|snowman|teapot|typewriter|bicycle|steam engine|sailing boat|hot-air balloon|
tractor|grandfather clock|cactus|mushroom|apple tree|sunflower|pineapple|birthday cake|castle|lighthouse"""
ACTIONS = """beside a red umbrella|under three paper lanterns|next to a stack of books|in front of a round mirror|
behind a bowl of lemons|between two tall candles|on top of a suitcase|facing the viewer|seen from behind|
seen from far above|seen from below|reflected in a puddle|half hidden by leaves|wrapped in a knitted scarf|
covered with flowers|surrounded by butterflies|with a small bird on top|with a sign that says OPEN|
with the number 7 painted on it|tied to a blue ribbon|balancing on one leg of a chair|casting a long shadow|
leaning against a ladder|in a swarm of soap bubbles|left of a yellow door"""
PLACES = """in a pine forest|in a desert|on a beach|at the bottom of the sea|on a mountain pass|in a wheat field|
in a swamp|on a frozen lake|in a rose garden|in a bamboo grove|by a waterfall|on the moon|in a narrow alley|
on a busy crossroads|at a railway station|on a rooftop|in a harbour|under a stone bridge|at a street market|
in a subway car|in a library|in a kitchen|in a workshop|in a greenhouse|in a cathedral|in a theatre|in a museum hall|
in a laundromat|in an attic|in a laboratory|in a classroom|in front of a plain grey wall"""
LIGHTS = """at dawn|at noon|at sunset|at night under the stars|by moonlight|by candlelight|in thick fog|in heavy rain|
in falling snow|under storm clouds|under neon lights|lit from behind|in soft window light|in a single beam of light|
under harsh studio light|in the light of a campfire"""
# in the order of the sentence
SLOTS = [
    tuple(" ".join(words.split()) for words in slot.split("|"))
    for slot in (MEDIUMS, ATTRIBUTES, SUBJECTS, ACTIONS, PLACES, LIGHTS)
]
TOTAL = math.prod(map(len, SLOTS))


class Prompt(NamedTuple):
    text: str
    id: str  # of the prompt file, else the number of its line, from 1


def read_prompts(spec: str) -> list[Prompt]:
    """The prompts that `prompts=` names: `composed:<count>`, else those of a file.

    Raises:
        FileNotFoundError: if there is no such file
        ValueError: if the file has no prompts or a line that is no prompt, or so many cannot be composed
    """
    return composed(spec) if spec.startswith(COMPOSED) else _read(Path(spec))


def composed(spec: str) -> list[Prompt]:
    """The first prompts of a fixed shuffle of all TOTAL sentences."""
    count = spec.removeprefix(COMPOSED)
    if not (count.isascii() and count.isdigit() and 0 < int(count) <= TOTAL):
        raise ValueError(f"prompts={spec}: expected {COMPOSED}<count>, with a count of 1 to {TOTAL:,}")
    return [Prompt(_sentence(_shuffled(k, TOTAL)), str(k + 1)) for k in range(int(count))]


def _sentence(number: int) -> str:
    words = []
    for slot in SLOTS:
        number, choice = divmod(number, len(slot))
        words.append(slot[choice])
    return " ".join(words)


def _shuffled(k: int, total: int) -> int:
    """Where number k of 0..total-1 goes: a Feistel network over the next power of 4, repeated until it is below total.

    A bijection whatever `_mixed` does, and the same on every machine and Python.
    """
    bits = ((total - 1).bit_length() + 1) // 2
    mask = (1 << bits) - 1
    while True:
        left, right = k >> bits, k & mask
        for turn in range(4):
            left, right = right, left ^ (_mixed(right, turn) & mask)
        k = left << bits | right
        if k < total:
            return k


def _mixed(x: int, turn: int) -> int:
    """A 32-bit hash: multiply and shift, twice."""
    x = (x + 1 + turn * 0x9E3779B9) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


def _read(path: Path) -> list[Prompt]:
    """The prompts of a text file, one per line, or of a .jsonl file; empty lines count for nothing.

    Lines end as `plain_text.read_text` says; a tab or U+2028 inside a prompt belongs to it, space around it does not.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"prompts={path} is no file: give a text file with one prompt per line, a .jsonl, or {COMPOSED}<count>"
        )
    kind = path.suffix.lower()
    if kind == ".json":
        raise ValueError(f"prompts={path} is a .json: give a .jsonl, with one object in each line, or a text file")
    prompts = []
    for number, line in enumerate(read_text(path.read_bytes(), f"prompts={path}").split("\n"), 1):
        line = line.strip()
        if line and kind == ".jsonl":
            try:
                entry = json.loads(line)
                text, name = entry["prompt"], entry.get("id")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f'{path}, line {number}: expected {{"prompt": "..."}}, got {line:.60}') from error
            text = words(text, f"{path}, line {number}: the prompt")
            if not text:
                raise ValueError(f"{path}, line {number}: the prompt is empty, expected words")
            prompts.append(Prompt(text, str(number if name is None else name)))
        elif line:
            prompts.append(Prompt(line, str(number)))
    if not prompts:
        raise ValueError(f"prompts={path} is empty: give one prompt per line")
    return prompts
