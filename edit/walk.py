"""A generation, evaluation by evaluation: `Sampler.__call__` runs through it, training and stopping step it by hand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from edit.solvers import Path, Query
from edit.stream import Output, Step, pack, unpack

Look = Callable[[str, Output], None]  # sees the guidance branch and the output of each call of the model in one answer


def copied(v: Tensor) -> Tensor:
    """Without gradients, where it is."""
    return v.detach().clone()


class Walk:
    """A generation, one evaluation at a time:

        walk = sampler.walk(denoiser, objective, condition, samples)
        for moment in walk:
            moment.give(moment.ask())
        walk.x

    Gradients are as the caller has them: under `torch.no_grad` or `torch.inference_mode` there are none; else they
    reach the parameters through `ask`, and, from one evaluation to the next, through x and what edits remember. Giving
    `prediction.detach()` cuts x off, `detach` the memory.

    Args:
        guided: the guided prediction for a query, of a step or, with None, outside of a generation; then taps, and who
            looks at the outputs (`edit.sampling.Guided`)
        path: of the solver, not begun
        times: of the evaluations, then 0
        progress: called as (evaluations done, evaluations in all) after each
        state: `state()` of a walk with the same arguments, which goes on from there
        levels: of noise at the times (`Objective.level`); (): they are the times

    Attributes:
        x: b c *sizes float32, where the model is asked next; data after the last evaluation
        moment: the evaluation that is next; None after the last
        memory: what edits remember between evaluations
        given: the predictions so far, without gradients
    """

    def __init__(
        self,
        guided: Callable[[Query, Step | None, Collection[int], Look | None], Tensor],
        path: Path,
        times: tuple[float, ...],
        progress: Callable[[int, int], None] | None = None,
        state: Mapping[str, Any] | None = None,
        levels: tuple[float, ...] = (),
    ):
        self.guided, self.path, self.times, self.progress = guided, path, times, progress
        self.levels = levels
        self.memory: dict = {}
        self.given: list[Tensor] = []
        self.x: Tensor
        self.moment: Moment | None
        self._advance(0, None)
        if state is not None:
            self._continue(state)

    def __iter__(self) -> Iterator[Moment]:
        """The evaluations that are left.

        Raises:
            RuntimeError: if one was given no prediction
        """
        while (moment := self.moment) is not None:
            yield moment
            if self.moment is moment:
                raise RuntimeError(f"evaluation {moment.step.index} was given no prediction: call moment.give")

    def _advance(self, index: int, prediction: Tensor | None) -> None:
        """To evaluation `index`, or to the data."""
        try:
            query = self.path.send(prediction)  # type: ignore[arg-type] - None starts a generator
        except StopIteration as end:
            self.moment, self.x = None, end.value
            return
        step = Step(index, len(self.times) - 1, query.t, memory=self.memory, times=self.times, levels=self.levels)
        self.moment, self.x = Moment(self, query, step), query.x

    def detach(self) -> None:
        """From here on, no gradient reaches back through what edits remember.

        Raises:
            ValueError: if an edit remembers something else than `edit.stream.pack` takes
        """
        self._remember(unpack(pack(self.memory, Tensor.detach)))

    def _remember(self, memory: dict) -> None:
        self.memory.clear()  # the dictionary stays: steps hold it
        self.memory.update(memory)

    def state(self, copy: Callable[[Tensor], Tensor] = copied) -> dict[str, Any]:
        """All that `Sampler.walk` needs to go on from here in another process, to the same bits.

        Args:
            copy: makes the tensors of the state; to the CPU, say

        Returns:
            lists, tensors, numbers and texts alone, of tensors copies without gradients, where they are.
            `torch.load(weights_only=True)` reads them; its `map_location` moves them.

        Raises:
            RuntimeError: between `ask` and `give`
            ValueError: if an edit remembers something else than `edit.stream.pack` takes
        """
        if self.moment is not None and self.moment.asked:
            raise RuntimeError("the memory is ahead of this evaluation, which was asked: take the state after give")
        return {
            "times": list(self.times),
            "given": [copy(p) for p in self.given],
            "memory": pack(self.memory, copy),
        }

    def _continue(self, state: Mapping[str, Any]) -> None:
        """Solvers are arithmetic: the same predictions lead to the same place."""
        if (times := tuple(state["times"])) != self.times:
            raise ValueError(
                f"the state is of a generation at the times {cut(times)}, this sampler's are {cut(self.times)}: "
                "continue with the sampler that began"
            )
        for prediction in state["given"]:
            if len(prediction) != len(self.x) or prediction.shape[2:] != self.x.shape[2:]:
                shapes = f"{tuple(prediction.shape)}, this walk's of {tuple(self.x.shape)}"
                raise ValueError(f"the state is of samples of {shapes}: continue with the same samples")
            self.given.append(prediction)
            self._advance(len(self.given), prediction)
        self._remember(unpack(state["memory"]))


def cut(times: tuple[float, ...]) -> str:
    """The first few of them."""
    return ", ".join(f"{t:.4g}" for t in times[:4]) + (f" ... ({len(times)})" if len(times) > 4 else "")


class Moment:
    """One evaluation of a walk.

    Attributes:
        x: b c *sizes, where the model is asked
        end: time at which the solver's step ends, for flow maps; None: the velocity at this time is asked
        step: index, count, time and all times of the generation; `ask` names the branch
        asked: whether `ask` has changed the memory
    """

    def __init__(self, walk: Walk, query: Query, step: Step):
        self.walk, self.step, self.asked = walk, step, False
        self.x, self.end = query.x, query.end

    def ask(
        self, dense: bool = False, remember: bool = True, taps: Collection[int] = (), look: Look | None = None
    ) -> Tensor:
        """The guided prediction, as the generation itself takes it. Those with a step are shown to `watch`.

        Args:
            dense: without a step: edits with memory predict as the dense model, a teacher at the same x, and neither
                read nor write memory
            remember: what edits remember of this answer stays, as the solver goes on; once in an evaluation. False:
                the memory is read, and left as it was
            taps: units whose tokens are wanted, as of `Denoiser.forward`
            look: called with branch and output of each call of the model, dense or not; of branch "joint", the first b
                samples are cond's

        Returns:
            b c *sizes float32; behind it, as further channels, the maps and the variance that the solver takes

        Raises:
            RuntimeError: if a second answer were remembered
            ValueError: if the solver takes a map that the model does not record; if `dense` is asked of a sampler with
                perturbation, which is told by the step; if not remembered, and the memory cannot be copied (`pack`)
        """
        query = Query(self.x, self.step.sigma, self.end)
        if dense:
            return self.walk.guided(query, None, taps, look)
        if not remember:
            copied = replace(self.step, memory=unpack(pack(self.walk.memory, Tensor.clone)))
            return self.walk.guided(query, copied, taps, look)
        if self.asked:
            raise RuntimeError(
                f"evaluation {self.step.index} was asked before, and edits would remember it twice: leave the memory "
                "as it is with remember=False for all answers but one"
            )
        self.asked = True
        return self.walk.guided(query, self.step, taps, look)

    def give(self, prediction: Tensor) -> None:
        """Go on with this prediction, shaped as `ask` returns it: to the next evaluation, or to the data.

        Raises:
            RuntimeError: if this evaluation is over
        """
        walk, done = self.walk, self.step.index + 1
        if walk.moment is not self:
            raise RuntimeError(f"evaluation {self.step.index} was given a prediction already: go on with the next")
        walk.given.append(prediction.detach())
        walk._advance(done, prediction)
        if walk.progress is not None:
            walk.progress(done, self.step.count)
