"""The teacher beside the student: where its weights are, how it is guided, which outputs it gives.

Specification: methods/distillation.md, roles (D2, D3.2, D6).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from edit.denoiser import ENDS, Denoiser
from edit.distillation.guidance import TeacherGuidance
from edit.edits import shards, without
from edit.facts import check_units
from edit.measuring.memory import Placement
from edit.stream import Condition, Output
from edit.unit import Unit

if TYPE_CHECKING:  # torch.distributed takes a second, and one process alone needs none of it
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy


class Origin(NamedTuple):
    """Two ways to make one model."""

    build: Callable[[], Denoiser]  # with its weights
    structure: Callable[[], Denoiser]  # without; called under `torch.device("meta")`


class Teacher:
    """A frozen model that predicts at the student's noisy samples. Not a module: checkpoints leave it out.

    Args:
        build: makes the teacher with its weights; None: it is tied
        structure: the same without weights, called under `torch.device("meta")`; used when it is sharded
        guidance: the scales of its classifier-free guidance
        placement: "replicated": whole on every device; "sharded": FSDP2 over all ranks; "offloaded": in main memory,
            each layer on the device only while it runs; "tied": the student without the edits that can be switched
            off, no memory at all
        dtype: of its weights
    """

    def __init__(
        self,
        build: Callable[[], Denoiser] | None,
        structure: Callable[[], Denoiser] | None,
        guidance: TeacherGuidance,
        placement: Placement = "replicated",
        dtype: torch.dtype = torch.float32,
    ):
        if (placement == "tied") != (build is None):
            raise ValueError("a teacher is built exactly when it is not tied to the student")
        self.build, self.structure, self.guidance = build, structure, guidance
        self.placement, self.dtype = placement, dtype
        self.denoiser: Denoiser | None = None
        self.taps: tuple[int | str, ...] = ()
        self.branches: tuple[int, ...] = ()
        self.maps: Mapping[int, int] = {}

    def configure(
        self,
        student: Denoiser,
        taps: tuple[int | str, ...],
        branches: tuple[int, ...],
        maps: Mapping[int, int] = MappingProxyType({}),
    ) -> Denoiser:
        """Make the model; called in `configure_model`, after the student.

        Args:
            student: the model that is trained, which is a tied teacher's model as well
            taps: units whose tokens are wanted
            branches: units whose attention and feed-forward branches are wanted
            maps: units whose attention maps are wanted, and how many rows

        Returns:
            The teacher's model, whose structure loss terms may read.

        Raises:
            ValueError: if a term taps a unit that the teacher does not have
        """
        self.taps, self.branches, self.maps = taps, branches, maps
        if self.placement == "tied":
            model = student
        elif self.placement == "sharded":
            model = self.denoiser = self._shard()
        else:
            assert self.build is not None
            with torch.device("cpu"):
                model = self.denoiser = self.build().to(self.dtype)
        if self.denoiser is not None:
            self.denoiser.requires_grad_(False).eval()
        depth = len(model.units)
        told = (i for i in (*taps, *branches, *maps) if i not in ENDS)
        check_units("a term", told, depth, "the teacher", -depth)  # type: ignore[arg-type]
        return model

    def _shard(self) -> Denoiser:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy

        assert self.build is not None and self.structure is not None
        if not torch.distributed.is_initialized():
            raise ValueError(
                "teacher.placement=sharded needs several processes: use trainer=ddp or fsdp2, or replicated"
            )
        state: Mapping[str, Any] = {}
        if torch.distributed.get_rank() == 0:
            with torch.device("cpu"):
                state = self.build().to(self.dtype).state_dict()
        kind = "cuda" if torch.cuda.is_available() and torch.distributed.get_backend() == "nccl" else "cpu"
        device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
        mesh = init_device_mesh(kind, (torch.distributed.get_world_size(),))
        structure, dtype = self.structure, self.dtype
        return shard(
            lambda: structure().to(dtype), state, device, mesh, MixedPrecisionPolicy(cast_forward_inputs=False)
        )

    def place(self, device: torch.device) -> None:
        """Move the weights to the device, or prepare their offloading."""
        if self.denoiser is None or self.placement == "sharded":
            return
        if self.placement == "offloaded":
            offload(self.denoiser, device)
        else:
            self.denoiser.to(device)

    def release(self) -> None:
        """Free the weights, for good."""
        self.denoiser = None

    @torch.no_grad()
    def __call__(
        self, student: Denoiser, x_t: Tensor, t: Tensor, condition: Condition, null: Condition, scale: Tensor
    ) -> Output:
        """The guided prediction, with taps in the trace; computed in fp32 outside of the student's autocast.

        Args:
            student: the model that is trained; a tied teacher is this model with its edits off
            x_t: noisy samples, b c *sizes
            t: their times in [0, 1], 1 = noise, b
            condition: after label drop
            null: the unconditional counterpart
            scale: guidance scales, b
        """
        wanted = self.taps, self.branches, self.maps
        if self.denoiser is not None:
            return self.guidance(self.denoiser, x_t, t, condition, null, scale, *wanted)
        with without(student):
            return self.guidance(student, x_t, t, condition, null, scale, *wanted)

    def features(self, student: Denoiser, x_t: Tensor, t: Tensor, condition: Condition, scale: Tensor) -> Output:
        """The prediction without guidance, tapped tokens in its trace, with a graph to x_t where gradients are on.

        Arguments are as above.

        Raises:
            ValueError: if the weights do not stay in place until the backward pass
        """
        if self.placement in ("tied", "offloaded"):
            raise ValueError(
                f"teacher.placement={self.placement}: gradients through the teacher need weights that stay in place: "
                "use replicated or sharded"
            )
        assert self.denoiser is not None
        told = scale if self.denoiser.facts.told else None
        return self.denoiser(x_t, t, replace(condition, guidance=told), taps=self.taps)

    @torch.no_grad()
    def tapped(
        self, student: Denoiser, x_t: Tensor, t: Tensor, condition: Condition, scale: Tensor, taps: Collection[int]
    ) -> Mapping[str, Tensor]:
        """Tokens of units (`Denoiser.tapped`), without guidance and without a graph; other arguments as above."""
        model = student if self.denoiser is None else self.denoiser
        with without(student) if self.denoiser is None else nullcontext():
            return model.tapped(x_t, t, replace(condition, guidance=scale if model.facts.told else None), taps)


def offload(denoiser: Denoiser, device: torch.device) -> None:
    """Keep the weights in main memory; each layer is on the device only while it runs (`diffusers`' group offloading).

    On a GPU the next layer is copied while the present one runs.
    """
    from diffusers.hooks import apply_group_offloading

    model, memory = denoiser.model, torch.device("cpu")
    apply_group_offloading(model, device, memory, offload_type="leaf_level", use_stream=device.type == "cuda")
    # hooks fetch parameters of the model itself in its own forward, which is never called
    for t in (*model.parameters(recurse=False), *model.buffers(recurse=False)):
        t.data = t.data.to(device)
    denoiser.edits.to(device)


def shard(
    structure: Callable[[], Denoiser],
    state: Mapping[str, Any],
    device: torch.device,
    mesh: DeviceMesh,
    policy: MixedPrecisionPolicy,
) -> Denoiser:
    """A denoiser sharded by FSDP2. Rank 0 alone holds `state`, the whole state dict, and broadcasts it.

    A unit is gathered for its own call, and so is what edits name (`Edit.shards`); all else for the whole forward.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    with torch.device("meta"):
        net = structure()
    for module in shards(net):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for unit in units_of(net):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
        for name in unit.apart:
            register_fsdp_forward_method(unit, name)
    fully_shard(net, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(net, "tapped")
    net.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(net, dict(state), options=options)
    return net


def units_of(denoiser: Denoiser) -> list[Unit]:
    """The family's own units, which hold the weights, also where edits have wrapped them."""
    return [m for m in denoiser.model.modules() if isinstance(m, Unit)]
