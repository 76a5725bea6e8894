"""Precomputed latents: what training reads is what the encoders would have said, and nothing else is read."""

import io
import json
import multiprocessing as mp
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import SIZE, caption, image, png, write_tar

from data.damage import Damaged, Tolerance
from data.loader import EndlessLoader
from data.making.encoders import VAE, TextEncoder
from data.making.job import Job
from data.making.precomputer import precompute
from data.pixels import centre_crop, to_tensor, to_uint8
from data.precompute import main
from data.sets.latents import Latents, LatentSplit
from data.tars import Tars
from edit.noise import gaussian


def quiet(_: str) -> None:
    pass


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that precompute wrote, and nothing else."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def latents(job, folder, t5, clip) -> Path:
    """12 images in shards of 5, 5 and 2, with text, pooled text and flips."""
    path = precompute(job(folder, text_encoder=str(t5), pooled_encoder=str(clip), dtype="float32"), quiet)
    return path.parent


# ---- what is read ---------------------------------------------------------------------------------------------------


def test_training_reads_what_direct_encoding_gives(latents, vae, t5, clip):
    data = Latents(str(latents), flip=False, seed=7)
    assert (data.shape, data.num_classes, data.classes) == ((4, 8, 8), 3, ["a", "b", "c"])
    split = data.train()
    assert len(split) == 12
    encoder, text, pooled = VAE(str(vae)), TextEncoder(str(t5)), TextEncoder(str(clip))
    for index, draw, number in ((0, 5, 0), (7, 0, 10), (11, 123456, 11)):  # sorted by class: a/00 is first, c/11 last
        sample = split.sample(index, draw)
        x = to_tensor(centre_crop(image(number), SIZE))[None]
        dist = encoder.model.encode(x).latent_dist
        eps = gaussian(7, torch.tensor([draw]), 101, (4, 8, 8))
        # 1e-5: convolutions over batches of one and of two sum in different orders
        torch.testing.assert_close(sample["x"], ((dist.mean + dist.std * eps - 0.1) * 0.5)[0], rtol=1e-5, atol=1e-5)
        assert sample["label"] == number % 3
        words = text.encode([caption(number)])[0].text
        torch.testing.assert_close(sample["text"], words, rtol=1e-5, atol=1e-5)
        assert len(sample["text"]) == 2 + number % 6 == sample["text_mask"].sum()  # the words and </s>
        pool = pooled.encode([caption(number)])[0].pooled
        torch.testing.assert_close(sample["pooled"], pool, rtol=1e-5, atol=1e-5)


def test_each_draw_resamples_and_half_of_them_are_flipped(latents, vae):
    split = Latents(str(latents)).train()
    same = split.sample(3, 8)["x"]
    assert torch.equal(split.sample(3, 8)["x"], same)
    assert not torch.equal(split.sample(3, 9)["x"], same)
    straight, mirrored = [
        (VAE(str(vae)).moments(x)[:, :4] - 0.1) * 0.5
        for x in (lambda x: (x, x.flip(-1)))(to_tensor(centre_crop(image(9), SIZE))[None])
    ]
    closer = [
        (x - mirrored).square().mean() < (x - straight).square().mean()
        for x in (split.sample(3, d)["x"] for d in range(200))
    ]
    assert 70 < sum(closer) < 130  # 100 expected, four standard deviations of 7


def test_the_mean_over_draws_is_the_stored_mean(latents, vae):
    split = Latents(str(latents), flip=False).train()
    mean, std = VAE(str(vae)).moments(to_tensor(centre_crop(image(0), SIZE))[None])[0].chunk(2)
    draws = torch.stack([split.sample(0, d)["x"] for d in range(400)])
    # the mean of 400 draws lies within five of its standard errors, 5 / sqrt(400), in each of 256 places
    assert ((draws.mean(0) - (mean - 0.1) * 0.5).abs() < 0.25 * 0.5 * std).all()
    assert (draws.std(0) / (0.5 * std) - 1).abs().max() < 0.2  # five of 1 / sqrt(800)


def test_batches_have_padded_text_and_are_the_same_with_workers(latents):
    def batches(workers):
        return list(EndlessLoader(Latents(str(latents)).train(), batch_size=4, total=4, workers=workers))

    for a, b in zip(batches(0), batches(2), strict=True):
        assert set(a) == {"x", "label", "text", "text_mask", "pooled", "draw"}
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert a["text"].shape[:2] == a["text_mask"].shape
        assert a["text"].shape[1] == a["text_mask"].sum(1).max()


def test_the_empty_prompt_is_there_for_guidance(latents, t5, clip):
    null = Latents(str(latents)).null
    assert torch.equal(null["text"], TextEncoder(str(t5)).encode([""])[0].text) and null["text_mask"].all()
    assert torch.equal(null["pooled"], TextEncoder(str(clip)).encode([""])[0].pooled)


def test_half_precision_is_stored_in_half_the_bytes(latents, job, folder, t5, clip):
    options = {"text_encoder": str(t5), "pooled_encoder": str(clip)}
    half = precompute(job(folder, "half", **options), quiet).parent
    a, b = Latents(str(latents)).train().sample(0, 0), Latents(str(half)).train().sample(0, 0)
    assert b["x"].dtype == torch.float32
    for name in ("x", "text", "pooled"):
        torch.testing.assert_close(a[name], b[name], rtol=2**-9, atol=2**-9)  # 11 bits of mantissa
    assert len(Tars(str(half), Latents(str(half)).train().tars.tolerance).read(0, "moments.npy")) == 128 + 2 * 512


def test_captions_are_cut_at_the_encoders_longest_input(clip):
    encoder = TextEncoder(str(clip), max_tokens=256)
    assert encoder.max_tokens == 4
    assert [len(e.text) for e in encoder.encode([caption(5), caption(0)])] == [4, 2]


def test_the_states_of_the_padding_are_those_of_an_unmasked_encoder(t5):
    encoder = TextEncoder(str(t5), max_tokens=8, padding="states")
    tokens = encoder.tokenizer([caption(1)], padding="max_length", max_length=8, return_tensors="pt").input_ids
    states = encoder.model(input_ids=tokens).last_hidden_state[0]  # as FluxPipeline asks its T5
    several = encoder.encode([caption(5), caption(1)])
    assert several[0].text.shape == (8, 8)
    torch.testing.assert_close(several[1].text, states, rtol=1e-5, atol=1e-5)  # batches of one and of two
    masked = TextEncoder(str(t5), max_tokens=8).encode([caption(1)])[0].text
    assert len(masked) == 3 and (masked - states[:3]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="padding is one of none, states, zeros, got 'left'"):
        TextEncoder(str(t5), padding="left")


def test_text_of_a_fixed_length_is_read_as_it_was_encoded(job, folder, t5):
    for padding in ("states", "zeros"):
        data = Latents(
            str(precompute(job(folder, padding, text_encoder=str(t5), max_tokens=8, padding=padding), quiet).parent)
        )
        sample = data.train().sample(0, 0)  # of one word
        assert sample["text"].shape == data.null["text"].shape == (8, 8)
        assert sample["text_mask"].sum() == (8 if padding == "states" else 2)
        assert sample["text"][2:].any() == (padding == "states")


def test_tar_shards_give_the_same_latents_as_a_folder(job, shards):
    data = Latents(str(precompute(job(shards), quiet).parent), flip=False)
    assert data.num_classes == 3 and data.null is None
    assert [int(data.train().sample(i, 0)["label"]) for i in range(12)] == [i % 3 for i in range(12)]


def test_images_are_looked_at_through_the_vae(latents, vae):
    data = Latents(str(latents), flip=False)
    x = torch.stack([data.train().sample(i, i)["x"] for i in range(3)])
    images = data.to_frames(x)[:, 0]
    assert images.shape == (3, SIZE, SIZE, 3) and images.dtype == torch.uint8
    assert torch.equal(images, to_uint8(VAE(str(vae)).decode(x / 0.5 + 0.1)))


def test_a_vae_that_is_gone_or_another_is_told(latents, vae, tmp_path):
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(FileNotFoundError, match="data.set.vae=<folder>: .*nowhere is no folder here and no hub id"):
        Latents(str(latents), vae=str(tmp_path / "nowhere")).to_frames(x)
    from diffusers import AutoencoderKL

    other = AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        other.decoder.conv_out.bias += 1e-3
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other is not the VAE that made"):
        Latents(str(latents), vae=str(tmp_path / "other")).to_frames(x)
    shutil.copytree(vae, tmp_path / "moved")
    Latents(str(latents), vae=str(tmp_path / "moved")).to_frames(x)


def test_held_out_latents_must_be_of_the_same_encoders(latents, job, folder, t5, clip):
    data = Latents(str(latents), heldout=str(latents))
    assert len(data.heldout()) == 12 and not data.heldout().flip
    other = precompute(job(folder, "other", text_encoder=str(t5)), quiet).parent
    with pytest.raises(ValueError, match="other was made with other encoders"):
        Latents(str(latents), heldout=str(other))


# ---- what is refused ------------------------------------------------------------------------------------------------


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    changed = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in changed.items() if k != "checksum"}))  # as an older one, without it


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


MISMATCH = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "is unfinished: give the same .* command again"),
    "no folder": (shutil.rmtree, "does not exist: expected a folder made by python -m data.precompute"),
    "no json": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is no JSON"),
    "other format": (lambda f: edit_manifest(f, format=0), "has format 0, this version reads 1"),
    "other scale": (
        lambda f: edit_manifest(f, vae=json.loads((f / "manifest.json").read_text())["vae"] | {"scale": [1.0]}),
        "was edited: its encoders, scaling or shape",
    ),
    "other count": (lambda f: edit_manifest(f, count=13), "counts 13 samples, its shards 12"),
    "missing shard": (lambda f: (f / "shard-000001.tar").unlink(), "shard-000001.tar is missing"),
    "short shard": (lambda f: os.truncate(f / "shard-000001.tar", 2000), r"shard-000001.tar has 2000 bytes, .* says"),
    "deep json": (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json is no JSON"),
    "null text": (lambda f: flip_byte(f / "null.safetensors"), "null.safetensors differs from the manifest"),
}


@pytest.mark.parametrize("damage,message", MISMATCH.values(), ids=MISMATCH)
def test_a_folder_that_is_not_what_its_manifest_says_is_refused(latents, damage, message):
    damage(latents)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Latents(str(latents))


def test_a_changed_byte_is_found_by_the_full_check(latents):
    flip_byte(latents / "shard-000000.tar")
    with pytest.raises(Damaged, match=r"shard-000000\.tar has changed: its checksum differs"):
        Latents(str(latents), verify="full")
    with pytest.warns(RuntimeWarning, match=r"shard-000000\.tar has changed.*; skipped, 1 so far"):
        assert len(Latents(str(latents), verify="full", on_error="skip").train()) == 7


def test_a_label_beyond_the_classes_is_refused_or_skipped_by_name(latents):
    edit_manifest(latents, num_classes=2, classes=["a", "b"])
    said = r"shard-000001\.tar: 000000008 has the label 2, and the manifest has 2 classes"
    with pytest.raises(Damaged, match=f"{said}.*on_error=skip"):
        Latents(str(latents))
    with pytest.warns(RuntimeWarning, match=f"{said}; skipped, 1 so far"):
        split = Latents(str(latents), on_error="skip").train()
    with pytest.warns(RuntimeWarning, match="000000009 has the label 2"):
        assert [int(split.sample(i, 0)["label"]) for i in range(12)] == [0] * 4 + [1] * 4 + [0] * 4


def test_a_short_shard_is_named_and_left_out(latents):
    os.truncate(latents / "shard-000001.tar", 2000)
    with pytest.warns(RuntimeWarning, match=r"shard-000001\.tar has 2000 bytes.*; skipped, 1 so far"):
        assert len(Latents(str(latents), on_error="skip").train()) == 7


def test_a_sample_with_broken_numbers_is_named_and_replaced(latents):
    path = latents / "shard-000000.tar"
    with open(path, "r+b") as file:
        data = file.read()
        file.seek(data.index(b"000000001.moments.npy") + 512)
        file.write(b"\xff" * 2000)
    split = Latents(str(latents), flip=False).train()
    with pytest.raises(Damaged, match=r"shard-000000\.tar: 000000001\.moments\.npy is no array"):
        split.sample(1, 0)
    with pytest.warns(RuntimeWarning, match=r"000000001\.moments\.npy is no array"):
        sample = Latents(str(latents), flip=False, on_error="skip").train().sample(1, 0)
    assert torch.equal(sample["x"], split.sample(2, 0)["x"])


def test_a_pickle_is_never_read(latents):
    import io

    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    tars = Latents(str(latents)).train()
    tars.tars.read = lambda index, member: file.getvalue()  # what a stranger's shard could hold
    with pytest.raises(Damaged, match="is no array .*allow_pickle=False"):
        tars.sample(0, 0)


def test_flips_that_were_not_stored_are_refused(job, folder):
    plain = precompute(job(folder, flips=False), quiet).parent
    with pytest.raises(ValueError, match="no flipped latents: set flip=false, or precompute with --flips"):
        Latents(str(plain))
    assert len(Latents(str(plain), flip=False).train()) == 12


# ---- how it is made -------------------------------------------------------------------------------------------------


def killed_after(count: int, job) -> None:
    """Run precompute in a process of its own and kill -9 it once `count` shards are recorded."""
    child = mp.get_context("fork").Process(target=precompute, args=(job, quiet), daemon=True)
    child.start()
    records = Path(job.out) / "records"
    end = time.monotonic() + 60
    while len(list(records.glob("*.json"))) < count:
        assert child.is_alive() and time.monotonic() < end, "the work was over before it could be killed"
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGKILL)
    child.join()


def test_killed_and_started_again_it_writes_the_same_bytes(job, folder, t5):
    options = {"text_encoder": str(t5), "shard_size": 2}
    whole = precompute(job(folder, "whole", **options), quiet).parent
    broken = job(folder, "broken", **options)
    killed_after(2, broken)
    first = Path(broken.out) / "shard-000000.tar"
    assert not (first.parent / "manifest.json").exists()
    made = first.stat().st_mtime_ns
    (first.parent / ".shard-000005.tar.tmp-1").write_bytes(b"left by a killed process")
    precompute(broken, quiet)
    assert contents(first.parent) == contents(whole)
    assert first.stat().st_mtime_ns == made  # finished shards are not made again


def test_a_shard_that_was_cut_after_its_record_is_made_again(job, folder):
    work = job(folder)
    out = precompute(work, quiet).parent
    before = contents(out)
    os.truncate(out / "shard-000001.tar", 100)
    precompute(work, quiet)
    assert contents(out) == before


def test_ranks_share_the_work_and_the_last_writes_the_manifest(job, folder):
    whole = precompute(job(folder, "whole"), quiet).parent
    assert precompute(job(folder, "shared", rank=1, world=2), quiet) is None
    shared = precompute(job(folder, "shared", rank=0, world=2), quiet).parent
    assert contents(shared) == contents(whole)


@pytest.mark.slow  # each process imports torch and diffusers anew
def test_processes_share_the_work(job, folder, tmp_path, vae, t5):
    whole = precompute(job(folder, "whole", text_encoder=str(t5)), quiet).parent
    words = f"--images {folder} --out {tmp_path}/spread --vae {vae} --text-encoder {t5} --size {SIZE} --batch 2 "
    words += "--shard-size 5 --workers 1 --processes 2 --device cpu"
    command = [sys.executable, "-m", "data.precompute", *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "spread") == contents(whole)


def test_a_damaged_image_stops_the_work_or_is_left_out_and_listed(job, folder):
    (folder / "b" / "04.png").write_bytes(b"nothing")
    with pytest.raises(Damaged, match=r"b/04\.png cannot be decoded \(no image\); .*on_error=skip"):
        precompute(job(folder), quiet)
    with pytest.warns(RuntimeWarning, match=r"b/04\.png cannot be decoded"):
        out = precompute(job(folder, on_error="skip"), quiet).parent
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["count"] == 11 == len(Latents(str(out)).train())
    assert len(manifest["skipped"]) == 1 and "b/04.png" in manifest["skipped"][0]


def test_a_missing_or_empty_caption_is_no_empty_prompt(job, folder, t5):
    (folder / "b" / "04.txt").write_text("\n")
    with pytest.raises(Damaged, match=r"b/04\.png has an empty caption"):
        precompute(job(folder, text_encoder=str(t5)), quiet)
    (folder / "b" / "04.txt").unlink()
    with pytest.raises(Damaged, match=r"b/04\.png has no caption"):
        precompute(job(folder, text_encoder=str(t5)), quiet)


def test_pictures_are_encoded_as_people_see_them(job, vae, tmp_path):
    """Upright, and on white."""
    (tmp_path / "photos").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 8
    rgba = np.concatenate([np.array(image(0)), np.array(image(1))[..., :1]], -1)
    Image.fromarray(rgba).save(tmp_path / "photos" / "0.PNG", exif=exif)
    (path,) = precompute(job(tmp_path / "photos", dtype="float32"), quiet).parent.glob("*.tar")
    alpha = rgba[..., 3:] / 255
    seen = np.round(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8).swapaxes(0, 1)[::-1]
    moments = VAE(str(vae)).moments(to_tensor(centre_crop(Image.fromarray(seen), SIZE))[None])
    stored = Tars(str(path), Tolerance("refuse")).read(0, "moments.npy")
    torch.testing.assert_close(torch.from_numpy(np.load(io.BytesIO(stored))), moments[0])


def test_a_shard_of_nothing_but_damage_is_left_out(job, tmp_path):
    samples = [{"__key__": str(i), "png": png(i) if i > 4 else b"broken", "cls": b"0"} for i in range(8)]
    write_tar(tmp_path / "a.tar", samples)
    with pytest.warns(RuntimeWarning):
        out = precompute(job(tmp_path / "a.tar", on_error="skip"), quiet).parent
    assert len(Latents(str(out)).train()) == 3 and not (out / "shard-000000.tar").exists()


def test_a_source_shard_that_is_cut_is_listed_once_and_its_whole_samples_are_used(job, shards):
    content = (shards / "0.tar").read_bytes()
    (shards / "0.tar").write_bytes(content[: len(content) // 2])
    with pytest.warns(RuntimeWarning, match=r"0\.tar is truncated"):
        out = precompute(job(shards, on_error="skip", shard_size=2), quiet).parent
    told = json.loads((out / "manifest.json").read_text())
    assert (told["count"], len(told["shards"])) == (9, 5)  # 3 of 6 are whole
    assert len(told["skipped"]) == 1 and "shards/0.tar is truncated" in told["skipped"][0]


@pytest.mark.parametrize(
    "change,name",
    [({"size": 12}, "size=16"), ({"dtype": "float32"}, "dtype=float16"), ({"flips": False}, "flips=True")],
)
def test_a_folder_begun_with_other_settings_is_refused(job, folder, change, name):
    precompute(job(folder), quiet)
    with pytest.raises(ValueError, match=f"latents was begun with {name}, this command has .*: choose another --out"):
        precompute(job(folder, **change), quiet)


def test_a_folder_begun_with_another_encoder_or_other_images_is_refused(job, folder, vae, tmp_path):
    from diffusers import AutoencoderKL

    precompute(job(folder), quiet)
    other = AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        other.encoder.conv_in.bias += 1e-3
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"was begun with vae\.sha256="):
        precompute(job(folder, vae=str(tmp_path / "other")), quiet)
    (folder / "a" / "new.png").write_bytes(png(50))
    with pytest.raises(ValueError, match=r"was begun with images\.count=12, this command has 13"):
        precompute(job(folder), quiet)


def test_a_folder_with_shards_of_unknown_origin_is_refused(job, folder, shards):
    with pytest.raises(ValueError, match="holds .tar files but no settings.json"):
        precompute(job(folder, "shards"), quiet)


def test_the_forecast_is_close_to_what_is_written(job, folder, t5):
    said = []
    out = precompute(job(folder, text_encoder=str(t5), shard_size=12), said.append).parent
    written = (out / "shard-000000.tar").stat().st_size
    told = float(said[0].split("about ")[1].split(" kB")[0]) * 1000
    assert 0.8 < told / written < 1.25, said  # a tar is padded to 10 kB, captions differ
    assert said[0].startswith("12 of 12 images at 16 px -> latents 4x8x8 float16 with flips, captions of")


def test_what_cannot_be_encoded_is_refused_in_one_sentence(job, folder, vae, t5, tmp_path):
    with pytest.raises(ValueError, match="size=15 comes back from the VAE as 14 px: choose --size 14"):
        precompute(job(folder, size=15), quiet)
    with pytest.raises(FileNotFoundError, match="gone is no folder here and no hub id"):
        precompute(job(folder, vae=str(tmp_path / "gone")), quiet)
    with pytest.raises(FileNotFoundError, match="no text encoder in .*vae"):
        precompute(job(folder, text_encoder=str(vae)), quiet)
    with pytest.raises(ValueError, match="t5.* holds no VAE of diffusers"):
        precompute(job(folder, vae=str(t5)), quiet)
    with pytest.raises(ValueError, match="pooled encoder is a T5EncoderModel, which does not pool"):
        precompute(job(folder, pooled_encoder=str(t5)), quiet)
    for wrong in ({"bucket_ratio": float("nan")}, {"workers": -1}, {"size": 10**9}, {"processes": True}):
        with pytest.raises(ValueError, match=f"Job: {next(iter(wrong))} must be "):
            Job("a", "b", "c", **wrong)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        job(folder, batch=0)


def test_weights_that_are_not_whole_are_refused(vae, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(vae, tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["encoder.conv_in.bias"]
    save_file(weights, path)
    with pytest.raises((ValueError, FileNotFoundError), match="encoder.conv_in.bias"):
        VAE(str(tmp_path / "vae"))


def test_an_identity_does_not_depend_on_the_folders_name(vae, tmp_path):
    shutil.copytree(vae, tmp_path / "moved")
    assert VAE(str(tmp_path / "moved")).sha256 == VAE(str(vae)).sha256


def test_the_command_says_what_to_type_next(folder, vae, tmp_path, capsys):
    words = f"--images {folder} --out {tmp_path}/out --vae {vae} --size {SIZE} --device cpu".split()
    assert main(words) == 0
    assert f"next: python train.py data=latents data.set.path={tmp_path}/out" in capsys.readouterr().out
    assert len(Latents(str(tmp_path / "out")).train()) == 12
    assert main([*words[:-2], "--dtype", "float32"]) == 1
    assert "error: " in (said := capsys.readouterr().err) and "dtype=float16" in said and "Traceback" not in said


def test_help_answers_at_once():
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "data.precompute", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--text-encoder" in done.stdout and "torch" not in done.stderr
    assert time.monotonic() - begin < 2  # importing torch alone takes 1.5 s; 0.1 s on an idle machine


def test_moments_of_videos_are_scaled_by_channel(tmp_path):
    mean, shape = torch.randn(2, 3, 4, 5), (2, 3, 4, 5)
    file = io.BytesIO()
    np.save(file, torch.cat((mean, torch.zeros(shape))).numpy())
    write_tar(tmp_path / "shard-000000.tar", [{"__key__": "000000000", "moments.npy": file.getvalue(), "json": b"{}"}])
    described = {"latent_shape": list(shape), "vae": {"shift": [0.5, -1.0], "scale": [2.0, 3.0]}, "flips": False}
    described |= {"text": None, "pooled": None, "num_classes": None}
    tars = Tars([str(tmp_path / "shard-000000.tar")], Tolerance("refuse"), None)
    x = LatentSplit(tars, described, False, 0, False).sample(0, 0)["x"]
    torch.testing.assert_close(x, torch.stack(((mean[0] - 0.5) * 2, (mean[1] + 1) * 3)))
