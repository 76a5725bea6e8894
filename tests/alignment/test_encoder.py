"""Encoders of timm and transformers: what they are given, what of their answer is kept, and what is refused."""

import json
import shutil
from pathlib import Path

import encoders
import pytest
import timm
import torch
from encoders import HEADS, KINDS, LAYERS, MEAN, STD, WIDTH
from torch.utils._pytree import tree_leaves

from edit.alignment.encoder import Encoder, refuse_larger
from edit.alignment.looker import in_fp32
from edit.measuring.looks import Look

MAPPED = [kind for kind in KINDS if kind != "dinov3_vit"]  # whose attention is plain


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("encoders")


@pytest.fixture(scope="module")
def models(folder):
    """The models that were saved, by kind."""
    found = {kind: encoders.of_transformers(folder / kind, kind) for kind in KINDS}
    return {**found, "timm": encoders.of_timm(folder / "timm")}


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def prepared(images, mean=MEAN, std=STD):
    return ((images + 1) / 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def states_of(kind: str, model, x):
    """What the saved model itself says of prepared pixels: tokens behind its last norm, and attention of each layer."""
    if kind == "timm":
        return model.forward_features(x), None
    told = {"noise": torch.arange(16.0).expand(len(x), -1)} if kind == "vit_mae" else {}
    if told:
        model.embeddings.config.mask_ratio = 0.0
    model.set_attn_implementation("eager")
    out = model(pixel_values=x, output_attentions=True, **told)
    last = out.last_hidden_state
    norms = [m for name, m in model.named_modules() if name.endswith("post_layernorm")]  # where depends on the version
    return norms[0](last) if kind == "clip_vision_model" else last, out.attentions


# ---- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "timm"])
@torch.no_grad()
def test_tokens_are_the_models_own_behind_its_last_norm_without_class_and_registers(kind, models, folder, images):
    skip = KINDS[kind][2] if kind in KINDS else 3
    tokens, grid, maps = Encoder(str(folder / kind)).load()(images)
    expected, _ = states_of(kind, models[kind], prepared(images))
    assert tokens.shape == (2, 16, WIDTH) and tokens.dtype == torch.float32 and grid == (4, 4) and maps == {}
    torch.testing.assert_close(tokens, expected[:, skip:], rtol=1e-4, atol=1e-4)  # SDPA and eager differ by rounding


@pytest.mark.parametrize("kind", MAPPED)
@torch.no_grad()
def test_maps_are_the_models_attention_renormalised_over_patches(kind, models, folder, images):
    """HASTE, oracle 3: class and register keys removed before the softmax; rows sum to 1."""
    skip = KINDS[kind][2]
    maps = Encoder(str(folder / kind), layers=(0, -1)).load()(images).maps
    _, attentions = states_of(kind, models[kind], prepared(images))
    assert set(maps) == {0, -1}
    for layer, found in maps.items():
        p = attentions[layer][:, :, skip:, skip:]
        p = p / p.sum(-1, keepdim=True)
        assert found.shape == (2, HEADS, 16, 16) and found.dtype == torch.float32
        torch.testing.assert_close(found.exp(), p, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.exp().sum(-1), torch.ones(2, HEADS, 16))


@torch.no_grad()
def test_maps_of_timm_are_those_of_its_queries_and_keys(models, folder, images):
    maps = Encoder(str(folder / "timm"), layers=(1,)).load()(images).maps
    block, given = models["timm"].blocks[1], []
    handle = block.attn.register_forward_hook(lambda module, args, out: given.append(args[0]))
    models["timm"].forward_features(prepared(images))
    handle.remove()
    q, k, _ = block.attn.qkv(given[0]).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    logits = (q @ k.mT * q.shape[-1] ** -0.5)[:, :, 3:, 3:]
    torch.testing.assert_close(maps[1], logits.log_softmax(-1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_model_of_timm_that_pools_before_its_norm_is_normed_all_the_same(folder, images):
    model = encoders.of_timm(folder / "pooled", registers=0, class_token=False, global_pool="avg")
    assert isinstance(model.norm, torch.nn.Identity)
    expected = model.fc_norm(model.forward_features(prepared(images)))
    torch.testing.assert_close(Encoder(str(folder / "pooled")).load()(images).tokens, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_model_of_timm_without_tokens_gives_those_of_its_last_map(folder, images):
    model = encoders.randomised(timm.create_model("resnet10t", num_classes=3), 0.05)
    timm.models.save_for_hf(model, folder / "resnet", safe_serialization=True)
    found = Encoder(str(folder / "resnet")).load()(images.repeat(1, 1, 2, 2))
    assert found.grid == (2, 2) and found.tokens.shape == (2, 4, 512)
    with pytest.raises(ValueError, match="no plain attention over patches, so it shows no maps: leave out layers"):
        Encoder(str(folder / "resnet"), layers=(0,)).structure()


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_patches_of_14_see_14_pixels_for_16_of_the_image_and_others_see_it_as_it_is(folder):
    encoders.of_timm(folder / "p14", 28, 14)
    looker = Encoder(str(folder / "p14")).structure()
    assert looker.size(256, 256) == (16, 16) and looker.size(512, 512) == (32, 32) and looker.size(256, 128) == (16, 8)
    looker = Encoder(str(folder / "p14"), side=28).structure()
    assert looker.size(256, 256) == (2, 2) and looker.size(512, 256) == (4, 2)


@torch.no_grad()
def test_images_are_normalised_and_then_resized_without_antialias(models, folder, images):
    encoder = Encoder(str(folder / "dinov2"), side=16)
    x = torch.nn.functional.interpolate(prepared(images), (16, 16), mode="bicubic")
    expected = models["dinov2"](pixel_values=x).last_hidden_state[:, 1:]
    found = encoder.load()(images)
    assert found.grid == (2, 2)
    torch.testing.assert_close(found.tokens, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, "timm"])
@torch.no_grad()
def test_every_kind_takes_images_of_another_size_and_shape_and_of_one_channel(kind, models, folder):
    looker = Encoder(str(folder / kind)).load()
    grey = torch.rand(2, 1, 48, 64) * 2 - 1
    found = looker(grey)
    assert found.grid == (6, 8) and found.tokens.shape == (2, 48, WIDTH)
    assert torch.equal(found.tokens, looker(grey.expand(-1, 3, -1, -1)).tokens)


@torch.no_grad()
def test_an_encoder_of_one_channel_takes_grey_images(folder):
    model = encoders.of_timm(folder / "grey", 8, 2, in_chans=1)
    assert model.patch_embed.proj.in_channels == 1
    looker = Encoder(str(folder / "grey")).load()
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(looker(x).tokens, looker(x.expand(-1, 3, -1, -1)).tokens)


@torch.no_grad()
def test_pixels_beyond_their_range_are_clamped(models, folder, images):
    looker = Encoder(str(folder / "vit")).load()
    assert torch.equal(looker(3 * images).tokens, looker((3 * images).clamp(-1, 1)).tokens)


# ---- as a frozen model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["timm", "dinov2", "clip_vision_model"])
def test_no_gradient_passes_and_the_structure_answers_a_plan(kind, models, folder, images):
    encoder = Encoder(str(folder / kind), layers=(1,))
    looker, structure = encoder.load(), encoder.structure()
    found = looker(images.requires_grad_())
    assert not found.tokens.requires_grad and not any(p.requires_grad for p in looker.parameters())
    assert not looker.model.training and all(v.is_meta for v in (*structure.parameters(), *structure.buffers()))
    look = Look(encoder.structure, (3, 32, 32))
    shown = look.stand_in(torch.zeros(2, 3, 32, 32))
    assert shown.grid == (4, 4) and [v.shape for v in tree_leaves(shown) if isinstance(v, torch.Tensor)] == [
        found.tokens.shape,
        found.maps[1].shape,
    ]
    assert look.macs() > 0 and look.ask(2, True, torch.float32).peak > 0


@torch.no_grad()
def test_maps_and_tokens_are_in_fp32_under_autocast(models, folder, images):
    with torch.autocast("cpu", torch.bfloat16):
        found = Encoder(str(folder / "dinov2"), layers=(0,)).load()(images)
    assert found.tokens.dtype == found.maps[0].dtype == torch.float32
    torch.testing.assert_close(found.maps[0].exp().sum(-1), torch.ones(2, HEADS, 16))  # bf16 would miss by 4e-3
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        under = in_fp32(q, k, 5)
    assert torch.equal(under, in_fp32(q, k, 5))


def test_the_identity_is_that_of_the_weights_and_of_how_images_are_prepared(models, folder):
    one = Encoder(str(folder / "timm")).identity()
    shutil.copytree(folder / "timm", folder / "copy", dirs_exist_ok=True)
    other = Encoder(str(folder / "copy"), layers=(0,)).identity()
    assert one["width"] == WIDTH and len(one["sha256"]) == 64 and one["sha256"] == other["sha256"]
    assert Encoder(str(folder / "vit")).identity()["sha256"] != one["sha256"]
    config = json.loads((folder / "copy/config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
    (folder / "copy/config.json").write_text(json.dumps(config))
    assert Encoder(str(folder / "copy")).identity()["sha256"] != one["sha256"]


def test_equal_encoders_are_one_to_a_run():
    assert Encoder("a", layers=[1, 2]) == Encoder("a", layers=(1, 2)) and len({Encoder("a"), Encoder("a", 224)}) == 2


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_images_smaller_than_a_patch_are_refused(models, folder):
    looker = Encoder(str(folder / "vit")).load()
    with pytest.raises(ValueError, match="images of 6 x 9 pixels are smaller than a patch of .*vit, 8 x 8"):
        looker(torch.zeros(1, 3, 6, 9))
    with pytest.raises(ValueError, match="side=4 pixels are smaller than a patch of .*vit, 8: raise it"):
        Encoder(str(folder / "vit"), side=4).structure()
    assert Encoder(str(folder / "vit"), side=16).load()(torch.zeros(1, 3, 6, 9)).grid == (2, 3)


@pytest.mark.parametrize("path", ["nowhere", "some/where/deep", "/not/there", "nobody/nothing"])
def test_an_encoder_that_is_not_there_is_refused_with_what_is_accepted(path):
    with pytest.raises(
        FileNotFoundError, match=r"(?s)a timm model .*safetensors.* transformers vision model \(dinov2,"
    ):
        Encoder(path).load()


def test_a_folder_of_unknown_kind_or_without_safetensors_is_refused(models, folder, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "bert/model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="holds bert, expected a timm model .* or a transformers vision model"):
        Encoder(str(tmp_path / "bert")).load()
    (tmp_path / "bert/config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a model of unknown kind"):
        Encoder(str(tmp_path / "bert")).structure()
    (tmp_path / "bert/config.json").write_text("{")
    with pytest.raises(FileNotFoundError, match="no encoder in .*: expected a timm model"):
        Encoder(str(tmp_path / "bert")).load()
    for kind in ("timm", "vit"):  # a pickle beside the configuration is not read
        shutil.copytree(folder / kind, tmp_path / kind)
        (tmp_path / kind / "model.safetensors").rename(tmp_path / kind / "pytorch_model.bin")
        with pytest.raises(FileNotFoundError, match="no weights in safetensors in .*: expected a timm model"):
            Encoder(str(tmp_path / kind)).load()


def test_weights_that_are_missing_or_of_another_model_are_refused(models, folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder / "timm", tmp_path / "timm")
    state = load_file(tmp_path / "timm/model.safetensors")
    lost = {k: v for k, v in state.items() if k != "norm.weight"}
    save_file(lost, tmp_path / "timm/model.safetensors")
    with pytest.raises(ValueError, match="lacks 1 weights of its vit_tiny_patch16_224: norm.weight"):
        Encoder(str(tmp_path / "timm")).load()
    save_file({**state, "norm.weight": torch.zeros(3)}, tmp_path / "timm/model.safetensors")
    with pytest.raises(ValueError, match="the weights are not those of its config.json"):
        Encoder(str(tmp_path / "timm")).load()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architecture": "hf-hub:somebody/else"}, "timm has no architecture 'hf-hub:somebody/else'"),
        ({"model_args": {"checkpoint_path": "/tmp/pickle.pth"}}, r"name weights elsewhere \(checkpoint_path\)"),
        ({"model_args": {"pretrained": True}}, r"name weights elsewhere \(pretrained\)"),
        ({"model_args": {"embed_dim": 2**20, "num_heads": 2}}, "bytes, and its config.json describes"),
    ],
    ids=["architecture", "file", "download", "memory"],
)
def test_a_strangers_configuration_names_no_other_weights_and_no_more_of_them(change, message, folder, tmp_path):
    shutil.copytree(folder / "timm", tmp_path / "timm")
    config = json.loads((tmp_path / "timm/config.json").read_text())
    (tmp_path / "timm/config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        Encoder(str(tmp_path / "timm")).load()


def test_a_file_has_a_byte_or_more_for_each_weight(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(16))
    refuse_larger(lambda: torch.nn.Linear(4, 4, bias=False), tmp_path / "weights")
    (tmp_path / "weights").write_bytes(bytes(15))
    with pytest.raises(ValueError, match="weights has 15 bytes, and its config.json describes 16 weights"):
        refuse_larger(lambda: torch.nn.Linear(4, 4, bias=False), tmp_path / "weights")


@pytest.mark.parametrize("kind", ["timm", "vit"])
def test_layers_that_do_not_exist_are_refused(kind, models, folder):
    with pytest.raises(ValueError, match=f"layers: {LAYERS} is none of the {LAYERS} of .*: choose 0 to {LAYERS - 1}"):
        Encoder(str(folder / kind), layers=(0, LAYERS)).structure()
    with pytest.raises(ValueError, match="dinov3_vit has no plain attention"):
        Encoder(str(folder / "dinov3_vit"), layers=(0,)).structure()


def test_timm_that_is_not_installed_is_one_sentence(models, folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ValueError, match=r'holds a timm model, and timm is not here: pip install -e "\.\[vision\]"'):
        Encoder(str(folder / "timm")).load()
