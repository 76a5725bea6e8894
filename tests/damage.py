"""Ways to damage a file, drawn from a random number generator."""

import json
import random
from pathlib import Path

HUGE = (10**9, -(10**18), 10**400, 1e308, float("inf"), float("nan"))
ODD = (None, True, "text", [], {}, [[]], {"a": []}, "", 0, -1, 1.5, [None], {"_target_": 3}, {"_target_": "os.system"})


def flip(path: Path, chance: random.Random, count: int = 1) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(count):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def flips(path: Path, chance: random.Random) -> None:
    flip(path, chance, 64)


def cut(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(1, len(content))])


def grown(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + chance.randbytes(100))


def zeros(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    length = max(1, len(content) // 3)
    start = chance.randrange(len(content) - length)
    content[start : start + length] = bytes(length)
    path.write_bytes(content)


def empty(path: Path, chance: random.Random) -> None:
    path.write_bytes(b"")


def renamed(path: Path, chance: random.Random) -> None:
    path.rename(path.with_name(f"{path.name}.bak"))


def folder(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


def swapped(path: Path, chance: random.Random) -> None:
    """With another of its kind."""
    other = chance.choice(sorted(p for p in path.parent.glob(f"*{path.suffix}") if p != path))
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def changed(path: Path, chance: random.Random, values: tuple = ODD) -> None:
    """One value of a JSON file, anywhere in it, becomes another."""
    content = json.loads(path.read_text())
    places = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(content)
    node, key = chance.choice(places)
    node[key] = chance.choice(values)
    path.write_text(json.dumps(content))


def huge(path: Path, chance: random.Random) -> None:
    changed(path, chance, HUGE)


BYTES = (flip, flips, cut, grown, zeros, empty, renamed, folder)
