"""Paths, runs and hub ids: which folder they mean, and the sentence where there is none."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import edit
from edit.artifacts.checkpoint import skeleton
from edit.artifacts.fingerprint import fingerprint
from edit.artifacts.location import find

MODEL = "diffusion_pytorch_model.safetensors"


def one_sentence(error: BaseException) -> bool:
    return "\n" not in str(error) and str(error)[-1] != "."


def test_a_missing_artifact_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no artifact at {tmp_path / 'nope'}: there is no such folder"):
        edit.load(tmp_path / "nope")
    with pytest.raises(FileNotFoundError, match="holds a config.json"):
        edit.load(tmp_path)


def stock_folder(path: Path) -> Path:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "in_channels": 4}
    DiTTransformer2DModel(**sizes, out_channels=8).save_pretrained(path)
    return path


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for: one pipeline, `owner/name`, and one that is gated."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.seen.append(path)  # type: ignore[attr-defined]
        files = {f"transformer/{f.name}": f for f in self.server.folder.iterdir()}  # type: ignore[attr-defined]
        files |= {"text_encoder/model.safetensors": files[f"transformer/{MODEL}"]}
        owner, _, rest = path.removeprefix("/api/models/").strip("/").partition("/")
        name, _, rest = rest.partition("/")
        if owner == "nobody":
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/models") and "/tree/" in path:
            tree = [{"type": "file", "path": k, "size": v.stat().st_size, "oid": "1" * 40} for k, v in files.items()]
            self.answer(200, json.dumps(tree).encode())
        elif path.startswith("/api/models"):
            siblings = [{"rfilename": k} for k in files]
            self.answer(200, json.dumps({"id": f"{owner}/{name}", "sha": "0" * 40, "siblings": siblings}).encode())
        elif owner == "gated":
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif (asked := files.get(rest.removeprefix(f"resolve/{'0' * 40}/"))) is None:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        else:
            self.answer(200, asked.read_bytes(), {"ETag": f'"{asked.name}"', "X-Repo-Commit": "0" * 40})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args) -> None:
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server on this machine in place of the hub, with a cache of its own, and an empty current folder."""
    from huggingface_hub import constants

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.seen, server.folder = [], stock_folder(tmp_path / "published")  # type: ignore[attr-defined]
        here = "http://{}:{}".format(*server.server_address)
        monkeypatch.setattr(constants, "ENDPOINT", here)
        template = here + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_the_structure_of_a_published_model_is_read_without_its_weights(hub):
    shapes = {k: v.shape for k, v in skeleton("owner/name").state_dict().items()}
    assert not [p for p in hub.seen if "resolve" in p and not p.endswith("transformer/config.json")]
    loaded = edit.load("owner/name").denoiser
    assert shapes == {k: v.shape for k, v in loaded.state_dict().items()}
    assert all(torch.equal(v, edit.load(hub.folder).denoiser.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert not [p for p in hub.seen if "resolve" in p and "text_encoder" in p]
    assert fingerprint("owner/name") == fingerprint(hub.folder)


@pytest.mark.parametrize("read", [find, skeleton, edit.load, fingerprint])
def test_a_mistyped_local_path_never_asks_the_hub_and_names_the_nearest(read, hub):
    for name in ("teacher", "student"):
        Path("runs", name).mkdir(parents=True)
    for path in ("runs/teachr", Path("runs/teachr"), "./runs/teachr", str(Path("runs/teachr").absolute())):
        with pytest.raises(
            FileNotFoundError, match=r"teachr: there is no such folder; did you mean \S*runs/teacher\?$"
        ):
            read(path)
    with pytest.raises(FileNotFoundError, match="no artifact at runs/zzz: there is no such folder$"):
        read("runs/zzz")
    for path in ("FLUX", "./owner/name", "a/b/c", "../owner/name"):
        with pytest.raises(FileNotFoundError, match="there is no such folder$"):
            read(path)
    assert not hub.seen


def test_a_gated_model_is_one_sentence_about_its_licence(hub):
    with pytest.raises(
        PermissionError, match="gated/name is gated on the hub: accept its licence .*hf auth login"
    ) as e:
        edit.load("gated/name")
    assert one_sentence(e.value) and "http" not in str(e.value)


def test_a_name_that_nobody_has_is_told_from_a_network_that_is_not_there(hub, monkeypatch):
    from huggingface_hub import constants

    Path("runs/teacher").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no such folder, nor a model on the hub that this login may see"):
        edit.load("nobody/name")
    skeleton("owner/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert skeleton("owner/name").name == "dit"  # the configuration is here
    for path, hint in (("rnus/teacher", "; did you mean runs/teacher?"), ("owner/other", ""), ("owner/name", "")):
        with pytest.raises(FileNotFoundError) as e:
            edit.load(path)
        assert str(e.value).startswith(
            f"no artifact at {path}: there is no such folder{hint}, and it cannot be fetched off"
        )
        assert one_sentence(e.value)
