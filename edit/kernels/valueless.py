"""Tensors that have a shape and no numbers, on which work and memory are counted."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def valueless(x: Tensor) -> bool:
    """Whether a tensor is on the meta device, or faked."""
    return x.is_meta or isinstance(x, FakeTensor)


def counted(x: Tensor) -> bool:
    """Whether nothing will run: a tensor without numbers, and no compiler that looks at shapes for a later run."""
    return valueless(x) and not torch.compiler.is_compiling()
