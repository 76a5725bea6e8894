"""MicroDiT, the family: its equations written plainly, its initialisation, its sizes (methods/micro-dit.md)."""

from dataclasses import replace

import pytest
import torch
from every import CONFIGS
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn
from weights import randomise

import edit
from edit.backbones.micro_dit import MicroDiT, MicroDiTConfig
from edit.backbones.micro_dit_block import MicroDiTBlock
from edit.denoiser import Denoiser
from edit.edits import per_token
from edit.edm import EDMHeun
from edit.measuring.cost import macs
from edit.moe.expert_choice import ExpertChoiceFeed
from edit.pruning.depth import DepthPruning
from edit.stream import Condition, Layout, Stream
from recipes.config.sources import register

TINY = MicroDiTConfig(
    input_size=8, in_channels=3, width=32, depth=3, head=8, text_width=20, multiple=16, pos_interp_scale=2.0
)


@pytest.fixture(scope="module")
def model() -> MicroDiT:
    torch.manual_seed(0)
    denoiser = TINY.build()
    randomise(denoiser)
    return denoiser.double().eval()


def inputs(count: int = 3, tokens: int = 5) -> tuple[Tensor, Tensor, Condition]:
    g = torch.Generator().manual_seed(1)
    x, text = (torch.randn(count, *s, generator=g, dtype=torch.float64) for s in ((3, 8, 8), (tokens, 20)))
    return x, torch.linspace(0.2, 0.9, count, dtype=torch.float64), Condition(text=text)


# ---- the equations ---------------------------------------------------------------------------------------------------


class Plain:
    """The specification's equations on a state dict, a sample and a head at a time."""

    def __init__(self, w: dict[str, Tensor], c: MicroDiTConfig):
        self.w, self.c = w, c

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def norm(self, name: str | None, x: Tensor) -> Tensor:
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return y if name is None else y * self.w[f"{name}.weight"]

    def gelu(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))

    def attention(self, name: str, x: Tensor, y: Tensor) -> Tensor:  # n d, l c -> n d
        q = self.norm(None, self.linear(f"{name}.to_q", x))
        k = self.norm(None, self.linear(f"{name}.to_k", y))
        v, e, heads = self.linear(f"{name}.to_v", y), self.c.head, []
        for at in range(0, q.shape[1], e):
            weights = torch.softmax(q[:, at : at + e] @ k[:, at : at + e].T / e**0.5, 1)
            heads.append(weights @ v[:, at : at + e])
        return self.linear(f"{name}.to_out", torch.cat(heads, 1))

    def swiglu(self, name: str, x: Tensor) -> Tensor:
        w1, w3 = self.w[f"{name}.w13.weight"].chunk(2)
        gate = x @ w1.T
        return self.linear(f"{name}.w2", gate * torch.sigmoid(gate) * (x @ w3.T))

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.3", self.norm(f"{name}.2", self.gelu(self.linear(f"{name}.0", x))))

    def positions(self) -> Tensor:
        """Token (row y, column x): sines and cosines of the column, then of the row, divided by the scale."""
        d, g = self.c.width, self.c.grid
        frequencies = [10000 ** (-i / (d // 4)) for i in range(d // 4)]

        def one(place: float) -> list[float]:
            angles = torch.tensor([place / self.c.pos_interp_scale * f for f in frequencies], dtype=torch.float64)
            return [*angles.sin().tolist(), *angles.cos().tolist()]

        return torch.tensor([one(x) + one(y) for y in range(g) for x in range(g)], dtype=torch.float64)

    def __call__(self, image: Tensor, sigma: float, caption: Tensor) -> Tensor:  # c y x, l c -> c y x
        c, p = self.c, self.c.patch_size
        kernel, bias = self.w["x_embedder.proj.weight"], self.w["x_embedder.proj.bias"]
        patches = image.unfold(1, p, p).unfold(2, p, p)  # c y x p q
        x = torch.stack(
            [(patches[:, i, j] * kernel).sum((1, 2, 3)) + bias for i in range(c.grid) for j in range(c.grid)]
        )
        x = x + self.positions()
        y = self.mlp("y_embedder", caption)
        u = self.norm("text_block.norm1", y)
        y = y + self.attention("text_block.attn", u, u)
        y = y + self.swiglu("text_block.mlp", self.norm("text_block.norm2", y))
        c_noise = torch.tensor(sigma, dtype=torch.float64).log() / 4
        angles = torch.stack([c_noise * 10000 ** (-i / 256) for i in range(256)])
        t = self.linear("t_embedder.mlp.0", torch.cat((angles.cos(), angles.sin())))
        t = self.linear("t_embedder.mlp.2", self.gelu(t))
        cond = t + self.mlp("pooled_embedder", y.mean(0))
        for i in range(c.depth):
            b = f"blocks.{i}"
            s1, k1, g1, s2, k2, g2 = self.linear(f"{b}.adaLN_modulation.1", self.gelu(cond)).chunk(6)
            u = self.norm(f"{b}.norm1", x) * (1 + k1) + s1
            x = x + g1 * self.attention(f"{b}.attn1", u, u)
            x = x + self.attention(f"{b}.attn2", self.norm(f"{b}.norm2", x), y)
            x = x + g2 * self.swiglu(f"{b}.mlp", self.norm(f"{b}.norm3", x) * (1 + k2) + s2)
        shift, scale = self.linear("final_layer.adaLN_modulation.1", self.gelu(cond)).chunk(2)
        x = self.linear("final_layer.linear", self.norm("final_layer.norm_final", x) * (1 + scale) + shift)
        return x.view(c.grid, c.grid, p, p, -1).permute(4, 0, 2, 1, 3).reshape(image.shape)


def test_outputs_and_all_gradients_are_those_of_the_equations(model):
    x, t, condition = inputs()
    results = []
    for run in ("ours", "plain"):
        state = {k: v.detach().clone().requires_grad_() for k, v in model.model.state_dict().items()}
        given, text = x.clone().requires_grad_(), condition.text.clone().requires_grad_()
        if run == "ours":
            named = {f"model.{k}": v for k, v in state.items()}
            out = torch.func.functional_call(model, named, (given, t, Condition(text=text))).sample
        else:
            plain, sigma = Plain(state, TINY), (t / (1 - t)).tolist()
            out = torch.stack([plain(*one) for one in zip(given, sigma, text, strict=True)])
        out.square().mean().backward()
        grads = {k: v.grad for k, v in state.items() if k != "pos_embed"}
        results.append({"out": out.detach(), "x": given.grad, "text": text.grad, **grads})
    ours, plain = results
    for name, wanted in plain.items():  # c_noise, its sinusoid and the table of positions are fp32
        assert (ours[name] - wanted).abs().max() < 1e-5 * wanted.abs().max().clamp_min(1e-3), name


def test_the_block_without_a_text_has_no_cross_attention_and_nothing_depends_on_a_grid():
    torch.manual_seed(0)
    block = MicroDiTBlock(32, 8, 16, 48, 24, None)
    randomise(block)
    assert block.attn2 is None and block.anatomy.text == "none" and block.anatomy.cross is None
    x, cond = torch.randn(2, 16, 32), torch.randn(2, 24)
    whole = block(Stream(x, cond, Layout((1, 4, 4)))).image
    order = torch.stack([torch.randperm(16) for _ in range(2)])[..., None].expand_as(x)
    mixed = block(Stream(x.gather(1, order), cond, Layout((1, 4, 4)))).image
    torch.testing.assert_close(mixed, whole.gather(1, order), rtol=1e-5, atol=1e-5)
    few = block(Stream(x[:, :5], cond, Layout((1, 4, 4)))).image  # a subset, under the layout of all
    torch.testing.assert_close(few, block(Stream(x[:, :5], cond, Layout((1, 1, 5)))).image, rtol=0, atol=0)


def test_self_attention_may_be_narrow_where_cross_attention_is_as_wide_as_the_tokens():
    block = MicroDiTBlock(32, 8, 16, 48, 24, 20)
    a = block.anatomy
    assert (a.heads, a.attention.size, a.cross.size, a.feed.size, a.text) == (2, 16, 32, 48, "aside")
    assert block.attn2.to_k.in_features == 20 and block.adaLN_modulation[1].out_features == 6 * 32
    with pytest.raises(ValueError, match="heads of 8 channels do not divide an attention of 20"):
        MicroDiTBlock(32, 8, 20, 48, 24, None)


# ---- a new model -----------------------------------------------------------------------------------------------------


def test_a_new_model_predicts_nothing_and_its_blocks_still_read_the_text():
    """Cross-attention has no gate, so that blocks are not the identity; the text block is."""
    torch.manual_seed(0)
    new = TINY.build()
    x, t, condition = inputs()
    given = x.float(), t.float(), Condition(text=condition.text.float())
    assert not new(*given).sample.any()
    stream = new.embed(**new.pack(*given))
    assert torch.equal(stream.text, new.model.y_embedder(given[2].text))
    assert not torch.equal(new.units[0](stream).image, stream.image)
    for block in new.units:
        blind = replace(stream, text=torch.zeros_like(stream.text))  # values without a bias
        assert torch.equal(block(blind).image, stream.image)


def test_layers_are_drawn_as_the_paper_says():
    torch.manual_seed(0)
    config = MicroDiTConfig(input_size=8, width=256, depth=4, head=32, text_width=128)
    m = config.build().model

    def std(layer: nn.Linear) -> float:
        assert layer.bias is None or not layer.bias.any()
        return layer.weight.std().item()

    def near(value: float) -> object:
        return pytest.approx(value, rel=0.05)

    for i, block in enumerate(m.blocks):
        out = 0.02 / (2 * (i + 1)) ** 0.5
        gate, value = block.mlp.w13.weight.chunk(2)
        for attention in (block.attn1, block.attn2):
            assert [std(getattr(attention, f"to_{k}")) for k in "qkv"] == [near(0.02)] * 3
            assert std(attention.to_out) == near(out)
        assert gate.std().item() == near(0.02) and value.std().item() == near(out) and std(block.mlp.w2) == near(out)
        assert std(block.adaLN_modulation[1]) == 0 and block.norm1.bias is None and (block.norm1.weight == 1).all()
    for layers in (m.t_embedder.mlp, m.y_embedder, m.pooled_embedder):
        assert std(layers[0]) == near(0.02) and std(layers[-1]) == near(0.02)
    for layer in (
        m.final_layer.linear,
        m.final_layer.adaLN_modulation[1],
        m.text_block.attn.to_out,
        m.text_block.mlp.w2,
    ):
        assert std(layer) == 0
    assert std(m.text_block.attn.to_q) == near(0.02)
    block = MicroDiTBlock(256, 32, 256, 768, 256, 256)
    block.initialise(0.02 / (2 * 6) ** 0.5)  # a mixer of six
    assert std(block.attn2.to_out) == near(0.02 / 12**0.5) and std(block.attn1.to_q) == near(0.02)


# ---- what it is told -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_padding_is_attended_to_and_no_text_is_zeros(model):
    x, t, condition = inputs()
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[:, 3:] = False
    assert torch.equal(model(x, t, replace(condition, text_mask=mask)).sample, model(x, t, condition).sample)
    null = model.null(condition)
    assert null.text.shape == condition.text.shape and not null.text.any()
    assert not torch.equal(model(x, t, null).sample, model(x, t, condition).sample)
    moved = torch.cat((condition.text[:, :-1], condition.text[:, -1:] + 1), 1)
    assert not torch.equal(model(x, t, Condition(text=moved)).sample, model(x, t, condition).sample)
    with pytest.raises(ValueError, match="attends to the padding"):
        model.need_length(None)
    model.need_length(77)


@torch.no_grad()
def test_signal_and_time_are_those_that_modulate(model):
    x, t, condition = inputs()
    stream = model.embed(**model.pack(x, t, condition))
    assert torch.equal(stream.time, model.embed_times(t)) and stream.signal is stream.cond
    torch.testing.assert_close(stream.cond - stream.time, model.model.pooled_embedder(stream.text.mean(1)))


def test_wrong_inputs_and_sizes_are_refused(model):
    x, t, condition = inputs()
    with pytest.raises(ValueError, match=r"needs condition.text, which is missing"):
        model(x, t, Condition())
    with pytest.raises(ValueError, match="takes text embeddings of width 20, got 10: they were made by another"):
        model(x, t, Condition(text=condition.text[..., :10]))
    with pytest.raises(ValueError, match="takes samples of 3x8x8, got 3x4x4"):
        model(x[..., :4, :4], t, condition)
    for options, said in (
        ({"patch_size": 3}, "patch_size 3 does not divide input_size 8"),
        ({"head": 12}, "heads of 12 channels do not divide the width 32"),
        ({"width": 30, "head": 10}, "multiple of 4"),
        ({"input_size": 2**16}, "positions of .* are more than a model here can hold"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(TINY, **options)
    with pytest.raises(ValueError, match="keep: this micro_dit has units 0 to 2"):
        model.keep([3])


@torch.no_grad()
def test_saved_without_positions_and_loaded_it_is_the_same_and_units_can_be_dropped(tmp_path):
    torch.manual_seed(0)
    model = TINY.build()
    randomise(model)
    config, state = model.to_stock(model.config, model.model.state_dict())
    assert "pos_embed" not in state and config["_class_name"] == "edit.MicroDiT"
    x, t, condition = inputs()
    given = x.float(), t.float(), Condition(text=condition.text.float())
    edit.apply(model, {"depth": DepthPruning(pattern="listed", units=(0, 2))})
    wanted = model(*given).sample
    edit.save(model, tmp_path / "a")
    loaded = edit.load(tmp_path / "a").denoiser
    assert len(loaded.units) == 2 and loaded.config == model.config
    torch.testing.assert_close(loaded(*given).sample, wanted, rtol=1e-6, atol=1e-6)


# ---- sizes -----------------------------------------------------------------------------------------------------------


def preset(words: list[str]) -> tuple[Denoiser, dict]:
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        cfg = compose("train", ["experiment=micro_dit_xl_2/baseline", *words])
    with torch.device("meta"):
        denoiser = edit.apply(instantiate(cfg.backbone).build(), instantiate(cfg.edits, _convert_="all"), fresh=False)
    return denoiser, cfg


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for m in modules for p in m.parameters())


def mixer(denoiser: Denoiser, width: int, depth: int) -> tuple[int, int, int]:
    """Parameters of a patch mixer's blocks, of its experts alone, and of the layers into and out of it."""
    d, head = denoiser.facts.width, denoiser.facts.width // denoiser.facts.heads
    with torch.device("meta"):
        block = MicroDiTBlock(width, head, width, -(-8 * width // 768) * 256, d, width)
        layer = ExpertChoiceFeed("it", width, 4 * width, 8, 2.0, 0.02)
        between = [nn.LayerNorm(d, bias=False), nn.Linear(d, width)] * 2 + [nn.LayerNorm(width), nn.Linear(width, d)]
    sparse = depth // 2
    dense = depth * count(block) - sparse * count(block.mlp) + sparse * count(layer)
    return dense, sparse * count(layer.experts), count(*between)


def test_a_sample_is_made_as_published_by_heun_in_sigma_at_a_guidance_of_5(model):
    sampler = model.sampler()
    assert isinstance(sampler.solver, EDMHeun) and sampler.guidance == 5.0


def test_the_published_sizes_have_their_parameters():
    """Oracle 7, with the mixer counted from its blocks: 958 M + 184 M + 23 M, 712 M of a token; tiny 202 M."""
    xl, cfg = preset([])
    backbone = count(*xl.model.blocks, xl.edits)
    blocks, experts, between = mixer(xl, 768, 6)
    assert backbone / 1e6 == pytest.approx(958, abs=0.5) and blocks / 1e6 == pytest.approx(184, abs=0.5)
    assert (count(xl) - backbone + between) / 1e6 == pytest.approx(23, abs=0.5)
    assert (count(xl) + blocks + between) / 1e6 == pytest.approx(1165, rel=0.005)
    active = per_token(xl) + blocks + between - 0.75 * experts
    assert active / 1e6 == pytest.approx(712, rel=0.005)
    assert cfg.optimizer.lr == 2.4e-4 and cfg.data.batch_size * cfg.trainer.devices * cfg.trainer.accumulate == 2048
    tiny, _ = preset(["backbone=micro_dit_tiny_2"])
    blocks, _, between = mixer(tiny, 512, 4)
    assert (count(tiny) + blocks + between) / 1e6 == pytest.approx(202, rel=0.005)


@pytest.mark.slow
def test_a_quarter_of_the_tokens_leaves_36_hundredths_of_the_products():
    """Oracle 7: 110.6 and 39.8 GMAC, 16.9 of them in the mixer; a table that leaves out what the caption costs."""
    mixer_, found = 16.9, []
    for words in ([], ["backbone.input_size=16"]):  # 256 tokens, and as many as masking leaves
        xl, _ = preset(words)
        found.append(macs(xl, Condition(text=torch.zeros(1, 1, 1024))) / 1e9 + mixer_)
    assert found == [pytest.approx(110.6, rel=0.01), pytest.approx(39.8, rel=0.01)]
    assert found[1] / found[0] == pytest.approx(0.36, abs=0.005)
