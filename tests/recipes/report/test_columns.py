import pytest
from reports import entry, measure, small_report, whole_report

from recipes.report.columns import COLUMNS, best, groups, present, rows
from recipes.report.notes import notes

BY_TITLE = {c.title: c for c in COLUMNS}
FRECHET, MACS, TIME = (BY_TITLE[t] for t in ("Fréchet distance", "MACs per image, G", "ms per image"))


@pytest.fixture
def report(tmp_path) -> dict:
    return small_report(tmp_path)


def distances(*measures: tuple[float, float]) -> list[dict]:
    """Rows of one table with these Fréchet distances and spreads."""
    made = entry("a", {float(w): 0.0 for w in range(len(measures))}, 1)
    for result, (value, spread) in zip(made["results"], measures, strict=True):
        result["quality"]["frechet"] = measure(value, spread)
    return rows({"artifacts": [made]})


def test_the_best_value_is_the_smallest_distance_and_the_smallest_cost(report):
    table = rows(report)
    assert [row["label"] for row in table] == ["<slow> & right w=1", "<slow> & right w=1.5", "fast w=1"]
    assert best(FRECHET, table) == {0} and best(MACS, table) == {2}
    assert best(FRECHET, table[:1]) == set()  # nothing to compare with


@pytest.mark.parametrize(
    ("measures", "first"),
    [
        ([(1.0, 0.2), (1.5, 0.2)], {0}),
        ([(1.0, 0.2), (1.5, 0.4)], set()),  # closer than both spreads together
        ([(1.0, 0.4), (1.5, 0.0)], {0}),
        ([(1.5, 0.1), (1.0, 0.1), (2.0, 1.5)], set()),  # the last may be better, too
        ([(1.0, 0.0), (1.0, 0.0), (2.0, 0.1)], set()),  # of measures, two alike cannot be told apart
    ],
)
def test_the_best_is_ahead_of_all_others_by_more_than_both_spreads(measures, first):
    assert best(FRECHET, distances(*measures)) == first


def test_counts_that_are_alike_are_the_best_together_unless_all_are(report):
    report["artifacts"].append(entry("other", {1.0: 3.5}, 1_000_000_000))
    assert best(MACS, rows(report)) == {2, 3} and best(BY_TITLE["parameters, M"], rows(report)) == set()


def test_what_is_measured_once_is_never_the_best(report):
    for i, a in enumerate(report["artifacts"][:2]):
        for result in a["results"]:
            result["cost"]["images_per_second"] = 10.0 * 100**i
    assert best(BY_TITLE["images/s"], rows(report)) == set()


def test_qualities_measured_against_different_images_are_not_ranked(report):
    report["artifacts"][1] = entry("fast", {1.0: 3.5}, 1_000_000_000, real="another")
    assert best(FRECHET, rows(report)) == set() and best(MACS, rows(report)) == {2}
    assert any("cannot be compared" in note for note in notes(report))


def test_macs_of_which_some_were_not_counted_are_shown_as_a_lower_bound_and_are_never_the_best(report):
    fast = report["artifacts"][1]["results"][0]
    assert best(MACS, rows(report)) == {2}
    fast["cost"]["uncounted"] = ["aten.mv.default"]
    table = rows(report)
    assert best(MACS, table) == set() and MACS.texts(table[2]) == ("≥ 1.00", "") and MACS.texts(table[0])[0] == "4.00"
    assert any("aten.mv.default has no FLOP formula" in note for note in notes(report))


@pytest.mark.parametrize(
    ("seconds", "texts"),
    [
        ((0.09469, 0.09262, 0.09676), ("94.7", "± 2.1")),
        ((0.00484, 0.00482, 0.00486), ("4.84", "± 0.02")),
        ((1.5, 1.4, 1.6), ("1,500", "± 100")),
        ((0.0, 0.0, 0.0), ("0", "± 0")),
    ],
)
def test_costs_have_three_figures_and_their_spread_as_many_digits(report, seconds, texts):
    (row,) = rows({"artifacts": [report["artifacts"][1]]})
    row["cost"]["generation"] = dict(zip(("median", "low", "high"), seconds, strict=True))
    assert TIME.texts(row) == texts


def test_a_time_whose_spread_is_above_a_fifth_is_marked_and_the_notes_say_so(report):
    assert not any(note.startswith("~") for note in notes(report))
    report["artifacts"][1]["results"][0]["cost"]["generation"] = {"median": 0.1, "low": 0.08, "high": 0.13}
    *_, row = rows(report)
    assert TIME.unsteady(row) and TIME.texts(row)[0] == "~100"
    assert sum(note.startswith("~") for note in notes(report)) == 1
    row["cost"]["generation"] = {"median": 0.1, "low": 0.08, "high": 0.119}
    assert not TIME.unsteady(row)


def test_activated_parameters_are_told_where_they_are_not_all(tmp_path):
    report = whole_report(tmp_path, 1)
    assert "activated, M" in [c.title for c in present(rows(report))]
    for a in report["artifacts"]:
        for result in a["results"]:
            result["cost"]["activated"] = result["cost"]["parameters"]
    assert "activated, M" not in [c.title for c in present(rows(report))]


def test_memory_beyond_the_weights_has_a_column_and_reports_without_it_have_none(tmp_path):
    report = whole_report(tmp_path, 1)
    column = BY_TITLE["of it not weights, MiB"]
    assert column.texts(rows(report)[0]) == ("512", "")
    del report["artifacts"][0]["results"][0]["cost"]["resident"]  # of an older version
    assert column.texts(rows(report)[0])[0] == "–"


def test_columns_are_in_groups_of_which_only_those_with_values_are_shown(report):
    assert [name for name, _ in groups(rows(report))] == ["against real images", "work and memory", "time"]
