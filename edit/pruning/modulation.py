"""Modulation compression: one small network replaces all modulation layers of a FLUX (Chroma, methods D2.4).

A modulation layer maps the embedding of time, guidance and pooled text to shifts, scales and gates; in FLUX.1-dev
these layers hold 3.247 B of 11.9 B parameters. They are deleted, together with the three embedders and so the pooled
text. The replacement reads 64 numbers for each vector, sinusoids of the time (16), of the guidance (16) and of the
vector's number (32), and has 0.278 B parameters at its published size:

    h = W_in s,  h <- h + W_2 silu(W_1 rmsnorm(h)) `depth` times,  A_k(t, g) = W_out h,  k = 0 .. 3 S + 12 D + 1

for S single and D double units: Chroma's order, three vectors of each single unit (shift, scale, gate), six of each
double unit's image and then of each one's text (shift, scale, gate of attention, of MLP), two of the readout. We
deviate from Chroma: the guidance is an input if it is one of the FLUX (Chroma: always 0); the last two vectors are
FLUX's (scale, shift), not (shift, scale); so this is an edit of a FLUX, not a stock class.

All vectors are made once per call, before the first unit, and travel as `Stream.cond`, b k d. That is 344 rows through
the network for FLUX.1-dev, 0.1 T multiply-accumulates per sample (the layers: 3 G), 0.3 % of a forward at 1024 pixels.
They depend on the sample through t and g alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.backbones.flux import Flux
from edit.denoiser import Denoiser, Edit
from edit.inputs.limits import Count, Limits, Positive, Seed, check_numbers
from edit.stream import Condition, Stream

SCALAR, SLOT = 16, 32  # channels of the sinusoids of time and guidance, and of a vector's number


@dataclass
class ModulationApproximator(Edit):
    """A FLUX whose modulation is `Approximator`, fitted to the layers it replaces before they go.

    The fit needs no images: E over t ~ U(0, 1), g ~ U(low, high) of sum_k |A_k(t, g) - mod_k(t, g, c)|^2, at one pooled
    text c (ours; D2.4). It trains on an accelerator where there is one: FLUX.1-dev in bf16 takes about 18 GB there (by
    arithmetic). The condition still carries a pooled text, as the data have it, and nobody reads it.

    Args:
        depth: residual layers of the network
        hidden: their width
        steps: of the fit; 0: none, the network starts as drawn
        batch: pairs (t, g) of a step
        lr: of Adam, falling to zero as a cosine
        guidance: low and high, where the model is told the guidance
        pooled: safetensors file with the tensor `pooled`, c wide: the mean over the data's texts; None: zeros
        seed: of the pairs
    """

    excludes: ClassVar[tuple[str, ...]] = ("IntervalInput", "DyDiT", "TDLoRA", "Elastic")  # of one `cond`, or the time
    depth: Count = 5
    hidden: Count = 5120
    steps: Annotated[int, Limits(0, 1_000_000)] = 2000
    batch: Count = 32
    lr: Positive = 1e-4
    guidance: tuple[float, float] = (1.0, 8.0)
    pooled: str | None = None
    seed: Seed = 0

    def __post_init__(self):
        check_numbers(self)
        low, high = self.guidance = (self.guidance[0], self.guidance[-1])
        if not 0 <= low <= high:
            raise ValueError(
                f"ModulationApproximator: guidance is (low, high) with 0 <= low <= high, got {low}, {high}"
            )

    def apply(self, denoiser: Denoiser) -> nn.Module:
        if not isinstance(denoiser, Flux):
            raise ValueError(
                f"ModulationApproximator compresses the modulation of a flux, this is a {denoiser.name}: leave it out"
            )
        model: Any = denoiser.model
        norms = list(modulated(model))
        if any(type(getattr(norm, "linear", None)) is not nn.Linear for _, _, norm, _ in norms):
            raise ValueError(
                "ModulationApproximator: the modulation of this flux is compressed already, or a LoRA sits on it: "
                "apply it once, and before a LoRA"
            )
        weight = norms[0][2].linear.weight
        taught = Taught(model.time_text_embed, [norm.linear for *_, norm, _ in norms])
        with weight.device:
            own = Approximator(sum(n for *_, n in norms), weight.shape[1], self.hidden, self.depth).to(weight.dtype)
        first = 0
        for owner, name, norm, count in norms:
            setattr(owner, name, (Slots if count > 2 else LastSlots)(norm.norm, first, count))
            first += count
        model.time_text_embed = Scalars()
        if self.steps and not weight.is_meta:  # here, for `initialise` would come after the layers have gone
            pooled = self._pooled(denoiser.facts.text["pooled"])
            self.fit(own, taught, pooled)
        return own

    def embed(self, stream: Stream, t: Tensor, condition: Condition, own: nn.Module | None) -> Stream:
        assert own is not None
        return replace(stream, cond=own(stream.cond), time=None, signal=None)

    @torch.enable_grad()
    def fit(self, own: Approximator, taught: Taught, pooled: Tensor) -> float:
        """Fit the network to modulation layers, and say now and then how far it is.

        Args:
            own: fitted in place, in fp32 whatever its own precision
            taught: not changed, but left on the device of the fit
            pooled: c, the pooled text of all pairs

        Returns:
            Mean square error of the last step, over the mean square of the targets.
        """
        device = torch.accelerator.current_accelerator(check_available=True) or pooled.device
        scalars, taught, master = Scalars(), taught.to(device), deepcopy(own).float().to(device)
        pooled, (low, high) = pooled.to(device)[None], self.guidance
        optimizer = torch.optim.Adam(master.parameters(), self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        generator, left = torch.Generator().manual_seed(self.seed), 1.0
        for step in range(1, self.steps + 1):
            t, g = torch.rand(2, self.batch, generator=generator, device="cpu").to(device)
            g = low + (high - low) * g if taught.told else None
            with torch.no_grad():
                target = taught(t, g, pooled).float()
            loss = (master(scalars(t, g)) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % max(1, self.steps // 10) == 0 or step == self.steps:
                left = (loss / target.square().mean().clamp_min(1e-12)).item()
                print(
                    f"modulation fit {step:6d}/{self.steps}   error {100 * left:.3g} % of the mean square", flush=True
                )
        own.load_state_dict(master.state_dict())
        return left

    def _pooled(self, width: int) -> Tensor:
        if self.pooled is None:
            return torch.zeros(width)
        from safetensors.torch import load_file

        if not Path(self.pooled).is_file():
            raise FileNotFoundError(f"ModulationApproximator: no file {self.pooled}: pooled is a safetensors file")
        mean = load_file(self.pooled).get("pooled")
        if mean is None or mean.shape != (width,):
            found = "none" if mean is None else f"one of shape {tuple(mean.shape)}"
            raise ValueError(f"{self.pooled} must hold a tensor `pooled` of shape ({width},), it has {found}")
        return mean.float()


def modulated(model: Any) -> Iterator[tuple[nn.Module, str, Any, int]]:
    """Owner, name, module and number of vectors of each modulated norm of a FLUX, in Chroma's order."""
    for unit in model.single_transformer_blocks:
        yield unit, "norm", unit.norm, 3
    for name in ("norm1", "norm1_context"):
        for unit in model.transformer_blocks:
            yield unit, name, getattr(unit, name), 6
    yield model, "norm_out", model.norm_out, 2


class Scalars(nn.Module):
    """Stands where FLUX embeds time, guidance and pooled text: sinusoids of the first two, side by side, b 32.

    FLUX adds its three embeddings; each of these fills channels of its own, and the pooled text none.
    """

    def __init__(self):
        from diffusers.models.embeddings import Timesteps

        super().__init__()
        self.time_proj = Timesteps(SCALAR, flip_sin_to_cos=True, downscale_freq_shift=0)

    def timestep_embedder(self, sinusoid: Tensor) -> Tensor:
        return F.pad(sinusoid, (0, SCALAR))

    def guidance_embedder(self, sinusoid: Tensor) -> Tensor:
        return F.pad(sinusoid, (SCALAR, 0))

    def text_embedder(self, pooled: Tensor) -> Tensor:
        return pooled.new_zeros(())

    def forward(self, t: Tensor, guidance: Tensor | None) -> Tensor:
        """As FLUX sums them: times b in [0, 1] and, of models that are told it, guidance b."""
        both = self.timestep_embedder(self.time_proj(t * 1000))
        return both if guidance is None else both + self.guidance_embedder(self.time_proj(guidance * 1000))


class Approximator(nn.Module):
    """From the sinusoids of time and guidance to all modulation vectors: b 32 -> b k d."""

    def __init__(self, slots: int, width: int, hidden: int, depth: int):
        super().__init__()
        self.slots = slots
        self.into = nn.Linear(2 * SCALAR + SLOT, hidden)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(depth))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden)) for _ in range(depth)
        )
        self.out = nn.Linear(hidden, width)

    def forward(self, scalars: Tensor) -> Tensor:
        from diffusers.models.embeddings import get_timestep_embedding

        numbers = 1000 * torch.arange(self.slots, device=scalars.device)
        slots = get_timestep_embedding(numbers, SLOT, flip_sin_to_cos=True, downscale_freq_shift=0).to(scalars.dtype)
        each = (len(scalars), self.slots, -1)
        h = self.into(torch.cat((scalars[:, None].expand(each), slots.expand(each)), -1))  # b k h
        for norm, layer in zip(self.norms, self.layers, strict=True):
            h = h + layer(norm(h))
        return self.out(h)


class Slots(nn.Module):
    """A norm whose shift, scale and gates are vectors of the conditioning, b k d: as FLUX's norms, without weights."""

    def __init__(self, norm: nn.Module, first: int, count: int):
        super().__init__()
        self.norm, self.silu, self.linear = norm, nn.Identity(), Pick(first, count)


class Pick(nn.Module):
    """Some of the vectors, side by side: b k d -> b (count d)."""

    def __init__(self, first: int, count: int):
        super().__init__()
        self.first, self.count = first, count

    def forward(self, vectors: Tensor) -> Tensor:
        return vectors[:, self.first : self.first + self.count].flatten(1)


class LastSlots(nn.Module):
    """The norm of the readout, which has nothing to hand on."""

    def __init__(self, norm: nn.Module, first: int, count: int):
        super().__init__()
        self.norm, self.first, self.count = norm, first, count

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # b n d, b k d -> b n d
        scale, shift = emb[:, self.first : self.first + self.count].unbind(1)
        return self.norm(x) * (1 + scale[:, None]) + shift[:, None]


class Taught(nn.Module):
    """The modulation of a FLUX: its embedders and modulation layers, in Chroma's order."""

    def __init__(self, embedder: Any, layers: list[nn.Linear]):
        super().__init__()
        self.embedder, self.layers = embedder, nn.ModuleList(layers)

    @property
    def told(self) -> bool:
        return hasattr(self.embedder, "guidance_embedder")

    def forward(self, t: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
        """mod_k(t, g, c): b, b, 1 c -> b k d."""
        e, dtype = self.embedder, self.layers[0].weight.dtype
        cond = e.timestep_embedder(e.time_proj(t * 1000).to(dtype)) + e.text_embedder(pooled.to(dtype))
        if guidance is not None:
            cond = cond + e.guidance_embedder(e.time_proj(guidance * 1000).to(dtype))
        return torch.cat([layer(F.silu(cond)).unflatten(1, (-1, cond.shape[1])) for layer in self.layers], 1)
