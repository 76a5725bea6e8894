import time

import pytest
import torch

from data.making.encoders import TextEncoder
from data.sets import captioned_digits, moving_shapes, shapes
from data.sets.toy_text import LENGTH, WIDTH, WORDS, ToyText


@pytest.fixture(scope="module")
def text() -> ToyText:
    return ToyText()


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return [c for family in shapes.grammar().values() for c in family] + [
        *captioned_digits.grammar(),
        *moving_shapes.grammar(),
    ]


def test_the_vocabulary_is_the_words_of_all_worlds(captions):
    assert {w for c in captions for w in c.split()} == set(WORDS)
    assert max(len(c.split()) for c in captions) <= LENGTH - 2


def test_it_is_built_in_under_two_seconds_and_leaves_the_global_generator_alone():
    import transformers  # noqa: F401 - its import takes longer, once per process

    torch.manual_seed(7)
    before, start = torch.get_rng_state(), time.process_time()
    ToyText()
    assert time.process_time() - start < 2  # processor time; measured 0.03 s
    assert torch.equal(torch.get_rng_state(), before)


def test_embeddings_have_unit_variance_zero_padding_and_tell_all_sentences_apart(text, captions):
    some = captions[::3] + ["a red circle above a blue square", "a blue circle above a red square"]
    embedded = text(list(dict.fromkeys(some)))
    assert embedded.text.shape[1:] == (LENGTH, WIDTH) and embedded.pooled.shape[1:] == (WIDTH,)
    assert 0.9 < embedded.text[embedded.mask].std() < 1.1 and 0.9 < embedded.pooled.std() < 1.1
    assert not embedded.text[~embedded.mask].any()
    # a random unit-variance pair of pooled vectors is 11 apart; the nearest two sentences differ by one swap
    assert torch.nn.functional.pdist(embedded.pooled).min() > 0.1
    assert torch.nn.functional.pdist(embedded.text.flatten(1)).min() > 5


def test_the_weights_are_the_same_everywhere(text):
    # pinned: integers and one rounding each, so any machine must find these
    assert text.t5.shared.weight[4, :2].tolist() == [1.1349358558654785, 0.4173997640609741]
    assert text.clip.get_input_embeddings().weight[4, :2].tolist() == [-0.4638773202896118, 0.3983485996723175]


def test_folders_are_read_by_transformers_and_by_precompute_with_equal_results(text, tmp_path):
    from transformers import CLIPTextModel, T5EncoderModel

    folders = text.write(tmp_path)
    for kind, own, name in (
        (T5EncoderModel, text.t5, "text_encoder_2"),
        (CLIPTextModel, text.clip, "text_encoder"),
    ):
        read = kind.from_pretrained(folders[name]).state_dict()
        assert all(torch.equal(v, read[k]) for k, v in own.state_dict().items())
        assert list(folders[name].glob("*.safetensors")) and (folders[name] / "tokenizer.json").is_file()
    sentences = ["a red circle above a blue square", "three small crosses", ""]
    embedded = text(sentences)
    words = TextEncoder(str(folders["text_encoder_2"])).encode(sentences)
    pooled = TextEncoder(str(folders["text_encoder"])).encode(sentences)
    for i in range(len(sentences)):
        # other padding, other order of sums
        assert torch.allclose(words[i].text, embedded.text[i][embedded.mask[i]], atol=1e-5)
        assert torch.allclose(pooled[i].pooled, embedded.pooled[i], atol=1e-5)
    assert torch.allclose(text.null()["text"], embedded.text[2], atol=1e-5)


@pytest.mark.parametrize(
    ("caption", "message"),
    [("a red dog", "'dog' in 'a red dog' is not one of the words"), (" ".join(["a"] * 15), "more than the 14 words")],
)
def test_what_the_encoders_do_not_know_is_refused(text, caption, message):
    with pytest.raises(ValueError, match=message):
        text([caption])
