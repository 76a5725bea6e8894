"""Whatever tar files hold beside plain members: read right, or named."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from samples import caption, png, write_tar

from data.damage import Damaged, Tolerance
from data.sets.image_shards import TarImages
from data.tar_index import load_index
from data.tars import Tars, expand


def member(name: str, content: bytes = b"", **header) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in header.items():
        setattr(info, key, value)
    return info, content


def link(name: str, target: str, kind: bytes = tarfile.LNKTYPE) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=kind, linkname=target)


def pack(path: Path, *members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


def contents(path: Path, on_error: str = "refuse") -> dict[str, bytes | None]:
    """What is read, by key, and the label."""
    tars = Tars(str(path), Tolerance(on_error))
    return {tars.key(i): (tars.read(i, "png"), int(tars.labels[i])) for i in range(len(tars))}


# ---- links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_are_the_members_that_they_lead_to(tmp_path, format):
    path = pack(
        tmp_path / "a.tar",
        link("d/0.png", "../later/x.png", tarfile.SYMTYPE),
        member("d/0.cls", b"4"),
        member("d/1.png", b"one"),
        member("d/1.cls", b"1"),
        link("d/2.png", "d/1.png"),
        link("./d/2.cls", "d/1.cls"),
        link("d/3.png", "2.png", tarfile.SYMTYPE),  # a link to a link
        member("later", type=tarfile.DIRTYPE),
        member("later/x.png", b"x"),
        link("latest.d", "later", tarfile.SYMTYPE),  # a folder, whose samples have their own names
        format=format,
    )
    read = contents(path)
    assert read == {
        "d/0": (b"x", 4),
        "d/1": (b"one", 1),
        "d/2": (b"one", -1),
        "./d/2": (None, 1),  # another key, as webdataset has it
        "d/3": (b"one", -1),
        "later/x": (b"x", -1),
    }


OUTSIDE = {
    "a missing member": ("gone.png", tarfile.LNKTYPE),
    "out of the archive": ("../../etc/passwd", tarfile.SYMTYPE),
    "an absolute path": ("/etc/passwd", tarfile.SYMTYPE),
    "itself": ("1.png", tarfile.SYMTYPE),
    "each other": ("2.png", tarfile.LNKTYPE),
}


@pytest.mark.parametrize("target,kind", OUTSIDE.values(), ids=OUTSIDE)
def test_a_link_that_leads_to_no_member_is_named_and_its_sample_left_out(tmp_path, target, kind):
    path = pack(
        tmp_path / "a.tar",
        member("0.png", b"zero"),
        link("1.png", target, kind),
        member("1.cls", b"1"),
        *([link("2.png", "1.png")] if target == "2.png" else []),
    )
    with pytest.raises(Damaged, match=r"a\.tar: 1\.png is a link to .*, which is no member of this archive; repair"):
        contents(path)
    with pytest.warns(RuntimeWarning, match=r"1\.png is a link"):
        assert contents(path, "skip") == {"0": (b"zero", -1)}


# ---- more than one archive, and less ---------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [0, 512, 102_400])
def test_archives_that_were_joined_are_all_read(tmp_path, zeros):
    parts = [pack(tmp_path / f"{k}.tar", member(f"{k}.png", png(k)), member(f"{k}.cls", b"%d" % k)) for k in range(3)]
    joined = tmp_path / "joined"
    joined.write_bytes(bytes(zeros).join(part.read_bytes() for part in parts))
    assert contents(joined) == {str(k): (png(k), k) for k in range(3)}


@pytest.mark.parametrize("rest", [b"x" * 600, b"\x1f\x8b" + bytes(600), b"half a block"])
def test_what_comes_after_an_archive_and_is_none_is_named(tmp_path, rest):
    path = pack(tmp_path / "a.tar", member("0.png", b"zero"), member("1.png", b"one"))
    path.write_bytes(path.read_bytes() + rest)
    with pytest.raises(Damaged, match=r"a\.tar is truncated.*at byte 10240"):
        contents(path)
    with pytest.warns(RuntimeWarning, match="after 2 whole samples"):
        assert len(contents(path, "skip")) == 2


@pytest.mark.parametrize("kind,begin", [("gzip", gzip.compress), ("bzip2", None), ("xz", None), ("zip", None)])
def test_a_packed_archive_is_named_with_what_packs_it(tmp_path, kind, begin):
    whole = pack(tmp_path / "a.tar", member("0.png", b"zero")).read_bytes()
    magic = {"bzip2": b"BZh9", "xz": b"\xfd7zXZ\0", "zip": b"PK\3\4"}
    (tmp_path / "a.tar").write_bytes(begin(whole) if begin else magic[kind] + bytes(600))
    with pytest.raises(Damaged, match=rf"a\.tar is packed with {kind}, expected a plain tar: unpack it first"):
        contents(tmp_path / "a.tar")


def test_every_cut_of_an_archive_leaves_its_whole_samples_and_never_a_part_of_one(tmp_path):
    samples = [{"__key__": str(k), "cls": b"%d" % k, "png": b"%d" % k * 600, "txt": b"t"} for k in range(4)]
    write_tar(tmp_path / "a.tar", samples)
    content, path = (tmp_path / "a.tar").read_bytes(), tmp_path / "cut.tar"
    each = 512 + 512 + 512 + 1024 + 512 + 512  # headers and blocks of one sample
    for size in range(100, 4 * each, 256):
        path.write_bytes(content[:size])
        tars = None
        with pytest.warns(RuntimeWarning, match=r"cut\.tar.*whole samples\)"):
            try:
                tars = Tars(str(path), Tolerance("skip"))
            except ValueError as error:
                assert "every shard is damaged" in str(error)
        # the content's last block may be cut where only padding is missing; of a single sample nobody knows the parts
        whole = (size + 511) // each
        assert (len(tars) if tars else 0) == (whole if whole > 1 or size >= each + 512 else 0), size
        for i in range(len(tars) if tars else 0):
            assert tars.read(i, "png") == b"%d" % i * 600 and tars.labels[i] == i and tars.read(i, "txt") == b"t"


def test_of_a_cut_archive_whose_parts_do_not_follow_each_other_no_half_sample_is_used(tmp_path):
    path = pack(
        tmp_path / "a.tar", *(member(f"{k}.png", b"p") for k in range(3)), *(member(f"{k}.cls", b"7") for k in range(3))
    )
    os.truncate(path, 512 * 9)  # in the last header but one
    with pytest.warns(RuntimeWarning, match="after 1 whole samples"):
        assert contents(path, "skip") == {"0": (b"p", 7)}


# ---- members --------------------------------------------------------------------------------------------------------


def test_a_sparse_member_is_named(tmp_path):
    holes = tmp_path / "0.png"
    with open(holes, "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"image")
    (tmp_path / "1.png").write_bytes(b"one")
    for format in ("gnu", "pax"):
        path = tmp_path / f"{format}.tar"
        assert not os.system(f"tar -C {tmp_path} --format={format} --sparse -cf {path} 0.png 1.png")
        with pytest.raises(Damaged, match=r"tar: 0\.png is sparse, which is not read: pack it without --sparse"):
            contents(path)
        with pytest.warns(RuntimeWarning, match="0.png is sparse"):
            assert contents(path, "skip") == {"1": (b"one", -1)}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names_are_read(tmp_path, format):
    odd = ["a" * 90 + "/" + "b" * 120, "../up/0", "/etc/0", "a/../0", "./0", os.fsdecode(b"caf\xe9"), "[0]{1}*? '"]
    path = pack(
        tmp_path / "a.tar", *(member(f"{name}.png", name.encode(errors="replace")) for name in odd), format=format
    )
    assert {k: v for k, (v, _) in contents(path).items()} == {name: name.encode(errors="replace") for name in odd}
    tars = TarImages(str(path), Tolerance("refuse"))
    assert tars.tars.name(5).endswith(r"a.tar: caf\xe9")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.tar.index.npz", "a.tar"]


def test_folders_and_labels_are_no_samples_and_pipes_are_named(tmp_path):
    plain = (member("d.1", type=tarfile.DIRTYPE), member("label.x", type=b"V"), member("0.png", b"zero"))
    assert contents(pack(tmp_path / "a.tar", *plain)) == {"0": (b"zero", -1)}
    for kind in (tarfile.FIFOTYPE, tarfile.CHRTYPE, b"M"):
        path = pack(tmp_path / "b.tar", *plain, member("1.png", type=kind))
        with pytest.raises(Damaged, match=r"b\.tar: 1\.png is no file"):
            contents(path)
        with pytest.warns(RuntimeWarning, match=r"1\.png is no file"):
            assert contents(path, "skip") == {"0": (b"zero", -1)}


def test_members_of_the_same_name_are_named_and_their_sample_left_out(tmp_path):
    path = pack(tmp_path / "a.tar", member("0.png", b"old"), member("1.png", b"one"), member("0.PNG", b"new"))
    with pytest.raises(Damaged, match=r"a\.tar holds 0\.PNG twice"):
        contents(path)
    with pytest.warns(RuntimeWarning, match="twice"):
        assert contents(path, "skip") == {"1": (b"one", -1)}


@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", b"\xff" * 12])
def test_a_member_that_says_to_be_longer_than_the_file_or_shorter_than_nothing_is_named(tmp_path, size):
    path = pack(tmp_path / "a.tar", member("0.png", b"zero"), member("1.png", b"one"), member("2.png", b"two"))
    content = bytearray(path.read_bytes())
    content[1024 + 124 : 1024 + 136] = size
    content[1024 + 148 : 1024 + 156] = b"%06o\0 " % (sum(content[1024 : 1024 + 148]) + 256 + sum(content[1180:1536]))
    path.write_bytes(content)
    with pytest.raises(Damaged, match=r"a\.tar is .*corrupt.* at byte 1024"):
        contents(path)


def test_bytes_at_random_are_named_and_end(tmp_path):
    whole = pack(tmp_path / "a.tar", *(member(f"{k}.png", png(k)) for k in range(3)), format=tarfile.PAX_FORMAT)
    content, random, path = whole.read_bytes(), np.random.default_rng(0), tmp_path / "b.tar"
    for _ in range(60):
        broken = bytearray(content)
        for place in random.integers(0, 1024, 8):
            broken[place] = random.integers(256)
        path.write_bytes(broken)
        try:
            Tars(str(path), Tolerance("refuse"))
        except Damaged as error:
            assert "b.tar" in str(error)


# ---- the index ------------------------------------------------------------------------------------------------------


def test_an_index_of_an_older_shard_of_the_same_size_and_time_is_not_used(tmp_path):
    path = tmp_path / "a.tar"
    for way in ("written over", "put in place"):
        pack(path, member("0.png", b"old"), member("1.png", b"one"))
        about = path.stat()
        load_index(path)
        new = pack(
            path if way == "written over" else tmp_path / "new", member("2.png", b"two"), member("3.png", b"new")
        )
        os.utime(new, ns=(about.st_atime_ns, about.st_mtime_ns))
        os.replace(new, path)
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (about.st_size, about.st_mtime_ns)
        assert contents(path) == {"2": (b"two", -1), "3": (b"new", -1)}


def test_damage_is_told_again_from_the_kept_index(tmp_path, monkeypatch):
    path = pack(tmp_path / "a.tar", member("0.png", b"zero"), member("1.png", b"one"))
    os.truncate(path, 1600)
    load_index(path)
    monkeypatch.setattr("data.tar_index.scan", lambda path: pytest.fail("scanned again"))
    with pytest.raises(Damaged, match=r"a\.tar is truncated"):
        contents(path)


# ---- which files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["l [v2]", "a*b?", "x{0..1}y", "{", 'it\'s, = "q"', os.fsdecode(b"\xff")])
def test_what_exists_is_taken_as_it_is_named_and_only_else_as_a_pattern(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    for other in ("l v", "axb1", "x0y", "x1y"):
        (tmp_path / other).mkdir()
        pack(tmp_path / other / "0.tar", member("0.png", b"other"))
    for k in range(2):
        pack(folder / f"{k}[{k}].tar", member(f"{k}.png", b"right"))
    files = [folder / f"{k}[{k}].tar" for k in range(2)]
    assert expand(str(folder)) == files and expand(str(files[1])) == files[1:]
    assert Tars(str(files[1]), Tolerance("refuse"), cache=str(tmp_path / name / "cache")).read(0, "png") == b"right"
    if "{" not in name:
        assert expand(str(folder / "*.tar")) == files
        assert expand(f"{folder}/{{0..1}}[[]?].tar") == files
    assert expand(f"{tmp_path}/x{{0..1}}y/0.tar") == [tmp_path / "x0y/0.tar", tmp_path / "x1y/0.tar"]


def test_a_shard_that_is_named_twice_is_read_once(shards):
    (shards / "2.tar").symlink_to("0.tar")
    for named in (str(shards), [str(shards / "0.tar"), str(shards / "*.tar")]):
        with pytest.warns(RuntimeWarning, match=r"tar is named twice, .*: each shard is read once"):
            assert [p.name for p in expand(named)] == ["0.tar", "1.tar"]


def test_a_shard_is_not_both_trained_on_and_held_out(shards):
    from data.sets.image_shards import ImageShards

    with pytest.raises(ValueError, match=r"1\.tar is trained on and held out"):
        ImageShards(str(shards), 16, heldout=str(shards / "1.tar"))


def test_captions_of_linked_members_are_read(tmp_path):
    told = json.dumps({"caption": caption(3), "label": 2}).encode()
    path = pack(
        tmp_path / "a.tar",
        member("0.png", png(0)),
        member("0.json", told),
        link("1.png", "0.png"),
        link("1.json", "0.json"),
    )
    images = TarImages(str(path), Tolerance("refuse"))
    assert [(images.load(i).caption, images.load(i).label) for i in range(2)] == [(caption(3), 2)] * 2
