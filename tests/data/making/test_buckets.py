"""Aspect-ratio buckets: pictures stay whole, and what is measured is of one size."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import caption, image, png

import edit
from data.loader import EndlessLoader
from data.making.buckets import cover_crop, nearest, sizes
from data.making.encoders import VAE
from data.making.precomputer import precompute
from data.one_size import OneSize
from data.pixels import to_tensor
from data.precompute import main
from data.sets.latents import Latents
from edit.backbones.qwen_image import QwenImageConfig
from edit.sampling import Sampler
from edit.solvers import Euler
from recipes.config.schema import Evaluation
from recipes.report.evaluate import run


def quiet(_: str) -> None:
    pass


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_bucket_sizes_have_about_the_area_of_the_square():
    found = sizes(512, 64, 2.0)
    assert found == [
        (384, 640), (384, 704), (448, 576), (512, 512), (576, 448), (640, 384), (704, 384),
    ]  # fmt: skip
    for side, step, ratio in ((1024, 64, 4.0), (256, 32, 2.5), (16, 4, 2.0), (64, 64, 1.0)):
        for height, width in sizes(side, step, ratio):
            assert height % step == width % step == 0 and max(height, width) <= ratio * min(height, width)
            assert (width, height) in sizes(side, step, ratio)
            # one side is the nearest multiple for the other: off by half a step at most
            assert abs(height * width - side * side) <= step * max(height, width) / 2
        assert (side, side) in sizes(side, step, ratio)


def test_an_image_goes_to_the_nearest_ratio():
    found = sizes(512, 64, 2.0)
    assert nearest(found, 300, 300) == (512, 512)
    assert nearest(found, 1920, 1080) == (384, 704)  # 1.78 lies between 1.67 and 1.83
    assert nearest(found, 100, 1000) == (704, 384)


def test_a_crop_covers_the_bucket_and_keeps_the_middle():
    wide = Image.new("RGB", (90, 20))
    wide.paste((255, 0, 0), (40, 0, 50, 20))
    crop = cover_crop(wide, (20, 30))
    assert crop.size == (30, 20)
    pixels = np.asarray(crop)
    assert (pixels[:, 10:20, 0] == 255).all() and not pixels[:, :10].any() and not pixels[:, 20:].any()
    for width, height in ((7, 400), (33, 31), (1000, 50)):
        assert cover_crop(Image.new("RGB", (width, height)), (24, 16)).size == (16, 24)


def test_impossible_buckets_are_refused(job, folder):
    with pytest.raises(ValueError, match="the size must be a multiple of the step, got 16 and 6"):
        job(folder, bucket_step=6)
    with pytest.raises(ValueError, match="bucket_ratio must be at least 1, got 0.5"):
        job(folder, bucket_step=4, bucket_ratio=0.5)
    with pytest.raises(ValueError, match="one latent of 2 px: --bucket-step must be a multiple, got 1"):
        precompute(job(folder, bucket_step=1), quiet)


# ---- the folder -----------------------------------------------------------------------------------------------------

SHAPES = [(20, 18), (36, 20), (20, 36), (24, 16)]  # width, height of image number k modulo 4


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(14):
        (tmp_path / "photos").mkdir(exist_ok=True)
        image(number, *SHAPES[number % 4]).save(tmp_path / "photos" / f"{number:02d}.png")
        (tmp_path / "photos" / f"{number:02d}.txt").write_text(caption(number))
    return tmp_path / "photos"


@pytest.fixture
def latents(job, photos, t5) -> Path:
    return precompute(job(photos, bucket_step=4, dtype="float32", text_encoder=str(t5)), quiet).parent


def test_the_manifest_tells_buckets_and_counts(latents):
    told = json.loads((latents / "manifest.json").read_text())
    assert told["latent_shape"] == [4, 8, 8] and told["count"] == 14
    expected = Counter(nearest(sizes(16, 4), *SHAPES[number % 4]) for number in range(14))
    assert len(expected) == 3
    assert {tuple(b["size"]): b["count"] for b in told["buckets"] if b["count"]} == expected
    for b in told["buckets"]:
        assert b["latent_shape"] == [4, b["size"][0] // 2, b["size"][1] // 2]


def test_each_sample_is_what_direct_encoding_gives(latents, vae):
    data = Latents(str(latents), flip=False, seed=3)
    split, found = data.train(), sizes(16, 4)
    assert data.shape == (4, 8, 8) and len(split) == 14
    names = {split.tars.json(i)["name"].rpartition("/")[2]: i for i in range(14)}
    assert len(names) == 14
    for number in range(4):
        picture, index = image(number, *SHAPES[number]), names[f"{number:02d}.png"]
        size = nearest(found, *picture.size)
        mean, std = VAE(str(vae)).moments(to_tensor(cover_crop(picture, size))[None])[0].chunk(2)
        draws = torch.stack([split.sample(index, d)["x"] for d in range(2)])
        assert draws.shape[1:] == (4, size[0] // 2, size[1] // 2) and tuple(draws.shape[1:]) in data.buckets
        # the stored distribution: within 6 of its standard deviations in each place of both draws
        assert (((draws / 0.5 + 0.1) - mean).abs() < 6 * std).all()


def test_batches_are_of_one_size(latents):
    shapes = Counter()
    for batch in EndlessLoader(Latents(str(latents)).train(), batch_size=3, total=40):
        shapes[tuple(batch["x"].shape)] += 1
    assert len(shapes) > 2 and all(s[:2] == (3, 4) for s in shapes)


def test_a_damaged_sample_is_replaced_by_one_of_its_size(latents):
    path = latents / "shard-000000.tar"
    split = Latents(str(latents), flip=False, on_error="skip").train()
    key = split.tars.key(0).encode()
    content = path.read_bytes()
    with open(path, "r+b") as file:
        file.seek(content.index(key + b".moments.npy") + 512)
        file.write(b"\xff" * 200)
    with pytest.warns(RuntimeWarning, match="moments.npy is no array"):
        replaced = split.sample(0, 0)["x"]
    same = [i for i in range(14) if split.groups[i] == split.groups[0]]
    assert any(torch.equal(replaced, split.sample(i, 0)["x"]) for i in same[1:])


def test_interrupted_work_gives_the_same_bytes(job, photos):
    whole = precompute(job(photos, "whole", bucket_step=4), quiet).parent
    work = job(photos, "parts", bucket_step=4)
    assert precompute(job(photos, "parts", bucket_step=4, rank=1, world=2), quiet) is None
    precompute(work, quiet)
    for path in whole.glob("*.tar"):
        assert path.read_bytes() == (Path(work.out) / path.name).read_bytes()
    assert (whole / "manifest.json").read_bytes() == (Path(work.out) / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="parts was begun with buckets="):
        precompute(job(photos, "parts", bucket_step=4, bucket_ratio=1.5), quiet)


def test_the_command_keeps_aspect_ratios(photos, vae, tmp_path, capsys):
    words = f"--images {photos} --out {tmp_path}/out --vae {vae} --size 16 --bucket-step 4 --device cpu".split()
    assert main(words) == 0
    assert "14 of 14 images at 5 sizes like 16 px -> latents 4x8x8" in capsys.readouterr().out
    assert len(Latents(str(tmp_path / "out")).buckets) == 5


def test_square_latents_serve_as_held_out_ones(job, photos, latents, t5):
    (photos / "14.png").write_bytes(png(14))
    (photos / "14.txt").write_text("red")
    square = precompute(job(photos, "square", text_encoder=str(t5)), quiet).parent
    data = Latents(str(latents), heldout=str(square))
    assert data.heldout().groups is None and data.heldout().sample(0, 0)["x"].shape == (4, 8, 8)


def test_what_is_measured_is_of_one_size(latents):
    split = Latents(str(latents), flip=False).train()
    largest = OneSize(split)
    most = Counter(tuple(split.sample(i, 0)["x"].shape) for i in range(14)).most_common(1)[0]
    assert (largest.shape, len(largest)) == most and 0 < len(largest) < 14
    assert {tuple(largest.sample(i, i)["x"].shape) for i in range(len(largest))} == {largest.shape}
    assert largest.part == f", the {most[1]} of 14 samples that are {'x'.join(map(str, most[0]))}"
    other = next(tuple(s["x"].shape) for s in (split.sample(i, 0) for i in range(14)) if s["x"].shape != most[0])
    assert OneSize(split, other).shape == other
    with pytest.raises(ValueError, match="none of 14 samples is a 4x9x9"):
        OneSize(split, (4, 9, 9))


@pytest.mark.parametrize("apart", [False, True], ids=["no held-out part", "square held-out part"])
def test_bucketed_latents_are_evaluated_at_one_size(latents, job, photos, t5, tmp_path, apart):
    node = {"_target_": "data.sets.latents.Latents", "path": str(latents)}
    if apart:
        for number in range(14, 20):
            image(number, 20, 20).save(photos / f"{number}.png")
            (photos / f"{number}.txt").write_text(caption(number))
        node["path"] = str(precompute(job(photos, "both", bucket_step=4, text_encoder=str(t5)), quiet).parent)
        node["heldout"] = str(precompute(job(photos, "square", text_encoder=str(t5)), quiet).parent)
    torch.manual_seed(0)
    tiny = QwenImageConfig(16, 1, 12, 2, joint_attention_dim=8, axes_dims_rope=(4, 4, 4), sample_size=(8, 8))
    edit.save(tiny.build(), tmp_path / "run" / "artifact", sampler=Sampler(Euler(1)), data=node)
    chosen = Evaluation.of({"n": 8, "guidance": 2, "features": "none", "device": "cpu", "rounds": 0})
    report = run([tmp_path / "run"], chosen, tmp_path / "out", reference=tmp_path / "run")
    told = report["artifacts"][0]
    assert told["reference"]["split"].startswith("held-out" if apart else "training set")
    assert ("samples that are" in told["reference"]["split"]) is not apart
    assert told["results"][0]["compared"]["ssim"]["value"] == pytest.approx(1)
    # samples of another shape than the real ones could not be compared at all
    assert told["results"][0]["quality"]["nearest_train"]["value"] > 0
