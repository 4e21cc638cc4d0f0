# SPDX-License-Identifier: Apache-2.0
"""Exports compute the source's function, are verified, and are refused otherwise."""

import argparse
import dataclasses
import datetime
import json
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest

import tnt_flax
from tests.helpers import hub_server, small_network
from tnt_flax.__main__ import main
from tnt_flax.core.errors import InputError, RunError
from tnt_flax.inference import stablehlo
from tnt_flax.models import scan
from tnt_flax.tools import export
from tnt_flax.tools.command_line import read_config
from tnt_flax.training.evaluate import evaluate_checkpoint
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
        path, stablehlo.trace(lambda x: x.sum(axis=(1, 2, 3)), (16, 16, 3), ("cuda",)), {}
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


@pytest.mark.slow
def test_a_wrong_export_is_not_written(tmp_path, monkeypatch, capsys):
    def wrong(found, path, args):
        path.write_bytes(b"half a file")
        model, variables = found.network.model, {"params": found.params}
        return jax.jit(lambda images: {"logits": model.apply(variables, 1.01 * images)})

    monkeypatch.setitem(
        export.FORMATS, "stablehlo", export.FORMATS["stablehlo"]._replace(write=wrong)
    )
    code = main(
        ["export", str(small_network.save(tmp_path, depth=1)), str(tmp_path / "x.stablehlo")]
    )
    assert code == 1
    assert "x.stablehlo differs from its source by" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["small.safetensors"]


def test_nan_is_a_difference(tmp_path):
    found = read_checkpoint(small_network.save(tmp_path, depth=1))
    args = argparse.Namespace(outputs=("logits",), layout=None, dtype=None, int8=False)
    with pytest.raises(RunError, match="differs"):
        export.verify(found, lambda x: {"logits": np.full((len(x), 10), np.nan)}, "x", args)


def expected_outputs(path, images):
    """Returns what the Flax network computes, by the names of the exports' outputs."""
    model, variables = tnt_flax.load(path)
    features = jax.jit(model.clone(num_classes=0).apply)(variables, images)
    blocks = jax.jit(lambda x: tnt_flax.block_outputs(model, variables, x))(images)
    by_block = {f"{k}_{i}": x for i, block in enumerate(blocks) for k, x in block.items()}
    return {"logits": source(path, images), "features": features, **by_block}


def check_outputs(found, expected, outputs, tolerance):
    wanted = [k for k in expected if k in outputs or k.rpartition("_")[0] in outputs]
    assert sorted(found) == sorted(wanted)
    for name in wanted:
        np.testing.assert_allclose(found[name], expected[name], atol=tolerance, err_msg=name)


TNT, PYRAMID = ("tnt_s_patch16_224", 48), ("ptnt_ti_patch16_192", 64)
ATTENTION = "logits,features,outer_attention,inner_attention"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the exporter's plugins
@pytest.mark.slow
@pytest.mark.parametrize(
    "network, outputs, options, tolerance",
    [
        (TNT, ATTENTION, ["--layout=nchw"], 1e-4),
        (PYRAMID, ATTENTION, [], 1e-4),
        (TNT, "features", ["--opset=16"], 1e-4),
        (PYRAMID, "logits,sentences,words", ["--opset=26", "--layout=nchw"], 1e-4),
        (TNT, "logits", ["--dtype=float16"], 5e-3),
        (TNT, "logits,features", ["--int8"], 0.05),
        (PYRAMID, "logits", ["--int8"], 0.05),
    ],
)
def test_onnx(network, outputs, options, tolerance, tmp_path, capsys):
    pytest.importorskip("jax2onnx")
    import onnx
    import onnxruntime

    path, out = small_network.save(tmp_path, *network), tmp_path / "small.onnx"
    size = network[1]
    images = np.random.default_rng(1).normal(size=(5, size, size, 3)).astype(np.float32)
    expected = expected_outputs(path, images)
    with jax.numpy_rank_promotion("allow"):  # which the exporter's convolutions need
        result = run(capsys, path, out, f"--outputs={outputs}", *options)
    assert result["max_abs_difference"] < tolerance and result["bytes"] == out.stat().st_size
    layout = "nchw" if "--layout=nchw" in options else "nhwc"
    pixels = images.transpose(0, 3, 1, 2) if layout == "nchw" else images
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    (inputs,) = session.get_inputs()
    assert inputs.name == "images" and inputs.shape == ["batch", *pixels.shape[1:]]
    assert inputs.type == "tensor(float)"
    names = [x.name for x in session.get_outputs()]
    for count in (2, 5):
        found = dict(zip(names, session.run(None, {"images": pixels[:count]}), strict=True))
        cut = {name: x[:count] for name, x in expected.items()}
        check_outputs(found, cut, outputs.split(","), tolerance)
    model = onnx.load(out)
    ours = (entry for entry in model.metadata_props if not entry.key.startswith("onnx."))
    metadata = {entry.key: json.loads(entry.value) for entry in ours}
    assert metadata["class_names"][0] == "class 0" and metadata["mean"] == [0.5] * 3
    assert metadata["layout"] == layout
    opset = next((int(x[8:]) for x in options if x.startswith("--opset=")), 23)
    assert opset in {x.version for x in model.opset_import if not x.domain}


@pytest.mark.slow
@pytest.mark.parametrize(
    "network, dtype, tolerance",
    [(TNT, "float32", 1e-5), (TNT, "float16", 5e-3), (PYRAMID, "bfloat16", 0.05)],
)
def test_stablehlo_with_options(network, dtype, tolerance, tmp_path, capsys):
    path, out = small_network.save(tmp_path, *network), tmp_path / "small.stablehlo"
    options = ["--layout=nchw", f"--dtype={dtype}", f"--outputs={ATTENTION}"]
    assert run(capsys, path, out, *options)["max_abs_difference"] < tolerance
    size = network[1]
    images = np.random.default_rng(1).normal(size=(3, size, size, 3)).astype(np.float32)
    loaded = tnt_flax.load_exported(out)
    found = loaded(images.transpose(0, 3, 1, 2))
    check_outputs(found, expected_outputs(path, images), ATTENTION.split(","), tolerance)
    assert found["logits"].dtype == np.float32
    assert loaded.info["layout"] == "nchw" and loaded.info["dtype"] == dtype
    model, variables = tnt_flax.load(path, dtype=dtype)
    same = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(found["logits"], same, atol=tolerance / 2)


def test_unrolled_networks_are_exported_in_a_loop(tmp_path, monkeypatch):
    """StableHLO has no stable operation for the layouts of unrolled blocks on a GPU."""
    monkeypatch.setattr(scan, "platform", lambda: "gpu")
    found = read_checkpoint(small_network.save(tmp_path, depth=1))
    unrolled = found.network.model.clone(unroll=True)
    found = dataclasses.replace(found, network=dataclasses.replace(found.network, model=unrolled))
    args = argparse.Namespace(outputs=("logits",), layout=None, dtype=None)
    stablehlo.trace(export.make_program(found, args), (48, 48, 3), ("cuda",))


@pytest.mark.slow
def test_logits_need_a_head(tmp_path, capsys):
    path = small_network.save(tmp_path, depth=1, num_classes=0)
    assert main(["export", str(path), str(tmp_path / "x.stablehlo"), "--outputs=logits"]) == 2
    assert "has no head" in capsys.readouterr().err
    assert run(capsys, path, tmp_path / "x.stablehlo")["max_abs_difference"] < 1e-4


@pytest.mark.slow
def test_what_is_pushed_loads_again(tmp_path, images, root):
    """In processes: huggingface_hub reads its environment when it is imported."""
    pytest.importorskip("huggingface_hub")
    path = small_network.save(tmp_path)
    np.save(tmp_path / "images.npy", images)
    code = (
        "import sys, jax, numpy, tnt_flax; model, variables = tnt_flax.load('hf://lab/digits'); "
        "print(jax.jit(model.apply)(variables, numpy.load(sys.argv[1])).tolist())"
    )
    with hub_server.serve({}) as server:
        client = hub_server.Client(tmp_path, server)
        command = ["-m", "tnt_flax", "export", path, "--push=lab/digits", "--license=mit"]
        for _ in range(2):  # the second updates
            result = json.loads(client.run(*command).splitlines()[-1])
            assert result["pushed"] == f"hf://lab/digits@{server.heads['lab/digits']}"
        files = server.files["lab/digits", server.heads["lab/digits"]]
        assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
        assert b'tnt_flax.load("hf://lab/digits")' in files["README.md"]
        logits = json.loads(client.run("-c", code, tmp_path / "images.npy").splitlines()[-1])
    np.testing.assert_allclose(logits, source(path, images), atol=1e-5)


@pytest.mark.slow
def test_exports_are_evaluated(tmp_path, capsys):
    """The model card states the result."""
    options = dict(class_names=list("0123456789"), data={"interpolation": "bilinear"})
    path = small_network.save(tmp_path, size=32, depth=1, **options)
    result = run(capsys, path, tmp_path / "folder", "--config=digits")
    config = read_config("digits", ["--config.data.mean=(0.5,0.5,0.5)"])
    with config.ignore_type():
        config.data.std = (0.25, 0.25, 0.25)
        config.model = {key: "" if key == "name" else None for key in config.model}
    expected = evaluate_checkpoint(config, None, str(path))
    for key in ("top1", "images", "mean_per_class"):
        assert result["evaluation"][key] == expected[key], key
    assert result["evaluation"]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    card = (tmp_path / "folder" / "README.md").read_text()
    assert f"| top-1 accuracy | {expected['top1']:.4f} |" in card and "| images | 360 |" in card


def test_onnx_requires_its_packages(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    code = main(["export", str(small_network.save(tmp_path, depth=1)), str(tmp_path / "x.onnx")])
    assert code == 2
    assert "pip install --no-deps jax2onnx" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
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
    assert "| images | 48x48 pixels, RGB |" in (out / "README.md").read_text()


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
