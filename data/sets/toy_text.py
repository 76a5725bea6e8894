"""Small frozen text encoders for the embedded worlds: a T5 encoder and a pooling CLIP encoder with word tokenizers.

Real classes and file formats of `transformers`, so that what is built on them works with downloaded encoders too. The
weights are fixed random numbers, bit for bit the same on every machine: integer hashes, scaled. A random encoder keeps
sentences apart and mixes neighbouring words, which is enough for a vocabulary of some fifty words.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edit import noise

PAD, END, START, UNKNOWN = "<pad>", "</s>", "<s>", "<unk>"
# of all embedded worlds; new words go to the end, as the place of a word decides its embedding
WORDS = tuple(
    "a two three small large red green blue yellow purple white circle circles square squares triangle triangles "
    "cross crosses at in the top bottom left right centre above below of "
    "zero one two three four five six seven eight nine "
    "moving bouncing up down".split()
)
VOCABULARY = tuple(dict.fromkeys((PAD, END, START, UNKNOWN, *WORDS)))
SIZE = 64  # of the vocabulary, with room for more words
WIDTH = 64  # of both encoders
LENGTH = 16  # tokens after padding; the longest sentence has 12
BASE = 300  # random streams of the weights: BASE + number of the tensor


class Embedded(NamedTuple):
    """Sentences as a denoiser sees them, float32."""

    text: Tensor  # b l c, of T5; zero where padded
    mask: Tensor  # b l, bool
    pooled: Tensor  # b c, of CLIP


class ToyText:
    """Both encoders, built in memory; `write` stores them as folders."""

    def __init__(self):
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

        t5 = T5Config(
            vocab_size=SIZE,
            d_model=WIDTH,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
        clip = CLIPTextConfig(
            vocab_size=SIZE,
            hidden_size=WIDTH,
            intermediate_size=128,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            pad_token_id=0,
            eos_token_id=1,  # 2 would mean the pooling of old checkpoints, at the largest token
            bos_token_id=2,
        )
        with torch.random.fork_rng(devices=[]):  # the constructors draw weights, which are replaced
            self.t5 = filled(T5EncoderModel(t5), seed=5)
            self.clip = filled(CLIPTextModel(clip), seed=6)
        self.t5_tokenizer = tokenizer(f"$A {END}")
        self.clip_tokenizer = tokenizer(f"{START} $A {END}")

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], batch: int = 256) -> Embedded:
        """Embed sentences of known words.

        Raises:
            ValueError: for a word that is not in the vocabulary, or a sentence of more than 14 words
        """
        for caption in captions:
            if unknown := next((w for w in caption.split() if w not in WORDS), None):
                raise ValueError(f"'{unknown}' in '{caption}' is not one of the words of the embedded encoders")
            if len(caption.split()) > LENGTH - 2:
                raise ValueError(f"'{caption}' has more than the {LENGTH - 2} words that the embedded encoders take")
        parts = [self._embed(list(captions[i : i + batch])) for i in range(0, len(captions), batch)]
        return Embedded(*(torch.cat(p) for p in zip(*parts, strict=True)))

    def _embed(self, captions: list[str]) -> Embedded:
        def tokens(tokenizer: Any) -> dict[str, Tensor]:
            both = tokenizer(captions, padding="max_length", max_length=LENGTH, return_tensors="pt")
            return {key: both[key] for key in ("input_ids", "attention_mask")}

        words = tokens(self.t5_tokenizer)
        mask = words["attention_mask"].bool()
        text = self.t5(**words).last_hidden_state.masked_fill(~mask[..., None], 0)
        return Embedded(text, mask, self.clip(**tokens(self.clip_tokenizer)).pooler_output)

    def null(self) -> dict[str, Tensor]:
        """The empty prompt: text l c, text_mask l, pooled c."""
        empty = self([""])
        return {"text": empty.text[0], "text_mask": empty.mask[0], "pooled": empty.pooled[0]}

    def write(self, folder: str | os.PathLike) -> dict[str, Path]:
        """Store `text_encoder` (CLIP) and `text_encoder_2` (T5) with their tokenizers, named as FLUX pipelines do.

        Returns:
            The folders by name. Each encoder's folder has its tokenizer too: one path is enough for `data.precompute`.
        """
        place = Path(folder)
        parts: dict[str, Iterable[Any]] = {
            "text_encoder": (self.clip, self.clip_tokenizer),
            "text_encoder_2": (self.t5, self.t5_tokenizer),
            "tokenizer": (self.clip_tokenizer,),
            "tokenizer_2": (self.t5_tokenizer,),
        }
        for name, things in parts.items():
            for thing in things:
                thing.save_pretrained(place / name)
        return {name: place / name for name in parts}


def filled(model: nn.Module, seed: int) -> nn.Module:
    """The model with its weights replaced by fixed numbers, frozen.

    Uniform numbers of variance 1 / inputs, and 1 for embeddings. T5 gets a strong bias by distance between words: with
    smooth attention it would average over all words, and "red circle, blue square" would be the same in any order.
    """
    for number, (name, p) in enumerate(sorted(model.named_parameters())):
        if p.ndim == 1:
            p.data.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        std = p.shape[1] ** -0.5
        if any(part in name for part in ("shared", "embed_tokens", "embedding")):
            std = 1.0
        if "relative_attention_bias" in name:
            std = 2.0
        if name.endswith("SelfAttention.q.weight"):
            std *= 16**-0.5 * 1.5  # T5 does not divide by the root of the head width
        u = noise.uniform(seed, torch.arange(p.numel()), BASE + number).view(p.shape)
        p.data.copy_((u - 0.5) * (std * 12**0.5))
    return model.requires_grad_(False).eval()


def tokenizer(template: str) -> Any:
    """A word tokenizer that puts a sentence into the template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {word: i for i, word in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(numbers, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(word, numbers[word]) for word in (START, END)]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        bos_token=START,
        unk_token=UNKNOWN,
        model_max_length=LENGTH,
    )
