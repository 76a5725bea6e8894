"""The base of families over `diffusers` classes: the stock model holds the weights, our units stand in its lists.

A unit takes over the children of the block it replaces under their own names, so a state dict, a LoRA, a quantised
linear or a sharded checkpoint of the stock model fits without conversion.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from edit.denoiser import Denoiser, Unit
from edit.facts import Facts
from edit.stream import Branch, Condition, Layout, Step, Stream


@dataclass(frozen=True)
class Modulation:
    """Gates of a unit's branches, and the tokens both branches read where they run in parallel."""

    attention_gate: Branch
    feed_gate: Branch
    feed_shift: Branch | None = None
    feed_scale: Branch | None = None
    tokens: Branch | None = None  # normalised and modulated, as the attention reads them


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # projections of a stock attention
JOINT = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # with those of its text tokens


class StockUnit(Unit):
    """A unit that stands where a block of a stock model stood, with the same children and parameters."""

    def __init__(self, block: nn.Module):
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        for name, p in block.named_parameters(recurse=False):
            self.register_parameter(name, p)
        for name, b in block.named_buffers(recurse=False):
            self.register_buffer(name, b, persistent=name not in block._non_persistent_buffers_set)


class StockDenoiser(Denoiser):
    """A family over one `diffusers` class.

    A family names the class, its lists of blocks with the configuration key that counts each, and the unit that takes
    a block's place. What is ours and not the stock model's configuration (`extras`) are plain attributes: the default
    sample size and, for guidance-distilled models, the guidance scale they are told where nobody says another.
    """

    stock: ClassVar[str]  # type: ignore[misc] - every family of this kind has one
    lists: ClassVar[Mapping[str, tuple[str, type[StockUnit]]]]  # model attribute -> (configuration key, unit)
    extras: ClassVar[Mapping[str, Any]] = {"sample_size": (128, 128)}  # with the defaults of a published folder
    multiple: ClassVar[int] = 2  # rows and columns of a sample must be multiples of this
    masks: ClassVar[bool] = True  # attention honours the text mask; else padding is attended to

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
    def sample_shape(self) -> tuple[int, int, int]:
        return self.channels, *self.sample_size  # type: ignore[attr-defined]

    @property
    def channels(self) -> int:
        """Channels of a sample."""
        return self.model.config.in_channels  # type: ignore[union-attr]

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 3 and shape[0] == self.channels and not any(s % self.multiple for s in shape[1:])

    def settle(self, shape: tuple[int, ...], spec: Any) -> None:
        values = {k: getattr(spec, k) for k in self.extras if hasattr(spec, k)}
        if "sample_size" in self.extras:
            values["sample_size"] = tuple(shape[-2:])
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self.base = {**self.base, **{k: _plain(v) for k, v in values.items()}}

    def keep(self, indices: Sequence[int]) -> None:
        depth = len(self.units)
        if not indices or not all(0 <= i < depth for i in indices):
            raise ValueError(f"{self.name}: can keep units 0 to {depth - 1}, at least one, got {list(indices)}")
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
        """The output of the stock model's forward from the last stream."""
        raise NotImplementedError

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
        return Facts(c.num_attention_heads * c.attention_head_dim, c.num_attention_heads, lora=ATTENTION)

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


# ---- inside the stock pipeline ---------------------------------------------------------------------------------------

TOLD = {  # arguments of stock models, which edits read as fields of `Condition`
    "class_labels": "label",
    "encoder_hidden_states": "text",
    "pooled_projections": "pooled",
    "guidance": "guidance",
}


@contextmanager
def attached(pipeline: Any, denoiser: StockDenoiser) -> Iterator[Any]:
    """The stock `diffusers` pipeline with this denoiser, its edits included, in place of its transformer.

    Edits that remember something between steps get the step from the pipeline's scheduler and its guidance branch from
    the pipeline's cache context, where it names one; those that change what is embedded get the scheduler's time and
    what the pipeline tells its transformer, without masks. On leaving, the pipeline has its own transformer again.

    Raises:
        ValueError: if the pipeline's transformer is of another class, or an edit makes the denoiser a flow map
    """
    if leader := next((name for name, e in denoiser.applied.items() if e.leads), None):
        raise ValueError(
            f"edit {leader!r} makes this {denoiser.name} a flow map, which must be told where a step ends, and a stock "
            "pipeline tells times alone: sample it with edit.sampling.Sampler"
        )
    own, model = pipeline.transformer, denoiser.model
    if type(own).__name__ != denoiser.stock:
        raise ValueError(f"the pipeline has a {type(own).__name__}, a {denoiser.name} stands in for {denoiser.stock}")
    calls = _Calls(pipeline, denoiser)
    model.forward, model.cache_context = calls.forward, calls.cache_context  # type: ignore[method-assign, assignment]
    pipeline.transformer = model
    try:
        yield pipeline
    finally:
        pipeline.transformer = own
        del model.forward, model.cache_context


class _Calls:
    """A pipeline's calls of its transformer, as steps of a generation."""

    def __init__(self, pipeline: Any, denoiser: StockDenoiser):
        self.pipeline, self.denoiser = pipeline, denoiser
        self.branch, self.memory = "cond", {}
        self.seen: set[tuple[int, str]] = set()  # calls of this generation

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        before, self.branch = self.branch, name
        try:
            yield
        finally:
            self.branch = before

    def forward(self, hidden_states: Tensor, return_dict: bool = True, **native: Any) -> Any:
        scheduler = self.pipeline.scheduler
        if hasattr(scheduler, "step_index"):
            index = scheduler.step_index or 0
        else:  # DDIM and DDPM do not count
            index = int((scheduler.timesteps == native["timestep"].flatten()[0]).nonzero()[0, 0])
        if (index, self.branch) in self.seen:  # the next generation has begun
            self.memory, self.seen = {}, set()
        self.seen.add((index, self.branch))
        count = len(scheduler.timesteps)
        if self.denoiser.prediction == "noise":  # the sigmas of DDPM schedulers are no times
            sigma = (float(scheduler.timesteps[index]) + 1) / scheduler.config.num_train_timesteps
        else:
            sigma = float(scheduler.sigmas[index]) if hasattr(scheduler, "sigmas") else 1 - index / count
        step = Step(index, count, sigma, self.branch, self.memory)
        sample = self._predict(replace(self.denoiser.embed(hidden_states=hidden_states, **native), step=step), native)
        if hidden_states.ndim == 3:  # packed, as it came
            sample = tokens_of(sample)
        if not return_dict:
            return (sample,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=sample)

    def _predict(self, stream: Stream, native: Mapping[str, Any]) -> Tensor:
        """`Denoiser.forward` from the embedded stream on: b c y x, the learned variance after the prediction."""
        d, step = self.denoiser, stream.step
        assert step is not None
        t = torch.full((len(stream.image),), step.sigma, device=stream.image.device)
        condition = Condition(**{field: native[name] for name, field in TOLD.items() if name in native})
        hooks = [(edit, d.edits[name] if name in d.edits else None) for name, edit in d.applied.items()]
        for edit, own in hooks:
            stream = edit.embed(stream, t, condition, own)
        stream = d.run(stream)
        output = d.readout(stream)
        for edit, own in hooks:
            output = edit.readout(output, stream, own)
        return output.sample if output.variance is None else torch.cat((output.sample, output.variance), 1)
