"""An artifact with training-free edits on top: it refers to the weights of the other one instead of copying them.

    python -m recipes.apply artifact=runs/digits edits=reuse edits.reuse.interval=3 out=runs/digits_reuse
    python -m recipes.apply artifact=runs/digits edits=reuse copy=true out=runs/digits_reuse

`eval.py`, `recipes.export` and `edit.load` take it like any other. The path to the weights is relative: move the two
together. With copy=true it stands alone. edits.<edit>.<field>=<value> changes a field, as in train.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edit.inputs import words
from edit.inputs.command import guarded, helped, working
from recipes.config.errors import UserError
from recipes.variants import Variant, variant

PLACE = "edits"  # the key of the edits, which keys of their fields begin with


@dataclass(frozen=True)
class Applying:
    """Settings.

    Args:
        artifact: artifact, run or `diffusers` folder, or hub id
        edits: files of configs/edits, one or [a,b]
        out: run folder to write; the artifact is in it. It must not exist, be empty or hold a former result
        steps: solver steps; null: as they are
        copy: true: write the weights, too
        trusted: further packages, with commas between, whose edits may be imported
    """

    artifact: str
    edits: str
    out: str
    steps: int | None = None
    copy: bool = False
    trusted: str = ""


@guarded(mistakes=(UserError, ValueError, OSError), interrupted="interrupted: nothing was replaced")
@helped(Applying)
def main(argv: list[str]) -> int:
    chosen, made = parse(argv)
    with working(UserError, ValueError, OSError):
        print(f"applied   {apply(chosen, made)}")
    return 0


def parse(argv: Sequence[str]) -> tuple[Applying, Variant]:
    """The settings, and the edits that they name.

    Raises:
        UserError, ValueError: for a word that means nothing
    """
    own, texts = words.apart(argv, (PLACE,))
    chosen = words.read(Applying, own)
    given = {key.removeprefix(f"{PLACE}."): text for key, text in texts.items()} | {"": chosen.edits}
    steps = {} if chosen.steps is None else {"steps": str(chosen.steps)}
    return chosen, variant(Path(chosen.out).name, PLACE, given | steps)


def apply(chosen: Applying, made: Variant) -> Path:
    """Write the artifact.

    Returns:
        Its folder.

    Raises:
        FileExistsError: if `out` holds something else than a former result
        UserError, ValueError, OSError: if an edit needs training, changes the weights that are to be referred to, or
            does not fit; if the artifact cannot be read
    """
    import edit
    from edit.artifacts.variant import same_weights
    from edit.artifacts.variant import variant as changed
    from edit.edits import describe
    from edit.sampling import at_steps

    trusted = tuple(filter(None, chosen.trusted.split(",")))
    edits = made.edits(trusted)
    artifact = edit.load(chosen.artifact, trusted=trusted)
    folder = Path(chosen.out) / "artifact"
    refuse_foreign(folder, [artifact.path, artifact.home or artifact.path])
    new = changed(artifact, edits, at_steps(artifact.sampler, made.steps))
    if not chosen.copy and not same_weights(artifact.denoiser, new.denoiser):
        raise ValueError(f"{', '.join(edits)}: the weights are not those of {chosen.artifact} any more: add copy=true")
    applied = {"to": os.fspath(artifact.path), "edits": {name: describe(e) for name, e in edits.items()}}
    run = artifact.run | {"name": Path(chosen.out).name, "applied": applied}
    refers = None if chosen.copy else artifact.home
    return edit.save(new.denoiser, folder, new.objective, new.sampler, new.data, run, refers=refers)


def refuse_foreign(folder: Path, used: Sequence[Path]) -> None:
    """Refuse to replace what was not written by this command, or what the result is made of.

    Raises:
        FileExistsError: if there is such a thing at `folder`
    """
    if not os.path.lexists(folder):
        if os.path.lexists(out := folder.parent) and not (out.is_dir() and not any(out.iterdir())):
            raise FileExistsError(f"out={out} is there and is no former result: give another out=, or remove it")
        return
    described = folder / "edits.json"
    run = json.loads(described.read_text()).get("run", {}) if described.is_file() else {}
    if "applied" not in run or any(folder.resolve() == path.resolve() for path in used):
        raise FileExistsError(
            f"out={folder.parent} holds an artifact that is used or was not made by this command: give another out=, "
            "or remove it"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
