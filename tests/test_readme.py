"""Every command of the README is read as it will be, and the first two are run; with -m slow all are, in order, in an
empty folder, with fewer steps.

Those that need a cluster or ImageNet are composed and checked against the signatures, or run on a stand-in.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import data.generate
import data.precompute
import recipes.apply
import recipes.cost
import recipes.export
import recipes.page
import recipes.prune
import recipes.sweep
from benchmarks.forked import python
from edit.inputs.words import apart, read
from recipes import list as listing
from recipes import plan
from recipes.config.check import check
from recipes.config.composed import names
from recipes.config.sources import register
from recipes.config.staged import stages_of
from recipes.report import request
from recipes.variants import variants

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHORT = "trainer.max_steps=4 preview.every=0 optimizer.warmup=1".split()
WORLD = "data.set.count=512 data.set.held=64 data.batch_size=8".split()
COMMANDS = [
    line.strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("pip ")  # .ci/run types that one
]
NEEDS_DATA = ("latents/", "data=webdataset", "-m data.precompute", "FLUX.1-dev", "flux_dev")  # checked below


def words(command):
    return [w for w in shlex.split(command, comments=True) if w != "python"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clone(tmp_path_factory)


def clone(tmp_path_factory):
    """Looks like a clone in which nothing has been run."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("train.py", "eval.py", "configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(folder, arguments):
    done = python(*arguments, cwd=folder)
    assert done.returncode == 0, f"{arguments}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def shortened(arguments):
    if "--help" in arguments or "-m" == arguments[0]:
        return arguments
    shapes = any("flux_tiny" in word for word in arguments)  # no judge: it takes half a minute to train
    few = any("lcm" in word for word in arguments)  # whose steps are its own
    measure = ["n=20", "rounds=2", *([] if few else ["steps=2"]), *(["features=none"] if shapes else [])]
    if arguments[0] == "train.py":
        staged = any("tinyfusion" in word or "elastic" in word for word in arguments)
        taught = ["before=[]", *(WORLD if shapes else [])] if shapes or staged else []  # short earlier stages are there
        return [*arguments, *taught, *SHORT, "evaluate.guidance=[1.0]", *(f"evaluate.{m}" for m in measure)]
    return [*arguments, *measure]


def test_the_first_two_commands_run_in_an_empty_folder(tmp_path_factory):
    folder = clone(tmp_path_factory)
    first, second = ([*shortened(words(c)), "features=none"] if "eval.py" in c else words(c) for c in COMMANDS[:2])
    assert (first, second[0]) == (["train.py"], "eval.py"), "a newcomer trains and evaluates"
    run(folder, [*first, *SHORT, "evaluate=null"])
    run(folder, second)
    (artifact,) = json.loads((folder / "runs/digits/report.json").read_text())["artifacts"]
    assert "error" not in artifact and artifact["results"][0]["cost"]["uncounted"] == []
    assert (folder / "runs/digits/report.html").exists() and (folder / "runs/digits/artifact/edits.json").exists()


def test_every_command_is_read_without_a_mistake_and_reads_what_an_earlier_one_leaves():
    left, heard = {"runs/dit_digits_deep", "runs/dit_digits_uneven"}, set()  # these are stages of stages
    for command in COMMANDS:
        program, *given = words(command)
        program, given = (given[0], given[1:]) if program == "-m" else (program, given)
        wanted = set(re.findall(r"(?:artifact|init|reference|model)=(runs/\w+)", command))
        assert wanted <= left, f"{command}: {wanted - left} is made by no command before"
        READ[program](given)
        heard.add(program)
        left |= set(re.findall(r" out=(\S+)", command))
        if program == "train.py" and "--help" not in given:
            left |= leaves(composed_of(given))
    assert heard == set(READ) and len(COMMANDS) >= 30


def composed_of(given):
    """The configuration of the first job."""
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        return compose("train", [word.split(",")[0] for word in given if word != "-m"])


def leaves(cfg):
    """Run folders of a run and of its stages."""
    stages = [dict(w.partition("=")[::2] for w in stage.all if "=" in w) for stage in stages_of(cfg)]
    names = {s.get("name", s.get("experiment", "").replace("/", "_")) for s in stages}
    return {f"runs/{cfg.name}", *(f"runs/{name}" for name in names if name), *(s["out"] for s in stages if "out" in s)}


def read_train(given):
    assert given == ["--help"] or check(composed_of(given)) == []


def read_plan(given):
    assumed, settings = plan.parse(given)
    assert assumed.peak is None and check(composed_of(settings)) == []


def read_eval(given):
    own, texts = apart(given, ("variant",))
    assert request.parse(own)["artifact"] and len(variants(texts)) == len({k.split(".")[1] for k in texts})


def read_list(given):
    assert not given or len(listing.meant(given[0], listing.entries())) == 1


READ = {
    "train.py": read_train,
    "eval.py": read_eval,
    "recipes.apply": recipes.apply.parse,
    "recipes.export": recipes.export.parse,
    "recipes.prune": recipes.prune.parse,
    "recipes.plan": read_plan,
    "recipes.sweep": lambda given: read(recipes.sweep.Summing, given),
    "recipes.page": lambda given: read(recipes.page.Paging, given),
    "recipes.cost": lambda given: recipes.cost.main([*given, "--json"]) and pytest.fail("not counted"),
    "recipes.list": read_list,
    "data.precompute": lambda given: data.precompute.parser().parse_args(given),
    "data.generate": data.generate.parse,
}


@pytest.mark.slow
def test_the_commands_run_in_the_order_of_the_readme(folder):
    runnable = [c for c in COMMANDS if not any(n in c for n in NEEDS_DATA)]
    first = next(i for i, c in enumerate(runnable) if c.endswith("out=reports/depth")) + 1
    assert first == 4, "a newcomer trains, evaluates, prunes and compares"
    for command in runnable[:first]:  # in an empty folder, as they are typed
        run(folder, shortened(words(command)))
    compared = json.loads((folder / "reports/depth/report.json").read_text())["artifacts"]
    assert [a["name"] for a in compared] == ["digits", "dit_digits_depth"] and not any("error" in a for a in compared)
    dense, pruned = (a["results"][0]["cost"] for a in compared)
    assert dense["uncounted"] == pruned["uncounted"] == [] and pruned["macs"] < 0.6 * dense["macs"]

    # what later ones begin from, shortened, is there before them
    run(folder, ["train.py", "experiment=flux_tiny/teacher", *WORLD, *SHORT, "evaluate=null"])
    for start in ("deep", "uneven"):
        run(folder, ["train.py", f"experiment=dit_digits/{start}", *SHORT, "evaluate=null"])
    run(folder, ["train.py", "experiment=dit_digits/tinyfusion_search", "before=[]", *SHORT])
    search = "search=runs/dit_digits_tinyfusion_search"
    run(folder, ["-m", "recipes.prune", "model=runs/dit_digits_deep", search, "out=runs/dit_digits_tinyfusion_pruned"])
    for command in runnable[first:]:
        run(folder, shortened(words(command)))
    assert len(runnable) >= 9
    assert (folder / "runs/digits/artifact/edits.json").exists()
    assert (folder / "reports/depth/report.html").exists()
    assert len(list((folder / "runs/sweep").glob("*/metrics.csv"))) == 6, "each job of the sweep has its own folder"
    programs = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (program,) = [p for p in programs if "edit.load" in p]  # a new process: its imports must be complete
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, check=True, timeout=120)
    assert (folder / "shallow/config.json").exists() and (folder / "three.png").exists()


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c and any(n in c for n in NEEDS_DATA)])
def test_cluster_commands_compose_and_fit_the_signatures(command):
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        assert check(compose("train", words(command)[1:])) == []


def test_the_precompute_command_runs_on_a_stand_in_for_imagenet(folder):
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image

    (command,) = [c for c in COMMANDS if "data.precompute" in c]
    arguments = words(command)
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8, 8, 8), down_block_types=["DownEncoderBlock2D"] * 4,
                        up_block_types=["UpDecoderBlock2D"] * 4, norm_num_groups=4, latent_channels=4)  # fmt: skip
    vae.save_pretrained(folder / arguments[arguments.index("--vae") + 1])  # a local folder of that name comes first
    for label in ("cat", "dog"):
        place = folder / arguments[arguments.index("--images") + 1] / label
        place.mkdir(parents=True)
        Image.effect_noise((40, 40), 64).convert("RGB").save(place / "a.png")
    arguments[arguments.index("--size") + 1] = "32"
    run(folder, arguments)
    assert (folder / "latents/imagenet256/manifest.json").exists()


@pytest.mark.slow
def test_the_flux_commands_run_on_a_stand_in_of_its_depth(folder):
    """19 double and 38 single units of 8 channels, its own kind of VAE and encoders: from prompts to the pipeline."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    from data.sets.toy_text import ToyText

    small = {"num_attention_heads": 1, "attention_head_dim": 8, "joint_attention_dim": 64, "pooled_projection_dim": 64}
    torch.manual_seed(0)
    words_ = ToyText()
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        AutoencoderKL(block_out_channels=(8,), latent_channels=16, norm_num_groups=4),
        words_.clip,
        words_.clip_tokenizer,
        words_.t5,
        words_.t5_tokenizer,
        FluxTransformer2DModel(**small, guidance_embeds=True, axes_dims_rope=(2, 2, 4)),
    )
    pipe.save_pretrained(folder / "FLUX.1-dev")
    words_.write(folder / "FLUX.1-dev")  # with a tokenizer beside each encoder
    (folder / "prompts.txt").write_text("a red circle\ntwo small blue squares\n")
    backbone = [*(f"backbone.{k}={v}" for k, v in small.items()), "backbone.axes_dims_rope=[2,2,4]"]
    alone = [*backbone, "trainer=cpu"]
    short = [*SHORT, "trainer.accumulate=1"]
    few = [
        "data.set.steps=2",
        "before.generate.prompts=composed:5",
        "before.generate.size=8",
        "before.generate.steps=2",
        "before.generate.long=cut",
    ]
    extra = {
        "recipes.plan": [*alone, "devices=1", "peak=1", "before.generate.size=8"],
        "experiment=flux_dev/distill": [*alone, *short, "sampler.solver.steps=2", *few],
        "recipes.export": [],
        "data.generate": ["steps=2", "size=8", "processes=1", "device=cpu"],
        "experiment=flux_dev/four_step": [
            *alone,
            *short,
            "+matching.every=2",
            "before=[]",
            "data.set.path=made",
            "data.set.steps=2",
        ],
    }
    commands = {words(c)[1]: words(c) for c in COMMANDS if "FLUX.1-dev" in c or "flux_dev" in c}
    assert list(commands) == list(extra)
    said = {}
    for name, arguments in commands.items():
        known = {w.split("=")[0] for w in extra[name]}
        commands[name] = [*(w for w in arguments if w.split("=")[0] not in known), *extra[name]]
        said[name] = run(folder, commands[name])
    assert "as data.generate is told in before, 16x8x8" in " ".join(
        said["recipes.plan"].split()
    )  # there were no data yet
    images = json.loads((folder / "runs/flux_dev_512px/manifest.json").read_text())
    assert images["count"] == 5 and images["pooled"]["name"] == "CLIPTextModel" and images["vae"]["scale"]
    assert (folder / "runs/flux_dev_512px/samples.png").exists()  # the pipeline's VAE was found
    again = run(folder, commands["experiment=flux_dev/distill"])
    assert "flux_dev_512px: all 5 images are there" in again and "flux_dev_distill is complete" in again
    student = FluxPipeline.from_pretrained(folder / "student").transformer
    assert (len(student.transformer_blocks), len(student.single_transformer_blocks)) == (8, 38)
    assert student.dtype == torch.float32 and (folder / "student/README.md").exists()


def test_the_table_of_families_names_folders_and_experiments_that_exist():
    table = README.split("## What works")[1].split("##")[0]
    folders, experiments = re.findall(r"\]\((edit/[\w/.]+)\)", table), re.findall(r"experiment=([\w/]+)", table)
    assert len(folders) >= 8 and len(experiments) >= 7
    assert all((ROOT / path).exists() for path in folders)
    assert set(experiments) <= set(names(ROOT / "configs", "experiment"))
    worlds = {file.stem for file in (ROOT / "configs/world").glob("*.yaml")}
    assert worlds <= set(re.findall(r"`(\w+)`", table)), "every world is named"


def test_its_pictures_are_there():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / p).is_file() for p in pictures)


def test_the_map_names_what_is_there():
    for name in re.findall(r"^  ?(\w+\.py|\w+/)", README.split("## Map")[1].split("## Tests")[0], re.MULTILINE):
        assert any((ROOT / package / name).exists() for package in ("", "edit", "recipes", "data")), name
