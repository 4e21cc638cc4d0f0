# SPDX-License-Identifier: Apache-2.0
"""State dicts as trainers and wrappers write them: nested, prefixed, with more beside the network.

Kinds reported by users of timm, Lightning, mmpretrain, DeepSpeed, FSDP, accelerate and HF Trainer.
"""

import argparse
import collections
import json
import os
import pathlib
import zipfile

import numpy as np
import pytest
import safetensors.numpy

import tnt_flax
from tests.helpers import small_network
from tests.helpers.foreign_weights import HEADS, flags, run, state
from tests.helpers.torch_files import archive, global_name, opcodes, program, tensor
from tnt_flax.core.errors import InputError
from tnt_flax.core.trees import fingerprint
from tnt_flax.weights.formats import torch
from tnt_flax.weights.read import read_checkpoint

TENSORS, PARAMS = state(naming="timm")
BODY = {name: x for name, x in TENSORS.items() if not name.startswith("head.")}
KERNEL, BIAS = TENSORS["head.weight"], TENSORS["head.bias"]


def prefixed(prefix, tensors=TENSORS):
    return {prefix + name: x for name, x in tensors.items()}


def linear(name, outputs, inputs=12):
    weights = {
        "weight": np.ones((outputs, inputs), np.float32),
        "bias": np.ones(outputs, np.float32),
    }
    return {f"{name}.{leaf}": x for leaf, x in weights.items()}


def save(tmp_path, content, suffix=".pth"):
    path = tmp_path / f"x{suffix}"
    if suffix == ".safetensors":
        safetensors.numpy.save_file(content, path)
    else:
        torch.write(path, content)
    return path


def check_whole(found):
    assert fingerprint(found.params) == fingerprint(PARAMS)
    return " | ".join(found.notes)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["module._orig_mod.", "timm_model.", "0."])
def test_any_prefix_is_removed(tmp_path, prefix, suffix):
    found = read_checkpoint(save(tmp_path, prefixed(prefix), suffix), **HEADS)
    assert f"removed the prefix {prefix!r}" in check_whole(found)
    assert found.renamed[f"{prefix}cls_token"] == "cls_token"


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module"])
def test_wrappers_of_single_blocks_are_removed(tmp_path, wrapper):
    wrapped = {n.replace("blocks.1.", f"blocks.1.{wrapper}."): x for n, x in TENSORS.items()}
    notes = check_whole(read_checkpoint(save(tmp_path, prefixed("module.", wrapped)), **HEADS))
    assert "removed the prefix 'module.'" in notes
    assert f"removed wrappers in names such as module.blocks.1.{wrapper}." in notes


@pytest.mark.parametrize("key", ["model_state_dict", "weights", "student"])
def test_a_nested_network_is_taken(tmp_path, key):
    content = {"epoch": 3, "optimizer": {"state": [{"exp_avg": KERNEL}]}, key: prefixed("module.")}
    found = read_checkpoint(save(tmp_path, content), **HEADS)
    assert f"took {key}; there is no EMA" in check_whole(found) and found.weights == "raw"
    check_whole(read_checkpoint(save(tmp_path, [{"lr": 1.0}, {"checkpoint": content}]), **HEADS))


def test_one_of_several_networks_is_chosen(tmp_path):
    other = state("official", "timm", seed=1)[0]
    for content, prefix in [
        ({"student": TENSORS, "teacher": other}, ""),
        (prefixed("module.student.") | prefixed("module.teacher.", other), "module."),
    ]:
        path = save(tmp_path, content)
        with pytest.raises(
            InputError, match=rf"several networks: {prefix}student \(73 tensors\), "
        ):
            read_checkpoint(path, **HEADS)
        assert "took " in check_whole(read_checkpoint(path, state=f"{prefix}student", **HEADS))
        model, variables = tnt_flax.load(path, state=f"{prefix}teacher", **HEADS)
        assert fingerprint(variables["params"]) != fingerprint(PARAMS)
        with pytest.raises(InputError, match="has no state 'techer'.*, but .*student"):
            read_checkpoint(path, state="techer", **HEADS)
    printed = run("--check", path, "--state=module.student", *flags(HEADS))
    assert "removed the prefix 'module.student.'" in printed["notes"]


def test_a_network_with_a_copy_of_itself_in_one_state_dict(tmp_path):
    """As in the checkpoints of ema_pytorch, and of modules that keep an EMA of themselves."""
    counters = {"initted": np.array(True), "step": np.array([7])}
    other = prefixed("online_model.module.", state("official", "timm", seed=1)[0])
    path = save(tmp_path, other | prefixed("ema_model.module.") | counters)
    notes = check_whole(read_checkpoint(path, **HEADS))
    assert "took the EMA weights, ema_model.module; weights='raw' takes online_mod" in notes
    assert "ignored initted, step (a counter)" in notes
    path = save(tmp_path, TENSORS | prefixed("ema.", other))
    notes = check_whole(read_checkpoint(path, weights="raw", **HEADS))
    assert "took the others; ema.online_model.module is there too" in notes


# ------------------------------------------------------------------------------ other heads


@pytest.mark.parametrize("layer", ["head.1", "fc"])
def test_a_lone_linear_layer_is_the_head(tmp_path, layer):
    found = read_checkpoint(save(tmp_path, BODY | linear(layer, 7)), **HEADS)
    assert found.network.model.num_classes == 7 and f"took {layer} as the head" in found.notes
    np.testing.assert_array_equal(found.params["head"]["kernel"], np.ones((12, 7)))
    assert found.renamed[f"{layer}.weight"] == "head/kernel"
    beside = prefixed("backbone.", BODY) | linear(layer, 7) | {"criterion.weight": np.ones(7)}
    found = read_checkpoint(save(tmp_path, beside), **HEADS)
    assert "left out criterion.weight (not of the network)" in found.notes


@pytest.mark.parametrize(
    "head",
    [
        linear("head.0", 12) | linear("head.2", 7),
        linear("head", 7, inputs=24),
        {"fc.weight": np.ones((7, 12), np.float32)},
        {"head.weight": np.ones((7, 12), np.float32)},
        linear("fc", 7) | linear("fc2", 7),
        {"head.weight_g": np.ones((7, 1), np.float32)},
    ],
    ids=lambda head: ",".join(head),
)
def test_other_heads_are_left_out_on_request(tmp_path, head):
    tensors = BODY | head | {"loss.weight": np.ones(7, np.float32)}
    path = save(tmp_path, prefixed("model.", tensors))
    with pytest.raises(InputError, match="does not fit this model: .*num_classes=N"):
        read_checkpoint(path, **HEADS)
    found = read_checkpoint(path, other_head=True, **HEADS)
    left_out = {name for name, text in found.renamed.items() if text.startswith("left out")}
    assert left_out == {f"model.{name}" for name in [*head, "loss.weight"]}
    assert found.network.model.num_classes == 0
    body = {name: x for name, x in PARAMS.items() if name != "head"}
    assert fingerprint(found.params) == fingerprint(body)


def test_load_replaces_other_heads(tmp_path):
    path = save(tmp_path, BODY | linear("head.0", 12) | linear("head.2", 7))
    model, variables = tnt_flax.load(path, num_classes=3, **HEADS)
    assert model.num_classes == 3 and variables["params"]["head"]["kernel"].shape == (12, 3)
    path = save(tmp_path, BODY | linear("head.1", 3))
    _, variables = tnt_flax.load(path, num_classes=3, **HEADS)
    np.testing.assert_array_equal(variables["params"]["head"]["kernel"], np.ones((12, 3)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"blocks.0.gamma": np.ones(12, np.float32)}, r"\+ blocks.0.gamma"),
        ({"norm.bias": None}, "- norm.bias"),
        ({"norm.bias": np.ones(9, np.float32)}, r"! norm.bias float32\[9\], not"),
    ],
    ids=lambda x: "" if isinstance(x, str) else ",".join(x),
)
def test_the_body_is_strict_with_another_head(tmp_path, change, message):
    tensors = {name: x for name, x in (TENSORS | change).items() if x is not None}
    with pytest.raises(InputError, match=message):
        tnt_flax.load(save(tmp_path, tensors), num_classes=0, **HEADS)


def test_tensors_outside_of_a_complete_network_are_left_out(tmp_path):
    """As in Lightning's checkpoints of a module with a loss and metrics."""
    beside = {"criterion.pos_weight": np.array(3.2), "val_acc.confmat": np.ones((5, 5))}
    content = {"state_dict": prefixed("model.") | beside, "hyper_parameters": {"lr": 0.1}}
    notes = check_whole(read_checkpoint(save(tmp_path, content, ".ckpt"), **HEADS))
    assert "left out criterion.pos_weight, val_acc.confmat (not of the network)" in notes


def test_objects_beside_a_network_are_ignored_and_listed(tmp_path):
    """As in mmpretrain's checkpoints and those of scripts that store their options."""
    path = save(tmp_path, {"state_dict": prefixed("module.")})
    objects = {"args": argparse.Namespace(output=pathlib.PurePosixPath("x"))}
    objects |= {"message_hub": [collections.Counter(loss=1), {1, 2}]}
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            if name.endswith("/data.pkl"):  # ends with the dictionary
                items = (opcodes(key) + opcodes(x) + b"s" for key, x in objects.items())
                data = data.removesuffix(b".") + b"".join(items) + b"."
            archive.writestr(name, data)
    notes = check_whole(read_checkpoint(path, **HEADS))
    assert "ignored objects of __builtin__.set, argparse.Namespace, collections.Counter" in notes


def test_values_among_the_tensors_are_ignored(tmp_path):
    beside = {"epoch": 3, "best": 0.5, "optimizer": {"param_groups": []}, "n": np.array(3)}
    notes = check_whole(read_checkpoint(save(tmp_path, TENSORS | beside), **HEADS))
    assert "ignored epoch, best, optimizer (not a tensor)" in notes
    assert "ignored n (a counter)" in notes


# ------------------------------------------------------------------------ shards and folders


def test_weights_in_several_files_are_joined(tmp_path):
    for number in range(2):
        part = dict(list(TENSORS.items())[number::2])
        safetensors.numpy.save_file(part, tmp_path / f"part-{number}.safetensors")
    files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(TENSORS)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for path in (index, tmp_path):
        found = read_checkpoint(path, **HEADS)
        assert check_whole(found) == "" and found.file_format == "2 files of safetensors"
    for change, message in [
        ({"more": "part-0.safetensors"}, "lists more, which its files do not have"),
        ({"norm.bias": "../x"}, "lists '../x', which is not a file beside it"),
        ({"norm.bias": "part-2.safetensors"}, "cannot read .*part-2.safetensors: No such file"),
        ({"norm.bias": index.name}, "lists 'model.safetensors.index.json', which is not a file"),
        ({"norm.bias": "a\0b"}, r"lists 'a\\x00b', which is not a file beside it"),
        (dict.fromkeys(TENSORS, 3), "lists 3, which is not a file beside it"),
    ]:
        index.write_text(json.dumps({"weight_map": files | change}))
        with pytest.raises(InputError, match=message):
            read_checkpoint(tmp_path, **HEADS)
    for text, message in [
        ("[]", "is not an index of weights"),
        ("[" * 100_000, "is not an index of weights: RecursionError"),
        ('{"weight_map": {}}', "lists no weights"),
    ]:
        index.write_text(text)
        with pytest.raises(InputError, match=message):
            read_checkpoint(tmp_path, **HEADS)


def test_the_weights_in_a_folder_are_found(tmp_path):
    """As accelerate, HF Trainer and Lightning leave them."""
    for name in ("optimizer.bin", "scheduler.pt", "training_args.bin", "random_states_0.pkl"):
        (tmp_path / name).write_bytes(b"not weights")
    path = save(tmp_path, TENSORS)
    found = read_checkpoint(tmp_path, **HEADS)
    check_whole(found)
    assert found.path == str(path)
    (tmp_path / "y.PTH").write_bytes(b"")
    with pytest.raises(InputError, match="has several weights files: give one of x.pth, y.PTH"):
        read_checkpoint(tmp_path)
    run_folder = tmp_path / "lightning_logs"
    (run_folder / "version_0" / "checkpoints").mkdir(parents=True)
    path = save(run_folder / "version_0" / "checkpoints", TENSORS, ".ckpt")
    with pytest.raises(InputError, match=f"no weights file: give {path}$"):
        read_checkpoint(run_folder)
    (run_folder / ".metadata").write_bytes(b"")
    with pytest.raises(InputError, match="is a distributed checkpoint of torch: join it by python"):
        read_checkpoint(run_folder)


def test_shards_in_a_folder_need_their_index(tmp_path):
    for number in range(2):
        part = dict(list(TENSORS.items())[number::2])
        safetensors.numpy.save_file(part, tmp_path / f"tnt-0000{number + 1}-of-00002.safetensors")
    with pytest.raises(InputError, match="in several files without their index: put NAME.index"):
        read_checkpoint(tmp_path, **HEADS)
    files = {name: f"tnt-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(TENSORS)}
    (tmp_path / "tnt.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    check_whole(read_checkpoint(tmp_path, **HEADS))


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "weights")
    with pytest.raises(InputError, match="is a pipe or device: save the weights to a file"):
        read_checkpoint(tmp_path / "weights")


def test_adapters_are_refused(tmp_path):
    adapter = {"base_model.model.blocks.0.qk.lora_A.weight": KERNEL}
    for content in (adapter, prefixed("base_model.model.") | adapter):
        with pytest.raises(InputError, match="holds a LoRA adapter: merge it"):
            read_checkpoint(save(tmp_path, content), **HEADS)


def test_tensors_without_values_are_ignored(tmp_path):
    """As torch stores `nn.Linear(width, 0)`, the head of num_classes=0 in some trainers."""
    empty = {"head.weight": KERNEL[:0], "head.bias": BIAS[:0], "blocks.0.cache": KERNEL[:0]}
    found = read_checkpoint(save(tmp_path, BODY | empty), **HEADS)
    assert found.network.model.num_classes == 0 and "(without values)" in " ".join(found.notes)


def test_convert_leaves_out_a_head_of_layers(tmp_path):
    source, ours = tmp_path / "x.pth", tmp_path / "ours.safetensors"
    torch.write(source, BODY | linear("head.0", 8) | linear("head.2", 5, 8))
    assert run(source, ours, "--no-head", *flags(HEADS))["num_classes"] == 0
    assert read_checkpoint(ours).network.model.num_classes == 0
    error = run(source, tmp_path / "y.safetensors", *flags(HEADS), code=2)
    assert "head.0.weight" in error and "--no-head" in error


def test_shards_without_values_are_explained(tmp_path):
    empty = {name: np.zeros(0, np.float32) for name in TENSORS}
    with pytest.raises(InputError, match="ZeRO-3: join the shards by the zero_to_fp32.py"):
        read_checkpoint(save(tmp_path, {"module": empty}), **HEADS)


def test_a_tensor_that_depends_on_an_unknown_object_is_an_error(tmp_path):
    """As the DTensors of FSDP. Beside the network such an object is ignored."""
    entries = [opcodes(name) + tensor(0, (6,), (1,)) for name in BODY]
    unknown = global_name("torch._utils", "_rebuild_qtensor") + b")R"
    for name, message in [
        ("head.bias", "'head.bias' is not a tensor, but an object of torch._utils._rebuild_qt"),
        ("other.bias", "does not fit this model|is not a complete timm TNT|cannot be split"),
    ]:
        content = program(b"}(", *entries, opcodes(name), unknown, b"u")
        (tmp_path / "x.pth").write_bytes(archive(content))
        with pytest.raises(InputError, match=message):
            read_checkpoint(tmp_path / "x.pth", **HEADS)


def test_the_head_of_a_pyramid_is_wider_than_its_first_sentences(tmp_path):
    found = read_checkpoint(small_network.save(tmp_path, "ptnt_s_patch16_256", size=64))
    assert found.network.model.num_classes == 10
