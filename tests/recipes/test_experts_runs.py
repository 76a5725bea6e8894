"""Runs of an edit with experts: optimiser groups of its own, replaced weights, shards; on one device and on two."""

import shutil

import pytest
import torch
from experts import Experts
from ranks import run_ranks
from small_runs import TWO_RANKS, losses, train, train_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from weights import randomise

import edit
from edit.backbones.dit import DiTConfig
from edit.denoiser import Denoiser
from edit.stream import Condition
from recipes.roles import shard
from recipes.runtime.checkpoint_files import newest

EXPERTS = ("+edits.experts._target_=experts.Experts", "trusted=[experts]")


def saved(folder) -> dict:
    return torch.load(newest(folder / "checkpoints"), weights_only=True)


def shapes(state: dict, group: dict) -> list[tuple[int, ...]]:
    """Of the parameters of an optimiser group, by their moments."""
    moments = state["optimizer_states"][0]["state"]
    return [tuple(moments[i]["exp_avg"].shape) for i in group["params"]]


def test_groups_of_edits_multiply_those_of_the_configuration_and_keep_their_ratio_in_a_schedule(tmp_path):
    words = ("optimizer.lr=1e-3", "optimizer.weight_decay=0.1", "optimizer.warmup=3")
    words = (*words, "optimizer.schedule=cosine", "optimizer.end=0.1")
    tuned = "+optimizer.groups.edits={lr_scale: 4.0, betas: [0.5, 0.9]}"
    train(tmp_path, "name=a", *EXPERTS, *words, tuned, "trainer.max_steps=6")
    state = saved(tmp_path / "a")
    groups = state["optimizer_states"][0]["param_groups"]
    plain = groups[-1]  # patterns come first, as they always have
    said = [(g["initial_lr"], round(g["weight_decay"], 9), tuple(g["betas"]), g.get("kind")) for g in groups]
    assert said == [
        (4e-3, 0.1, (0.5, 0.9), None),
        (2e-3, 0.2, (0.5, 0.9), "stack"),
        (4e-3, 0.0, (0.5, 0.9), None),
        (1e-3, 0.1, (0.9, 0.95), None),
    ]
    for group in groups:
        assert group["lr"] / plain["lr"] == pytest.approx(group["initial_lr"] / plain["initial_lr"])
    assert shapes(state, groups[1]) == [(4, 32, 128), (4, 128, 32)] * 2  # one group for equal settings
    assert shapes(state, groups[2]) == [(4,)] * 2


def test_a_run_without_such_edits_has_the_groups_it_always_had(tmp_path):
    tuned = ("+optimizer.groups.x_embedder={lr_scale: 2.0}", "optimizer.lr=1e-3", "optimizer.weight_decay=0.0")
    train(tmp_path, "name=a", *tuned, "trainer.max_steps=2")
    groups = saved(tmp_path / "a")["optimizer_states"][0]["param_groups"]
    whole = len(list(edit.load(tmp_path / "a").denoiser.parameters()))
    assert [(g["initial_lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (2e-3, 0, 2),
        (1e-3, 0, whole - 2),
    ]
    assert all("kind" not in g for g in groups)


def test_a_stopped_run_finds_its_groups_again(tmp_path):
    words = (*EXPERTS, "checkpoint.keep=9", "optimizer.lr=1e-3")
    train(tmp_path, "name=whole", *words)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for file in sorted((tmp_path / "parts" / "checkpoints").glob("*.ckpt"))[1:]:
        file.unlink()
    shutil.rmtree(tmp_path / "parts" / "artifact")
    train(tmp_path, "name=parts", *words)
    assert losses(tmp_path, "parts") == losses(tmp_path, "whole")


def test_replaced_weights_are_in_no_checkpoint_no_average_and_no_artifact(tmp_path):
    train(tmp_path, "name=a", *EXPERTS, "trainer.max_steps=4")
    state = saved(tmp_path / "a")
    names = {k.split(".", 1)[1] for k in state["state_dict"] if k.startswith(("denoiser.", "ema."))}
    assert names and not [k for k in names if "blocks." in k and ".mlp." in k]
    trained = sum(len(g["params"]) for g in state["optimizer_states"][0]["param_groups"])
    denoiser = edit.load(tmp_path / "a", trusted=("experts",)).denoiser
    assert trained == len(list(denoiser.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_experts_as_one_process_does(tmp_path, strategy):
    train(tmp_path, "name=one", *EXPERTS, "trainer.max_steps=4")
    two = (f"trainer={strategy}", *TWO_RANKS, "data.batch_size=8", "trainer.max_steps=4")
    train_ranks(tmp_path, "name=two", *EXPERTS, *two, world=2)
    pairs = zip(losses(tmp_path, "one"), losses(tmp_path, "two"), strict=True)
    assert all(abs(float(a) - float(b)) < 2e-5 * float(a) for a, b in pairs)
    one, other = (edit.load(tmp_path / n, trusted=("experts",)).denoiser.state_dict() for n in ("one", "two"))
    assert one.keys() == other.keys()
    assert max((one[k] - other[k]).abs().max().item() for k in one) < 1e-4


def _gathered(apart: bool) -> tuple[float, list[list[bool]]]:
    """The largest difference to the whole model, and which experts are gathered while those of each unit run."""
    torch.distributed.init_process_group("gloo")
    spec = DiTConfig(input_size=8, hidden_size=32, depth=3, num_heads=2, num_classes=10)

    def bare() -> Denoiser:
        return edit.apply(spec.build(), {"experts": Experts(apart=apart)}, fresh=False).eval()

    with torch.no_grad():
        whole = edit.apply(spec.build(), {"experts": Experts(apart=apart)})
        randomise(whole)
        batch = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), Condition(label=torch.tensor([1, 7]))
        mesh = init_device_mesh("cpu", (2,))
        net = shard(bare, whole.state_dict(), torch.device("cpu"), mesh, MixedPrecisionPolicy())
        stacks, seen = list(net.edits["experts"].values()), []
        for stack in stacks:
            stack.router.register_forward_hook(lambda *_: seen.append([not isinstance(s.up, DTensor) for s in stacks]))
        return (net(*batch).sample - whole.eval()(*batch).sample).abs().max().item(), seen


def test_experts_that_are_shards_are_gathered_for_their_own_call_alone():
    for error, seen in run_ranks(_gathered, args=(True,)):
        assert error < 1e-6
        assert seen == [[True, False, False], [False, True, False], [False, False, True]]
    for error, seen in run_ranks(_gathered, args=(False,)):
        assert error < 1e-6 and seen == [[True] * 3] * 3  # with the root, for the whole forward
