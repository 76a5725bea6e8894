"""A denoiser inside the stock `diffusers` pipeline: the pipeline's calls are the evaluations of one generation.

    denoiser = edit.attach(pipeline)
    edit.apply(denoiser, {"cache": TaylorSeer(interval=4, order=1, site="last")})
    image = pipeline("a cat").images[0]

Pipelines with two transformers (Wan 2.2: one for high noise, one for low noise, divided at `boundary_ratio`) take two
denoisers, each with edits of its own. Both see one generation: the step's index, their number and the grid of times run
over all of it. What edits remember is kept apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from edit.artifacts.description import readers
from edit.backbones.stock import StockDenoiser
from edit.stream import Condition, Step, Stream

TOLD = {  # arguments of stock models, which edits read as fields of `Condition`
    "class_labels": "label",
    "encoder_hidden_states": "text",
    "pooled_projections": "pooled",
    "guidance": "guidance",
}
UNTOLD = "cond_uncond"  # the cache context of pipelines that send both guidance branches in one batch, or one alone
PLACES = ("transformer", "transformer_2")


def attach(pipeline: Any) -> StockDenoiser:
    """The transformer of a stock `diffusers` pipeline as a denoiser around the same weights, in its place from now on.

    What `edit.apply` does to the denoiser it does to the pipeline's next call, too; `detach` gives the pipeline its own
    transformer back, which is not touched meanwhile. Edits meet the pipeline's steps as in `attached`.

    Raises:
        ValueError: if the pipeline has no transformer of a family here, has two, or has a denoiser attached already
    """
    own, kind = getattr(pipeline, PLACES[0], None), type(pipeline).__name__
    if getattr(pipeline, PLACES[1], None) is not None:
        raise ValueError(
            f"this {kind} has two transformers, which take a denoiser each: make both by the family's `of`, and use "
            "edit.backbones.attached.attached(pipeline, high, second=low)"
        )
    if _calls_of(own) is not None:
        raise ValueError(f"this {kind} has a denoiser attached already: apply edits to that one, or detach it first")
    config = {**getattr(own, "config", {}), "_class_name": type(own).__name__}
    found = [family for family in readers(config) if issubclass(family, StockDenoiser)]
    if own is None or not found:
        known = "DiT, FLUX.1, PixArt, Qwen-Image, SD3 and Wan"
        raise ValueError(f"this {kind} has a {type(own).__name__} as its transformer, and known here are {known}")
    denoiser = found[0].of(own)
    generation = _Generation(pipeline, noise=denoiser.prediction == "noise")
    _put(pipeline, PLACES[0], _Calls(generation, denoiser, own))
    return denoiser


def detach(pipeline: Any) -> None:
    """Give a pipeline its own transformers back; denoiser and edits stay as they are, outside of it.

    Raises:
        ValueError: if no denoiser is attached
    """
    there = [place for place in PLACES if _calls_of(getattr(pipeline, place, None)) is not None]
    if not there:
        raise ValueError(
            f"no denoiser is attached to this {type(pipeline).__name__}: edit.attach(pipeline) attaches one"
        )
    for place in there:
        _take_back(pipeline, place)


@contextmanager
def attached(pipeline: Any, denoiser: StockDenoiser | None, second: StockDenoiser | None = None) -> Iterator[Any]:
    """The stock `diffusers` pipeline with denoisers, their edits included, in place of its transformers.

    Edits that remember something between steps get the step from the pipeline: index, number and time from its cache
    context where it tells them, else from its scheduler; the guidance branch from its cache context, where it names
    one; else it is "joint" where the batch holds the same latents twice (in which order the pipeline knows), and
    "uncond" in a second call of a step. Edits that change what is embedded get the step's time and what the pipeline
    tells its transformer, without masks. On leaving, the pipeline has its own transformers again.

    Args:
        pipeline: whose transformers are replaced
        denoiser: for `pipeline.transformer`, in Wan 2.2 the expert of high noise; None: it stays as it is
        second: for `pipeline.transformer_2`, the expert of low noise; None: it stays as it is

    Raises:
        ValueError: if there is no such transformer, it is of another class, an edit makes the denoiser a flow map, one
            denoiser is given twice, or, in a call, an edit is `separate` and the pipeline sends a joint batch
    """
    given = {p: ours for p, ours in zip(PLACES, (denoiser, second), strict=True) if ours is not None}
    for place, ours in given.items():
        _refuse_unfit(pipeline, place, ours)
    if denoiser is not None and denoiser is second:
        raise ValueError("one denoiser cannot stand for both transformers: make a second one, with edits of its own")
    generation = _Generation(pipeline, noise=any(ours.prediction == "noise" for ours in given.values()))
    with ExitStack() as stack:
        for place, ours in given.items():
            _put(pipeline, place, _Calls(generation, ours, getattr(pipeline, place)))
            stack.callback(_take_back, pipeline, place)
        yield pipeline


def _refuse_unfit(pipeline: Any, place: str, denoiser: StockDenoiser) -> None:
    """Raises ValueError if a denoiser cannot stand in for the transformer at this place."""
    if leader := next((name for name, e in denoiser.applied.items() if e.leads), None):
        raise ValueError(
            f"edit {leader!r} makes this {denoiser.name} a flow map, which must be told where a step ends, and a stock "
            "pipeline tells times alone: sample it with edit.sampling.Sampler"
        )
    own = getattr(pipeline, place, None)
    if own is None:
        raise ValueError(
            f"a {type(pipeline).__name__} has no {place} here for this {denoiser.name} to stand in for: leave it out"
        )
    if _calls_of(denoiser.model) is not None:
        raise ValueError(f"this {denoiser.name} is attached to a pipeline already: detach it, or make a second one")
    if type(own).__name__ != denoiser.stock:
        raise ValueError(f"the pipeline has a {type(own).__name__}, a {denoiser.name} stands in for {denoiser.stock}")


def _put(pipeline: Any, place: str, calls: _Calls) -> None:
    model = calls.denoiser.model
    model.forward, model.cache_context = calls.forward, calls.cache_context  # type: ignore[method-assign, assignment]
    setattr(pipeline, place, model)


def _take_back(pipeline: Any, place: str) -> None:
    model = getattr(pipeline, place)
    calls = _calls_of(model)
    assert calls is not None
    setattr(pipeline, place, calls.own)
    del model.forward, model.cache_context


def _calls_of(model: Any) -> _Calls | None:
    """What a pipeline's calls of this transformer arrive at; None: the transformer itself."""
    owner = getattr(getattr(model, "forward", None), "__self__", None)
    return owner if isinstance(owner, _Calls) else None


class _Generation:
    """Where a pipeline is in its scheduler's timesteps; shared by its transformers.

    Every evaluation has an index, 0 for the first, wherever the scheduler begins. A second-order scheduler (Heun) lists
    both evaluations of a step, so each counts.

    Args:
        pipeline: with a scheduler
        noise: the models predict noise: the sigmas of such schedulers are no times
    """

    def __init__(self, pipeline: Any, noise: bool):
        self.pipeline, self.noise = pipeline, noise
        self.timesteps: Tensor | None = None  # of this generation
        self.number = 0  # of the generation
        self.begin = self.position = 0  # of the generation and of its latest evaluation, in `timesteps`
        self.times: tuple[float, ...] = ()  # of all evaluations, in [0, 1], 1 = noise; one more, 0, at the end
        self.levels: tuple[float, ...] = ()  # of noise at these times; (): they are the times

    @property
    def index(self) -> int:
        return self.position - self.begin

    @property
    def count(self) -> int:
        return len(self.times) - 1

    def reach(self, timestep: Tensor, told: Mapping[str, Any]) -> None:
        """Take the next evaluation's place.

        Args:
            timestep: as the model is given it
            told: by the pipeline's cache context: `step_index` and `num_inference_steps`, or nothing

        Raises:
            ValueError: if the pipeline counts more evaluations than its scheduler lists
        """
        timesteps = self.pipeline.scheduler.timesteps
        index, begin = told.get("step_index"), None
        if index is None:
            position = self._position(timestep)
            begin = getattr(self.pipeline.scheduler, "begin_index", None)  # another transformer may have begun
        else:
            begin = len(timesteps) - told.get("num_inference_steps", len(timesteps))
            position = begin + index
            if begin < 0 or position >= len(timesteps):
                raise ValueError(
                    f"the pipeline is at evaluation {index} of {len(timesteps) - begin}, and its scheduler lists "
                    f"{len(timesteps)}: sample with edit.sampling.Sampler"
                )
        if timesteps is not self.timesteps or position < self.position:  # the next generation has begun
            self.timesteps, self.number = timesteps, self.number + 1
            self.begin = position if begin is None else begin
            self.times, self.levels = self._times(), self._levels()
        self.position = position

    def _position(self, timestep: Tensor) -> int:
        """Of the evaluation in the scheduler's timesteps."""
        scheduler = self.pipeline.scheduler
        if not hasattr(scheduler, "step_index"):  # DDIM and DDPM do not count
            return int((scheduler.timesteps == timestep.flatten()[0]).nonzero()[0, 0])
        if scheduler.step_index is not None:
            return scheduler.step_index
        return getattr(scheduler, "begin_index", None) or 0  # before the first step

    def _times(self) -> tuple[float, ...]:
        """The times of this generation's evaluations, by the scheduler, and 0, where it ends."""
        scheduler, count = self.pipeline.scheduler, len(self.pipeline.scheduler.timesteps)
        if self.noise:
            times = [(t + 1) / scheduler.config.num_train_timesteps for t in scheduler.timesteps.tolist()]
        elif hasattr(scheduler, "sigmas"):
            times = scheduler.sigmas.tolist()
        else:
            times = [1 - k / count for k in range(count)]
        return (*times[self.begin : count], 0.0)

    def _levels(self) -> tuple[float, ...]:
        """s / (a + s) of samples a data + s noise, as the schedulers of models of noise have them, and 0."""
        if not self.noise:
            return ()
        kept = self.pipeline.scheduler.alphas_cumprod[self.timesteps[self.begin :].long().cpu()].double()
        return (*((1 - kept).sqrt() / (kept.sqrt() + (1 - kept).sqrt())).tolist(), 0.0)


class _Calls:
    """A pipeline's calls of one transformer, as steps of a generation.

    Args:
        generation: of the pipeline
        denoiser: that answers
        own: the pipeline's own transformer
    """

    def __init__(self, generation: _Generation, denoiser: StockDenoiser, own: Any):
        self.generation, self.denoiser, self.own = generation, denoiser, own
        self.named: str | None = None  # by the pipeline's cache context
        self.told: Mapping[str, Any] = {}  # by the same: step_index, num_inference_steps, sigma
        self.number = 0  # of the generation that this is about
        self.memory: dict = {}
        self.joint = False
        self.asked: int | None = None  # position of the latest call without a name

    @contextmanager
    def cache_context(self, name: str, **place: Any) -> Iterator[None]:
        """As the stock method, which some pipelines also tell where they are."""
        before = self.named, self.told
        self.named = None if name == UNTOLD else name
        self.told = {key: value for key, value in place.items() if value is not None}
        try:
            yield
        finally:
            self.named, self.told = before

    def forward(self, hidden_states: Tensor, return_dict: bool = True, **native: Any) -> Any:
        step = self._step(hidden_states, native["timestep"])
        sample = self._predict(replace(self.denoiser.embed(hidden_states=hidden_states, **native), step=step), native)
        sample = self.denoiser.packed(sample)
        if not return_dict:
            return (sample,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=sample)

    def _step(self, latents: Tensor, timestep: Tensor) -> Step:
        generation = self.generation
        generation.reach(timestep, self.told)
        if generation.number != self.number:
            self.number, self.memory, self.asked = generation.number, {}, None
            self.joint = self.named is None and self._joins(latents)
        return Step(
            index=generation.index,
            count=generation.count,
            sigma=self._sigma(),
            branch=self._branch(generation.position),
            memory=self.memory,
            times=generation.times,
            levels=generation.levels,
        )

    def _sigma(self) -> float:
        """The time of the evaluation: the pipeline's where it tells one that is a time, else the scheduler's."""
        times, told = self.generation.times, self.told.get("sigma")
        return times[self.generation.index] if told is None or self.generation.noise else float(told)

    def _joins(self, latents: Tensor) -> bool:
        """Whether the pipeline sends both guidance branches in one batch: the same latents twice."""
        pipeline = self.generation.pipeline
        told = getattr(pipeline, "do_classifier_free_guidance", None)
        half, odd = divmod(len(latents), 2)
        joint = not odd and torch.equal(latents[:half], latents[half:]) if told is None else told
        if joint and (name := next((n for n, e in self.denoiser.applied.items() if e.separate), None)):
            raise ValueError(
                f"edit {name!r} treats guidance branches differently, and a {type(pipeline).__name__} sends both "
                "in one batch: sample with edit.sampling.Sampler"
            )
        return joint

    def _branch(self, position: int) -> str:
        """The guidance branch of an evaluation; where the pipeline names none, the unconditional one comes second."""
        if self.named is not None:
            return self.named
        again, self.asked = self.asked == position, position
        return "uncond" if again else "joint" if self.joint else "cond"

    def _predict(self, stream: Stream, native: Mapping[str, Any]) -> Tensor:
        """`Denoiser.forward` from the embedded stream on: b c y x, the learned variance after the prediction."""
        d, step = self.denoiser, stream.step
        assert step is not None
        t = torch.full((len(stream.image),), step.sigma, device=stream.image.device)
        condition = Condition(**{field: native[name] for name, field in TOLD.items() if name in native})
        output = d.follow(stream, t, condition)
        return output.sample if output.variance is None else torch.cat((output.sample, output.variance), 1)
