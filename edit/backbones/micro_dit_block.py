"""MicroDiT's block (arXiv 2407.15811), of its backbone and of its patch mixer.

    x += g1 SA(mod(LN1 x)),  x += CA(LN2 x, y),  x += g2 W2 (SiLU(W1 u) * W3 u) with u = mod(LN3 x)
    mod(u) = u (1 + scale) + shift,  (shift, scale, gate) x 2 = Linear(GELU(c))

LN has a gain and no bias, attention no biases. Queries and keys pass a LayerNorm without parameters over all heads
together. Self-attention may be narrower than the tokens; cross-attention is as wide as they are, and has no gate: a
fresh block is not the identity.

The block reads tokens, `cond` and `text` of the stream and no grid, so it runs on any subset of a sample's tokens.

Specification: methods/micro-dit.md ("Block", "Initialisation"). Inferred: GELU is the tanh one everywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edit.backbones.dit import NORM_EPS, DiTModulation
from edit.stream import Branch, Layout, Step, Stream
from edit.unit import Anatomy, Features, Unit

STD = 0.02  # of layers that write into no residual stream


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """b s (h e) -> b h s e."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Weights of an attention without biases, from `width` over `inner` channels back to `width`.

    Args:
        width: of the tokens that ask
        inner: of all heads together
        head: e, the width of a head
        read: of the tokens that are read

    Raises:
        ValueError: if heads do not divide the inner width
    """

    def __init__(self, width: int, inner: int, head: int, read: int):
        super().__init__()
        if inner % head:
            raise ValueError(f"MicroDiT: heads of {head} channels do not divide an attention of {inner}: change one")
        self.heads = inner // head
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(read, inner, bias=False)
        self.to_v = nn.Linear(read, inner, bias=False)
        self.norm_q = nn.LayerNorm(inner, elementwise_affine=False, eps=NORM_EPS)
        self.norm_k = nn.LayerNorm(inner, elementwise_affine=False, eps=NORM_EPS)
        self.to_out = nn.Linear(inner, width, bias=False)

    def project(self, tokens: Tensor, read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: b s d, b l c -> b h s e, b h l e twice."""
        q, k = self.norm_q(self.to_q(tokens)), self.norm_k(self.to_k(read))
        return split_heads(q, self.heads), split_heads(k, self.heads), split_heads(self.to_v(read), self.heads)

    def features(self, name: str) -> Features:
        """The heads, for an anatomy; `name` is that of the attention in its unit."""
        writers = tuple((f"{name}.{part}", 1) for part in ("to_q", "to_k", "to_v"))
        norms = ((f"{name}.to_q", f"{name}.norm_q"), (f"{name}.to_k", f"{name}.norm_k"))
        return Features(self.to_out.in_features, writers, ((f"{name}.to_out", 0),), (name, "heads"), norms=norms)

    def initialise(self, std: float) -> None:
        """Truncated normal; `std` is that of the output layer."""
        for layer in (self.to_q, self.to_k, self.to_v):
            nn.init.trunc_normal_(layer.weight, std=STD)
        nn.init.trunc_normal_(self.to_out.weight, std=std)


class GatedFeed(nn.Module):
    """W2 (SiLU(W1 u) * W3 u), without biases; W1 and W3 are the halves of `w13`."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w13, self.w2 = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def expand(self, tokens: Tensor) -> Tensor:
        gate, value = self.w13(tokens).chunk(2, dim=-1)
        return F.silu(gate) * value

    def contract(self, features: Tensor) -> Tensor:
        return self.w2(features)

    def features(self, name: str) -> Features:
        """The hidden channels, for an anatomy; `name` is that of the feed-forward in its unit."""
        return Features(self.w2.in_features, ((f"{name}.w13", 2),), ((f"{name}.w2", 0),), gate=F.silu)

    def initialise(self, std: float) -> None:
        """Truncated normal; `std` is that of W2 and W3."""
        gate, value = self.w13.weight.chunk(2)
        nn.init.trunc_normal_(gate, std=STD)
        for weight in (value, self.w2.weight):
            nn.init.trunc_normal_(weight, std=std)


def gain_norm(width: int) -> nn.LayerNorm:
    """A LayerNorm with a gain and no bias."""
    return nn.LayerNorm(width, eps=NORM_EPS, bias=False)


def modulation(cond: int, width: int, count: int) -> nn.Sequential:
    """`count` vectors of a sample for its tokens: b cond -> b (count d); zero at first."""
    layers = nn.Sequential(nn.GELU(approximate="tanh"), nn.Linear(cond, count * width))
    nn.init.zeros_(layers[1].weight)
    nn.init.zeros_(layers[1].bias)
    return layers


class MicroDiTBlock(Unit):
    """One block: b n width -> the same.

    Args:
        width: of the image tokens
        head: width of a head
        attention: inner width of the self-attention, a multiple of `head`
        hidden: channels of the feed-forward
        cond: width of `Stream.cond`
        text: width of `Stream.text`; None: there is no cross-attention

    Raises:
        ValueError: if heads do not divide one of the attentions
    """

    def __init__(self, width: int, head: int, attention: int, hidden: int, cond: int, text: int | None):
        super().__init__()
        self.norm1, self.attn1 = gain_norm(width), Attention(width, attention, head, width)
        self.norm2 = None if text is None else gain_norm(width)
        self.attn2 = None if text is None else Attention(width, width, head, text)
        self.norm3, self.mlp = gain_norm(width), GatedFeed(width, hidden)
        self.adaLN_modulation = modulation(cond, width, 6)

    @torch.no_grad()
    def initialise(self, std: float) -> None:
        """Draw the weights anew.

        Args:
            std: of the layers that write into the tokens (and of W3): 0.02 / sqrt(2 (i + 1)) in block i of a backbone,
                counted from 0; 0.02 / sqrt(2 N) in a mixer, N the depth of the backbone
        """
        for attention in (self.attn1, self.attn2):
            if attention is not None:
                attention.initialise(std)
        self.mlp.initialise(std)
        nn.init.zeros_(self.adaLN_modulation[1].weight)
        nn.init.zeros_(self.adaLN_modulation[1].bias)

    @property
    def anatomy(self) -> Anatomy:
        own, feed = self.attn1.features("attn1"), self.mlp.features("mlp")
        if self.attn2 is None:
            return Anatomy(self.attn1.heads, own, feed)
        return Anatomy(self.attn1.heads, own, feed, cross=self.attn2.features("attn2"), text="aside")

    def modulate(self, stream: Stream) -> DiTModulation:
        s1, k1, g1, s2, k2, g2 = self.adaLN_modulation(stream.cond)[:, None].chunk(6, dim=-1)
        return DiTModulation(s1, 1 + k1, Branch(g1), s2, 1 + k2, Branch(g2))

    def enter(self, stream: Stream, modulation: DiTModulation) -> Branch:
        return Branch(torch.addcmul(modulation.attention_shift, self.norm1(stream.image), modulation.attention_scale))

    def own_mixer(self, stream: Stream, tokens: Tensor) -> Tensor:
        """b n d -> b n d."""
        return self.attn1.to_out(self.attended(*self.attn1.project(tokens, tokens), stream))

    def read(self, stream: Stream) -> Branch:
        """The cross-attention of image tokens to the text, norm included."""
        assert self.attn2 is not None and self.norm2 is not None
        q, k, v = self.attn2.project(self.norm2(stream.image), stream.text)
        o = self.part("cross")(q, k, v, stream.layout, stream.step)
        return Branch(self.attn2.to_out(o.transpose(1, 2).flatten(2)))

    def own_cross(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, step: Step | None) -> Tensor:
        """Softmax attention to all text tokens, padding too: b h n e, b h l e twice -> b h n e."""
        return F.scaled_dot_product_attention(q, k, v)

    def feed(self, stream: Stream, modulation: DiTModulation) -> Branch:
        x = torch.addcmul(modulation.feed_shift, self.norm3(stream.image), modulation.feed_scale)
        return Branch(self.part("ffn")(x, stream.layout))

    def expand(self, tokens: Tensor) -> Tensor:
        return self.mlp.expand(tokens)

    def contract(self, features: Tensor) -> Tensor:
        return self.mlp.contract(features)

    def compute(self, stream: Stream) -> Stream:
        m = self.modulate(stream)
        stream = self.residual(stream, "attention", lambda s: self.attend(s, m), m.attention_gate)
        if self.attn2 is not None:
            stream = self.residual(stream, "cross", self.read, None)
        return self.residual(stream, "feed", lambda s: self.feed(s, m), m.feed_gate)
