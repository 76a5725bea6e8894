"""New prompts are embedded as the stored ones were, by the encoders that the manifest names and by no others."""

import shutil
from pathlib import Path

import pytest
import torch
from samples import caption
from test_generate import PROMPTS, flux, quiet

import edit
from data.making.generator import generate
from data.making.precomputer import precompute
from data.making.request import Request
from data.making.stored_text import _tokenizer
from data.sets.latents import Latents


@pytest.mark.parametrize("padding", ["none", "states", "zeros"])
def test_the_prompt_of_a_stored_sample_is_embedded_as_it_is_stored(job, folder, t5, clip, padding):
    options = {"text_encoder": str(t5), "pooled_encoder": str(clip), "max_tokens": 8, "padding": padding}
    data = Latents(str(precompute(job(folder, **options), quiet).parent), flip=False)
    stored = data.train().sample(0, 0)  # of class a: image 0
    new = data.encode([caption(0), "red square"])
    length = len(stored["text"])
    for name in ("text", "text_mask", "pooled"):
        value = new[name][0] if name == "pooled" else new[name][0, :length]
        assert torch.equal(value, stored[name]), name
    assert new["text"].dtype == torch.float32 and len(new["text"]) == 2


def test_other_encoders_than_the_manifest_says_are_refused(job, folder, t5, clip, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(t5, mine)
    path = precompute(job(folder, text_encoder=str(mine)), quiet).parent
    shutil.rmtree(mine)
    with pytest.raises(FileNotFoundError, match="mine"):
        Latents(str(path)).encode(["red"])
    shutil.copytree(clip, mine)
    with pytest.raises(ValueError, match="are not those that made .*give n= for samples of its captions"):
        Latents(str(path)).encode(["red"])
    plain = precompute(job(folder, "plain"), quiet).parent
    with pytest.raises(ValueError, match="does not name text encoders"):
        Latents(str(plain)).encode(["red"])


def test_a_pipelines_tokenizer_lies_beside_its_encoder(tmp_path):
    for name in ("text_encoder_2", "tokenizer_2", "text_encoder"):
        (tmp_path / name).mkdir()
    assert _tokenizer(str(tmp_path / "text_encoder_2")) == str(tmp_path / "tokenizer_2")
    assert _tokenizer(str(tmp_path / "text_encoder")) is None  # none there: it lies with the encoder
    assert _tokenizer("owner/name:text_encoder_2") == "owner/name:tokenizer_2"
    assert _tokenizer(None) is None


def test_a_student_of_stored_images_is_sampled_with_new_prompts(t5, clip, vae, tmp_path):
    teacher = flux(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    places = {"text_encoder": t5, "pooled_encoder": clip, "vae": vae, "prompts": tmp_path / "prompts.txt"}
    settings = {"max_tokens": 8, "steps": 1, "dtype": "float32", "device": "cpu", "out": str(tmp_path / "made")}
    made = generate(Request(teacher=str(teacher), **{k: str(v) for k, v in places.items()}, **settings), quiet)
    node = {"_target_": "data.sets.latents.Latents", "path": str(Path(made).parent)}
    trained = edit.load(teacher)
    student = edit.load(edit.save(trained.denoiser, tmp_path / "student", sampler=trained.sampler, data=node))
    known = student.sample(n=2)  # the stored texts in their order
    torch.testing.assert_close(student.sample(prompts=PROMPTS[:2]).x, known.x, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(student.sample(prompts=["blue disc on a disc"] * 2).x, known.x, atol=1e-2)
    assert known.frames.shape == (2, 1, 16, 16, 3)
