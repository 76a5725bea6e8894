"""Layer-wise scaling of widths (MicroDiT, arXiv 2407.15811): narrow attentions and feed-forwards first, wide ones last.

    m_a(i) = 0.5 + (1.0 - 0.5) i / (N - 1),  m_f(i) = 0.5 + (4.0 - 0.5) i / (N - 1),  i = 0 .. N - 1
    attention: round-up(D m_a, 128),  gated feed-forward: round-up(2/3 D m_f, 256),  experts: round-up(D m_f, 256)

D is the width of a token; heads keep their width, so there are fewer. A feed-forward without a gate has round-up(D m_f,
256) channels: ours, as the paper has gated ones. Cross-attention, a second attention and the text's own feed-forward
stay whole. Experts take their ratio from here: put `edit.moe.expert_choice` behind this edit.

The layers are new, normal with the standard deviations of those in whose place they are: the family's own
initialisation as far as that is normal, and zero where that is zero. What a trained model has learned is lost, and an
edit cannot see whether weights are trained: use it from scratch.

Specification: methods/micro-dit.md ("Layer-wise scaling").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edit.denoiser import Denoiser, Edit
from edit.inputs.limits import Count, Positive, check_numbers
from edit.unit import Features, Unit, core, heads_of, hidden_of

Ratios = tuple[Positive, Positive]


@dataclass
class LayerWiseScaling(Edit):
    """Widths that grow with depth, in place of uniform ones.

    Args:
        attention: m_a of the first and of the last unit
        feed: m_f of the first and of the last unit
        multiple: attention widths are rounded up to multiples of it: itself one of the width of a head
        hidden_multiple: the same of the channels of feed-forwards
    """

    attention: Ratios = (0.5, 1.0)
    feed: Ratios = (0.5, 4.0)
    multiple: Count = 128
    hidden_multiple: Count = 256

    excludes = ("DyDiT", "LayerWiseScaling", "LinearAttention")  # the two others take all units to be alike

    def __post_init__(self):
        check_numbers(self)
        self.attention, self.feed = tuple(self.attention), tuple(self.feed)

    def apply(self, denoiser: Denoiser) -> None:
        depth, d = len(denoiser.units), denoiser.facts.width
        plan = []
        for i, wrapped in enumerate(denoiser.units):
            unit = core(wrapped)
            self.refuse(denoiser, unit, i)
            heads, hidden = heads_of(unit), hidden_of(unit)
            head = heads.size // unit.anatomy.heads
            size = round_up(d * between(self.attention, i, depth), self.multiple)
            if size % head:
                raise ValueError(
                    f"LayerWiseScaling: an attention of {size} channels is no whole number of heads of {head}, as this "
                    f"{denoiser.name} has them: set multiple to a multiple of {head}"
                )
            ratio = self.ratio(i, depth)
            channels = gated_width(d, ratio, self.hidden_multiple) if gated(hidden) else self.expert_width(d, ratio)
            plan.append((unit, heads, size, size // head, hidden, channels))
        for unit, heads, size, count, hidden, channels in plan:  # all are looked at before the first is changed
            resize(unit, heads, size)
            if heads.count is not None:
                path, attribute = heads.count
                setattr(unit.get_submodule(path), attribute, count)
            resize(unit, hidden, channels)

    def refuse(self, denoiser: Denoiser, unit: Unit, index: int) -> None:
        """Raises ValueError if a unit's layers cannot be made anew by themselves."""
        who = f"LayerWiseScaling: unit {index} of this {denoiser.name}"
        if unit.anatomy.fused:
            raise ValueError(f"{who} has one output layer for attention and feed-forward: use a family without such")
        for features in (heads_of(unit), hidden_of(unit)):
            for path, _ in (*features.writers, *features.readers):
                if type(unit.get_submodule(path)) is not nn.Linear:
                    raise ValueError(f"{who} has another layer than a plain linear one at {path}: put this edit first")

    def ratio(self, index: int, depth: int) -> float:
        """m_f of a unit, counted from 0."""
        return between(self.feed, index, depth)

    def expert_width(self, width: int, ratio: float) -> int:
        """Channels of an expert, or of any feed-forward without a gate."""
        return round_up(width * ratio, self.hidden_multiple)


def feed_ratio(denoiser: Denoiser, index: int) -> float | None:
    """m_f of a unit where widths are scaled; None: they are not."""
    applied = denoiser.applied.values()
    found = next((e for e in applied if isinstance(e, LayerWiseScaling)), None)
    return None if found is None else found.ratio(index, len(denoiser.units))


# ---- sizes ----------------------------------------------------------------------------------------------------------


def between(ends: tuple[float, float], index: int, depth: int) -> float:
    """Linear in the unit, from the first to the last."""
    first, last = ends
    return first + (last - first) * index / max(1, depth - 1)


def round_up(size: float, multiple: int) -> int:
    """The next multiple. A size that misses a whole number by a rounding error counts as that number."""
    return int(-(-round(size, 6) // multiple)) * multiple


def gated_width(width: int, ratio: float, multiple: int) -> int:
    """Channels of a gated feed-forward, which has three matrices where another has two."""
    return round_up(2 / 3 * width * ratio, multiple)


def gated(features: Features) -> bool:
    return sum(parts for _, parts in features.writers) == 2


# ---- layers ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def resize(unit: Unit, features: Features, size: int) -> None:
    """Give a unit new layers around `size` features, in place of those that write and read `features.size`."""
    for path, parts in features.writers:
        layer = unit.get_submodule(path)
        layer.weight = anew(layer.weight, parts, size, 0)
        if layer.bias is not None:
            layer.bias = anew(layer.bias, parts, size, 0)
        layer.out_features = parts * size
    for path, _ in features.readers:
        layer = unit.get_submodule(path)
        layer.weight, layer.in_features = anew(layer.weight, 1, size, 1), size
    for _, path in features.norms:
        norm = unit.get_submodule(path)
        for name, p in list(norm.named_parameters()):
            setattr(norm, name, nn.Parameter(p[:1].repeat(size), p.requires_grad))  # fresh ones are all alike
        norm.normalized_shape = (size,)


def anew(old: Tensor, parts: int, size: int, axis: int) -> nn.Parameter:
    """A parameter with `parts` times `size` features on an axis, each part as spread as its predecessor."""
    spread = old.float().movedim(axis, 0).unflatten(0, (parts, -1)).flatten(1).std(1, correction=0)
    shape = [*old.shape]
    shape[axis] = parts * size
    drawn = torch.randn(shape, device=old.device).movedim(axis, 0)  # features first
    drawn = drawn * spread.repeat_interleave(size).view(-1, *[1] * (old.ndim - 1))
    return nn.Parameter(drawn.movedim(0, axis).contiguous().to(old.dtype), old.requires_grad)
