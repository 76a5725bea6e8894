"""SRA: a shallow unit follows a deeper one of the average, which sees the same sample at less noise."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from families import family, inputs
from killed_runs import kill_at
from probes import small
from self_aligned import gradients, look
from small_runs import TWO_RANKS, config, losses, rows, train, train_ranks
from torch import nn

from edit.alignment.sra import SRA, Decay, cleaner
from edit.measuring.cost import macs
from edit.measuring.flops import Flops
from edit.measuring.turns import calls_of, phases
from edit.objectives import DDPM, FlowMatching
from recipes.config.errors import UserError
from recipes.models import made
from recipes.runtime.checkpoint_files import newest

RUN = "+terms.sra={_target_: edit.alignment.sra.SRA, units: [0, 1]}"
DISTANCES = [{}, {"distance": "cosine"}, {"distance": "cosine", "axis": "tokens"}]


@pytest.mark.parametrize("options", DISTANCES, ids=str)
def test_an_average_that_is_the_student_at_the_same_time_and_unit_has_no_loss_and_no_gradient(options, dit):
    term = SRA((1, 1), offset=0.0, **options)
    loss = term.losses(look(term, dit, deepcopy(dit), own=nn.Identity()))["sra"]
    loss.sum().backward()
    largest = max(p.grad.abs().max() for p in dit.parameters() if p.grad is not None)
    if options:  # a cosine of fp32 is 1 to a few roundings
        assert loss.abs().max() < 1e-6 and largest < 1e-6
    else:
        assert loss.tolist() == [0, 0, 0, 0] and largest == 0


def test_the_average_sees_less_noise_by_a_tenth_in_the_mean_and_never_more():
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    for t in (0.2, 0.6, 1.0):
        apart = t - cleaner(torch.full_like(u, t), u, 0.2, None)
        assert (apart >= 0).all() and (apart <= 0.2 + 1e-6).all()
        assert abs(apart.mean() - 0.1) < 1e-3  # a deviation of 0.2 / sqrt(12 n) = 1.8e-4
    s = cleaner(torch.full_like(u, 0.1), u, 0.2, None)
    assert s.min() == 0 and (s <= 0.1).all()
    assert abs((s == 0).float().mean() - 0.5) < 0.01


def test_steps_of_ddpm_are_whole_up_to_199_lower_and_kept_above_the_first():
    i = torch.tensor([999.0, 500, 150, 1, 0])
    t = (i + 1) / 1000
    for u, expected in ((0.0, [999, 500, 150, 1, 1]), (0.5, [899, 400, 50, 1, 1]), (0.99999, [800, 301, 1, 1, 1])):
        s = cleaner(t, torch.full_like(t, u), 0.2, 1000)
        assert DDPM().index(s).tolist() == expected


class Recorded:
    """`Seen.tapped_average` of a model that keeps what it is asked."""

    def __init__(self, answer):
        self.answer, self.given = answer, []

    def __call__(self, x_t, t, condition, taps):
        self.given.append((x_t, t, condition, taps))
        return self.answer(x_t, t, condition, taps)


@pytest.mark.parametrize("objective", [FlowMatching(), DDPM()], ids=["flow", "ddpm"])
def test_the_average_sees_the_same_sample_noise_and_dropped_condition_at_its_own_time(objective, make_dit):
    dit = make_dit(time="ddpm" if isinstance(objective, DDPM) else "flow")
    term, drop = SRA((0, 2)), torch.tensor([True, False, False, True])
    seen = look(term, dit, objective=objective, drop=drop)
    recorded = Recorded(seen.tapped_average)
    term.losses(replace(seen, tapped_average=recorded))
    ((x_s, s, condition, taps),) = recorded.given
    assert condition is seen.condition and condition.label[0] == 10 and taps == (2,)
    assert (s <= seen.t).all() and (s < seen.t).any()
    torch.testing.assert_close(x_s, objective.corrupt(seen.x, seen.noise, s), rtol=0, atol=0)
    a, b = (
        objective.corrupt(one, other, s) for one, other in ((torch.ones_like(x_s), 0 * x_s), (0 * x_s, x_s * 0 + 1))
    )
    torch.testing.assert_close((x_s - a * seen.x) / b, seen.noise, rtol=1e-3, atol=1e-3)  # division by small b
    assert not torch.equal(seen.draws.uniform(0), seen.draws.of("other").uniform(0))


def test_at_the_end_of_the_path_the_average_sees_the_data_themselves(dit):
    term = SRA((0, 1), offset=1.0)
    seen = look(term, dit, t=torch.full((4,), 1e-3))
    recorded = Recorded(seen.tapped_average)
    term.losses(replace(seen, tapped_average=recorded))
    x_s, s, *_ = recorded.given[0]
    at = s == 0
    assert at.any() and torch.equal(x_s[at], seen.x[at])


def test_gradients_end_at_the_students_unit_and_never_reach_the_average(make_dit):
    student, average = make_dit(depth=4), make_dit(1, depth=4)
    term = SRA((1, 3))
    seen = look(term, student, average)
    term.losses(seen)["sra"].sum().backward()
    assert all(p.grad is None for p in average.parameters())
    found = gradients(student)
    blocks = {name.split(".")[2] for name in found if ".blocks." in name}
    assert blocks == {"0", "1"} and not [name for name in found if "final_layer" in name]
    assert len(gradients(seen.own)) == 4  # weights and biases of both layers


@pytest.mark.parametrize("name", ["dit swiglu", "flux", "sd3", "wan"])
def test_the_average_stops_behind_its_unit_with_the_tokens_of_the_whole_forward(name):
    model = family(name)
    ran = []
    for i, unit in enumerate(model.units):
        unit.register_forward_hook(lambda *_, i=i: ran.append(i))
    with torch.no_grad():
        whole = model(*inputs(model), taps=(0, 1)).trace
        ran.clear()
        found = model.tapped(*inputs(model), (0, 1))
    assert ran == [0, 1] and {"unit.0", "unit.1"} <= found.keys()
    assert all(torch.equal(found[k], whole[k]) for k in found)


def test_stopping_saves_the_units_behind_and_the_readout(make_dit):
    model = make_dit(depth=8)
    x, t, condition = inputs(model, 1)
    with torch.no_grad(), Flops() as part:
        model.tapped(x.float(), t.float(), condition, (4,))
    assert 0.55 < part.total / 2 / macs(model) < 0.64  # 5 of 8 units, with the embedders and without the last layer
    probe = small(taps=(1,))  # 6 units
    with torch.device("meta"):
        own = SRA((1, 3)).build(probe.denoiser)
    (turn,) = phases({"sra": SRA((1, 3))}, probe, None, {"sra": own}, 1, 10, False)
    assert calls_of((turn,)) == {"student": {"weights": 1.0, "nothing": 4 / 6}}


def test_the_weight_falls_tenfold_in_a_thousand_epochs_after_149():
    term, epoch = SRA((0, 1)), 5004
    assert term.strength(0) == term.strength(149 * epoch) == 0.2
    assert term.strength(149 * epoch + epoch - 1) == 0.2  # by whole epochs, as the release
    assert term.strength(1149 * epoch) == pytest.approx(0.02)
    assert term.strength(800 * epoch) == pytest.approx(2 * 0.1 ** (1 + 651 / 1000))
    assert Decay(hold=99, tenfold=800)(899 * epoch) == pytest.approx(0.02)
    assert SRA((0, 1), distance="cosine").strength(10**7) == 0.5 and SRA((0, 1), weight=0.3).strength(10**7) == 0.3


def test_the_weight_is_that_of_the_optimiser_step(dit):
    term = SRA((0, 1), weight=Decay(hold=1, tenfold=1, epoch=10))
    seen = look(term, dit)
    early, late = (term.losses(replace(seen, step=step))["sra"] for step in (19, 30))
    torch.testing.assert_close(late, early / 100)


def test_smooth_l1_is_square_below_beta_and_linear_above():
    r = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for delta, expected in ((0.1, 0.075), (0.04, 0.04**2 / 0.1), (-0.1, 0.075)):
        found = SRA((0, 1)).compare(r + delta, r)
        torch.testing.assert_close(found, torch.full((3,), expected, dtype=torch.float64))


def test_the_cosine_over_tokens_ignores_scales_of_channels_and_the_one_over_channels_those_of_tokens():
    g = torch.Generator().manual_seed(0)
    r = torch.randn(2, 5, 7, generator=g, dtype=torch.float64)
    by_channel, by_token = (0.5 + torch.rand(n, generator=g, dtype=torch.float64) for n in (7, 5))
    channels, tokens = (SRA((0, 1), distance="cosine", axis=axis).compare for axis in ("channels", "tokens"))
    assert tokens(r * by_channel, r).abs().max() < 1e-12 and channels(r * by_channel, r).min() > 1e-3
    assert channels(r * by_token[:, None], r).abs().max() < 1e-12 and tokens(r * by_token[:, None], r).min() > 1e-3
    torch.testing.assert_close(tokens(-r, r), torch.full((2,), 2.0, dtype=torch.float64))
    assert F.cosine_similarity(r, r).shape == (2, 7)  # the release's default axis


@pytest.mark.parametrize(
    "options, words",
    [
        ({"units": (2, 1)}, "no shallower"),
        ({"units": (0,)}, "units are two"),
        ({"units": (-1, 1)}, "counted from 0"),
        ({"units": (0, 1), "distance": "l2"}, "smooth_l1 or cosine"),
        ({"units": (0, 1), "axis": "rows"}, "channels or tokens"),
        ({"units": (0, 1), "offset": 1.5}, "at most 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        SRA(**options)


def test_units_that_the_model_has_not_are_refused(dit):
    with pytest.raises(ValueError, match="this dit has units 0 to 2, got 7"):
        SRA((0, 7)).build(dit)


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with SRA."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder, "name=sra", RUN, "ema.decay=0.9999", "ema.ramp=false", "trainer.max_steps=1", "checkpoint.every=1")
    return folder


def state(folder, name):
    return torch.load(newest(folder / name / "checkpoints"), weights_only=True)["state_dict"]


def test_the_average_follows_by_a_ten_thousandth_and_the_head_is_trained_without_one(folder):
    torch.manual_seed(0)
    start = made(config(folder, "name=sra").backbone).build().state_dict()
    found = state(folder, "sra")
    moved = 0.0
    for key, before in start.items():
        after = found[f"denoiser.{key}"]
        torch.testing.assert_close(found[f"ema.{key}"], 0.9999 * before + 0.0001 * after, rtol=1e-6, atol=1e-9)
        moved += (after - before).abs().sum().item()
    assert moved > 0
    assert [k for k in found if k.startswith("own.sra.")] and not [
        k for k in found if k.startswith("ema.") and "sra" in k
    ]


@pytest.mark.slow
def test_a_weight_of_zero_is_training_without_the_term_to_the_bit(tmp_path):
    for name, words in (("none", ()), ("zero", (RUN, "+terms.sra.weight=0.0"))):
        train(tmp_path, f"name={name}", *words, "trainer.max_steps=4")
    assert losses(tmp_path, "zero") == losses(tmp_path, "none")
    zero, none = (state(tmp_path, name) for name in ("zero", "none"))
    assert all(torch.equal(zero[k], v) for k, v in none.items() if k.startswith(("denoiser.", "ema.")))


def test_a_run_without_an_average_is_refused(tmp_path):
    with pytest.raises(UserError, match="terms.sra learns from the moving average, and with ema.decay=0"):
        train(tmp_path, "name=a", RUN, "ema.decay=0")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one_and_go_on_where_they_were_killed(tmp_path, strategy):
    train(tmp_path, "name=one", RUN)
    two = (RUN, f"trainer={strategy}", *TWO_RANKS, "data.batch_size=8")
    train_ranks(tmp_path, "name=two", *two, world=2)
    for key in ("train/loss", "train/sra/sra"):
        one, other = ([float(r[key]) for r in rows(tmp_path, name)] for name in ("one", "two"))
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0, atol=2e-5)
    kill_at(tmp_path, "killed", 5, *two, world=2)
    train_ranks(tmp_path, "name=killed", *two, world=2)
    assert losses(tmp_path, "killed") == losses(tmp_path, "two")
