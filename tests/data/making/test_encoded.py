"""Patch tokens of a vision encoder beside latents: `data.precompute --features`, and `Latents(encoded=True)`."""

import json
import shutil
from pathlib import Path

import encoders
import numpy as np
import pytest
import torch
from samples import SIZE, caption, image

from data import manifest
from data.damage import Damaged
from data.loader import EndlessLoader
from data.making.precomputer import precompute
from data.pixels import centre_crop, to_tensor
from data.sets.latents import Latents
from data.split import flipped
from edit.alignment.encoder import Encoder


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="session")
def vit(tmp_path_factory) -> Path:
    """A random ViT of timm: 4 x 4 patches of 4 pixels."""
    place = tmp_path_factory.mktemp("vision") / "vit"
    encoders.of_timm(place, SIZE, 4)
    return place


@pytest.fixture(scope="session")
def dino(tmp_path_factory) -> Path:
    """A random DINOv2 of transformers, with patches of 14 pixels."""
    place = tmp_path_factory.mktemp("vision") / "dino"
    encoders.of_transformers(place, "dinov2", 28, 14)
    return place


@pytest.fixture
def made(job, folder, vit) -> Path:
    """12 images with flips and the features of the ViT."""
    return precompute(job(folder, features=str(vit)), quiet).parent


def rewrite(folder: Path, change) -> None:
    """Edit the manifest and give it a checksum that fits."""
    path = folder / "manifest.json"
    told = json.loads(path.read_text())
    change(told)
    told["checksum"] = manifest.checksum(told)
    path.write_text(json.dumps(told))


# ---- what is stored -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "dino"])
def test_features_are_those_of_the_latents_own_crop_mirrored_where_the_latents_are(kind, job, folder, request):
    path = request.getfixturevalue(kind)
    made = precompute(job(folder, features=str(path)), quiet).parent
    data = Latents(str(made), encoded=True, seed=3)
    looker, seen = Encoder(str(path)).load(), set()
    told = Encoder(str(path)).identity()
    grid = looker(torch.zeros(1, 3, SIZE, SIZE)).grid
    assert data.encoded == told | {"name": kind, "grid": list(grid)}
    for draw in range(8):
        sample = data.train().sample(7, draw)  # sorted by class, the eighth is b/10
        mirrored = flipped(3, draw)
        seen.add(mirrored)
        x = to_tensor(centre_crop(image(10), SIZE))[None]
        want = looker(x.flip(-1) if mirrored else x).tokens[0]
        assert sample["encoded"].shape == (grid[0] * grid[1], told["width"])
        # a half has 11 bits; batches of other sizes sum in other orders
        torch.testing.assert_close(sample["encoded"], want, rtol=2e-3, atol=2e-3)
        member = "moments_flip.npy" if mirrored else "moments.npy"  # the latents of this draw
        mean, std = data.train()._array(7, member, (8, 8, 8)).chunk(2)
        noise = sample["x"] / 0.5 + 0.1 - mean
        assert (noise.abs() <= 6 * std + 1e-3).all()
    assert seen == {True, False}


def test_a_mirrored_images_features_are_of_the_pixels_and_no_permutation(made):
    """REPA, oracle 6: the flip of image and latent goes with the encoder's answer to the flipped image."""
    split = Latents(str(made), encoded=True).train()
    plain = split._array(0, "features.npy", (16, encoders.WIDTH))
    mirrored = split._array(0, "features_flip.npy", (16, encoders.WIDTH))
    columns = plain.view(4, 4, -1).flip(1).flatten(0, 1)
    assert not torch.allclose(mirrored, plain, atol=1e-2) and not torch.allclose(mirrored, columns, atol=1e-2)


def test_half_precision_is_stored_whatever_the_latents_are(job, folder, vit):
    made = precompute(job(folder, features=str(vit), dtype="float32"), quiet).parent
    split = Latents(str(made), encoded=True).train()
    for view in ("features.npy", "features_flip.npy"):
        content = split.tars.read(0, view)
        assert len(content) == 128 + 2 * 16 * encoders.WIDTH and b"<f2" in content[:128]


def test_no_features_of_mirrored_images_without_flips(job, folder, vit):
    made = precompute(job(folder, features=str(vit), flips=False), quiet).parent
    split = Latents(str(made), encoded=True, flip=False).train()
    assert split.tars.read(0, "features_flip.npy") is None
    assert split.sample(0, 1)["encoded"].shape == (16, encoders.WIDTH)


def test_batches_have_the_features_of_their_samples(made):
    data = Latents(str(made), encoded=True)
    batch = next(iter(EndlessLoader(data.train(), 4, 8, 0)))
    assert batch["encoded"].shape == (4, 16, encoders.WIDTH) and batch["encoded"].dtype == torch.float32


def test_each_sample_of_a_bucket_has_its_own_grid(job, tmp_path, vit):
    (tmp_path / "mixed").mkdir()
    for number in range(6):
        image(number, *((32, 16), (16, 32), (20, 20))[number % 3]).save(tmp_path / "mixed" / f"{number}.png")
        (tmp_path / "mixed" / f"{number}.txt").write_text(caption(number))
    made = precompute(job(tmp_path / "mixed", features=str(vit), bucket_step=4), quiet).parent
    data, looker = Latents(str(made), encoded=True, flip=False), Encoder(str(vit)).load()
    by_size = {tuple(b["size"]): b["grid"] for b in data.manifest["buckets"]}
    assert by_size and all(grid == list(looker.size(*size)) for size, grid in by_size.items())
    split = data.train()
    used = set()
    for i in range(len(split)):
        sample = split.sample(i, 0)
        y, x = (2 * side for side in sample["x"].shape[1:])
        used.add((y, x))
        rows, columns = by_size[y, x]
        assert sample["encoded"].shape == (rows * columns, encoders.WIDTH)
    assert len(used) == 3
    last = max(i for i, b in enumerate(data.manifest["buckets"]) if b["count"])
    rewrite(made, lambda told: told["buckets"][last].update(grid=[32, 32]))
    with pytest.raises(Damaged, match=r"features\.npy has \d+ bytes, which is not what its shape needs"):
        Latents(str(made), encoded=True)


def test_a_larger_side_gives_the_features_of_the_enlarged_image(job, folder, vit):
    made = precompute(job(folder, features=str(vit), features_side=32), quiet).parent
    data = Latents(str(made), encoded=True, flip=False)
    assert data.encoded["grid"] == [8, 8] and data.encoded["side"] == 32
    x = to_tensor(centre_crop(image(0), SIZE))[None]
    want = Encoder(str(vit), side=32).load()(x).tokens[0]
    torch.testing.assert_close(data.train().sample(0, 0)["encoded"], want, rtol=2e-3, atol=2e-3)


def test_the_forecast_counts_features(job, folder, vit):
    said = []
    out = precompute(job(folder, features=str(vit), shard_size=12), said.append).parent
    written = (out / "shard-000000.tar").stat().st_size
    assert 0.8 < float(said[0].split("about ")[1].split(" kB")[0]) * 1000 / written < 1.25
    assert "features 16 x 16" in said[0]


# ---- folders without, and begun ones --------------------------------------------------------------------------------


def test_a_folder_without_features_is_as_it_was_before_there_were_any(job, folder, vit, made):
    plain = precompute(job(folder, "plain"), quiet).parent
    told = [json.loads((p / "manifest.json").read_text()) for p in (plain, made)]
    assert "features" not in told[0] and "features" not in told[0]["sources"]
    assert told[0]["identity"] == told[1]["identity"]  # their latents may be mixed: held-out ones need no features
    data = Latents(str(made), heldout=str(plain), encoded=True)
    assert data.encoded is not None and "encoded" not in data.heldout().sample(0, 0)
    assert Latents(str(plain)).encoded is None and "encoded" not in Latents(str(made)).train().sample(0, 0)


def test_features_that_are_not_there_are_refused(job, folder, vit):
    plain = precompute(job(folder, "plain"), quiet).parent
    with pytest.raises(ValueError, match="no features of a vision encoder, which data.precompute stores with --feat"):
        Latents(str(plain), encoded=True)
    with pytest.raises(ValueError, match="no features of a vision encoder, and those of .*vit are expected"):
        Latents(str(plain), encoded_by=str(vit))


def test_a_restart_keeps_the_bytes_and_another_encoder_is_refused(job, folder, vit, made, tmp_path):
    before = {p.name: p.read_bytes() for p in made.glob("*.tar")}
    (made / "records" / "000001.json").unlink()
    moved = shutil.copytree(vit, tmp_path / "elsewhere" / "vit")  # the same encoder at another place
    precompute(job(folder, features=str(moved)), quiet)
    assert {p.name: p.read_bytes() for p in made.glob("*.tar")} == before
    encoders.of_timm(tmp_path / "vit", SIZE, 4, registers=1)
    with pytest.raises(ValueError, match=r"was begun with features\.sha256="):
        precompute(job(folder, features=str(tmp_path / "vit")), quiet)
    with pytest.raises(ValueError, match=r"was begun with features\.side=None, this command has 32"):
        precompute(job(folder, features=str(vit), features_side=32), quiet)
    with pytest.raises(ValueError, match=r"was begun with features\.\w+=.*, this command has None"):
        precompute(job(folder), quiet)


# ---- another encoder, another grid ----------------------------------------------------------------------------------


def test_features_of_another_encoder_are_refused(made, vit, dino, tmp_path):
    assert Latents(str(made), encoded=True, encoded_by=str(vit)).encoded["name"] == "vit"
    known = json.loads((made / "manifest.json").read_text())["features"]["sha256"]
    assert Latents(str(made), encoded_by=known).manifest["features"]["sha256"] == known
    for other in (str(dino), "0" * 64):
        with pytest.raises(ValueError, match="features of another encoder, vit .*give that encoder, or make the fold"):
            Latents(str(made), encoded=True, encoded_by=other)
    with pytest.raises(FileNotFoundError, match="gone.*a timm model .* or a transformers vision model"):
        Latents(str(made), encoded_by=str(tmp_path / "gone"))


@pytest.mark.parametrize("change", [{"grid": [5, 5]}, {"width": 32}])
def test_features_of_another_grid_are_refused_before_a_sample_is_read(made, change):
    rewrite(made, lambda told: told["features"].update(change))
    with pytest.raises(Damaged, match=r"\.features\.npy has \d+ bytes, which is not what its shape needs"):
        Latents(str(made), encoded=True)


def test_features_whose_shape_differs_from_the_manifest_are_named(made):
    """As many numbers, on another grid: the size of the member alone does not tell."""
    rewrite(made, lambda told: told["features"].update(grid=[8, 4], width=8))
    split = Latents(str(made), encoded=True).train()
    with pytest.raises(Damaged, match=r"features(_flip)?\.npy has shape \(16, 16\), expected \(32, 8\)"):
        split.sample(0, 0)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"sha256": "no"}, "features is"),
        ({"width": 0}, "features is"),
        ({"width": 2**60}, "features is"),
        ({"grid": [4]}, "features is"),
        ({"grid": [4, True]}, "features is"),
        ({"grid": [2**40, 2**40]}, "features is"),
    ],
)
def test_a_manifest_that_says_nonsense_of_features_is_refused(made, change, message):
    rewrite(made, lambda told: told["features"].update(change))
    with pytest.raises(ValueError, match=message):
        Latents(str(made), encoded=True)


def test_a_member_that_claims_more_numbers_than_it_has_takes_no_memory(made):
    split = Latents(str(made), encoded=True, flip=False).train()
    whole = split.tars.read(0, "features.npy")
    header = {"descr": "<f2", "fortran_order": False, "shape": (16, encoders.WIDTH)}
    huge = np.lib.format.magic(1, 0) + _header(header | {"shape": (2**20, 2**20)}) + whole[128:]
    short = np.lib.format.magic(1, 0) + _header(header) + whole[130:]
    read = split.tars.read
    for content, message in (
        (huge, r"has shape \(1048576, 1048576\), expected"),
        (short, "is no array .*512 bytes, and it has 510"),
    ):
        split.tars.read = lambda i, m, c=content: c if m == "features.npy" else read(i, m)
        with pytest.raises(Damaged, match=message):
            split.sample(0, 0)


def _header(told: dict) -> bytes:
    text = repr(told).encode()
    text += b" " * (117 - len(text)) + b"\n"
    return len(text).to_bytes(2, "little") + text


# ---- what cannot be made --------------------------------------------------------------------------------------------


def test_images_smaller_than_the_patch_and_encoders_that_are_not_there_are_refused(job, folder, tmp_path, vae):
    large = tmp_path / "large"
    encoders.of_timm(large, 64, 32)
    with pytest.raises(ValueError, match="images of 16 x 16 pixels are smaller than a patch of .*large, 32 x 32"):
        precompute(job(folder, features=str(large)), quiet)
    with pytest.raises(FileNotFoundError, match="no folder .*gone: give the folder or hub id of a timm model"):
        precompute(job(folder, features=str(tmp_path / "gone")), quiet)
    with pytest.raises(ValueError, match="vae.* holds a model of unknown kind, expected a timm model"):
        precompute(job(folder, features=str(vae)), quiet)
    assert not (tmp_path / "latents").exists()
    with pytest.raises(ValueError, match="features_side is of a vision encoder, and there is none"):
        job(folder, features_side=32)
    with pytest.raises(ValueError, match="features is empty"):
        job(folder, features="")


def test_values_beyond_halves_are_refused_and_not_stored(job, folder, tmp_path):
    from safetensors.torch import load_file, save_file

    encoders.of_timm(tmp_path / "loud", SIZE, 4)
    file = tmp_path / "loud" / "model.safetensors"
    state = load_file(file)
    state["norm.weight"] *= 1e6
    save_file(state, file)
    with pytest.raises(ValueError, match="features of loud do not fit float16: choose another encoder"):
        precompute(job(folder, features=str(tmp_path / "loud")), quiet)


def test_the_command_takes_the_encoder(folder, vae, vit, tmp_path, capsys):
    from data.precompute import main

    words = ["--images", str(folder), "--out", str(tmp_path / "out"), "--vae", str(vae), "--size", "16"]
    assert main([*words, "--features", str(vit), "--features-side", "32", "--workers", "1", "--device", "cpu"]) == 0
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert told["features"]["grid"] == [8, 8] and told["sources"]["features"] == str(vit)
