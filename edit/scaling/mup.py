"""muP for diffusion transformers (arXiv 2505.15270): what is tuned on a narrow model holds for a wide one.

Width is scaled by the number of heads, of one width. A dimension that grows with it is infinite, any other finite. With
r = fan_in / fan_in of the base model, for each parameter (Adam, W x + b):

    class      fan_out x fan_in   start, std    multiplier              rate     decay
    input      inf x finite       s             1                       eta      lambda
    hidden     inf x inf          s_b r^(-1/2)  1                       eta / r  lambda r
    output     finite x inf       0             alpha_out / r, input    eta      lambda
    vector     biases, gains      0, 1          1                       eta      lambda
    finite     finite x finite    as it is      1                       eta      lambda

Classes and first values are declared: of a family in its `Facts.scales`, of what edits and losses add by `scales` of
the module (`edit/widths.py`). At r = 1 all of it is the usual parametrisation: the base model is the reference. Rates
of groups keep their ratio under every schedule, and lr x decay is eta lambda everywhere.

The readout has the multiplier itself: one Python number in front of the family's output layer, which copies, the
average, a compiled model and an artifact carry as they carry the edit; `fold` moves it into the weights. Further
layers of the output class (routers, the first layer of an alignment head, A of a LoRA) get what equals it under Adam
(abc symmetry, arXiv 2203.03466): start s_b / r, rate eta / r, decay lambda r, no multiplier, so that no other method's
forward changes.

The published DiT has no adaLN-Zero: `adaln_init`. U-ViT's skip linears (D x 2D) are hidden: r is a ratio of fan_ins.
Adam's eps must be far below the gradients, which fall as 1 / n: 1e-10 (PixArt) to 1e-8. Clipping at 0.1 undoes maximal
updates (MMDiT: 1.0). Depth, head width, patch and data are held; Muon and trust ratios need other exponents.

Specification: methods/mup.md. Ours: the rules for SD3, FLUX, Qwen-Image and Wan, inferred as it says; a base is never
wider than the model, so the narrowest model of a sweep is its base (the paper also has a proxy of half the base).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from edit.denoiser import Denoiser, Edit, End
from edit.edits import apply
from edit.groups import PLAIN, Group
from edit.inputs.limits import Count, Positive, check_numbers
from edit.scaling.mup_rules import Ruled, draw, rescale, ruled, scaled
from edit.stream import Stream
from edit.widths import Scale, scale_of, scales_of

# of peft's layers, which tell nothing: y = W x + B A x
LORA = {r"lora_A\.\w+\.weight": Scale("output", "fan_in"), r"lora_B\.\w+\.weight": Scale("input", "zero")}


@dataclass(frozen=True)
class Readout:
    """What stands around the output layer (`Denoiser.ends`): x alpha_out / r goes in; `inner`: what stood there."""

    factor: float
    inner: End | None = None

    def __call__(self, stream: Stream, run: Callable[[Stream], Stream]) -> Stream:
        stream = replace(stream, image=stream.image * self.factor)
        return run(stream) if self.inner is None else self.inner(stream, run)


@dataclass
class MuP(Edit):
    """The maximal update parametrisation of a model that is trained from scratch.

    Edits in front of it have their start changed with the model's; put it last.

    Args:
        base_width: n_b: a multiple of the head width, at most the model's width
        alpha_out: of the readout's multiplier, which may be tuned like a rate
        adaln_init: of the layers that make shifts, scales and gates: "normal", or "zero" as in DiT (adaLN-Zero)
        label_std: of the table of classes
    """

    base_width: Count = 288
    alpha_out: Positive = 1.0
    adaln_init: Literal["normal", "zero"] = "normal"
    label_std: Positive = 1.0

    excludes = ("MuP",)
    starts = True

    def __post_init__(self):
        check_numbers(self)
        if self.adaln_init not in ("normal", "zero"):
            raise ValueError(f"MuP: adaln_init must be normal or zero, got {self.adaln_init!r}")

    # ---- the model ------------------------------------------------------------------------------------------------

    def apply(self, denoiser: Denoiser) -> None:
        scaled(denoiser, self.base_heads(denoiser))  # refuses a base that cannot be
        r = denoiser.facts.width / self.base_width
        denoiser.ends["output"] = Readout(self.alpha_out / r, denoiser.ends.get("output"))

    def base_heads(self, denoiser: Denoiser) -> int:
        """Heads of the base model.

        Raises:
            ValueError: if there is no such base, or the family tells no scales
        """
        facts, head = denoiser.facts, denoiser.facts.width // denoiser.facts.heads
        if not facts.scales or not facts.grows:
            raise ValueError(
                f"MuP: this {denoiser.name} does not tell how its parameters follow its width: declare grows and "
                "scales in its facts"
            )
        if self.base_width % head:
            raise ValueError(
                f"MuP: width is scaled by heads of one width, {head} in this {denoiser.name}, which does not divide "
                f"base_width={self.base_width}: choose a multiple of {head}"
            )
        if self.base_width > facts.width:
            raise ValueError(
                f"MuP: base_width={self.base_width} is above the width {facts.width} of this {denoiser.name}: choose "
                f"at most {facts.width}; the narrowest model of a sweep is the base of all"
            )
        return self.base_width // head

    def structure(self, denoiser: Denoiser, heads: int) -> Denoiser:
        """The denoiser with another number of heads, and with its other edits, on the meta device.

        Raises:
            ValueError: if a key of its configuration, or an edit, has no such size
        """
        config = {**denoiser.base, **scaled(denoiser, heads)}
        edits = {name: replace(e) for name, e in denoiser.applied.items() if e is not self}  # type: ignore[type-var]
        with torch.device("meta"):
            try:
                return apply(denoiser.family.from_config(config), edits, fresh=False)
            except ValueError as error:
                raise ValueError(f"MuP: there is no base of {heads} heads: {error}") from error

    def rules(self, denoiser: Denoiser) -> dict[str, Ruled]:
        """What muP says of each parameter (full names); of finite matrices that nobody declares, nothing.

        Shapes are those of structures made anew: in a sharded model parameters have others.

        Raises:
            ValueError: if nobody tells the class of a matrix that follows the width
        """
        facts = denoiser.facts
        base, whole = (self.structure(denoiser, heads) for heads in (self.base_heads(denoiser), facts.heads))
        own = scales_of(whole)
        found: dict[str, Scale] = {}
        for name, _ in whole.named_parameters():
            if (key := self.stock_name(whole, name)) is None:
                scale = own.get(name) or scale_of(LORA, name)
            else:
                scale = scale_of(facts.scales, key)
                if scale is not None and scale.kind == "hidden" and any(part in key for part in facts.modulation):
                    scale = replace(scale, start="zero") if self.adaln_init == "zero" else scale
                if scale is not None and scale.start == "label":
                    scale = replace(scale, start=self.label_std)
            if scale is not None:
                found[name] = scale
        multiplied = {n for n, s in found.items() if s.kind == "output" and self.stock_name(whole, n) is not None}
        return ruled(whole, base, found, multiplied)

    def stock_name(self, denoiser: Denoiser, name: str) -> str | None:
        """A parameter's name in the family's own model; None: an edit has added it."""
        if not name.startswith("model."):
            return None
        key: str | None = name.removeprefix("model.")
        for e in reversed(denoiser.applied.values()):
            key = None if key is None else e.stock_key(key)
        return key

    # ---- start ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, denoiser: Denoiser) -> None:
        """Draw the family's parameters anew, and scale those of other edits.

        Raises:
            ValueError: if the model has been trained, which would be lost
        """
        parameters, rules = dict(denoiser.named_parameters()), self.rules(denoiser)
        own = {name for name in rules if self.stock_name(denoiser, name) is not None}
        # a new model of any family reads out zero
        if any(rules[name].scale.kind == "output" and parameters[name].count_nonzero() for name in own):
            raise ValueError(
                f"MuP sets the first values of all parameters, and this {denoiser.name} has been trained, which would "
                "be lost: apply it to a new model (leave init out)"
            )
        for name, rule in rules.items():
            if name not in own or rule.scale.start == "constant":
                rescale(parameters[name], rule)
            elif rule.std is not None:
                draw(parameters[name], rule)

    def adopt(self, denoiser: Denoiser, build: Callable[[Denoiser], Any], own: nn.Module) -> Mapping[str, Group]:
        with torch.device("meta"):
            base = build(self.structure(denoiser, self.base_heads(denoiser)))
        rules = ruled(own, base, scales_of(own), set())
        with torch.no_grad():
            for name, rule in rules.items():
                rescale(own.get_parameter(name), rule)
        return {name: rule.group for name, rule in rules.items() if rule.group != PLAIN}

    # ---- optimiser and end ----------------------------------------------------------------------------------------

    def groups(self, denoiser: Denoiser) -> Mapping[str, Group]:
        return {name: rule.group for name, rule in self.rules(denoiser).items() if rule.group != PLAIN}

    def fold(self, denoiser: Denoiser) -> None:
        """W alpha_out / r in place of W; the bias stays."""
        end, scales = denoiser.ends["output"], denoiser.facts.scales
        if not isinstance(end, Readout):
            raise ValueError("MuP cannot be folded under another edit around the output layer: fold that one first")
        found = (n for n, _ in denoiser.model.named_parameters())
        name = next((n for n in found if (s := scale_of(scales, n)) is not None and s.kind == "output"), None)
        if name is None:
            raise ValueError("MuP cannot be folded: another edit has changed the output layer: fold that first")
        path, _, leaf = name.rpartition(".")
        layer = denoiser.model.get_submodule(path)
        weight = getattr(layer, leaf)
        setattr(layer, leaf, nn.Parameter(weight.detach() * end.factor, weight.requires_grad))
        if end.inner is None:
            del denoiser.ends["output"]
        else:
            denoiser.ends["output"] = end.inner
