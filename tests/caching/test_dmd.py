"""Dynamic mode decomposition: what it is exact on, what holds it. `test_engine` has what all caches have in common."""

import math

import pytest
import torch
from caches import family, paint

import edit
from edit.artifacts.checkpoint import load, save
from edit.caching.dmd import DMD, Modes, fitted
from edit.caching.first_block_cache import DBCache
from edit.caching.reuse import Reuse
from edit.stream import Branch

G = torch.Generator().manual_seed(0)
A, B, C = (torch.randn(2, 3, 4, generator=G) for _ in range(3))  # b n d


def after(f, places, modes: Modes | None = None) -> tuple[Modes, dict]:
    modes, state = modes or Modes(growth=2.0), {}
    for s in places:
        modes.observe(state, float(s), Branch(f(float(s))))
    return modes, state


def near(found, wanted, share: float = 1e-4) -> bool:
    return bool((found - wanted).abs().max() <= share * wanted.abs().max())


def decaying(s: float):
    return A * 0.9**s + B * 0.6**s + C


def turning(s: float):
    return 0.95**s * (A * math.cos(0.4 * s) + B * math.sin(0.4 * s)) + C


@pytest.mark.parametrize("f", [decaying, turning])
def test_sums_of_three_exponentials_are_exact_after_four_computed_evaluations_also_between_them(f):
    modes, state = after(f, (0, 3, 6, 9))
    for s in (10.0, 11.0, 13.5):
        assert near(modes.predict(state, s).image, f(s))
    few, one = after(f, (0, 3, 6))
    assert not near(few.predict(one, 11.0).image, f(11.0), 1e-3)


def test_one_computed_value_is_repeated_and_two_make_one_exponential():
    modes, state = after(lambda s: A * 0.8**s, (2,))
    assert torch.equal(modes.predict(state, 5.0).image, A * 0.8**2)
    modes, state = after(lambda s: A * 0.8**s, (2, 4))
    assert near(modes.predict(state, 5.0).image, A * 0.8**5)


@pytest.mark.parametrize("f", [lambda s: A, lambda s: 0 * A, lambda s: A + 0.3 * s * B])
def test_constants_zeros_and_lines_are_followed(f):
    """A line has the eigenvalue 1 twice, with one eigenvector."""
    modes, state = after(f, (0, 2, 4, 6, 8))
    found = modes.predict(state, 9.0).image
    assert found.isfinite().all() and (found - f(9.0)).abs().max() < 1e-3


def test_what_grows_is_held():
    modes, state = after(lambda s: A * 2.0**s, (0, 1, 2), Modes(growth=1.1))
    assert near(modes.predict(state, 4.0).image, A * 2.0**2 * 1.1**2)
    free, state = after(lambda s: A * 2.0**s, (0, 1, 2), Modes(growth=2.0))
    assert near(free.predict(state, 4.0).image, A * 2.0**4)


def test_a_change_of_the_gap_begins_anew_and_the_window_is_short():
    modes, state = after(decaying, (0, 1, 2, 5, 8, 11))
    assert state["places"] == [2.0, 5.0, 8.0, 11.0] and near(modes.predict(state, 13.0).image, decaying(13.0))
    _, state = after(decaying, range(9), Modes(window=3))
    assert state["places"] == [6.0, 7.0, 8.0] and len(state["values"]) == 3
    _, state = after(decaying, (0, 1, 2, 2))  # Heun comes to a time twice
    assert state["places"] == [0.0, 1.0, 2.0]


def test_noise_below_the_threshold_makes_no_mode():
    g = torch.Generator().manual_seed(1)

    def noisy(s):
        return A * 0.9**s + 1e-5 * torch.randn(A.shape, generator=g)

    modes, state = after(noisy, (0, 1, 2, 3, 4, 5))
    assert near(modes.predict(state, 12.0).image, A * 0.9**12, 1e-3)
    sizes, _, _ = fitted([v.image for v in state["values"]], 2.0)
    assert (sizes > 1e-6).sum(1).tolist() == [1, 1]


def test_samples_image_and_text_have_fits_of_their_own():
    def both(rows, s):
        image = torch.stack([A[0] * 0.9**s, A[1] * 0.5**s])[rows]
        return Branch(image, (B * 0.7**s)[rows])

    states = [{}, {}]
    for s in (0.0, 1.0):
        for state, rows in zip(states, (slice(None), slice(1, 2)), strict=True):
            Modes().observe(state, s, both(rows, s))
    together, alone = (Modes().predict(state, 4.0) for state in states)
    assert near(together.image, both(slice(None), 4.0).image) and near(together.text, both(slice(None), 4.0).text)
    assert near(alone.image[0], together.image[1], 1e-6) and near(alone.text[0], together.text[1], 1e-6)


def test_a_predictor_of_a_cache_with_a_gate_is_stored_with_it(tmp_path):
    net = family("dit", cache=DBCache(1e6, front=1, warmup=3, most_in_a_row=1, predictor=Modes(4)))
    save(net, tmp_path / "artifact")
    read = load(tmp_path / "artifact").denoiser
    assert read.applied["cache"] == net.applied["cache"] and torch.equal(paint(read, 8), paint(net, 8))
    other = family("dit", cache=DBCache(1e6, front=1, warmup=3, most_in_a_row=1))
    assert not torch.equal(paint(other, 8), paint(net, 8))


def test_settings_that_cannot_be_are_refused(make_dit):
    with pytest.raises(ValueError, match="DMD: interval must be at least 1, got 0"):
        DMD(0)
    with pytest.raises(ValueError, match="DMD: window must be at least 2, got 1"):
        DMD(window=1)
    with pytest.raises(ValueError, match="DMD: growth must be at least 1, got 0.5"):
        DMD(growth=0.5)
    with pytest.raises(ValueError, match="DMD: spare is two numbers of units, for site=span alone"):
        DMD(spare=(1, 0))
    with pytest.raises(ValueError, match=r"DMD\): .* 3 computed evaluations .* of the 6 of this sampler 2 are"):
        paint(edit.apply(make_dit(), {"cache": DMD(4)}), 6)
    with pytest.raises(ValueError, match="DBCache: order 2 is of a polynomial, and predictor is Modes: leave one"):
        DBCache(order=2, predictor=Modes())
    net = edit.apply(make_dit(), {"reuse": Reuse(units=(1,))})
    for site in ("module", "last", "span"):
        with pytest.raises(ValueError, match="DMD: 'reuse' caches attention of unit 1 already"):
            edit.apply(net, {"cache": DMD(site=site)})
