# SPDX-License-Identifier: Apache-2.0
"""Exports compute the source's function, are verified, and are refused otherwise."""

import datetime
import json
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest

import tnt_flax
from tests.helpers import small_network
from tnt_flax.__main__ import main
from tnt_flax.core.errors import InputError, RunError
from tnt_flax.inference import stablehlo
from tnt_flax.tools import export
from tnt_flax.weights.read import read_checkpoint


def run(capsys, *arguments):
    assert main(["export", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def source(path, images):
    model, variables = tnt_flax.load(path)
    return np.asarray(jax.jit(model.apply)(variables, images))


@pytest.fixture
def images():
    return np.random.default_rng(1).normal(size=(5, 48, 48, 3)).astype(np.float32)


@pytest.mark.slow
def test_stablehlo(tmp_path, capsys, images, root):
    path, out = small_network.save(tmp_path), tmp_path / "small.stablehlo"
    result = run(capsys, path, out)
    assert result["path"] == str(out) and result["max_abs_difference"] < 1e-4
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []

    expected = source(path, images)
    assert np.abs(expected).max() > 0.1
    loaded = tnt_flax.load_exported(out)
    for count in (1, 5):  # any number of images
        np.testing.assert_allclose(loaded(images[:count]), expected[:count], atol=1e-4)
    assert loaded.program.platforms == ("cpu", "cuda", "tpu")
    info = loaded.info
    assert info["class_names"][3] == "class 3" and info["image_size"] == 48
    assert info["std"] == [0.25] * 3 and info["jax"] == jax.__version__
    assert datetime.date.fromisoformat(info["created"]) <= datetime.date.today()

    # Neither the models nor the weights are needed.
    np.save(tmp_path / "images.npy", images)
    code = (
        "import sys, numpy, tnt_flax; images = numpy.load(sys.argv[2]); "
        "print(tnt_flax.load_exported(sys.argv[1])(images).tolist()); "
        "assert 'tnt_flax.models' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(out), str(tmp_path / "images.npy")]
    printed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    np.testing.assert_allclose(json.loads(printed), expected, atol=1e-4)


@pytest.mark.slow
def test_stablehlo_of_a_pyramid(tmp_path, capsys):
    """Running statistics are included. timm has no PyramidTNT."""
    path, out = (
        small_network.save(tmp_path, "ptnt_ti_patch16_192", 32),
        tmp_path / "small.stablehlo",
    )
    assert run(capsys, path, out)["max_abs_difference"] < 1e-4
    info = tnt_flax.load_exported(out).info
    assert info["image_size"] == 32 and info["variant"] == "pyramid"
    code = main(["export", str(path), str(tmp_path / "folder")])
    message = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and "is a PyramidTNT, which timm does not have" in message


def test_unusable_stablehlo_files(tmp_path, monkeypatch):
    path = tmp_path / "f.stablehlo"
    stablehlo.save_exported(
        path, stablehlo.trace(lambda x: x.sum(axis=(1, 2, 3)), 16, ("cuda",)), {}
    )
    with pytest.raises(InputError, match="is for cuda, this is cpu"):
        stablehlo.load_exported(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("export.json", "{}")
        file.writestr("program", "no program")
    with pytest.raises(InputError, match="cannot read .*: export it again"):
        stablehlo.load_exported(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="is damaged or was not written by"):
        stablehlo.load_exported(path)
    with pytest.raises(InputError, match="cannot read .*No such file"):
        stablehlo.load_exported(tmp_path / "none.stablehlo")


def test_a_wrong_export_is_not_written(tmp_path, monkeypatch, capsys):
    def wrong(found, path):
        path.write_bytes(b"half a file")
        model, variables = found.network.model, {"params": found.params}
        return jax.jit(lambda images: model.apply(variables, 1.01 * images))

    monkeypatch.setitem(export.FORMATS, "stablehlo", wrong)
    code = main(
        ["export", str(small_network.save(tmp_path, depth=1)), str(tmp_path / "x.stablehlo")]
    )
    assert code == 1
    assert "x.stablehlo differs from its source by" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["small.safetensors"]


def test_nan_is_a_difference(tmp_path):
    found = read_checkpoint(small_network.save(tmp_path, depth=1))
    with pytest.raises(RunError, match="differs"):
        export.verify(found, lambda x: np.full((len(x), 10), np.nan), "x")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the exporter's plugins
@pytest.mark.slow
@pytest.mark.parametrize("name, size", [("tnt_s_patch16_224", 48), ("ptnt_ti_patch16_192", 64)])
def test_onnx(name, size, tmp_path, capsys):
    pytest.importorskip("jax2onnx")
    import onnx
    import onnxruntime

    path, out = small_network.save(tmp_path, name, size), tmp_path / "small.onnx"
    images = np.random.default_rng(1).normal(size=(5, size, size, 3)).astype(np.float32)
    with jax.numpy_rank_promotion("allow"):  # which the exporter's convolutions need
        assert run(capsys, path, out)["max_abs_difference"] < 1e-4
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    (inputs,) = session.get_inputs()
    assert inputs.name == "images" and inputs.shape == ["batch", size, size, 3]
    expected = source(path, images)
    for count in (2, 5):
        (logits,) = session.run(["logits"], {"images": images[:count]})
        np.testing.assert_allclose(logits, expected[:count], atol=1e-4)
    metadata = {entry.key: json.loads(entry.value) for entry in onnx.load(out).metadata_props}
    assert metadata["class_names"][0] == "class 0" and metadata["mean"] == [0.5] * 3


def test_onnx_requires_its_packages(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    code = main(["export", str(small_network.save(tmp_path, depth=1)), str(tmp_path / "x.onnx")])
    assert code == 2
    assert "pip install --no-deps jax2onnx" in capsys.readouterr().err.splitlines()[-1]


def test_folder_for_timm(tmp_path, capsys):
    path, out = small_network.save(tmp_path, "tnt_s_legacy_patch16_224"), tmp_path / "folder"
    result = run(capsys, path, out)
    assert result["format"] == "timm" and result["max_abs_difference"] < 1e-4
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    config = json.loads((out / "config.json").read_text())
    assert config["num_classes"] == 10 and config["label_names"][9] == "class 9"
    assert config["pretrained_cfg"]["input_size"] == [3, 48, 48]
    assert config["model_args"]["num_heads_inner"] == 2
    assert config["architecture"] == "tnt_s_patch16_224" and config["model_args"]["legacy"] is True
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n") and "images of 48 pixels" in card


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["tnt_s_patch16_224", "tnt_s_legacy_patch16_224"])
def test_timm_loads_the_folder(name, tmp_path, capsys, images):
    import timm
    import torch

    path, out = small_network.save(tmp_path, name), tmp_path / "folder"
    run(capsys, path, out)
    network = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert timm.data.resolve_model_data_config(network)["std"] == [0.25] * 3
    assert network.pretrained_cfg["label_names"][1] == "class 1"
    with torch.no_grad():
        logits = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    np.testing.assert_allclose(logits.numpy(), source(path, images), atol=1e-4)


@pytest.mark.oracle
def test_timm_loads_the_weights_of_a_published_size(tmp_path, capsys):
    """By name and file alone."""
    import timm
    import torch

    fields = dict(outer_dim=384, inner_dim=24, outer_heads=6, inner_heads=4, depth=12)
    path = small_network.save(tmp_path, size=224, num_classes=1000, **fields)
    out = tmp_path / "tnt_s_timm"
    run(capsys, path, out)
    file = str(out / "model.safetensors")
    network = timm.create_model(
        "tnt_s_patch16_224", pretrained=True, pretrained_cfg_overlay=dict(file=file)
    ).eval()
    images = np.random.default_rng(1).normal(size=(1, 224, 224, 3)).astype(np.float32)
    with torch.no_grad():
        logits = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    expected = source(path, images)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
