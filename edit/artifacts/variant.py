"""Training-free variants of an artifact in memory: other edits or steps, the same tensors as weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edit import edits as editing
from edit.artifacts.checkpoint import Artifact
from edit.artifacts.weights import split_state
from edit.denoiser import Denoiser, Edit
from edit.sampling import Sampler


def variant(artifact: Artifact, edits: Mapping[str, Edit], sampler: Sampler | None = None) -> Artifact:
    """The artifact with further edits on top, which must need no training.

    The structure is built anew, as a reader of the artifact builds it, so that slots and wrappers of the two do not
    meet. The tensors are the artifact's own, unless an edit sets weights (`initialise`): then they are copies.

    Args:
        artifact: stays as it is
        edits: by name, applied after those that are live
        sampler: in place of the artifact's

    Raises:
        ValueError: if an edit adds parameters, which would have to be trained, or cannot be applied
    """
    made = twin(artifact.denoiser, copy=any(type(e).initialise is not Edit.initialise for e in edits.values()))
    before = set(split_state(made, made.state_dict())[1])
    for name, new in edits.items():
        editing.apply(made, {name: replace(new)})  # type: ignore[type-var]
        own = set(split_state(made, made.state_dict())[1]) - before
        if added := [key for key, _ in made.named_parameters() if key in own]:
            raise ValueError(
                f"{name} ({type(new).__name__}) is not training-free: it adds {len(added)} tensors of parameters, such "
                f"as {added[0]}, which mean nothing before they are trained; train them with train.py"
            )
    device = next(artifact.denoiser.parameters()).device
    return replace(artifact, denoiser=made.to(device).eval(), sampler=sampler or artifact.sampler)


def twin(denoiser: Denoiser, copy: bool = False) -> Denoiser:
    """The same denoiser once more, with the same tensors; or with copies of them."""
    state = denoiser.state_dict()
    state = {k: v.clone() for k, v in state.items()} if copy else state
    return editing.rebuilt(denoiser, denoiser.applied, state, "the denoiser's own state")


def same_weights(one: Denoiser, other: Denoiser) -> bool:
    """Whether two denoisers store the same: the same names, each with the very same tensor."""

    def stored(denoiser: Denoiser) -> dict[str, tuple[int, tuple[int, ...]]]:
        stock, own = split_state(denoiser, denoiser.state_dict())
        return {k: (v.data_ptr(), tuple(v.shape)) for k, v in {**stock, **own}.items()}

    return stored(one) == stored(other)
