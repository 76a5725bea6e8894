"""Real files for the data sets: images, tar shards, a small VAE and a small text encoder with its tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from samples import SIZE, caption, png, write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of four images, each with a caption beside it."""
    for number in range(12):
        place = tmp_path / "photos" / "abc"[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:02d}.png").write_bytes(png(number))
        (place / f"{number:02d}.txt").write_text(caption(number))
    return tmp_path / "photos"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two tar shards of six images with class and caption, written by webdataset: shards/{0,1}.tar."""
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        write_tar(
            tmp_path / "shards" / f"{shard}.tar",
            [
                {
                    "__key__": f"{number:04d}",
                    "png": png(number),
                    "cls": str(number % 3).encode(),
                    "json": json.dumps({"caption": caption(number)}).encode(),
                }
                for number in range(6 * shard, 6 * shard + 6)
            ],
        )
    return tmp_path / "shards"


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random AutoencoderKL that halves the image once, with a shift and a scale."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=4,
        sample_size=SIZE,
        scaling_factor=0.5,
        shift_factor=0.1,
    ).save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5 encoder of width 8 with a word tokenizer, which AutoTokenizer reads."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("t5")
    T5EncoderModel(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(
        place
    )
    tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP text encoder of width 12 with the same tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("clip")
    config = CLIPTextConfig(
        vocab_size=16,
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4,
        eos_token_id=1,
        bos_token_id=2,
        pad_token_id=0,
    )
    CLIPTextModel(config).save_pretrained(place)
    tokenizer().save_pretrained(place)
    return place


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "red", "square", "on", "a", "blue", "disc"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


@pytest.fixture
def job(vae: Path, tmp_path: Path) -> Callable:
    """A precompute job at test size; keywords change it."""
    from data.making.job import Job

    def make(images: Path, out: str = "latents", **options) -> Job:
        tiny = {"vae": str(vae), "size": SIZE, "batch": 2, "shard_size": 5, "workers": 1}
        return Job(images=str(images), out=str(tmp_path / out), **{**tiny, **options})

    return make
