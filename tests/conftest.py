"""Shared by all tests: one thread, no network, fixed seeds, and warnings from our own code as errors."""

import os

# before torch is imported: it reads the thread count once
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", WANDB_MODE="disabled")

import gc  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from views import passed  # noqa: E402
from weights import randomise  # noqa: E402

from edit.backbones.dit import DiT, DiTConfig  # noqa: E402
from edit.backbones.flux import Flux, FluxConfig  # noqa: E402
from edit.denoiser import Denoiser  # noqa: E402
from edit.losses import Seen, Term  # noqa: E402
from edit.stream import Branch, Condition, Forced

torch.set_num_threads(1)
# The autograd engine starts a thread per device at its first backward, and a process with such threads cannot be forked
# (`ranks.py`). So that comes before a FakeTensorMode adds a GPU that is not there.
torch.ones((), requires_grad=True).backward()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", r"error:::(edit|recipes|data)(\.|$)")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker per core, up to four of 2 GB each; none for a single file, and for what needs all cores or the GPU."""
    one_file = len(config.args) == 1 and Path(config.args[0].split("::")[0]).is_file()
    alone = one_file or config.option.markexpr in ("slow", "gpu")
    return 0 if alone else min(4, len(os.sched_getaffinity(0)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no worker is left alone with one of them at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_every_edit.py", "test_launch.py"))


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """Modules that are imported stay: the collector need not look at their millions of objects at each of its rounds,
    of which configurations and `gc.collect` in our own code make many (0.3 s each)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_dit() -> Callable[..., DiT]:
    """A tiny DiT in eval mode with random weights; keywords change its configuration."""

    def make(seed: int = 0, **options) -> DiT:
        tiny = {"input_size": 8, "hidden_size": 32, "depth": 3, "num_heads": 4, "num_classes": 10}
        denoiser = DiTConfig(**{**tiny, **options}).build()
        randomise(denoiser, seed)
        return denoiser.eval()

    return make


@pytest.fixture
def dit(make_dit) -> DiT:
    """Depth 3, width 32, 4x8x8 samples in 16 tokens, 10 classes, flow convention."""
    return make_dit()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Condition]:
    """(x, t, condition) of four samples for `dit`, the last of the null class."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 4, 8, 8, generator=generator)
    return x, torch.tensor([0.2, 0.5, 0.9, 1.0]), Condition(label=torch.tensor([0, 3, 9, 10]))


TINY_FLUX = dict(
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
        denoiser = FluxConfig(**{**TINY_FLUX, **options}).build()
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
def see() -> Callable[..., Seen]:
    """One pass of a student and its teacher, with everything one term asks for."""

    def see(student: Denoiser, teacher: Denoiser, batch, term: Term, progress: float = 0.0) -> Seen:
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
        return passed(out, t, progress, taught)

    return see
