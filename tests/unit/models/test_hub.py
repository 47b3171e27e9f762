"""Where `--model` leads: directories, bundled names, a Hub endpoint on 127.0.0.1, its cache offline."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edje_pipeline.errors import ModelError, ModelNotFoundError
from edje_pipeline.models import hub
from edje_pipeline.models.checkpoint import open_model
from edje_pipeline.models.random_model import write_random_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny-edje"


class HubHandler(BaseHTTPRequestHandler):
    """As much of the Hub's API as a snapshot download asks for."""

    protocol_version = "HTTP/1.1"
    directory: Path
    asked: list[str]

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        path = self.path.split("?")[0]
        self.asked.append(path)
        files = sorted(p for p in self.directory.rglob("*") if p.is_file())
        names = [p.relative_to(self.directory).as_posix() for p in files]
        api = f"/api/models/{REPO}"
        prefix = f"/{REPO}/resolve/"
        if path in (f"{api}/revision/{ref}" for ref in ("main", "v1", COMMIT)) or path == api:
            info = {"_id": "1", "id": REPO, "modelId": REPO, "sha": COMMIT, "private": False, "tags": [],
                    "downloads": 0, "likes": 0, "siblings": [{"rfilename": name} for name in names]}  # fmt: skip
            return self.reply(200, json.dumps(info).encode(), body, {"Content-Type": "application/json"})
        if path.startswith(f"{api}/tree/"):
            tree = [
                {"type": "file", "oid": "0" * 40, "size": p.stat().st_size, "path": n}
                for p, n in zip(files, names, strict=True)
            ]
            return self.reply(200, json.dumps(tree).encode(), body, {"Content-Type": "application/json"})
        if path.startswith(f"{api}/revision/"):
            return self.reply(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        name = path.removeprefix(prefix).partition("/")[2]
        if path.startswith(prefix) and name in names:
            content = (self.directory / name).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            return self.reply(200, content, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        return self.reply(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

    def reply(self, status, content, body, headers):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hub") / "repo"
    write_random_model(directory, text_tower=False)
    (directory / "pytorch_model.bin").write_bytes(b"never fetched")
    (directory / "modeling.py").write_text("raise SystemExit('never run')")
    (directory / "onnx").mkdir()
    (directory / "onnx" / "model.safetensors").write_bytes(b"never fetched")
    handler = type("Handler", (HubHandler,), {"directory": directory, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()
    thread.join()


def open_in_a_process(model, home, **environment):
    """(path or error kind, message): the hub's client reads its environment once, at import."""
    code = (
        "import sys\nfrom edje_pipeline.errors import EdjeError\n"
        "from edje_pipeline.models.checkpoint import open_model\n"
        "try:\n    print(open_model(sys.argv[1]).path)\n"
        "except EdjeError as error:\n    print(type(error).__name__, error)\n"
    )
    foreign = ("HF_", "http", "HTTP", "all_", "ALL_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    variables = clean | {
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        **environment,
    }
    run = subprocess.run(
        [sys.executable, "-c", code, model], env=variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_a_model_comes_from_the_hub_and_then_from_its_cache(endpoint, tmp_path):
    url, handler = endpoint
    path = Path(open_in_a_process(f"hf:{REPO}@v1", tmp_path, HF_ENDPOINT=url))
    assert path.parent.name == "snapshots"
    assert path.name == COMMIT
    names = {p.relative_to(path).as_posix() for p in path.rglob("*")}
    assert names == {"config.json", "backbone.safetensors", "adapter.safetensors", "joint_encoder.safetensors",
                     "tokenizer.json", "MODEL_CARD.md"}  # fmt: skip
    assert not any(name.endswith((".bin", ".py")) for name in handler.asked)
    offline = open_in_a_process(f"hf:{REPO}@v1", tmp_path, HF_HUB_OFFLINE="1")
    assert offline == str(path)
    # The snapshot's files are links into the cache's blobs: also given as a directory they open.
    assert open_model(str(path)).load_tokenizer().encode(["a"])


def test_what_the_hub_does_not_have(endpoint, tmp_path):
    url, _ = endpoint
    missing = open_in_a_process("hf:someone/else", tmp_path, HF_ENDPOINT=url)
    assert missing.startswith("ModelNotFoundError hf:someone/else: the Hub has no such repository")
    revision = open_in_a_process(f"hf:{REPO}@v9", tmp_path, HF_ENDPOINT=url)
    assert revision.startswith(f"ModelNotFoundError hf:{REPO}@v9: the repository has no revision 'v9'")


def test_offline_says_what_to_do(tmp_path):
    message = open_in_a_process(f"hf:{REPO}", tmp_path, HF_HUB_OFFLINE="1")
    assert message.startswith(f"ModelNotFoundError hf:{REPO} is not in the local cache and HF_HUB_OFFLINE is set")
    assert f"hf download {REPO}" in message
    refused = open_in_a_process(f"hf:{REPO}", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert refused.startswith("Model")
    assert f"hf download {REPO}" in refused


@pytest.mark.parametrize(
    ("text", "want"),
    [("hf:org/name", ("org/name", None)), ("hf:org/na.me-1@v1.0", ("org/na.me-1", "v1.0")),
     ("hf:a/b@refs/pr/1", ("a/b", "refs/pr/1"))],
)  # fmt: skip
def test_hub_ids(text, want):
    assert hub.parse_hub_id(text) == want


@pytest.mark.parametrize(
    "text", ["hf:", "hf:name", "hf:a/b/c", "hf:a/b@", "hf:a/../b", "hf:a/b@../x", "hf:a b/c", "hf:/a"]
)
def test_hub_ids_of_another_form(text):
    with pytest.raises(ModelError, match="is not a Hub id"):
        hub.resolve(text)


def test_directories_and_unknown_names(tmp_path):
    assert hub.resolve(str(tmp_path)) == tmp_path
    assert hub.resolve(tmp_path) == tmp_path
    with pytest.raises(
        ModelNotFoundError, match=r"no model 'nothing'.*bundled .*random-tiny, random-demo.*hf:organisation"
    ):
        hub.resolve("nothing")


def test_bundled_models_are_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("EDJE_CACHE", str(tmp_path))
    first = open_model("random-tiny")
    assert first.path.is_relative_to(tmp_path)
    assert first.spec.name == "random-tiny"
    stamp = (first.path / "config.json").stat().st_mtime_ns
    assert open_model("random-tiny") == first
    assert (first.path / "config.json").stat().st_mtime_ns == stamp


def test_a_bundled_model_that_another_process_makes_meanwhile(tmp_path, monkeypatch):
    def made_by_both(directory, **arguments):
        made.append(write_random_model(directory, **arguments))
        return write_random_model(directory, **arguments)

    made = []
    monkeypatch.setenv("EDJE_CACHE", str(tmp_path))
    monkeypatch.setattr("edje_pipeline.models.random_model.write_random_model", made_by_both)
    assert open_model("random-tiny") == made[0]
    assert [path.name for path in made[0].path.parent.iterdir()] == [made[0].path.name]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDJE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set EDJE_CACHE"):
        hub.bundled("random-tiny")


def test_a_model_in_the_package_is_used_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "BUNDLED_DIRECTORIES", tmp_path / "bundled")
    assert hub.bundled_names() == ("random-tiny", "random-demo")
    assert hub.default_model() == "random-demo"
    assert "mean nothing" in hub.about(hub.default_model())
    model = write_random_model(tmp_path / "bundled" / "emoji-small")
    (tmp_path / "bundled" / "unfinished").mkdir()
    assert hub.bundled_names() == ("emoji-small", "random-tiny", "random-demo")
    assert open_model("emoji-small").path == model.path
    assert hub.default_model() == "emoji-small"
    assert "photographs" in hub.about(hub.default_model())
    with pytest.raises(ModelNotFoundError, match="bundled emoji-small, random-tiny"):
        hub.resolve("unfinished")


def test_a_folder_of_the_users_own_comes_before_a_bundled_name(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "BUNDLED_DIRECTORIES", tmp_path / "bundled")
    write_random_model(tmp_path / "bundled" / "emoji-small")
    monkeypatch.chdir(tmp_path)
    own = write_random_model(tmp_path / "emoji-small", seed=4)
    assert open_model("emoji-small").path.resolve() == own.path
