"""Stored features of a teacher: its answers at every evaluation of its own path, as a rollout would get them live."""

import pytest
import torch
from test_trajectories import PROMPTS, SCALE, SHIFT, made, teacher  # noqa: F401 - fixtures

import edit
from data.sets.latents import Latents
from edit.sampling import Sampler
from edit.solvers import Euler
from edit.stream import Condition
from recipes.steps.rollout import stored_answer

TAPS = (0, -1)


@pytest.fixture(scope="module")
def stored(made):  # noqa: F811
    return Latents(str(made("features", taps=TAPS, dtype="float32")), features=True)


def batch_of(data: Latents) -> dict[str, torch.Tensor]:
    samples = [data.train().sample(k, 100 + k) for k in range(len(PROMPTS))]
    return {name: torch.stack([s[name] for s in samples]) for name in samples[0]}


def test_stored_answers_are_those_of_the_teacher_walked_live(stored, teacher):  # noqa: F811
    batch, artifact = batch_of(stored), edit.load(teacher)
    told = Condition(**{k: batch[k] for k in ("text", "text_mask", "pooled")})
    null = Condition(**{k: v[None] for k, v in stored.null.items()})
    sampler = Sampler(Euler(4, shift=SHIFT), SCALE)
    walk = sampler.walk(artifact.denoiser, artifact.objective, told, batch["number"], stored.stored["seed"], null)
    with torch.no_grad():
        for moment in walk:
            outputs = {}
            prediction = moment.ask(dense=True, taps=TAPS, look=outputs.__setitem__)
            answer = stored_answer(batch, moment.step.index, (0, 1), torch.device("cpu"))
            torch.testing.assert_close(answer.prediction, prediction)
            for unit in (0, 1):
                live = torch.cat([out.trace[f"unit.{unit}"] for out in outputs.values()])
                torch.testing.assert_close(answer.record(f"unit.{unit}"), live)
            moment.give(prediction)
    torch.testing.assert_close(walk.x, batch["x"])
    assert stored.stored["taps"] == [0, 1] and stored.stored["evaluations"] == pytest.approx(walk.times[:-1])


def test_features_change_no_sample(stored, made):  # noqa: F811
    plain = Latents(str(made("plain", dtype="float32")))
    for k in range(len(PROMPTS)):
        torch.testing.assert_close(plain.train().sample(k, k)["x"], stored.train().sample(k, k)["x"], rtol=0, atol=1e-6)
    assert set(plain.train().sample(0, 0)) == {"x", "text", "text_mask", "pooled"}
    with pytest.raises(ValueError, match="has no features, which data.generate stores with taps="):
        Latents(str(plain.path), features=True)


def test_the_forecast_counts_the_features_and_a_unit_that_is_not_there_is_refused(made):  # noqa: F811
    said = []
    for name, taps in (("without", ()), ("with", (0,))):
        made(f"forecast_{name}", said.append, taps=taps, dtype="float32")
    sizes = [s.split("at most ")[1].split(" (")[0] for s in said if "at most" in s]
    assert sizes[0] != sizes[1]
    with pytest.raises(ValueError, match="taps: the teacher has units 0 to 1, got 2"):
        made("refused", taps=(2,))


def test_a_member_of_another_size_is_damage(stored):
    from data.sets.latents import misfits

    described = {**stored.manifest, "generated": {**stored.stored, "tokens": [3, 5]}}
    assert "tap0.npy has" in str(next(misfits(stored.train().tars, described)))
