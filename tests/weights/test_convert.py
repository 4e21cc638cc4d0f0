# SPDX-License-Identifier: Apache-2.0
"""Conversion between frameworks, and its command."""

import shutil
import sys

import numpy as np
import pytest

from tests.helpers.foreign_weights import (
    FILES,
    HEADS,
    flags,
    golden,
    random_params,
    raw_tensors,
    run,
)
from tnt_flax.__main__ import main
from tnt_flax.core.trees import fingerprint
from tnt_flax.weights import identify, write
from tnt_flax.weights import names as mapping
from tnt_flax.weights.formats import torch
from tnt_flax.weights.read import read_checkpoint
from tnt_flax.weights.write import save_weights


@pytest.mark.parametrize("framework", FILES)
def test_conversion_and_back_is_the_identity(framework, tmp_path):
    path, heads = golden(framework)
    ours, again = tmp_path / "ours.safetensors", tmp_path / f"again{path.suffix}"
    assert run(path, ours, *flags(heads))["same_function"]
    to = FILES[framework][1].removesuffix("_pets")
    assert run(ours, again, f"--to={to}")["same_function"]  # the header knows the heads
    before, after = raw_tensors(path), raw_tensors(again)
    assert sorted(before) == sorted(after)
    for name, x in before.items():
        assert x.dtype == after[name].dtype
        np.testing.assert_array_equal(x, after[name])
    assert run("--check", again, *flags(heads))["digest"] == run("--check", ours)["digest"]


def test_to_mindspore_requires_zero_biases(tmp_path):
    source, destination = tmp_path / "x.pth", tmp_path / "x.ckpt"
    params = random_params("official")
    torch.write(source, dict(mapping.export("huawei", params)))
    error = run(source, destination, *flags(HEADS), code=2)
    assert "mindspore has no place for nonzero values of" in error
    assert "blocks_0/inner/attention/out/bias" in error and not destination.exists()

    stored = mapping.unstacked(random_params("mindspore"))
    for name, x in mapping.unstacked(params).items():
        x[...] = x if name in stored else 0  # biases that MindSpore lacks
    torch.write(source, dict(mapping.export("huawei", params)))
    result = run(source, destination, *flags(HEADS))
    assert not result["same_function"]  # other GELU and epsilon, and it says so
    found = read_checkpoint(destination, **HEADS)
    assert identify.variant_of(found.network.model) == "mindspore"
    result = run(destination, tmp_path / "back.pth", "--to=huawei", *flags(HEADS))
    assert not result["same_function"]
    back = read_checkpoint(tmp_path / "back.pth", **HEADS)
    assert fingerprint(back.params) == fingerprint(params)


@pytest.mark.parametrize(
    "variant, framework, message",
    [
        ("official", "mmpretrain", "is the official network, which mmpretrain does not have"),
        ("legacy", "huawei", "is the legacy network, which huawei does not have: it has the offi"),
        ("legacy", "mindspore", "it has the mindspore and the mindspore_pets"),
        ("mindspore_pets", "timm", "it has the official and the legacy"),
    ],
)
def test_networks_missing_in_a_framework_are_refused(tmp_path, variant, framework, message):
    save_weights(tmp_path / "x.safetensors", random_params(variant), {})
    name = "y" + write.SUFFIXES[framework][0]
    options = [f"--to={framework}", *flags(HEADS)]
    assert message in run(tmp_path / "x.safetensors", tmp_path / name, *options, code=2)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(depth=5, vanilla_blocks=(2,)), "timm cannot build blocks without words"),
        (dict(mlp_ratio=2.0), "timm cannot build mlp_ratio=2.0 for the words"),
        (dict(se=True), "timm has no place for blocks/0/outer/se"),
    ],
    ids=str,
)
def test_arguments_missing_in_a_framework_are_refused(tmp_path, fields, message):
    path, params = tmp_path / "x.pth", random_params("official", **fields)
    torch.write(path, dict(mapping.export("huawei", params)))
    error = run(path, tmp_path / "y.pth", "--to=timm", *flags(HEADS), code=2)
    assert message in error and not (tmp_path / "y.pth").exists()
    assert run(path, tmp_path / "z.SAFETENSORS", *flags(HEADS))["same_function"]
    found = read_checkpoint(tmp_path / "z.SAFETENSORS")
    assert fingerprint(found.params) == fingerprint(params)


# --------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: CHECKPOINT"),
        (["SRC"], "give a destination, or --check and none"),
        (["SRC", "DST.pth", "--check"], "give a destination, or --check and none"),
        (["SRC", "DST.pth"], "set the target framework: --to="),
        (["SRC", "DST.pth", "--to=keras"], "invalid choice: 'keras'"),
        (["SRC", "DST.pth", "--to=mindspore"], "a file for mindspore ends in .ckpt"),
        (["SRC", "SRC", "--to=timm"], "exists already: remove it, or choose another name"),
        (["SRC", "none/x.ckpt"], "there is no folder"),
        (["SRC", "DST.ckpt", "--heads=3"], "unknown option --heads"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_invalid_commands_are_refused(arguments, message, tmp_path):
    path = tmp_path / "x.safetensors"
    shutil.copy(golden("timm")[0], path)
    for name, place in {"SRC": path, "DST": tmp_path / "y"}.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
    error = run(*arguments, code=2)
    assert message in error and len(error.splitlines()) == 1


def test_names_lists_every_tensor(capsys):
    path, heads = golden("huawei")
    assert main(["convert", "--check", str(path), "--names", *flags(heads)]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[:-1]]
    printed = {line[0]: line[1] for line in lines}
    tensors = raw_tensors(path)
    assert set(tensors) <= set(printed)
    both = "blocks/1/outer/attention/query/kernel + blocks/1/outer/attention/key/kernel"
    assert printed["blocks.1.outer_attn.qk.weight"].startswith(both)
    assert printed["outer_tokens"] == "ignored: not used by the network"
    del tensors["outer_tokens"]
    assert printed["parameters"] == f"{sum(x.size for x in tensors.values()):,}"


def test_against_timm_requires_torch_and_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path, heads = golden("timm")
    error = run("--check", path, "--against=timm", *flags(heads), code=2)
    assert "--against=timm needs torch and timm" in error


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    path, heads = golden("huawei")
    found = read_checkpoint(path, **heads)
    target = write.to_framework(found, "timm")
    real = write.read_file

    def damaged(*arguments, **options):
        again = real(*arguments, **options)
        again.params["cls_token"] = again.params["cls_token"] + 1
        return again

    monkeypatch.setattr(write, "read_file", damaged)
    with pytest.raises(RuntimeError, match="did not read back as it was written"):
        write.write(tmp_path / "x.pth", "timm", target, found)
    assert list(tmp_path.iterdir()) == []
