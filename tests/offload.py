"""Weights that are away while nobody calls their layer, without a second device."""

from collections.abc import Callable

from torch import nn


def offloaded(module: nn.Module) -> None:
    """As leaf offloading does it: a linear layer has its weights while it is called, and none in between."""

    def hooks(weights: dict[str, nn.Parameter]) -> tuple[Callable, Callable]:
        away = {k: nn.Parameter(p.to("meta"), p.requires_grad) for k, p in weights.items()}
        return (lambda m, args: m._parameters.update(weights)), (lambda m, args, out: m._parameters.update(away))

    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            fetch, drop = hooks({k: p for k, p in layer._parameters.items() if p is not None})
            layer.register_forward_pre_hook(fetch)
            layer.register_forward_hook(drop)
            drop(layer, (), None)
