"""The linear path: its conversions are inverse to each other and exact for Gaussian data."""

import pytest
import torch

from edit.objectives import (
    FlowMatching,
)
from edit.paths import noise_to_velocity, velocity_to_data, velocity_to_noise, velocity_to_score


def pair(b: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(data, noise, times)"""
    return torch.randn(b, 4, 8, 8), torch.randn(b, 4, 8, 8), torch.linspace(0.1, 0.9, b)


def test_conversions_recover_data_noise_and_each_other():
    x, eps, t = (v.double() for v in pair())
    x_t, v = FlowMatching().corrupt(x, eps, t), eps - x
    torch.testing.assert_close(velocity_to_data(v, x_t, t), x)
    torch.testing.assert_close(velocity_to_noise(v, x_t, t), eps)
    torch.testing.assert_close(noise_to_velocity(velocity_to_noise(v, x_t, t), x_t, t), v)
    torch.testing.assert_close(velocity_to_score(v, x_t, t), -eps / t.view(-1, 1, 1, 1))


@pytest.mark.parametrize("s", [0.5, 1.0, 2.0])
def test_score_of_gaussian_data_is_that_of_the_noisy_gaussian(s):
    x_t, t = torch.randn(5, 4, 2, 2, dtype=torch.float64), torch.linspace(0.05, 1, 5, dtype=torch.float64)
    at = t.view(-1, 1, 1, 1)
    variance = (1 - at) ** 2 * s**2 + at**2
    v = (at - (1 - at) * s**2) / variance * x_t
    torch.testing.assert_close(velocity_to_score(v, x_t, t), -x_t / variance)
