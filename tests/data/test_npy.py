"""Arrays of strangers: what they claim is compared with what they have before memory is taken."""

import io

import numpy as np
import pytest

from data.damage import Damaged
from data.npy import array_of


def npy(array: np.ndarray, pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=pickle)
    return file.getvalue()


def claiming(shape: tuple[int, ...], numbers: bytes, dtype: str = "<f4") -> bytes:
    """A file that says it has a shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + numbers


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
def test_what_was_saved_is_read_whatever_sizes_are_left_open(dtype):
    array = np.arange(6, dtype=dtype).reshape(2, 3)
    for shape in ((2, 3), (None, 3), (None, None)):
        assert np.array_equal(array_of(npy(array), "a", shape), array)
    assert np.array_equal(array_of(npy(np.asfortranarray(array)), "a", (2, 3)), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(np.zeros((2, 4))), r"a has shape \(2, 4\), expected \(2, 3\)"),
        (npy(np.zeros(6)), r"a has shape \(6,\), expected \(2, 3\)"),
        (claiming((2**30, 2**30), b""), r"a has shape \(1073741824, 1073741824\), expected"),
        (claiming((2, 3), bytes(23)), "a is no array .*take 24 bytes, and it has 23"),
        (claiming((2, 3), bytes(25)), "a is no array .*take 24 bytes, and it has 25"),
        (npy(np.zeros((2, 3), dtype=np.int64)), "a holds something else than finite floating-point numbers"),
        (npy(np.full((2, 3), np.nan)), "a holds something else than finite floating-point numbers"),
        (npy(np.full((2, 3), np.inf)), "a holds something else than finite floating-point numbers"),
        (npy(np.array([{"a": 1}], dtype=object), pickle=True), "a is no array .*allow_pickle=False"),
        (b"", "a is no array"),
        (b"\x93NUMPY\x09\x00" + bytes(100), "a is no array .*9.0"),
        (b"\x80\x04K\x01.", "a is no array"),
    ],
)
def test_what_is_no_such_array_is_named(content, message):
    with pytest.raises(Damaged, match=message):
        array_of(content, "a", (2, 3))


def test_memory_is_not_taken_for_what_a_file_only_claims():
    """With a size left open, as a caption's length is: a terabyte that is not there."""
    with pytest.raises(Damaged, match="take 1099511627776 bytes, and it has 16"):
        array_of(claiming((2**36, 4), bytes(16)), "a", (None, 4))
