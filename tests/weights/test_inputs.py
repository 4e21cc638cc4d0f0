# SPDX-License-Identifier: Apache-2.0
"""Preprocessing and class names beside the weights: our exports, timm's and transformers' files."""

import dataclasses
import json
import re

import pytest
import safetensors.numpy

import tnt_flax
from tests.helpers import small_network
from tests.helpers.foreign_weights import HEADS, run, state
from tnt_flax.core.errors import InputError
from tnt_flax.core.trees import fingerprint
from tnt_flax.weights import hub, publish, write
from tnt_flax.weights.formats import torch
from tnt_flax.weights.inputs import class_names_in
from tnt_flax.weights.load import adapt
from tnt_flax.weights.read import read_checkpoint

TENSORS, _ = state(naming="timm")
NAMES = tuple("vwxyz")
ARGUMENTS = dict(embed_dim=12, inner_dim=4, depth=2, num_heads_inner=2, num_heads_outer=3)
PRETRAINED = dict(
    mean=[0.1, 0.2, 0.3], std=[0.4] * 3, crop_pct=0.75, interpolation="bilinear", crop_mode="center"
)
TIMM = {
    "architecture": "tnt_s_patch16_224",
    "num_classes": 5,
    "model_args": ARGUMENTS,
    "pretrained_cfg": PRETRAINED,
    "label_names": list(NAMES),
}
PROCESSOR = {
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4] * 3,
    "size": {"shortest_edge": 64},
    "crop_size": {"height": 48, "width": 48},
    "do_center_crop": True,
    "resample": 2,
}
ID2LABEL = {"id2label": {str(i): name for i, name in enumerate(NAMES)}}


@pytest.fixture
def folder(tmp_path):
    """Writes model.safetensors and the given JSON files."""

    def make(**files):
        safetensors.numpy.save_file(TENSORS, tmp_path / "model.safetensors")
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return make


@pytest.mark.parametrize(
    "files",
    [
        dict(config=TIMM),
        dict(config=TIMM | {"model_type": "timm_wrapper"}),
        dict(config={"architecture": "x", "labels": NAMES, "model_args": ARGUMENTS, **PRETRAINED}),
        dict(config=ID2LABEL | {"model_args": ARGUMENTS}, preprocessor_config=PROCESSOR),
        dict(
            config={"label2id": {name: i for i, name in enumerate(NAMES)}, "model_args": ARGUMENTS},
            preprocessor_config=PROCESSOR | {"crop_pct": 0.75, "crop_size": None},
        ),
        dict(
            config={"model_args": ARGUMENTS},
            preprocessor_config={"pretrained_cfg": PRETRAINED, "label_names": NAMES},
        ),
    ],
    ids=["timm", "timm_wrapper", "timm 2022", "transformers", "crop_pct", "processor"],
)
def test_files_beside_the_weights_are_read(folder, files):
    path = folder(**files)
    (path / "500").mkdir()  # such as a step of a trainer
    found = read_checkpoint(f"local-dir:{path}")
    assert found.class_names == NAMES
    assert found.preprocessing == dict(
        mean=(0.1, 0.2, 0.3), std=(0.4,) * 3, crop_fraction=0.75, interpolation="bilinear"
    )
    assert (found.network.model.outer_heads, found.network.model.inner_heads) == (3, 2)


@pytest.mark.parametrize(
    "files, note",
    [
        (
            dict(config=TIMM | {"model_args": {"embed_dim": 384}}),
            "of another network .outer_dim=384",
        ),
        (dict(config=TIMM | {"label_names": ["a"]}), "ignored the 1 class names .* has 5 classes"),
        (
            dict(config=TIMM | {"pretrained_cfg": {"crop_mode": "squash"}}),
            "crop_mode='squash' there, a central crop here",
        ),
        (
            dict(config=TIMM | {"pretrained_cfg": {"interpolation": "lanczos"}}),
            "interpolation='lanczos' there, bicubic here",
        ),
        (
            dict(preprocessor_config={"size": {"height": 32, "width": 32}}),
            "squeezed into a square there",
        ),
    ],
    ids=lambda x: x[:20] if isinstance(x, str) else "",
)
def test_what_does_not_apply_is_a_warning(folder, files, note):
    found = read_checkpoint(folder(**files), **HEADS)
    (warning,) = (x for x in found.notes if x.startswith("warning"))
    assert re.search(note, warning)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "cannot read .*config.json: JSONDecodeError.*: repair or remove it"),
        (json.dumps(TIMM | {"pretrained_cfg": {"std": [0, 0, 0]}}), "invalid preprocessing .mean="),
        (json.dumps(TIMM | {"pretrained_cfg": {"crop_pct": 2}}), "a crop of 2.0 of the image"),
        (json.dumps(TIMM | {"pretrained_cfg": {"mean": "x"}}), "invalid preprocessing .could not"),
        (json.dumps(TIMM | {"pretrained_cfg": {"mean": [0.5]}}), "invalid preprocessing .mean="),
        ("[" * 100_000, "cannot read .*config.json: RecursionError: .*: repair or remove it"),
    ],
)
def test_damaged_files_are_refused(folder, content, message):
    path = folder()
    (path / "config.json").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read_checkpoint(path, **HEADS)
    assert len(str(error.value).splitlines()) == 1


def test_other_json_files_are_passed_over(folder):
    odd = {"pretrained_cfg": "x", "model_args": [1], "size": [1], "resample": [2], "id2label": 3}
    for content in (odd, {"model": {"name": "tnt_s_patch16_224"}}, [1], 3):
        found = read_checkpoint(folder(config=content), **HEADS)
        assert found.preprocessing["crop_fraction"] == 0.9 and not found.class_names


@pytest.mark.parametrize(
    "content",
    [
        {"class_to_idx": {"b": 1, "a": 0}},
        {"idx_to_class": {1: "b", 0: "a"}},
        {"classes": ["a", "b"]},
        {"meta": {"dataset_meta": {"classes": ("a", "b")}}},  # mmpretrain
        {"hyper_parameters": {"class_names": ["a", "b"]}},  # Lightning
    ],
)
def test_class_names_in_a_checkpoint_are_taken(content):
    assert class_names_in(content) == ("a", "b")


def test_other_values_under_the_keys_of_class_names_are_passed_over(tmp_path):
    loop = {"classes": 2, "meta": {}}
    loop["meta"]["meta"] = loop
    for content in (
        loop,
        {"classes": [0, 1], "labels": []},
        {"id2label": {0: "LABEL_0", 1: "LABEL_1"}},
        {"class_to_idx": {"a": 0, "b": 2}},
        {"class_to_idx": {"a": "x"}},
        {"classes": ["a", "a"]},
        [],
    ):
        assert class_names_in(content) is None
    torch.write(tmp_path / "x.pth", {"net": TENSORS, "class_to_idx": {"b": 0, "a": 1}})
    assert read_checkpoint(tmp_path / "x.pth", **HEADS).class_names is None  # of 5 classes


@pytest.fixture
def exported(tmp_path):
    """Weights of ours, and the folder for timm with them."""
    data = dict(mean=[0.1, 0.2, 0.3], crop_fraction=0.875)
    path, folder = small_network.save(tmp_path, depth=1, data=data), tmp_path / "export"
    found = read_checkpoint(path)
    publish.write_folder(folder, write.to_framework(found, "timm"), found)
    return path, folder


def test_our_export_for_timm_loads_again(exported):
    source, folder = exported
    expected = read_checkpoint(source)
    assert expected.class_names[3] == "class 3"
    for path in (folder, folder / "model.safetensors"):
        found = read_checkpoint(path)
        assert (found.inputs, found.network.model) == (expected.inputs, expected.network.model)
        assert found.network.image_size == expected.network.image_size
        assert fingerprint(found.variables) == fingerprint(expected.variables)
    run(folder, folder / "again.safetensors")
    assert read_checkpoint(folder / "again.safetensors").inputs == expected.inputs


def test_rectangles_are_exported_and_loaded_again(exported, tmp_path):
    source, _ = exported
    found, folder = read_checkpoint(source), tmp_path / "rectangle"
    model = adapt(found, image_size=(32, 64))
    found.network = dataclasses.replace(
        found.network, model=model, sentences=8, stored_size=(32, 64)
    )
    publish.write_folder(folder, write.to_framework(found, "timm"), found)
    assert read_checkpoint(folder).network.image_size == (32, 64)


@pytest.mark.slow
def test_our_export_for_timm_predicts_the_same(exported, tmp_path):
    photo = small_network.photo(tmp_path)
    source, folder = (tnt_flax.load_classifier(path).predict(photo) for path in exported)
    assert source == folder and source[0][0].label.startswith("class ")


@pytest.mark.parametrize(
    "text, address",
    [
        ("hf-hub:timm/tnt_s_patch16_224.in1k", "hf://timm/tnt_s_patch16_224.in1k"),
        ("hf_hub:lab/x@v1", "hf://lab/x@v1"),
        ("timm/tnt_s_patch16_224.in1k", "hf://timm/tnt_s_patch16_224.in1k"),
        ("tnt_b_patch16_224.in1k", "hf://timm/tnt_b_patch16_224.in1k"),
        ("https://huggingface.co/lab/x", "hf://lab/x@main"),
        ("https://huggingface.co/lab/x/tree/v1", "hf://lab/x@v1"),
        (
            "https://www.huggingface.co/lab/x/resolve/main/a/b.bin?download=true",
            "hf://lab/x@main/a/b.bin",
        ),
        ("hf://lab/pickle", "hf://lab/pickle"),
        *((name, name) for name in hub.HUB),
        ("runs/tnt_s", None),
        ("./hf/x", None),
        ("timm/resnet50.a1_in1k", None),
        ("tnt_s.safetensors", None),
        ("tnt_x.in1k", None),
    ],
)
def test_addresses_of_timm_and_of_web_pages(text, address):
    assert hub.address_of(text) == address
    assert address is None or address in hub.HUB or hub.ADDRESS.fullmatch(address)


def test_a_local_path_wins_over_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timm").mkdir()
    safetensors.numpy.save_file(TENSORS, tmp_path / "timm" / "tnt_s")
    assert read_checkpoint("timm/tnt_s", **HEADS).path == "timm/tnt_s"
    with pytest.raises(InputError, match="cannot read https://x.org/w.pth: download the file"):
        read_checkpoint("https://x.org/w.pth")
    with pytest.raises(InputError, match="write hf://lab/tnt if it is on the Hugging Face hub"):
        read_checkpoint("lab/tnt")
    for path in ("x" * 5000, "a\0b"):
        with pytest.raises(InputError, match="cannot read .*: No such file"):
            read_checkpoint(path)
