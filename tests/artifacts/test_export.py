import json
import re
import subprocess
import sys
import threading
from base64 import b64decode
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from exports import ABSENT, error_of, load_stock, make_flux, randomise_lora, run, stock_output
from huggingface_hub import metadata_load
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from weights import randomise

import edit
from edit.artifacts import card
from edit.artifacts.checksums import accept
from edit.artifacts.lora import LORA_WEIGHTS
from edit.denoiser import Edit
from edit.pruning.depth import DepthPruning
from edit.tuning.lora import LoRA
from recipes.config.composed import names
from recipes.cost import from_file

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = [name for name in names(CONFIGS, "backbone") if name.endswith("_tiny") and name != "sit_tiny"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass
class Stubborn(Edit):
    """An edit that stays."""

    def apply(self, denoiser) -> None:
        pass


# ---- diffusers folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_stock_diffusers_loads_every_family_bit_equal(name, tmp_path, capsys):
    denoiser = from_file(CONFIGS, "backbone", name).build()
    randomise(denoiser)
    edit.save(denoiser, tmp_path / "a")
    code = run(f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}")
    stock = denoiser.to_stock(denoiser.config, denoiser.model.state_dict())
    if stock[0]["_class_name"].startswith("edit."):  # told why
        assert code == 2 and stock[0]["_not_diffusers_because"] in error_of(capsys)
        return
    got = load_stock(tmp_path / "out")
    assert code == 0 and got.state_dict().keys() >= stock[1].keys()
    assert all(torch.equal(got.state_dict()[k], v) for k, v in stock[1].items())


@torch.no_grad()
def test_live_edits_are_folded_and_stock_outputs_are_ours(flux, asked, tmp_path):
    edit.apply(flux, {"shallow": DepthPruning(pattern="listed", units=(0, 2, 3, 5))})
    edit.apply(flux, {"lora": LoRA(rank=2, alpha=3, targets=("attn.to_q", "ff.net.2", "proj_out"))})
    randomise_lora(flux)
    edit.save(flux, tmp_path / "a")
    assert run(f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}") == 0
    got, expected = load_stock(tmp_path / "out"), flux(*asked).sample
    assert (got.config.num_layers, got.config.num_single_layers) == (2, 2)
    # fp32: W + B A is rounded once before, our live LoRA adds afterwards
    torch.testing.assert_close(stock_output(got, flux, asked), expected, rtol=1e-4, atol=1e-4)
    again = edit.load(tmp_path / "out").denoiser
    assert not again.applied and [f["name"] for f in again.folded] == ["shallow", "lora"]
    torch.testing.assert_close(again(*asked).sample, expected, rtol=1e-4, atol=1e-4)


def test_shards_and_bf16_are_read_back_by_stock_diffusers(tmp_path):
    flux = make_flux(attention_head_dim=32, num_attention_heads=4, axes_dims_rope=(8, 12, 12))
    edit.save(flux, tmp_path / "a")
    words = (f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}", "dtype=bf16", "max_shard_size=1MB")
    assert run(*words) == 0
    index = json.loads((tmp_path / "out" / f"{WEIGHTS}.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    got = load_stock(tmp_path / "out").to(torch.bfloat16).state_dict()
    assert all(torch.equal(got[k], v.to(torch.bfloat16)) for k, v in flux.model.state_dict().items())


def test_an_edit_that_cannot_be_folded_is_named_and_nothing_is_written(flux, tmp_path, capsys):
    edit.apply(flux, {"mine": Stubborn(), "lora": LoRA(rank=2, targets=("attn.to_q",))})
    edit.save(flux, tmp_path / "a")
    words = (f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}", f"trusted={__name__}")
    assert run(*words) == 2 and "'mine'" in (said := error_of(capsys)) and "Stubborn cannot be folded" in said
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# ---- pipelines -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_whole_pipeline_folder_samples_in_stock_diffusers_with_our_transformer(flux, asked, tmp_path, pipeline):
    from diffusers import FluxPipeline

    edit.apply(flux, {"shallow": DepthPruning(pattern="listed", units=(0, 2, 5))})
    edit.save(flux, tmp_path / "a", sampler=edit.load(pipeline).sampler)
    out = tmp_path / "out"
    assert run(f"artifact={tmp_path / 'a'}", f"out={out}", f"pipeline={pipeline}") == 0
    pipe = FluxPipeline.from_pretrained(out, **ABSENT)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.transformer.config.num_single_layers, pipe.scheduler.config.shift) == (1, 2.0)
    x, _, condition = asked
    torch.testing.assert_close(stock_output(pipe.transformer, flux, asked), flux(*asked).sample, rtol=1e-5, atol=1e-5)
    noise = pipe._pack_latents(x, 2, 4, 8, 8)
    settings = {"num_inference_steps": 2, "output_type": "latent", "latents": noise, "height": 8, "width": 8}
    got = pipe(prompt_embeds=condition.text, pooled_prompt_embeds=condition.pooled, **settings).images
    assert got.shape == noise.shape and got.isfinite().all() and not torch.equal(got, noise)
    # weights are linked, what somebody may edit is copied
    weights = [folder / "text_encoder" / "model.safetensors" for folder in (pipeline, out)]
    settings = [folder / "vae" / "config.json" for folder in (pipeline, out)]
    assert weights[0].samefile(weights[1]) and not settings[0].samefile(settings[1])
    # the weights come from nowhere we know of: the licence of what is around them does not cover them
    assert (metadata_load(out / "README.md") or {})["license"] == "unknown"
    assert "other components are those of `pipeline`: [toy-licence]" in (out / "README.md").read_text()


def test_a_pipeline_that_does_not_fit_is_refused_in_one_sentence(make_dit, tmp_path, pipeline, capsys):
    edit.save(make_dit(frequency_shift=1), tmp_path / "a")
    words = (f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}")
    assert run(*words, f"pipeline={pipeline}") == 2
    assert "FluxTransformer2DModel as its transformer, the artifact is a DiTTransformer2DModel" in error_of(capsys)
    assert run(*words, f"pipeline={tmp_path}") == 2 and "no model_index.json" in error_of(capsys)
    index = tmp_path / "model_index.json"
    parts = {"transformer": ["diffusers", "X"], "vae": ["diffusers", "AutoencoderKL"]}
    index.write_text(json.dumps(parts))
    assert run(*words, f"pipeline={tmp_path}") == 2 and "its vae is missing" in error_of(capsys)
    index.write_text(json.dumps({**parts, "../a": ["diffusers", "X"]}))
    assert run(*words, f"pipeline={tmp_path}") == 2 and "outside its folder: ../a" in error_of(capsys)
    assert not (tmp_path / "out").exists()


# ---- weights that no file should hold --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words", "sentence"),
    [
        (float("nan"), [], "{} has weights that are not finite, 1 of"),
        (float("-inf"), ["dtype=bf16"], "{} has weights that are not finite, 1 of"),
        (-70000.0, ["dtype=fp16"], "{} has a weight of 7e+04 in size, and float16 ends at 6.55e+04"),
        (3.4e38, ["dtype=bf16"], "{} has a weight of 3.4e+38 in size, and bfloat16 ends at 3.39e+38"),
    ],
)
@pytest.mark.parametrize("layout", ["diffusers", "single_file", "lora"])
def test_weights_that_are_not_finite_or_that_a_type_cannot_hold_are_refused_by_name(
    layout, value, words, sentence, flux, tmp_path, capsys
):
    if layout == "lora":
        edit.apply(flux, {"lora": LoRA(rank=2, alpha=2, targets=("attn.to_q",))})
    edit.save(flux, tmp_path / "a")
    for file in (tmp_path / "a").glob("*.safetensors"):  # as another program may have written it
        if (layout == "lora") == (file.name == "edits.safetensors"):
            state = load_file(file)
            state[sorted(state)[-1]].view(-1)[0] = value
            save_file(state, file, {"format": "pt"})
    accept(tmp_path / "a")
    out = ["artifact=" + str(tmp_path / "a"), f"out={tmp_path / 'out'}", f"format={layout}"]
    assert run(*out, *words) == 2
    said = error_of(capsys)
    assert re.search(sentence.split("{} ")[1].replace("+", r"\+"), said) and re.match(r"[\w.]+ has ", said)
    assert not words or "not finite" in said or "use bf16 or fp32" in said
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_a_type_holds_is_exported_in_it(flux, tmp_path):
    with torch.no_grad():
        next(flux.parameters()).view(-1)[0] = -65504.0
    edit.save(flux, tmp_path / "a")
    assert run(f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}", "dtype=fp16") == 0
    assert all(v.isfinite().all() for v in load_file(tmp_path / "out" / WEIGHTS).values())


def test_an_artifact_of_weights_that_are_not_finite_is_not_saved(flux, tmp_path):
    with torch.no_grad():
        next(flux.parameters()).view(-1)[0] = float("inf")
    with pytest.raises(ValueError, match=r"^[\w.]+ has weights that are not finite, 1 of \d+$"):
        edit.save(flux, tmp_path / "a")
    assert not any(tmp_path.iterdir())


# ---- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets", [pytest.param(("attn.to_q", "proj_out", "norm1.linear"), marks=pytest.mark.slow), "all-linear"]
)
@torch.no_grad()
def test_diffusers_loads_a_lora_with_outputs_equal_to_ours(targets, asked, tmp_path, pipeline):
    from diffusers import FluxPipeline

    flux = edit.load(pipeline).denoiser
    base = flux(*asked).sample
    edit.apply(flux, {"lora": LoRA(rank=4, alpha=6, targets=targets)})  # alpha / rank = 1.5
    randomise_lora(flux)
    edit.save(flux.eval(), tmp_path / "a")
    assert run(f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'lora'}", "format=lora") == 0
    expected = flux(*asked).sample
    assert (expected - base).abs().max() > 0.1

    pipe = FluxPipeline.from_pretrained(pipeline, **ABSENT)
    pipe.load_lora_weights(tmp_path / "lora", weight_name=LORA_WEIGHTS)
    alone = load_stock(pipeline / "transformer")
    alone.load_lora_adapter(tmp_path / "lora", weight_name=LORA_WEIGHTS, use_safetensors=True)
    with safe_open(tmp_path / "lora" / LORA_WEIGHTS, "pt") as f:
        state = {k: f.get_tensor(k) for k in f.keys()}
    bare = load_stock(pipeline / "transformer")
    bare.load_lora_adapter(state)  # a reader that sees no metadata
    for model in (pipe.transformer, alone, bare):
        # fp32: alpha / rank is applied to B here, to the product there
        torch.testing.assert_close(stock_output(model, flux, asked), expected, rtol=1e-4, atol=1e-4)


def test_only_a_lora_on_stock_layers_is_exported_as_one(flux, dit, tmp_path, capsys):
    edit.save(flux, tmp_path / "plain")
    edit.apply(flux, {"shallow": DepthPruning(), "lora": LoRA(rank=2, targets=("attn.to_q",))})
    edit.save(flux, tmp_path / "both")
    edit.apply(dit, {"lora": LoRA(rank=2)})
    edit.save(dit, tmp_path / "dit")
    cases = {"plain": "has none", "both": "shallow (DepthPruning), lora (LoRA)", "dit": "other layers than our dit"}
    for name, said in cases.items():
        assert run(f"artifact={tmp_path / name}", f"out={tmp_path / 'out'}", "format=lora") == 2
        assert said in error_of(capsys) and not (tmp_path / "out").exists()


# ---- the folder, the hub, the command line ---------------------------------------------------------------------------


def test_only_a_former_export_is_replaced_and_an_error_leaves_it_whole(flux, tmp_path, capsys, monkeypatch):
    edit.save(flux, tmp_path / "a")
    out, words = tmp_path / "out", (f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}")
    out.mkdir()
    assert run(*words) == 0 and run(*words, "dtype=bf16") == 0
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    assert len({f.stat().st_mode for f in out.iterdir()}) == 1  # whoever may read one may read all

    def fail(self) -> str:
        raise OSError("No space left on device")

    capsys.readouterr()
    with monkeypatch.context() as m:
        m.setattr(card.Card, "front_matter", fail)  # the last thing written
        assert run(*words) == 2 and error_of(capsys) == "No space left on device"
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out"]
    assert run(f"artifact={out}", f"out={tmp_path / 'a'}") == 2 and "not a former export" in error_of(capsys)


def test_without_the_hub_the_folder_stays_and_one_sentence_says_so(flux, tmp_path, capsys):
    edit.save(flux, tmp_path / "a")
    out = tmp_path / "out"
    assert run(f"artifact={tmp_path / 'a'}", f"out={out}", "push=me/student") == 2  # conftest: HF_HUB_OFFLINE
    said = error_of(capsys)
    assert f"{out} is written but was not uploaded to me/student (OfflineModeIsEnabled" in said
    assert load_stock(out).config.num_layers == 3


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files asks for; what it was sent is kept on the server."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.seen.append((self.path, body))  # type: ignore[attr-defined]
        here = "http://{}:{}".format(*self.server.server_address)
        if self.headers["Authorization"] != "Bearer hf_good":
            return self.answer(401, {"error": "Invalid credentials"})
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return self.answer(200, {"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        commit = {"commitUrl": f"{here}/me/student/commit/0", "commitOid": "0", "success": True}
        self.answer(200, {"url": f"{here}/me/student", "errors": [], "warnings": [], **commit})

    def do_GET(self) -> None:
        self.answer(200, {"id": "me/student", "sha": "0", "siblings": []})

    def answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.seen = []  # type: ignore[attr-defined]
        monkeypatch.setattr(constants, "ENDPOINT", "http://{}:{}".format(*server.server_address))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_push_uploads_the_folder_into_a_private_repository_without_local_paths(flux, tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    edit.save(flux, tmp_path / "a")
    assert run(f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}", "push=me/student") == 0
    sent = dict(hub.seen)
    created = json.loads(sent["/api/repos/create"])
    assert (created["name"], created["organization"]) == ("student", "me")
    assert created.get("private") or created.get("visibility") == "private"
    lines = [json.loads(line) for line in sent["/api/models/me/student/commit/main"].splitlines()]
    files = {x["value"]["path"]: b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
    assert files.keys() == {"README.md", "config.json", "export.json", WEIGHTS}
    assert files[WEIGHTS] == (tmp_path / "out" / WEIGHTS).read_bytes()
    assert b'from_pretrained("me/student"' in files["README.md"]


def test_a_wrong_token_is_one_sentence_and_the_folder_stays(flux, tmp_path, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    edit.save(flux, tmp_path / "a")
    assert run(f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}", "push=me/student") == 2
    assert "was not uploaded to me/student" in (said := error_of(capsys)) and "401" in said
    assert (tmp_path / "out" / "README.md").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("out=x",), "artifact is missing: artifact=<"),
        (("artifact=x",), "out is missing: out=<"),
        (("artifact=x", "out=y", "dytpe=bf16"), "did you mean dtype?"),
        (("artifact=x", "out=y", "dtype=int4"), "dtype is one of bf16, fp16, fp32, got int4"),
        (("artifact=x", "out=y", "format=gguf"), "format is one of diffusers, single_file, lora, got gguf"),
        (("artifact=x", "out=y", "max_shard_size=big"), "max_shard_size is a size such as 5GB or 500MB, got big"),
        (("artifact=x", "out=y", "format=lora", "pipeline=p"), "pipeline= makes a diffusers folder"),
        (("artifact=x", "out=y", "push=name"), "owner/name, got name"),
        (("artifact=/no/where", "out=y"), "no artifact at /no/where"),
    ],
)
def test_mistakes_end_in_one_sentence(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2 and said in error_of(capsys) and not any(tmp_path.iterdir())


def test_the_command_line_prints_only_the_folder_and_starts_without_heavy_imports(flux, tmp_path, capsys):
    edit.save(flux, tmp_path / "a")
    assert run(f"artifact={tmp_path / 'a'}", f"out={tmp_path / 'out'}") == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'out'}\n" and f"writing {tmp_path / 'out'}" in said.err
    code = "import sys, recipes.export; assert not {'lightning', 'hydra', 'diffusers', 'peft'} & set(sys.modules); "
    code += "recipes.export.main(['--help'])"
    helped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONFIGS.parent)
    assert helped.returncode == 0 and "pipeline=" in helped.stdout
