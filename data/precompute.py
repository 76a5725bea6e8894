"""Turn images into latents and text embeddings once, so that training never runs the encoders.

    python -m data.precompute --images photos/ --out latents/ --vae stabilityai/sd-vae-ft-ema
    python train.py experiment=sit_xl_2/baseline data.set.path=latents/

Stop it whenever you like: the same command goes on after the last finished shard.
"""

from __future__ import annotations

import argparse
import sys

from data import manifest
from data.making.advice import next_step
from edit.inputs.command import Parser, guarded, number_of, working


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m data.precompute",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="On several machines, start the same command on each with RANK and WORLD_SIZE set (torchrun and SLURM "
        "wrappers do): shards are divided among them, and the last to finish writes the manifest.",
    )
    p.add_argument(
        "--images",
        required=True,
        help="folder (one subfolder per class, or flat with .txt captions beside "
        "the images), or webdataset shards: a folder of .tar files, or a pattern as 'train-{0000..0127}.tar'",
    )
    p.add_argument("--out", required=True, help="folder to write; one begun with other encoders or sizes is refused")
    add_encoders(p)
    p.add_argument("--size", type=int, default=256, help="centre crop in pixels (%(default)s)")
    p.add_argument(
        "--bucket-step",
        type=int,
        help="keep aspect ratios: sizes of about --size x --size pixels, heights and widths multiples of this, such "
        "as 64; each image goes to the nearest ratio (all are cropped to squares)",
    )
    p.add_argument("--bucket-ratio", type=float, default=2.0, help="longer to shorter side, at most (%(default)s)")
    p.add_argument("--flips", action=argparse.BooleanOptionalAction, default=True, help="store mirrored images, too")
    p.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="stored as (%(default)s)")
    p.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="the encoders compute in (%(default)s)",
    )
    p.add_argument("--batch", type=int, default=32, help="images encoded at once (%(default)s)")
    p.add_argument("--shard-size", type=int, default=4096, help="images per shard (%(default)s)")
    p.add_argument("--processes", type=int, default=1, help="processes, spread over the GPUs (%(default)s)")
    p.add_argument("--workers", type=int, default=4, help="threads per process that decode images (%(default)s)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, ... (cuda if there is one)")
    p.add_argument(
        "--on-error",
        choices=("refuse", "skip"),
        default="refuse",
        help="damaged or uncaptioned images and damaged shards: stop, or name them and go on (%(default)s)",
    )
    return p


def add_encoders(p: argparse.ArgumentParser) -> None:
    """The options that name the encoders, and how captions go into theirs."""
    p.add_argument("--vae", required=True, help="diffusers VAE: folder, hub id, or subfolder of one (owner/name:vae)")
    p.add_argument("--text-encoder", help="T5 or CLIP of transformers, the same ways; needs captions")
    p.add_argument("--tokenizer", help="its tokenizer, if it lies elsewhere")
    p.add_argument("--pooled-encoder", help="CLIP text encoder for the pooled embedding, if the text encoder has none")
    p.add_argument("--pooled-tokenizer", help="its tokenizer, if it lies elsewhere")
    p.add_argument(
        "--features",
        help="store patch tokens of a vision encoder, too, which REPA aligns with: a model of timm or transformers, "
        "folder or hub id",
    )
    p.add_argument(
        "--features-side",
        type=int,
        help="pixels of the shorter side of the images that it is given (by its patch size, as published)",
    )
    p.add_argument("--max-tokens", type=int, default=256, help="longer captions are cut (%(default)s)")
    p.add_argument(
        "--padding",
        choices=("none", "states", "zeros"),
        default="none",
        help="keep real tokens only; or pad to --max-tokens and keep the states of the padding, as FLUX and SD3 are "
        "trained; or fill up with zeros (%(default)s)",
    )


@guarded(interrupted="interrupted: the same command goes on after the last finished shard")
def main(argv: list[str]) -> int:
    options = vars(parser().parse_args(argv))
    import torch  # after --help and mistyped options were answered

    from data.making.job import Job
    from data.making.precomputer import precompute
    from edit.measuring.devices import find_device

    options["device"] = options["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    with working(ValueError, OSError, RuntimeError):
        find_device(options["device"])
        done = precompute(Job(**options, rank=number_of("RANK", 0), world=number_of("WORLD_SIZE", 1)))
    if done:
        print(next_step(options["out"], manifest.read(done), gpu=torch.cuda.is_available()))
    else:
        print(f"{options['out']}: other ranks are still at work")
    return 0


if __name__ == "__main__":
    sys.exit(main())
