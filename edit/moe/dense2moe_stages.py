"""What a stage of Dense2MoE takes over from the run before it, and what it refuses.

A ranking comes before stage "shared", "shared" before "experts", "experts" before "blocks". Artifacts tell what they
are: by their edits, whose fields are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from edit.denoiser import Denoiser
from edit.moe.taylor import TaylorRanking
from edit.state_dicts import check_layout

STAGES = ("shared", "experts", "blocks")
SAME = ("r_s", "n", "r_n", "gate", "gate_scale", "units")  # of all stages of a model


class Staged(Protocol):
    """What a stage of `edit.moe.dense2moe.Dense2MoE` is asked here."""

    name: str
    stage: str
    start: str | None

    def replaces(self, denoiser: Denoiser) -> Sequence[str]: ...


def ranking_of(new: Staged) -> nn.Module:
    """The scores that a stage "shared" begins with.

    Raises:
        ValueError: if `start` has none
        FileNotFoundError: if it is no artifact
    """
    from edit.artifacts.checkpoint import load, skeleton

    who, cure = f"{new.name} (Dense2MoE)", "give the run of recipe=calibrate edits=taylor_ranking"
    if new.start is None:
        raise ValueError(f"{who}: ranking=taylor needs the scores of a calibration, and start is empty: {cure}")
    live = skeleton(new.start).applied
    name = next((k for k, e in live.items() if isinstance(e, TaylorRanking)), None)
    if name is None:
        raise ValueError(f"{who}: stage={new.stage} begins with a ranking, and start={new.start} {said(live)}: {cure}")
    return load(new.start).denoiser.edits[name]


@torch.no_grad()
def take_over(new: Staged, denoiser: Denoiser) -> None:
    """Take over all weights of the stage before.

    Args:
        new: of a later stage, with a `start`
        denoiser: with this edit applied

    Raises:
        ValueError: if `start` is another stage's, or was divided otherwise
        FileNotFoundError: if it is no artifact
    """
    from edit.artifacts.checkpoint import load, skeleton

    assert new.start is not None
    wanted, who = STAGES[STAGES.index(new.stage) - 1], f"{new.name} (Dense2MoE)"
    live = skeleton(new.start).applied
    before = live.get(new.name)
    if type(before) is not type(new) or before.stage != wanted:  # type: ignore[union-attr]
        raise ValueError(
            f"{who}: stage={new.stage} begins with the artifact of stage={wanted}, and start={new.start} {said(live)}: "
            f"give the run of stage={wanted}"
        )
    for field in SAME:
        if (mine := getattr(new, field)) != (theirs := getattr(before, field)):
            raise ValueError(
                f"{who}: start={new.start} has {field}={theirs}, and this one {mine}: train all stages alike"
            )
    given, gone = load(new.start).denoiser.state_dict(), new.replaces(denoiser)
    mine = {k: v for k, v in denoiser.state_dict().items() if k.rpartition(".")[0] not in gone}
    check_layout(mine, given, f"{who}: start={new.start}")
    for key, value in mine.items():
        value.copy_(given[key])


def said(live: dict) -> str:
    """What an artifact with these edits has instead, in words."""
    stage = next((e.stage for e in live.values() if hasattr(e, "stage")), None)
    if stage is not None:
        return f"has stage={stage}"
    return f"has {', '.join(type(e).__name__ for e in live.values())}" if live else "has no edits"
