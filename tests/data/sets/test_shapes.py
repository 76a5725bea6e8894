import math

import pytest
import torch
from torch.nn.functional import conv2d

from data.loader import EndlessLoader
from data.pixel_codec import decode, encode
from data.sets.captioned import PALETTE, divided
from data.sets.shape_pictures import draw
from data.sets.shape_reader import follows, scores, things_in
from data.sets.shape_scenes import Scene, Thing, gist, grammar, meaning
from data.sets.shapes import Shapes


@pytest.fixture(scope="module")
def shapes() -> Shapes:
    return Shapes(count=60, held=30)


@pytest.fixture(scope="module")
def rendered() -> tuple[torch.Tensor, list[str]]:
    """Held-out captions, 200 of each family at most, and their pictures."""
    captions = [c for family in grammar().values() for c in (divided(list(family), gist)[1] * 20)[:200]]
    return draw([meaning(c) for c in captions], torch.arange(len(captions)), 32, seed=0), captions


def picture(*things: Thing, number: int = 0, **how: str) -> torch.Tensor:
    return draw([Scene(things, **how)], torch.tensor([number]), 32, seed=3)


# ---- the data set ---------------------------------------------------------------------------------------------------


def test_a_sample_depends_on_seed_and_index_alone(shapes):
    small = Shapes(count=7, held=3)
    for split, same in ((small.train(), shapes.train()), (small.heldout(), shapes.heldout())):
        for i in range(len(split)):
            # the codec's sums may run in another order in a batch of another size
            assert torch.allclose(split.sample(i, 0)["x"], same.sample(i, 99)["x"], atol=1e-5)
            assert split.captions[i] == same.captions[i]
    other = Shapes(count=7, held=3, seed=1).train()
    assert not any(torch.equal(other.sample(i, 0)["x"], small.train().sample(i, 0)["x"]) for i in range(7))


def test_held_out_captions_have_no_training_image_but_their_words_and_pairs_have():
    parts = [divided(list(family), gist) for family in grammar().values()]
    train, held = ([c for p in parts for c in p[k]] for k in (0, 1))
    assert not set(train) & set(held) and len(train) + len(held) == sum(map(len, grammar().values()))
    assert 0.07 < len(held) / len(train) < 0.13 and all(p[1] for p in parts)

    def pairs(captions: list[str]) -> set[tuple[str, str]]:
        return {pair for c in captions for pair in zip(c.split(), c.split()[1:], strict=False)}

    assert pairs(held) <= pairs(train)


def test_scenes_choose_the_families_of_captions():
    one = Shapes(count=24, held=12, scenes=["one"])
    families = grammar()
    assert {*one.train().captions, *one.heldout().captions} <= set(families["one"])
    assert len(set(one.train().captions)) == 24  # none twice while there are others
    for wrong in (["two"], [], ["one", "one"]):
        with pytest.raises(ValueError, match="scenes are some of one, several, related, each once, got"):
            Shapes(count=24, held=12, scenes=wrong)


def converse(caption: str) -> str:
    """What the other thing of a relation would say, by exchanging words."""
    for relation, other in (("above", "below"), ("below", "above"), ("left of", "right of"), ("right of", "left of")):
        if f" {relation} " in caption:
            first, last = caption.split(f" {relation} ")
            return f"{last} {other} {first}"
    here, there = ("three small", "three")[:: 1 if "three small" in caption else -1]  # no three large things fit
    return caption.replace(here, there)


def test_no_held_out_caption_has_an_equal_that_is_trained_on():
    world = Shapes(count=6144, held=1020)
    train, held = set(world.train().captions), set(world.heldout().captions)
    changed = [c for c in held if converse(c) != c]
    assert len(changed) > 200 and all(converse(converse(c)) == c for c in changed)
    assert {converse(c) for c in changed} <= held and not {converse(c) for c in changed} & train
    # and they are equals: the pictures of one follow the other
    images = draw([meaning(c) for c in changed], torch.arange(len(changed)), 32, seed=0)
    assert follows(images, [converse(c) for c in changed]).all()


def test_the_default_size_has_room_for_every_training_caption():
    families = [len(divided(list(f), gist)[0]) for f in grammar().values()]
    count = Shapes.__init__.__defaults__[1]
    assert max(families) <= count / 3


def test_a_batch_holds_what_a_text_conditioned_recipe_needs(shapes):
    batch = next(iter(EndlessLoader(shapes.train(), batch_size=5, total=1)))
    assert {k: tuple(v.shape) for k, v in batch.items()} == {
        "x": (5, 12, 8, 8),
        "kind": (5,),
        "text": (5, 16, 64),
        "text_mask": (5, 16),
        "pooled": (5, 64),
        "draw": (5,),
    }
    assert {k: v.shape for k, v in shapes.null.items()} == {k: batch[k].shape[1:] for k in shapes.null}
    assert shapes.num_classes is None and 0 <= batch["kind"].min() and batch["kind"].max() < shapes.judged


def test_captions_come_along_where_asked_for():
    told = Shapes(count=2, held=1, captions=True)
    assert told.train().sample(1, 0)["caption"] == told.train().captions[1]


@pytest.mark.parametrize(
    ("options", "message"), [({"size": 30}, "size is a multiple of 4"), ({"held": 0}, "at least 1")]
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Shapes(**{"count": 2, "held": 1, **options})


def test_captions_and_scenes_are_one_to_one():
    for family in grammar().values():
        for caption, scene in family.items():
            assert meaning(caption) == scene and str(scene) == caption
    assert len({str(s) for f in grammar().values() for s in f.values()}) == sum(map(len, grammar().values()))


# ---- the checker ----------------------------------------------------------------------------------------------------


def test_rendered_pictures_follow_their_captions_at_both_sizes(rendered):
    images, captions = rendered
    assert follows(images, captions).all()
    assert all((s.isnan() | (s == 1)).all() for s in scores(images, captions).values())
    scenes = [meaning(c) for c in captions[:100]]
    assert follows(draw(scenes, torch.arange(100), 64, seed=0), captions[:100]).all()


def blur(images: torch.Tensor, sigma: float = 0.5) -> torch.Tensor:
    row = torch.exp(-(torch.arange(-2, 3) ** 2) / (2 * sigma**2))
    kernel = (row[:, None] * row / row.sum() ** 2).expand(3, 1, 5, 5)
    padded = torch.nn.functional.pad(images.permute(0, 3, 1, 2).float(), (2,) * 4, mode="replicate")
    return conv2d(padded, kernel, groups=3).permute(0, 2, 3, 1).to(torch.uint8)


def noisy(images: torch.Tensor, std: float = 10) -> torch.Tensor:
    eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + std * eps).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(
    "damage",
    [lambda v: decode(encode(v)), noisy, blur, lambda v: noisy(decode(encode(v)))],
    ids=["codec", "noise", "blur", "codec and noise"],
)
def test_99_of_100_damaged_pictures_still_follow_their_captions(rendered, damage):
    images, captions = rendered
    assert follows(damage(images), captions).double().mean() >= 0.99


def test_pictures_follow_captions_of_others_by_chance_alone(rendered):
    images, captions = rendered
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0)).tolist()
    # measured 1 %: a third of the pictures share 12 captions
    assert follows(images, [captions[i] for i in order]).double().mean() < 0.02


RED = Thing("red", "circle")


@pytest.mark.parametrize(
    ("image", "wrong"),
    [
        (picture(RED), "a blue circle"),
        (picture(RED), "a red square"),
        (picture(RED), "two red circles"),
        (picture(RED, RED), "a red circle"),
        (picture(Thing("red", "circle", "small")), "a large red circle"),
        (picture(RED, place="at the left"), "a red circle at the right"),
        (picture(RED, Thing("blue", "cross"), relation="above"), "a red circle below a blue cross"),
        (picture(RED, Thing("blue", "cross"), relation="above"), "a red circle left of a blue cross"),
        (picture(RED, Thing("blue", "cross"), relation="above"), "a blue circle above a red cross"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_one_wrong_thing_is_enough_to_be_refused(image, wrong):
    assert not follows(image, [wrong]).any()


def test_a_relation_holds_from_both_sides():
    image = picture(RED, Thing("blue", "cross"), relation="above")
    assert follows(
        image.expand(2, -1, -1, -1), ["a red circle above a blue cross", "a blue cross below a red circle"]
    ).all()


def test_scores_say_which_part_is_wrong():
    image = picture(Thing("red", "circle", "small"), place="at the left")
    seen = {k: v.item() for k, v in scores(image, ["a small red square at the left"]).items()}
    assert (seen["count"], seen["colour"], seen["kind"], seen["size"]) == (1, 1, 0, 1)
    assert math.isnan(seen["relation"])


def test_blank_and_random_pictures_and_colours_of_no_name_follow_nothing(rendered):
    captions = rendered[1][:50]
    blank = torch.full((50, 32, 32, 3), 20, dtype=torch.uint8)
    chaos = torch.randint(0, 256, (50, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert not follows(blank, captions).any() and not follows(chaos, captions).any()
    assert things_in(blank[:1]) == [[]]
    red = picture(RED).float()
    pale = (red + 0.5 * (20 - red)).to(torch.uint8)  # half as bright: of no colour in the palette
    assert not follows(pale, ["a red circle"]).any() and len(PALETTE) == 6


@pytest.mark.parametrize(
    ("captions", "message"),
    [(["a dog"], "no sentence about shapes"), (["a red circle"] * 2, "1 images and 2 captions")],
)
def test_captions_that_cannot_be_checked_are_refused(captions, message):
    with pytest.raises(ValueError, match=message):
        follows(picture(RED), captions)


def test_images_that_are_no_square_bytes_are_refused():
    with pytest.raises(ValueError, match="expected square uint8 images"):
        follows(torch.zeros(1, 32, 32, 3), ["a red circle"])
