"""Every stage has a name, by which its words are given on the command line; former lists of words have one, too."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from recipes.config.check import check
from recipes.config.composed import names
from recipes.config.errors import UserError
from recipes.config.older import bring_up_to_date
from recipes.config.sources import register
from recipes.config.staged import as_given, for_stage, gathered, shared, stages_of
from recipes.config.words import parse_options
from recipes.runtime.run_folder import refuse_other_run

CONFIGS = Path(__file__).parents[3] / "configs"
TINYFUSION = "experiment=flux_tiny/tinyfusion"
GENERATE = "before=[[data.generate,'teacher=a','prompts=b','out=c']]"


def composed(*words: str):
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        return compose("train", gathered(words))


def words_of(cfg, name: str) -> list[str]:
    return next(stage.all for stage in stages_of(cfg) if stage.name == name)


def test_words_for_a_stage_follow_its_own_and_replace_those_of_the_same_key():
    cfg = composed(TINYFUSION, "before.teacher.trainer.max_steps=6", "before.search.seed=3")
    assert words_of(cfg, "teacher") == ["experiment=flux_tiny/teacher", "trainer.max_steps=6"]
    search = words_of(cfg, "search")
    assert search[:2] == ["experiment=flux_tiny/tinyfusion_search", "seed=3"] and "seed=0" not in search
    assert check(cfg) == []


def test_words_reach_a_module_as_it_reads_them():
    cfg = composed(GENERATE, "before.generate.prompts=mine.txt", "before.generate.steps=2")
    assert words_of(cfg, "generate") == ["data.generate", "teacher=a", "prompts=mine.txt", "out=c", "steps=2"]
    cfg = composed("before=[[data.precompute,'--images=a','--vae=v','--out=c']]", "before.precompute.max_tokens=5")
    assert words_of(cfg, "precompute")[-1] == "--max-tokens=5" and check(cfg) == []


@pytest.mark.parametrize(
    "value", ["[1,2]", "'2:4,3:4'", "it's", "a\\'b", "{a: 1}", "a b", "é", "x,y", "back\\", "a=b=c", "'${runs}/x'"]
)
def test_any_value_reaches_the_stage_as_it_was_typed(value):
    cfg = composed("experiment=flux_tiny/lcm", f"before.teacher.init={value}")
    assert words_of(cfg, "teacher")[-1] == f"init={value.replace('${runs}', 'runs')}"


@pytest.mark.parametrize(
    "words", [["seed=1", "+before.a.x={b: 1}", "before.a.name=it's", "before.b-c.init='2:4,3:4'"], ["~ema", "a=[1,2]"]]
)
def test_a_command_is_written_down_as_it_was_given(words):
    assert as_given(gathered(words)) == words


def test_several_values_for_a_stage_are_refused_with_how_to_try_them():
    """All jobs of a sweep would continue one run."""
    (error,) = check(composed(TINYFUSION, "before.teacher.trainer.max_steps=100,200"))
    assert error.startswith("before.teacher: trainer.max_steps=100,200 gives several values, and all jobs of a sweep")
    alone = "python train.py -m experiment=flux_tiny/teacher trainer.max_steps=100,200 name=teacher_sweep"
    assert f"{alone}, and sweep this run over their folders, with before=[] and init=..." in error and "\n" not in error
    for value in ("'1,2'", "[1,2]", "{a: 1, b: 2}"):  # each is one
        assert check(composed(TINYFUSION, f"before.teacher.init={value}")) == []


def test_what_is_added_or_forced_stays_so_and_a_stage_of_a_stage_is_reached_through_it():
    cfg = composed(TINYFUSION, "+before.teacher.backbone.x=1", "before.search.before.teacher.seed=5")
    assert words_of(cfg, "teacher")[-1] == "+backbone.x=1"
    assert words_of(cfg, "search")[-1] == "before.teacher.seed=5"
    for word in ("+backbone.x=1", "seed=5", "~ema.ramp=true"):
        prefix = re.match(r"[+~]*", word)[0]
        assert for_stage("before.teacher", word) == f"{prefix}before.teacher.{word.removeprefix(prefix)}"


def test_indices_and_the_whole_list_are_the_configuration_s_own():
    words = ["before.0.1='prompts=x'", "before=[]", "before_all=1", "data.before.x=1"]
    assert gathered(words) == words
    cfg = composed(GENERATE, "before.0.2='prompts=x'")
    assert words_of(cfg, "generate")[2] == "prompts=x"


@pytest.mark.parametrize("word", ["before.teacher=3", "before.teacher", "before.teacher.=3", "~before.teacher"])
def test_a_word_without_a_key_of_the_stage_is_refused(word):
    with pytest.raises(UserError, match=re.escape("a word for a stage is before.teacher.<key>=<value>")):
        gathered([word])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((TINYFUSION, "before.techer.seed=1"), "'techer' before it; did you mean 'teacher'? (accepted: prune, search"),
        ((TINYFUSION, "before=[]", "before.teacher.seed=1"), "there is nothing before it: leave those words out"),
        ((GENERATE, "before.generate.stps=2"), "before.generate: data.generate: there is no key 'stps'"),
        (("before=[{a: ['seed=1']}, {a: ['seed=2']}]",), "two stages are called a"),
        (("before=[{a+b: ['seed=1']}]",), "a stage's name of letters, digits"),
        (("before=[{a: ['seed=1'], b: ['seed=2']}]",), "expected a list of settings such as"),
    ],
)
def test_a_mistyped_stage_or_word_is_refused_with_what_there_is(words, sentence):
    (error,) = check(composed(*words))
    assert sentence in error, error


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["experiment=dit_digits/teacher"], "teacher"),
        (["name=sweep/big", "experiment=dit_digits/teacher"], "big"),
        (["seed=1"], "run"),
        (["name='1 a'"], "run_1_a"),
        (["data.generate", "out=a"], "generate"),
    ],
)
def test_a_stage_without_a_name_is_called_after_what_it_does(words, name):
    (stage,) = stages_of(OmegaConf.create({"before": [words]}))
    assert stage.name == name and stage.all == words


def test_two_alike_are_numbered():
    cfg = OmegaConf.create({"before": [["data.generate", "out=a"], ["data.generate", "out=b"]]})
    assert [stage.name for stage in stages_of(cfg)] == ["generate", "generate_2"]


def test_stages_of_our_own_configurations_have_names_that_say_what_they_are():
    register()
    found, methods = set(), set()
    for experiment in names(CONFIGS, "experiment"):
        file, method = CONFIGS / f"experiment/{experiment}.yaml", experiment.rpartition("/")[2]
        if method in methods and not (file.is_file() and "before" in file.read_text()):
            continue  # the stages of a method are the same on every world
        methods.add(method)
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
            cfg = compose("train", [f"experiment={experiment}"])
        for entry in cfg.before:
            ((name, _),) = entry.items() if OmegaConf.is_dict(entry) else [(None, entry)]
            found.add(name)
            assert name or "=" not in OmegaConf.to_container(entry)[0], f"{experiment}: a run without a name"
    known = {None, "teacher", "search", "student", "truth", "ranking", "shared", "experts", "encoder", "warm"}
    assert found == known | {"dense", "lower"}


def test_words_that_are_no_options_are_gathered_where_a_command_line_is_read():
    args, flags = parse_options(["before.a.seed=1", "--cfg", "job", "seed=2"])
    assert args.overrides == ["seed=2", "++stages.a=['seed=1']"] and flags == ["--cfg", "job"]


def test_shared_settings_are_words():
    assert "trainer.threads=null" in shared(composed())


def test_a_run_of_before_stages_had_names_is_continued(tmp_path):
    """Its config.yaml has lists of words, and no `stages`."""
    cfg = composed("experiment=dit_digits/dydit", f"runs={tmp_path}", "before.teacher.trainer.max_steps=6")
    OmegaConf.resolve(cfg)
    assert OmegaConf.is_dict(cfg.before[0])
    former = OmegaConf.create(OmegaConf.to_container(cfg))
    former.before = [["experiment=dit_digits/wide"]]
    del former["stages"]
    (tmp_path / "artifact").mkdir()
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(former))
    refuse_other_run(cfg, tmp_path)
    cfg.seed = 9
    with pytest.raises(UserError, match="seed=0, this command says 9"):
        refuse_other_run(cfg, tmp_path)


def test_a_former_command_under_a_name_is_brought_up_to_date():
    cfg = OmegaConf.create({"before": [{"out": ["edit.export", "out=a"]}]})
    bring_up_to_date(cfg)
    assert cfg.before[0].out[0] == "recipes.export"
