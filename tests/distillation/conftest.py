"""A tiny guidance-distilled FLUX, and one training pass of a student beside its teacher."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from edit.backbones.flux import Flux, FluxConfig
from edit.denoiser import Branch, Condition, Denoiser, Forced
from edit.objectives import Pass, Term

TINY = dict(
    in_channels=16,
    num_layers=3,
    num_single_layers=4,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    axes_dims_rope=(4, 6, 6),
)


@pytest.fixture(scope="session")
def make_flux() -> Callable[..., Flux]:
    """Width 32, units 0 to 2 double and 3 to 6 single, random weights, eval mode."""

    def make(seed: int = 0, **options) -> Flux:
        denoiser = FluxConfig(**{**TINY, **options}).build()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in denoiser.parameters():  # modulations start at zero, which would hide what units do
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
        return denoiser.eval()

    return make


@pytest.fixture
def flux(make_flux) -> Flux:
    return make_flux()


@pytest.fixture
def told() -> tuple[Tensor, Tensor, Condition]:
    """(x, t, condition) of three samples for `flux`: 16 image tokens, 5 text tokens."""
    g = torch.Generator().manual_seed(1)
    text, pooled = torch.randn(3, 5, 24, generator=g), torch.randn(3, 20, generator=g)
    return torch.randn(3, 4, 8, 8, generator=g), torch.tensor([0.2, 0.5, 0.9]), Condition(text=text, pooled=pooled)


@pytest.fixture
def see() -> Callable[..., Pass]:
    """One pass of a student and its teacher, with everything one term asks for."""

    def see(student: Denoiser, teacher: Denoiser, batch, term: Term, progress: float = 0.0) -> Pass:
        x, t, _ = batch
        with torch.no_grad():
            taught = teacher(*batch, taps=term.teacher_taps, branches=term.teacher_branches)
        sources, share = term.forced(progress)
        where = torch.arange(len(x)) < share * len(x)
        forced = {
            unit: Forced(Branch(taught.trace[f"unit.{s}"], taught.trace.get(f"unit.{s}.text")), where)
            for unit, s in sources.items()
        }
        out = student(*batch, taps=term.taps, branches=term.branches, forced=forced)
        return Pass(out, {"x_t": x}, t, progress, taught)

    return see
