"""Arrays of strangers: what an npy file claims is compared with what it has before memory is taken for it."""

from __future__ import annotations

import io
import math

import numpy as np

from data.damage import Damaged

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def array_of(content: bytes, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """The numbers of an npy file, which are finite and of floating point.

    Args:
        content: of the file
        name: for messages
        shape: expected; None: any size

    Raises:
        Damaged: if it is no array, holds something else, or is of another shape
    """
    file = io.BytesIO(content)
    try:
        found, dtype = header(file)
        rest, needed = len(content) - file.tell(), math.prod(found) * dtype.itemsize
        if dtype.kind == "f":  # others are refused below, objects by numpy
            if len(found) != len(shape) or any(s not in (None, a) for s, a in zip(shape, found, strict=True)):
                raise Damaged(f"{name} has shape {found}, expected {shape}")
            if needed != rest:
                raise ValueError(f"{found} in {dtype} take {needed} bytes, and it has {rest}")
        elif not dtype.hasobject:
            raise Damaged(f"{name} holds something else than finite floating-point numbers")
        file.seek(0)
        array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(f"{name} is no array ({error})") from error
    if not np.isfinite(array).all():
        raise Damaged(f"{name} holds something else than finite floating-point numbers")
    return array


def header(file: io.BytesIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an npy file, whose numbers come next.

    Raises:
        ValueError: if this is none
    """
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"version {version[0]}.{version[1]} of the format")
    shape, _, dtype = HEADERS[version](file)
    return shape, dtype
