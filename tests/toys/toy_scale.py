"""Edits that calibrate, for tests: one from noisy batches, one from a generation, which sees the first's scale."""

from dataclasses import dataclass

import torch
from torch import nn

from edit.denoiser import Edit


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


@dataclass
class Scale(Edit):
    """Divide the prediction by its root mean square over the calibration's batches."""

    def apply(self, denoiser):
        return Own()

    def readout(self, output, stream, own):
        return output._replace(sample=output.sample / own.scale)

    def calibrate(self, denoiser, batches, own):
        squares = [denoiser(*noisy).sample.square().mean() for noisy in batches]
        own.count.fill_(len(squares))
        own.scale.copy_(torch.stack(squares).mean().sqrt())


@dataclass
class Watcher(Edit):
    """Count the evaluations of a generation, and remember how large the samples are."""

    def apply(self, denoiser):
        return Own()

    def calibrate(self, denoiser, batches, own):
        steps = []
        samples = batches.generate(lambda step, output: steps.append(step.index))
        own.count.fill_(len(steps))
        own.scale.copy_(torch.cat(samples).square().mean().sqrt())


@dataclass
class Broken(Edit):
    """Finds a scale that is no number."""

    def apply(self, denoiser):
        return Own()

    def calibrate(self, denoiser, batches, own):
        own.scale.fill_(float("nan"))
