import pytest
from made_runs import made_run, result

from recipes.report.run_record import read
from recipes.report.swept import next_command, summarise, swept


def names(sweep):
    return [(s.place, s.mean, s.spread) for s in sweep.settings]


def test_every_figure_that_runs_are_compared_by_is_read_off_a_report(tmp_path):
    from recipes.report.columns import KEYED

    row = result(1.0, 2.5)
    run = made_run(tmp_path, "a", frechet={1.0: 2.5})
    found = {key: column.value(r) for r in read(run).results for key, column in KEYED.items()}
    assert {k: v for k, v in found.items() if v is not None} == {
        "frechet": 2.5, "accuracy": 90.0, "macs_per_image": 2.0, "generation": 20.0
    }  # fmt: skip
    row["quality"]["frechet"], row["cost"] = {"value": "x"}, {"generation": 3}
    assert all(column.value(row) is None for column in (KEYED["frechet"], KEYED["generation"]))


def test_mean_and_sample_standard_deviation_over_seeds(tmp_path):
    for seed, loss in enumerate((1.0, 2.0, 4.5)):
        made_run(tmp_path, f"a{seed}", {"seed": seed}, losses=[loss])
        made_run(tmp_path, f"b{seed}", {"seed": seed, "optimizer.lr": 0.5}, losses=[loss / 2])
    sweep = summarise(tmp_path)
    assert sweep.keys == ("optimizer.lr",) and sweep.seeds == ("0", "1", "2")
    assert names(sweep) == [
        ((0.5,), pytest.approx(1.25), pytest.approx(0.90138782)),
        ((0.001,), pytest.approx(2.5), pytest.approx(1.80277564)),
    ]


def test_keys_that_change_together_are_one_setting_named_as_it_was_typed(tmp_path):
    sizes = {"S": (2, 32), "B": (4, 64)}
    for size, (depth, width) in sizes.items():
        for lr in (1e-3, 2e-3):
            changes = {"backbone.depth": depth, "backbone.hidden_size": width, "optimizer.lr": lr}
            command = ["train.py", f"size={size}", f"optimizer.lr={lr}", "name=x"]
            made_run(tmp_path / "typed", f"{size}{lr}", changes, command=command)
            made_run(tmp_path / "old", f"{size}{lr}", changes)  # of a version that wrote no command down
    records = [[read(f) for f in sorted((tmp_path / kind).iterdir())] for kind in ("typed", "old")]
    keys, _, value = swept(records[0])
    assert keys == ("size", "optimizer.lr") and {value("size", r) for r in records[0]} == {"S", "B"}
    assert set(swept(records[1])[0]) == {"backbone.depth", "optimizer.lr"}


def test_quality_comes_before_held_out_loss_and_that_before_training_loss(tmp_path):
    for seed in (0, 1):
        made_run(tmp_path / "t", f"{seed}", {"seed": seed})
        made_run(tmp_path / "h", f"{seed}", {"seed": seed}, columns={"heldout/loss": (3.0, 2.5)})
        made_run(tmp_path / "q", f"{seed}", {"seed": seed}, columns={"heldout/loss": (3.0, 2.5)}, frechet={1.0: 1.0})
    chosen = {kind: summarise(tmp_path / kind) for kind in "thq"}
    assert [chosen[k].figure.key for k in "thq"] == ["train/loss", "heldout/loss", "frechet"]
    assert chosen["h"].best.mean == 2.5  # the last


def test_words_for_a_stage_are_settings_under_the_names_by_which_they_are_given(tmp_path):
    for steps in (100, 200):
        for seed in (0, 1):
            words = [f"trainer.max_steps={steps}", "seed=5"]
            changes = {"seed": seed, "stages": {"big-teacher": words}, "init": f"runs/t{steps}"}
            command = ["train.py", f"before.big-teacher.trainer.max_steps={steps}", f"init=runs/t{steps}"]
            made_run(tmp_path, f"{steps}-{seed}", changes, losses=[1 / steps], command=command)
    sweep = summarise(tmp_path)
    assert sweep.keys == ("before.big-teacher.trainer.max_steps",)  # its folder changes with it
    assert [s.place for s in sweep.settings] == [(200,), (100,)]


def test_more_is_better_where_it_is(tmp_path):
    for lr, speed in ((1e-3, 10.0), (2e-3, 30.0)):
        made_run(tmp_path, f"{lr}", {"optimizer.lr": lr}, columns={"mfu": (speed, speed)})
    assert summarise(tmp_path, "mfu").best.place == (2e-3,)
    assert summarise(tmp_path, "mfu").figure.better == 1


def test_the_guidance_weight_is_the_same_for_all_and_the_one_of_the_best_setting(tmp_path):
    made_run(tmp_path, "a", {"optimizer.lr": 1e-3}, frechet={1.0: 5.0, 1.5: 3.0})
    made_run(tmp_path, "b", {"optimizer.lr": 2e-3}, frechet={1.0: 2.0, 1.5: 9.0})
    sweep = summarise(tmp_path)
    assert [s.mean for s in sweep.settings] == [2.0, 5.0] and "guidance weight 1," in sweep.note


def test_unfinished_diverged_and_damaged_jobs_are_listed_not_counted(tmp_path):
    for seed in (0, 1):
        made_run(tmp_path, f"whole{seed}", {"seed": seed}, losses=[1.0 + seed])
        made_run(tmp_path, f"other{seed}", {"seed": seed, "optimizer.lr": 0.5}, losses=[0.1], artifact=seed == 0)
    made_run(tmp_path, "nan", {"seed": 2}, losses=[1.0, float("nan")])
    (made_run(tmp_path, "torn", {"seed": 3}) / "config.yaml").write_text("a: [1\n")
    sweep = summarise(tmp_path)
    why = {job.name: job.why for job in sweep.left}
    assert why["other1"] == "stopped at step 20 of 20" and why["nan"] == "training loss is nan"
    assert "config.yaml is damaged" in why["torn"] and len(why) == 3
    assert [len(s.jobs) for s in sweep.settings] == [1, 2] and sweep.best.spread is None
    assert any("has 1 runs with a number, others 2" in note for note in sweep.notes())
    assert sweep.absent == ("optimizer.lr=0.5, seed 2",)


def test_a_second_best_within_the_spread_is_told(tmp_path):
    for lr, values in ((1e-3, (1.0, 2.0)), (2e-3, (1.1, 2.1)), (3e-3, (9.0, 9.1))):
        for seed, loss in enumerate(values):
            made_run(tmp_path, f"{lr}-{seed}", {"optimizer.lr": lr, "seed": seed}, losses=[loss])
    assert any("within a standard deviation" in note for note in summarise(tmp_path).notes())


def test_seeds_alone_are_one_setting(tmp_path):
    for seed in (0, 1, 2):
        made_run(tmp_path, f"{seed}", {"seed": seed}, losses=[1.0 + seed])
    sweep = summarise(tmp_path)
    assert sweep.keys == () and len(sweep.settings) == 1 and sweep.best.mean == 2.0 and sweep.best.spread == 1.0


def test_runs_that_are_no_sweep_are_refused(tmp_path):
    made_run(tmp_path, "a")
    # a bit of each index: no two keys split the runs alike
    for i in range(1, 200):
        changes = {f"backbone.field{k}": i >> k & 1 for k in range(7)}
        if i in (1, 2, 4, 8, 16, 32, 64):
            made_run(tmp_path, f"{i}", changes)
    with pytest.raises(ValueError, match="differ in 7 settings .* a sweep in 6 at most"):
        summarise(tmp_path)


def test_without_a_report_the_best_is_to_be_measured_on_all_its_seeds(tmp_path):
    for lr in (1e-3, 2e-3):
        for seed in (0, 1):
            made_run(tmp_path, f"s/{lr}-{seed}", {"optimizer.lr": lr, "seed": seed}, losses=[lr])
    what, line = next_command(summarise(tmp_path / "s"))
    root = tmp_path / "s"
    assert what == "Measure the best setting"
    assert line == f"python eval.py artifact={root}/0.001-0 artifact={root}/0.001-1 out=reports/s"


def test_a_number_written_in_two_ways_is_one_value(tmp_path):
    made_run(tmp_path, "a", {"optimizer.lr": 1, "seed": 0}, losses=[1.0])
    made_run(tmp_path, "b", {"optimizer.lr": 1.0, "seed": 1}, losses=[2.0])
    assert summarise(tmp_path).keys == ()
