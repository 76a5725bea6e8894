"""Runs of DiT-MoE: two ranks train as one process does, with the balance of the global batch."""

import pytest
from ranks import run_ranks
from small_runs import TWO_RANKS, rows, train, train_ranks

import edit
from edit.artifacts.card import Card, Licence

MOE = ("edits=dit_moe", "edits.dit_moe.experts=4", "edits.dit_moe.alpha=0.5", "trainer.max_steps=4")
TWO = (*TWO_RANKS, "data.batch_size=8", "trainer.max_steps=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One process's run, the whole batch in one."""
    folder = tmp_path_factory.mktemp("moe")
    train(folder, "name=one", *MOE)
    return folder


def column(folder, name, key):
    return [float(row[f"train/{key}"]) for row in rows(folder, name)]


def check_equal(folder, name, tolerance=1e-4):
    for key in ("loss", "flow", "dit_moe/balance"):
        assert column(folder, name, key) == pytest.approx(column(folder, "one", key), rel=tolerance), key
    one, other = (edit.load(folder / n).denoiser.state_dict() for n in ("one", name))
    assert one.keys() == other.keys()
    assert max((one[k] - other[k]).abs().max().item() for k in one) < 5 * tolerance


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_two_ranks_train_experts_and_their_balance_as_one_process_does(folder, strategy):
    """The balance loss is a product of means over the batch: means of each rank's own would be another loss."""
    train_ranks(folder, f"name={strategy}", f"trainer={strategy}", *MOE, *TWO, world=2)
    check_equal(folder, strategy)


@pytest.mark.slow  # DeepSpeed compiles an extension
def test_zero_3_gathers_stacked_experts_whole_and_trains_them_as_one_process_does(folder):
    from cpu_deepspeed import on_the_cpu

    run_ranks(on_the_cpu, 2, args=(folder, 3, ("name=zero3", "trainer=zero3", *MOE, *TWO)), timeout=300)
    check_equal(folder, "zero3", 1e-3)


def test_accumulated_and_checkpointed_it_trains_all_the_same(folder):
    train(folder, "name=parts", *MOE, "data.batch_size=8", "trainer.accumulate=2")
    assert column(folder, "parts", "flow") == pytest.approx(column(folder, "one", "flow"), rel=1e-2)
    train(folder, "name=again", *MOE, "trainer.gradient_checkpointing=true")
    check_equal(folder, "again", 1e-6)


def test_a_saved_model_loads_and_its_card_tells_both_sizes(folder):
    artifact = edit.load(folder / "one")
    assert list(artifact.denoiser.applied) == ["dit_moe"]
    parameters = [*artifact.denoiser.parameters()]
    count, routed = sum(p.numel() for p in parameters), 2 * 4 * 3 * 32 * 128
    told = Card("a", artifact, "", "finetune", [], [], None, Licence()).summary()
    assert f"{count:,}" in told and f"({count - routed // 2:,} of them activated per token)" in told
    assert all(p.isfinite().all() for p in parameters)
