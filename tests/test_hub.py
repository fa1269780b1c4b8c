"""The Hub, played by a server on this machine; the client is the real one."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import DATA

from bertjax import SourceError, Tokenizer
from bertjax.hub import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FOLDER = DATA / "golden" / "plain"


class FakeHub:
    """Serves one repository, acme/bert, and remembers what was asked for."""

    def __init__(self):
        names = {"config.json": "config.json", "model.safetensors": "model.safetensors"}
        self.files = {name: (FOLDER / path).read_bytes() for name, path in names.items()}
        extra = ("pytorch_model.bin", "onnx/model.onnx", "onnx/config.json", "README.md", "train.py")
        self.files |= dict.fromkeys(extra, b"never needed")
        self.requests = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self, body=True)

            def do_HEAD(self):
                hub.answer(self, body=False)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request, body):
        path = request.path.split("?")[0]
        self.requests.append(path)
        prefix = "/api/models/acme/bert"
        if path.startswith("/acme/bert/resolve/"):
            _, _, _, _, revision, name = path.split("/", 5)
            return self.send_file(request, revision, name, body)
        if path in (prefix, f"{prefix}/revision/main", f"{prefix}/revision/{COMMIT}", f"{prefix}/revision/v1"):
            siblings = [{"rfilename": name} for name in self.files]
            return self.send(request, {"id": "acme/bert", "sha": COMMIT, "siblings": siblings})
        if path.startswith(f"{prefix}/tree/"):
            listing = [
                {"type": "file", "oid": "0", "path": name, "size": len(data)} for name, data in self.files.items()
            ]
            return self.send(request, listing)
        code = "RevisionNotFound" if path.startswith(prefix) else "RepoNotFound"
        return self.send(request, {"error": code}, status=404, headers={"X-Error-Code": code})

    def send(self, request, value, status=200, headers=None):
        data = json.dumps(value).encode()
        request.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": len(data)} | (headers or {})
        for name, content in headers.items():
            request.send_header(name, str(content))
        request.end_headers()
        request.wfile.write(data)

    def send_file(self, request, revision, name, body):
        data = self.files[name]
        request.send_response(200)
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if body:
            request.wfile.write(data)


@pytest.fixture
def hub():
    hub = FakeHub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def run(hub, cache: Path, code: str, offline="0") -> subprocess.CompletedProcess:
    """Runs code in a process of its own, because the client reads its settings when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    names = "from bertjax import BertModel, Tokenizer\nfrom bertjax.errors import *\nfrom bertjax.hub import resolve\n"
    return subprocess.run([sys.executable, "-c", names + code], env=environment, capture_output=True, text=True)


def test_fetches_what_is_needed_and_loads_it(hub, tmp_path):
    code = "print(BertModel.from_pretrained('acme/bert').config.hidden_size)"
    done = run(hub, tmp_path, code)
    assert done.stdout.strip() == "16", done.stderr
    fetched = {path.split("/")[-1] for path in hub.requests if "/resolve/" in path}
    assert fetched == {"config.json", "model.safetensors"}


def test_a_tokenizer_needs_no_weights(hub, tmp_path, vocab_file):
    hub.files["vocab.txt"] = vocab_file.read_bytes()
    done = run(hub, tmp_path, "print(Tokenizer.from_pretrained('acme/bert')(['the cat']).input_ids[0].tolist())")
    expected = Tokenizer.from_vocab(vocab_file)(["the cat"]).input_ids[0].tolist()
    assert done.stdout.strip() == str(expected), done.stderr
    fetched = {path.split("/")[-1] for path in hub.requests if "/resolve/" in path}
    assert fetched == {"config.json", "vocab.txt"}


def test_the_cache_serves_offline(hub, tmp_path):
    assert run(hub, tmp_path, "resolve('acme/bert')").returncode == 0
    asked = len(hub.requests)
    done = run(hub, tmp_path, "print(BertModel.from_pretrained('acme/bert').config.hidden_size)", offline="1")
    assert done.stdout.strip() == "16", done.stderr
    assert len(hub.requests) == asked


def test_a_revision_is_asked_for(hub, tmp_path):
    done = run(hub, tmp_path, f"print(resolve('acme/bert', revision='{COMMIT}'))")
    assert done.stdout.strip().endswith(COMMIT), done.stderr


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("resolve('acme/other')", "neither a folder here nor a repository on the Hub"),
        ("resolve('acme/bert', revision='v9')", "the Hub has no revision 'v9'"),
        ("resolve('acme/bert', local_files_only=True)", "not in the cache of the Hub"),
    ],
)
def test_refusals_say_what_is_wrong(hub, tmp_path, call, message):
    done = run(hub, tmp_path, f"try: {call}\nexcept SourceError as error: print(error)")
    assert message in done.stdout, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_an_unreachable_hub_is_a_source_error(tmp_path):
    class Nowhere:
        url = "http://127.0.0.1:9"  # the discard port: nothing answers

    done = run(Nowhere, tmp_path, "try: resolve('acme/bert')\nexcept SourceError as error: print(error)")
    assert "acme/bert" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "a/b/c", "../up", "~/no-such-folder-here"])
def test_what_looks_like_a_path_is_never_sent_to_the_hub(name):
    with pytest.raises(SourceError, match="no such folder"):
        resolve(name)


def test_an_empty_name_is_not_this_folder():
    with pytest.raises(SourceError, match="name of the model is empty"):
        resolve("")


def test_a_file_or_the_prefix_of_one_is_itself(tmp_path):
    assert resolve(FOLDER / "model.safetensors") == FOLDER / "model.safetensors"
    (tmp_path / "bert.ckpt.index").touch()
    assert resolve(str(tmp_path / "bert.ckpt")) == tmp_path / "bert.ckpt"


def test_a_revision_of_a_local_folder_is_refused():
    with pytest.raises(SourceError, match="applies to the Hub only"):
        resolve(FOLDER, revision="main")
