"""Folders and tar shards of images."""

import codecs
import io
import json
import os
import shutil
import socket
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import SIZE, caption, image, png, write_tar

from data.damage import Damaged
from data.loader import EndlessLoader
from data.pixels import centre_crop, to_tensor, to_uint8
from data.sets.image_folder import Folder, ImageFolder
from data.sets.image_shards import ImageShards
from data.tar_index import load_index
from data.tars import expand

# ---- pixels ---------------------------------------------------------------------------------------------------------


def test_the_centre_crop_halves_by_box_then_goes_bicubic_to_the_short_side():
    wide = image(0, 150, 70)  # halved twice would be under 2 * 16: 70 -> 35 -> 17
    halved = wide.resize((75, 35), Image.Resampling.BOX).resize((37, 17), Image.Resampling.BOX)
    scaled = halved.resize((35, 16), Image.Resampling.BICUBIC)  # 37 * 16 / 17 = 34.8
    assert np.array_equal(np.array(centre_crop(wide, 16)), np.array(scaled.crop((9, 0, 25, 16))))


@pytest.mark.parametrize("size", [(16, 16), (17, 300), (33, 31), (5, 9), (1000, 16)])
def test_every_shape_of_image_ends_as_the_square(size):
    assert centre_crop(image(0, *size), SIZE).size == (SIZE, SIZE)


def test_pixels_survive_the_way_there_and_back():
    pixels = np.array(image(0, 4, 4))
    x = to_tensor(Image.fromarray(pixels))
    assert x.min() >= -1 and x.max() <= 1
    assert np.array_equal(to_uint8(x[None])[0].numpy(), pixels)


# ---- folders --------------------------------------------------------------------------------------------------------


def test_subfolders_are_the_classes(folder):
    data = ImageFolder(str(folder), SIZE, flip=False, captions=True)
    assert (data.shape, data.num_classes, data.classes) == ((3, 16, 16), 3, ["a", "b", "c"])
    split = data.train()
    assert len(split) == 12 and data.heldout() is None
    sample = split.sample(0, 0)  # a/00.png
    assert torch.equal(sample["x"], to_tensor(centre_crop(image(0), SIZE)))
    assert sample["label"] == 0 and sample["label"].dtype == torch.int64
    assert sample["caption"] == caption(0)
    assert [int(split.sample(i, 0)["label"]) for i in range(12)] == [0] * 4 + [1] * 4 + [2] * 4


def test_a_flat_folder_has_captions_and_no_classes(folder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in folder.rglob("*.*"):
        shutil.copy(file, flat)
    data = ImageFolder(str(flat), SIZE, captions=True)
    assert data.num_classes is None and data.classes is None
    assert [data.train().sample(i, 0)["caption"] for i in range(12)] == [caption(i) for i in range(12)]
    assert "label" not in data.train().sample(0, 0)


def test_flips_are_a_pure_function_of_seed_and_draw(folder):
    split, plain = ImageFolder(str(folder), SIZE).train(), ImageFolder(str(folder), SIZE, flip=False).train()
    x = plain.sample(5, 0)["x"]
    flips = [torch.equal(split.sample(5, d)["x"], x.flip(-1)) for d in range(200)]
    assert flips == [torch.equal(split.sample(5, d)["x"], x.flip(-1)) for d in range(200)]
    assert all(f or torch.equal(split.sample(5, d)["x"], x) for d, f in enumerate(flips))
    assert 70 < sum(flips) < 130  # 100 expected, four standard deviations of 7
    other = ImageFolder(str(folder), SIZE, seed=1).train()
    assert flips != [torch.equal(other.sample(5, d)["x"], x.flip(-1)) for d in range(200)]


def test_a_held_out_fraction_is_disjoint_and_stays_when_files_are_added(folder):
    before = ImageFolder(str(folder), SIZE, heldout=0.3)
    held = {before._source.names[i] for i in before._held}
    assert 0 < len(held) < 12 and len(before.train()) + len(before.heldout()) == 12
    assert not held & {before._source.names[i] for i in before._indices}
    (folder / "a" / "new.png").write_bytes(png(99))
    after = ImageFolder(str(folder), SIZE, heldout=0.3)
    assert {after._source.names[i] for i in after._held} - {"a/new.png"} == held


def test_a_held_out_folder_inside_is_no_class_and_shares_the_numbering(folder):
    (folder / "heldout").mkdir()
    shutil.copytree(folder / "c", folder / "heldout" / "c")
    data = ImageFolder(str(folder), SIZE, heldout="heldout")
    assert data.classes == ["a", "b", "c"] and (len(data.train()), len(data.heldout())) == (12, 4)
    assert data.heldout().sample(0, 0)["label"] == 2
    shutil.copytree(folder / "c", folder / "heldout" / "d")
    with pytest.raises(ValueError, match="has the class d, which is not among the training classes"):
        ImageFolder(str(folder), SIZE, heldout="heldout")


def test_a_linked_folder_is_followed_once_and_a_loop_never(folder, tmp_path):
    shutil.copytree(folder / "a", tmp_path / "elsewhere" / "deep")
    (folder / "d").symlink_to(tmp_path / "elsewhere")  # data sets are put together so
    (folder / "e").symlink_to(tmp_path / "elsewhere" / "deep")  # already counted under d
    (folder / "f").symlink_to(folder / "a")
    (folder / "b" / "up").symlink_to("..")
    (folder / "b" / "self").symlink_to(".")
    (folder / "g").symlink_to(tmp_path)  # holds all images
    (folder / "gone").symlink_to("nowhere")
    (folder / "round").symlink_to("round")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (tmp_path / "elsewhere" / "above").symlink_to(tmp_path / "elsewhere")
    with pytest.warns(RuntimeWarning, match=r"photos: left out b/self, b/up, d/above and 6 more: links to") as told:
        images = Folder(folder)
    assert len(told) == 1
    real = [f"{c}/{n:02d}.png" for i, c in enumerate("abc") for n in range(i, 12, 3)]
    assert images.names == [*real, *(f"d/deep/{n:02d}.png" for n in range(0, 12, 3))]
    assert images.classes == ["a", "b", "c", "d"]


def test_two_links_to_one_folder_count_it_under_the_first_name(folder, tmp_path):
    (folder / "c").rename(tmp_path / "c")
    for name in ("y", "x"):
        (folder / name).symlink_to(tmp_path / "c")
    with pytest.warns(RuntimeWarning, match="left out y: links"):
        assert Folder(folder).classes == ["a", "b", "x"]


def test_a_linked_class_is_told_from_no_other_folder_and_nothing_is_said(folder, tmp_path):
    (folder / "c").rename(tmp_path / "c")
    (folder / "c").symlink_to(tmp_path / "c")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Folder(folder)) == 12


@pytest.mark.parametrize("way", ["relative", "link", "linked from inside", "training linked"])
def test_what_is_held_out_is_not_trained_on_however_it_is_named(folder, tmp_path, monkeypatch, way):
    for name in "abc":
        (folder / "heldout" / name).mkdir(parents=True)
        (folder / "heldout" / name / "new.png").write_bytes(png(50))
    heldout = str(folder / "heldout")
    if way == "relative":
        monkeypatch.chdir(tmp_path)
        heldout = "photos/heldout"
    elif way == "link":
        (tmp_path / "other").symlink_to(folder / "heldout")
        heldout = str(tmp_path / "other")
    elif way == "linked from inside":
        (folder / "b" / "more").symlink_to(folder / "heldout" / "b")
    else:
        (folder / "heldout" / "a" / "more").symlink_to(folder / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = ImageFolder(str(folder), SIZE, heldout=heldout)
    assert data.classes == ["a", "b", "c"] and (len(data.train()), len(data.heldout())) == (12, 3)


def test_a_held_out_folder_with_the_training_images_in_it_is_refused(folder):
    for heldout in (".", "..", str(folder)):
        with pytest.raises(ValueError, match="heldout='.*' is the folder of the training images, or holds it"):
            ImageFolder(str(folder), SIZE, heldout=heldout)


def special(kind: str, path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(os.path.relpath(path))  # at most 107 bytes
    else:
        targets = {"device": "/dev/zero", "kernel's": "/proc/kmsg", "gone": "nowhere", "own": path.name, "folder": "."}
        path.symlink_to(targets[kind])


SPECIAL = {
    "pipe": "is a pipe, expected a file",
    "socket": "is a socket, expected a file",
    "device": "is a device, expected a file",
    "kernel's": "is no stored file",
    "gone": r"is a link to nowhere, which cannot be read \(No such file",
    "own": r"is a link to .*, which cannot be read \(Too many levels",
}


@pytest.mark.parametrize("kind,message", SPECIAL.items(), ids=SPECIAL)
@pytest.mark.parametrize("ending", ["png", "txt"])
def test_what_is_no_stored_file_is_named_and_never_waited_for(folder, monkeypatch, kind, message, ending):
    monkeypatch.chdir(folder)
    (folder / "a" / f"00.{ending}").unlink()
    special(kind, folder / "a" / f"00.{ending}")
    with pytest.raises(Damaged, match=rf"a/00\.{ending} {message}"):
        ImageFolder(str(folder), SIZE, captions=True).train().sample(0, 0)
    with pytest.warns(RuntimeWarning, match=message):
        assert ImageFolder(str(folder), SIZE, captions=True, on_error="skip").train().sample(0, 0)["label"] == 0


@pytest.mark.parametrize("kind,message", [*SPECIAL.items(), ("folder", "is a folder, expected a file")])
def test_a_shard_that_is_no_stored_file_is_named_and_never_waited_for(shards, monkeypatch, kind, message):
    monkeypatch.chdir(shards)
    special(kind, shards / "2.tar")
    with pytest.raises(Damaged, match=rf"2\.tar {message}"):
        ImageShards(str(shards), SIZE)


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="no /proc here")
def test_folders_that_the_kernel_makes_up_are_not_walked(folder):
    with pytest.raises(ValueError, match="/proc/self is a folder that the kernel makes up"):
        Folder("/proc/self")
    (folder / "b" / "tasks").symlink_to("/proc/self/task")
    with pytest.warns(RuntimeWarning, match="left out b/tasks"):
        assert len(Folder(folder)) == 12


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    def refuse(path):  # as for anybody but root
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(ValueError, match=r"photos cannot be listed \(Permission denied\): correct its permissions"):
        Folder(folder)


def test_names_that_are_no_text_are_read_and_told_in_text(folder):
    strange = os.fsdecode(b"caf\xe9\n[1]")
    (folder / "c").rename(folder / strange)
    for ending in ("png", "txt"):
        (folder / strange / f"02.{ending}").rename(folder / strange / os.fsdecode(b"\xff." + ending.encode()))
    data = ImageFolder(str(folder), SIZE, heldout=0.3)  # by a hash of the names
    assert data.classes == ["a", "b", r"caf\xe9\x0a[1]"]
    assert len(data.train()) + len(data.heldout()) == 12
    assert data._source.load(11).name.endswith(r"/caf\xe9\x0a[1]/\xff.png")
    (folder / strange / "05.png").write_bytes(b"nothing")
    with pytest.raises(Damaged, match=r"caf\\xe9\\x0a\[1\]/05\.png cannot be decoded") as told:
        data._source.load(8)
    assert str(told.value).isprintable()
    (folder / strange / "08.png").unlink()
    with pytest.raises(Damaged, match=r"08\.png cannot be read") as told:
        data._source.load(9)
    assert str(told.value).isprintable()


def test_a_corrupt_image_is_named_and_refused(folder):
    (folder / "b" / "04.png").write_bytes(png(4)[:200])
    split = ImageFolder(str(folder), SIZE).train()
    with pytest.raises(Damaged, match=r"b/04\.png cannot be decoded .*on_error=skip"):
        split.sample(5, 0)


def test_a_corrupt_image_is_named_and_replaced_by_the_next_good_one(folder):
    (folder / "b" / "04.png").write_bytes(b"nothing")
    data = ImageFolder(str(folder), SIZE, flip=False, on_error="skip")
    split = data.train()
    with pytest.warns(RuntimeWarning, match=r"b/04\.png cannot be decoded \(no image\); skipped, 1 so far"):
        sample = split.sample(5, 0)
    assert torch.equal(sample["x"], split.sample(6, 0)["x"]) and sample["label"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split.sample(5, 1)  # told once
    assert len(data.tolerance.skipped) == 1


def test_nothing_but_corrupt_images_ends_with_an_error_rather_than_never(folder):
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.warns(RuntimeWarning), pytest.raises(Damaged, match="12 samples in a row are damaged"):
        ImageFolder(str(folder), SIZE, on_error="skip").train().sample(0, 0)


def test_a_refused_image_reaches_the_training_process_from_a_worker(folder):
    (folder / "b" / "04.png").write_bytes(b"nothing")
    loader = EndlessLoader(ImageFolder(str(folder), SIZE).train(), batch_size=4, total=3, workers=1)
    with pytest.raises(Damaged, match=r"b/04\.png cannot be decoded"):
        list(loader)


def test_a_folder_that_cannot_be_used_is_refused_in_one_sentence(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder of images"):
        ImageFolder(str(tmp_path / "nowhere"), SIZE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in .*empty: expected files ending in .jpg"):
        ImageFolder(str(tmp_path / "empty"), SIZE)
    with pytest.raises(ValueError, match="on_error is refuse or skip, got 'ignore'"):
        ImageFolder(str(folder), SIZE, on_error="ignore")
    with pytest.raises(ValueError, match="heldout is a path or a fraction between 0 and 1, got 2"):
        ImageFolder(str(folder), SIZE, heldout=2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ImageFolder(str(folder), 0)
    (folder / "loose.png").write_bytes(png(0))
    with pytest.raises(ValueError, match=r"both directly \(loose.png\) and in subfolders \(a\)"):
        Folder(folder)


def told(make) -> list[str]:
    """What is said while something is made."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        make()
    return [str(w.message) for w in said]


def moving(kind: str, **options) -> bytes:
    """Two frames: numbers 0 and 1."""
    file = io.BytesIO()
    image(0).save(file, kind, save_all=True, append_images=[image(1)], **options)
    return file.getvalue()


MOVING = {"gif": moving("GIF"), "png": moving("PNG"), "webp": moving("WEBP", lossless=True), "tif": moving("TIFF")}


def test_files_that_are_not_read_are_told_once(folder):
    assert told(lambda: ImageFolder(str(folder), SIZE)) == []
    for name in ("a/x.psd", "b/x.PSD", "notes", "a/99.txt", ".DS_Store", "a/._00.png", "a/Thumbs.db", "b/desktop.ini"):
        (folder / name).write_bytes(b"...")

    def read_all():
        split = ImageFolder(str(folder), SIZE).train()
        assert len([split.sample(i, 0) for i in range(len(split))]) == 12

    (said,) = told(read_all)
    assert said == f"{folder}: 4 files of kinds that are not read (no suffix, .psd, .txt), such as a/99.txt"
    (folder / "a" / "99.txt").unlink()
    (folder / "notes").unlink()
    (folder / "b" / "x.PSD").unlink()
    (said,) = told(lambda: ImageFolder(str(folder), SIZE))
    assert said == f"{folder}: 1 file of kinds that are not read (.psd), such as a/x.psd"


def test_of_animations_the_first_frame_is_taken_and_told_once(folder):
    place = folder / "a"
    for kind, content in MOVING.items():
        (place / f"00-{kind}.{kind}").write_bytes(content)
    made = []
    (said,) = told(lambda: made.append(ImageFolder(str(folder), SIZE, flip=False)))
    assert said.startswith(f"{folder}: 4 animated files: their first frame is taken, such as that of a/00-gif.gif")
    first = to_tensor(centre_crop(image(0), SIZE))
    for name in ("a/00-png.png", "a/00-webp.webp", "a/00-tif.tif"):
        assert torch.equal(made[0].train().sample(made[0]._source.names.index(name), 0)["x"], first)
    for kind in ("gif", "webp", "tif"):
        (place / f"00-{kind}.{kind}").unlink()
    (said,) = told(lambda: ImageFolder(str(folder), SIZE))
    assert said.startswith(f"{folder}: 1 animated file: its first frame is taken")


def test_a_jpeg_with_a_second_view_is_one_picture(folder):
    (folder / "a" / "view.jpg").write_bytes(moving("MPO"))
    assert Image.open(folder / "a" / "view.jpg").n_frames == 2
    assert told(lambda: ImageFolder(str(folder), SIZE)) == []


def test_of_very_many_files_some_are_opened_to_see_whether_they_move(folder, monkeypatch):
    monkeypatch.setattr("data.pixels.LOOKED_AT", 4)  # every third of 12
    (folder / "a" / "00.png").write_bytes(MOVING["png"])
    (said,) = told(lambda: ImageFolder(str(folder), SIZE))
    assert "at least 1 animated file: its first frame is taken, such as that of a/00.png" in said


def test_suffixes_may_be_written_in_any_case(folder):
    (folder / "a" / "00.png").rename(folder / "a" / "00.PNG")
    (folder / "a" / "00.txt").rename(folder / "a" / "00.TXT")
    (folder / "b" / "04.png").rename(folder / "b" / "04.Png")
    assert told(lambda: ImageFolder(str(folder), SIZE)) == []
    split = ImageFolder(str(folder), SIZE, captions=True).train()
    assert (
        len(split) == 12 and split.sample(0, 0)["caption"] == caption(0) and split.sample(5, 0)["caption"] == caption(4)
    )
    (folder / "a" / "00.txt").write_text("another")
    with pytest.raises(Damaged, match="a/00.PNG has several captions: keep one of a/00.TXT and a/00.txt"):
        ImageFolder(str(folder), SIZE, captions=True).train().sample(0, 0)


def test_images_that_share_a_name_share_the_caption_and_are_told(folder):
    image(50).save(folder / "a" / "00.bmp")
    made = []
    (said,) = told(lambda: made.append(ImageFolder(str(folder), SIZE, captions=True)))
    assert said.startswith(f"{folder}: 2 images share their name but for the suffix, such as a/00.bmp and a/00.png: ")
    assert [made[0].train().sample(i, 0)["caption"] for i in (0, 1)] == [caption(0)] * 2


BAD_CAPTIONS = {
    "latin-1": (lambda f: f.write_bytes("Köter".encode("latin-1")), r"04\.txt is no UTF-8 text: byte 1 is 0xf6"),
    "NUL": (lambda f: f.write_bytes(b"a\0b"), r"04\.txt has a NUL at byte 1"),
    "a folder": (lambda f: (f.unlink(), f.mkdir()), r"04\.txt is a folder, expected a file"),
    "empty": (lambda f: f.write_bytes(codecs.BOM_UTF8 + b" \n"), r"04\.png has an empty caption"),
    "none": (lambda f: f.unlink(), r"04\.png has no caption"),
}


@pytest.mark.parametrize(("damage", "said"), BAD_CAPTIONS.values(), ids=BAD_CAPTIONS)
def test_a_caption_that_cannot_be_read_is_named_and_refused_or_skipped(folder, damage, said):
    damage(folder / "b" / "04.txt")
    with pytest.raises(Damaged, match=f"{said}.*on_error=skip"):
        ImageFolder(str(folder), SIZE, captions=True).train().sample(5, 0)
    split = ImageFolder(str(folder), SIZE, captions=True, on_error="skip").train()
    with pytest.warns(RuntimeWarning, match=f"{said}.*skipped, 1 so far"):
        assert split.sample(5, 0)["caption"] == split.sample(6, 0)["caption"] == caption(7)
    ImageFolder(str(folder), SIZE).train().sample(5, 0)  # nobody asks for it


def test_captions_have_no_mark_and_the_same_line_ends_in_folders_and_tars(folder, tmp_path):
    content = codecs.BOM_UTF8 + b"  a red\r\nsquare\ron \n"
    (folder / "a" / "00.txt").write_bytes(content)
    write_tar(tmp_path / "a.tar", [{"__key__": "0", "PNG": png(0), "TXT": content}])
    for data in (
        ImageFolder(str(folder), SIZE, captions=True),
        ImageShards(str(tmp_path / "a.tar"), SIZE, captions=True),
    ):
        assert data.train().sample(0, 0)["caption"] == "a red\nsquare\non"


# ---- tar shards -----------------------------------------------------------------------------------------------------


def test_shards_give_the_same_samples_as_their_files(shards):
    data = ImageShards(str(shards), SIZE, flip=False, captions=True)
    assert (data.shape, data.num_classes, len(data.train())) == ((3, 16, 16), 3, 12)
    for i in (0, 7, 11):
        sample = data.train().sample(i, 0)
        assert torch.equal(sample["x"], to_tensor(centre_crop(image(i), SIZE)))
        assert sample["label"] == i % 3 and sample["caption"] == caption(i)


def test_workers_read_shards_as_one_process_does(shards):
    def batches(workers):
        return list(EndlessLoader(ImageShards(str(shards), SIZE).train(), batch_size=4, total=5, workers=workers))

    for a, b in zip(batches(0), batches(2), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in ("x", "label", "draw"))


def test_a_label_may_come_from_json(tmp_path):
    samples = [{"__key__": str(i), "png": png(i), "json": json.dumps({"label": i}).encode()} for i in range(4)]
    write_tar(tmp_path / "a.tar", samples)
    data = ImageShards(str(tmp_path / "a.tar"), SIZE)
    assert data.num_classes == 4 and data.train().sample(2, 0)["label"] == 2
    assert ImageShards(str(tmp_path / "a.tar"), SIZE, num_classes=10).num_classes == 10
    with pytest.raises(ValueError, match="num_classes=3, but the labels in .* go up to 3"):
        ImageShards(str(tmp_path / "a.tar"), SIZE, num_classes=3)


@pytest.mark.parametrize("pattern", ["{}", "{}/*.tar", "{}/{{0..1}}.tar"])
def test_shards_are_named_by_folder_glob_or_braces(shards, pattern):
    assert [p.name for p in expand(pattern.format(shards))] == ["0.tar", "1.tar"]
    assert [p.name for p in expand([str(shards / "1.tar"), str(shards / "0.tar")])] == ["1.tar", "0.tar"]


def test_a_missing_shard_is_named(shards, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no shard .*2\.tar"):
        expand(f"{shards}/{{0..2}}.tar")
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \.tar files in .*none"):
        expand(str(tmp_path / "none"))


def truncate(path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def corrupt(path) -> None:
    """Break the header of a member in the middle."""
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[9].offset
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 300)


def header_cut(path) -> None:
    """Cut exactly between two members: nothing but the end mark is missing."""
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[9].offset
    os.truncate(path, offset)


def middle_cut(path) -> None:
    """Cut in the content of the fourth sample's image."""
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[9].offset_data
    os.truncate(path, offset + 100)


# with how many of the six samples are whole
DAMAGE = {
    "cut in a member": (middle_cut, 3),
    "cut between members": (header_cut, 3),
    "corrupt header": (corrupt, 3),
    "empty file": (lambda path: path.write_bytes(b""), 0),
    "no tar": (lambda path: path.write_bytes(b"this is text" * 1000), 0),
    "no samples": (lambda path: write_tar(path, []), 0),
    "same member twice": (lambda path: write_tar(path, [{"__key__": "a", "png": b"1"}] * 2), 0),
    "label no number": (lambda path: write_tar(path, [{"__key__": "a", "png": b"1", "cls": b"cat"}]), 0),
    "label beyond int64": (lambda path: write_tar(path, [{"__key__": "a", "png": b"1", "cls": b"9" * 30}]), 0),
    **{
        f"json of {label[:9]}": (
            lambda path, label=label: write_tar(
                path, [{"__key__": "a", "png": b"1", "json": f'{{"label": {label}}}'.encode()}]
            ),
            0,
        )
        for label in ("2.7", "true", "-1", "NaN", "1e400", "9" * 30, "9" * 5000, '"3"', "[" * 100_000)
    },
}


@pytest.mark.parametrize("damage,_", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_shard_is_named_and_refused(shards, damage, _):
    ImageShards(str(shards), SIZE)  # an index of the whole shard exists, and must not hide the damage
    damage(shards / "1.tar")
    with pytest.raises(Damaged, match=r"1\.tar.*on_error=skip"):
        ImageShards(str(shards), SIZE)


@pytest.mark.parametrize("damage,whole", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_shard_is_named_and_only_its_whole_samples_are_used(shards, damage, whole):
    damage(shards / "1.tar")
    with pytest.warns(RuntimeWarning, match=r"1\.tar.*skipped, 1 so far"):
        data = ImageShards(str(shards), SIZE, on_error="skip", captions=True)
    assert len(data.train()) == 6 + whole
    for i in range(6 + whole):
        sample = data.train().sample(i, 0)
        assert sample["label"] == i % 3 and sample["caption"] == caption(i)


def test_shards_without_any_sample_are_an_error_even_when_skipping(shards):
    for path in shards.glob("*.tar"):
        write_tar(path, [])
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="no samples in .*shards"):
        ImageShards(str(shards), SIZE, on_error="skip")


def test_shards_without_images_say_what_they_hold(tmp_path):
    write_tar(tmp_path / "a.tar", [{"__key__": "a", "mp4": b"1", "txt": b"film"}])
    with pytest.raises(ValueError, match="no images in .*expected members ending in jpg.*found only mp4, txt"):
        ImageShards(str(tmp_path / "a.tar"), SIZE)


def test_a_shard_that_is_cut_while_training_is_named(shards):
    split = ImageShards(str(shards), SIZE).train()
    split.sample(0, 0)
    os.truncate(shards / "0.tar", 3000)
    with pytest.raises(Damaged, match=r"0\.tar: 0004\.png ends after 0 of \d+ bytes"):
        split.sample(4, 0)


def test_an_image_that_is_corrupt_inside_a_shard_is_replaced_by_the_next(tmp_path):
    samples = [{"__key__": str(i), "png": png(i) if i != 1 else b"broken", "cls": str(i).encode()} for i in range(3)]
    write_tar(tmp_path / "a.tar", samples)
    with pytest.raises(Damaged, match=r"a\.tar: 1 cannot be decoded"):
        ImageShards(str(tmp_path), SIZE).train().sample(1, 0)
    with pytest.warns(RuntimeWarning, match=r"a\.tar: 1 cannot be decoded .* skipped"):
        assert ImageShards(str(tmp_path), SIZE, on_error="skip").train().sample(1, 0)["label"] == 2


def test_the_index_is_kept_until_the_shard_changes(shards, monkeypatch):
    first = load_index(shards / "0.tar")
    monkeypatch.setattr("data.tar_index.scan", lambda path: pytest.fail("scanned again"))
    again = load_index(shards / "0.tar")
    assert all(np.array_equal(first[k], again[k]) for k in first)
    monkeypatch.undo()
    write_tar(shards / "0.tar", [{"__key__": "new", "png": png(0)}])
    assert load_index(shards / "0.tar")["key"].tolist() == [b"new"]


def test_a_damaged_index_is_made_anew(shards):
    first = load_index(shards / "0.tar")
    (kept,) = shards.glob(".0.tar.index.npz")
    kept.write_bytes(kept.read_bytes()[:100])
    assert np.array_equal(load_index(shards / "0.tar")["offset"], first["offset"])


def test_the_index_may_be_kept_elsewhere(shards, tmp_path):
    ImageShards(str(shards), SIZE, cache=str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert not list(shards.glob(".*"))


def test_an_index_that_cannot_be_kept_is_told_and_training_goes_on(shards, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(RuntimeWarning, match="cannot be kept .*give a folder with cache="):
        assert len(ImageShards(str(shards), SIZE, cache=str(tmp_path / "file")).train()) == 12


def test_held_out_shards_are_read_apart(shards):
    data = ImageShards(str(shards / "0.tar"), SIZE, heldout=str(shards / "1.tar"))
    assert (len(data.train()), len(data.heldout())) == (6, 6)
    assert torch.equal(data.heldout().sample(0, 7)["x"], to_tensor(centre_crop(image(6), SIZE)))


def test_labels_are_whole_numbers_in_cls_and_in_json(tmp_path):
    held = [{"cls": b"2\r\n"}, {"json": b'{"label": 2.0}'}, {"json": codecs.BOM_UTF8 + b'{"label": 2}'}]
    write_tar(tmp_path / "a.tar", [{"__key__": str(i), "png": png(i), **label} for i, label in enumerate(held)])
    split = ImageShards(str(tmp_path / "a.tar"), SIZE).train()
    assert [int(split.sample(i, 0)["label"]) for i in range(3)] == [2, 2, 2]


@pytest.mark.parametrize(("member", "label"), [("cls", "-1"), ("cls", "2.7"), ("json", "2.7"), ("json", "true")])
def test_what_is_no_label_is_refused_with_its_sample_and_value(tmp_path, member, label):
    content = label if member == "cls" else f'{{"label": {label}}}'
    write_tar(tmp_path / "a.tar", [{"__key__": "ok/0", "png": png(0), member: content.encode()}])
    value = repr(label) if member == "cls" else label.title() if label == "true" else label
    with pytest.raises(Damaged, match=rf"a\.tar: ok/0\.{member} holds the label {value}, expected .*on_error=skip"):
        ImageShards(str(tmp_path / "a.tar"), SIZE)


def test_labels_of_an_index_from_before_are_read_anew(tmp_path):
    write_tar(tmp_path / "a.tar", [{"__key__": "0", "png": png(0), "cls": b"1"}])
    load_index(tmp_path / "a.tar")
    (kept,) = tmp_path.glob(".a.tar.index.npz")
    with np.load(kept) as stored:
        arrays = dict(stored)
    arrays["stamp"][0], arrays["label"][0] = 1, 7
    np.savez(kept, **arrays)
    assert load_index(tmp_path / "a.tar")["label"].tolist() == [1]


def test_labels_beyond_the_classes_are_refused_or_left_out_by_name(tmp_path):
    samples = [{"__key__": f"k{i}", "png": png(i), "cls": str(i).encode()} for i in range(5)]
    write_tar(tmp_path / "a.tar", samples)
    said = r"num_classes=3, but the labels in .*a\.tar go up to 4: 2 are too large, such as 3 of .*a\.tar: k3; correct"
    with pytest.raises(Damaged, match=said):
        ImageShards(str(tmp_path / "a.tar"), SIZE, num_classes=3)
    with pytest.warns(RuntimeWarning, match=f"{said}.*skipped, 1 so far"):
        data = ImageShards(str(tmp_path / "a.tar"), SIZE, num_classes=3, on_error="skip")
    assert len(data.train()) == 3 and data.num_classes == 3
    with pytest.raises(ValueError, match="no sample in .* has an image and a label below num_classes=0"):
        told(lambda: ImageShards(str(tmp_path / "a.tar"), SIZE, num_classes=0, on_error="skip"))


def test_samples_without_the_label_that_others_have_are_refused_or_left_out(tmp_path):
    samples = [{"__key__": f"k{i}", "png": png(i), **({} if i == 1 else {"cls": b"0"})} for i in range(3)]
    write_tar(tmp_path / "a.tar", samples)
    said = r"some samples have a label and others none, 1 of them, such as .*a\.tar: k1: label all or none"
    with pytest.raises(Damaged, match=said):
        ImageShards(str(tmp_path / "a.tar"), SIZE)
    with pytest.warns(RuntimeWarning, match=said):
        assert len(ImageShards(str(tmp_path / "a.tar"), SIZE, on_error="skip").train()) == 2


def test_members_that_are_not_read_and_animations_are_told_once(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [
            {"__key__": "0", "gif": MOVING["gif"], "psd": b"1", "caption.txt": b"1"},
            {"__key__": "1", "jpg": png(1), "png": png(2), "psd": b"1"},
            {"__key__": "2", "png": MOVING["png"]},
        ],
    )
    place, data = str(tmp_path / "a.tar"), []
    kinds, several, animated = told(lambda: data.append(ImageShards(place, SIZE, flip=False)))
    assert kinds == f"{place}: 3 files of kinds that are not read (.caption.txt, .psd), such as {place}: 0.caption.txt"
    assert several.startswith(f"{place}: 1 samples hold several images, such as {place}: 1: read is the first of jpg, ")
    assert animated.startswith(f"{place}: 2 animated files: their first frame is taken, such as that of {place}: 0")
    for index, number in ((1, 1), (2, 0)):
        assert torch.equal(data[0].train().sample(index, 0)["x"], to_tensor(centre_crop(image(number), SIZE)))


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"txt": "Köter".encode("latin-1")}, r"a\.tar: 1\.txt is no UTF-8 text: byte 1 is 0xf6"),
        ({"txt": b""}, r"a\.tar: 1 has an empty caption"),
        ({"json": b"{}"}, r"a\.tar: 1 has no caption"),
        ({"json": b'{"caption": 3}'}, r'a\.tar: 1\.json: "caption" is 3, expected words'),
        ({"json": b'{"caption": "\\ud83d"}'}, r'a\.tar: 1\.json: "caption" has U\+D83D at character 0'),
    ],
)
def test_a_caption_in_a_shard_that_cannot_be_read_is_named_and_refused_or_skipped(tmp_path, members, said):
    good = {"png": png(0), "txt": b"good"}
    write_tar(tmp_path / "a.tar", [{"__key__": "0", **good}, {"__key__": "1", "png": png(1), **members}])
    with pytest.raises(Damaged, match=f"{said}.*on_error=skip"):
        ImageShards(str(tmp_path), SIZE, captions=True).train().sample(1, 0)
    with pytest.warns(RuntimeWarning, match=f"{said}.*skipped, 1 so far"):
        assert (
            ImageShards(str(tmp_path), SIZE, captions=True, on_error="skip").train().sample(1, 0)["caption"] == "good"
        )


def test_pictures_in_shards_are_upright_on_white_and_span_16_bits_as_in_folders(tmp_path):
    exif, files = Image.Exif(), []
    exif[0x0112] = 6
    deep = np.random.default_rng(0).integers(0, 65536, (18, 20), dtype=np.uint16)
    for picture, options in (
        (image(0), {"exif": exif}),
        (Image.merge("RGBA", (*image(1).split(), image(2).getchannel(0))), {}),
        (Image.fromarray(deep), {}),
    ):
        files.append(io.BytesIO())
        picture.save(files[-1], "png", **options)
    (tmp_path / "photos").mkdir()
    for i, file in enumerate(files):
        (tmp_path / "photos" / f"{i}.png").write_bytes(file.getvalue())
    write_tar(tmp_path / "a.tar", [{"__key__": str(i), "png": f.getvalue()} for i, f in enumerate(files)])
    shards = ImageShards(str(tmp_path / "a.tar"), SIZE, flip=False).train()
    photos = ImageFolder(str(tmp_path / "photos"), SIZE, flip=False).train()
    upright = Image.fromarray(np.array(image(0)).swapaxes(0, 1)[:, ::-1])
    grey = Image.fromarray(np.round(deep / 257).astype(np.uint8)).convert("RGB")
    rgb, alpha = np.array(image(1)).astype(float), np.array(image(2))[..., :1] / 255
    white = Image.fromarray(np.round(rgb * alpha + 255 * (1 - alpha)).astype(np.uint8))
    for i, expected in enumerate((upright, white, grey)):
        for split in (shards, photos):
            assert torch.equal(split.sample(i, 0)["x"], to_tensor(centre_crop(expected, SIZE)))
