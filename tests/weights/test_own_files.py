# SPDX-License-Identifier: Apache-2.0
"""Workdirs and .safetensors files of ours."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy

from tests.helpers.foreign_weights import HEADS, SMALL, flags, golden, random_params, run
from tnt_flax.core.errors import InputError
from tnt_flax.core.trees import fingerprint
from tnt_flax.models import TNT, VARIANTS
from tnt_flax.runtime.checkpoints import Checkpoints
from tnt_flax.training.step import TrainState
from tnt_flax.weights import identify, names
from tnt_flax.weights.read import read_checkpoint
from tnt_flax.weights.write import save_weights

PARAMS = {
    "head": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)},
    "pos": jnp.ones(2),
}
INFO = {"config": {"model": {"name": "x"}}, "class_names": ["a", "b", "c"]}


def test_weights_are_stored_by_name_with_a_header(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, PARAMS, INFO)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]  # nothing temporary stays
    with safetensors.safe_open(path, framework="numpy") as file:
        assert sorted(file.keys()) == ["head/bias", "head/kernel", "pos"]
        np.testing.assert_array_equal(file.get_tensor("head/kernel"), [[0, 1, 2], [3, 4, 5]])
        assert list(file.metadata()) == ["tnt_flax"]
    save_weights(tmp_path / "again.safetensors", PARAMS, INFO)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of three checkpoints, of which the second is the best."""
    folder = tmp_path_factory.mktemp("run")
    model = TNT(**SMALL)
    params = random_params("official")
    tx = optax.sgd(0.1)
    state = TrainState.create({"params": params}, tx)
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
            step=np.int32(step), params=shifted, ema={"params": jax.tree.map(np.negative, shifted)}
        )
        checkpoints.save_async(jax.tree.map(np.asarray, state), step, {"top1": top1})
    checkpoints.close()
    save_weights(folder / "weights.safetensors", state.ema["params"], info)
    return folder, model, params, info


def test_workdirs_steps_and_files_are_read(workdir):
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


def test_a_workdir_converts_to_every_framework_with_its_network(workdir, tmp_path):
    folder, *_ = workdir
    source = run("--check", folder)
    assert source["num_classes"] == 5 and source["variant"] == "official"
    for name, framework in [("a.pth.tar", "huawei"), ("a.bin", "timm"), ("b.safetensors", "flax")]:
        result = run(folder, tmp_path / name, f"--to={framework}")
        assert (result["to"], result["same_function"]) == (framework, True)
        again = run("--check", tmp_path / name, *flags(HEADS))
        assert again["digest"] == source["digest"]
    assert read_checkpoint(tmp_path / "b.safetensors").class_names == tuple("abcde")


def test_preprocessing_is_stored_with_the_weights(workdir, tmp_path):
    path, heads = golden("mindspore")
    imagenet = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], crop_fraction=0.875)
    assert run("--check", path, *flags(heads)).items() >= imagenet.items()
    run(path, tmp_path / "x.safetensors", *flags(heads))
    assert run("--check", tmp_path / "x.safetensors").items() >= imagenet.items()
    assert run("--check", workdir[0])["crop_fraction"] == 0.9
    info = {"config": {"model": workdir[3]["config"]["model"], "data": {"crop_fraction": 0.8}}}
    save_weights(tmp_path / "y.safetensors", workdir[2], info)
    found = read_checkpoint(tmp_path / "y.safetensors")
    assert found.preprocessing == dict(
        mean=(0.5,) * 3, std=(0.5,) * 3, crop_fraction=0.8, interpolation="bicubic"
    )


def test_damaged_or_other_folders_are_refused(workdir, tmp_path):
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


def test_a_file_without_its_header_is_identified(workdir, tmp_path):
    folder, model, *_ = workdir
    tensors = safetensors.numpy.load_file(folder / "weights.safetensors")
    safetensors.numpy.save_file(tensors, tmp_path / "bare.safetensors")
    found = read_checkpoint(tmp_path / "bare.safetensors", **HEADS)
    assert found.network.model == model
    assert any("no config in its header" in note for note in found.notes)
    for variant in VARIANTS:
        params = random_params(variant)
        save_weights(tmp_path / "x.safetensors", params, {})
        found = read_checkpoint(tmp_path / "x.safetensors", **HEADS)
        assert identify.variant_of(found.network.model) == variant
        assert fingerprint(found.params) == fingerprint(params)


def test_layer_scale_is_written_and_read_and_never_dropped(tmp_path):
    model = TNT(**SMALL, layer_scale=True)
    params = random_params("official", layer_scale=True)
    path, bare = tmp_path / "x.safetensors", tmp_path / "bare.safetensors"
    fields = {k: v for k, v in SMALL.items() if k != "num_classes"} | {"layer_scale": True}
    described = {"name": "tnt_s_patch16_224", **fields}
    save_weights(path, params, {"config": {"model": described}})
    save_weights(bare, params, {})
    for found in (read_checkpoint(path), read_checkpoint(bare, **HEADS)):
        assert found.network.model == model
        assert fingerprint(found.params) == fingerprint(params)
    with pytest.raises(InputError, match="layer_scale: True -> False"):
        read_checkpoint(path, layer_scale=False)
    with pytest.raises(InputError, match="timm has no place for blocks/0/inner/layer_scale1"):
        dict(names.export("timm", params))
    save_weights(path, random_params("official"), {"config": {"model": described}})
    with pytest.raises(InputError, match="layer_scale"):
        read_checkpoint(path)
    save_weights(path, params, {"config": {"model": described | {"layer_scale": None}}})
    with pytest.raises(InputError, match="layer_scale"):
        read_checkpoint(path)


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
def test_wrong_headers_are_refused(workdir, tmp_path, changes, message):
    *_, params, info = workdir
    info = {"config": {"model": info["config"]["model"] | changes}}
    save_weights(tmp_path / "x.safetensors", params, info)
    with pytest.raises(InputError, match=message) as error:
        read_checkpoint(tmp_path / "x.safetensors")
    assert len(str(error.value).splitlines()) == 1


def test_empty_blocks_are_refused(tmp_path):
    tensors = {"cls_token": np.zeros((1, 1, 12)), "blocks_0/x": np.zeros((2**40, 0), np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="holds no known TNT"):
        read_checkpoint(tmp_path / "x.safetensors", **HEADS)
    for info in ({"config": 3}, {"config": {"model": {}}}, {"config": {"model": {"name": 3}}}):
        save_weights(tmp_path / "x.safetensors", random_params("official"), info)
        with pytest.raises(InputError, match="describes an impossible network"):
            read_checkpoint(tmp_path / "x.safetensors")


def test_nested_headers_are_refused(tmp_path):
    header = {"tnt_flax": "[" * 100_000}
    safetensors.numpy.save_file({"a": np.zeros(2)}, tmp_path / "x.safetensors", metadata=header)
    with pytest.raises(InputError, match="is not a complete safetensors file: .*RecursionError"):
        read_checkpoint(tmp_path / "x.safetensors")
