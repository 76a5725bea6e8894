"""Counted work of LLSA's attention from 1k to 256k tokens, beside dense attention and one level: no clock, no device.

    python -m benchmarks.llsa_cost --out llsa_cost.png

Multiply-accumulates of one head: 2 N M e for products of queries with M keys and of weights with M values
(`LLSA.keys_per_query`), and those of the selection, N_L^2 e at the top and N_l K B e at each level l below. Levels
either grow with N as far as blocks allow (`deepest`), or by the reference's rule, or there is one. The table has the
work over N log2 N, over its value at the first N: of growth as N log N it stays where it is. Tests compare the count
with the work that a model executes.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

from edit.attention.llsa import LLSA, deepest
from recipes.report.drawing import dress, png_of

TOKENS = tuple(2**i for i in range(10, 19))
PUBLISHED = LLSA(dense_below=0)


def work(edit: LLSA, tokens: int, width: int = 64) -> int:
    """Multiply-accumulates of one head of this width, for so many image tokens and nothing else."""
    total = 2 * tokens * edit.keys_per_query(tokens) * width
    levels = edit.depth(tokens)
    sizes = [-(-tokens // edit.block**level) for level in range(levels + 1)]
    if levels:
        total += sizes[levels] ** 2 * width
    for level in range(1, levels):  # a query scores the B children of each key that its parent selected
        total += sizes[level] * min(edit.top_k, sizes[level + 1]) * edit.block * width
    return total


def curves(width: int = 64) -> dict[str, list[int]]:
    """Work by what the levels are, for each of `TOKENS`."""
    block = PUBLISHED.block
    return {
        "dense": [2 * n * n * width for n in TOKENS],
        "one level": [work(replace(PUBLISHED, levels=1), n, width) for n in TOKENS],
        "levels of the reference": [work(PUBLISHED, n, width) for n in TOKENS],
        "levels grow with N": [work(replace(PUBLISHED, levels=deepest(n, block)), n, width) for n in TOKENS],
    }


def relative(values: list[int]) -> list[float]:
    """Work over N log2 N, of the first one: 1 for growth as N log N."""
    each = [v / (n * math.log2(n)) for v, n in zip(values, TOKENS, strict=True)]
    return [e / each[0] for e in each]


def draw(found: dict[str, list[int]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.9), layout="constrained")
    axes = figure.subplots()
    for i, (name, values) in enumerate(found.items()):
        axes.loglog(TOKENS, [v / 1e9 for v in values], "-o", color=f"C{i}", markersize=3, linewidth=1, label=name)
    first = found["levels grow with N"][0] / (TOKENS[0] * math.log2(TOKENS[0]))
    axes.loglog(TOKENS, [first * n * math.log2(n) / 1e9 for n in TOKENS], "--", color="0.5", label="N log N")
    dress(axes, "image tokens", "attention of a head, G MACs")
    axes.legend(fontsize=8)
    path.write_bytes(png_of(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("llsa_cost.png"), help="a picture; its numbers go beside it")
    parser.add_argument("--width", type=int, default=64, help="of a head")
    chosen = parser.parse_args()
    found = curves(chosen.width)
    print("| N | " + " | ".join(found) + " |")
    print("|---" * (len(found) + 1) + "|")
    for i, n in enumerate(TOKENS):
        print(f"| {n} | " + " | ".join(f"{relative(values)[i]:.2f}" for values in found.values()) + " |")
    draw(found, chosen.out)
    numbers = {"tokens": TOKENS, "width": chosen.width, "macs": found}
    chosen.out.with_suffix(".json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"written to {chosen.out} and {chosen.out.with_suffix('.json')}")


if __name__ == "__main__":
    main()
