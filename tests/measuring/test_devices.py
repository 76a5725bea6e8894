"""Peaks of devices by name."""

import pytest

from edit.measuring.devices import mfu, peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("NVIDIA A10G", None),
        ("Tesla V100-SXM2-32GB", None),
        ("cpu", None),
    ],
)
def test_peaks_are_known_by_device_name_or_not_at_all(name, peak):
    assert peak_flops(name) == peak


def test_mfu_is_the_share_of_the_peak():
    assert mfu(31.2e12, 0.2, "NVIDIA A100-SXM4-80GB") == pytest.approx(0.5)
    assert mfu(1.0, 1.0, "cpu") is None
