"""The ends of error sentences."""

from recipes.config.suggestions import nearest


def test_nearest_prefers_the_closest_and_stays_silent_for_strangers():
    assert nearest("widht", ["depth", "width", "weight"])[0] == "width"
    assert nearest("zzz", ["depth", "width"]) == []
