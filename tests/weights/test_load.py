# SPDX-License-Identifier: Apache-2.0
"""`tnt_flax.load`: for other classes, sizes and channels, onto any devices, in little memory."""

import json
import logging
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import tnt_flax
from tests.helpers.foreign_weights import HEADS, SMALL, random_params
from tnt_flax.core.errors import InputError
from tnt_flax.core.trees import fingerprint, named_leaves
from tnt_flax.models import TNT
from tnt_flax.weights import hub, names
from tnt_flax.weights.formats import torch
from tnt_flax.weights.load import adapt_channels
from tnt_flax.weights.write import save_weights

FIELDS = {k: v for k, v in SMALL.items() if k != "num_classes"}


@pytest.fixture
def params():
    return random_params("official")


@pytest.fixture
def path(tmp_path, params):
    path = tmp_path / "w.safetensors"
    model = {"name": "tnt_s_patch16_224", **FIELDS}
    save_weights(path, params, {"config": {"model": model, "data": {"image_size": 32}}})
    return path


def images(height=32, width=32, channels=3):
    values = np.random.RandomState(1).standard_normal((2, height, width, channels))
    return jnp.asarray(values, jnp.float32)


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.INFO, "tnt_flax")
    return caplog


def test_weights_are_loaded_unchanged(path, params, logged):
    model, variables = tnt_flax.load(path)
    assert model == TNT(**SMALL)
    assert fingerprint(variables["params"]) == fingerprint(params)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(variables))
    (line,) = logged.messages
    assert line.startswith(f"loaded {path}: unpublished TNT (official network, tnt_flax")
    same, again = tnt_flax.load(path, num_classes=5, image_size=32, in_channels=3)
    assert same == model and fingerprint(again["params"]) == fingerprint(params)


def test_execution_fields_can_be_chosen(path):
    model, variables = tnt_flax.load(path, dtype="bfloat16", drop_path=0.2, remat="none")
    assert (model.dtype, model.drop_path, model.remat) == (jnp.bfloat16, 0.2, "none")
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_a_new_head(path, params, logged):
    model, variables = tnt_flax.load(path, num_classes=7)
    head = variables["params"].pop("head")
    assert head["kernel"].shape == (12, 7) and 0.01 < head["kernel"].std() < 0.03
    assert head["bias"].shape == (7,) and not head["bias"].any()
    kept = {k: v for k, v in params.items() if k != "head"}
    assert fingerprint(variables["params"]) == fingerprint(kept)
    assert "a new head for 7 classes" in logged.text
    variables["params"]["head"] = head
    assert jax.jit(model.apply)(variables, images()).shape == (2, 7)

    model, variables = tnt_flax.load(path, num_classes=0)
    assert "head" not in variables["params"]
    assert jax.jit(model.apply)(variables, images()).shape == (2, 12)
    with pytest.raises(InputError, match="num_classes=-1 is negative"):
        tnt_flax.load(path, num_classes=-1)


def test_another_image_size(path, params, logged):
    model, variables = tnt_flax.load(path, image_size=(48, 64))
    positions = np.asarray(variables["params"]["sentence_pos"])
    assert positions.shape == (1, 1 + 3 * 4, 12)
    class_token = positions[:, 0]
    np.testing.assert_array_equal(class_token, params["sentence_pos"][:, 0])
    assert "resampled the positions from 2x2 to 3x4" in logged.text
    assert jax.jit(model.apply)(variables, images(48, 64)).shape == (2, 5)
    with pytest.raises(InputError, match="image_size 40x40 is not divisible by the patch size 16"):
        tnt_flax.load(path, image_size=40)
    with pytest.raises(InputError, match="image_size 0x0 is not divisible"):
        tnt_flax.load(path, image_size=0)


def test_resampling():
    def resample(values, old, new):
        positions = np.concatenate([np.zeros(1), values])[None, :, None].astype(np.float32)
        resampled = TNT(**SMALL).resampled_positions({"sentence_pos": positions}, old, new)
        return np.asarray(resampled["sentence_pos",])[0, 1:, 0].reshape(new)

    np.testing.assert_allclose(resample(np.full(16, 2.5), (4, 4), (6, 9)), 2.5, rtol=1e-6)
    # a gradient along the rows stays one along the rows, away from the edges
    found = resample(np.repeat(np.arange(8.0), 8), (8, 8), (16, 8))
    expected = (np.arange(16) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(found[4:12], np.repeat(expected[4:12, None], 8, 1), atol=1e-5)


@pytest.mark.slow
def test_grids_that_are_not_square(tmp_path):
    params = random_params("official", sentences=6)
    save_weights(tmp_path / "x.safetensors", params, {})
    path = tmp_path / "x.safetensors"
    model, variables = tnt_flax.load(path, image_size=(32, 48), **HEADS)
    assert fingerprint(variables["params"]) == fingerprint(params)
    assert jax.jit(model.apply)(variables, images(32, 48)).shape == (2, 5)
    with pytest.raises(InputError, match="has 6 sentences, not a square number"):
        tnt_flax.load(path, image_size=64, **HEADS)


@pytest.mark.slow
def test_other_channels(path, params):
    kernel = params["word_embed"]["conv"]["kernel"]
    model, variables = tnt_flax.load(path, in_channels=1)
    gray = images(channels=1)
    color = jnp.repeat(gray, 3, axis=-1)  # the same to both networks
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(model.apply)({"params": params}, color)
        found = jax.jit(model.apply)(variables, gray)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)

    many = adapt_channels(kernel, 5)
    assert many.shape == (7, 7, 5, 4)
    np.testing.assert_allclose(many, kernel[:, :, [0, 1, 2, 0, 1]] * 0.6, rtol=1e-6)
    with pytest.raises(InputError, match="cannot adapt a stem of 5 channels to 3"):
        adapt_channels(many, 3)


def test_loading_onto_a_mesh(path, params):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    _, variables = tnt_flax.load(path, sharding=everywhere)
    assert {x.sharding for x in jax.tree.leaves(variables)} == {everywhere}

    def split(name, shape):
        spec = PartitionSpec(*[None] * (len(shape) - 1), "data") if shape[-1] % 8 == 0 else ()
        return NamedSharding(mesh, PartitionSpec(*spec))

    _, variables = tnt_flax.load(path, sharding=split, num_classes=16)
    kernel = variables["params"]["blocks_0"]["outer"]["fc1"]["kernel"]  # [2, 12, 48]
    assert kernel.addressable_shards[3].data.shape == (2, 12, 6)
    np.testing.assert_array_equal(kernel, params["blocks_0"]["outer"]["fc1"]["kernel"])
    assert variables["params"]["head"]["kernel"].addressable_shards[0].data.shape == (12, 2)
    for name, x in named_leaves(variables["params"]).items():
        assert x.sharding == split(name, x.shape)


def test_names_and_addresses(tmp_path, monkeypatch, path, logged):
    with pytest.raises(InputError, match="no weights of 'tnt_ti_patch16_224' are published"):
        tnt_flax.load("tnt_ti_patch16_224")
    with pytest.raises(InputError, match="write hf://OWNER/NAME"):
        tnt_flax.load("hf://nonsense")
    with pytest.raises(InputError, match="tnt_x: No such file or directory"):
        tnt_flax.load("tnt_x")

    fetched = hub.Fetched(path, "hf://timm/x@main/model.safetensors", ["fetched revision 01230123"])
    monkeypatch.setattr(hub, "fetch", lambda address: fetched)
    model, _ = tnt_flax.load("hf://timm/x")
    assert "hf://timm/x@main/model.safetensors" in logged.text
    assert "fetched revision 01230123" in logged.text
    with pytest.raises(InputError, match="another network, not tnt_s_patch16_224"):
        tnt_flax.load("tnt_s_patch16_224")  # the name is a promise


MEMORY = r"""
import json, re, sys
import jax, tnt_flax
peak = lambda: int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024
jax.device_put(0.0).block_until_ready()
import tnt_flax.weights.load
before = peak()
model, variables = tnt_flax.load(sys.argv[1])
jax.block_until_ready(variables)
size = sum(x.nbytes for x in jax.tree.leaves(variables))
print(json.dumps({"times": (peak() - before) / size, "bytes": size}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_memory_of_loading_tnt_b(tmp_path, suffix):
    model = tnt_flax.create_model("tnt_b_patch16_224")
    abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    params = jax.tree.map(lambda x: np.full(x.shape, 0.01, np.float32), abstract)
    path = tmp_path / f"b{suffix}"
    if suffix == ".pth":
        torch.write(path, dict(names.export("huawei", params)))
    else:
        save_weights(path, params, {})
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True
    )
    measured = json.loads(out.stdout)
    assert measured["bytes"] == 4 * 65_428_680
    assert measured["times"] < 3, measured
    print(measured)
