# SPDX-License-Identifier: Apache-2.0
"""Reading files of other frameworks: trainers' checkpoints, mismatches, damage."""

import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from tests.goldens.scripts.weights import FIELDS, GOLDEN, images
from tests.helpers.foreign_weights import FILES, HEADS, golden, random_params, state
from tests.helpers.torch_files import archive, opcodes, program
from tnt_flax.__main__ import main
from tnt_flax.core.errors import InputError
from tnt_flax.core.trees import fingerprint
from tnt_flax.weights import identify
from tnt_flax.weights import names as mapping
from tnt_flax.weights.formats import mindspore, open_file, torch
from tnt_flax.weights.read import read_checkpoint


@pytest.mark.parametrize("framework", FILES)
def test_logits_equal_those_of_each_framework(framework):
    path, heads = golden(framework)
    found = read_checkpoint(path, **heads)
    _, naming, variant = FILES[framework]
    assert (found.naming, identify.variant_of(found.network.model)) == (naming, variant)
    model = found.network.model
    assert {key: getattr(model, key) for key in FIELDS[framework]} == FIELDS[framework]
    with jax.default_matmul_precision("highest"):
        logits = model.apply({"params": found.params}, jnp.asarray(images()))
    with np.load(GOLDEN / "expected.npz") as expected:
        theirs = expected[f"{framework} logits"]
    assert 0.2 < theirs.std() < 3
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=5e-6)


@pytest.mark.parametrize("prefix", ["", "module.", "module.model."])
@pytest.mark.parametrize(
    "keys",
    [
        ("state_dict", "state_dict_ema"),
        ("model", "model_ema"),
        ("state_dict", "ema_state_dict"),
        ("net", "ema"),
        ("net", "params_ema"),
        ("net", "averaged_model"),
    ],
)
def test_ema_weights_are_preferred_and_reported(tmp_path, prefix, keys):
    path = tmp_path / "checkpoint-9.pth.tar"
    (raw, raw_params), (ema, ema_params) = state(seed=0), state(seed=1)
    raw, ema = ({prefix + n: x for n, x in s.items()} for s in (raw, ema))
    ema["steps"] = np.array(9)
    content = {"epoch": 9, "arch": "tnt", keys[0]: raw, keys[1]: ema, "optimizer": {"state": {}}}
    torch.write(path, content)
    found = read_checkpoint(path, **HEADS)
    assert found.weights == "ema" and fingerprint(found.params) == fingerprint(ema_params)
    notes = " | ".join(found.notes)
    assert f"took the EMA weights, {keys[1]}; weights='raw' takes {keys[0]}" in notes
    assert "ignored steps" in notes and f"ignored {prefix}outer_tokens" in notes
    assert (f"removed the prefix {prefix!r}" in notes) == bool(prefix)

    found = read_checkpoint(path, weights="raw", **HEADS)
    assert found.weights == "raw" and fingerprint(found.params) == fingerprint(raw_params)

    torch.write(path, {keys[1]: ema})
    with pytest.raises(InputError, match=f"holds only EMA weights \\({keys[1]}\\)"):
        read_checkpoint(path, weights="raw", **HEADS)


def test_objects_beside_the_weights_are_ignored_and_listed(tmp_path):
    path = GOLDEN.parent / "torch" / "trainer.pth.tar"  # with a Namespace and NumPy's objects
    content = open_file(path)
    (note,) = (note for note in content.notes if note.startswith("ignored objects of "))
    assert "argparse.Namespace, numpy." in note and ".multiarray.scalar" in note
    with pytest.raises(InputError, match="holds no known TNT.*: give weights of TNT or Pyramid"):
        read_checkpoint(path)

    module = pathlib.PurePosixPath.__module__  # pathlib._local in 3.13
    pickled = opcodes(pathlib.PurePosixPath("x"))
    (tmp_path / "x.pth").write_bytes(archive(program(b"}", opcodes("model"), pickled, b"s")))
    with pytest.raises(InputError, match=f"no set .* 'model' .an object of {module}.Pure"):
        read_checkpoint(tmp_path / "x.pth")  # as a pickled network
    (tmp_path / "x.pth").write_bytes(archive(program(pickled)))
    with pytest.raises(InputError, match=f"an object of {module}.PurePosixPath, .* its state_dict"):
        read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"epoch": 3}, "holds no set of named tensors, but 'epoch': save the network's state_"),
        ({}, "holds no set of named tensors, but nothing"),
        ([1, 2], "holds no set of named tensors, but a list"),
        ({"state_dict": {"a": 1}}, "holds no set of named tensors, but 'state_dict'"),
    ],
)
def test_files_without_named_tensors_are_refused(tmp_path, content, message):
    torch.write(tmp_path / "x.pth", content)
    with pytest.raises(InputError, match=message):
        read_checkpoint(tmp_path / "x.pth")


def test_optimizer_state_of_mindspore_is_ignored(tmp_path):
    """As MindSpore's Model.train with AdamWeightDecay saves it."""
    tensors, params = state("mindspore", "mindspore")
    more = {f"{moment}.model.{n}": x for moment in ("adam_m", "adam_v") for n, x in tensors.items()}
    more |= {"global_step": np.int32([3]), "learning_rate": np.linspace(0, 1, 4, dtype=np.float32)}
    more |= {"epoch_num": np.array(3), "scale_sense": np.float32(1).reshape(1)}
    mindspore.write(tmp_path / "x.ckpt", {f"model.{n}": x for n, x in tensors.items()} | more)
    found = read_checkpoint(tmp_path / "x.ckpt", **HEADS)
    assert fingerprint(found.params) == fingerprint(params)
    left_out = 2 * len(tensors) + 4
    notes = " ".join(found.notes)
    assert f"ignored {left_out} values of its trainer, such as adam_m.model." in notes
    assert "removed the prefix 'model.'" in notes


# --------------------------------------------------------------------------- every tensor counts


@pytest.fixture
def changed(tmp_path):
    """Writes a huawei file with changes: a value of None removes a tensor."""

    def make(**changes):
        changes = {name.replace("__", "."): x for name, x in changes.items()}
        tensors = state()[0] | changes
        path = tmp_path / "x.pth"
        torch.write(path, {n: x for n, x in tensors.items() if x is not None})
        return path

    return make


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(norm__bias=None), r"does not fit this model: - norm.bias float32\[12\]"),
        (dict(blocks__1__proj_norm2__bias=None), r"- blocks.1.proj_norm2.bias float32\[12\]"),
        ({"module.cls_token": np.zeros(3, np.float32)}, r"\+ module.cls_token float32\[3\]"),
        (dict(norm__bias=np.zeros(9, np.float32)), r"! norm.bias float32\[9\], not float32\[12\]"),
        (dict(cls_token=None), "is not a complete huawei TNT: cls_token is missing"),
        (
            dict(cls_token=np.zeros(12, np.float32)),
            r"! cls_token float32\[12\], not float32\[1, 1, ",
        ),
        (dict(inner_pos=np.zeros((1, 15, 4), np.float32)), "has 15 words per sentence, which no"),
        (dict(head__bias=np.zeros(5, np.int64)), r"head.bias are quantized or integers: save den"),
        (dict(norm__weight=np.zeros(12, np.bool_)), "norm.weight are quantized"),
        ({"blocks.0.outer_mlp.fc1.weight": np.zeros((48, 12), np.int8)}, "fc1.weight are quanti"),
        (
            {"blocks.1.outer_attn.qk.weight": np.zeros((23, 12), np.float32)},
            r"qk.weight \[23, 12\] has the wrong shape or cannot be split into 2 parts",
        ),
        (
            {"blocks.0.inner_attn.qk.bias": np.zeros(8, np.float32)},
            r"\+ blocks.0.inner_attn.qk.bias float32\[8\]",
        ),
    ],
    ids=lambda x: "" if isinstance(x, str) else ",".join(x),
)
def test_mismatches_are_listed(changed, changes, message):
    with pytest.raises(InputError, match=message) as error:
        read_checkpoint(changed(**changes), **HEADS)
    assert len(str(error.value).splitlines()) == 1


def test_all_mismatches_are_printed(changed, capsys):
    names = [f"blocks.0.outer_{x}" for x in ("norm1.weight", "norm1.bias", "norm2.weight")]
    names += [f"blocks.1.outer_{x}" for x in ("norm1.weight", "norm1.bias", "norm2.weight")]
    path = changed(**dict.fromkeys(names), extra=np.zeros(3, np.float32))
    command = ["convert", "--check", str(path), "--inner-heads=2", "--outer-heads=3"]
    assert main(command) == main([*command, "--names"]) == 2
    printed, errors = capsys.readouterr()
    (first, again), details = errors.splitlines(), printed.splitlines()
    assert first == again
    assert first.startswith("error: ") and "and 2 more; with another head" in first
    assert [line.strip().split(" ")[:2] for line in details] == [["+", "extra"]] + [
        ["-", name] for name in sorted(names)
    ]


def test_other_dtypes_are_converted_and_reported(tmp_path):
    tensors, params = state(naming="timm")
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        for path in (tmp_path / "x.pth", tmp_path / "x.safetensors"):
            cast = {name: x.astype(dtype) for name, x in tensors.items()}
            if path.suffix == ".pth":
                torch.write(path, cast)
            else:
                safetensors.numpy.save_file(cast, path)
            found = read_checkpoint(path, **HEADS)
            assert any("to float32" in note for note in found.notes)
            expected = jax.tree.map(lambda x, t=dtype: x.astype(t).astype(np.float32), params)
            assert fingerprint(found.params) == fingerprint(expected)


def test_nonfinite_values_are_reported(changed):
    bias = np.zeros(12, np.float32)
    bias[3] = np.nan
    found = read_checkpoint(changed(norm__bias=bias), **HEADS)
    assert "warning: NaN or infinite values in norm/bias" in found.notes
    found = read_checkpoint(changed(norm__bias=np.full(12, 1e300)), **HEADS)  # float64
    assert "warning: NaN or infinite values in norm/bias" in found.notes


def test_nonzero_padding_of_pets_is_refused(tmp_path):
    path, heads = golden("mindspore_pets")
    tensors = dict(mindspore.read(path))
    tensors["fake"] = np.ones_like(tensors["fake"])
    mindspore.write(tmp_path / "x.ckpt", tensors)
    with pytest.raises(InputError, match="fake is not zero"):
        read_checkpoint(tmp_path / "x.ckpt", **heads)


def test_unknown_numbers_of_heads_are_requested(tmp_path):
    path, _ = golden("timm")
    with pytest.raises(InputError, match="no file stores the heads: set inner_heads= and outer"):
        read_checkpoint(path)
    with pytest.raises(InputError, match="no file stores the heads: set outer_heads="):
        read_checkpoint(path, inner_heads=2)
    with pytest.raises(InputError, match=r"timm.safetensors: width 4 is not divisible by 3"):
        read_checkpoint(path, inner_heads=3, outer_heads=2)
    with pytest.raises(InputError, match="is another network, not tnt_ti_patch16_224"):
        read_checkpoint(path, "tnt_ti_patch16_224", inner_heads=2, outer_heads=2)
    with pytest.raises(InputError, match="TNT has no field 'inner_head'"):
        read_checkpoint(path, inner_head=2, inner_heads=2, outer_heads=2)
    with pytest.raises(InputError, match="unknown model 'tnt_x'"):
        read_checkpoint(path, "tnt_x")
    params = random_params("official", outer_dim=192, inner_dim=12, depth=1)  # the widths of Ti
    safetensors.numpy.save_file(dict(mapping.export("timm", params)), tmp_path / "ti.safetensors")
    model = read_checkpoint(tmp_path / "ti.safetensors").network.model
    assert (model.outer_heads, model.inner_heads) == (3, 2)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "it is a git-lfs pointer; fetch"),
        (b"\n<!DOCTYPE html><html>", "it is a web page"),
        (b"\x80\x04\x95 paddle", "it is a pickle that torch.save did not write"),
        (b"x" * 257 + b"ustar" + b"x" * 300, "it is a tar archive"),
        (b"GIF89a", "neither torch's"),
        (b"\x89HDF\r\n\x1a\n", "it is an HDF5 file, as Keras writes"),
        (b"\x1f\x8b\x08", "it is compressed; unpack it with gunzip"),
        ((9).to_bytes(8, "little") + b'{"a": 1}', "is not a complete safetensors file"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_checkpoint(tmp_path / "x.pth")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("framework", FILES)
def test_truncated_files_are_refused(framework, tmp_path):
    path, heads = golden(framework)
    content = path.read_bytes()
    for size in (10, 100, len(content) // 2, len(content) - 1):
        (tmp_path / path.name).write_bytes(content[:size])
        with pytest.raises(InputError):
            read_checkpoint(tmp_path / path.name, **heads)
