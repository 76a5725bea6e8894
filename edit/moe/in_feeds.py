"""What edits say of parameters and loads that put a layer of experts in place of the feed-forward of some units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from edit.denoiser import Denoiser, Edit
from edit.groups import Group
from edit.moe.experts import expert_groups
from edit.moe.feeds import layers_of, replaced
from edit.moe.routing import loads_of
from edit.unit import core


class InFeeds(Edit):
    """An edit whose own parameters are such a layer for each of its units, by their numbers."""

    def stacks(self, denoiser: Denoiser) -> dict[int, Any]:
        """The layers by their units."""
        return {int(i): layer for i, layer in denoiser.edits[self.name].items()}  # type: ignore[misc, union-attr]

    def replaces(self, denoiser: Denoiser) -> list[str]:
        units = (core(denoiser.units[i]) for i in self.stacks(denoiser))
        return [path for unit in units for path in layers_of(denoiser, unit, replaced(unit))]

    def groups(self, denoiser: Denoiser) -> Mapping[str, Group]:
        return expert_groups(denoiser, self.name)

    def shards(self, denoiser: Denoiser) -> list[nn.Module]:
        return list(self.stacks(denoiser).values())

    def loads(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return loads_of(trace, self.name)
