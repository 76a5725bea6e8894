"""The routers of DyDiT: which heads, channel groups and tokens are on, and the work that is left (see `dydit.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.routing.batches import by_key
from edit.stream import Layout, Stream
from edit.unit import Features, Unit, heads_of, hidden_of

WIDTHS, TOKENS = "dydit.widths", "dydit.tokens"  # names in the trace


class Work(NamedTuple):
    """Multiply-accumulates of a unit with everything on, by what they grow with; modulation and routers are left out.

    Of t = tokens of the attention, registers and, in joint sequences, text included, of which k are chosen (registers
    and in fused units text always are), with shares h of the heads and g of the channels:

        text * l + (i + l) read + i l reads + i more + i^2 mores + t whole
            + h (token t + pair t^2) + k (h out + g feed)

    where i = image tokens and registers.
    """

    channels: int  # hidden, of the image's feed-forward
    token: int
    pair: int
    out: int
    feed: int
    text: int  # of the text's own feed-forward
    fused: bool  # text tokens are chosen, too, all of them
    along: bool  # text tokens are tokens of the attention
    read: int = 0  # of a cross-attention: each token's projections
    reads: int = 0
    more: int = 0  # of a second attention among image tokens
    mores: int = 0
    whole: int = 0  # of queries and keys that are normalised across all heads, and made for all
    unread: int = 0  # of each text token's output that is not computed, since no unit follows that would read it

    def parts(self, n: int, registers: int, length: int) -> tuple[int, int, int]:
        """Fixed work, the work of all heads before the choice, and how many tokens are always chosen.

        Args:
            n: image tokens
            registers, length: further ones, of text
        """
        i = n + registers
        t, always = i + (length if self.along else 0), registers + (length if self.fused else 0)
        fixed = length * self.text + (i + length) * self.read + i * length * self.reads + i * self.more
        fixed += i * i * self.mores + t * self.whole
        return fixed, t * self.token + t * t * self.pair - length * self.unread, always


def work(unit: Unit) -> Work:
    """Read off the unit's anatomy."""
    a, inner, features = unit.anatomy, heads_of(unit).size, hidden_of(unit)
    into: Any = unit.get_submodule(features.writers[0][0])
    d: int = into.in_features

    def feed(f: Features | None) -> int:
        return 0 if f is None else (f.writers[0][1] + 1) * d * f.size

    further: dict[str, int] = {}
    if a.cross is not None:
        further |= {"read": 2 * d * a.cross.size, "reads": 2 * a.cross.size}
    if a.second is not None:
        further |= {"more": 4 * d * a.second.size, "mores": 2 * a.second.size}
    if a.text == "ends":
        further["unread"] = inner * d
    token, out = (3, inner * d) if a.fused else (4, 0)
    if a.attention.norms:
        token, further["whole"] = token - 2, 2 * d * inner
    return Work(
        features.size, token * d * inner, 2 * inner, out, feed(features), feed(a.text_feed), a.fused, a.joint, **further
    )


class DyDiTRouters(nn.Module):
    """The routers of all units, in fp32 whatever the units have, and where the run is, as `DyDiT.advance` sets it.

    Under FSDP2 with bf16 a pass sees their weights rounded to bf16: 35 to 0.125, 15 to 0.03.

    Args:
        works: of the units
        heads: h, of every unit
        width: None: all are on
        tokens: one per unit; None: all are kept
        temperature: of the gradient
    """

    target: float
    complete: bool

    def __init__(
        self,
        works: Sequence[Work],
        heads: int,
        width: TimeRouter | None,
        tokens: nn.ModuleList | None,
        temperature: float,
    ):
        super().__init__()
        self.works, self.heads, self.temperature = tuple(works), heads, temperature
        self.width, self.tokens = width, tokens

    def opened(self, logits: Tensor) -> Tensor:
        """Gumbel-sigmoid: 1 where open, else 0, shaped as the logits; while training drawn, and with a gradient."""
        logits = logits.float()
        if not self.training:
            return (logits > 0).float()
        first, second = (torch.empty_like(logits).exponential_().log() for _ in range(2))  # Gumbel but for the sign
        y = torch.sigmoid((logits + second - first) / self.temperature)
        return (y > 0.5).float() + (y - y.detach())

    def widths(self, time: Tensor) -> Tensor:
        """Heads and channel groups of all units: b d -> b u 2 h, the first always on."""
        if self.width is None:
            return time.new_ones(len(time), len(self.works), 2, self.heads, dtype=torch.float32)
        return F.pad(self.opened(self.width(time.detach())), (1, 0), value=1.0)

    def plan(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """`widths`, and the same on the host, bool, for one sample where it holds for all.

        All samples of an evaluation have one time, and a flow map's one end, which the time holds, too; so one transfer
        serves all units and both branches. Another evaluation at the same time may have another end.
        """
        time, step = stream.time, stream.step
        assert time is not None
        if step is None:
            widths = self.widths(time)
            return widths, on_host(widths)
        known = step.memory.setdefault(("dydit", "plans"), {})
        evaluation = step.index, step.sigma
        if evaluation not in known:
            widths = self.widths(time[:1])
            known[evaluation] = widths, on_host(widths)
        widths, plan = known[evaluation]
        return widths.expand(len(time), -1, -1, -1), plan

    def ratio(self, trace: Mapping[str, Tensor], layout: Layout, n: int) -> Tensor:
        """Of each sample, the share of the units' work that is run: b. `n` image tokens."""
        spent, whole = torch.zeros((), device=trace[WIDTHS].device), 0
        shares = trace[WIDTHS].mean(3)  # b u 2
        for w, members in by_key(self.works).items():
            fixed, attended, always = w.parts(n, layout.registers, layout.text_length)
            h, g = torch.stack([shares[:, i] for i in members], 1).unbind(2)  # b units
            kept: Tensor | int = n
            if self.tokens is not None:
                kept = torch.stack([trace[f"{TOKENS}.{i}"] for i in members], 1).sum(2)
            spent = spent + (fixed + attended * h + (always + kept) * (w.out * h + w.feed * g)).sum(1)
            whole += len(members) * (fixed + attended + (always + n) * (w.out + w.feed))
        return spent / whole


def on_host(widths: Tensor) -> Tensor:
    """As booleans on the CPU; without weights there is no decision, and all is run."""
    return torch.ones(widths.shape, dtype=torch.bool, device="cpu") if widths.is_meta else (widths > 0.5).cpu()


class Logits(nn.Linear):
    """A linear layer in fp32, under autocast too: bf16 has steps of 0.25 near 35, and would turn what is near 0."""

    def forward(self, input: Tensor) -> Tensor:
        kind = "cpu" if input.is_meta else input.device.type
        with torch.autocast(kind, enabled=False):
            return F.linear(input.float(), self.weight.float(), self.bias.float())


class TimeRouter(Logits):
    """Logits of all units' heads and channel groups but the first: b d -> b u 2 (h - 1).

    Args:
        d: width of the embedded time
        units, heads: u and h
        bias: at the start
        zero: start from the bias alone; otherwise each unit's two layers are drawn as Xavier has it
    """

    def __init__(self, d: int, units: int, heads: int, bias: float, zero: bool):
        super().__init__(d, units * 2 * (heads - 1))
        self.units = units
        nn.init.constant_(self.bias, bias)
        nn.init.zeros_(self.weight)
        if not zero:
            for part in self.weight.detach().view(2 * units, heads - 1, d):
                nn.init.xavier_uniform_(part)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).unflatten(1, (self.units, 2, -1))


class TokenRouter(nn.Module):
    """Logits of image tokens, b n, from the residual stream as it is.

    Args:
        d: width of the tokens
        bias: at the start
    """

    def __init__(self, d: int, bias: float):
        super().__init__()
        self.into, self.out = nn.Linear(d, max(1, d // 16)), Logits(max(1, d // 16), 1)
        for layer in (self.into, self.out):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(self.into.bias)
        nn.init.constant_(self.out.bias, bias)

    def forward(self, stream: Stream) -> Tensor:
        tokens = stream.layout.of_image(stream.image).detach()
        return self.out(F.relu(self.into(tokens.to(self.into.weight.dtype))))[..., 0]


class ModulatedTokenRouter(nn.Module):
    """Logits of image tokens beside text, b n, from each of them and the mean of the text, normalised and modulated.

    Args:
        d: width of the tokens
        bias: at the start
    """

    def __init__(self, d: int, bias: float):
        super().__init__()
        self.modulation, self.norm, self.out = nn.Linear(d, 4 * d), nn.LayerNorm(d, eps=1e-5), Logits(d, 1)
        nn.init.xavier_uniform_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.out.bias, bias)

    def forward(self, stream: Stream) -> Tensor:
        dtype, text, signal = self.out.weight.dtype, stream.text, stream.signal
        assert text is not None and signal is not None
        modulation = self.modulation(F.silu(signal.detach().to(dtype)))[:, None]
        shift, scale, text_shift, text_scale = modulation.chunk(4, -1)
        image = stream.layout.of_image(stream.image).detach().to(dtype)
        image = torch.addcmul(shift, self.norm(image), 1 + scale)
        text = torch.addcmul(text_shift, self.norm(text.detach().to(dtype)), 1 + text_scale)
        return self.out(image + text.mean(1, keepdim=True))[..., 0]
