"""What the tests write into folders and shards."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 16  # pixels


def image(number: int, width: int = 20, height: int = 18) -> Image.Image:
    """Noise that differs by number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(number: int) -> bytes:
    file = io.BytesIO()
    image(number).save(file, "png")
    return file.getvalue()


def caption(number: int) -> str:
    """One to six words."""
    return " ".join(["red", "square", "on", "a", "blue", "disc"][: 1 + number % 6])


def write_tar(path: Path, samples: list[dict]) -> None:
    from webdataset import TarWriter

    with TarWriter(str(path), encoder=False, mtime=0) as tar:
        for sample in samples:
            tar.write(sample)
