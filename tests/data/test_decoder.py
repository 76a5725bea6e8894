"""Latents become pixels with a graph, the same that are looked at."""

import pytest
import torch

from data.making.encoders import VAE
from data.making.precomputer import precompute
from data.pixels import to_uint8
from data.sets.latents import Latents
from data.sets.shapes import Shapes


@pytest.fixture
def latents(job, folder):
    return Latents(str(precompute(job(folder), lambda *_: None).parent), flip=False)


def test_the_vaes_pixels_are_those_that_are_looked_at_and_gradients_reach_the_latents(latents, vae):
    x = torch.stack([latents.train().sample(i, 0)["x"] for i in range(3)]).requires_grad_(True)
    decoder = latents.decoder()
    pixels = decoder(x)
    torch.testing.assert_close(
        pixels, VAE(str(vae)).decode(x / 0.5 + 0.1), rtol=1e-5, atol=1e-5
    )  # fp32, in batches of 8
    assert (to_uint8(pixels.detach()).int() - latents.to_frames(x.detach())[:, 0].int()).abs().max() <= 1  # rounding
    pixels.square().sum().backward()
    assert x.grad.abs().flatten(1).amax(1).gt(0).all()
    assert all(p.grad is None and not p.requires_grad for p in decoder.parameters())


def test_the_codecs_pixels_are_those_that_are_looked_at():
    data = Shapes(count=4, held=1)
    x = torch.stack([data.train().sample(i, 0)["x"] for i in range(4)]).requires_grad_(True)
    pixels = data.decoder()(x)
    shown = (127.5 * pixels.detach().permute(0, 2, 3, 1) + 128).clamp(0, 255).to(torch.uint8)
    assert pixels.shape == (4, 3, 32, 32) and torch.equal(shown, data.to_frames(x.detach())[:, 0])
    pixels[0].sum().backward()
    assert x.grad[0].any() and not x.grad[1:].any()
