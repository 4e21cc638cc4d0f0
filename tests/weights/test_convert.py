# SPDX-License-Identifier: Apache-2.0
"""Files as the real systems wrote them, read as our networks, written again, bit for bit."""

import argparse
import contextlib
import io
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy

from tests.goldens.scripts.weights import FIELDS, GOLDEN, images
from tests.helpers.torch_files import archive, global_name, opcodes, program, tensor
from tests.weights.test_names import SMALL, random_params
from tnt_flax.core.errors import InputError
from tnt_flax.core.trees import fingerprint
from tnt_flax.models import TNT, VARIANTS
from tnt_flax.runtime.checkpoints import Checkpoints
from tnt_flax.tools.convert import main
from tnt_flax.training.step import TrainState
from tnt_flax.weights import identify, write
from tnt_flax.weights import names as mapping
from tnt_flax.weights.formats import mindspore, torch
from tnt_flax.weights.read import read_checkpoint
from tnt_flax.weights.write import save_weights

FILES = {  # system: its file, and what it has to be recognised as
    "huawei": ("huawei.pth.tar", "huawei", "official"),
    "timm": ("timm.safetensors", "timm", "official"),
    "timm_legacy": ("timm_legacy.safetensors", "timm", "legacy"),
    "mmpretrain": ("mmpretrain.pth", "mmpretrain", "legacy"),
    "mindspore": ("mindspore.ckpt", "mindspore", "mindspore"),
    "mindspore_pets": ("mindspore_pets.ckpt", "mindspore_pets", "mindspore_pets"),
}
HEADS = dict(inner_heads=2, outer_heads=3)  # of SMALL


def golden(system):
    heads = {key: FIELDS[system][key] for key in ("inner_heads", "outer_heads")}
    return GOLDEN / FILES[system][0], heads


@pytest.mark.parametrize("system", FILES)
def test_logits_are_the_systems_own(system):
    path, heads = golden(system)
    found = read_checkpoint(path, **heads)
    _, naming, lineage = FILES[system]
    assert (found.naming, identify.variant_of(found.network.model)) == (naming, lineage)
    model = found.network.model
    assert {key: getattr(model, key) for key in FIELDS[system]} == FIELDS[system]
    with jax.default_matmul_precision("highest"):
        logits = model.apply({"params": found.params}, jnp.asarray(images()))
    with np.load(GOLDEN / "expected.npz") as expected:
        theirs = expected[f"{system} logits"]
    assert 0.2 < theirs.std() < 3
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=5e-6)


def raw_tensors(path):
    """What is in a file, by the readers of containers alone."""
    if path.suffix == ".safetensors":
        return safetensors.numpy.load_file(path)
    if path.suffix == ".ckpt":
        return mindspore.read(path)
    content = torch.read(path)
    return content.get("state_dict", content)


@pytest.mark.parametrize("system", FILES)
def test_there_and_back_is_the_identity(system, tmp_path):
    path, heads = golden(system)
    ours, again = tmp_path / "ours.safetensors", tmp_path / f"again{path.suffix}"
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in heads.items()]
    assert run(path, ours, *flags)["same_function"]
    to = FILES[system][1].removesuffix("_pets")
    assert run(ours, again, f"--to={to}")["same_function"]  # the header knows the heads
    before, after = raw_tensors(path), raw_tensors(again)
    assert sorted(before) == sorted(after)
    for name, x in before.items():
        assert x.dtype == after[name].dtype
        np.testing.assert_array_equal(x, after[name])
    assert run("--check", again, *flags)["digest"] == run("--check", ours)["digest"]


def run(*arguments, code=0):
    """The converter's JSON line; `code` is the exit code to expect. Its stderr if that is not 0."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        found = main([str(x) for x in arguments])
    assert found == code, err.getvalue()
    return json.loads(out.getvalue().splitlines()[-1]) if code == 0 else err.getvalue()


# ------------------------------------------------------------------- what trainers put around it


def state(lineage="official", naming="huawei", seed=0, **fields):
    params = random_params(lineage, **fields)
    params["cls_token"] = params["cls_token"] + np.float32(seed)
    return dict(mapping.export(naming, params)), params


@pytest.mark.parametrize("prefix", ["", "module.", "module.model."])
@pytest.mark.parametrize(
    "keys",
    [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("state_dict", "ema_state_dict")],
)
def test_trap_19_the_average_is_preferred_and_said(tmp_path, prefix, keys):
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
    assert "ignored steps" in notes and "ignored outer_tokens" in notes
    assert (f"removed the prefix {prefix!r}" in notes) == bool(prefix)

    found = read_checkpoint(path, weights="raw", **HEADS)
    assert found.weights == "raw" and fingerprint(found.params) == fingerprint(raw_params)

    torch.write(path, {keys[1]: ema})
    with pytest.raises(InputError, match=f"holds only EMA weights \\({keys[1]}\\)"):
        read_checkpoint(path, weights="raw", **HEADS)


def test_a_real_trainers_file_is_opened(tmp_path):
    """Optimizer state and argparse.Namespace included; its network is no TNT."""
    path = GOLDEN.parent / "torch" / "trainer.pth.tar"
    with pytest.raises(InputError, match="holds no known TNT"):
        read_checkpoint(path)
    assert argparse.Namespace.__module__ == "argparse"  # what the golden was written with


def torch_file(path, state, **objects):
    """Writes the tensors of `state`, and objects that torch.save would pickle beside them."""
    content = {"state_dict": dict(state)} | objects
    storages = {str(i): np.ascontiguousarray(x) for i, x in enumerate(state.values())}
    parts = [b"}(", opcodes("state_dict"), b"}("]
    for key, (name, x) in zip(storages, state.items(), strict=True):
        strides = tuple(n // x.itemsize for n in storages[key].strides)
        parts += [opcodes(name), tensor(0, x.shape, strides, count=x.size, key=key)]
    parts += [b"u", *(opcodes(key) + opcodes(content[key]) for key in objects), b"u"]
    path.write_bytes(archive(program(*parts), {k: x.tobytes() for k, x in storages.items()}))


def test_objects_beside_the_weights_are_ignored_and_listed(tmp_path):
    tensors, params = state(naming="timm")
    objects = dict(args=argparse.Namespace(out=pathlib.PurePosixPath("x")), seen={1}, last=[1j])
    torch_file(tmp_path / "x.pth", tensors, **objects)
    found = read_checkpoint(tmp_path / "x.pth", **HEADS)
    assert fingerprint(found.params) == fingerprint(params)
    names = "__builtin__.complex, __builtin__.set, pathlib.PurePosixPath"
    assert f"ignored objects of {names}" in found.notes

    torch_file(tmp_path / "x.pth", {}, model=io.StringIO)  # as a pickled network
    with pytest.raises(InputError, match=r"no set .* 'model' \(an object of _io.StringIO"):
        read_checkpoint(tmp_path / "x.pth", **HEADS)
    content = program(opcodes(pathlib.PurePosixPath("x")))
    (tmp_path / "x.pth").write_bytes(archive(content))
    with pytest.raises(InputError, match="an object of pathlib.PurePosixPath, .* its state_dict"):
        read_checkpoint(tmp_path / "x.pth", **HEADS)


def test_a_tensor_that_depends_on_an_unknown_object_is_an_error(tmp_path):
    rebuilt = global_name("torch._utils", "_rebuild_qtensor") + b"(" + tensor(0, (6,), (1,)) + b"tR"
    parts = [opcodes("w"), tensor(0, (6,), (1,)), opcodes("quantized"), rebuilt]
    for before, after in [(b"}(", b"u"), (b"}(" + opcodes("state_dict") + b"}(", b"uu")]:
        (tmp_path / "x.pth").write_bytes(archive(program(before, *parts, after)))
        with pytest.raises(InputError, match="'quantized' is not a tensor, but an object of torch"):
            read_checkpoint(tmp_path / "x.pth", **HEADS)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"epoch": 3}, "holds no set of named tensors, but 'epoch'"),
        ({}, "holds no set of named tensors, but nothing"),
        ([1, 2], "holds a list, not a dictionary of tensors"),
        ({"state_dict": {"a": 1}}, "holds no set of named tensors, but 'state_dict'"),
    ],
)
def test_no_set_of_tensors(tmp_path, content, message):
    torch.write(tmp_path / "x.pth", content)
    with pytest.raises(InputError, match=message):
        read_checkpoint(tmp_path / "x.pth")


def test_the_same_tensor_twice(tmp_path):
    tensors, _ = state()
    torch.write(tmp_path / "x.pth", tensors | {"module.cls_token": tensors["cls_token"]})
    with pytest.raises(InputError, match="holds cls_token twice"):
        read_checkpoint(tmp_path / "x.pth", **HEADS)


def test_a_mindspore_trainer_leaves_its_state(tmp_path):
    """As MindSpore's Model.train with AdamWeightDecay saves it."""
    tensors, params = state("mindspore", "mindspore")
    more = {f"{moment}.model.{n}": x for moment in ("adam_m", "adam_v") for n, x in tensors.items()}
    more |= {"global_step": np.int32([3]), "learning_rate": np.linspace(0, 1, 4, dtype=np.float32)}
    more |= {"epoch_num": np.array(3), "scale_sense": np.float32(1).reshape(1)}
    mindspore.write(tmp_path / "x.ckpt", {f"model.{n}": x for n, x in tensors.items()} | more)
    found = read_checkpoint(tmp_path / "x.ckpt", **HEADS)
    assert fingerprint(found.params) == fingerprint(params)
    left_out = 2 * len(tensors) + 4
    said = " ".join(found.notes)
    assert f"ignored {left_out} values of its trainer, such as adam_m.model." in said
    assert "removed the prefix 'model.'" in said


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
        (dict(extra=np.zeros(3, np.float32)), r"\+ extra float32\[3\]"),
        (dict(norm__bias=np.zeros(9, np.float32)), r"! norm.bias float32\[9\], not float32\[12\]"),
        (dict(cls_token=None), "is not a complete huawei TNT: cls_token is missing"),
        (dict(cls_token=np.zeros((12,), np.float32)), r"TNT: cls_token is \[12\]"),
        (dict(inner_pos=np.zeros((1, 15, 4), np.float32)), "has 15 words per sentence, which no"),
        (dict(head__bias=np.zeros(5, np.int64)), "head.bias of type int64: not a floating"),
        (
            {"blocks.1.outer_attn.qk.weight": np.zeros((23, 12), np.float32)},
            r"outer_attn.qk.weight \[23, 12\] cannot be split into 2 parts",
        ),
        (
            {"blocks.0.inner_attn.qk.bias": np.zeros(8, np.float32)},
            r"\+ blocks.0.inner_attn.qk.bias float32\[8\]",
        ),
    ],
    ids=lambda x: "" if isinstance(x, str) else ",".join(x),
)
def test_misfits_are_named(changed, changes, message):
    with pytest.raises(InputError, match=message) as error:
        read_checkpoint(changed(**changes), **HEADS)
    assert len(str(error.value).splitlines()) == 1


def test_a_long_diff_is_printed_whole(changed):
    names = [f"blocks.0.outer_{x}" for x in ("norm1.weight", "norm1.bias", "norm2.weight")]
    names += [f"blocks.1.outer_{x}" for x in ("norm1.weight", "norm1.bias", "norm2.weight")]
    path = changed(**dict.fromkeys(names), extra=np.zeros(3, np.float32))
    error = run("--check", path, "--inner-heads=2", "--outer-heads=3", code=2)
    first, *details = error.splitlines()
    assert first.startswith("error: ") and first.endswith("and 2 more")
    assert [line.strip().split(" ")[:2] for line in details] == [["+", "extra"]] + [
        ["-", name] for name in sorted(names)
    ]


def test_other_types_are_converted_and_said(tmp_path):
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


def test_values_that_are_not_finite_are_said(changed):
    bias = np.zeros(12, np.float32)
    bias[3] = np.nan
    found = read_checkpoint(changed(norm__bias=bias), **HEADS)
    assert "warning: NaN or infinite values in norm/bias" in found.notes
    found = read_checkpoint(changed(norm__bias=np.full(12, 1e300)), **HEADS)  # float64
    assert "warning: NaN or infinite values in norm/bias" in found.notes


def test_pets_zeros_must_be_zero(tmp_path):
    path, heads = golden("mindspore_pets")
    tensors = dict(mindspore.read(path))
    tensors["fake"] = np.ones_like(tensors["fake"])
    mindspore.write(tmp_path / "x.ckpt", tensors)
    with pytest.raises(InputError, match="fake is not zero"):
        read_checkpoint(tmp_path / "x.ckpt", **heads)


def test_heads_are_known_or_asked_for(tmp_path):
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
        (b"version https://git-lfs.github.com/spec/v1\noid", "it is a git-lfs pointer"),
        (b"\n<!DOCTYPE html><html>", "it is a web page"),
        (b"\x80\x04\x95 paddle", "it is a pickle that torch.save did not write"),
        (b"x" * 257 + b"ustar" + b"x" * 300, "it is a tar archive"),
        (b"GIF89a", "neither torch's"),
        ((9).to_bytes(8, "little") + b'{"a": 1}', "is not a complete safetensors file"),
    ],
)
def test_what_is_no_weights_file(tmp_path, content, message):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_checkpoint(tmp_path / "x.pth")
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(InputError, match="none.pth: No such file or directory"):
        read_checkpoint(tmp_path / "none.pth")


@pytest.mark.parametrize("system", FILES)
def test_truncated_files(system, tmp_path):
    path, heads = golden(system)
    content = path.read_bytes()
    for size in (10, 100, len(content) // 2, len(content) - 1):
        (tmp_path / path.name).write_bytes(content[:size])
        with pytest.raises(InputError):
            read_checkpoint(tmp_path / path.name, **heads)


# --------------------------------------------------------------------------------- our own files


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of three checkpoints, of which the second is the best."""
    folder = tmp_path_factory.mktemp("run")
    model = TNT(**SMALL)
    params = random_params("official")
    tx = optax.sgd(0.1)
    state = TrainState.create(params, tx)
    described = {"name": "tnt_s_patch16_224", "dtype": "bfloat16", "se": None, "drop_path": 0.1}
    fields = {k: v for k, v in SMALL.items() if k != "num_classes"}
    info = {
        "config": {"model": described | fields, "data": {"image_size": 32}},
        "class_names": list("abcde"),
    }
    checkpoints = Checkpoints(folder / "checkpoints", keep=3, info=info)
    for step, top1 in ((1, 0.1), (2, 0.9), (3, 0.5)):
        shifted = jax.tree.map(lambda x, s=step: x + s, params)
        state = state.replace(
            step=np.int32(step), params=shifted, ema=jax.tree.map(np.negative, shifted)
        )
        checkpoints.save_async(jax.tree.map(np.asarray, state), step, {"top1": top1})
    checkpoints.close()
    save_weights(folder / "weights.safetensors", state.ema, info)
    return folder, model, params, info


def test_a_workdir_a_step_and_a_file_of_ours(workdir):
    folder, model, params, info = workdir
    shifted = lambda step, sign=1: fingerprint(jax.tree.map(lambda x: sign * (x + step), params))
    for path, options, expected in [
        (folder, {}, shifted(2, -1)),
        (folder, dict(weights="raw"), shifted(2)),
        (folder, dict(checkpoint="last"), shifted(3, -1)),
        (folder / "checkpoints", dict(checkpoint="last", weights="raw"), shifted(3)),
        (folder / "checkpoints" / "1", {}, shifted(1, -1)),
        (folder / "weights.safetensors", {}, shifted(3, -1)),
    ]:
        found = read_checkpoint(path, **options)
        assert fingerprint(found.params) == expected, (path, options)
        assert found.network.model == model  # float32, whatever it was trained in
        assert found.class_names == tuple("abcde")
        assert found.network.grid == (2, 2)
    with pytest.raises(InputError, match=r"not what was asked for \(inner_heads: 2 -> 4\)"):
        read_checkpoint(folder, inner_heads=4)
    with pytest.raises(InputError, match="weights='best' is neither"):
        read_checkpoint(folder, weights="best")


def test_a_workdir_converts_to_every_system_that_has_its_network(workdir, tmp_path):
    folder, *_ = workdir
    source = run("--check", folder)
    assert source["num_classes"] == 5 and source["variant"] == "official"
    for name, system in [("a.pth.tar", "huawei"), ("a.bin", "timm"), ("b.safetensors", "flax")]:
        result = run(folder, tmp_path / name, f"--to={system}")
        assert (result["to"], result["same_function"]) == (system, True)
        again = run("--check", tmp_path / name, "--inner-heads=2", "--outer-heads=3")
        assert again["digest"] == source["digest"]
    assert read_checkpoint(tmp_path / "b.safetensors").class_names == tuple("abcde")


def test_preprocessing_travels_with_the_weights(workdir, tmp_path):
    path, heads = golden("mindspore")
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in heads.items()]
    imagenet = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], crop_fraction=0.875)
    assert run("--check", path, *flags).items() >= imagenet.items()
    run(path, tmp_path / "x.safetensors", *flags)
    assert run("--check", tmp_path / "x.safetensors").items() >= imagenet.items()
    assert run("--check", workdir[0])["crop_fraction"] == 0.9
    info = {"config": {"model": workdir[3]["config"]["model"], "data": {"crop_fraction": 0.8}}}
    save_weights(tmp_path / "y.safetensors", workdir[2], info)
    found = read_checkpoint(tmp_path / "y.safetensors")
    assert found.preprocessing == dict(mean=(0.5,) * 3, std=(0.5,) * 3, crop_fraction=0.8)


def test_damaged_or_foreign_folders(workdir, tmp_path):
    folder, *_ = workdir
    with pytest.raises(InputError, match="no intact checkpoint in"):
        read_checkpoint(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folder / "checkpoints" / "3", copy / "3")
    (copy / "3" / "info" / "metadata").write_text("{}")
    with pytest.raises(
        InputError, match="is damaged: info/metadata has changed|no intact checkpoint"
    ):
        read_checkpoint(copy)


def test_a_file_of_ours_without_its_header(workdir, tmp_path):
    folder, model, *_ = workdir
    tensors = safetensors.numpy.load_file(folder / "weights.safetensors")
    safetensors.numpy.save_file(tensors, tmp_path / "bare.safetensors")
    found = read_checkpoint(tmp_path / "bare.safetensors", **HEADS)
    assert found.network.model == model
    assert any("no config in its header" in note for note in found.notes)
    for lineage in VARIANTS:
        params = random_params(lineage)
        save_weights(tmp_path / "x.safetensors", params, {})
        found = read_checkpoint(tmp_path / "x.safetensors", **HEADS)
        assert identify.variant_of(found.network.model) == lineage
        assert fingerprint(found.params) == fingerprint(params)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(depth=10**12), "describes 1000000000000 blocks, but holds 2"),
        (dict(depth=3), "describes 3 blocks, but holds 2"),
        (dict(depth="many"), "describes (many blocks|an impossible network)"),
        (dict(outer_dim=10**12), "describes an impossible network|does not fit this model"),
        (dict(outer_dim=16), "width 16 is not divisible by 3 attention heads"),
        (dict(patch_size=0), "size 0x0 is not divisible by patch size 0"),
        (dict(name=["x"]), "describes an impossible network: Type"),
        (dict(name="tnt_x"), "x.safetensors: unknown model 'tnt_x'"),
        (dict(colour="red"), "x.safetensors: TNT has no field 'colour'"),
        (dict(gelu="relu"), "x.safetensors: gelu='relu' is none of"),
    ],
    ids=str,
)
def test_headers_of_ours_that_are_wrong(workdir, tmp_path, changes, message):
    *_, params, info = workdir
    info = {"config": {"model": info["config"]["model"] | changes}}
    save_weights(tmp_path / "x.safetensors", params, info)
    with pytest.raises(InputError, match=message) as error:
        read_checkpoint(tmp_path / "x.safetensors")
    assert len(str(error.value).splitlines()) == 1


def test_blocks_that_a_file_only_claims(tmp_path):
    tensors = {"cls_token": np.zeros((1, 1, 12)), "blocks_0/x": np.zeros((2**40, 0), np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="holds no known TNT"):
        read_checkpoint(tmp_path / "x.safetensors", **HEADS)
    for info in ({"config": 3}, {"config": {"model": {}}}, {"config": {"model": {"name": 3}}}):
        save_weights(tmp_path / "x.safetensors", {"cls_token": np.zeros(3, np.float32)}, info)
        with pytest.raises(InputError, match="describes an impossible network"):
            read_checkpoint(tmp_path / "x.safetensors")


# ----------------------------------------------------------------- from one system to another one


def without_biases(params):
    """The official network with the biases that the MindSpore form lacks set to zero."""
    wanted = mapping.unstacked(random_params("mindspore"))
    for name, x in mapping.unstacked(params).items():
        if name not in wanted:
            x[...] = 0
    return params


def test_to_mindspore_only_without_the_biases_that_it_lacks(tmp_path):
    source, destination = tmp_path / "x.pth", tmp_path / "x.ckpt"
    params = random_params("official")
    torch.write(source, dict(mapping.export("huawei", params)))
    flags = ["--inner-heads=2", "--outer-heads=3"]
    error = run(source, destination, *flags, code=2)
    assert "mindspore has no place for nonzero values of" in error
    assert "blocks_0/inner/attention/out/bias" in error and not destination.exists()

    params = without_biases(params)
    torch.write(source, dict(mapping.export("huawei", params)))
    result = run(source, destination, *flags)
    assert not result["same_function"]  # other GELU and epsilon, and it says so
    found = read_checkpoint(destination, **HEADS)
    assert identify.variant_of(found.network.model) == "mindspore"
    result = run(destination, tmp_path / "back.pth", "--to=huawei", *flags)
    assert not result["same_function"]
    back = read_checkpoint(tmp_path / "back.pth", **HEADS)
    assert fingerprint(back.params) == fingerprint(params)


@pytest.mark.parametrize(
    "lineage, system, message",
    [
        ("official", "mmpretrain", "is the official network, which mmpretrain does not have"),
        ("legacy", "huawei", "is the legacy network, which huawei does not have: it has the offi"),
        ("legacy", "mindspore", "it has the mindspore and the mindspore_pets"),
        ("mindspore_pets", "timm", "it has the official and the legacy"),
    ],
)
def test_networks_that_a_system_does_not_have(tmp_path, lineage, system, message):
    save_weights(tmp_path / "x.safetensors", random_params(lineage), {})
    name = "y" + write.SUFFIXES[system][0]
    flags = [f"--to={system}", "--inner-heads=2", "--outer-heads=3"]
    assert message in run(tmp_path / "x.safetensors", tmp_path / name, *flags, code=2)
    assert not (tmp_path / name).exists()


def test_what_a_system_cannot_be_told(tmp_path):
    flags = ["--to=timm", "--inner-heads=2", "--outer-heads=3"]
    for fields, message in [
        (dict(vanilla_blocks=(1,)), "timm cannot build blocks without words"),
        (dict(mlp_ratio=2.0), "timm cannot build mlp_ratio=2.0 for the words"),
        (dict(se=True), "timm has no place for blocks/0/outer/se"),
    ]:
        params = random_params("official", **fields)
        torch.write(tmp_path / "x.pth", dict(mapping.export("huawei", params)))
        error = run(tmp_path / "x.pth", tmp_path / "y.pth", *flags, code=2)
        assert message in error and not (tmp_path / "y.pth").exists()
        ours = run(tmp_path / "x.pth", tmp_path / "z.safetensors", *flags[1:])
        assert ours["same_function"]
        found = read_checkpoint(tmp_path / "z.safetensors")
        assert fingerprint(found.params) == fingerprint(params)
        (tmp_path / "z.safetensors").unlink()


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
        (["SRC", "none/DST.ckpt"], "there is no folder"),
        (["SRC", "DST.ckpt", "--heads=3"], "unknown option --heads"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_commands(arguments, message, tmp_path):
    path = tmp_path / "x.safetensors"
    shutil.copy(golden("timm")[0], path)
    names = {"SRC": str(path), "DST": str(tmp_path / "y")}
    arguments = [a.replace("SRC", names["SRC"]).replace("DST", names["DST"]) for a in arguments]
    error = run(*arguments, code=2)
    assert message in error and len(error.splitlines()) == 1


def test_the_table_names_every_tensor(capsys):
    path, heads = golden("huawei")
    assert (
        main(
            [
                "--check",
                str(path),
                "--names",
                *(f"--{k.replace('_', '-')}={v}" for k, v in heads.items()),
            ]
        )
        == 0
    )
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[:-1]]
    printed = {line[0]: line[1] for line in lines}
    assert set(raw_tensors(path)) <= set(printed)
    both = "blocks/1/outer/attention/query/kernel + blocks/1/outer/attention/key/kernel"
    assert printed["blocks.1.outer_attn.qk.weight"].startswith(both)
    assert printed["outer_tokens"] == "ignored: not used by the network"
    assert printed["parameters"] == f"{found_parameters(path):,}"


def found_parameters(path):
    tensors = raw_tensors(path)
    return sum(x.size for name, x in tensors.items() if name != "outer_tokens")


def test_against_timm_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    path, heads = golden("timm")
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in heads.items()]
    assert main(["--check", str(path), "--against=timm", *flags]) == 2
    assert "--against=timm needs torch and timm" in capsys.readouterr().err


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    path, heads = golden("huawei")
    found = read_checkpoint(path, **heads)
    target = write.to_framework(found, "timm")
    real = write.read_checkpoint

    def damaged(*arguments, **options):
        again = real(*arguments, **options)
        again.params["cls_token"] = again.params["cls_token"] + 1
        return again

    monkeypatch.setattr(write, "read_checkpoint", damaged)
    with pytest.raises(RuntimeError, match="did not read back as it was written"):
        write.write(tmp_path / "x.pth", "timm", target, found)
    assert list(tmp_path.iterdir()) == []
