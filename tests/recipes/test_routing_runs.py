"""E-DiT, DyDiT and DyDiT's TD-LoRA as runs: several ranks, a kill, shards, strata of times, frozen weights, reports."""

import hashlib

import pytest
import torch
from hydra.utils import instantiate
from ranks import run_ranks
from small_runs import TWO_RANKS, config, rows, train, train_ranks
from test_resume import kill_at
from test_tinyfusion_runs import forked_stages, run  # noqa: F401 - a fixture
from weights import randomise

import edit
from edit import noise
from edit.denoiser import Condition
from edit.objectives import FlowMatching, Ramp
from edit.routing.dydit import DyDiT
from edit.routing.elastic import Elastic
from edit.tuning.td_lora import TDLoRA
from recipes import callbacks
from recipes.callbacks import newest
from recipes.config import UserError
from recipes.diffusion import Diffusion
from recipes.recipe import local
from recipes.routing_map import Decisions

RATIO = Ramp(1.0, 0.5, begin=0.25, until=0.75)
COMMON = ("backbone.patch_size=2", "optimizer.warmup=0", "optimizer.lr=1e-3", "sampler.solver.steps=3")
# applied to the model that its runs start from, `start`: nothing is repeated, as sharded units do not
ROUTED = Elastic(gate=0.5, width=0.6, width_from=0.5, reduction="batch", router=16, band=-1.0)
ELASTIC = ("init={folder}/start", "+optimizer.groups={edits.elastic: {lr_scale: 2}}")
DYDIT = (
    "edits=dydit",
    "+edits.dydit.bias=0.3",
    "+edits.dydit.token_bias=0.3",
    "+edits.dydit.complete=0.5",
    "+edits.dydit.ratio={_target_: edit.objectives.Ramp, start: 1.0, end: 0.5, begin: 0.25, until: 0.75}",
    "strata=4",
    "+optimizer.groups={edits.dydit: {lr_scale: 10}}",
)
TD_LORA = ("edits=[td_lora,dydit]", "+edits.td_lora.rank=2", "+edits.td_lora.experts=2", *DYDIT[1:])
METHODS = {"elastic": ELASTIC, "dydit": DYDIT, "td_lora": TD_LORA}
TWO = (*TWO_RANKS, "data.batch_size=8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One process's uninterrupted run of each, `elastic`, `dydit` and `td_lora`, with three checkpoints."""
    folder = tmp_path_factory.mktemp("routing")
    start = edit.apply(instantiate(config(folder, *COMMON).backbone).build(), {"elastic": ROUTED})
    randomise(start)
    for router in start.edits["elastic"]:
        for head in (router.gate, router.width):
            torch.nn.init.normal_(head.weight, std=2.0)
            torch.nn.init.zeros_(head.bias)
    edit.save(start, folder / "start")
    for name in METHODS:
        train(folder, f"name={name}", "checkpoint.keep=3", *words_of(name, folder))
    return folder


def words_of(name, folder):
    """Settings of a run; the model that it starts from is below `folder`."""
    return *COMMON, *(word.format(folder=folder) if "{folder}" in word else word for word in METHODS[name])


def state(folder, name, step=12):
    path = folder / name / "checkpoints" / f"step_{step:08d}.ckpt"
    return torch.load(path, weights_only=True)["state_dict"]


def column(folder, name, key):
    return [float(row[f"train/{key}"]) for row in rows(folder, name)]


def test_the_runs_here_decide_both_ways_and_pass_their_phases(folder):
    """What the other tests compare is worth comparing."""
    opened, widths = column(folder, "elastic", "elastic/open"), column(folder, "elastic", "elastic/executed")
    assert any(0 < share < 1 for share in opened)
    assert set(widths[:6]) == {1.0} and column(folder, "elastic", "elastic/width")[:6] == [0.0] * 6
    assert min(widths[6:]) < 1 and min(column(folder, "elastic", "elastic/width")[6:]) > 0
    for name in ("dydit", "td_lora"):
        for quantity in ("heads", "groups", "tokens"):
            assert all(0 < share < 1 for share in column(folder, name, f"dydit/{quantity}"))
        complete = [row.get("train/dydit/complete/flow") for row in rows(folder, name)]
        assert all(complete[:6]) and not any(complete[6:])


# ---- ranks -----------------------------------------------------------------------------------------------------------


def _trained(folder, overrides) -> tuple[str, list]:
    """Train: a digest of all weights and averages of this rank, and what the average decided in the last preview, by
    quantity and guidance branch (rank 0 alone draws that)."""
    digest, decided, draw = hashlib.sha256(), [], callbacks.draw

    def ended(self):
        for name, value in self.state_dict().items():
            digest.update(name.encode() + local(value).numpy().tobytes())

    def drawing(maps, *rest):
        decided[:] = [[q, branch, m.shares.tolist()] for q, found in maps.items() for branch, m in found.items()]
        return draw(maps, *rest)

    Diffusion.on_train_end, callbacks.draw = ended, drawing
    train(folder, *overrides)
    return digest.hexdigest(), decided


@pytest.fixture(scope="module")
def sharded(folder):
    """The same on two ranks under FSDP2, `<name>_fsdp2`: the last preview's decisions, by name."""
    return {name: sharded_run(folder, name) for name in METHODS}


def sharded_run(folder, name):
    told = (
        "preview.every=6",
        "preview.count=2",
        "sampler.guidance=2.0",
        "trainer=fsdp2",
        *words_of(name, folder),
        *TWO,
    )
    return run_ranks(_trained, 2, args=(folder, (f"name={name}_fsdp2", *told)), timeout=120)[0][1]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_of_elastic_train_as_one_process_with_the_budgets_of_the_global_batch(folder, sharded, strategy):
    if strategy == "ddp":
        two = ("name=elastic_ddp", "trainer=ddp", *words_of("elastic", folder), *TWO)
        train_ranks(folder, *two, world=2)
    for key in ("loss", "flow", "elastic/gate", "elastic/width", "elastic/p", "elastic/open"):
        # the same samples and noise; the order of fp32 sums differs, which twelve steps of AdamW amplify a little
        assert column(folder, f"elastic_{strategy}", key) == pytest.approx(column(folder, "elastic", key), abs=1e-4), (
            key
        )


def test_two_ranks_of_dydit_draw_for_themselves_and_keep_one_model_and_one_budget(folder):
    told = ("name=dydit_ddp", "trainer=ddp", *words_of("dydit", folder), *TWO)
    (first, _), (second, _) = run_ranks(_trained, 2, args=(folder, told), timeout=120)
    assert first == second
    ratio, budget = (column(folder, "dydit_ddp", f"dydit/{key}") for key in ("ratio", "budget"))
    wanted = [2 * (r - RATIO(k / 12)) ** 2 for k, r in enumerate(ratio)]  # a budget of each rank's own is larger
    assert budget == pytest.approx(wanted, rel=1e-4, abs=1e-6)  # fp32 differences of numbers near 1
    # the complete network is told nothing that is drawn: before the first step it is that of one process
    one, two = (rows(folder, name)[0] for name in ("dydit", "dydit_ddp"))
    key = "train/dydit/complete/flow"
    assert float(two[key]) == pytest.approx(float(one[key]), rel=1e-5) and two["train/flow"] != one["train/flow"]


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_what_a_sharded_run_leaves_decides_in_one_process_as_its_last_preview_did(folder, sharded, name):
    assert (folder / f"{name}_fsdp2/samples/step_000012.png").exists()
    artifact = edit.load(folder / f"{name}_fsdp2")
    seen = Decisions(artifact.denoiser)
    label = Condition(label=torch.arange(2))
    artifact.sampler(artifact.denoiser, artifact.objective, label, torch.arange(2), 0, watch=seen)
    (maps,) = seen.maps().values()
    alone = [[q, branch, m.shares.tolist()] for q, found in maps.items() for branch, m in found.items()]
    assert {branch for _, branch, _ in alone} == {"cond", "uncond"}
    assert alone == sharded[name]
    shares = torch.tensor([m.shares.mean() for found in maps.values() for m in found.values()])
    assert ((shares > 0) & (shares < 1)).any()


# ---- a kill ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_goes_on_bit_equal_with_its_phases_and_draws(folder, tmp_path, name):
    kill_at(tmp_path, "killed", 6, *words_of(name, folder))
    train_ranks(tmp_path, "name=killed", *words_of(name, folder))
    clock = ("images_per_second", "memory_gb")
    told = [
        [{k: v for k, v in r.items() if k not in clock} for r in rows(f, n)]
        for f, n in ((folder, name), (tmp_path, "killed"))
    ]
    assert told[0] == told[1] and len(told[0]) == 12
    one, two = state(folder, name), torch.load(newest(tmp_path / "killed/checkpoints"), weights_only=True)["state_dict"]
    assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())


# ---- strata of times -------------------------------------------------------------------------------------------------


def times(folder, monkeypatch, name, *words):
    """The uniform numbers behind the times of each batch of a run: steps b."""
    seen, law = [], FlowMatching.times

    def watching(self, u):
        seen.append(u.clone())
        return law(self, u)

    monkeypatch.setattr(FlowMatching, "times", watching)
    train(folder, f"name={name}", "trainer.max_steps=3", *words)
    return torch.stack(seen)


def test_strata_spread_the_times_of_every_batch_over_their_parts(tmp_path, monkeypatch):
    draw = torch.arange(3 * 16)
    plain = noise.uniform(0, draw, noise.TIME).view(3, 16)
    assert torch.equal(times(tmp_path, monkeypatch, "one", "strata=1"), plain)
    four = times(tmp_path, monkeypatch, "four", "strata=4")
    assert torch.equal((4 * four).long(), (draw % 4).view(3, 16))
    torch.testing.assert_close(4 * four % 1, plain, rtol=0, atol=1e-6)  # within a part as without: fp32 of up to 4


def test_strata_are_refused_beside_a_method_that_draws_times_itself(tmp_path):
    node = "{_target_: edit.distillation.distribution_matching.DistributionMatching}"
    with pytest.raises(UserError, match="strata=4 stratifies the times of diffusion training.*leave it out"):
        config(tmp_path, f"matching={node}", "strata=4")


# ---- frozen weights --------------------------------------------------------------------------------------------------


def test_td_lora_leaves_the_model_bit_for_bit_and_trains_all_additions_and_routers(folder, tmp_path):
    train(tmp_path, "name=whole", "trainer.max_steps=2", *COMMON)
    words = (f"init={tmp_path}/whole", *COMMON, *TD_LORA, "checkpoint.keep=3")
    train(tmp_path, "name=tuned", *words)
    edits = {"td_lora": TDLoRA(2, 2), "dydit": DyDiT()}
    fresh = edit.apply(edit.load(tmp_path / "whole").denoiser, edits).state_dict()  # heads and channels in order
    early, late = state(tmp_path, "tuned", 4), state(tmp_path, "tuned")
    for key, value in fresh.items():
        for copy in ("denoiser", "ema"):
            before, after = early[f"{copy}.{key}"], late[f"{copy}.{key}"]
            if ".td_" in key or key.startswith("edits.dydit."):
                assert not torch.equal(before, after), key
            else:
                assert torch.equal(after, value), key
