from pathlib import Path

import pytest
import torch
from exports import ABSENT, make_flux

from edit.backbones.flux import Flux
from edit.stream import Condition


@pytest.fixture
def flux() -> Flux:
    """3 double and 3 single units of width 32, samples of 4 channels, told their guidance."""
    return make_flux()


@pytest.fixture
def asked() -> tuple[torch.Tensor, torch.Tensor, Condition]:
    g = torch.Generator().manual_seed(1)
    text, pooled = torch.randn(2, 5, 24, generator=g), torch.randn(2, 20, generator=g)
    condition = Condition(text=text, pooled=pooled, guidance=torch.tensor([1.0, 3.5]))
    return torch.randn(2, 4, 8, 8, generator=g), torch.tensor([0.3, 0.9]), condition


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> Path:
    """A stock FluxPipeline folder with a tiny real VAE, CLIP and scheduler, without tokenizers."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 20, "intermediate_size": 20, "num_attention_heads": 2, "num_hidden_layers": 1}
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=20000, max_position_embeddings=8, projection_dim=20, **sizes))
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, shift_factor=0.1)
    scheduler, flux = FlowMatchEulerDiscreteScheduler(shift=2.0), make_flux(seed=3)
    parts = {"text_encoder": clip, **ABSENT}
    flux_class = Flux.stock_class()
    stock = flux_class(**{k: v for k, v in flux.config.items() if k not in Flux.extras})
    stock.load_state_dict(flux.model.state_dict())
    folder = tmp_path_factory.mktemp("teacher") / "pipeline"
    FluxPipeline(scheduler=scheduler, vae=vae, transformer=stock, **parts).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: toy-licence\nlicense_link: LICENSE.md\n---\n")
    (folder / "LICENSE.md").write_text("for toys only\n")
    return folder
