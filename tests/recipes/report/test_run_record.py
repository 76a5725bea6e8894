import fcntl
import json
import os
import struct
import subprocess
import sys
import time

import pytest
from made_runs import made_run

from recipes.report.run_record import find_runs, is_locked, parameters, read
from recipes.runtime.files import locked


def test_a_run_is_read_without_torch():
    code = "import sys, recipes.page, recipes.sweep; print('torch' in sys.modules, 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"] * 2


def test_nested_runs_are_found_and_what_a_run_holds_is_no_run(tmp_path):
    for name in ("a", "sweep/lr-1/seed-0", "sweep/lr-1/seed-1", "a/below"):
        made_run(tmp_path, name)
    (tmp_path / "a/samples/artifact").mkdir(parents=True)
    (tmp_path / "images/shards").mkdir(parents=True)
    (tmp_path / ".hidden/artifact").mkdir(parents=True)
    found = [str(f.relative_to(tmp_path)) for f in find_runs(tmp_path)]
    assert found == ["a", "a/below", "sweep/lr-1/seed-0", "sweep/lr-1/seed-1"]
    record = read(tmp_path / "sweep/lr-1/seed-0")
    assert record.name == "sweep/lr-1/seed-0" and record.root == tmp_path
    (tmp_path / "sweep/lr-1/seed-0").rename(tmp_path / "moved")
    assert (read(tmp_path / "moved").name, read(tmp_path / "moved").root) == ("moved", tmp_path)


def test_the_state_is_told_by_what_is_there(tmp_path):
    states = {}
    states["finished"] = read(made_run(tmp_path, "whole"))
    states["stopped at step 10 of 20"] = read(half := made_run(tmp_path, "half", artifact=False))
    (half / "metrics.csv").write_text("step,train/loss\n10,1.0\n2")  # torn by a kill
    longer = made_run(tmp_path, "longer", {"trainer.max_steps": 20})
    (longer / "config.yaml").write_text((longer / "config.yaml").read_text().replace("max_steps: 20", "max_steps: 30"))
    states["stopped at step 20 of 30"] = read(longer)
    states["stopped before its first row"] = read(new := made_run(tmp_path, "new", artifact=False))
    (new / "metrics.csv").unlink()
    assert {state: read(r.folder).state for state, r in states.items()} == {state: state for state in states}


def test_a_checkpoint_after_the_last_row_counts(tmp_path):
    run = made_run(tmp_path, "a", artifact=False, losses=())
    (run / "checkpoints").mkdir()
    (run / "checkpoints/step_00000012.ckpt").touch()
    assert read(run).state == "stopped at step 12 of 20"


def test_a_run_that_another_process_writes_is_running(tmp_path):
    run = made_run(tmp_path, "a", artifact=False)
    with locked(run):
        assert not is_locked(run)  # by this very process: the run writes its own page at its end
        read_, write = os.pipe()
        if not (child := os.fork()):
            with open(run / ".lock2", "w") as file:  # a lock of the other process's own
                fcntl.flock(file, fcntl.LOCK_EX)
                (run / ".lock2").replace(run / ".lock")
                os.write(write, b"x")
                time.sleep(60)
            os._exit(0)
        os.read(read_, 1)
        try:
            assert is_locked(run) and read(run).state == "running, at step 20 of 20"
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)
    assert not is_locked(run)


@pytest.mark.parametrize(
    "file, text",
    [
        ("config.yaml", "a: [1\n"),
        ("config.yaml", "- 1\n- 2\n"),
        ("config.yaml", "trainer: 3\nname: [1]\nedits: 7\nbackbone: {_target_: 5}\nseed: {}\n"),
        ("config.yaml", ""),
        ("config.yaml", "a: &a [*a, *a]\n"),
        ("artifact/edits.json", "{"),
        ("artifact/edits.json", '{"run": 3, "edits": [], "data": "x"}'),
        ("report.json", "[]"),
        ("report.json", '{"artifacts": [3, {"results": [4, {"guidance": "x"}, {"guidance": 1, "cost": 3}]}]}'),
        ("env.json", '{"command": 3, "device": []}'),
        ("metrics.csv", "\0\0\xff"),
        ("metrics.csv", "step,train/loss\nx,y\n,,,,\n5"),
        ("metrics.csv", ""),
        ("pruning.json", '{"kept": 3, "settings": []}'),
    ],
)
def test_whatever_a_file_holds_a_run_is_read_and_has_a_page_and_a_row(tmp_path, file, text):
    from recipes.report.run_index import html as index
    from recipes.report.run_page import html as page

    run = made_run(tmp_path, "a", frechet={1.0: 2.0})
    (run / file).write_text(text)
    record = read(run)
    assert "<title>a</title>" in page(record) and "<td" in index(tmp_path, [record])
    json.dumps([record.state, record.backbone, record.methods, record.steps, record.images, str(record.date)])


def test_a_damaged_file_is_told_in_a_sentence(tmp_path):
    (made_run(tmp_path, "a") / "config.yaml").write_text("a: [1\n")
    (fault,) = read(tmp_path / "a").faults
    assert fault.startswith("config.yaml is damaged: ") and "\n" not in fault


def test_the_last_numbers_are_of_the_last_row_and_on_held_out_data_of_the_last_that_has_them(tmp_path):
    run = made_run(tmp_path, "a")
    rows = "\n".join(f"{k},{k / 1000},{k if k % 400 == 0 else ''},{'' if k > 900 else 7}" for k in range(1, 901))
    (run / "metrics.csv").write_text(f"step,train/loss,heldout/loss,lr\n{rows}\n901,0.5,,\n902,0.4")
    assert read(run).last == {"step": 901, "train/loss": 0.5, "heldout/loss": 800}


def test_methods_are_told_by_their_classes(tmp_path):
    edits = {"lora": {"_target_": "edit.tuning.lora.LoRA"}}
    terms = {"out": {"_target_": "edit.distillation.output.OutputKD"}}
    run = made_run(
        tmp_path, "a", {"edits": edits, "terms": terms, "recipe": {"_target_": "recipes.calibrate.Calibrating"}}
    )
    assert read(run).methods == ["Calibrating", "LoRA", "OutputKD"] and read(run).backbone == "DiT"


def test_parameters_are_counted_from_the_heads_of_the_weights(tmp_path):
    run = made_run(tmp_path, "a")
    head = json.dumps({"__metadata__": {}, "w": {"shape": [3, 4]}, "b": {"shape": []}}).encode()
    (run / "artifact/diffusion_pytorch_model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
    assert parameters(read(run)) == 13
    (run / "artifact/diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    assert parameters(read(run)) is None
    assert parameters(read(made_run(tmp_path, "reported", frechet={1.0: 1.0}))) == 1_230_000
