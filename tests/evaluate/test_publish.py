"Publishing: a copy that loads as it should, and a local stand-in of the hub that receives it"

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from diffuspeech.base.checkpoint import builtin_checkpoint
from diffuspeech.cli import main
from diffuspeech.evaluate.publish import CardInfo, agreement, check_golden, make_copy
from diffuspeech.models.duration import DurationPredictor

ROWS = [
    dict(
        system="DDM", split="test-clean", wer=0.12, wer_low=0.1, wer_high=0.14, headline=True, distillmos=4.0
    ),
    dict(system="DDM, text only", split="test-clean", wer=0.2, headline=False),
]


class Hub(BaseHTTPRequestHandler):
    "What of the hub's API an upload uses, with all files in the commit: storage of large ones is its own"

    def log_message(self, *args):
        pass

    def answer(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def chunks(self):
        "A body whose length is not known before"
        if "Content-Length" in self.headers:
            return self.body()
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def do_POST(self):
        store, path = self.server.store, self.path.split("?")[0]
        store["tokens"].add(self.headers.get("Authorization"))
        content = self.chunks()
        if path == "/api/repos/create":
            store["created"] = json.loads(content)
            return self.answer(dict(url=f"{self.server.url}/me/model", name="me/model", id="1"))
        if path == "/api/validate-yaml":
            meta = yaml.safe_load(json.loads(content)["content"].split("---")[1])
            errors = [] if meta.get("license") else [dict(message="no license")]
            return self.answer(dict(errors=errors, warnings=[]), 400 if errors else 200)
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(content)["files"]]
            files = [dict(path=n, uploadMode="regular", shouldIgnore=False) for n in names]
            return self.answer(dict(files=files))
        if path.endswith("/commit/main"):
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    store["files"][value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.url}/me/model/commit/abc"
            return self.answer(dict(success=True, commitOid="abc", commitUrl=url))
        self.answer(dict(error="no such thing"), 404)

    def do_GET(self):
        self.answer(dict(error="not found"), 404)


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.store = dict(files={}, tokens=set())
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def unpack(store, folder):
    for name, content in store["files"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_publish_to_a_hub_and_load_what_is_there(hub, tmp_path, capsys):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    (tmp_path / "r.json").write_text(json.dumps(ROWS))
    folder = builtin_checkpoint("ddm")
    words = ["publish", str(folder), "--to", "me/model", "--dataset", "mine", "--private"]
    assert main([*words, "--table", str(tmp_path / "r.json")]) == 0
    out, err = capsys.readouterr()
    assert "/commit/abc" in out and "100% of the tokens are equal" in err
    store = hub.store
    assert store["tokens"] == {"Bearer hf_test"} and store["created"]["name"] == "model"
    assert store["created"].get("private") or store["created"].get("visibility") == "private"
    unpack(store, tmp_path / "back")
    assert check_golden(tmp_path / "back") == dict(codes=1.0, tokens=1.0)
    card = (tmp_path / "back" / "README.md").read_text()
    meta = yaml.safe_load(card.split("---")[1])
    assert meta["library_name"] == "diffuspeech" and meta["license"] == "apache-2.0"
    assert meta["datasets"] == ["mine"] and meta["pipeline_tag"] == "audio-to-audio"
    (result,) = meta["model-index"][0]["results"]
    assert result["metrics"][0] == dict(type="wer", name="WER", value=0.12), "only what is to be quoted"
    assert "| DDM, text only | test-clean | 0.200 |" in card
    assert not [name for name in store["files"] if name.endswith(("results.json", "speed.json"))]


def test_a_model_that_answers_otherwise_is_refused(tmp_path):
    make_copy(builtin_checkpoint("ddm"), tmp_path, CardInfo("me/model"))
    golden = json.loads((tmp_path / "golden.json").read_text())
    for sample in golden["samples"]:
        sample["tokens"] = [token + 1 for token in sample["tokens"]]
    (tmp_path / "golden.json").write_text(json.dumps(golden))
    with pytest.raises(ValueError, match="0.000 of the tokens are equal, and 0.9 must be"):
        check_golden(tmp_path)
    assert agreement([1, 2, 3, 4], [1, 2, 9]) == 0.5 and agreement([], []) == 1.0


def test_push_to_hub_of_a_model(hub, tmp_path):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    model = DurationPredictor.from_pretrained(builtin_checkpoint("duration"))
    assert "/commit/abc" in model.push_to_hub("me/model")
    unpack(hub.store, tmp_path)
    other = DurationPredictor.from_pretrained(tmp_path)
    assert other.fingerprint() == model.fingerprint()


def test_bad_input_in_one_line(tmp_path, capsys, monkeypatch):
    def error(*words):
        assert main(["publish", *map(str, words)]) != 0
        text = capsys.readouterr().err
        assert len(text.splitlines()) == 1 and text.startswith("diffuspeech publish: ")
        return text

    folder = builtin_checkpoint("duration")
    assert "either --to OWNER/NAME, or --dry-run" in error(folder)
    assert "should be OWNER/NAME" in error(folder, "--to", "name")
    assert "no model is there" in error(tmp_path, "--dry-run")
    (tmp_path / "r.json").write_text("[1]")
    assert "not rows of a table" in error(folder, "--dry-run", "--table", tmp_path / "r.json")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "could not be uploaded" in error(folder, "--to", "me/model")
    shutil.copytree(folder, tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    save_file({k: torch.zeros_like(v) for k, v in weights.items()}, tmp_path / "model/model.safetensors")
    assert main(["publish", str(folder), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "model.safetensors" in out and "SHA256SUMS" in out and "library_name" in out
