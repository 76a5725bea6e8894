"""Stored paths of a teacher: what training reads is how the samples were made, from the first noise on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from views import Models, view
from weights import randomise

import edit
from data.loader import EndlessLoader
from data.making.generator import generate
from data.making.precomputer import precompute
from data.making.request import Request
from data.sets.latents import Latents
from edit.backbones.flux import FluxConfig
from edit.few_step.endpoint import CachedEndpoint, Endpoint
from edit.few_step.method import FewStepMethod
from edit.few_step.reflow import CachedReflow, Reflow
from edit.losses import Draws, Seen
from edit.sampling import Sampler
from edit.solvers import Euler, times
from edit.stream import Condition

PROMPTS = ["red square", "a blue disc", "disc", "red square on a disc"]
SCALE, SHIFT = 2.5, 2.0


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    denoiser = FluxConfig(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=12,
        guidance_embeds=False,
        axes_dims_rope=(4, 4, 4),
        sample_size=(8, 8),
    ).build()
    randomise(denoiser, 0)
    return edit.save(denoiser, tmp_path_factory.mktemp("teacher") / "flux", sampler=Sampler(Euler(4, shift=SHIFT)))


@pytest.fixture(scope="module")
def made(teacher: Path, t5: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder that an order at test size fills; keywords change it."""
    place = tmp_path_factory.mktemp("made")
    (place / "prompts.txt").write_text("\n".join(PROMPTS))

    def make(out: str, say: Callable[[str], None] = lambda _: None, **options) -> Path:
        named = {"teacher": teacher, "prompts": place / "prompts.txt", "text_encoder": t5, "pooled_encoder": clip}
        order = Request(
            **{name: str(path) for name, path in named.items()},
            out=str(place / out),
            **{"max_tokens": 8, "guidance": SCALE, "steps": 4, "seed": 5, "batch": 3, "device": "cpu", **options},
        )
        manifest = generate(order, say)
        assert manifest is not None
        return manifest.parent

    return make


@pytest.fixture(scope="module", params=["euler", "heun"])
def paths(made, request) -> Latents:
    """Three states between noise and sample, one at each step of the solver, in fp32."""
    solver = request.param
    return Latents(str(made(solver, solver=solver, points=3, dtype="float32")), trajectories=True)


def everything(data: Latents) -> dict[str, Tensor]:
    samples = [data.train().sample(k, 100 + k) for k in range(len(PROMPTS))]
    return {name: torch.stack([s[name] for s in samples]) for name in samples[0]}


def guided(teacher: Path, data: Latents, batch: dict[str, Tensor]) -> Callable[[Tensor, float], Tensor]:
    denoiser, null = edit.load(teacher).denoiser, data.null
    assert null is not None
    parts = ("text", "text_mask", "pooled")
    cond = Condition(**{k: batch[k] for k in parts})
    uncond = Condition(**{k: null[k].expand(len(batch["z"]), *null[k].shape) for k in parts})

    @torch.no_grad()
    def velocity(x: Tensor, t: float) -> Tensor:
        at = torch.full((len(x),), t)
        return torch.lerp(denoiser(x, at, uncond).sample, denoiser(x, at, cond).sample, SCALE)

    return velocity


def test_the_noise_is_the_one_the_teacher_began_with_bit_for_bit(paths, teacher):
    batch = everything(paths)
    artifact = edit.load(teacher)
    for count in (1, 3, 4):  # whatever batch it was generated in
        told = Condition(**{k: batch[k][:count] for k in ("text", "text_mask", "pooled")})
        walk = Sampler(Euler(1)).walk(artifact.denoiser, artifact.objective, told, torch.arange(count), seed=5)
        assert torch.equal(batch["z"][:count], next(iter(walk)).x)
    assert len({z.sum().item() for z in batch["z"]}) == len(PROMPTS)


@pytest.mark.parametrize("number", [True, -1, 2**63, 2.5, None])
def test_a_noise_number_that_is_none_is_damage(paths, number, monkeypatch):
    split = paths.train()
    monkeypatch.setattr(split.tars, "json", lambda index: {"number": number})
    with pytest.raises(ValueError, match="json does not say which noise it was generated from"):
        split.sample(0, 0)


def test_a_stored_state_moved_by_the_solver_reaches_the_next_one_and_the_last_the_sample(paths, teacher):
    batch = everything(paths)
    grid, velocity = times(4, SHIFT), guided(teacher, paths, batch)
    torch.testing.assert_close(batch["times"], torch.tensor(grid[1:-1]).expand(4, -1))
    states = [batch["z"], *batch["trajectory"].unbind(1), batch["x"]]
    second = paths.manifest["generated"]["solver"] == "heun"
    for x, reached, t, end in zip(states, states[1:], grid, grid[1:], strict=False):
        v = velocity(x, t)
        if second and end:
            v = (v + velocity(x + (end - t) * v, end)) / 2
        # matrix products of batches of three and of four round differently
        torch.testing.assert_close(x + (end - t) * v, reached, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(x, reached, rtol=1e-2, atol=1e-2)


def test_fewer_points_are_every_so_many_of_the_same_states(made, paths):
    solver = paths.manifest["generated"]["solver"]
    few = Latents(str(made(f"{solver}_few", solver=solver, points=1, dtype="float32")), trajectories=True)
    torch.testing.assert_close(everything(few)["trajectory"], everything(paths)["trajectory"][:, 1:2], rtol=0, atol=0)


@dataclass(frozen=True)
class Stored(Draws):
    """Draws that give a solve the noise of stored samples."""

    z: Tensor | None = None

    def gaussian(self, stream: int) -> Tensor:
        assert stream == 0 and self.z is not None
        return self.z


@pytest.mark.parametrize(
    "online, cached",
    [(Endpoint(4, 1, SHIFT), CachedEndpoint(1, SHIFT)), (Endpoint(4, 4, SHIFT), CachedEndpoint(4, SHIFT))]
    + [(Endpoint(4, 2, SHIFT), CachedEndpoint(2, SHIFT)), (Reflow(4, SHIFT, 3), CachedReflow(3))],
    ids=["noise alone", "all states", "half of them", "reflow"],
)
def test_a_cached_loss_is_the_one_that_solves_online_from_the_same_noise(made, teacher, online, cached):
    data = Latents(str(made("half", points=3)), trajectories=True)
    batch = next(iter(EndlessLoader(data.train(), batch_size=4, total=1)))
    velocity = guided(teacher, data, batch)
    told = Condition(**{k: batch[k] for k in ("text", "text_mask", "pooled")})
    draws = Stored(3, torch.arange(4), 0, tuple(batch["x"].shape[1:]), z=batch["z"])

    def nobody(*asked):
        raise AssertionError("a role that this method does not ask")

    def asked(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return velocity(x_t, t[0].item())

    def loss(method: FewStepMethod, given: Seen, teacher) -> Tensor:
        roles = Models(lambda x_t, t, condition: 0.7 * x_t, nobody, nobody, teacher, nobody, nobody)
        (found,) = method.student_losses(view(roles, given)).values()
        return found

    path = batch["z"], batch["trajectory"], batch["times"]
    given = Seen(told, told, batch["scale"], draws, 0.0, batch["x"], *path)
    assert not cached.needs_teacher and online.needs_teacher
    found = loss(cached, given, nobody)
    # states are stored to 2^-11 of themselves, losses are squares of their differences
    torch.testing.assert_close(found, loss(online, replace(given, x=None, noise=None), asked), rtol=2e-3, atol=1e-4)
    assert (found > 0.01).all() and (batch["scale"] == SCALE).all()


def test_pairs_need_no_stored_states(made):
    batch = everything(Latents(str(made("pairs")), trajectories=True))
    assert batch["trajectory"].shape == (4, 0, 4, 8, 8) and batch["times"].shape == (4, 0) and batch["z"].std() > 0.9
    assert "z" not in Latents(str(made("pairs"))).train().sample(0, 0)


def test_the_forecast_counts_the_states(made):
    said: list[str] = []
    for points in (0, 3):
        made(f"forecast_{points}", said.append, points=points)
    without, told = (float(text.split("at most ")[1].split(" kB")[0]) for text in said)
    states = 4 * 3 * 4 * 8 * 8 * 2 / 1000  # kB in fp16; with headers, each image's is rounded up to the tar's blocks
    assert states < told - without < states + 4 * 1.3


def test_a_folder_begun_with_other_points_is_refused(made):
    made("other", points=1)
    for points in (3, 0):
        with pytest.raises(ValueError, match=r"begun with generated\.points=1, .*: choose another out="):
            made("other", points=points)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"points": 2}, "points=2 does not divide steps=28 evenly: steps must be a multiple of points"),
        ({"points": -1}, "points must be at least 0, got -1"),
        ({"points": 3, "solver": "dpm"}, "points=3 needs solver euler or heun, got dpm"),
    ],
)
def test_points_that_the_solver_does_not_pass_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Request("a", "b", "c", "d", **change)


def test_samples_without_a_path_are_refused(job, folder):
    with pytest.raises(ValueError, match="holds no generated data, which alone has trajectories"):
        Latents(str(precompute(job(folder), lambda _: None).parent), flip=False, trajectories=True)
