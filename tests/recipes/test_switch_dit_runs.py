"""Switch-DiT as runs: stopped and resumed, on several ranks, and its experts' map."""

import shutil

import pytest
import torch
from ranks import run_ranks
from small_runs import TWO_RANKS, losses, rows, train, train_ranks

import edit
from recipes.runtime.checkpoint_files import newest

WORDS = ("edits=switch_dit", "optimizer.warmup=0", "optimizer.lr=1e-2", "sampler.solver.steps=3")
pytestmark = pytest.mark.slow


def state(folder) -> dict:
    return torch.load(newest(folder / "checkpoints"), weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The whole run, `whole`, of one process; one matching serves two steps."""
    folder = tmp_path_factory.mktemp("switch")
    train(folder, "name=whole", *WORDS, "+edits.switch_dit.every=2", "checkpoint.keep=9", "checkpoint.every=3")
    return folder


def test_the_prior_is_trained_and_logged(folder):
    told = rows(folder, "whole")
    prior = [float(row["train/switch_dit/prior"]) for row in told]
    assert prior[-1] < prior[0] < 0.2 and {"train/switch_dit/near", "train/switch_dit/far"} <= told[0].keys()
    kept = state(folder / "whole")
    assert kept["denoiser.edits.switch_dit.steps"] == 12
    assert all(v.abs().max() > 0 for k, v in kept.items() if ".experts." in k)


def test_a_stopped_run_goes_on_bit_by_bit_between_two_matchings(tmp_path, folder):
    shutil.copytree(folder / "whole", tmp_path / "whole")
    for file in sorted((tmp_path / "whole" / "checkpoints").glob("*.ckpt"))[1:]:  # the first is of step 3
        file.unlink()
    shutil.rmtree(tmp_path / "whole" / "artifact")
    words = ("+edits.switch_dit.every=2", "checkpoint.keep=9", "checkpoint.every=3")
    train(tmp_path, "name=whole", *WORDS, *words)
    assert losses(tmp_path, "whole") == losses(folder, "whole")
    one, two = state(folder / "whole"), state(tmp_path / "whole")
    assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())


def in_one(folder) -> None:
    train(folder, "name=one", *WORDS, "trainer.max_steps=4")


def alike(folder) -> None:
    """The runs `one` and `two`."""
    pairs = zip(losses(folder, "one"), losses(folder, "two"), strict=True)
    assert all(abs(float(a) - float(b)) < 2e-5 * float(a) for a, b in pairs)
    one, other = (edit.load(folder / n).denoiser.state_dict() for n in ("one", "two"))
    assert one.keys() == other.keys()
    assert max((one[k] - other[k]).abs().max().item() for k in one if one[k].is_floating_point()) < 1e-3


TWO = (*TWO_RANKS, "data.batch_size=8", "trainer.max_steps=4", "name=two")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one_process_does(tmp_path, strategy):
    in_one(tmp_path)
    train_ranks(tmp_path, *WORDS, f"trainer={strategy}", *TWO, world=2)
    alike(tmp_path)


def trained_by_zero(folder, on_the_cpu) -> None:
    on_the_cpu(folder, 3, (*WORDS, "trainer=zero3", *TWO))


def test_two_ranks_of_zero_3_train_as_one_process_does(tmp_path):
    from cpu_deepspeed import on_the_cpu

    in_one(tmp_path)
    run_ranks(trained_by_zero, 2, args=(tmp_path, on_the_cpu), timeout=300)
    alike(tmp_path)


def test_with_checkpointing_it_trains_alike_and_previews_have_the_experts_map(tmp_path):
    train(tmp_path, "name=a", *WORDS, "preview.every=6", "preview.count=4", "trainer.gradient_checkpointing=true")
    train(tmp_path, "name=b", *WORDS)
    assert losses(tmp_path, "a") == losses(tmp_path, "b")
    assert list((tmp_path / "a").rglob("*switch_dit*.png"))
