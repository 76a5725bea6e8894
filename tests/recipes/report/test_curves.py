import pytest
from made_runs import made_run

from recipes.report.curves import Curve, is_decades, losses, others, plots, read_curves, seconds


def curves(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    return read_curves(tmp_path / "metrics.csv")


def test_columns_hold_what_was_logged_torn_and_empty_cells_aside(tmp_path):
    found = curves(tmp_path, "step,train/loss,heldout/loss\n1,2.0,\n2,nan,1.5\n3,1.0,1.25\n4,0.")
    assert found["train/loss"] == Curve("train/loss", (1, 3), (2.0, 1.0), lost=1)
    assert found["heldout/loss"] == Curve("heldout/loss", (2, 3), (1.5, 1.25))
    assert read_curves(tmp_path / "none.csv") == {}


def test_training_and_held_out_loss_share_a_plot_and_the_rest_is_apart(tmp_path):
    found = read_curves(
        made_run(tmp_path, "a", columns={"heldout/loss": (3.0, 2.0), "grad_norm": (1, 2), "train/lora/size": (1, 1)})
        / "metrics.csv"
    )
    assert [c.name for c in losses(found)] == ["train/loss", "heldout/loss"]
    assert [p.title for p in plots(found)] == ["loss", "learning rate", "gradient norm"]
    assert [p.title for p in others(found)] == ["lora/size", "images_per_second"]
    assert "training loss 2 at step 10, 1 at step 20; held-out loss 3 at step 10, 2 at step 20" == plots(found)[0].text


def test_where_roles_take_turns_the_parts_are_shown_not_their_mixture(tmp_path):
    found = curves(tmp_path, "step,train/loss,train/critic/heads,train/match\n1,9,,2\n2,1,1,2\n")
    assert [c.name for c in losses(found)] == ["train/match", "train/critic/heads"]


def test_time_is_the_sum_of_images_over_speed(tmp_path):
    found = curves(tmp_path, "step,images_per_second\n10,32\n20,64\n")
    assert seconds(found, 16) == pytest.approx(10 * 16 / 32 + 10 * 16 / 64)
    assert seconds(found, 0) is None and seconds({}, 16) is None


def test_a_long_curve_is_thinned_by_means_and_ends_as_it_did():
    curve = Curve("train/loss", tuple(range(1, 10_001)), tuple(float(i % 2) for i in range(10_000)))
    steps, values = curve.thin()
    assert len(steps) == len(values) <= 1500 and curve.end == 0.5
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.01)
    assert max(curve.smooth()[100:]) - min(curve.smooth()[100:]) < 0.1


def test_an_axis_is_logarithmic_where_positive_values_spread_over_decades():
    assert (
        is_decades([1.0, 30.0]) and not is_decades([1.0, 3.0]) and not is_decades([-1.0, 30.0]) and not is_decades([])
    )
