"""TinyFusion as runs: a search that can be stopped, choice, recovery and export, alone and as one command."""

import json
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from killed_runs import kill_at
from ranks import run_ranks
from safetensors.torch import load_file
from small_runs import SMALL, TWO_RANKS, rows, train, train_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

import edit
from benchmarks.forked import python
from edit.backbones.dit import DiTConfig
from edit.pruning.tinyfusion import Gates, TinyFusion
from edit.stream import Condition
from recipes import prune, stages
from recipes.recipe import local
from recipes.roles import shard
from recipes.runtime.checkpoint_files import newest

ROOT = Path(__file__).parents[2]
DEEP = ("backbone.depth=4", "optimizer.warmup=0")  # a model whose units do something, so that gates have gradients
SEARCH = ("edits=tinyfusion", "edits.lora.rank=2", "+optimizer.groups.tinyfusion={lr_scale: 10.0}", *DEEP)
LOGITS = "edits.tinyfusion.logits"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of four units, `whole`, and a search over it, `search`, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("tinyfusion")
    train(folder, "name=whole", *DEEP)
    train(folder, "name=search", f"init={folder}/whole", *SEARCH, "checkpoint.every=1", "checkpoint.keep=20")
    return folder


def state(folder, name, step=None):
    path = folder / name / "checkpoints"
    return torch.load(newest(path) if step is None else path / f"step_{step:08d}.ckpt", weights_only=True)["state_dict"]


def test_a_search_trains_every_logit_and_the_lora_and_nothing_else(folder):
    whole = edit.load(folder / "whole").denoiser.model.state_dict()
    first, last = (state(folder, "search", step) for step in (1, 12))
    assert (first[f"denoiser.{LOGITS}"] != last[f"denoiser.{LOGITS}"]).all()
    additions = [k for k in last if k.startswith("denoiser.") and ".lora_B." in k]
    linear = [m for m in edit.load(folder / "whole").denoiser.modules() if isinstance(m, torch.nn.Linear)]
    assert len(additions) == len(linear) and all(last[k].abs().sum() > 0 for k in additions)  # B begins at zero
    for key, value in last.items():
        part, _, name = key.partition(".model.")
        if part == "denoiser" and ".lora_" not in name:
            assert torch.equal(value, whole[name.replace(".base_layer.", ".")]), key


def test_confidence_and_choice_of_each_group_are_logged_as_the_logits_say(folder):
    logged = rows(folder, "search")
    for step in range(1, 12):  # a row tells of the forward pass, that is of the weights one step earlier
        p = (100 * state(folder, "search", step)[f"denoiser.{LOGITS}"]).softmax(1)
        for g in range(2):
            row = {k: float(logged[step][f"train/tinyfusion/{k}/{g}"]) for k in ("confidence", "choice")}
            assert row["confidence"] == pytest.approx(p[g].max().item(), abs=1e-5)  # digits of the log
            assert row["choice"] == p[g].argmax().item()
    assert float(logged[0]["train/tinyfusion/confidence"]) == 0.5


def test_the_temperature_of_each_step_is_in_its_checkpoint(folder):
    found = [state(folder, "search", k)["denoiser.edits.tinyfusion.tau"].item() for k in (1, 7, 12)]
    assert found == pytest.approx([4.0, 4 - 3.9 * 6 / 12, 4 - 3.9 * 11 / 12])  # steps begin at 0, 6/12 and 11/12


@pytest.mark.slow
def test_a_killed_search_goes_on_bit_equal_with_the_same_draws(tmp_path, folder):
    words = (f"init={folder}/whole", *SEARCH)
    kill_at(tmp_path, "killed", 6, *words)
    train_ranks(tmp_path, "name=killed", *words)
    one, two = state(folder, "search"), state(tmp_path, "killed")
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    columns = ("train/loss", "train/tinyfusion/confidence/0", "train/tinyfusion/confidence/1")
    assert [[r[c] for c in columns] for r in rows(folder, "search")] == [
        [r[c] for c in columns] for r in rows(tmp_path, "killed")
    ]


def test_the_averaged_logits_decide(folder):
    last = state(folder, "search")
    average = last[f"ema.{LOGITS}"]
    assert not torch.equal(average, last[f"denoiser.{LOGITS}"])
    assert torch.equal(load_file(folder / "search/artifact/edits.safetensors")[LOGITS], average)
    assert prune.main([f"model={folder}/whole", f"search={folder}/search", f"out={folder}/pruned"]) == 0
    record = json.loads((folder / "pruned/pruning.json").read_text())
    assert record["confidence"] == pytest.approx((100 * average).softmax(1).amax(1).tolist())
    assert record["kept"] == [2 * g + way for g, way in enumerate(average.argmax(1).tolist())]


@torch.no_grad()
def test_what_a_search_leaves_does_not_run_the_units_that_lost(folder):
    denoiser, ran = edit.load(folder / "search").denoiser, []
    for i, block in enumerate(denoiser.model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    denoiser(torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.9]), Condition(label=torch.tensor([1, 7])))
    assert ran == denoiser.edits["tinyfusion"].kept() and len(ran) == 2


# ---- ranks -----------------------------------------------------------------------------------------------------------

RANKS = (*TWO_RANKS, "data.batch_size=8", "trainer.max_steps=4")


def _searched(folder, overrides, run=train) -> list[tuple[list, list]]:
    """The logits of every step as this rank saw them, and the units that its first sample drew."""
    seen, draw = [], Gates.draw

    def watching(self, count):
        masks = draw(self, count)
        seen.append((self.logits.detach().float().flatten().tolist(), masks[0].round().tolist()))
        return masks

    Gates.draw = watching
    run(folder, *overrides)
    return seen


def check_ranks(answers, folder):
    """Ranks agree on finite logits that move, and draw each for themselves."""
    first, second = answers
    assert len(first) == 4 and [logits for logits, _ in first] == [logits for logits, _ in second]
    logits = torch.tensor([logits for logits, _ in first])
    assert logits.isfinite().all() and (logits[0] != logits[-1]).all()
    assert [drawn for _, drawn in first] != [drawn for _, drawn in second]
    saved = load_file(folder / "digits/artifact/edits.safetensors")[LOGITS]
    assert saved.isfinite().all() and saved.shape == (2, 2) and not torch.equal(saved.flatten(), logits[0])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_search_with_the_same_logits(tmp_path, folder, strategy):
    words = (f"init={folder}/whole", *SEARCH, f"trainer={strategy}", *RANKS)
    check_ranks(run_ranks(_searched, 2, args=(tmp_path, words), timeout=120), tmp_path)


def _decisions() -> list[list[int]]:
    """The blocks of a sharded search that run outside of training, before and after its logits have changed."""
    torch.distributed.init_process_group("gloo")
    rank, mesh = torch.distributed.get_rank(), init_device_mesh("cpu", (2,))

    def build():
        return edit.apply(DiTConfig(8, 1, 2, 32, 4, 2, num_classes=10).build(), {"tinyfusion": TinyFusion()})

    denoiser = shard(build, build().state_dict(), torch.device("cpu"), mesh, MixedPrecisionPolicy())
    denoiser.requires_grad_(False).eval()
    own, ran, found = local(denoiser.edits["tinyfusion"].logits), [], []  # of this rank's group
    for i, block in enumerate(denoiser.model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    for logits in (torch.tensor([[0.0, 0.1], [0.1, 0.0]]), torch.tensor([[0.1, 0.0], [0.0, 0.1]])):
        own.copy_(logits[rank : rank + 1])
        with torch.no_grad():
            denoiser(torch.zeros(2, 1, 8, 8), torch.tensor([0.2, 0.9]), Condition(label=torch.tensor([1, 7])))
        denoiser.reshard()
        found.append(ran[:])
        ran.clear()
    return found


def test_the_decision_of_a_sharded_search_follows_its_logits():
    """FSDP2 gathers into the same tensor again and hides that from its version counter."""
    assert run_ranks(_decisions) == [[[1, 2], [0, 3]]] * 2


@pytest.mark.slow  # DeepSpeed compiles an extension
def test_two_ranks_of_zero_3_search_with_the_same_logits(tmp_path, folder):
    from cpu_deepspeed import on_the_cpu

    words = (f"init={folder}/whole", *SEARCH, "trainer=zero3", *RANKS, "preview.every=2", "sampler.solver.steps=1")
    answers = run_ranks(_searched_by_zero, 2, args=(tmp_path, words, on_the_cpu), timeout=300)
    check_ranks(answers, tmp_path)


def _searched_by_zero(folder, overrides, on_the_cpu):
    return _searched(folder, overrides, run=lambda folder, *words: on_the_cpu(folder, 3, words))


# ---- one command -----------------------------------------------------------------------------------------------------

TINY = [*(word for word in SMALL if "depth" not in word), "optimizer.warmup=0", "trainer.max_steps=4"]


def run(*words) -> str:
    """What a command says, in a fork, which imports nothing again (`benchmarks.forked`)."""
    done = python(*words, cwd=ROOT)
    assert done.returncode == 0, f"{words}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def forked_stages(monkeypatch):
    """Stages in forks, too, with a few steps of a thin model: the words of a command do not reach them."""

    def stage(command, when="before"):
        words = [*command[1:], *(TINY if command[1].endswith("train.py") else [])]
        GlobalHydra.instance().clear()  # that of the command, which has its configuration
        print(when, *words, run(*words), flush=True)
        return 0

    monkeypatch.setattr(stages, "_run", stage)


def weights(folder):
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(v, two[f][k]) for f in one for k, v in one[f].items())


@pytest.mark.slow
@torch.no_grad()
def test_one_command_searches_prunes_recovers_and_exports_and_the_runs_can_be_started_alone(tmp_path, forked_stages):
    from diffusers import DiTTransformer2DModel

    command = ("train.py", "experiment=dit_digits/tinyfusion", f"runs={tmp_path}", *TINY)
    run(*command)
    deep, search, pruned, recovered = (
        tmp_path / f"dit_digits_{name}" for name in ("deep", "tinyfusion_search", "tinyfusion_pruned", "tinyfusion")
    )
    kept = json.loads((pruned / "pruning.json").read_text())["kept"]
    assert [unit // 4 for unit in kept] == [0, 0, 1, 1, 2, 2]
    assert {"train/output/output_kd", "train/features/feature_kd"} <= set(rows(tmp_path, recovered.name)[-1])

    denoiser = edit.load(recovered).denoiser
    stock = DiTTransformer2DModel.from_pretrained(recovered / "export")
    assert stock.config.num_layers == len(denoiser.units) == 6
    x, t, label = torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4)
    ours = denoiser(x, t, Condition(label=label)).sample
    # attention of another implementation, in fp32
    torch.testing.assert_close(stock(x, t, label).sample, ours, rtol=0, atol=1e-5)

    runs = {folder: weights(folder / "artifact") for folder in (deep, search, pruned, recovered)}
    stamps = [(folder / "artifact").stat().st_mtime_ns for folder in runs]
    said = run(*command)
    assert said.count("is complete") == 5  # the search asks for the deep model once more
    assert stamps == [(folder / "artifact").stat().st_mtime_ns for folder in runs]

    alone = (f"runs={tmp_path}", "before=[]", "after=[]", *TINY)
    run("train.py", "experiment=dit_digits/tinyfusion_search", *alone, "name=a")
    assert same(weights(tmp_path / "a/artifact"), runs[search])
    run("train.py", "experiment=dit_digits/tinyfusion", *alone, "name=b", f"init={pruned}")
    assert same(weights(tmp_path / "b/artifact"), runs[recovered])
