# SPDX-License-Identifier: Apache-2.0
"""Fetching weights, against a server on this machine that speaks the hub's protocol.

huggingface_hub reads its environment when it is imported, so its side runs in processes of its own.
"""

import contextlib
import hashlib
import http.server
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import pytest

from tests.goldens.scripts.weights import GOLDEN
from tests.helpers.foreign_weights import flags, golden, run
from tnt_flax.core.errors import InputError
from tnt_flax.weights import hub

pytest.importorskip("huggingface_hub", reason='pip install ".[hub]"')
NEW, OLD = "b" * 40, "a" * 40  # commits
SAFE, PICKLE = "model.safetensors", "pytorch_model.bin"
FILES = {  # (repository, commit) -> the files in it
    ("timm/tnt_s_patch16_224.in1k", NEW): {SAFE: b"new", PICKLE: b"pickle", "sub/x.bin": b"sub"},
    ("timm/tnt_s_patch16_224.in1k", OLD): {SAFE: b"old"},
    ("lab/pickle", NEW): {PICKLE: b"pickle only"},
    ("lab/empty", NEW): {"README.md": b""},
    ("lab/short", NEW): {SAFE: b"cut off"},
    ("lab/tnt", NEW): {SAFE: (GOLDEN / "timm.safetensors").read_bytes()},
    ("lab/described", NEW): {
        SAFE: (GOLDEN / "timm.safetensors").read_bytes(),
        "config.json": b'{"model_args": {"num_heads_inner": 2, "num_heads_outer": 2}, '
        b'"pretrained_cfg": {"crop_pct": 0.75}}',
    },
}
REVISIONS = {"main": NEW, "v1": OLD, "refs/pr/7": OLD, NEW: NEW, OLD: OLD}
FAILING = {  # repository -> status, X-Error-Code
    "lab/gated": (403, "GatedRepo"),
    "lab/ill": (500, None),
    "lab/token": (401, None),
}
S = "hf://timm/tnt_s_patch16_224.in1k"

CLIENT = """
import errno, json, pathlib, sys, time
from tnt_flax.weights.hub import fetch
time.sleep = lambda seconds: None  # the library waits before each retry
if sys.argv[1] == "missing":
    sys.modules["huggingface_hub"] = None
elif sys.argv[1] == "full":
    import huggingface_hub
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")
    huggingface_hub.hf_hub_download = full
for address in sys.argv[2:]:
    try:
        found = fetch(address)
        answer = [found.path.read_text(), found.address, *found.notes]
    except Exception as error:
        answer = [type(error).__name__, str(error)]
    print(json.dumps(answer))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves /OWNER/NAME/resolve/REVISION/FILE."""

    def do_HEAD(self):
        self.server.asked.append(f"{self.command} {self.path}")
        path = self.path.replace("%2F", "/")
        repo, _, rest = path.removeprefix("/").partition("/resolve/")
        if repo in FAILING:
            status, code = FAILING[repo]
            return self.send(status, code=code)
        if not any(repo == known for known, _ in FILES):
            return self.send(404, code="RepoNotFound")
        revision = next((r for r in REVISIONS if rest.startswith(f"{r}/")), None)
        commit = REVISIONS.get(revision)
        if (repo, commit) not in FILES:
            return self.send(404, code="RevisionNotFound")
        content = FILES[repo, commit].get(rest.removeprefix(f"{revision}/"))
        if content is None:
            return self.send(404, code="EntryNotFound", commit=commit)
        if repo == "lab/short" and self.command == "GET":
            return self.send(200, content[:-1], commit=commit)
        return self.send(200, content, commit=commit)

    do_GET = do_HEAD

    def send(self, status, content=b"", code=None, commit=None):
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        for name, value in {"X-Error-Code": code, "X-Repo-Commit": commit}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


class Client:
    """Processes with a cache of their own that ask `server`."""

    def __init__(self, home: pathlib.Path, server: http.server.HTTPServer):
        self.home, self.server = home, server

    def fetch(self, *addresses, mode="", offline=False):
        """Returns the result for each address, of one new process, and its number of downloads."""
        out = self.run("-c", CLIENT, mode, *addresses, offline=offline)
        gets = [x for x in self.server.asked if x.startswith("GET") and "/api/" not in x]
        return [json.loads(line) for line in out.splitlines()], len(gets)

    def run(self, *arguments, offline=False):
        """Returns the stdout of a Python process."""
        self.server.asked.clear()
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        env |= {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
            "HF_HOME": str(self.home),
            "HF_HUB_OFFLINE": str(int(offline)),
            "NO_PROXY": "*",
        }
        command = [sys.executable, *arguments]
        out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert out.returncode == 0, out.stderr
        assert "B/s" not in out.stderr  # no progress bar without a terminal
        return out.stdout


@contextlib.contextmanager
def serving():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_requested_file_is_fetched(tmp_path):
    wanted = {
        "tnt_s_patch16_224": ["new", f"{S}@main/{SAFE}", f"fetched revision {NEW}"],
        f"{S}@main/sub/x.bin": ["sub", f"{S}@main/sub/x.bin", f"fetched revision {NEW}"],
        f"{S}/{PICKLE}": ["pickle", f"{S}@main/{PICKLE}", f"fetched revision {NEW}"],
        f"{S}@v1": ["old", f"{S}@v1/{SAFE}", f"fetched revision {OLD}"],
        f"{S}@{OLD}": ["old", f"{S}@{OLD}/{SAFE}", f"fetched revision {OLD}"],
        f"{S}@refs/pr/7": ["old", f"{S}@refs/pr/7/{SAFE}", f"fetched revision {OLD}"],
        "hf://lab/pickle": [
            "pickle only",
            f"hf://lab/pickle@main/{PICKLE}",
            f"fetched revision {NEW}",
        ],
    }
    with serving() as server:
        client = Client(tmp_path, server)
        first, downloads = client.fetch(*wanted)
        assert first == list(wanted.values())
        assert downloads == 5  # three of the seven are the same file
        assert client.fetch(*wanted) == (first, 0)
        assert client.fetch(*wanted, offline=True) == (first, 0)
        assert server.asked == []
    assert client.fetch(*wanted) == (first, 0)  # the server is gone
    for folder in list(tmp_path.rglob(".no_exist")):
        shutil.rmtree(folder)
    ([answer], _) = client.fetch("hf://lab/pickle", offline=True)
    assert answer[-1].startswith("warning: config.json is not in the cache, and the server")


def test_weights_are_loaded_from_the_hub(tmp_path):
    path, heads = golden("timm")
    command = ["-m", "tnt_flax", "convert", "--check", *flags(heads)]
    with serving() as server:
        out = Client(tmp_path, server).run(*command, "hf://lab/tnt")
    fetched = json.loads(out.splitlines()[-1])
    assert fetched["source"] == f"hf://lab/tnt@main/{SAFE}"
    assert fetched["digest"] == run("--check", *flags(heads), path)["digest"]
    assert fetched["notes"] == [f"fetched revision {NEW}"]


def test_the_config_beside_the_weights_is_fetched(tmp_path):
    """It states the numbers of heads. The command takes timm's form of the address."""
    command = ["-m", "tnt_flax", "convert", "--check", "hf-hub:lab/described"]
    with serving() as server:
        client = Client(tmp_path, server)
        first = json.loads(client.run(*command).splitlines()[-1])
        assert first == json.loads(client.run(*command, offline=True).splitlines()[-1])
    assert (
        first["crop_fraction"] == 0.75
        and first["digest"]
        == run("--check", *flags(golden("timm")[1]), golden("timm")[0])["digest"]
    )


ERRORS = {
    "hf://lab/none": r"no such repository, or a private one; check OWNER/NAME",
    "hf://lab/token": r".*\(HfHubHTTPError: .*401 .*; try again, or download",
    "hf://lab/a--b": r"HFValidationError: .*; write hf://OWNER/NAME",
    "hf://lab/gated": r"it is gated; accept its terms at http://127.0.0.1:\d+/lab/gated",
    f"{S}@v9": r"no such revision; see the branches at http",
    f"{S}@v1/{PICKLE}": r"no such file",
    "hf://lab/empty": r"no such file \(without /FILE it is model.safetensors or pytorch_model",
    "hf://lab/ill": r"not in the cache, and the server does not respond \(.*500 .*; try again, or "
    r"download the file by hand from http://127.0.0.1:\d+/lab/ill and give its path",
    "hf://lab/short": r"the download failed \(OSError: Consistency check failed: .*; try again",
}


def check_error(answer, address, reason):
    kind, message = answer
    assert kind == "InputError", message
    assert re.match(f"cannot fetch .*: {reason}", message), message
    assert address in message and "\n" not in message and len(message) < 500


def test_every_failure_is_one_line(tmp_path):
    with serving() as server:
        answers, _ = Client(tmp_path, server).fetch(*ERRORS)
    for answer, (address, reason) in zip(answers, ERRORS.items(), strict=True):
        check_error(answer, address, reason)
    assert not list(tmp_path.rglob("snapshots/*/*"))  # nothing that is cut off stays


@pytest.mark.parametrize(
    "options, reason",
    [
        ({}, r"not in the cache, and the server does not respond \(Connect.*; try again"),
        ({"offline": True}, r"not in the cache, .*offline"),
        ({"mode": "full"}, r"the disk of the cache is full; make room, or set HF_HOME"),
        ({"mode": "missing"}, r'huggingface_hub is not installed: pip install "tnt_flax\[hub\]"$'),
    ],
    ids=["no server", "offline", "disk full", "no huggingface_hub"],
)
def test_unavailable_files_are_explained(tmp_path, options, reason):
    with serving() as server:
        pass
    ([answer], _) = Client(tmp_path, server).fetch("tnt_s_patch16_224", **options)
    check_error(answer, "tnt_s_patch16_224", reason)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "tnt",
        "/a/b",
        "/a/b/",
        "a/b//c",
        "a/b/../c",
        "a/b/.",
        "a/b@",
        "a/b@../c",
        "a/b\n",
        "a/b c",
    ],
)
def test_invalid_addresses_are_refused(address):
    with pytest.raises(InputError, match=r"is not a valid address: write hf://OWNER/NAME") as e:
        hub.fetch(f"hf://{address}")
    assert "\n" not in str(e.value)


def test_addresses_are_recognized():
    for address in [*hub.HUB, "hf://lab/pickle", "hf://nonsense"]:
        assert hub.address_of(address) == address
    for path in ["w.safetensors", "./hf/x", "timm/resnet18"]:
        assert hub.address_of(path) is None
