import argparse
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from operators import Operators
from ranks import run_ranks
from stock_dit import stock_model
from torch import Tensor

import edit
from edit.artifacts.official import from_official, load_official
from edit.backbones.dit import DiTConfig, DiTWeights, position_table, rope_table, rotate
from edit.measuring.flops import Flops
from edit.objectives import DDPM, FlowMatching
from edit.stream import Condition

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
MODERN = {"rope": True, "swiglu": True, "rms_norm": True, "qk_norm": True, "registers": 3}
# fp32 against an independently written forward: the same sums in another order
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def sized(size: str, patch: int = 2, **options) -> DiTConfig:
    depth, width, heads = SIZES[size]
    return DiTConfig(patch_size=patch, depth=depth, hidden_size=width, num_heads=heads, **options)


# ---- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, published", [("S", 32.96e6), ("B", 130.5e6), ("L", 458.1e6), ("XL", 675.13e6)])
def test_parameter_counts_are_the_published_ones(size, published):
    with torch.device("meta"):
        model = DiTWeights(sized(size, learn_sigma=True))
    count = sum(v.numel() for v in model.state_dict().values())  # with the position table, as the papers count
    depth, d, _ = SIZES[size]
    block = 3 * d * (d + 1) + d * (d + 1) + 4 * d * (d + 1) + d * (4 * d + 1) + 6 * d * (d + 1)
    embedders = (16 * d + d) + (256 * d + d + d * (d + 1)) + 1001 * d
    final = 2 * d * (d + 1) + 32 * (d + 1)
    assert count == depth * block + embedders + final + 256 * d
    assert count == pytest.approx(published, rel=4e-4)  # half a unit of the coarsest last printed digit


MACS = {  # GMACs at 256 px for patch 2, 4, 8: the blocks alone
    "S": (6.05, 1.41, 0.35),
    "B": (22.99, 5.55, 1.41),
    "L": (80.68, 19.68, 5.00),
    "XL": (118.60, 29.03, 7.37),
}


def macs(denoiser, *inputs) -> float:
    with Flops() as counter, torch.no_grad():
        denoiser(*inputs)
    return counter.total / 2


@pytest.mark.parametrize(
    "size, patch, gmacs", [(s, p, m) for s in MACS for p, m in zip((2, 4, 8), MACS[s], strict=True)]
)
def test_executed_macs_of_the_blocks_are_the_published_table(size, patch, gmacs):
    c = sized(size, patch)
    with torch.device("meta"):
        one, two = (replace(c, depth=n).build() for n in (1, 2))
        inputs = torch.zeros(1, 4, 32, 32), torch.zeros(1), Condition(label=torch.zeros(1, dtype=torch.int64))
        block = macs(two, *inputs) - macs(one, *inputs)
    tokens, d = c.grid**2, c.hidden_size
    assert block == 12 * tokens * d**2 + 2 * tokens**2 * d + 6 * d**2
    assert c.depth * block / 1e9 == pytest.approx(gmacs, abs=0.0051)  # printed with two decimals


def test_dit_xl_2_executes_the_published_118_64_gmacs():
    with torch.device("meta"):
        denoiser = sized("XL", learn_sigma=True).build()
        x, t = torch.zeros(1, 4, 32, 32), torch.zeros(1)
        assert macs(denoiser, x, t, Condition(label=torch.zeros(1, dtype=torch.int64))) == pytest.approx(
            118.64e9, rel=0.005
        )


# ---- initialisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"learn_sigma": True, "time": "ddpm"}, MODERN], ids=["flow", "ddpm", "modern"])
@torch.no_grad()
def test_at_initialisation_blocks_are_the_identity_and_the_output_is_zero(batch, options):
    dit = DiTConfig(input_size=8, hidden_size=32, depth=3, num_heads=4, num_classes=10, **options).build()
    stream = dit.embed(**dit.pack(*batch))
    for unit in dit.units:
        assert torch.equal(unit(stream).image, stream.image)
    out = dit(*batch)
    assert out.sample.count_nonzero() == 0
    assert out.variance is None or out.variance.count_nonzero() == 0


@torch.no_grad()
def test_losses_at_initialisation_are_those_of_predicting_zero():
    data, noise = 0.5 * torch.randn(64, 4, 8, 8), torch.randn(64, 4, 8, 8)
    t, condition = torch.rand(64), Condition(label=torch.zeros(64, dtype=torch.int64))
    for time, objective, name, expected in (
        ("flow", FlowMatching(), "flow", 1 + 0.5**2),
        ("ddpm", DDPM(), "noise", 1.0),
    ):
        dit = DiTConfig(
            input_size=8, hidden_size=32, depth=1, num_heads=4, time=time, learn_sigma=time == "ddpm"
        ).build()
        x_t = objective.corrupt(data, noise, t)
        losses = objective.losses(dit(x_t, t, condition), data, noise, x_t, t)
        assert losses[name].mean().item() == pytest.approx(expected, rel=0.05)  # 16384 numbers: 1.1 % standard error
        assert ("bound" in losses) == (time == "ddpm")


def test_fresh_weights_have_the_official_distributions():
    m = DiTConfig(hidden_size=384, depth=2, num_heads=6).build().model
    assert m.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.01)
    for layer in (m.t_embedder.mlp[0], m.t_embedder.mlp[2]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.01) and not layer.bias.any()
    for layer in (m.blocks[1].attn.qkv, m.blocks[1].attn.proj, m.blocks[1].mlp.fc1, m.x_embedder.proj):
        fan_out, fan_in = layer.weight.flatten(1).shape
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert layer.weight.abs().max().item() == pytest.approx(bound, rel=0.01) and layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02) and not layer.bias.any()


# ---- positions -------------------------------------------------------------------------------------------------------


def test_the_position_table_encodes_the_column_first():
    table = position_table(32, 5)
    zero, one = [0.0] * 8, [1.0] * 8
    assert table[0].tolist() == zero + one + zero + one
    grid = table.view(5, 5, 32)
    assert torch.equal(grid.transpose(0, 1), torch.cat((grid[..., 16:], grid[..., :16]), dim=-1))
    omega = 10000 ** -(torch.arange(8).double() / 8)
    row, column = 3, 2
    wanted = torch.cat([f(p * omega) for p in (column, row) for f in (torch.sin, torch.cos)])
    torch.testing.assert_close(grid[row, column], wanted.float())


def test_rope_makes_attention_depend_on_relative_positions_alone():
    grid, head = 6, 16
    table = rope_table(head, grid, registers=0).double()
    q, k = torch.randn(2, head, dtype=torch.float64)
    turned_q, turned_k = (rotate(v.expand(1, 1, grid * grid, head), table)[0, 0] for v in (q, k))
    scores = (turned_q @ turned_k.T).view(grid, grid, grid, grid)  # row and column of q, row and column of k
    torch.testing.assert_close(scores[:-1, :-1, :-1, :-1], scores[1:, 1:, 1:, 1:], rtol=0, atol=1e-6)  # float32 table
    torch.testing.assert_close(scores[:-1, :, :-1], scores[1:, :, 1:], rtol=0, atol=1e-6)
    assert (scores[0, 0, 0, 0] - scores[0, 0, 1, 0]).abs() > 1e-3  # rows matter
    assert (scores[0, 0, 0, 0] - scores[0, 0, 0, 1]).abs() > 1e-3  # so do columns, in their own way
    assert (scores[0, 0, 1, 0] - scores[0, 0, 0, 1]).abs() > 1e-3
    torch.testing.assert_close(turned_q.norm(dim=1), q.norm().expand(grid * grid), rtol=1e-6, atol=1e-6)


def test_registers_are_not_turned_and_do_not_shift_the_pixels_positions():
    plain, with_registers = rope_table(16, 4, 0), rope_table(16, 4, 3)
    assert torch.equal(with_registers[3:], plain)
    x = torch.randn(1, 1, 3, 16)
    assert torch.equal(rotate(x, with_registers[:3]), x)


@torch.no_grad()
def test_registers_do_not_shift_pixels(make_dit, batch):
    plain, dit = make_dit(rope=True), make_dit(rope=True, registers=3)
    dit.load_state_dict({**plain.state_dict(), "model.registers": dit.model.registers, "model.rope": dit.model.rope})
    for with_, without in zip(dit.units, plain.units, strict=True):  # attention among pixels only: nothing may change
        with_.slots.attention = lambda q, k, v, layout, step: F.pad(
            F.scaled_dot_product_attention(*(z[:, :, layout.registers :] for z in (q, k, v))),
            (0, 0, layout.registers, 0),
        )
        assert with_ is not without
    torch.testing.assert_close(dit(*batch).sample, plain(*batch).sample, **CLOSE)
    for unit in dit.units:
        del unit.slots.attention
    assert not torch.allclose(dit(*batch).sample, plain(*batch).sample, atol=1e-3)  # registers do take part


# ---- the official forward, written again from the specification ------------------------------------------------------


def sinusoid(t: Tensor, frequency_shift: float = 0.0) -> Tensor:
    omega = 10000.0 ** (-torch.arange(128).double() / (128 - frequency_shift))
    angle = t.double()[:, None] * omega
    return torch.cat((angle.cos(), angle.sin()), dim=1).float()


def official_forward(w: dict[str, Tensor], c: DiTConfig, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The network of the official checkpoints on their own times, all output channels: b c y x."""

    def linear(name: str, z: Tensor) -> Tensor:
        return z @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(z: Tensor, name: str = "") -> Tensor:
        if c.rms_norm:
            return z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]
        z = z - z.mean(-1, keepdim=True)
        z = z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return z * w[f"{name}.weight"] + w[f"{name}.bias"] if f"{name}.weight" in w else z  # affine in QK-norm alone

    def turn(z: Tensor) -> Tensor:  # complex rotation: rows turn the first half of the pairs, columns the second
        e = z.shape[-1]
        omega = 10000.0 ** (-torch.arange(e // 4).double() / (e // 4))
        rows, columns = torch.meshgrid(torch.arange(c.grid), torch.arange(c.grid), indexing="ij")
        angle = torch.cat((rows.flatten()[:, None] * omega, columns.flatten()[:, None] * omega), dim=1)
        angle = F.pad(angle, (0, 0, c.registers, 0))
        pairs = torch.view_as_complex(z.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2).float()

    b, p, d, h = len(x), c.patch_size, c.hidden_size, c.num_heads
    patches = x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).reshape(b, -1, c.in_channels * p * p)
    z = patches @ w["x_embedder.proj.weight"].flatten(1).T + w["x_embedder.proj.bias"] + w["pos_embed"]
    if c.registers:
        z = torch.cat((w["registers"].expand(b, -1, -1), z), dim=1)
    n = z.shape[1]
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", sinusoid(t, c.frequency_shift))))
    cond = F.silu(time + w["y_embedder.embedding_table.weight"][y])
    for i in range(c.depth):
        at = f"blocks.{i}"
        s1, k1, g1, s2, k2, g2 = linear(f"{at}.adaLN_modulation.1", cond)[:, None].chunk(6, dim=-1)
        u = norm(z, f"{at}.norm1") * (1 + k1) + s1
        q, k, v = linear(f"{at}.attn.qkv", u).view(b, n, 3, h, d // h).permute(2, 0, 3, 1, 4)
        if c.qk_norm:
            q, k = norm(q, f"{at}.attn.q_norm"), norm(k, f"{at}.attn.k_norm")
        if c.rope:
            q, k = turn(q), turn(k)
        attention = (q @ k.transpose(-1, -2) / math.sqrt(d // h)).softmax(-1) @ v
        z = z + g1 * linear(f"{at}.attn.proj", attention.transpose(1, 2).reshape(b, n, d))
        u = norm(z, f"{at}.norm2") * (1 + k2) + s2
        if c.swiglu:
            gate, value = linear(f"{at}.mlp.w12", u).chunk(2, dim=-1)
            z = z + g2 * linear(f"{at}.mlp.w3", gate * gate.sigmoid() * value)
        else:
            a = linear(f"{at}.mlp.fc1", u)
            a = 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
            z = z + g2 * linear(f"{at}.mlp.fc2", a)
    shift, scale = linear("final_layer.adaLN_modulation.1", cond)[:, None].chunk(2, dim=-1)
    z = linear("final_layer.linear", norm(z, "final_layer.norm_final") * (1 + scale) + shift)[:, c.registers :]
    z = z.view(b, c.grid, c.grid, p, p, c.out_channels)
    return torch.einsum("nhwpqc->nchpwq", z).reshape(b, c.out_channels, c.input_size, c.input_size)


@torch.no_grad()
def test_dit_convention_feeds_integer_steps_and_splits_off_the_variance(make_dit, batch):
    dit = make_dit(time="ddpm", learn_sigma=True)
    x, _, condition = batch
    index = torch.tensor([0, 17, 500, 999])
    out = dit(x, (index + 1) / 1000, condition)
    eps, variance = official_forward(dit.model.state_dict(), dit.spec, x, index, condition.label).chunk(2, dim=1)
    torch.testing.assert_close(out.sample, eps, **CLOSE)
    torch.testing.assert_close(out.variance, variance, **CLOSE)


@torch.no_grad()
def test_sit_convention_reverses_time_and_the_velocity(make_dit, batch):
    dit = make_dit(time="sit", learn_sigma=True)
    x, t, condition = batch
    out = dit(x, t, condition)
    official = official_forward(dit.model.state_dict(), dit.spec, x, 1 - t, condition.label)
    torch.testing.assert_close(out.sample, -official[:, :4], **CLOSE)  # data - noise there, noise - data here
    assert out.variance is None  # SiT computes and discards it


@pytest.mark.parametrize(
    "options",
    [{}, {"frequency_shift": 1.0}, {"patch_size": 4}, *({k: v} for k, v in MODERN.items()), MODERN],
    ids=lambda options: "+".join(options) or "plain",
)
@torch.no_grad()
def test_the_flow_convention_is_the_network_itself(make_dit, batch, options):
    dit = make_dit(**options)
    x, t, condition = batch
    official = official_forward(dit.model.state_dict(), dit.spec, x, t, condition.label)
    torch.testing.assert_close(dit(*batch).sample, official, **CLOSE)


@torch.no_grad()
def test_every_ddpm_time_reaches_the_network_as_its_own_integer(make_dit):
    dit = make_dit(time="ddpm")
    index = torch.arange(1000)
    label = torch.zeros(1000, dtype=torch.int64)
    x = torch.zeros(1000, 4, 8, 8)
    assert torch.equal(dit.pack(x, (index + 1) / 1000, Condition(label=label))["timestep"], index.float())


@torch.no_grad()
def test_a_converted_sit_follows_the_same_trajectory(make_dit, batch):
    dit = make_dit(time="sit", learn_sigma=True)
    x, _, condition = batch
    weights, theirs, ours = dit.model.state_dict(), x, x
    for k in range(8):
        t = torch.full((4,), k / 8)  # theirs: 0 = noise
        theirs = theirs + official_forward(weights, dit.spec, theirs, t, condition.label)[:, :4] / 8
        ours = ours - dit(ours, 1 - t, condition).sample / 8
    assert (theirs - x).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # eight evaluations of 1e-5 each


@torch.no_grad()
def test_the_model_runs_in_bfloat16(make_dit, batch):
    for options in ({}, MODERN):
        dit = make_dit(**options)
        exact, out = dit(*batch).sample, dit.bfloat16()(*batch).sample
        assert out.dtype == torch.bfloat16
        assert (out.float() - exact).norm() < 0.03 * exact.norm()  # 8 bits of mantissa through three blocks


# ---- official checkpoints --------------------------------------------------------------------------------------------


def official_checkpoint(c: DiTConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under exactly the names and shapes of facebookresearch/DiT and willisma/SiT."""
    d, p = c.hidden_size, c.patch_size
    shapes = {
        "pos_embed": (1, c.grid**2, d),
        "x_embedder.proj.weight": (d, c.in_channels, p, p),
        "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "y_embedder.embedding_table.weight": (c.num_classes + 1, d),
        "final_layer.linear.weight": (p * p * c.out_channels, d),
        "final_layer.linear.bias": (p * p * c.out_channels,),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.adaLN_modulation.1.bias": (2 * d,),
    }
    layers = {"attn.qkv": 3 * d, "attn.proj": d, "mlp.fc1": 4 * d, "mlp.fc2": d, "adaLN_modulation.1": 6 * d}
    for i in range(c.depth):
        for name, rows in layers.items():
            shapes[f"blocks.{i}.{name}.weight"] = (rows, 4 * d if name == "mlp.fc2" else d)
            shapes[f"blocks.{i}.{name}.bias"] = (rows,)
    generator = torch.Generator().manual_seed(seed)
    state = {k: 0.1 * torch.randn(shape, generator=generator) for k, shape in shapes.items()}
    state["pos_embed"] = position_table(d, c.grid)[None]
    return state


TINY = DiTConfig(input_size=8, hidden_size=32, depth=3, num_heads=4, num_classes=10, learn_sigma=True, time="sit")


@pytest.mark.parametrize("layout", ["bare", "training", "compiled ranks"])
@torch.no_grad()
def test_official_checkpoints_load_ema_first(tmp_path, batch, layout):
    ema, raw = official_checkpoint(TINY), official_checkpoint(TINY, seed=1)
    saved = {
        "bare": ema,
        "training": {"model": raw, "ema": ema, "opt": {"lr": 1e-4}, "args": argparse.Namespace(model="SiT-XL/2")},
        "compiled ranks": {"model": {f"module.{k}": v for k, v in ema.items()}},
    }[layout]
    torch.save(saved, tmp_path / "SiT.pt")
    dit = TINY.build()
    load_official(dit, tmp_path / "SiT.pt")
    x, t, condition = batch
    torch.testing.assert_close(
        dit(*batch).sample, -official_forward(ema, TINY, x, 1 - t, condition.label)[:, :4], **CLOSE
    )


@pytest.mark.parametrize("time, name", [("ddpm", "DiT"), ("sit", "SiT")])
def test_the_official_names_of_the_xl_models_are_all_there_is(time, name):
    c = sized("XL", learn_sigma=True, time=time)
    with torch.device("meta"):
        ours = DiTWeights(c).state_dict()
    theirs = official_checkpoint(replace(c, hidden_size=32, num_classes=10, depth=28))
    assert ours.keys() == theirs.keys(), name


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda s: s.pop("blocks.1.attn.qkv.bias"), "1 keys are missing, such as blocks.1.attn.qkv.bias"),
        (lambda s: s.update(alien=torch.zeros(1)), "it has 1 unknown keys, such as alien"),
        (
            lambda s: s.update({"final_layer.linear.weight": torch.zeros(16, 32)}),
            r"final_layer.linear.weight has shape \(16, 32\), expected \(32, 32\)",
        ),
        (lambda s: s.update(pos_embed=torch.zeros(1, 16, 32)), "pos_embed is not the 2-D sin-cos table"),
    ],
    ids=["missing", "unknown", "shape", "positions"],
)
def test_a_checkpoint_of_another_model_is_refused_naming_the_keys(damage, complaint):
    state = official_checkpoint(TINY)
    damage(state)
    with pytest.raises(ValueError, match=complaint) as error:
        from_official(state, TINY)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_state_dict_is_refused(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="expected a state dict"):
        load_official(TINY.build(), tmp_path / "tensor.pt")


# ---- diffusers -------------------------------------------------------------------------------------------------------


DDPM_BATCH_TIMES = (torch.tensor([0, 17, 500, 999]) + 1) / 1000


# ---- cost ------------------------------------------------------------------------------------------------------------

_NO_KERNEL = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select"}
_NO_KERNEL |= {"split", "split_with_sizes", "chunk", "unbind", "alias", "detach", "as_strided", "reshape", "unflatten"}


@torch.no_grad()
def kernels(f, *inputs) -> Counter[str]:
    """Operations that launch a kernel: all but views."""
    with Operators() as mode:
        f(*inputs)
    return Counter({name: n for name, n in mode.seen.items() if name not in _NO_KERNEL})


@torch.no_grad()
def test_a_unit_launches_no_more_kernels_than_the_block_of_diffusers(tmp_path, batch):
    model = stock_model()
    model.save_pretrained(tmp_path)
    dit = edit.load(tmp_path).denoiser
    x, _, condition = batch
    stream = dit.embed(**dit.pack(x, DDPM_BATCH_TIMES, condition))
    ours = kernels(dit.units[0], stream)
    block = model.transformer_blocks[0]
    theirs = kernels(lambda: block(stream.image, timestep=torch.arange(4), class_labels=condition.label))
    embedder = kernels(lambda: block.norm1.emb(torch.arange(4), condition.label, hidden_dtype=torch.float32))
    # once per model here, once per block there: leave that advantage out
    assert ours.total() <= (theirs - embedder).total(), (ours, theirs - embedder)
    # six matrix products (adaLN, qkv, proj, two of the MLP) and one fused attention
    assert ours["addmm"] == 5 and sum(n for name, n in ours.items() if "attention" in name) == 1


@torch.no_grad()
def test_a_unit_launches_no_more_kernels_than_a_plain_block(dit, batch):
    unit, stream = dit.units[0], dit.embed(**dit.pack(*batch))

    def plain(x: Tensor, cond: Tensor) -> Tensor:
        s1, k1, g1, s2, k2, g2 = unit.adaLN_modulation(cond)[:, None].chunk(6, dim=-1)
        u = F.layer_norm(x, (32,), eps=1e-6) * (1 + k1) + s1
        q, k, v = unit.attn.qkv(u).view(len(x), -1, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + g1 * unit.attn.proj(o)
        u = F.layer_norm(x, (32,), eps=1e-6) * (1 + k2) + s2
        return x + g2 * unit.mlp.fc2(F.gelu(unit.mlp.fc1(u), approximate="tanh"))

    torch.testing.assert_close(unit(stream).image, plain(stream.image, stream.cond), **CLOSE)
    ours, theirs = kernels(unit, stream), kernels(plain, stream.image, stream.cond)
    assert ours.total() <= theirs.total(), (ours, theirs)


@torch.no_grad()
def test_taps_registers_and_edits_that_are_absent_cost_nothing(make_dit, batch):
    dit = make_dit()
    whole = kernels(lambda: dit(*batch))
    parts = kernels(lambda: dit.readout(dit.embed(**dit.pack(*batch))))
    stream = dit.embed(**dit.pack(*batch))
    assert whole - parts == sum((kernels(u, stream) for u in dit.units), Counter())


@pytest.mark.slow
def test_a_unit_compiles_without_a_graph_break(make_dit, batch):
    def compiles():
        for options in ({}, MODERN):
            dit = make_dit(**options)
            stream = dit.embed(**dit.pack(*batch))
            compiled = torch.compile(dit.units[0], backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(stream).image, dit.units[0](stream).image, **CLOSE)

    run_ranks(compiles, 1)  # a process that has compiled has autograd threads, and later tests could not fork from it


# ---- meta device, structure, refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, MODERN], ids=["plain", "modern"])
@torch.no_grad()
def test_a_model_made_on_the_meta_device_allocates_nothing_and_loading_fills_it(tmp_path, make_dit, batch, options):
    with torch.device("meta"):
        huge = DiTConfig(hidden_size=16384, depth=100, num_heads=128, **options).build()  # 1.6 TB of weights
    assert all(v.is_meta for v in (*huge.state_dict().values(), *huge.buffers()))
    dit = make_dit(**options)
    edit.save(dit, tmp_path / "artifact")
    loaded = edit.load(tmp_path / "artifact").denoiser
    assert not any(v.is_meta for v in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(loaded(*batch).sample, dit(*batch).sample)


def test_buffers_are_recomputed_after_the_meta_device(make_dit):
    dit = make_dit(**MODERN)
    with torch.device("meta"):
        empty = DiTConfig(**dit.config).build()
    empty.to_empty(device="cpu").reset_buffers()
    for name, buffer in dit.named_buffers():
        assert torch.equal(dict(empty.named_buffers())[name], buffer)


@torch.no_grad()
def test_a_trained_dit_goes_on_at_another_size_with_positions_extended(make_dit, batch, tmp_path):
    """All weights stay; a larger grid begins with the former positions."""
    small, large = make_dit(**MODERN), DiTConfig(**{**make_dit(**MODERN).config, "input_size": 16})
    rows = small.model.pos_embed.view(4, 4, -1).clone()
    before = {n: p.clone() for n, p in small.named_parameters()}
    small.resize(large)
    assert small.config == small.base == large.build().config and small.sample_shape == (4, 16, 16)
    for name, buffer in large.build().named_buffers():
        assert torch.equal(dict(small.named_buffers())[name], buffer)
    assert torch.equal(small.model.pos_embed.view(8, 8, -1)[:4, :4], rows)
    assert all(torch.equal(p, before[n]) for n, p in small.named_parameters())
    x = torch.randn(4, 4, 16, 16)
    edit.save(small, tmp_path / "a")
    assert torch.equal(edit.load(tmp_path / "a").denoiser(x, *batch[1:]).sample, small(x, *batch[1:]).sample)
    same = make_dit()
    table = same.model.pos_embed
    same.resize(same.spec)
    assert same.model.pos_embed is table
    with torch.device("meta"):
        bare = DiTConfig(**make_dit(**MODERN).config).build()
        bare.resize(large)
    assert bare.config == small.config and bare.model.pos_embed.shape == (1, 64, 32) and bare.model.rope.is_meta


def test_qk_norms_alone_may_be_rms_norms(make_dit):
    block = make_dit(qk_norm=True, qk_rms=True).units[0]
    assert isinstance(block.attn.q_norm, torch.nn.RMSNorm) and isinstance(block.norm1, torch.nn.LayerNorm)
    assert isinstance(make_dit(qk_norm=True).units[0].attn.q_norm, torch.nn.LayerNorm)


def test_every_parameter_receives_a_gradient(make_dit, batch):
    for options in ({}, {"time": "ddpm", "learn_sigma": True}, MODERN):
        dit = make_dit(**options)
        out = dit(*batch)
        (out.sample.square().mean() + (0 if out.variance is None else out.variance.square().mean())).backward()
        assert [n for n, p in dit.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_keeping_units_leaves_a_shallower_dit(make_dit, batch):
    dit = make_dit()
    kept = [dit.units[0], dit.units[2]]
    dit.keep([0, 2])
    assert dit.units == kept == list(dit.model.blocks) and dit.spec.depth == dit.config["depth"] == 2
    assert DiTConfig(**dit.config).build().state_dict().keys() == dit.state_dict().keys()
    for wrong, said in (([], "at least one unit of this dit"), ([2], "units 0 to 1, got 2"), ([-1], "got -1")):
        with pytest.raises(ValueError, match=f"keep: .*{said}"):
            dit.keep(wrong)


def test_the_null_condition_is_the_last_class(dit):
    assert dit.null(Condition(label=torch.tensor([3, 0]))).label.tolist() == [10, 10]
    assert dit.model.y_embedder.embedding_table.num_embeddings == 11


def test_a_condition_without_labels_is_refused(dit, batch):
    with pytest.raises(ValueError, match="dit is class-conditional: condition.label is missing"):
        dit(*batch[:2], Condition())


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"time": "vp"}, "time must be one of flow, sit, ddpm, edm, got 'vp'"),
        ({"patch_size": 3}, "patch_size 3 does not divide input_size 32"),
        ({"num_heads": 5}, "num_heads 5 does not divide hidden_size 1152"),
        ({"hidden_size": 30, "num_heads": 3}, "hidden_size must be a multiple of 4"),
        ({"hidden_size": 36, "num_heads": 6, "rope": True}, "head width divisible by 4, got 6"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"qk_rms": True}, "says of which kind QK-norms are, and there are none: set qk_norm too"),
        ({"registers": -1}, "registers must be at least 0"),
    ],
)
def test_an_impossible_configuration_is_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        DiTConfig(**options)
