"""Encoded images become the pixels that people see, or are refused; crops."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from samples import image

from data.damage import Damaged
from data.making.buckets import cover_crop
from data.pixels import THIN, centre_crop, decode_image

SHAPE = Image.fromarray(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 14)  # 3 wide, 2 high, all different


def stored(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def pixels(content: bytes) -> np.ndarray:
    picture = decode_image(content, "x")
    assert picture.mode == "RGB"
    return np.array(picture)


def png(rows: list[bytes], width: int, depth: int, kind: int, clear: bytes) -> bytes:
    """PIL writes no such PNG: `rows` of samples of `depth` bits, and a tRNS chunk."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"tRNS", clear) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def tiff(
    body: bytes, width: int, bits: int, photometric: int = 1, kind: int = 1, samples: int = 1, associated: bool = False
) -> bytes:
    """One row of pixels, of such kinds as PIL does not write."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric)]
    tags += [(273, 8), (277, samples), (278, 1), (279, len(body))]
    tags += [(338, 1)] if associated else []
    tags += [(339, kind)]
    body += b"\0" * (len(body) % 2)
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(tags)) + entries + bytes(4)


# ---- upright --------------------------------------------------------------------------------------------------------


def upright(stored_pixels: np.ndarray, orientation: int) -> np.ndarray:
    """By the words of the EXIF standard: where row 0 and column 0 of what is stored are in the scene."""
    scenes = {
        1: lambda a: a,  # top, left
        2: lambda a: a[:, ::-1],  # top, right
        3: lambda a: a[::-1, ::-1],  # bottom, right
        4: lambda a: a[::-1],  # bottom, left
        5: lambda a: a.swapaxes(0, 1),  # left, top
        6: lambda a: a.swapaxes(0, 1)[:, ::-1],  # right, top
        7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
        8: lambda a: a.swapaxes(0, 1)[::-1],  # left, bottom
    }
    return scenes[orientation](stored_pixels)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_as_exif_says(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = stored(SHAPE, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    plain = stored(SHAPE, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(pixels(content), upright(pixels(plain), orientation))


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_broken_exif_turns_nothing(exif):
    assert np.array_equal(pixels(stored(SHAPE, "PNG", exif=exif)), np.array(SHAPE))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none_turns_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(stored(SHAPE, "PNG", exif=exif)), np.array(SHAPE))


# ---- more than 8 bits -----------------------------------------------------------------------------------------------

DEEP = np.array([[0, 128, 129, 257, 32768, 65278, 65535]], dtype=np.uint16)
EIGHT = [0, 0, 1, 1, 128, 254, 255]  # round(value / 257)


@pytest.mark.parametrize(
    "content",
    [
        stored(Image.fromarray(DEEP), "PNG"),
        stored(Image.fromarray(DEEP), "TIFF"),
        stored(Image.fromarray(DEEP), "TIFF", compression="tiff_deflate"),
        stored(Image.fromarray(DEEP.astype(">u2")), "TIFF"),
        stored(Image.fromarray(DEEP.astype(np.int32)), "TIFF"),  # 32 bits, but no number beyond 16
    ],
    ids=["png", "tiff", "compressed tiff", "big-endian tiff", "32-bit tiff"],
)
def test_16_bit_grey_spans_black_to_white(content):
    assert pixels(content)[0].tolist() == [[v] * 3 for v in EIGHT]


def test_a_tiff_says_how_many_bits_there_are_and_what_0_means():
    assert pixels(tiff(bytes([0x00, 0x0F, 0xFF]), 2, bits=12))[0, :, 0].tolist() == [0, 255]
    assert pixels(tiff(DEEP.tobytes(), 7, bits=16, photometric=0))[0, :, 0].tolist() == [255 - v for v in EIGHT]
    assert pixels(tiff(bytes([0, 255]), 2, bits=8, photometric=0))[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (stored(Image.fromarray(np.ones((2, 2), dtype=np.float32)), "TIFF"), "mode F, fractions"),
        (stored(Image.fromarray(np.full((2, 2), 65536, dtype=np.int32)), "TIFF"), "mode I from 65536 to 65536"),
        (stored(Image.fromarray(np.full((2, 2), -1, dtype=np.int32)), "TIFF"), "mode I from -1 to -1"),
        (tiff(DEEP[:, :4].tobytes(), 4, bits=16, kind=2), "mode I, signed 16-bit numbers"),
    ],
    ids=["fractions", "32 bits", "negative", "signed"],
)
def test_greys_of_an_unknown_range_are_refused_by_their_mode(content, said):
    with pytest.raises(Damaged, match=f"^photo.tif cannot be decoded .*{said}.*save it with 8 bits"):
        decode_image(content, "photo.tif")


def test_16_bit_colours_keep_their_upper_byte():
    row = struct.pack(">6H", 0, 0x1234, 0xFFFF, 0x80FF, 0x0100, 0x00FF)
    assert pixels(png([row], 2, 16, 2, struct.pack(">3H", 1, 1, 1)))[0].tolist() == [[0, 0x12, 255], [0x80, 1, 0]]


# ---- transparency ---------------------------------------------------------------------------------------------------


def test_what_is_transparent_lies_on_white():
    """For every grey and every alpha: c a + 255 (1 - a), to the nearest whole number."""
    c, a = np.meshgrid(np.arange(256), np.arange(256))
    expected = np.floor((c * a + 255 * (255 - a)) / 255 + 0.5).astype(np.uint8)
    la = np.stack([c, a], -1).astype(np.uint8)
    assert np.array_equal(pixels(stored(Image.fromarray(la), "PNG"))[..., 0], expected)
    rgba = np.stack([c, 255 - c, c, a], -1).astype(np.uint8)
    for content in (
        stored(Image.fromarray(rgba), "PNG"),
        stored(Image.fromarray(rgba), "TIFF"),
        stored(Image.fromarray(rgba), "WEBP", lossless=True, exact=True),
    ):
        seen = pixels(content)
        assert np.array_equal(seen[..., 0], expected) and np.array_equal(seen[..., 1], expected[:, ::-1])
    half = stored(Image.new("RGBA", (1, 1), (200, 0, 0, 128)), "PNG")
    assert decode_image(half, "x").getpixel((0, 0)) == (227, 127, 127)


def test_premultiplied_colours_are_not_multiplied_again():
    content = tiff(bytes([100, 0, 50, 128]), 1, bits=8, photometric=2, samples=4, associated=True)
    # 100 is 200 at half alpha; what is below adds 255 * 127 / 255
    assert np.abs(pixels(content)[0, 0].astype(int) - [227, 127, 177]).max() <= 1


def palette(mode: str = "RGB") -> Image.Image:
    picture = Image.new("P", (3, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90] + ([] if mode == "RGB" else [0] * 9))
    picture.putdata([0, 1, 2])
    return picture


PA = Image.new("PA", (1, 1))
PA.putpalette([200, 0, 0])
PA.putpixel((0, 0), (0, 128))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (stored(palette(), "PNG"), [[10, 20, 30], [40, 50, 60], [70, 80, 90]]),
        (stored(palette(), "PNG", transparency=1), [[10, 20, 30], [255, 255, 255], [70, 80, 90]]),
        (stored(palette(), "GIF", transparency=1), [[10, 20, 30], [255, 255, 255], [70, 80, 90]]),
        (stored(palette(), "PNG", transparency=bytes([255, 0, 128])), [[10, 20, 30], [255] * 3, [162, 167, 172]]),
        (stored(PA, "TIFF"), [[227, 127, 127]]),
        (stored(SHAPE.crop((0, 0, 2, 1)), "PNG", transparency=(0, 14, 28)), [[255] * 3, [42, 56, 70]]),
        (stored(SHAPE.crop((0, 0, 2, 1)), "PNG", transparency=(0, 14, 29)), [[0, 14, 28], [42, 56, 70]]),
        (stored(Image.frombytes("L", (2, 1), bytes([7, 8])), "PNG", transparency=7), [[255] * 3, [8] * 3]),
        (stored(Image.frombytes("1", (2, 1), b"\x40"), "PNG", transparency=0), [[255] * 3, [255] * 3]),
        (stored(Image.fromarray(DEEP[:, :2]), "PNG", transparency=128), [[0] * 3, [255] * 3]),
        (png([bytes([0x1F])], 2, 4, 0, struct.pack(">H", 1)), [[255] * 3, [255] * 3]),
        (png([bytes([0x1F])], 2, 4, 0, struct.pack(">H", 15)), [[17] * 3, [255] * 3]),
        (png([bytes([0x1B])], 4, 2, 0, struct.pack(">H", 2)), [[0] * 3, [85] * 3, [255] * 3, [255] * 3]),
        (png([bytes([0x12, 0x34] * 3 + [0] * 6)], 2, 16, 2, bytes([0x12, 0x34] * 3)), [[255] * 3, [0] * 3]),
    ],
    ids=(
        "P,P index,GIF index,P bytes,PA,RGB key,RGB other key,L key,1 key,I;16 key,4 bit,4 bit white,2 bit,16 bit RGB"
    ).split(","),
)
def test_palettes_and_keyed_colours_lie_on_white_too(content, expected):
    assert pixels(content)[0].tolist() == expected


# ---- other colour spaces --------------------------------------------------------------------------------------------


def test_other_colour_spaces_come_out_as_the_colours_they_mean():
    inks = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan: red
    for content in (stored(inks, "TIFF"), stored(inks, "JPEG", quality=95)):
        assert np.abs(pixels(content).astype(int) - [255, 0, 0]).max() <= 3
    bits = Image.frombytes("1", (3, 1), b"\xa0")
    for kind in ("PNG", "TIFF", "BMP"):
        assert pixels(stored(bits, kind))[0].tolist() == [[255] * 3, [0] * 3, [255] * 3]
    # CIE L* = 53.6, a* = b* = 0 is the grey 128 of sRGB
    lab = Image.merge("LAB", [Image.new("L", (1, 1), v) for v in (137, 128, 128)])
    assert np.abs(pixels(stored(lab, "TIFF"))[0, 0].astype(int) - 128).max() <= 1


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_truncated_picture_is_refused_or_whole_wherever_it_is_cut(kind):
    content = stored(image(0), kind)
    whole = pixels(content)
    for end in range(0, len(content), 7):
        try:
            assert np.array_equal(pixels(content[:end]), whole), end
        except Damaged as error:
            assert str(error).startswith("x cannot be decoded (")


def test_more_pixels_than_pil_takes_for_harmless_are_refused_in_one_sentence(monkeypatch):
    content = stored(Image.new("1", (300, 200)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(
        Damaged, match=r"^a\.png cannot be decoded \(more pixels than .* which is 1,000: scale it down\)$"
    ):
        decode_image(content, "a.png")


def test_a_picture_without_pixels_is_refused():
    ppm = b"P6\n0 4\n255\n"  # what it is called does not matter: the content decides
    bmp = bytearray(stored(Image.new("RGB", (4, 4)), "BMP"))
    bmp[18:22] = bytes(4)
    for content in (ppm, bytes(bmp), tiff(b"", 0, bits=8), b""):
        with pytest.raises(Damaged, match=r"^x cannot be decoded \("):
            decode_image(content, "x")


# ---- crops ----------------------------------------------------------------------------------------------------------


def crop_of_the_whole(picture: Image.Image, width: int, height: int) -> Image.Image:
    """What published numbers were measured with."""
    while picture.width >= 2 * width and picture.height >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(width / picture.width, height / picture.height)
    wide, high = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    left, top = (wide - width) // 2, (high - height) // 2
    return picture.resize((wide, high), Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))


SIDES = [(5, 7), (16, 16), (17, 33), (31, 40), (64, 48), (37, 500), (500, 37), (100, 1500), (9, 143), (1, 16)]


@pytest.mark.parametrize("sides", SIDES)
def test_crops_of_ordinary_pictures_are_those_of_the_whole_bit_for_bit(sides):
    picture = image(0, *sides)
    assert max(sides) <= THIN * min(sides)
    assert np.array_equal(centre_crop(picture, 16), crop_of_the_whole(picture, 16, 16))
    assert np.array_equal(cover_crop(picture, (16, 24)), crop_of_the_whole(picture, 24, 16))


@pytest.mark.parametrize("sides", [(1, 17), (3, 999), (700, 4), (2000, 1), (40, 3000)])
def test_crops_of_thin_pictures_differ_from_those_of_the_whole_by_rounding_alone(sides):
    wave = np.outer(np.sin(np.arange(sides[1])), np.cos(np.arange(sides[0]))) * 60 + 128  # nothing to be clipped
    picture = Image.fromarray(np.stack([wave, 255 - wave, wave], -1).astype(np.uint8))
    for got, whole in (
        (centre_crop(picture, 16), crop_of_the_whole(picture, 16, 16)),
        (cover_crop(picture, (16, 24)), crop_of_the_whole(picture, 24, 16)),
    ):
        assert np.abs(np.array(got).astype(int) - np.array(whole)).max() <= 1


def test_a_thin_picture_is_never_resized_whole(monkeypatch):
    largest, resize = [], Image.Image.resize

    def counted(self, size, *args, **kwargs):
        largest.append(size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", counted)
    for sides in [(1, 2000), (2000, 1)]:
        assert centre_crop(image(0, *sides), 32).size == (32, 32)
        assert cover_crop(image(0, *sides), (24, 40)).size == (40, 24)
    assert max(largest) <= THIN * 32 * 32
