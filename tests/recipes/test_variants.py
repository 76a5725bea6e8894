"""Training-free edits as words of a command."""

import subprocess
import sys

import pytest

from edit.caching.reuse import Reuse
from edit.inputs.words import apart
from recipes.config.errors import UserError
from recipes.variants import variants


def read(*words):
    _, texts = apart(words, ("variant",))
    return variants(texts)


def test_a_variant_names_files_of_edits_and_changes_their_fields():
    fast, few = read(
        *("variant.fast=reuse", "variant.fast.reuse.interval=5", "variant.few.steps=10"),
        *("variant.fast.reuse.units=[0,2]", "variant.fast.reuse.start=0.5", "variant.fast.reuse.backwards=true"),
    )
    assert fast.edits() == {"reuse": Reuse(5, units=(0, 2), start=0.5, backwards=True)} and fast.steps is None
    assert (few.name, few.edits(), few.steps) == ("few", {}, 10)
    assert fast.changes == "reuse interval=5 units=[0,2] start=0.5 backwards=True" and few.changes == "steps=10"


def test_the_words_of_a_configuration_mean_the_same():
    assert read("variant.a.edits=reuse", "variant.a.edits.reuse.interval=5")[0].edits() == {"reuse": Reuse(5)}
    (both,) = read("variant.two=[reuse]", "variant.two.late._target_=edit.caching.reuse.Reuse", "variant.two.steps=3")
    assert list(both.edits()) == ["reuse", "late"] and both.steps == 3


def test_fields_of_one_variant_do_not_reach_another():
    fast, slow = read("variant.fast=reuse", "variant.fast.reuse.interval=5", "variant.slow=reuse")
    assert (fast.edits()["reuse"].interval, slow.edits()["reuse"].interval) == (5, 2)
    assert read("variant.slow=reuse")[0].edits()["reuse"].interval == 2


MISTAKES = {
    "variant.fast=reuze": "variant.fast=reuze: there is no configs/edits/reuze.yaml; did you mean 'reuse'",
    "variant.fast=../method/lcm": "there is no configs/edits/../method/lcm.yaml",
    "variant.fast=[reuse,reuse]": "two of these have an edit named 'reuse'",
    "variant.a b=reuse": "a variant is named by letters",
    "variant.fast.reuse.interval=5": "changes an edit that variant.fast does not name: add variant.fast=reuse",
    "variant.fast.steps=0": "variant.fast.steps: expected a whole number from 1 to 10000, got '0'",
    "variant.fast.guidance=3": "there is no such setting; write variant.fast.steps=<n>",
    "variant.fast=reuse variant.fast.reuse.interval=": "variant.fast.reuse.interval is empty",
    "variant.fast=reuse variant.fast.reuse.interval=[": "'[' is no value",
    "variant.fast=reuse variant.fast.reuse.interval=${x}": "refers to something",
    "variant.fast=reuse variant.fast.edits=reuse": "given twice, with edits and without",
    "variant.fast=reuse variant.fast.reuse.interval.x=2": "interval is 2 and no section",
    "variant.fast=reuse variant.fast.reuse..x=2": "a part of this key is empty",
    "variant.fast=reuse variant.fast.rose.x=2": "variant.fast has no edit named 'rose'; did you mean 'reuse'",
    # told by what the field is
    "variant.fast=reuse variant.fast.reuse.interval=0": "variant.fast.reuse.interval: expected int at least 1",
    "variant.fast=reuse variant.fast.reuse.interval=fast": "interval: expected int at least 1 and at most 1000000, got",
    "variant.fast=reuse variant.fast.reuse.intervall=3": "has no argument 'intervall'; did you mean 'interval'",
    "variant.fast.x._target_=os.system": "os.system is in none of the trusted packages",
    "variant.fast.x._target_=edit.solvers.Euler": "variant.fast.x._target_: an edit.denoiser.Edit was expected",
    "variant.fast=reuse variant.fast.reuse.units=[0,99999999999]": "expected at most 16777216",
}


@pytest.mark.parametrize("words", MISTAKES, ids=ascii)
def test_a_mistake_is_one_sentence(words):
    with pytest.raises(UserError) as caught:
        for made in read(*words.split(" variant")[:1], *(f"variant{w}" for w in words.split(" variant")[1:])):
            made.edits()
    assert MISTAKES[words] in str(caught.value) and "\n" not in str(caught.value)


def test_names_are_compared_without_loading_torch():
    use = "from recipes.variants import variants; variants({'variant.a': 'reuse'})"
    code = f"import sys; {use}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
