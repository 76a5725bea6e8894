"""E-DiT, DyDiT and DyDiT's TD-LoRA as runs: several ranks, a kill, shards, strata of times, frozen weights, reports."""

import hashlib
import json
from functools import cache

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from killed_runs import kill_at
from PIL import Image
from ranks import run_ranks
from small_runs import TWO_RANKS, config, rows, train, train_ranks
from test_tinyfusion_runs import run
from weights import randomise

import edit
from edit import noise
from edit.objectives import FlowMatching, Ramp
from edit.routing.dydit import DyDiT
from edit.routing.elastic import Elastic
from edit.stream import Condition
from edit.tuning.td_lora import TDLoRA
from recipes import stages
from recipes.config.errors import UserError
from recipes.recipe import local
from recipes.report.routing_map import Decisions
from recipes.runtime import callbacks
from recipes.runtime.checkpoint_files import newest
from recipes.steps.diffusion import Diffusion

RATIO = Ramp(0.7, 0.4, begin=0.25, until=0.75)
COMMON = (
    "backbone.patch_size=2",
    "backbone.num_heads=4",
    "optimizer.warmup=0",
    "optimizer.lr=1e-3",
    "sampler.solver.steps=3",
)
# applied to the model that its runs start from, `start`: nothing is repeated, as sharded units do not
ROUTED = Elastic(gate=0.5, width=0.6, width_from=0.5, reduction="batch", router=16, band=-1.0)
ELASTIC = ("init={folder}/start", "+optimizer.groups={edits.elastic: {lr_scale: 2}}")
DYDIT = (
    "edits=dydit",
    "+edits.dydit.bias=-0.03",
    "+edits.dydit.token_bias=-0.3",
    "+edits.dydit.complete=0.5",
    "+edits.dydit.ratio={_target_: edit.objectives.Ramp, start: 0.7, end: 0.4, begin: 0.25, until: 0.75}",
    "strata=4",
    "+optimizer.groups={edits.dydit: {lr_scale: 4}}",
)
TD_LORA = ("edits=[td_lora,dydit]", "+edits.td_lora.rank=2", "+edits.td_lora.experts=2", *DYDIT[1:])
METHODS = {"elastic": ELASTIC, "dydit": DYDIT, "td_lora": TD_LORA}
TWO = (*TWO_RANKS, "data.batch_size=8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One process's uninterrupted run of each, `elastic`, `dydit` and `td_lora`, with three checkpoints."""
    folder = tmp_path_factory.mktemp("routing")
    torch.manual_seed(0)
    start = edit.apply(instantiate(config(folder, *COMMON).backbone).build(), {"elastic": ROUTED})
    randomise(start)
    for p in start.edits.parameters():
        torch.nn.init.normal_(p, std=0.5)  # fresh ones open everything
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


def _trained(folder, overrides, run=train) -> tuple[str, list]:
    """Train: a digest of all weights and averages of this rank, and what the average decided in the last preview, by
    quantity and guidance branch (rank 0 alone draws that)."""
    digest, decided, draw = hashlib.sha256(), [], callbacks.draw

    def ended(self):
        for name, value in self.state_dict().items():
            digest.update(name.encode() + local(value).numpy().tobytes())

    def drawing(maps, *rest):
        decided[:] = shares_of(maps)
        return draw(maps, *rest)

    Diffusion.on_train_end, callbacks.draw = ended, drawing
    run(folder, *overrides)
    return digest.hexdigest(), decided


def shares_of(maps):
    return [[quantity, name, m.shares.tolist()] for quantity, found in maps.items() for name, m in found.items()]


PREVIEWED = ("preview.every=6", "preview.count=4", "sampler.guidance=2.0")


@pytest.fixture(scope="module")
def sharded(folder):
    """A method's name -> what the last preview of its run under FSDP2, `<name>_fsdp2`, decided."""

    @cache
    def made(name):
        words = (f"name={name}_fsdp2", "trainer=fsdp2", *words_of(name, folder), *TWO, *PREVIEWED)
        return run_ranks(_trained, 2, args=(folder, words), timeout=120)[0][1]

    return made


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_ranks_of_elastic_train_as_one_process_with_the_budgets_of_the_global_batch(folder, sharded, strategy):
    if strategy == "fsdp2":
        sharded("elastic")
    else:
        words = ("name=elastic_ddp", "trainer=ddp", *words_of("elastic", folder), *TWO)
        train_ranks(folder, *words, world=2)
    for key in ("loss", "flow", "elastic/gate", "elastic/width", "elastic/p", "elastic/open"):
        # the same samples and noise; the order of fp32 sums differs, which twelve steps of AdamW amplify a little
        assert column(folder, f"elastic_{strategy}", key) == pytest.approx(column(folder, "elastic", key), abs=1e-4), (
            key
        )


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["elastic", "dydit", "td_lora"])
def test_what_a_sharded_run_leaves_decides_in_one_process_as_its_last_preview_did(folder, sharded, name):
    check_decided(folder, f"{name}_fsdp2", sharded(name))


@torch.no_grad()
def check_decided(folder, name, previewed):
    assert (folder / name / "samples/step_000006.png").exists()
    artifact, numbers = edit.load(folder / name), torch.arange(4)
    seen = Decisions(artifact.denoiser)
    artifact.sampler(artifact.denoiser, artifact.objective, Condition(label=numbers), numbers, 0, watch=seen)
    (maps,) = seen.maps().values()
    assert shares_of(maps) == previewed
    shares = {quantity: seen["cond"].shares for quantity, seen in maps.items()}
    assert all(seen.keys() == {"cond", "uncond"} for seen in maps.values())
    for one, other in (("open", "width"), ("groups", "tokens")):
        assert one not in shares or (
            shares[one].mean() < 1 and shares[other].std() > 0
        )  # there was something to decide


@pytest.mark.slow  # DeepSpeed compiles an extension
@pytest.mark.parametrize("name", METHODS)
def test_zero_3_trains_as_one_process_and_leaves_what_its_last_preview_decided(folder, name):
    from cpu_deepspeed import on_the_cpu

    words = (f"name={name}_zero3", "trainer=zero3", *words_of(name, folder), *TWO, *PREVIEWED)
    (_, previewed), _ = run_ranks(_trained_by_zero, 2, args=(folder, words, on_the_cpu), timeout=300)
    check_decided(folder, f"{name}_zero3", previewed)
    # ranks of DyDiT draw for themselves; the complete network, for half of the steps, has no draws of its own
    key, tolerance = ("loss", 1e-3) if name == "elastic" else ("dydit/complete/flow", 0.05)
    steps = slice(None) if name == "elastic" else slice(6)
    one, two = ([float(r[f"train/{key}"]) for r in rows(folder, n)[steps]] for n in (name, f"{name}_zero3"))
    assert two[0] == pytest.approx(one[0], rel=1e-4)  # sums in another order
    assert two == pytest.approx(one, abs=tolerance)  # through AdamW's steps


def _trained_by_zero(folder, overrides, on_the_cpu):
    return _trained(folder, overrides, run=lambda folder, *words: on_the_cpu(folder, 3, words))


# ---- a kill ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["elastic", *(pytest.param(n, marks=pytest.mark.slow) for n in METHODS if n != "elastic")]
)
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


# ---- terms -----------------------------------------------------------------------------------------------------------


def test_terms_that_tap_see_the_chosen_network_beside_the_complete_one(tmp_path):
    """With all open each term and each network's loss is that of a run without routers."""
    train(tmp_path, "name=whole", "trainer.max_steps=2", *COMMON)
    feature = "{_target_: edit.distillation.features.FeatureKD, pairs: [[0, 0], [1, 1]]}"
    output = "{_target_: edit.distillation.output.OutputKD}"
    words = (*COMMON, "trainer.max_steps=1", f"teacher.path={tmp_path}/whole", f"+terms={{f: {feature}, o: {output}}}")
    opened = ("edits=dydit", "+edits.dydit.bias=1e4", "+edits.dydit.token_bias=1e4", "+edits.dydit.order=false")
    train(tmp_path, "name=static", *words)
    train(tmp_path, "name=routed", *words, *opened)
    (static,), (routed,) = rows(tmp_path, "static"), rows(tmp_path, "routed")
    keys = [key for key in static if key.startswith(("train/f/", "train/o/"))]
    assert len(keys) >= 2
    for key in (*keys, "train/flow"):  # factors of 1 beside none: other fp32 sums
        assert float(routed[key]) == pytest.approx(float(static[key]), rel=1e-4) and float(static[key]) > 0, key
    assert float(routed["train/dydit/complete/flow"]) == pytest.approx(float(static["train/flow"]), rel=1e-4)


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
    node = "{_target_: edit.few_step.distribution_matching.DistributionMatching}"
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


# ---- one command -----------------------------------------------------------------------------------------------------

FEW = ("data.batch_size=8", "trainer.max_steps=4", "checkpoint.every=4", "log_every=1", "optimizer.warmup=0")
DIT = (*FEW, "backbone.hidden_size=32", "backbone.num_heads=2")
FLUX = (*FEW, "backbone.num_layers=1", "backbone.num_single_layers=1", "backbone.num_attention_heads=2")
FLUX = (*FLUX, "data.set.count=64", "data.set.held=32")
MEASURED = ("evaluate.n=16", "evaluate.rounds=0", "evaluate.features=none", "sampler.solver.steps=2")
FAST = ("optimizer.groups={edits.elastic: {lr_scale: 1000}}", "edits.elastic.gate.start=0.5")
CLOSING = {  # what fresh routers open, four steps would not close
    "dit_digits/elastic": FAST,
    "dit_digits/dydit": ("edits.dydit.bias=-1",),
    "dit_digits/td_lora": ("edits.dydit.bias=-1",),
    "flux_tiny/elastic": FAST,
    "flux_tiny/dydit": ("+edits.dydit.bias=-0.1", "+edits.dydit.token_bias=-0.1"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "experiment, edits",
    [
        ("dit_digits/elastic", ["elastic"]),
        ("dit_digits/elastic_static", []),
        ("dit_digits/dydit", ["dydit"]),
        ("dit_digits/dydit_dense", []),
        ("dit_digits/td_lora", ["dydit"]),
        ("flux_tiny/elastic", ["elastic"]),
        ("flux_tiny/dydit", ["dydit"]),
    ],
)
def test_one_command_trains_what_is_needed_then_itself_and_reports_what_is_decided(
    tmp_path, monkeypatch, experiment, edits
):
    tiny = FLUX if experiment.startswith("flux") else DIT

    def stage(command, when="before"):
        GlobalHydra.instance().clear()  # that of the command, which has its configuration
        run(*command[1:], *((*tiny, "evaluate=null") if command[1].endswith("train.py") else ()))
        return 0

    monkeypatch.setattr(stages, "_run", stage)
    run("train.py", f"experiment={experiment}", f"runs={tmp_path}", *tiny, *CLOSING.get(experiment, ()), *MEASURED)
    folder = tmp_path / experiment.replace("/", "_")
    found = json.loads((folder / "report.json").read_text())["artifacts"][0]["results"]
    for result in found:
        assert list(result["routing"]) == list(result["routing_maps"]) == edits
        assert ("share" in result["cost"]) == bool(edits)
        for name in edits:
            assert Image.open(folder / result["routing_maps"][name]).width > 100
            assert 0 < result["cost"]["share"] <= 1
            means = [numbers["mean"] for numbers in result["routing"][name].values()]
            assert means and all(0 <= mean <= 1 for mean in means)
    assert len(list(folder.glob("grids/routing_*.png"))) == len(edits) * len(found)
