# SPDX-License-Identifier: Apache-2.0
"""Model cards, and uploads to a server on this machine that speaks the hub's protocol."""

import json

import numpy as np
import pytest

from tests.helpers import hub_server, small_network
from tests.helpers.hub_server import TOKEN
from tnt_flax.core.errors import InputError, RunError
from tnt_flax.weights import publish, write
from tnt_flax.weights.publish import Statements
from tnt_flax.weights.read import read_checkpoint

huggingface_hub = pytest.importorskip("huggingface_hub", reason='pip install ".[hub]"')

# The library's own call of its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def server(monkeypatch):
    from huggingface_hub import constants

    with hub_server.serve({}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # before each retry
        yield server


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlibrary_name: timm\n---\n")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def pushed(server, repo):
    return server.files[repo, server.heads[repo]]


def test_files_are_pushed_in_one_commit(server, folder):
    commit = publish.upload(folder, "lab/new")
    assert commit == server.heads["lab/new"] and server.private == {"lab/new": False}
    assert pushed(server, "lab/new") == {x.name: x.read_bytes() for x in folder.iterdir()}
    assert len([x for x in server.asked if "/commit/" in x]) == 1


def test_a_second_push_updates(server, folder):
    first = publish.upload(folder, "lab/new")
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert publish.upload(folder, "lab/new") != first
    assert pushed(server, "lab/new")["model.safetensors"] == b"other weights"


def test_private_repositories(server, folder):
    for _ in range(2):
        publish.upload(folder, "lab/secret", private=True)
    assert server.private == {"lab/secret": True}
    publish.upload(folder, "lab/open")
    before = dict(server.heads)
    with pytest.raises(RunError, match="were not pushed: lab/open exists and is public"):
        publish.upload(folder, "lab/open", private=True)
    assert server.heads == before


@pytest.mark.parametrize(
    "repo, token, reason",
    [
        ("others/new", TOKEN, r"HfHubHTTPError: .*403 .*; log in with a token that may write"),
        ("lab/new", "hf_wrong", r"HfHubHTTPError: .*401 .*; log in with a token"),
        ("lab/new", TOKEN, r"HfHubHTTPError: .*403 .*"),
    ],
    ids=["foreign", "wrong token", "failing upload"],
)
def test_failures_are_one_line_and_push_nothing(server, folder, monkeypatch, repo, token, reason):
    monkeypatch.setenv("HF_TOKEN", token)
    server.full = True
    what = rf"config.json, model.safetensors were not pushed to {repo}: "
    with pytest.raises(RunError, match=rf"^README.md, {what}({reason})") as error:
        publish.upload(folder, repo)
    assert "\n" not in str(error.value) and token not in str(error.value)
    assert not server.heads


def test_pushes_that_cannot_work_are_refused_early(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for repo in ("name", "a/b/c", "../x", "a/b@main", ""):
        with pytest.raises(InputError, match="write OWNER/NAME"):
            publish.check_upload(repo)
    with pytest.raises(InputError, match="not logged in: run `hf auth login`"):
        publish.check_upload("lab/new")


# ---------------------------------------------------------------------------------- model card


def card_of(path, stated=Statements(), **changes):  # noqa: B008
    found = read_checkpoint(path)
    found.info |= changes
    card = path.with_name("README.md")
    publish.write_card(path.parent, write.to_framework(found, "timm"), found, stated)
    return huggingface_hub.ModelCard.load(card), card.read_text()


def test_a_card_states_what_is_known(tmp_path):
    stated = Statements("mit", "the owner", "flowers, split test", {"top1": 0.5}, "lab/tnt")
    names = ["a|b", "n01440764", *map(str, range(8))]
    path = small_network.save(tmp_path, depth=1, class_names=names)
    card, text = card_of(path, stated)
    assert card.data.license == "mit" and card.data.library_name == "timm"
    assert card.data.pipeline_tag == "image-classification"
    (result,) = card.data.eval_results
    assert result.metric_type == "accuracy" and np.isclose(result.metric_value, 0.5)
    assert result.dataset_name == "flowers, split test"
    assert "| license | mit, as stated by the owner |" in text
    assert "| top-1 accuracy | 0.5000 |" in text
    assert r"| 0 | a\|b |" in text and r"| 1 | n01440764: tench, Tinca tinca |" in text
    assert 'timm.create_model("hf-hub:lab/tnt", pretrained=True)' in text
    assert 'tnt_flax.load("hf://lab/tnt")' in text
    for paper in ("2103.00112", "2201.00978"):
        assert f"arXiv:{paper}" in text
    assert (
        "Resize the shorter side to 48 / 1 pixels (bicubic)" in text
        and "(0.25, 0.25, 0.25)" in text
    )
    assert str(tmp_path) not in text  # no folders of this machine


def test_a_card_says_what_is_unknown(tmp_path):
    path = small_network.save(tmp_path, depth=1, class_names=[])
    card, text = card_of(path)
    assert card.data.license == "unknown" and card.data.eval_results is None
    for line in (
        "| license | unknown: the source of the weights states none |",
        "Unknown: these weights were not evaluated when they were exported.",
        "Unknown: the weights store no names of the classes.",
    ):
        assert line in text
    assert "training data | unknown: not stored with the weights" in text


def test_the_license_is_that_of_the_sources_card(tmp_path):
    weights, card = tmp_path / "model.safetensors", tmp_path / "README.md"
    assert publish.license_of(str(weights)) is None
    for license, known in [("apache-2.0", "apache-2.0"), ("unknown", None), ("[a, b]", None)]:
        card.write_text(f"---\nlicense: {license}\n---\n")
        assert publish.license_of(str(weights)) == known
    card.write_text("---\nlicense: [\n---\n")
    assert publish.license_of(str(weights)) is None
    with pytest.raises(InputError, match="'MIT!' is not an identifier of a license"):
        publish.check_license("MIT!")


def test_names_of_data_have_no_folders():
    name = publish.data_name
    assert name({"source": "folder", "root": "/home/me/pets"}, "val") == "pets, split val"
    assert name({"source": "tfds", "name": "cars196", "root": "/d"}, "x") == "cars196, split x"
    assert "handwritten digits" in name({"source": "digits"}, "test")
    assert name(json.loads("{}"), "test") == "unknown, split test"
