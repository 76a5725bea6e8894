"""Samples from Python are those of an evaluation, and what a model is not told is refused in one sentence."""

import re
import sys
import types

import pytest
import torch
from PIL import Image

import edit
import edit.backbones
from data.sets.shapes import Shapes
from edit.artifacts.sampled import MOST, Samples, bar
from edit.backbones.flux import FluxConfig
from edit.sampling import Sampler
from edit.solvers import Euler, Grid
from recipes.config.schema import Evaluation
from recipes.report.samples import Subject, sample_and_measure

DIGITS = {"_target_": "data.sets.digits.Digits"}
SHAPES = {"_target_": "data.sets.shapes.Shapes", "count": 12, "held": 8}


@pytest.fixture
def digits(make_dit, tmp_path):
    denoiser = make_dit(in_channels=1, patch_size=4)
    return edit.load(edit.save(denoiser, tmp_path / "digits", sampler=Sampler(Euler(3), 1.5), data=DIGITS))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    torch.manual_seed(0)
    tiny = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    tiny |= {"joint_attention_dim": 64, "pooled_projection_dim": 64, "axes_dims_rope": (4, 6, 6)}
    denoiser = FluxConfig(48, **tiny, guidance_embeds=False, sample_size=(8, 8)).build()
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.2)
    folder = tmp_path_factory.mktemp("shapes")
    return edit.load(edit.save(denoiser, folder, sampler=Sampler(Euler(2), 3.0), data=SHAPES))


def evaluated(artifact, n: int, guidance: float, seed: int) -> torch.Tensor:
    chosen = Evaluation.of({"n": n, "batch": 5, "features": "none", "device": "cpu"})
    subject = Subject.of(artifact.path, "it", chosen, torch.device("cpu"))
    seen = []
    sample_and_measure(subject, subject.sampler(guidance), seed, None, lambda images: None, seen.append)
    return torch.cat(seen)


# ---- the images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_samples_are_those_of_an_evaluation_with_the_same_seed(name, request):
    artifact = request.getfixturevalue(name)
    guidance = artifact.sampler.guidance
    assert torch.equal(artifact.sample(n=8, seed=3).frames, evaluated(artifact, 8, guidance, 3))
    assert torch.equal(artifact.sample(n=8, guidance=2.0).frames, evaluated(artifact, 8, 2.0, 0))
    assert not torch.equal(artifact.sample(n=8, seed=3).frames, artifact.sample(n=8, seed=4).frames)


def test_labels_or_prompts_of_the_evaluation_give_its_images(digits, shapes):
    torch.testing.assert_close(digits.sample(labels=[0, 1]).x, digits.sample(n=8).x[:2])
    captions = Shapes(**{k: v for k, v in SHAPES.items() if k != "_target_"}).heldout().captions
    drawn = shapes.sample(n=4)
    assert drawn.told == captions[:4]
    torch.testing.assert_close(shapes.sample(prompts=captions[:4]).x, drawn.x)
    assert (shapes.sample(prompts="a red circle", n=4).x - drawn.x).abs().amax() > 0.1


def test_labels_are_repeated_until_there_are_enough_and_their_noise_differs(digits):
    samples = digits.sample(labels=[3, 7], n=5)
    assert samples.told == ["3", "7", "3", "7", "3"]
    assert not torch.equal(samples.x[0], samples.x[2])
    torch.testing.assert_close(digits.sample(labels=3, n=1).x, samples.x[:1])
    assert digits.sample(labels=torch.tensor(3)).told == digits.sample(labels=torch.tensor([3])).told == ["3"]
    assert digits.sample().told == list("01234567")


def test_the_batch_does_not_change_the_images(digits):
    torch.testing.assert_close(digits.sample(n=5, batch=2).x, digits.sample(n=5).x)


def test_steps_and_guidance_are_those_of_the_artifact_unless_others_are_asked(digits, make_dit, tmp_path):
    plain = digits.sample(n=2)
    assert torch.equal(digits.sample(n=2, steps=3, guidance=1.5).frames, plain.frames)
    assert not torch.equal(digits.sample(n=2, steps=4).x, plain.x)
    assert not torch.equal(digits.sample(n=2, guidance=4.0).x, plain.x)
    few = edit.save(make_dit(in_channels=1), tmp_path / "few", sampler=Sampler(Grid((1.0, 0.5))), data=DIGITS)
    with pytest.raises(ValueError, match=r"steps=8, but this model is sampled at times of its own"):
        edit.load(few).sample(steps=8)


def test_images_are_a_list_of_pil_images_with_their_tensors(digits):
    samples = digits.sample(labels=[0, 9])
    assert isinstance(samples, list) and all(isinstance(i, Image.Image) and i.size == (8, 8) for i in samples)
    assert samples.frames.shape == (2, 1, 8, 8, 3) and samples.frames.dtype == torch.uint8
    assert samples.x.shape == (2, 1, 8, 8) and not samples.x.is_inference()
    assert samples[1].getpixel((5, 2)) == tuple(samples.frames[1, 0, 2, 5].tolist())


def test_videos_are_lists_of_frames_that_move_in_a_notebook(tmp_path, monkeypatch):
    from pathlib import Path

    monkeypatch.setattr(edit.backbones, "__path__", [*edit.backbones.__path__, str(Path(__file__).parents[1] / "toys")])
    from edit.backbones.toy_video import ToyVideoConfig

    data = {"_target_": "data.sets.moving_shapes.MovingShapes", "frames": 4, "count": 8, "held": 8}
    artifact = edit.load(edit.save(ToyVideoConfig().build(), tmp_path / "v", sampler=Sampler(Euler(1)), data=data))
    samples = artifact.sample(n=2)
    assert [[frame.size for frame in video] for video in samples] == [[(32, 32)] * 4] * 2
    assert samples.frames.shape == (2, 4, 32, 32, 3) and samples.x.shape == (2, 12, 4, 8, 8)
    assert samples._repr_html_().count("data:image/gif;base64,") == 2


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "asked", "sentence"),
    [
        ("digits", {"prompts": "a seven"}, "is told labels, not prompts: give labels= from 0 to 9"),
        ("digits", {"labels": [3, 10]}, "label 10 is unknown: .* has 10 classes, 0 to 9"),
        ("digits", {"labels": -1}, "label -1 is unknown"),
        ("digits", {"labels": 1.5}, "labels: expected whole numbers, got 1.5"),
        ("digits", {"labels": "7"}, "labels: expected whole numbers, got '7'"),
        ("digits", {"labels": []}, "labels is empty"),
        ("digits", {"n": 0}, "n=0: expected a number of samples from 1 on"),
        ("digits", {"labels": 1, "n": 2.5}, "n: expected whole numbers, got 2.5"),
        ("shapes", {"labels": 1}, "is told prompts, not labels: give prompts="),
        ("shapes", {"labels": 1, "prompts": "a red circle"}, "is told prompts, not labels"),
        ("shapes", {"prompts": "a pink dog"}, "'pink' in 'a pink dog' is not one of the words"),
        ("shapes", {"prompts": ["a red circle", None]}, "prompts: expected a text, or a list of texts, got None"),
        ("shapes", {"prompts": 3}, "prompts: expected a text, or a list of texts, got 3"),
        ("digits", {"n": 1, "batch": 0}, "batch=0: expected a number of samples from 1 on"),
        ("digits", {"n": 1, "guidance": -1.0}, "guidance"),
        ("shapes", {"prompts": []}, "prompts is empty"),
    ],
)
def test_what_a_model_is_not_told_is_refused_in_one_sentence(name, asked, sentence, request):
    with pytest.raises(ValueError, match=sentence) as error:
        request.getfixturevalue(name).sample(**asked)
    assert "\n" not in str(error.value)


def test_an_artifact_that_names_no_data_says_what_turns_samples_into_pictures(make_dit, tmp_path):
    artifact = edit.load(edit.save(make_dit(), tmp_path / "a"))
    with pytest.raises(ValueError, match="does not say which data it was trained on.*attached"):
        artifact.sample(n=1)
    artifact.data = {"_target_": "os.system", "command": "true"}
    with pytest.raises(ValueError, match="asks for os.system, outside of `data`"):
        artifact.sample(n=1)


# ---- as a notebook shows it -----------------------------------------------------------------------------------------


def test_a_notebook_shows_each_image_with_what_it_was_told_escaped():
    x = torch.zeros(MOST + 2, 1, 4, 4)
    frames = torch.zeros(MOST + 2, 1, 4, 4, 3, dtype=torch.uint8)
    page = Samples(x, frames, ["<b>'\"&"] * (MOST + 2))._repr_html_()
    assert page.count("data:image/png;base64,") == MOST and "and 2 more" in page
    assert "<b>" not in page and "&lt;b&gt;&#x27;&quot;&amp;" in page


def test_progress_is_drawn_in_a_notebook_and_gone_at_the_end(digits, monkeypatch):
    pages = []

    class Handle:
        update = staticmethod(lambda page: pages.append(page))

    def display(page, display_id):
        pages.append(page)
        return Handle()

    shown = types.ModuleType("IPython.display")
    shown.HTML, shown.display = str, display
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("edit.artifacts.sampled.time.monotonic", iter(range(1000)).__next__)
    digits.sample(n=2)
    counts = [float(value) for page in pages for value in re.findall(r"value='([\d.]+)' max='2'", page)]
    assert counts[0] == 0 and counts[-1] == 2 and counts == sorted(counts) and pages[-1] == ""
    before = len(pages)
    digits.sample(n=2, progress=False)
    assert len(pages) == before


def test_progress_says_nothing_where_there_is_no_terminal(digits, capfd):
    digits.sample(n=2)
    assert capfd.readouterr() == ("", "")
    with bar(2, True) as done:
        done(1.5)
