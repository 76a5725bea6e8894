import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import train
from torch import Tensor, nn

import edit
from edit.caching.reuse import Reuse
from edit.denoiser import Denoiser, Edit
from edit.measuring.cost import count_generation, twin
from edit.objectives import FlowMatching
from edit.routing.batches import run_grouped
from edit.routing.dydit import DyDiT
from edit.routing.elastic import Elastic
from edit.routing.elastic_routers import ElasticRouters, Router, forced
from edit.sampling import Sampler
from edit.solvers import Euler, Heun
from edit.stream import Condition, Stream
from recipes.config.schema import Evaluation
from recipes.report.drawing import spaced
from recipes.report.evaluate import run
from recipes.report.routing_map import Decisions, Map, _folded, draw, groups, numbers, side_by_side

DIGITS = {"_target_": "data.sets.digits.Digits"}


@dataclass
class Parity(Edit):
    """Unit u is skipped early (t > 0.5) by samples whose label and u are not both even or both odd.

    With `tokens`, the first half of a sample's tokens is changed by unit 0 alone.
    """

    tokens: bool = False
    adaptive = True

    def apply(self, denoiser: Denoiser) -> None:
        denoiser.units = [Even(unit, u, self.tokens) for u, unit in enumerate(denoiser.units)]
        self.depth = len(denoiser.units)

    def embed(self, stream: Stream, t: Tensor, condition: Condition, own: nn.Module | None) -> Stream:
        assert condition.label is not None
        units = torch.arange(self.depth, device=t.device)[:, None]
        open_ = ((condition.label + units) % 2 == 0) | (t <= 0.5)
        stream = stream.record("parity.open", open_)
        n = stream.image.shape[1]
        late = torch.arange(n, device=t.device) >= n // 2
        return stream.record("parity.tokens", (late | (units == 0))[:, None].expand(-1, len(t), -1))

    def decisions(self, trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {"open": trace["parity.open"]}
        return found | {"tokens": trace["parity.tokens"]} if self.tokens else found


class Even:
    def __init__(self, unit: Any, index: int, tokens: bool):
        self.unit, self.index, self.tokens = unit, index, tokens

    def __call__(self, stream: Stream) -> Stream:
        mask = stream.trace["parity.open"][self.index]
        keys = [True] * len(mask) if mask.is_meta else [kept or None for kept in mask.tolist()]
        after = run_grouped(stream, keys, lambda _, some: self.unit(some))
        if not self.tokens:
            return after
        return replace(
            after, image=torch.where(stream.trace["parity.tokens"][self.index, ..., None], after.image, stream.image)
        )


@pytest.fixture
def parity(make_dit) -> Denoiser:
    """Three units; labels are those of ten classes and, of the unconditional branch, 10, which is even."""
    return edit.apply(make_dit(in_channels=1, patch_size=4), {"parity": Parity()})


def labels(numbers: Tensor) -> Condition:
    return Condition(label=numbers % 10)


def watched(denoiser: Denoiser, sampler: Sampler, count: int, batch: int) -> dict:
    seen = Decisions(denoiser)
    for part in torch.arange(count).split(batch):
        sampler(denoiser, FlowMatching(), labels(part), part, watch=seen)
    return seen.maps()


EARLY = {0: [1.0, 0.0, 1.0], 1: [0.0, 1.0, 0.0]}  # what a sample of even or odd label runs of three units


def test_what_a_generation_decides_is_found_by_quantity_branch_step_unit_and_sample(parity):
    sampler = Sampler(Euler(4), guidance=2.0)  # at times 1, 0.75, 0.5 and 0.25
    maps = watched(parity, sampler, 5, batch=2)
    open_ = maps["parity"]["open"]
    assert set(maps) == {"parity"} and set(maps["parity"]) == {"open"} and list(open_) == ["cond", "uncond"]
    for name, parities in (("cond", [0, 1, 0, 1, 0]), ("uncond", [0] * 5)):
        seen = open_[name]
        assert list(seen.times.values()) == [1.0, 0.75, 0.5, 0.25] and seen.tokens is None
        early = torch.tensor([EARLY[p] for p in parities]).T  # u b
        assert torch.equal(seen.shares, torch.stack([early, early, torch.ones(3, 5), torch.ones(3, 5)]))


def test_evaluations_at_one_time_and_branches_of_part_of_a_generation_stay_apart(parity):
    sampler = Sampler(Heun(2), guidance=2.0, interval=(0.0, 0.6))  # at 1, 0.5 and, for the second step, 0.5
    maps = watched(parity, sampler, 2, batch=2)
    open_ = maps["parity"]["open"]
    assert dict(open_["cond"].times) == {0: 1.0, 1: 0.5, 2: 0.5} and dict(open_["uncond"].times) == {1: 0.5, 2: 0.5}
    found = numbers(maps["parity"])["open"]
    assert found["branches"]["uncond"]["mean"] == 1.0  # late alone
    assert found["mean"] == pytest.approx((0.5 + 1 + 1) / 3)  # evaluations count alike, however many branches they have


def test_chosen_tokens_are_kept_of_a_few_samples_and_their_shares_of_all(make_dit):
    denoiser = edit.apply(make_dit(in_channels=1, patch_size=2), {"parity": Parity(tokens=True)})  # 4 x 4 tokens
    maps = watched(denoiser, Sampler(Euler(2)), 7, batch=3)
    tokens = maps["parity"]["tokens"]["cond"]
    assert tokens.tokens is not None and tokens.tokens.shape == (2, 4, 16) and tokens.shares.shape == (2, 3, 7)
    torch.testing.assert_close(tokens.tokens[1, 3], torch.tensor([1 / 3] * 8 + [1.0] * 8))  # unit 0 changes all
    assert torch.equal(tokens.shares[0], torch.tensor([1.0, 0.5, 0.5])[:, None].expand(3, 7))


def test_numbers_tell_variance_between_samples_from_variance_between_timesteps():
    by_sample = torch.tensor([0.0, 1.0]).expand(4, 3, 2)
    by_time = torch.tensor([0.0, 1.0, 1.0, 1.0])[:, None, None].expand(4, 3, 2)
    times = {i: 1 - i / 4 for i in range(4)}
    found = numbers({"a": {"cond": Map(times, by_sample)}, "b": {"cond": Map(times, by_time)}})
    assert found["a"]["mean"] == 0.5 and found["a"]["units"] == [0.5] * 3
    assert (found["a"]["std_samples"], found["a"]["std_timesteps"]) == (0.5, 0.0)
    assert found["b"]["std_samples"] == 0.0 and found["b"]["std_timesteps"] == pytest.approx(0.75**0.5 / 2)
    assert found["b"]["branches"]["cond"]["std_timesteps"] == found["b"]["std_timesteps"]
    json.dumps(numbers({"a": {"cond": Map({0: 1.0}, torch.ones(1, 1, 1))}}), allow_nan=False)  # one of each


def test_small_maps_are_of_classes_or_prompts_evenly_from_all():
    found = groups(torch.arange(40) % 20, [], None)
    assert list(found) == [f"class {c}" for c in (0, 2, 4, 6, 8, 11, 13, 15, 17, 19)] and found["class 4"] == [4, 24]
    assert groups(torch.tensor([1, 0]), [], ["cat", "dog"]) == {"dog": [0], "cat": [1]}
    found = groups(None, ["a", "b", "a", *"cdefg"])
    assert found == {"a": [0, 2], "b": [1], "c": [3], "e": [5], "f": [6], "g": [7]}


def test_frames_of_tokens_lie_side_by_side():
    assert side_by_side(torch.arange(12), (2, 2, 3)).tolist() == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]


def test_steps_and_classes_are_shown_evenly():
    assert spaced(50, 3) == [0, 24, 49] and spaced(2, 8) == [0, 1] and spaced(1, 8) == [0]


def test_small_maps_are_drawn_where_there_are_several_classes_and_long_prompts_are_folded():
    seen = {"open": {"cond": Map({0: 1.0}, torch.ones(1, 2, 3))}}
    one = draw(seen, {"class 0": [0, 1, 2]})
    assert draw(seen, {"class 0": [0], "class 1": [1, 2]}).height > one.height
    assert _folded("a small purple square left of a large yellow triangle", 6).count("\n") == 2
    assert _folded("word " * 40, 6).endswith("…") and _folded("", 3) == ""


def test_maps_say_in_plain_words_what_is_shared(monkeypatch):
    said = []
    monkeypatch.setattr("matplotlib.figure.SubFigure.suptitle", lambda self, text, **_: said.append(text))
    maps = {name: {"cond": Map({0: 1.0}, torch.ones(1, 2, 3))} for name in ("heads", "odd")}
    draw(maps, {"class 0": [0]}, decides=DyDiT.decides)
    assert said == ["Share of attention heads that were run", "Share of odd, as the edit tells it"]


@pytest.mark.parametrize(
    ("kind", "told"),
    [(Elastic, {"open", "width", "cached"}), (DyDiT, {"heads", "groups", "tokens"}), (Reuse, {"executed"})],
)
def test_edits_say_what_each_of_their_decisions_is_a_share_of(make_dit, kind, told):
    denoiser = edit.apply(make_dit(in_channels=1, patch_size=4), {"it": kind()})
    maps = watched(denoiser, Sampler(Euler(2)), 2, batch=2)
    assert set(maps["it"]) <= told == set(kind.decides)


def test_a_picture_shows_each_share_in_its_place_and_the_image_beside_its_tokens():
    times = {i: 1 - i / 2 for i in range(2)}
    shares = torch.tensor([[0.0, 1.0], [1.0, 1.0]])[..., None].expand(2, 2, 3)  # unit 0 is closed at first
    red = np.full((8, 8, 3), (255, 0, 0), np.uint8)
    plain = draw({"open": {"cond": Map(times, shares)}}, {"class 0": [0, 1, 2]})
    dark = np.array([68, 1, 84])  # viridis at 0

    def area(image: Image.Image, colour: Any, what: slice = slice(None)) -> int:
        return int((np.asarray(image)[what] == np.array(colour)).all(-1).sum())

    pixels = np.asarray(plain)
    places = np.argwhere((pixels == dark).all(-1) & (np.arange(pixels.shape[1]) < pixels.shape[1] * 0.8)[:, None].T)
    assert places[:, 1].max() < pixels.shape[1] / 2 and places[:, 0].max() < pixels.shape[0] * 0.55  # top left
    tokens = Map(times, shares, torch.ones(2, 1, 16), (1, 4, 4))
    both = draw({"tokens": {"cond": tokens}}, {"class 0": [0]}, lambda k: red)
    assert both.height > plain.height and area(both, (255, 0, 0)) > 1000 and area(plain, (255, 0, 0)) == 0
    assert draw({"tokens": {"cond": tokens}}, {"class 0": [0]}).size == both.size  # where nothing can be looked at


# ---- reports --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(make_dit, tmp_path_factory) -> tuple[Path, dict]:
    """Of an untrained digit model that decides by label and time."""
    folder = tmp_path_factory.mktemp("parity")
    denoiser = edit.apply(make_dit(in_channels=1, patch_size=4), {"parity": Parity()})
    edit.save(denoiser, folder / "run" / "artifact", sampler=Sampler(Euler(4)), data=DIGITS)
    words = {"n": 20, "guidance": [1.0, 2.0], "rounds": 0, "features": "none", "device": "cpu", "trusted": [__name__]}
    run([folder / "run"], Evaluation.of(words), folder / "out")
    return folder / "out", json.loads((folder / "out" / "report.json").read_text())


def test_a_report_holds_the_numbers_and_shows_the_map_of_each_guidance_weight(report):
    folder, found = report
    page = (folder / "report.html").read_text()
    assert page.count("<h2>Routing</h2>") == 1
    for result in found["artifacts"][0]["results"]:
        open_ = result["routing"]["parity"]["open"]
        cond = open_["branches"]["cond"]  # half of the samples run 2 of 3 units early, the others 1; all late
        assert cond["mean"] == pytest.approx(0.75) and cond["units"] == pytest.approx([0.75] * 3)
        assert cond["std_samples"] == pytest.approx(1 / 12) and cond["std_timesteps"] == pytest.approx(0.25)
        assert ("uncond" in open_["branches"]) == (result["guidance"] != 1)
        file = result["routing_maps"]["parity"]
        assert file == f"grids/routing_run_w{result['guidance']:g}_parity.png"
        assert Image.open(folder / file).format == "PNG"
        assert f"run w={result['guidance']:g}, parity: open {open_['mean']:.1%}" in page
    assert "between samples" in page and "between timesteps" in page


def test_macs_are_means_over_real_images_of_all_kinds_and_not_those_of_one_label(report, parity):
    _, found = report
    plain, guided = (r["cost"] for r in found["artifacts"][0]["results"])
    sampler = Sampler(Euler(4))

    def one(label: int) -> int:
        return count_generation(parity, sampler, FlowMatching(), Condition(label=torch.tensor([label])), 1).macs

    even, odd = one(0), one(1)
    assert even > odd and plain["counted"] == 20
    assert plain["macs_per_image"] == (even + odd) / 2 and plain["macs"] == pytest.approx(plain["macs_per_image"] / 4)
    assert guided["macs_per_image"] == (even + odd) / 2 + even  # the null label, 10, is even
    unit = (even - odd) / 2  # at two early evaluations even labels run one unit more
    assert plain["share"] == pytest.approx(plain["macs_per_image"] / (plain["macs_per_image"] + 2 * 1.5 * unit))
    assert "first 20 images" in (report[0] / "report.html").read_text()


def test_the_macs_of_elastic_are_what_its_map_says(make_dit, tmp_path):
    denoiser = edit.apply(make_dit(in_channels=1, patch_size=4), {"elastic": Elastic(width=None, band=-1.0)})
    routers = denoiser.edits["elastic"]
    assert isinstance(routers, ElasticRouters)
    for router in routers:
        assert isinstance(router, Router)
        nn.init.normal_(router.gate.weight, std=0.3)  # some units open for some samples
        nn.init.zeros_(router.gate.bias)
    edit.save(denoiser, tmp_path / "run", sampler=Sampler(Euler(4)), data=DIGITS)
    words = {"n": 20, "guidance": 1.0, "rounds": 0, "features": "none", "device": "cpu"}
    result = run([tmp_path / "run"], Evaluation.of(words), tmp_path / "out")["artifacts"][0]["results"][0]
    found, cost = result["routing"]["elastic"], result["cost"]
    assert set(found) == {"open", "width"}  # none may repeat anything
    assert 0 < found["open"]["mean"] < 1 and found["open"]["std_samples"] > 0

    def all_at(width: int) -> float:
        with forced(denoiser, lambda i, p, q: torch.full_like(p, width)):
            return count_generation(denoiser, Sampler(Euler(4)), FlowMatching(), labels(torch.arange(1)), 1).macs

    none, dense = all_at(0), all_at(4)  # units are alike, so each open one costs as much
    assert cost["macs_per_image"] == pytest.approx(none + found["open"]["mean"] * (dense - none), abs=1)  # rounded
    bare = twin(denoiser, adaptive=False)  # without routers, too
    bare = count_generation(bare, Sampler(Euler(4)), FlowMatching(), labels(torch.arange(1)), 1).macs
    assert bare < dense and cost["share"] == pytest.approx(cost["macs_per_image"] / bare, rel=1e-6)  # fp32 means
    assert cost["training_flops"] == round(6 * bare / 4) and cost["activated"] is cost["forward"] is None


@dataclass
class Silent(Parity):
    """Does as much and tells nothing."""

    decisions = Edit.decisions


@dataclass
class Told(Parity):
    """Tells, and says that its work is the same for all."""

    adaptive = False


@pytest.mark.parametrize("make, counted, drawn", [(Silent, True, False), (Told, False, True)])
def test_costs_are_counted_on_real_images_where_work_differs_and_drawn_is_who_tells(
    make_dit, tmp_path, make, counted, drawn
):
    denoiser = edit.apply(make_dit(in_channels=1, patch_size=4), {"it": make()})
    edit.save(denoiser, tmp_path / "run", sampler=Sampler(Euler(2)), data=DIGITS)
    words = {"n": 8, "guidance": 1.0, "rounds": 0, "features": "none", "device": "cpu", "trusted": [__name__]}
    result = run([tmp_path / "run"], Evaluation.of(words), tmp_path / "out")["artifacts"][0]["results"][0]
    assert (result["cost"].get("counted") == 8) == ("share" in result["cost"]) == counted
    assert bool(result["routing"]) == bool(result["routing_maps"]) == drawn
    assert (len(twin(denoiser, adaptive=False).applied) == 0) == counted


def test_a_model_without_deciding_edits_has_no_maps_and_its_costs_as_ever(make_dit, tmp_path, capsys):
    edit.save(make_dit(in_channels=1, patch_size=4), tmp_path / "run", sampler=Sampler(Euler(1)), data=DIGITS)
    words = {"n": 8, "guidance": 1.0, "rounds": 0, "features": "none", "device": "cpu"}
    result = run([tmp_path / "run"], Evaluation.of(words), tmp_path / "out")["artifacts"][0]["results"][0]
    assert result["routing"] == result["routing_maps"] == {} and "share" not in result["cost"]
    assert "Routing" not in (tmp_path / "out" / "report.html").read_text()
    assert "decisions" not in capsys.readouterr().out


# ---- previews -------------------------------------------------------------------------------------------------------

PREVIEWED = ("preview.every=2", "preview.count=12", "sampler.solver.steps=2", "trainer.max_steps=2")


def test_previews_draw_what_the_average_decides_and_loggers_get_it(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    node = f"+edits.parity._target_={__name__}.Parity"
    train(
        tmp_path, "name=a", "logger=tensorboard", node, "+edits.parity.tokens=true", f"trusted=[{__name__}]", *PREVIEWED
    )
    files = sorted(p.name for p in (tmp_path / "a" / "samples").iterdir())
    assert files == ["routing_parity_000002.png", "step_000002.png"]
    assert Image.open(tmp_path / "a/samples/step_000002.png").size == (418, 97)  # 82 without the classes above it
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["images"]) == {"samples", "routing/parity"}
