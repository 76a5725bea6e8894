import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from data.names import legible, matching, setting, typed

NAMES = [
    "plain",
    "l [v2]",
    "it's",
    'a "b"',
    "a=b,c",
    "{x}",
    "*?",
    "${x}",
    "\\${x}",
    "null",
    "1e3",
    "tail\\",
    "a #b",
    " a ",
]
NAMES += [os.fsdecode(b"caf\xe9"), "caf\u00e9", "a\nb"]


@pytest.mark.parametrize("name", NAMES)
def test_a_shell_reads_what_was_typed(name):
    said = subprocess.run(["bash", "-c", f"printf %s {typed(name)}"], capture_output=True).stdout
    assert said == os.fsencode(name)
    assert typed(name).isprintable()


@pytest.mark.parametrize("name", NAMES)
def test_hydra_reads_a_setting_as_its_text(name, tmp_path):
    (tmp_path / "c.yaml").write_text("path: x\n")
    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
        assert compose("c", [setting("path", name)]).path == name


def test_what_needs_no_quotes_has_none():
    assert (
        typed("python", setting("data.set.path", "latents/imagenet256")) == "python data.set.path=latents/imagenet256"
    )


@pytest.mark.parametrize("name", NAMES)
def test_what_is_legible_is_utf_8_on_one_line(name):
    assert legible(name).encode() and legible(name).isprintable()
    assert legible(name) == name or not name.isprintable()


def test_a_pattern_is_one_only_where_no_such_file_is(tmp_path):
    for name in ("a [1]", "a 1", "a [1]/x", "a [1]/y", "a 1/x"):
        (tmp_path / name).mkdir()
    assert matching(tmp_path / "a [1]") == [str(tmp_path / "a [1]")]
    assert matching(tmp_path / "a [1]/*") == [str(tmp_path / "a [1]" / name) for name in "xy"]
    assert matching(tmp_path / "a [1]*") == [str(tmp_path / "a 1")]
    assert matching(tmp_path / "b*") == []


# ---- commands -------------------------------------------------------------------------------------------------------


def printed(said: str) -> list[str]:
    return shlex.split(next(line for line in said.splitlines() if line.startswith("next")).partition("python ")[2])


@pytest.mark.parametrize("name", ["l [v2]", "it's {1},=*?", os.fsdecode(b"caf\xe9")])
def test_latents_of_any_name_are_made_read_and_named_in_a_command_that_finds_them(folder, vae, tmp_path, capsys, name):
    from data.precompute import main
    from data.sets.latents import Latents
    from recipes.config.sources import register

    out = str(tmp_path / name)
    images = folder.rename(tmp_path / f"photos {name}")
    for ending in ("png", "txt"):
        (images / "a" / f"00.{ending}").rename(images / "a" / f"{name}.{ending}")
    words = ["--images", str(images), "--out", out, "--vae", str(vae), "--size", "16", "--device", "cpu"]
    assert main(words) == 0 and main(words) == 0
    said = capsys.readouterr().out
    for file in Path(out).rglob("*.json"):
        assert json.dumps(json.loads(file.read_bytes()), ensure_ascii=True)
    assert len(Latents(out).train()) == 12
    assert name in Latents(out).train().tars.json(0).get("name", "") or not name.isprintable()
    assert Latents(out).train().tars.json(3)["name"].encode()
    register()
    if name.isprintable():
        script, *rest = printed(said)
        assert script == "train.py" and rest[0] == "data=latents"
        with initialize_config_dir(version_base="1.3", config_dir=str(Path(__file__).parents[2] / "configs")):
            assert compose("train", rest).data.set.path == out


def test_names_that_are_no_text_are_printed_in_any_terminal(folder, vae, tmp_path):
    code = "from edit.inputs.command import print_any_name; print_any_name(); print('caf\\udce9')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=os.environ | {"PYTHONIOENCODING": "utf-8"}
    )
    assert done.stdout == b"caf\\udce9\n", done.stderr


# ---- where it is written --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["photos", "photos/a", "photos/made/deep", "linked/made", "photos/../photos"])
def test_latents_are_not_written_into_their_images(job, folder, out):
    from data.making.precomputer import precompute

    (folder.parent / "linked").symlink_to(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match="is where .*photos is read from: choose another --out"):
        precompute(job(folder, out, vae="nowhere"), lambda _: None)
    assert sorted(folder.rglob("*")) == before


def test_latents_are_not_written_among_the_shards_that_a_pattern_names(job, shards):
    from data.making.precomputer import precompute

    for images in (shards, f"{shards}/*.tar", shards / "0.tar"):
        with pytest.raises(ValueError, match="is where .* is read from: choose another --out"):
            precompute(job(images, "shards"), lambda _: None)


@pytest.mark.parametrize("out", ["file", "file/below", "pipe", "gone"])
def test_latents_are_written_into_a_folder_only(job, folder, tmp_path, out):
    from data.making.precomputer import precompute

    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to("file")
    with pytest.raises(ValueError, match="cannot be written: .* is no folder; correct --out"):
        precompute(job(folder, out, vae="nowhere"), lambda _: None)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("ratio", [1e300, float("inf"), float("nan"), 0, -2.0, 0.99])
@pytest.mark.parametrize("step", [None, 4])
def test_a_ratio_that_no_picture_has_is_refused(job, folder, ratio, step):
    with pytest.raises(ValueError, match="bucket_ratio must be (a finite number|at least 1|at most 100), got"):
        job(folder, bucket_ratio=ratio, bucket_step=step)


def test_images_are_a_folder_or_shards_and_not_both(job, folder, shards, tmp_path):
    from data.making.latent_writer import open_images

    with pytest.raises(FileNotFoundError, match=r"00\.png is no folder of images, no \.tar file and no pattern"):
        open_images(job(folder / "a" / "00.png"))
    (shards / "loose.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"shards holds \.tar files and images, such as loose\.png"):
        open_images(job(shards))
    for name in ("images", "vae"):
        with pytest.raises(ValueError, match=f"{name} is empty"):
            job(**{"images": folder, name: ""})


def test_an_empty_folder_to_write_is_refused_before_any_work(folder, vae, capsys):
    from data.generate import main as generate
    from data.making.request import Request
    from data.precompute import main

    assert main(["--images", str(folder), "--out", "", "--vae", str(vae)]) == 1
    assert generate(["teacher=nowhere", "prompts=nowhere", "out="]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == "error: out is empty: give a folder" and errors[1].startswith("error: out is missing: out=<")
    with pytest.raises(ValueError, match="out is empty: give folder to write"):
        Request(teacher="a", prompts="b", out="")
    for name in ("guidance", "shift"):
        with pytest.raises(ValueError, match=f"{name} must be a finite number.*, got nan"):
            Request(teacher="a", prompts="b", out="c", **{name: float("nan")})
