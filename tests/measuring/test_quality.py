import json

import pytest
import torch
from torch import Tensor

from data.sets.digits import Digits
from edit.measuring.quality import (
    Gaussian,
    Judge,
    Pretrained,
    cached,
    digest,
    frechet,
    frechet_measure,
    generate,
    inside,
    mean_measure,
    nearest,
    perceptual,
    psnr,
    ssim,
    train_judge,
)
from edit.objectives import FlowMatching
from edit.sampling import Sampler
from edit.solvers import Euler
from edit.stream import Condition


@pytest.fixture(scope="module")
def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Images uint8 and labels of both splits."""
    data = Digits()
    splits = {"train": data.train(), "heldout": data.heldout()}
    return {name: (data.to_frames(split.x)[:, 0], split.label) for name, split in splits.items()}


@pytest.fixture(scope="module")
def judge(digits, tmp_path_factory) -> Judge:
    return train_judge(*digits["train"], tmp_path_factory.mktemp("cache"), steps=300)


# ---- sets -----------------------------------------------------------------------------------------------------------


def test_frechet_of_two_diagonal_gaussians_is_the_closed_form():
    a = Gaussian(torch.zeros(3).double(), torch.diag(torch.tensor([1.0, 4.0, 9.0])).double())
    b = Gaussian(torch.tensor([1.0, 2.0, 0.0]).double(), torch.diag(torch.tensor([4.0, 4.0, 1.0])).double())
    # |mean|^2 + sum of (std_a - std_b)^2 = 5 + 1 + 0 + 4; float64 eigenvalues
    assert frechet(a, b) == pytest.approx(10, rel=1e-10)
    assert frechet(a, a) == pytest.approx(0, abs=1e-10)


def test_frechet_equals_that_of_torchmetrics():
    from torchmetrics.image.fid import _compute_fid

    x, y = torch.randn(200, 16), 0.7 * torch.randn(150, 16) @ torch.randn(16, 16) + 0.3
    a, b = Gaussian.of(x), Gaussian.of(y)
    theirs = _compute_fid(a.mean, a.cov, b.mean, b.cov).item()
    assert frechet(a, b) == pytest.approx(theirs, rel=1e-6)  # theirs takes roots of complex eigenvalues


def test_points_are_inside_a_manifold_up_to_the_third_neighbour():
    line = torch.arange(10.0)[:, None]  # third neighbour of an end is 3 away, of an inner point 2
    points = torch.tensor([[-2.9], [-3.1], [4.5], [11.9], [12.1]])
    assert inside(points, line).tolist() == [True, False, True, True, False]
    with pytest.raises(ValueError, match="more than k = 3"):
        inside(points, line[:3])


def test_a_copy_of_a_training_sample_has_distance_zero():
    train = torch.randn(50, 1, 8, 8)
    x = torch.stack((train[17], train[3] + 0.5))
    # 64 values, each 0.5 off; no other of 50 random samples is nearer than about 8
    torch.testing.assert_close(nearest(x, train), torch.tensor([0.0, 4.0]), atol=1e-5, rtol=1e-5)


# ---- pairs ----------------------------------------------------------------------------------------------------------


def test_psnr_of_a_known_error():
    a = torch.full((2, 8, 8, 3), 100, dtype=torch.uint8)
    b = a.clone()
    b[1] += 1
    torch.testing.assert_close(psnr(a, b), torch.tensor([100.0, 48.1308]))  # 20 log10(255)


@pytest.mark.parametrize("side", [8, 12, 32])
def test_ssim_is_one_for_equal_images_and_falls_with_noise_at_every_size(side):
    a = torch.randint(0, 256, (4, side, side, 3), dtype=torch.uint8)

    def noisy(strength: float) -> Tensor:
        return (a + strength * torch.randn(a.shape)).clamp(0, 255).to(torch.uint8)

    assert ssim(a, a).tolist() == pytest.approx([1] * 4, abs=1e-5)
    assert (ssim(a, noisy(10)) > ssim(a, noisy(80))).all()


def test_perceptual_distance_is_zero_for_equal_images_and_grows_with_noise(judge, digits):
    a = digits["heldout"][0][:64]
    distances = [
        perceptual(judge, a, (a + s * torch.randn(a.shape)).clamp(0, 255).to(torch.uint8)).mean() for s in (0, 20, 80)
    ]
    assert distances[0] == 0 and distances[0] < distances[1] < distances[2]


# ---- feature spaces -------------------------------------------------------------------------------------------------


def test_the_judge_recognises_heldout_digits(judge, digits):
    images, labels = digits["heldout"]
    right = (judge.classify(judge(images)) == labels).float().mean()
    assert right > 0.96  # 0.98 after these 300 steps, 0.99 after the default 600; a guess is right in 0.1


def test_frechet_in_the_judges_space_tells_digits_from_noise(judge, digits):
    real = Gaussian.of(judge(digits["heldout"][0]))
    train = frechet(real, Gaussian.of(judge(digits["train"][0])))
    noise = frechet(real, Gaussian.of(judge(torch.randint(0, 256, (360, 8, 8, 3), dtype=torch.uint8))))
    assert noise > 20 * train


def test_the_same_data_gives_the_same_judge_and_leaves_the_global_generator_alone(digits, tmp_path):
    images, labels = (v[:100] for v in digits["train"])
    torch.manual_seed(5)
    first = train_judge(images, labels, tmp_path / "a", steps=3)
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(5))
    torch.manual_seed(6)
    assert train_judge(images, labels, tmp_path / "b", steps=3).hash == first.hash
    assert train_judge(images, labels, tmp_path / "b", steps=3, seed=1).hash != first.hash
    assert train_judge(255 - images, labels, tmp_path / "b", steps=3).hash != first.hash


def test_a_judge_is_read_from_the_cache_and_made_anew_if_the_file_is_damaged(digits, tmp_path):
    images, labels = (v[:100] for v in digits["train"])
    first = train_judge(images, labels, tmp_path, steps=3).hash
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    assert train_judge(images, labels, tmp_path, steps=3).hash == first and file.stat().st_mtime_ns == written
    file.write_bytes(file.read_bytes()[:-5])
    assert train_judge(images, labels, tmp_path, steps=3).hash == first
    assert file.stat().st_mtime_ns != written


def test_a_failure_while_making_leaves_nothing_in_the_cache(tmp_path):
    def make():
        raise RuntimeError("no power")

    with pytest.raises(RuntimeError):
        cached(tmp_path / "x.safetensors", make)
    assert not list(tmp_path.iterdir())


def test_the_judge_refuses_images_it_cannot_see(tmp_path):
    with pytest.raises(ValueError, match="at most 64 pixels, got 65"):
        train_judge(torch.zeros(4, 65, 65, 3, dtype=torch.uint8), torch.arange(4), tmp_path)


def test_a_local_transformers_model_is_a_feature_space(tmp_path):
    from transformers import Dinov2Config, Dinov2Model, T5Config, T5EncoderModel

    tiny = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**tiny)).save_pretrained(tmp_path / "dino")
    (tmp_path / "dino" / "preprocessor_config.json").write_text(json.dumps({"crop_size": {"height": 42, "width": 42}}))
    space = Pretrained(tmp_path / "dino", torch.device("cpu"))
    images = torch.randint(0, 256, (3, 20, 20, 3), dtype=torch.uint8)
    features = space(images)
    assert features.shape == (3, 16) and "42 x 42" in space.rule
    torch.testing.assert_close(space(images[:1]), features[:1], atol=1e-5, rtol=1e-4)  # no batch statistics
    assert [m.shape for m in space.layers(images)] == [(3, 10, 16)] * 4  # a class token and 3 x 3 patches
    assert perceptual(space, images, 255 - images).min() > perceptual(space, images, images).max()

    Dinov2Model(Dinov2Config(**tiny)).save_pretrained(tmp_path / "other")
    assert Pretrained(tmp_path / "other", torch.device("cpu")).hash != space.hash
    T5EncoderModel(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="expected an image model"):
        Pretrained(tmp_path / "t5", torch.device("cpu"))
    with pytest.raises(FileNotFoundError, match="no feature extractor at"):
        Pretrained(tmp_path / "nowhere", torch.device("cpu"))


def test_a_digest_tells_values_shapes_and_types_apart():
    x = torch.arange(6)
    assert digest(x) == digest(x.clone())
    assert (
        len({digest(x), digest(x + 1), digest(x.view(2, 3)), digest(x.int()), digest({"a": 1}), digest({"a": 2})}) == 6
    )


# ---- generation -----------------------------------------------------------------------------------------------------


def test_generated_images_do_not_depend_on_the_batch_size_and_progress_adds_up(dit):
    def images(batch: int) -> Tensor:
        done: list[float] = []
        parts = generate(
            dit,
            FlowMatching(),
            Sampler(Euler(3)),
            lambda k: Condition(label=k % 10),
            torch.arange(7),
            seed=1,
            batch=batch,
            progress=done.append,
        )
        x = torch.cat(list(parts))
        assert sum(done) == pytest.approx(7)
        return x

    # matrix products of other sizes sum in another order
    torch.testing.assert_close(images(3), images(7), atol=1e-5, rtol=1e-4)


def test_images_that_are_no_numbers_are_refused(dit):
    for p in dit.parameters():
        p.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="2 of 2 generated images are not finite"):
        next(
            generate(
                dit, FlowMatching(), Sampler(Euler(1)), lambda k: Condition(label=k), torch.arange(2), seed=0, batch=2
            )
        )


# ---- spread ---------------------------------------------------------------------------------------------------------


def test_the_spread_of_one_seed_predicts_that_between_seeds():
    reference = Gaussian.of(torch.randn(400, 4))
    sets = [torch.randn(300, 4) + 0.5 for _ in range(30)]
    single, many = frechet_measure(sets[:1], reference, rounds=50), frechet_measure(sets, reference)
    assert len(many["values"]) == 30 and "30 seeds" in many["over"] and "50 resamplings" in single["over"]
    assert 0.5 < single["spread"] / many["spread"] < 2  # two estimates of one number, from 50 and 30 draws
    accuracy = [(torch.rand(400) < 0.8).float() for _ in range(30)]
    single, many = mean_measure(accuracy[:1]), mean_measure(accuracy)
    assert single["spread"] == pytest.approx(0.02, rel=0.15)  # sqrt(0.8 * 0.2 / 400)
    assert 0.5 < single["spread"] / many["spread"] < 2


def test_one_image_has_no_spread_and_no_covariance():
    assert mean_measure([torch.tensor([2.0])])["spread"] is None
    with pytest.raises(ValueError, match="at least 2 images"):
        Gaussian.of(torch.zeros(1, 3))
