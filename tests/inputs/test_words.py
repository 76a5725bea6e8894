"""One parser for the words of all commands: every mistake is a sentence, and help is made of the same fields."""

from dataclasses import dataclass, field
from typing import Annotated

import pytest

from edit.inputs.limits import Count, Limits
from edit.inputs.words import apart, explained, keys, parse, read


@dataclass(frozen=True)
class Asked:
    """What to bake.

    Args:
        cake: name of the recipe
        eggs: how many; of hens, not of ducks, and fresh ones at that, as every baker knows who has ever been asked to
            bake for others
        sugar: share of the weight
        icing: write on it
        guests: may be given several times
        layers: heights
        oven: where to bake

    Raises:
        ValueError: for a cake that falls
    """

    cake: str
    eggs: Count = 3
    sugar: Annotated[float, Limits(0, 1)] | None = 0.25
    icing: bool = False
    guests: tuple[str, ...] = ()
    layers: list[int] = field(default_factory=list)
    oven: str | None = None
    rank: int = 0  # no key


@dataclass
class Plain:
    speed: int = 3
    name: str = "x"


def test_words_are_values_of_the_annotated_types():
    given = parse(Asked, "cake=a=b eggs=5 sugar=none icing=True guests=ann guests=bob".split())
    assert given == {"cake": "a=b", "eggs": 5, "sugar": None, "icing": True, "guests": ("ann", "bob")}
    for text, layers in (("[1, 2]", [1, 2]), ("3", [3]), ("[]", [])):
        assert parse(Asked, ["cake=c", f"layers={text}"])["layers"] == layers
    assert read(Asked, ["cake=c"]) == Asked("c")
    assert read(Plain, ["speed=4"]) == Plain(4)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "cake is missing: cake=<name of the recipe>"),
        ("cake", "'cake' is no setting: write key=value, such as cake=..."),
        ("=x", "'=x' is no setting"),
        ("--cake=x", "there is no key '--cake': did you mean cake?"),
        ("cake=x egs=3", "there is no key 'egs': did you mean eggs?"),
        ("cake=x zzz=3", "there is no key 'zzz': see --help"),
        ("cake=x rank=1", "there is no key 'rank'"),
        ("cake=x oven.heat=1", "there is no key 'oven.heat'"),
        ("cake=x cake=y", "cake is given twice: keep one of cake=x and cake=y"),
        ("cake=x eggs=many", "eggs: expected a whole number, got 'many'"),
        ("cake=x sugar=much", "sugar: expected a number, got 'much'"),
        ("cake=x layers=[1,b]", "layers: expected a whole number, got 'b'"),
        ("cake=x icing=3", "icing: expected true or false, got '3'"),
        ("cake=", "cake is missing: cake=<name of the recipe>"),
        ("cake=x oven=", "oven is empty: write oven=<where to bake>, or leave it out"),
        ("cake=x eggs=null", "eggs: expected a whole number, got 'null'"),
        ("cake=x eggs=0", "eggs must be at least 1, got 0; the default is 3"),
        ("cake=x sugar=nan", "sugar must be a finite number or None, got nan"),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence):
    with pytest.raises(ValueError) as error:
        read(Asked, words.split())
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_settings_of_a_section_are_set_apart_as_text():
    own = ["cake=x", "ovn.heat=1", "oven.=1", ".heat=1", "oven.heat"]
    assert apart([*own, "oven.heat=200", "oven.a.b="], ("oven",)) == (own, {"oven.heat": "200", "oven.a.b": ""})
    for wrong in own[1:4]:
        with pytest.raises(ValueError, match="there is no key"):
            parse(Asked, ["cake=x", wrong])
    with pytest.raises(ValueError, match="oven.heat is given twice: keep one of oven.heat=1 and oven.heat=2"):
        apart(["oven.heat=1", "oven.heat=2"], ("oven",))


def test_a_bare_word_stands_for_one_key():
    for words in (["apple=pie"], ["cake=apple=pie"]):
        assert parse(Asked, words, bare="cake") == {"cake": "apple=pie"}
    with pytest.raises(ValueError, match="cake is given twice"):
        parse(Asked, ["a", "b"], bare="cake")


def test_help_names_keys_defaults_and_nothing_else():
    said = explained(Asked)
    assert keys(Asked) == ["cake", "eggs", "sugar", "icing", "guests", "layers", "oven"] and "rank" not in said
    assert "cake=" in said and "how many;" in said and "bake for others (3)" in " ".join(said.split())
    assert "where to bake (null)" in said and max(map(len, said.splitlines())) <= 120
    assert "falls" not in said and "speed=" in explained(Plain)
