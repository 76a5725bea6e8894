"""Model cards: where published weights came from, how they were made, how good they are, what their licence allows.

Everything in a card is read from the artifact (`edits.json`), its run (`config.yaml`, `report.json`) and the folders
of the models it was made from. What is not found there is said to be unknown, a licence above all: weights distilled
from a model are derivatives of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import edit
from edit.artifacts.checkpoint import Artifact
from edit.artifacts.location import is_hub_id
from edit.artifacts.measured import quality_of, results
from edit.artifacts.reference import home
from edit.edits import describe, per_token
from edit.inputs import trust
from edit.solvers import Euler, Grid, times

RECIPE = (
    *("init", "teacher", "edits", "terms", "matching", "critic", "data_weight", "objective", "optimizer", "ema"),
    *("data", "seed"),
)
# identifiers of the hub's list that need no name and link beside them
LICENCES = (
    *("apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "openrail", "openrail++", "creativeml-openrail-m"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "unknown"),
)


@dataclass(frozen=True)
class Licence:
    """As a card's front matter has it: an identifier of the hub's list, or "other" with a name and a link."""

    id: str = "unknown"
    name: str | None = None
    link: str | None = None

    @classmethod
    def of(cls, text: str) -> Licence:
        """From a user's text: an identifier of the hub, or any other name."""
        known = text.strip().lower()
        return cls(known) if known in LICENCES else cls("other", text.strip())

    def __str__(self) -> str:
        name = self.name or self.id
        return f"[{name}]({self.link})" if self.link else name


_BFL = "https://huggingface.co/black-forest-labs"
PUBLISHED = {  # by hub id: teachers that are known without their cards
    "black-forest-labs/FLUX.1-dev": Licence(
        "other", "flux-1-dev-non-commercial-license", f"{_BFL}/FLUX.1-dev/blob/main/LICENSE.md"
    ),
    "black-forest-labs/FLUX.1-schnell": Licence("apache-2.0"),
}


@dataclass(frozen=True)
class Origin:
    """A model that weights were made from, itself made from nothing we know of."""

    path: str  # folder or hub id, as the run named it
    licence: Licence
    hub: str | None  # its hub id, where it has one

    @property
    def name(self) -> str:
        """Its hub id, else its folder's last name that means something."""
        folder = Path(self.path)
        return self.hub or (folder.parent if folder.name == "artifact" else folder).name

    @property
    def ours(self) -> bool:
        """Whether it is a run, or what one left, that is not on the hub."""
        return not self.hub and any((Path(self.path) / p / "edits.json").is_file() for p in ("", "artifact"))

    def __str__(self) -> str:
        return f"[{self.hub}](https://huggingface.co/{self.hub})" if self.hub else f"`{self.name}`"


# ---- origins ---------------------------------------------------------------------------------------------------------


def origin(path: str) -> Origin:
    hub = hub_id(path)
    return Origin(path, licence_of(path, hub), hub)


def origins(artifact: Path, teacher: str | None = None) -> list[Origin]:
    """The models at the root of an artifact's ancestry: teachers and starting points, through all runs in between.

    Args:
        artifact: folder
        teacher: in place of the one that the artifact's run names
    """
    artifact = trained(artifact)
    found: dict[str, Origin] = {}
    seen: set[str] = set()

    def visit(path: str) -> None:
        if path in seen:
            return
        seen.add(path)
        folder = Path(path)
        if folder.is_dir() and (before := parents(folder)):
            for earlier in before:
                visit(earlier)
        else:
            found[path] = origin(path)

    published = [] if (artifact / "edits.json").is_file() else [str(artifact)]  # no run of ours made it
    for path in [teacher] if teacher else parents(artifact) or published:
        visit(path)
    return list(found.values())


def base_of(artifact: Path) -> Origin | None:
    """The model that an artifact's weights started from: one of our runs, or a published model."""
    start = recipe(artifact).get("init")
    return origin(str(start)) if start else None


def parents(folder: Path) -> list[str]:
    """The models that a run started from, as its configuration names them."""
    config = recipe(folder)
    teacher = config.get("teacher")
    named = (config.get("init"), teacher.get("path") if isinstance(teacher, Mapping) else None)
    return list(dict.fromkeys(str(p) for p in named if p))


def trained(folder: Path) -> Path:
    """The folder whose run made the weights: of what `recipes.apply` has written, the one that it was applied to."""
    for _ in range(trust.DEEP):
        description = _json(folder / "edits.json") if (folder / "edits.json").is_file() else {}
        run = description.get("run")
        applied = run.get("applied") if isinstance(run, dict) else None
        to = applied.get("to") if isinstance(applied, dict) else None
        if description.get("refers") is not None:
            folder = home(folder, description)
        elif isinstance(to, str) and (Path(to) / "config.json").is_file():
            folder = Path(to)
        else:
            break
    return folder


def recipe(folder: Path) -> dict[str, Any]:
    """The settings of the run beside an artifact that decide its result; empty without a run."""
    folder = trained(folder)
    for place in (folder, folder.parent):
        if (place / "config.yaml").is_file() and (place == folder or folder.name == "artifact"):
            try:
                config = _settings(place / "config.yaml")
                trainer = config.get("trainer")
                steps = trainer.get("max_steps") if isinstance(trainer, Mapping) else None
                chosen = {k: config[k] for k in RECIPE if k in config}
                if not chosen.get("matching"):
                    chosen.pop("critic", None)  # which only these methods have
            except (OmegaConfBaseException, AttributeError, ValueError, OSError):
                return {}  # another program's config.yaml
            return {k: v for k, v in {**chosen, "steps": steps}.items() if v not in (None, {}, [])}
    return {}


def _settings(file: Path) -> Any:
    """References of the file to itself are followed; to anything else, such as the environment of whoever reads it and
    may publish the card, none is: all are shown as they are written."""
    config = trust.load_yaml(file)
    written = OmegaConf.to_container(config, resolve=False)
    leaves = [v for _, _, v in trust.walk(written, str(file)) if isinstance(v, str)]
    calls = any("${" in v and ":" in v for v in leaves)  # ${name: ...} asks a function
    return written if calls else OmegaConf.to_container(config, resolve=True)


def hub_id(path: str) -> str | None:
    """`owner/name` of a model on the hub that is not a folder here, is in the hub's cache, or says so itself."""
    name = r"[A-Za-z0-9][\w.-]*"
    if cached := re.search(rf"models--({name}?)--({name})", path):
        return f"{cached[1]}/{cached[2]}"
    folder = Path(path)
    if not folder.exists():
        return path if is_hub_id(path) else None
    for file in (folder / "model_index.json", folder / "config.json"):
        origin = _json(file).get("_name_or_path") if file.is_file() else None
        if isinstance(origin, str) and is_hub_id(origin):
            return origin
    return None


def licence_of(path: str, hub: str | None) -> Licence:
    """From the model card in the folder or, for its transformer, in the pipeline around it; else if we know the id."""
    folder = Path(path)
    for place in (folder, folder.parent) if folder.name == "transformer" else (folder,):
        matter = _front_matter(place / "README.md") if (place / "README.md").is_file() else {}
        if matter.get("license"):
            link = matter.get("license_link")
            if link and hub and "://" not in link:  # a file beside the card
                link = f"https://huggingface.co/{hub}/blob/main/{link}"
            return Licence(str(matter["license"]), matter.get("license_name"), link)
    return PUBLISHED.get(hub or "", Licence())


def common(found: Sequence[Origin]) -> Licence:
    """The licence of all origins; unknown unless every one has the same."""
    licences = {o.licence for o in found}
    return licences.pop() if len(licences) == 1 else Licence()


def licence_files(found: Iterable[Origin]) -> list[Path]:
    """Licence texts that lie beside the origins: derivatives are passed on with them."""
    folders = [Path(o.path) for o in found]
    places = [p for f in folders for p in ((f, f.parent) if f.name == "transformer" else (f,)) if p.is_dir()]
    return [file for place in places for file in sorted(place.glob("LICENSE*")) if file.is_file()]


def _front_matter(card: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    try:
        return metadata_load(card) or {}
    except (ValueError, YAMLError):
        return {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


# ---- the card --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """Content of a README.md.

    Args:
        title: name of the export
        artifact: that was exported, with everything folded
        usage: code that loads it
        relation: to the base models, as the hub calls it: "finetune" or "adapter"
        bases: models that it is a finetune of; of an adapter, the one it needs
        found: see `origins`
        around: the pipeline that other components were taken over from
        licence: of the export
        tags: for the hub
    """

    title: str
    artifact: Artifact
    usage: str
    relation: str
    bases: Sequence[Origin]
    found: Sequence[Origin]
    around: Origin | None
    licence: Licence
    tags: tuple[str, ...] = ("edit", "diffusion-transformer")

    def __str__(self) -> str:
        parts = [f"---\n{self.front_matter()}\n---\n\n# {self.title}", self.summary()]
        parts += ["## Use", *self.needs(), f"```python\n{self.usage}\n```", "## How it was made", *self.made()]
        if measured := metrics(self.artifact.path):
            parts += ["## Measured", measured]
        return "\n\n".join([*parts, "## Licence", *self.terms()]) + "\n"

    def front_matter(self) -> str:
        from huggingface_hub import ModelCardData

        base = [o.hub for o in self.bases if o.hub]
        denoiser = self.artifact.denoiser
        made = "video" if len(denoiser.sample_shape) == 4 else "image"
        text = {"pipeline_tag": f"text-to-{made}"} if denoiser.facts.text else {}
        return ModelCardData(
            base_model=base[0] if len(base) == 1 else base or None,
            library_name="diffusers",
            license=self.licence.id,
            license_name=self.licence.name if self.licence.id == "other" else None,
            license_link=self.licence.link if self.licence.id == "other" else None,
            tags=list(self.tags),
            **({"base_model_relation": self.relation} if base else {}),
            **text,
        ).to_yaml()

    def summary(self) -> str:
        d = self.artifact.denoiser
        count = sum(p.numel() for p in d.parameters())
        made = f", made from {' and '.join(map(str, self.found))}" if self.found else ""
        taken = f" ({each:,} of them activated per token)" if (each := per_token(d)) != count else ""
        return f"A {d.name} diffusion transformer of {len(d.units)} blocks and {count:,} parameters{taken}{made}."

    def needs(self) -> list[str]:
        if self.relation != "adapter" or not self.bases:
            return []
        base = self.bases[0]
        more = " It is a run and no published model: export it, too, and pass it on." if base.ours else ""
        return [f"This adapter needs {base}, the model that it was trained on.{more}"]

    def made(self) -> list[str]:
        run, folder = self.artifact.run, self.artifact.path
        facts = [("run", "name"), ("training steps", "step"), ("images seen", "images"), ("revision", "revision")]
        lines = [f"- {label}: {run[key]}" for label, key in facts if run.get(key) not in (None, "")]
        lines += method(self.artifact)
        parts = ["\n".join(lines)] if lines else []
        live = ({"name": name, **describe(e)} for name, e in self.artifact.denoiser.applied.items())
        if edits := [*self.artifact.denoiser.folded, *live]:
            parts += ["Edits, in the order in which they were applied:", _yaml(edits)]
        if settings := recipe(folder) or ({"data": self.artifact.data} if self.artifact.data else {}):
            parts += ["Settings:", _yaml(settings)]
        if parts:
            parts += ["Sampled with:", _yaml(describe(self.artifact.sampler))]
        return parts or ["Not recorded."]

    def terms(self) -> list[str]:
        own = "unknown: nobody has said which it is" if self.licence.id == "unknown" else str(self.licence)
        parts = [f"Licence: {own}."]
        if self.found:
            rows = "\n".join(f"- {o}: {o.licence}" for o in self.found)
            parts += ["Weights made from a model are derivatives of it, its licence covers them. Made from:", rows]
        if self.around:
            parts.append(f"The other components are those of {self.around}: {self.around.licence}.")
        return [*parts, f"Written by `edit` {edit.__version__}."]


def few_steps(artifact: Artifact) -> Grid | None:
    """The few times that a student was trained to be sampled at; None: those are the user's choice."""
    solver = artifact.sampler.solver
    if isinstance(solver, Euler) and "matching" in artifact.run:
        return Grid(tuple(times(solver.steps, 1)[:-1]), shift=solver.shift)
    return solver if isinstance(solver, Grid) else None


def method(artifact: Artifact) -> list[str]:
    """Facts of a few-step student: the method with the teacher's guidance, and the times; empty for other models."""
    lines, run, grid = [], artifact.run, few_steps(artifact)
    if matching := run.get("matching"):
        teacher = run.get("teacher") or {}
        given = teacher.get("guidance", 1.0)
        scale = " to ".join(map(str, given)) if isinstance(given, list) else given
        taught = teacher.get("path") or teacher.get("placement") == "tied"  # some methods learn from data alone
        of = f", of a teacher at guidance {scale}" if taught else ""
        lines.append(f"- method: {matching['_target_'].rpartition('.')[2]}{of}")
    if grid:
        renoised = ", each step but the first from fresh noise" if grid.renoise else ""
        lines.append(f"- trained for the times {', '.join(f'{t:.4g}' for t in grid.grid[:-1])} (1 is noise){renoised}")
    return lines


FOREIGN = "Parts of `report.json` were not written by `edit` and are left out."


def metrics(artifact: Path) -> str:
    """The measurements in report.json beside the artifact, as a table; empty without a report.

    Entries that another program wrote are left out, and the card says so.
    """
    found, foreign = results(artifact)
    rows = [quality_of(result) for result in found]
    names = list(dict.fromkeys(k for row in rows for k in row))
    lines = [names, ["---"] * len(names), *([row.get(k, "") for k in names] for row in rows)] if rows else []
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([*([table] if table else []), *([FOREIGN] if foreign else [])])


def _yaml(value: Any) -> str:
    return f"```yaml\n{OmegaConf.to_yaml(OmegaConf.create(_public(value))).strip()}\n```"


def _public(value: Any) -> Any:
    """The same without the folders of this machine: of an absolute path its last name."""
    if isinstance(value, Mapping):
        return {k: _public(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(v) for v in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
