# SPDX-License-Identifier: Apache-2.0
"""Converted weights against timm and torch, live: `make oracle ARGS=-s` prints the figures."""

import json
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import tnt_flax
from tests.helpers.foreign_weights import flags
from tests.models.test_oracle_models import (
    NAMES,
    as_users_run_it,  # noqa: F401  a fixture, as are timm and torch
    fill,
    random_images,
    report,
    timm,  # noqa: F401
    to_torch,
    torch,  # noqa: F401
)
from tnt_flax.models import create_model
from tnt_flax.weights import names
from tnt_flax.weights.formats import torch as torch_files
from tnt_flax.weights.read import read_checkpoint

pytestmark = pytest.mark.oracle
SMALL = dict(embed_dim=48, inner_dim=12, num_heads_outer=4, num_heads_inner=3, depth=3)
HEADS = dict(outer_heads=4, inner_heads=3)


def save(network, folder):
    """As timm's hub does. Every network gets the same file name, as they have had."""
    import safetensors.torch

    path = folder / "tnt_s_patch16_224.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_variants_of_the_same_name_are_distinguished(name, torch, timm, tmp_path, record_property):
    network = timm.create_model(name, pretrained=False).eval()
    fill(torch, network)
    model, variables = tnt_flax.load(save(network, tmp_path))
    assert model == create_model(name)
    images = random_images(2)
    with torch.no_grad():
        theirs = network(to_torch(torch, images)).numpy()
    ours = np.asarray(jax.jit(model.apply)(variables, images))
    figures = {
        "logits' standard deviation": float(theirs.std()),
        "max |ours - timm|": float(np.abs(ours - theirs).max()),
    }
    report(f"tnt_flax.load, {name}", figures, record_property)
    assert np.abs(ours - theirs).max() <= 5e-5


def small(timm, **fields):
    return timm.models.tnt.TNT(**{"img_size": 64, "num_classes": 7, **SMALL, **fields}).eval()


@pytest.mark.parametrize("legacy", [False, True], ids=["official", "legacy"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
def test_timm_loads_what_we_write(suffix, legacy, torch, timm, tmp_path):
    network = small(timm, legacy=legacy)
    fill(torch, network)
    source, path = save(network, tmp_path), tmp_path / f"x{suffix}"
    command = [sys.executable, "-m", "tnt_flax", "convert", source, path, "--to=timm"]
    command += flags(HEADS)
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(out.splitlines()[-1])["same_function"]
    if suffix == ".safetensors":
        import safetensors.torch

        state = safetensors.torch.load_file(path)
    else:
        state = torch.load(path, weights_only=True)
    before = network.state_dict()
    assert sorted(state) == sorted(before)
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_timm_loads_the_official_names_that_we_write(torch, timm, tmp_path):
    """timm's own filter renames huawei's tensors: an oracle for those names."""
    network, again = small(timm), small(timm)
    fill(torch, network)
    found = read_checkpoint(save(network, tmp_path), **HEADS)
    torch_files.write(tmp_path / "x.pth.tar", dict(names.export("huawei", found.params)))
    state = torch.load(tmp_path / "x.pth.tar", weights_only=True)
    assert "outer_tokens" in state
    again.load_state_dict(timm.models.tnt.checkpoint_filter_fn(state, again), strict=True)
    for name, x in network.state_dict().items():
        assert torch.equal(x, again.state_dict()[name]), name


@pytest.mark.parametrize("size", [32, (80, 48), 224])
def test_positions_are_resampled_as_timms(size, torch, timm, tmp_path, record_property):
    network, resized = small(timm), small(timm, img_size=size)
    fill(torch, network)
    path = save(network, tmp_path)
    _, variables = tnt_flax.load(path, image_size=size, **HEADS)
    state = timm.models.tnt.checkpoint_filter_fn(dict(network.state_dict()), resized)
    ours, theirs = variables["params"]["sentence_pos"], state["patch_pos"].numpy()
    figures = {"max |ours - timm|, of positions around 0.2": float(np.abs(ours - theirs).max())}
    report(f"resampled from 64 to {size}", figures, record_property)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_stems_are_adapted_as_timms(channels, torch, timm, tmp_path):
    network = small(timm)
    fill(torch, network)
    _, variables = tnt_flax.load(save(network, tmp_path), in_channels=channels, **HEADS)
    weight = network.state_dict()["pixel_embed.proj.weight"]
    theirs = timm.models._manipulate.adapt_input_conv(channels, weight).numpy()
    ours = np.asarray(variables["params"]["word_embed"]["conv"]["kernel"])
    np.testing.assert_allclose(ours, theirs.transpose(2, 3, 1, 0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "fields",
    [dict(legacy=False), dict(legacy=True), dict(img_size=(32, 64))],
    ids=["official", "legacy", "rectangle"],
)
def test_the_command_compares(fields, torch, timm, tmp_path):
    network = small(timm, **fields)
    fill(torch, network)
    size = fields.get("img_size", (64, 64))
    config = {"model_args": SMALL, "pretrained_cfg": {"input_size": [3, *size]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "tnt_flax", "convert", "--check", save(network, tmp_path)]
    command += ["--against=timm", *flags(HEADS)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert 0 < json.loads(out.splitlines()[-1])["against_timm"] < 5e-5


def test_how_long_loading_takes(torch, timm, tmp_path, record_property):
    """The same file, by turns; the first of each is not counted."""
    network = timm.create_model("tnt_s_patch16_224", pretrained=False)
    torch.save(network.state_dict(), tmp_path / "s.pth")

    def with_timm():
        fresh = timm.create_model("tnt_s_patch16_224", pretrained=False)
        fresh.load_state_dict(torch.load(tmp_path / "s.pth", weights_only=True))

    def with_us():
        jax.block_until_ready(tnt_flax.load(tmp_path / "s.pth")[1])

    times = {with_timm: [], with_us: []}
    for _ in range(6):
        for function, found in times.items():
            began = time.perf_counter()
            function()
            found.append(time.perf_counter() - began)
    ours, theirs = (float(np.median(times[f][1:])) for f in (with_us, with_timm))
    figures = {"tnt_flax.load, s": ours, "timm, s": theirs, "ratio": ours / theirs}
    report("loading TNT-S from a .pth file, medians of 5", figures, record_property)
