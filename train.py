"""Train a diffusion transformer from a configuration: `python train.py`, `python train.py --help`."""

from pathlib import Path

from recipes.config.launch import Opening, launch
from recipes.opening import announce, answer, known


def main(cfg) -> None:
    from recipes.stages import launched, run_after, run_before

    run_before(cfg, Path(__file__))
    from recipes.training import run  # heavy imports after the configuration is known to be right

    with launched():
        run(cfg)
    run_after(cfg)


if __name__ == "__main__":
    launch(main, "train", Path(__file__).parent / "configs", opening=Opening(known, announce, answer))
