"""Model cards: settings, measurements, origins and licences."""

import json
from pathlib import Path

import pytest
import torch
from experts import Experts
from exports import load_stock, make_flux, make_run, randomise_lora, run, stock_output
from huggingface_hub import metadata_load

import edit
from edit.artifacts import card
from edit.artifacts.checkpoint import Artifact
from edit.artifacts.lora import LORA_WEIGHTS
from edit.objectives import FlowMatching
from edit.pruning.depth import DepthPruning
from edit.sampling import Sampler
from edit.solvers import Euler
from edit.tuning.lora import LoRA


def test_the_card_tells_recipe_metrics_use_and_the_teachers_licence(flux, tmp_path, pipeline):
    student = make_run(
        edit.apply(flux, {"shallow": DepthPruning(0.5)}),
        tmp_path / "student",
        teacher={"path": str(pipeline), "guidance": 3.5},
        init="${teacher.path}",
        terms={"output": {"_target_": "edit.distillation.output.OutputKD"}},
    )
    measures = {"prompt_accuracy": {"value": 0.8125, "spread": 0.01}, "frechet": {"value": 3.25, "spread": None}}
    results = [{"guidance": 1.0, "n": 64, "quality": measures, "compared": {"psnr": {"value": 21.5, "spread": 0.3}}}]
    entry = {"name": "student", "path": str(student), "results": results}
    (student / "report.json").write_text(json.dumps({"artifacts": [entry]}))
    assert run(f"artifact={student}", f"out={tmp_path / 'out'}") == 0
    text, matter = (tmp_path / "out" / "README.md").read_text(), metadata_load(tmp_path / "out" / "README.md")
    assert matter == {
        "library_name": "diffusers",
        "license": "other",
        "license_name": "toy-licence",
        "license_link": "LICENSE.md",
        "pipeline_tag": "text-to-image",
        "tags": ["edit", "diffusion-transformer"],
    }
    assert (tmp_path / "out" / "LICENSE.md").read_text() == "for toys only\n"
    assert "| guidance | images | prompt_accuracy | frechet | psnr |" in text
    assert "| 1 | 64 | 0.8125 ± 0.01 | 3.25 | 21.5 ± 0.3 |" in text
    for word in ("training steps: 1200", "edit.pruning.depth.DepthPruning", "ratio: 0.5", "OutputKD", "guidance: 3.5"):
        assert word in text
    assert str(tmp_path) not in text and str(pipeline.parent) not in text  # folders of this machine
    assert "FluxTransformer2DModel.from_pretrained" in text and "num_inference_steps=4, guidance_scale=3.5" in text


@pytest.mark.parametrize(
    ("teacher", "licence", "name"),
    [
        ("black-forest-labs/FLUX.1-dev", "other", "flux-1-dev-non-commercial-license"),
        ("black-forest-labs/FLUX.1-schnell", "apache-2.0", None),
        ("somebody/else", "unknown", None),
    ],
)
def test_the_licence_of_a_published_teacher_covers_what_is_made_from_it(teacher, licence, name, flux, tmp_path):
    first = make_run(flux, tmp_path / "first", teacher={"path": teacher})
    second = make_run(flux, tmp_path / "second", teacher={"path": str(first)}, init=str(first / "artifact"))
    assert run(f"artifact={second}", f"out={tmp_path / 'out'}") == 0  # through the run in between
    matter = metadata_load(tmp_path / "out" / "README.md")
    assert matter is not None and (matter["license"], matter.get("license_name")) == (licence, name)
    assert (matter["base_model"], matter["base_model_relation"]) == (teacher, "finetune")


@torch.no_grad()
def test_a_lora_on_a_run_of_ours_needs_that_run_and_not_what_the_run_started_from(asked, tmp_path):
    """Pruned and tuned further by the run, so its layers and weights are nobody else's."""
    root = "black-forest-labs/FLUX.1-dev"
    flux = edit.apply(make_flux(), {"shallow": DepthPruning(pattern="listed", units=(0, 2, 3))})
    tuned = make_run(flux, tmp_path / "tuned", init=root)
    assert run(f"artifact={tuned}", f"out={tmp_path / 'base'}") == 0
    edit.apply(flux, {"lora": LoRA(rank=2, targets=("attn.to_q", "proj_out"))})
    randomise_lora(flux)
    for start in (tuned, tuned / "artifact"):
        adapter = make_run(flux, tmp_path / "adapter", init=str(start), teacher={"path": root})
        assert run(f"artifact={adapter}", f"out={tmp_path / 'lora'}", "format=lora") == 0
        text, matter = (tmp_path / "lora" / "README.md").read_text(), metadata_load(tmp_path / "lora" / "README.md")
        assert matter is not None and "base_model" not in matter and matter["license"] == "other"  # FLUX.1-dev's
        assert "This adapter needs `tuned`, the model that it was trained on. It is a run" in text
        assert 'FluxTransformer2DModel.from_pretrained("<export of tuned>"' in text and str(tmp_path) not in text
        assert f'from_pretrained("{root}"' not in text
    base = load_stock(tmp_path / "base")
    base.load_lora_adapter(tmp_path / "lora", weight_name=LORA_WEIGHTS, use_safetensors=True)
    # fp32: alpha / rank is applied to B here, to the product there
    torch.testing.assert_close(stock_output(base, flux, asked), flux.eval()(*asked).sample, rtol=1e-4, atol=1e-4)
    words = (f"artifact={adapter}", f"out={tmp_path / 'lora'}", "format=lora", f"teacher={tuned}")
    assert run(*words) == 0 and "needs `tuned`" in (tmp_path / "lora" / "README.md").read_text()  # said by hand


def test_a_lora_on_a_published_model_names_it_as_its_base(flux, tmp_path):
    edit.apply(flux, {"lora": LoRA(rank=2, targets=("attn.to_q",))})
    adapter = make_run(flux, tmp_path / "adapter", init="owner/model", teacher={"path": "owner/teacher"})
    assert run(f"artifact={adapter}", f"out={tmp_path / 'lora'}", "format=lora") == 0
    text, matter = (tmp_path / "lora" / "README.md").read_text(), metadata_load(tmp_path / "lora" / "README.md")
    assert matter is not None and (matter["base_model"], matter["base_model_relation"]) == ("owner/model", "adapter")
    assert "This adapter needs [owner/model]" in text and 'DiffusionPipeline.from_pretrained("owner/model"' in text


@pytest.mark.parametrize(
    "report",
    [
        "{",
        "[1]",
        '{"artifacts": 5}',
        '{"artifacts": [5]}',
        '{"accuracy": 0.9}',
        '{"artifacts": [{"results": 3}]}',
        '{"artifacts": [{"results": [{"quality": {}}]}]}',
        '{"artifacts": [{"results": [{"quality": [], "guidance": 1, "n": 1}]}]}',
        '{"artifacts": [{"results": [{"quality": {"psnr": 3}, "guidance": 1, "n": 1}]}]}',
        '{"artifacts": [{"results": [{"quality": {"psnr": {"value": "high"}}, "guidance": 1, "n": 1}]}]}',
        '{"artifacts": [{"name": "a"}, {"name": "b"}]}',
        '{"artifacts": [{"path": 3}, {"path": null}]}',
    ],
)
def test_a_report_of_another_program_is_left_out_of_the_card_which_says_so(report, flux, tmp_path):
    trained = make_run(flux, tmp_path / "run")
    (trained / "report.json").write_text(report)
    assert run(f"artifact={trained}", f"out={tmp_path / 'out'}") == 0
    measured = (tmp_path / "out" / "README.md").read_text().partition("## Measured\n\n")[2].partition("\n\n")[0]
    assert measured == "Parts of `report.json` were not written by `edit` and are left out."


def test_what_fits_of_a_report_is_kept(flux, tmp_path):
    trained = make_run(flux, tmp_path / "run")
    good = {"guidance": 1.0, "n": 64, "quality": {"psnr": {"value": 21.5}}}
    entries = [{"path": str(trained), "results": [good, {}]}, {"results": [good]}]
    (trained / "report.json").write_text(json.dumps({"artifacts": entries}))
    (trained / "config.yaml").write_text("a: [")  # nor was this
    assert run(f"artifact={trained}", f"out={tmp_path / 'out'}") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.count("| 1 | 64 | 21.5 |") == 1 and "Parts of `report.json`" in text
    (trained / "report.json").unlink()
    assert run(f"artifact={trained}", f"out={tmp_path / 'out'}") == 0
    assert "Measured" not in (tmp_path / "out" / "README.md").read_text()


def test_no_licence_is_claimed_that_nobody_has_given(flux, tmp_path, pipeline, capsys):
    trained = make_run(flux, tmp_path / "scratch")
    out, readme = f"out={tmp_path / 'out'}", tmp_path / "out" / "README.md"
    assert run(f"artifact={trained}", out) == 0 and "the licence is unknown" in capsys.readouterr().err
    assert (metadata_load(readme) or {})["license"] == "unknown" and "Licence: unknown" in readme.read_text()
    assert run(f"artifact={trained}", out, "license=MIT") == 0 and (metadata_load(readme) or {})["license"] == "mit"
    assert run(f"artifact={trained}", out, "license=House rules") == 0
    assert (metadata_load(readme) or {})["license_name"] == "House rules"
    mixed = make_run(flux, tmp_path / "mixed", teacher={"path": str(pipeline)}, init=str(trained))
    assert run(f"artifact={mixed}", out) == 0 and (metadata_load(readme) or {})["license"] == "unknown"
    assert "toy-licence" in readme.read_text()


def test_a_published_model_without_a_run_of_ours_is_its_own_origin(pipeline, tmp_path):
    assert run(f"artifact={pipeline}", f"out={tmp_path / 'out'}", "format=single_file") == 0
    matter = metadata_load(tmp_path / "out" / "README.md")
    assert matter is not None and matter["license_name"] == "toy-licence"


def test_hub_ids_are_told_from_folders_and_found_in_the_hubs_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert card.hub_id("owner/name") == "owner/name"
    assert card.hub_id("runs/gone") is None  # a run that was removed
    assert card.hub_id("/x/hub/models--owner--a-name/snapshots/0123/transformer") == "owner/a-name"
    (tmp_path / "config.json").write_text('{"_name_or_path": "owner/name"}')
    assert card.hub_id(str(tmp_path)) == "owner/name"


def test_a_card_tells_how_many_parameters_a_token_takes_where_it_does_not_take_all(flux):
    def summary() -> str:
        made = Artifact(Path("none"), flux, FlowMatching(), Sampler(Euler(4)))
        return card.Card("a", made, "", "finetune", [], [], None, card.Licence()).summary()

    assert "per token" not in summary()
    edit.apply(flux, {"experts": Experts(count=4, units=(0,))})
    stack = flux.edits["experts"]["0"]
    taken = sum(p.numel() for p in flux.parameters()) - 3 * (stack.up.numel() + stack.down.numel()) // 4
    assert f" parameters ({taken:,} of them activated per token)" in summary()
