"""LoRA (arXiv 2106.09685) through `peft`: train low-rank additions to frozen linear layers.

y = W x + (alpha / rank) B A x, with A random and B zero, so a fresh LoRA leaves the output unchanged. With its
adapters switched off the model is its own teacher, at no cost in memory (`edit.edits.without`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from torch import nn

from edit.denoiser import Denoiser, Edit
from edit.inputs.limits import Count, Limits, Positive, check_numbers
from edit.replaced import gone

ADAPTER = "default"  # peft's own name for a model's only adapter, which other tools expect


@dataclass
class LoRA(Edit):
    """Low-rank additions to every linear layer whose name ends in one of `targets`.

    Args:
        rank: of the addition
        alpha: scale numerator; the paper keeps it fixed while the rank is tuned
        dropout: on the addition's input
        targets: name endings inside a model, e.g. "attn.qkv", or "all-linear"; none given: those of the family's
            `facts` that the model has, which are written down here when the edit is applied
    """

    rank: Count = 16
    alpha: Positive = 16.0
    dropout: Annotated[float, Limits(0, below=1)] = 0.0
    targets: tuple[str, ...] = ()

    keeps = True

    def __post_init__(self):
        check_numbers(self)
        self.targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)

    def apply(self, denoiser: Denoiser) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        if any(isinstance(m, LoraLayer) for m in denoiser.model.modules()):
            raise ValueError("LoRA: the model already has one; fold it before adding another")
        linear = [n for n, m in denoiser.model.named_modules() if isinstance(m, nn.Linear)]
        self.targets = self.targets or tuple(t for t in denoiser.facts.lora if any(n.endswith(t) for n in linear))
        if not self.targets:
            raise ValueError(f"LoRA: no layer of this {denoiser.name} is adapted by default: give targets")
        targets = "all-linear" if self.targets == ("all-linear",) else list(self.targets)
        if targets != "all-linear" and (unmet := [t for t in self.targets if not any(n.endswith(t) for n in linear)]):
            raise ValueError(
                f"LoRA: no linear layer's name ends in {unmet[0]!r}; there are {', '.join(linear[:8])}, ..."
            )
        replaced = next(gone(denoiser.model), None) is not None  # peft goes by names, and these layers still have one
        if targets != "all-linear" and replaced:
            targets = [n for n in linear if n.endswith(self.targets)]
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=targets)
        before = [p for p in denoiser.model.parameters() if p.requires_grad]
        inject_adapter_in_model(config, denoiser.model, adapter_name=ADAPTER)
        for p in before:  # peft freezes all that is not its own; here the recipe asks every edit
            p.requires_grad_(True)

    def trainable(self, name: str) -> bool:
        return self.owns(name) or name.startswith("edits.")

    def owns(self, name: str) -> bool:
        return ".lora_" in name

    def stock_key(self, key: str) -> str | None:
        return None if self.owns(key) else key.replace(".base_layer.", ".")

    def off(self, denoiser: Denoiser) -> AbstractContextManager[None]:
        from peft.tuners.lora import LoraLayer

        return switched_off(m for m in denoiser.model.modules() if isinstance(m, LoraLayer))

    def fold(self, denoiser: Denoiser) -> None:
        """Add B A to the weights and take the adapters out."""
        from peft.tuners.lora import LoraLayer

        for name, module in list(denoiser.model.named_modules()):
            if isinstance(module, LoraLayer):
                module.merge()
                parent, _, child = name.rpartition(".")
                setattr(denoiser.model.get_submodule(parent), child, module.get_base_layer())
        del denoiser.model.peft_config


@contextmanager
def switched_off(layers: Iterable[Any]) -> Iterator[None]:
    """Additions to linear layers that add nothing inside the block: bit for bit the model that they were applied to."""
    found = list(layers)
    try:
        for layer in found:
            # peft's own `enable_adapters` would rewrite requires_grad of every factor, frozen ones included
            layer._disable_adapters = True
        yield
    finally:
        for layer in found:
            layer._disable_adapters = False
