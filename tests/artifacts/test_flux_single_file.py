"""The original FLUX.1 layout: names, shapes, refusals."""

import pytest
import torch
from exports import error_of, run
from safetensors.torch import load_file, save_file

import edit
from edit.artifacts.flux_single_file import from_original, original_config, read_original, to_original
from edit.backbones.flux import FluxConfig
from edit.pruning.depth import DepthPruning

WEIGHTS = "diffusion_pytorch_model.safetensors"


def thin_state(doubles: int, singles: int, guidance: bool) -> dict[str, torch.Tensor]:
    """State dict of a FLUX.1 of the true width with 2 columns to each matrix: rows are all that a layout moves."""
    with torch.device("meta"):
        model = FluxConfig(num_layers=doubles, num_single_layers=singles, guidance_embeds=guidance).build().model
    g = torch.Generator().manual_seed(0)
    shapes = {k: (v.shape[0], *(min(s, 2) for s in v.shape[1:])) for k, v in model.state_dict().items()}
    return {k: torch.randn(shape, generator=g, dtype=torch.bfloat16) for k, shape in shapes.items()}


@pytest.mark.parametrize(("doubles", "singles", "guidance"), [(3, 2, True), (1, 4, False), (12, 1, True)])
def test_the_converter_of_diffusers_gives_back_the_stock_state_dict_bit_equal(doubles, singles, guidance):
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    state = thin_state(doubles, singles, guidance)
    original = to_original(state)
    for back in (from_original(original), convert_flux_transformer_checkpoint_to_diffusers(dict(original))):
        assert back.keys() == state.keys()
        assert all(torch.equal(back[k], v) for k, v in state.items())
    prefixed = {f"model.diffusion_model.{k}": v for k, v in original.items()}
    assert from_original(prefixed).keys() == state.keys()


def test_original_names_rows_and_the_swapped_last_modulation_are_those_of_the_release(flux):
    state = flux.model.state_dict()
    original = to_original(state)
    joined = [state[f"transformer_blocks.1.attn.{n}.weight"] for n in ("to_q", "to_k", "to_v")]
    assert torch.equal(original["double_blocks.1.img_attn.qkv.weight"], torch.cat(joined))
    assert original["single_blocks.2.linear1.weight"].shape == (3 * 32 + 4 * 32, 32)
    scale, shift = state["norm_out.linear.weight"].chunk(2)
    assert torch.equal(original["final_layer.adaLN_modulation.1.weight"], torch.cat((shift, scale)))
    assert "double_blocks.0.txt_attn.norm.key_norm.scale" in original
    assert sum(v.numel() for v in original.values()) == sum(v.numel() for v in state.values())


@torch.no_grad()
def test_a_single_file_of_a_pruned_depth_is_read_back_with_equal_outputs(flux, asked, tmp_path):
    edit.apply(flux, {"shallow": DepthPruning(pattern="listed", units=(1, 3, 4))})
    edit.save(flux, tmp_path / "a")
    assert run(f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'file'}", "format=single_file") == 0
    file = tmp_path / "file" / "file.safetensors"
    assert torch.equal(read_original(file)(*asked).sample, flux(*asked).sample)
    assert run(f"artifact={file}", f"out={tmp_path / 'back'}") == 0  # and as a diffusers folder again
    got, stock = load_file(tmp_path / "back" / WEIGHTS), flux.model.state_dict()
    assert got.keys() == stock.keys() and all(torch.equal(got[k], v) for k, v in stock.items())


def test_the_configuration_of_the_releases_is_read_off_shapes():
    for config in (FluxConfig(), FluxConfig(guidance_embeds=False)):  # dev, schnell
        with torch.device("meta"):
            flux = config.build()
            read = original_config(to_original(flux.model.state_dict()))
        assert all(flux.config[k] == v for k, v in read.items())


def test_what_is_not_the_original_layout_is_refused_in_one_sentence(flux, dit, tmp_path, capsys):
    original = to_original(flux.model.state_dict())
    file, words = tmp_path / "x.safetensors", (f"artifact={tmp_path / 'x.safetensors'}", f"out={tmp_path / 'out'}")
    axes = {"edit.axes_dims_rope": "[4, 6, 6]"}
    cases = {
        "has no txt_in.weight": {k: v for k, v in original.items() if not k.startswith("txt_in")},
        "double_blocks.1 is missing": {k: v for k, v in original.items() if not k.startswith("double_blocks.1.")},
        "lora_unet.up are unknown": {**original, "lora_unet.up": torch.ones(1)},
        "has no img_in.weight": {k: v.contiguous() for k, v in flux.model.state_dict().items()},
    }
    for said, state in cases.items():
        save_file(state, file, axes)
        assert run(*words) == 2 and said in error_of(capsys)
    save_file(original, file)
    assert run(*words) == 2 and "heads of 16 channels" in error_of(capsys)
    file.write_bytes(file.read_bytes()[:100])
    assert run(*words) == 2 and "not a whole safetensors file" in error_of(capsys)
    file.unlink()
    assert run(*words) == 2 and "no file at" in error_of(capsys)
    edit.save(dit, tmp_path / "dit")
    assert run(f"artifact={tmp_path / 'dit'}", f"out={tmp_path / 'out'}", "format=single_file") == 2
    assert "original layout of FLUX.1, this is dit" in error_of(capsys)


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ("5", "got 5"),
        ('"abc"', "got 'abc'"),
        ("null", "does not say how"),
        ("{}", "got {}"),
        ("[]", "three even numbers"),
        ("[4, 6]", "three even numbers"),
        ('[4, 6, "6"]', "three even numbers"),
        ("[5, 5, 6]", "three even numbers"),
        ("[-4, 10, 10]", "three even numbers"),
        ("[true, 9, 6]", "three even numbers"),
        ("[4, 6, 8]", "the 16 channels"),
        ("[4,", "Expecting"),
    ],
)
def test_metadata_of_another_program_is_refused_in_one_sentence(axes, said, flux, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(to_original(flux.model.state_dict()), file, {"edit.axes_dims_rope": axes})
    with pytest.raises(ValueError, match=f"x.safetensors cannot be read: .*{said}") as error:
        read_original(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("img_in.weight", torch.ones(())),
        ("img_in.weight", torch.ones(32)),
        ("txt_in.weight", torch.ones(32)),
        ("final_layer.linear.weight", torch.ones(())),
        ("img_in.weight", torch.ones(0, 16)),
        ("img_in.weight", torch.ones(30, 16)),
        ("img_in.weight", torch.ones(8, 16)),
        ("img_in.bias", torch.ones(32, dtype=torch.int8)),
        ("double_blocks.0.img_attn.norm.query_norm.scale", torch.ones(0)),
        ("double_blocks.0.img_attn.norm.query_norm.scale", torch.ones(())),
        ("double_blocks.1.img_attn.qkv.weight", torch.ones(())),
        ("double_blocks.1.img_attn.qkv.weight", torch.ones(3, 32)),
        ("final_layer.adaLN_modulation.1.bias", torch.ones(1)),
        ("vector_in.in_layer.weight", torch.ones(2, 2, 2)),
    ],
    ids=lambda v: str(tuple(v.shape)) if isinstance(v, torch.Tensor) else v,
)
def test_tensors_of_another_model_are_refused_in_one_sentence(key, value, flux, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({**to_original(flux.model.state_dict()), key: value}, file, {"edit.axes_dims_rope": "[4, 6, 6]"})
    with pytest.raises(ValueError, match="x.safetensors cannot be read: ") as error:
        read_original(file)
    assert "\n" not in str(error.value) and "unpack" not in str(error.value)
