"""The base of families over `diffusers` classes: the stock model holds the weights, our units stand in its lists.

A unit takes over the children of the block it replaces under their own names, so a state dict, a LoRA, a quantised
linear or a sharded checkpoint of the stock model fits without conversion.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from edit.denoiser import Denoiser
from edit.facts import Facts, check_kept
from edit.importing import uncollected
from edit.stream import Branch, Condition, Layout, Stream
from edit.unit import Features, Unit
from edit.widths import Scale


@dataclass(frozen=True)
class Modulation:
    """Shifts, scales and gates of a unit's branches, each b 1 d for image and, where there is such, text."""

    shift: Branch
    scale: Branch
    attention_gate: Branch
    feed_shift: Branch
    feed_scale: Branch
    feed_gate: Branch


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # projections of a stock attention
JOINT = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # with those of its text tokens
MODULATION = ("norm1.linear.", "norm1_context.linear.", "norm_out.linear.")  # of an adaLN and the last layer

# How parameters of a stock class follow the width; first values as in muP's DiT (2505.15270). A family adds its own
SCALES = {
    r"linear_1\.weight": Scale("input", "fan_in"),  # of an embedder's two
    r"linear_2\.weight": Scale("hidden", "fan_in"),
    r"(to_(q|k|v|out\.0|add_out)|add_(q|k|v)_proj|net\.0\.proj|net\.2|norm\w*\.linear)\.weight": Scale(
        "hidden", "fan_in"
    ),
    r"\w*norm\w*\.weight": Scale("vector"),
    "bias": Scale("vector", "zero"),
}


class StockUnit(Unit):
    """A unit that stands where a block of a stock model stood, with the same children and parameters."""

    network: ClassVar[str] = "ff"  # the child that is the (image) feed-forward, a `diffusers` FeedForward

    def __init__(self, block: nn.Module):
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        for name, p in block.named_parameters(recurse=False):
            self.register_parameter(name, p)
        for name, b in block.named_buffers(recurse=False):
            self.register_buffer(name, b, persistent=name not in block._non_persistent_buffers_set)

    def expand(self, tokens: Tensor) -> Tensor:
        return getattr(self, self.network).net[0](tokens)

    def contract(self, features: Tensor) -> Tensor:
        net = getattr(self, self.network).net
        return net[2](net[1](features))


def heads(tokens: Tensor, attention: Any) -> Tensor:
    """Of a `diffusers` attention: b s (h e) -> b h s e."""
    return tokens.unflatten(-1, (attention.heads, -1)).transpose(1, 2)


def heads_between(name: str, attention: Any, text: Literal["none", "read", "written"] = "none") -> Features:
    """The heads of a `diffusers` attention.

    Args:
        name: of the attention in its unit
        attention: with an output layer of its own
        text: none; text tokens of the joint sequence that are read; or that are also written
    """
    own, added = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
    writers = tuple((f"{name}.{part}", 1) for part in (own if text == "none" else own + added))
    readers = ((f"{name}.to_out.0", 0), (f"{name}.to_add_out", 0))[: 2 if text == "written" else 1]
    return Features(attention.to_out[0].in_features, writers, readers, (name, "heads"))


def feed_forward(unit: nn.Module, name: str) -> Features | None:
    """The hidden channels of a `diffusers` FeedForward; None: it is not two linear layers any more."""
    net = getattr(unit.get_submodule(name), "net", ())
    if len(net) < 3 or not hasattr(net[2], "in_features") or not hasattr(net[0], "proj"):
        return None
    size, act = net[2].in_features, net[0]
    parts = act.proj.out_features // size
    activation = getattr(act, "gelu", None) if parts == 1 else None
    return Features(size, ((f"{name}.net.0.proj", parts),), ((f"{name}.net.2", 0),), None, activation)


class StockDenoiser(Denoiser):
    """A family over one `diffusers` class.

    A family names the class, its lists of blocks with the configuration key that counts each, and the unit that takes
    a block's place. What is ours and not the stock model's configuration (`extras`) are plain attributes: the default
    sizes of a sample (rows and columns, after the frames of a video) and, for guidance-distilled models, the guidance
    scale they are told where nobody says another.
    """

    stock: ClassVar[str]  # type: ignore[misc] - every family of this kind has one
    lists: ClassVar[Mapping[str, tuple[str, type[StockUnit]]]]  # model attribute -> (configuration key, unit)
    extras: ClassVar[Mapping[str, Any]] = {"sample_size": (128, 128)}  # with the defaults of a published folder
    multiple: ClassVar[int] = 2  # rows and columns of a sample must be multiples of this; frames may be any number

    def __init__(self, model: nn.Module, **extras: Any):
        for name, value in {**self.extras, **extras}.items():
            if name not in self.extras:
                raise TypeError(f"{self.name} has no setting {name!r}")
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        units: list[Unit] = []
        for attribute, (_, unit) in self.lists.items():
            blocks = getattr(model, attribute)
            for i, block in enumerate(blocks):
                blocks[i] = unit(block)
            units += list(blocks)
        super().__init__(model, units)

    @classmethod
    def stock_class(cls) -> Any:
        with uncollected():
            import diffusers

            return getattr(diffusers, cls.stock)

    @classmethod
    def of(cls, model: nn.Module, **extras: Any) -> StockDenoiser:
        """A denoiser that shares the weights of a stock model, which stays as it is."""
        config = {k: v for k, v in model.config.items() if not k.startswith("_")}  # type: ignore[union-attr, operator]
        with torch.device("meta"):
            denoiser = cls.from_config({**config, **extras})
        denoiser.model.load_state_dict(model.state_dict(keep_vars=True), assign=True)
        denoiser.reset_buffers()
        return denoiser.train(model.training)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Buffers that no state dict holds are computed again: a model made on the meta device never had them."""
        found = super().load_state_dict(state_dict, strict, assign)
        self.reset_buffers()
        return found

    @property
    def config(self) -> dict:
        stock = {k: _plain(v) for k, v in self.model.config.items() if not k.startswith("_")}  # type: ignore
        return {**stock, **{name: _plain(getattr(self, name)) for name in self.extras}}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> StockDenoiser:
        extras = {k: v for k, v in config.items() if k in cls.extras}
        stock = {k: v for k, v in config.items() if k not in cls.extras and not k.startswith("_")}
        return cls(cls.stock_class()(**stock), **extras)

    @classmethod
    def filled(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration with the stock class's defaults for what it leaves out."""
        parameters = inspect.signature(cls.stock_class().__init__).parameters.values()
        return {**{p.name: p.default for p in parameters if p.default is not p.empty}, **config}

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.channels, *self.sample_size  # type: ignore[attr-defined]

    @property
    def channels(self) -> int:
        """Channels of a sample."""
        return self.model.config.in_channels  # type: ignore[union-attr]

    def accepts(self, shape: tuple[int, ...]) -> bool:
        alike = len(shape) == len(self.sample_shape) and shape[0] == self.channels
        return alike and not any(s % self.multiple for s in shape[-2:])

    def settle(self, shape: tuple[int, ...], spec: Any) -> None:
        values = {k: getattr(spec, k) for k in self.extras if hasattr(spec, k)}
        if "sample_size" in self.extras and len(shape) == len(self.sample_shape):  # others are refused: `accepts`
            values["sample_size"] = tuple(shape[1:])
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self.base = {**self.base, **{k: _plain(v) for k, v in values.items()}}

    def keep(self, indices: Sequence[int]) -> None:
        check_kept(indices, len(self.units), f"this {self.name}")
        if sorted(set(indices)) != list(indices):
            raise ValueError(f"{self.name}: units to keep must be increasing without repeats, got {list(indices)}")
        start = 0
        for attribute, (key, _) in self.lists.items():
            blocks = getattr(self.model, attribute)
            chosen = [blocks[i - start] for i in indices if start <= i < start + len(blocks)]
            start += len(blocks)
            setattr(self.model, attribute, nn.ModuleList(chosen))
            self.model.register_to_config(**{key: len(chosen)})  # type: ignore[operator]
        self.units = [self.units[i] for i in indices]

    def null(self, condition: Condition) -> Condition:
        """Zeros in place of the text, for families without an empty-prompt embedding at hand."""
        return Condition(
            text=None if condition.text is None else torch.zeros_like(condition.text),
            text_mask=condition.text_mask,
            pooled=None if condition.pooled is None else torch.zeros_like(condition.pooled),
            guidance=condition.guidance,
        )

    def native(self, stream: Stream) -> Tensor:
        """The output of the stock model's forward from the stream behind the last unit."""
        return self.arranged(self.projected(stream))

    def arranged(self, stream: Stream) -> Tensor:
        """The same from the stream behind the output layer, whose tokens some stock models give as they are."""
        return stream.image

    def packed(self, sample: Tensor) -> Tensor:
        """A prediction, b c *sizes, as the stock model gives it: families that read packed tokens pack it again."""
        return sample

    @classmethod
    def to_stock(cls, config: Mapping, state: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
        import diffusers

        stock = {k: v for k, v in config.items() if k not in cls.extras}
        return {"_class_name": cls.stock, "_diffusers_version": diffusers.__version__, **stock}, dict(state)

    @classmethod
    def from_stock(cls, config: Mapping, state: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
        """A published folder's configuration leaves fields out: they are filled in with the class's defaults."""
        known = {*inspect.signature(cls.stock_class().__init__).parameters, *cls.extras}
        given = {k: v for k, v in config.items() if k in known}  # published ones carry fields of older versions, too
        with torch.device("meta"):
            return cls.from_config(given).config, dict(state)

    @property
    def facts(self) -> Facts:
        """Of any stock class that counts heads and their channels; a family adds what the model is told."""
        c: Any = self.model.config
        width, grows = c.num_attention_heads * c.attention_head_dim, ("num_attention_heads",)
        return Facts(width, c.num_attention_heads, lora=ATTENTION, grows=grows)

    def example(self, batch: int = 1, text: int = 512) -> Condition:
        widths = dict(self.facts.text)
        if not widths:
            return super().example(batch)
        words = torch.zeros(batch, text, widths.pop("text"), device="cpu")
        return Condition(text=words, **{k: torch.zeros(batch, w, device="cpu") for k, w in widths.items()})

    def need_length(self, length: int | None) -> None:
        """Refuse texts of no fixed length (None) where `masks` is false.

        How far a text is padded would depend on what else is in the batch, and with it the prediction.

        Raises:
            ValueError: with the remedy
        """
        if length is None and not self.masks:
            raise ValueError(
                f"{self.name} attends to the padding of its text, and these texts are of no fixed length "
                "(padding=none): encode them with padding=states, as published models were trained, or padding=zeros"
            )

    def need(self, condition: Condition) -> None:
        """Refuse a condition without the embeddings this family is told, or with others than their widths.

        Raises:
            ValueError: naming the field, the given and the expected shape
        """
        for name, width in self.facts.text.items():
            value = getattr(condition, name)
            if value is None:
                raise ValueError(f"{self.name} needs condition.{name}, which is missing: use data with text embeddings")
            if value.shape[-1] != width:
                raise ValueError(
                    f"{self.name} takes {name} embeddings of width {width}, got {value.shape[-1]}: they were made by "
                    "another text encoder"
                )


def scales_with(own: Mapping[str, Scale]) -> dict[str, Scale]:
    """A family's scales, which come first, and those that stock classes share."""
    return {**own, **{pattern: scale for pattern, scale in SCALES.items() if pattern not in own}}


def zero_init(*layers: nn.Module) -> None:
    """adaLN-zero (DiT, arXiv 2212.09748): modulations and the last layer of a new model start at zero."""
    for layer in layers:
        for p in layer.parameters():
            nn.init.zeros_(p)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def turn(x: Tensor, layout: Layout) -> Tensor:
    """Rotary positions: turn neighbouring channel pairs of b h s e queries or keys in fp32, back in their own type.

    `layout.rope` is 2 s e/2: cosines, then sines.
    """
    cos, sin = layout.rope.unbind()  # type: ignore[union-attr]
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # a compiler fuses real numbers and stops at complex ones
        real, imaginary = pairs.unbind(-1)
        turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    else:  # a tenth of the time
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).type_as(x)


def tokens_of(x: Tensor) -> Tensor:
    """2 x 2 latent pixels to a token, channels first: b c 2y 2x -> b (y x) 4c."""
    return rearrange(x, "b c (y p) (x q) -> b (y x) (c p q)", p=2, q=2)


def latent_of(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """The inverse of `tokens_of`: b (y x) 4c -> b c 2y 2x."""
    _, rows, columns = grid
    return rearrange(tokens, "b (y x) (c p q) -> b c (y p) (x q)", y=rows, x=columns, p=2, q=2)


def finite(tokens: Tensor) -> Tensor:
    """In fp16, as stock does: values that would be infinite are the largest there is."""
    return tokens.clip(-65504, 65504) if tokens.dtype == torch.float16 else tokens
