# SPDX-License-Identifier: Apache-2.0
"""Fetching weights, against a server on this machine that speaks the hub's protocol.

huggingface_hub reads its environment when it is imported, so its side runs in processes of its own.
"""

import json
import re
import shutil

import pytest

from tests.goldens.scripts.weights import GOLDEN
from tests.helpers.foreign_weights import flags, golden, run
from tests.helpers.hub_server import NEW, OLD, Client, serve
from tnt_flax.core.errors import InputError
from tnt_flax.weights import hub

pytest.importorskip("huggingface_hub", reason='pip install ".[hub]"')
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


def fetch(client, *addresses, mode="", offline=False):
    """Returns the result for each address, of one new process, and its number of downloads."""
    out = client.run("-c", CLIENT, mode, *addresses, offline=offline)
    gets = [x for x in client.server.asked if x.startswith("GET") and "/api/" not in x]
    return [json.loads(line) for line in out.splitlines()], len(gets)


@pytest.mark.slow
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
    with serve(FILES, FAILING) as server:
        client = Client(tmp_path, server)
        first, downloads = fetch(client, *wanted)
        assert first == list(wanted.values())
        assert downloads == 5  # three of the seven are the same file
        assert fetch(client, *wanted) == (first, 0)
        assert fetch(client, *wanted, offline=True) == (first, 0)
        assert server.asked == []
    assert fetch(client, *wanted) == (first, 0)  # the server is gone
    for folder in list(tmp_path.rglob(".no_exist")):
        shutil.rmtree(folder)
    ([answer], _) = fetch(client, "hf://lab/pickle", offline=True)
    assert answer[-1].startswith("warning: config.json is not in the cache, and the server")


def test_weights_are_loaded_from_the_hub(tmp_path):
    path, heads = golden("timm")
    command = ["-m", "tnt_flax", "convert", "--check", *flags(heads)]
    with serve(FILES, FAILING) as server:
        out = Client(tmp_path, server).run(*command, "hf://lab/tnt")
    fetched = json.loads(out.splitlines()[-1])
    assert fetched["source"] == f"hf://lab/tnt@main/{SAFE}"
    assert fetched["digest"] == run("--check", *flags(heads), path)["digest"]
    assert fetched["notes"] == [f"fetched revision {NEW}"]


def test_the_config_beside_the_weights_is_fetched(tmp_path):
    """It states the numbers of heads. The command takes timm's form of the address."""
    command = ["-m", "tnt_flax", "convert", "--check", "hf-hub:lab/described"]
    with serve(FILES, FAILING) as server:
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
    with serve(FILES, FAILING) as server:
        answers, _ = fetch(Client(tmp_path, server), *ERRORS)
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
    with serve(FILES, FAILING) as server:
        pass
    ([answer], _) = fetch(Client(tmp_path, server), "tnt_s_patch16_224", **options)
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
