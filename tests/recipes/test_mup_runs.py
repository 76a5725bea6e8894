"""Runs with muP: what is refused, and that groups and multiplier survive a kill, ranks and compilation."""

import json

import pytest
import torch
from small_runs import config, losses, train, train_ranks

import edit
from edit.scaling.mup import MuP
from recipes.config.check import check_hydra
from recipes.config.errors import UserError
from recipes.models import refuse_erased
from recipes.runtime.checkpoint_files import newest

MUP = ("experiment=dit_digits/mup", "edits.mup.base_width=16", "optimizer.weight_decay=0.01")  # r = 2
TWO_RANKS = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true", "data.batch_size=8")


def groups_of(folder):
    """(rate, decay, number of parameters) of each optimiser group in the last checkpoint."""
    checkpoint = torch.load(newest(folder / "checkpoints"), weights_only=True)
    found = checkpoint["optimizer_states"][0]["param_groups"]
    return [(g["initial_lr"], g["weight_decay"], len(g["params"])) for g in found]


def test_a_run_that_starts_from_weights_is_refused_before_it_begins(tmp_path):
    edits = {"mup": MuP()}
    refuse_erased(None, edits)
    with pytest.raises(UserError, match="edits.mup sets the first values of all parameters, and init=a brings trained"):
        refuse_erased("a", edits)
    train(tmp_path, "name=a", "trainer.max_steps=1")
    with pytest.raises(UserError, match="which would be lost: leave init out"):
        train(tmp_path, "name=b", *MUP, f"init={tmp_path / 'a'}")


def test_the_words_of_a_sweep_may_stand_in_a_file_but_not_change_what_hydra_runs():
    from hydra import compose, initialize_config_dir
    from small_runs import CONFIGS

    from recipes.config.sources import register

    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        cfg = compose("train", ["experiment=dit_digits/mup_sweep"], return_hydra_config=True)
    assert set(cfg.hydra.sweeper.params) == {"edits", "size", "optimizer.lr"}
    assert list(check_hydra(cfg.hydra)) == []
    for word in ("hydra/launcher", "+hydra.callbacks.x"):
        cfg.hydra.sweeper.params = {word: "joblib"}
        assert next(check_hydra(cfg.hydra)).startswith("hydra.sweeper: a configuration may not change")


@pytest.mark.slow
def test_a_run_trains_hidden_matrices_at_their_rate_and_goes_on_bit_equal(tmp_path):
    train(tmp_path, "name=whole", *MUP)
    train(tmp_path, "name=half", *MUP, "trainer.max_steps=12", "checkpoint.every=4")
    cfg = config(tmp_path, "name=whole", *MUP)
    lr, decay = cfg.optimizer.lr, 0.01
    found = groups_of(tmp_path / "whole")
    assert [(a / lr, b / decay) for a, b, _ in found] == [(1.0, 1.0), (0.5, 2.0)]
    for later in sorted((tmp_path / "half/checkpoints").glob("*"))[1:]:
        later.unlink()  # as if it had been killed after the fourth step
    for file in ("artifact",):
        import shutil

        shutil.rmtree(tmp_path / "half" / file)
    train(tmp_path, "name=half", *MUP)
    assert losses(tmp_path, "half") == losses(tmp_path, "whole")
    one, two = (torch.load(newest(tmp_path / n / "checkpoints"), weights_only=True) for n in ("whole", "half"))
    assert groups_of(tmp_path / "half") == found
    for key, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][key]), key
    read = edit.load(tmp_path / "whole").denoiser
    told = json.loads((tmp_path / "whole/artifact/edits.json").read_text())
    assert "mup" in json.dumps(told) and read.ends["output"].factor == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one(trainer, tmp_path):
    train_ranks(tmp_path, "name=one", *MUP)
    train_ranks(tmp_path, "name=two", *MUP, f"trainer={trainer}", *TWO_RANKS, world=2)
    pairs = zip(losses(tmp_path, "one"), losses(tmp_path, "two"), strict=True)
    assert all(float(a) == pytest.approx(float(b), rel=2e-4) for a, b in pairs)  # sums in another order
    a, b = (edit.load(tmp_path / n).denoiser for n in ("one", "two"))
    assert a.ends == b.ends
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_a_compiled_run_trains_as_an_eager_one(tmp_path):
    train(tmp_path, "name=eager", *MUP, "trainer.max_steps=4")
    train(tmp_path, "name=compiled", *MUP, "trainer.max_steps=4", "trainer.compile=true")
    pairs = zip(losses(tmp_path, "eager"), losses(tmp_path, "compiled"), strict=True)
    assert all(float(a) == pytest.approx(float(b), rel=1e-4) for a, b in pairs)


@pytest.mark.slow
def test_the_head_of_a_term_has_its_group(tmp_path):
    terms = "+terms.sra={_target_: edit.alignment.sra.SRA, units: [0, 1]}"
    train(tmp_path, "name=sra", *MUP, terms, "trainer.max_steps=2", "checkpoint.every=2")
    plain = groups_of_without_term(tmp_path)
    with_term = groups_of(tmp_path / "sra")
    assert with_term[1][2] == plain[1][2] + 2  # its two matrices are hidden, their biases are not
    assert with_term[0][2] == plain[0][2] + 2


def groups_of_without_term(tmp_path):
    train(tmp_path, "name=plain", *MUP, "trainer.max_steps=2", "checkpoint.every=2")
    return groups_of(tmp_path / "plain")
