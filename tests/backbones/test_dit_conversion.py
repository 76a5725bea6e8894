"""A DiT as diffusers.DiTTransformer2DModel, and back."""

import pytest
import torch
from stock_dit import STOCK, stock_model
from torch import Tensor

import edit
from edit.backbones.dit import DiTConfig
from edit.backbones.dit_conversion import config_from_diffusers, from_diffusers, to_diffusers
from edit.objectives import DDPM

MODERN = {"rope": True, "swiglu": True, "rms_norm": True, "qk_norm": True, "registers": 3}


# fp32 against an independently written forward: the same sums in another order
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@torch.no_grad()
def stock_output(model, dit, batch) -> Tensor:
    native = dit.pack(*batch)
    return model(native["sample"], timestep=native["timestep"], class_labels=native["label"]).sample


DDPM_BATCH_TIMES = (torch.tensor([0, 17, 500, 999]) + 1) / 1000


@pytest.mark.parametrize("shards", ["10GB", "100KB"], ids=["one file", "sharded"])
@torch.no_grad()
def test_a_folder_of_stock_diffusers_loads_and_agrees(tmp_path, batch, shards):
    model = stock_model()
    model.save_pretrained(tmp_path / "stock", max_shard_size=shards)
    assert (len(list((tmp_path / "stock").glob("*.safetensors"))) > 1) == (shards == "100KB")
    artifact = edit.load(tmp_path / "stock")
    dit = artifact.denoiser
    assert isinstance(artifact.objective, DDPM) and dit.spec.time == "ddpm" and not dit.training
    assert dit.spec.mlp_norm_eps == 1e-5 and dit.spec.frequency_shift == 1 and dit.spec.learn_sigma
    assert not any(v.is_meta for v in dit.state_dict().values())
    x, _, condition = batch
    batch = (x, DDPM_BATCH_TIMES, condition)
    out = dit(*batch)
    torch.testing.assert_close(torch.cat((out.sample, out.variance), 1), stock_output(model, dit, batch), **CLOSE)


def test_norm_eps_is_that_of_diffusers_when_a_folder_leaves_it_out():
    c = DiTConfig(**config_from_diffusers(STOCK))
    assert c.mlp_norm_eps == 1e-5
    c = DiTConfig(**config_from_diffusers({**STOCK, "norm_eps": 1e-3}))
    assert c.mlp_norm_eps == 1e-3


@pytest.mark.parametrize("time, learn_sigma", [("ddpm", True), ("flow", False), ("sit", True)])
@torch.no_grad()
def test_a_dit_becomes_a_stock_diffusers_model(tmp_path, make_dit, batch, time, learn_sigma):
    from diffusers import DiTTransformer2DModel

    dit = make_dit(time=time, learn_sigma=learn_sigma, frequency_shift=1.0)
    edit.save(dit, tmp_path / "artifact")
    model, notes = DiTTransformer2DModel.from_pretrained(tmp_path / "artifact", output_loading_info=True)
    assert not any(notes.values()), notes  # no key missing, unexpected or of another shape
    x, t, condition = batch
    batch = (x, DDPM_BATCH_TIMES if time == "ddpm" else t, condition)
    sample = stock_output(model.eval(), dit, batch)[:, :4]
    torch.testing.assert_close(dit(*batch).sample, -sample if time == "sit" else sample, **CLOSE)


@torch.no_grad()
def test_to_diffusers_and_back_is_bit_equal(make_dit):
    dit = make_dit(time="ddpm", learn_sigma=True, frequency_shift=1.0, mlp_norm_eps=1e-5)
    state = dit.model.state_dict()
    config, stock = to_diffusers(dit.config, state)
    c = DiTConfig(**config_from_diffusers(config))
    back = from_diffusers(c.depth, stock)
    assert c == dit.spec
    assert back.keys() | {"pos_embed"} == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in back)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"frequency_shift": 0.0}, "frequency_shift other than 1"),
        *(({k: v}, k) for k, v in MODERN.items()),
        ({"mlp_ratio": 2.0}, "mlp_ratio other than 4"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_model_that_diffusers_cannot_express_is_refused_with_the_reason(make_dit, options, reason):
    dit = make_dit(**{"frequency_shift": 1.0, **options})
    with pytest.raises(ValueError, match=f"DiTTransformer2DModel has no {reason}"):
        to_diffusers(dit.config, dit.model.state_dict())


@pytest.mark.parametrize(
    "option", [{"activation_fn": "gelu"}, {"norm_type": "layer_norm"}, {"out_channels": 5}], ids=lambda o: next(iter(o))
)
def test_a_stock_model_that_a_dit_cannot_express_is_refused_with_the_reason(option):
    # "gelu" has the same weights as "gelu-approximate": reading it silently would be a different model
    key, value = next(iter(option.items()))
    with pytest.raises(ValueError, match=f"{key}.*{value}"):
        config_from_diffusers({**STOCK, **option})


def test_per_block_embedders_that_differ_are_refused():
    model = stock_model()
    with torch.no_grad():
        model.transformer_blocks[2].norm1.emb.timestep_embedder.linear_1.bias += 1
    with pytest.raises(ValueError, match="block 2 of this DiTTransformer2DModel has its own norm1.emb.timestep"):
        from_diffusers(STOCK["num_layers"], model.state_dict())


def test_a_stock_state_dict_with_a_missing_key_is_refused_naming_it():
    state = stock_model().state_dict()
    del state["transformer_blocks.1.attn1.to_v.bias"]
    with pytest.raises(ValueError, match="transformer_blocks.1.attn1.to_v.bias is missing"):
        from_diffusers(STOCK["num_layers"], state)
