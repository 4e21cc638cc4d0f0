# SPDX-License-Identifier: Apache-2.0
"""Writes tests/goldens/data/weights: tiny networks in their own file formats, and their outputs.

Each framework needs its own environment, so each has a subcommand. It rewrites its own files and
its own entries in the two shared files. SOURCE is the source code of the framework, downloaded
beforehand; timm and mmpretrain are imported from their installed packages.

    python tests/goldens/scripts/weights.py huawei SOURCE          (needs torch, timm)
        SOURCE: Efficient-AI-Backbones/tnt_pytorch/tnt.py
    python tests/goldens/scripts/weights.py timm                   (needs torch, timm)
    python tests/goldens/scripts/weights.py mmpretrain             (needs mmpretrain, mmcv-lite)
    python tests/goldens/scripts/weights.py mindspore SOURCE       (needs mindspore, scipy)
        SOURCE: mindspore-ai/models, the folder research/cv/TNT at commit 8ab6c075
    python tests/goldens/scripts/weights.py mindspore_pets SOURCE  (needs mindspore)
        SOURCE: mindspore-ai/mindspore, the folder model_zoo/research/cv/TNT at commit 50d7062f
    python tests/goldens/scripts/weights.py mindspore_files        (needs mindspore)
        writes tests/goldens/data/mindspore: files with every type, a CRC, slices, a cipher

MindSpore 2.10 was compiled against numpy 1: it computes only with numpy<2.

expected.npz  logits of `images()`; from torch's networks also the sentences after each block.
              In float64 and rounded; in float32 for MindSpore, whose networks fix that type.
names.json    the tensors of the networks in their full size, in the order of the state dict. The
              names with {i} stand for one block and repeat, all together, `depth` times.
"""

import argparse
import importlib.util
import itertools
import json
import pathlib
import re
import sys
import types
from collections.abc import Iterator

import numpy as np

from tests.helpers import timm_weights

GOLDEN = pathlib.Path(__file__).parents[1] / "data" / "weights"
IMAGE_SHAPE = (2, 32, 32, 3)
BLOCK = re.compile(r"(?<=blocks\.|layers\.)\d+(?=\.)")

# The fields of our TNT. The Pets network has four inner heads, always, and D = M * C; it stays
# small only with two by two words in a patch.
_TINY = dict(outer_dim=6, inner_dim=4, outer_heads=2, inner_heads=2, depth=2, num_classes=5)
_PETS = dict(_TINY, outer_dim=16, inner_heads=4, inner_stride=8)
FIELDS = {
    "huawei": _TINY,
    "timm": _TINY,
    "timm_legacy": _TINY,
    "mmpretrain": _TINY,
    "mindspore": _TINY,
    "mindspore_pets": _PETS,
}


# What is in the files of tests/goldens/data/mindspore.
KINDS = "Int8 Int16 Int32 Int64 UInt8 UInt16 UInt32 UInt64 Float16 Float32 Float64 BFloat16 Bool"
KINDS = KINDS.split()
APPENDED = {"epoch_num": 3, "rate": 0.5, "done": True, "note": "h\u00e9 \U0001f600"}


def sample(kind: str) -> np.ndarray:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    values = values if kind.startswith("U") else values - 3
    return values / 2 if "Float" in kind else values % 2 if kind == "Bool" else values


def images() -> np.ndarray:
    return np.random.RandomState(0).standard_normal(IMAGE_SHAPE).astype(np.float32)


def unfold_names(tensors: dict[str, list[int]], depth: int) -> Iterator[tuple[str, list[int]]]:
    """Every name and shape of a network in names.json, in order."""
    for repeats, group in itertools.groupby(tensors.items(), lambda item: "{i}" in item[0]):
        rows = list(group)
        for i in range(depth if repeats else 1):
            yield from ((name.replace("{i}", str(i)), shape) for name, shape in rows)


def fold_names(shapes: dict[str, list[int]]) -> dict:
    """The entry of names.json for one network. All its blocks have to be equal."""
    tensors, indices = {}, {0}
    for name, shape in shapes.items():
        indices |= {int(i) for i in BLOCK.findall(name)[:1]}
        name = BLOCK.sub("{i}", name, count=1)
        assert tensors.setdefault(name, shape) == shape, name
    folded = dict(depth=len(indices), tensors=tensors)
    assert list(unfold_names(tensors, len(indices))) == list(shapes.items())
    return folded


def random_tensor(name: str, shape: tuple) -> np.ndarray:
    return timm_weights.random_tensor(name.replace(".beta", ".bias"), shape, seed=0)


def record(framework: str, results: dict[str, np.ndarray], networks: dict[str, dict]) -> None:
    """Replaces a framework's entries of expected.npz and names.json."""
    path = GOLDEN / "expected.npz"
    expected = dict(np.load(path)) if path.exists() else {}
    expected = {k: v for k, v in expected.items() if k.split()[0] != framework}
    expected |= {f"{framework} {k}": np.asarray(v, np.float32) for k, v in results.items()}
    np.savez_compressed(path, **dict(sorted(expected.items())))
    path = GOLDEN / "names.json"
    names = json.loads(path.read_text()) if path.exists() else {}
    names[framework] = {name: fold_names(shapes) for name, shapes in networks.items()}
    text = json.dumps(dict(sorted(names.items())), indent=0)
    path.write_text(re.sub(r"\[[^\]]*\]", lambda shape: re.sub(r"\s", "", shape[0]), text) + "\n")


def load_source(path: pathlib.Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("upstream_tnt", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where timm's register_model looks for it
    spec.loader.exec_module(module)
    return module


# torch: huawei, timm, mmpretrain


def torch_shapes(model) -> dict[str, list[int]]:
    state = model.state_dict()
    assert {str(x.dtype) for x in state.values()} == {"torch.float32"}
    return {name: list(x.shape) for name, x in state.items()}


def randomize_torch(model) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:  # huawei's outer_tokens stay zero
                parameter.copy_(torch.from_numpy(random_tensor(name, tuple(parameter.shape))))


def torch_results(model, blocks) -> dict[str, np.ndarray]:
    """Logits and the sentences after each block, in float64. Leaves the model in float32."""
    import copy

    import torch

    model = copy.deepcopy(model).double().eval()
    outputs, results = [], {}
    for block in blocks(model):
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        x = torch.from_numpy(images().transpose(0, 3, 1, 2)).double()
        results["logits"] = model(x).numpy()
    return results | {f"sentences_{i}": x.numpy() for i, (_, x) in enumerate(outputs)}


def huawei(source: pathlib.Path) -> None:
    import torch

    upstream = load_source(source)
    model = upstream.TNT(
        img_size=IMAGE_SHAPE[1],
        outer_dim=_TINY["outer_dim"],
        inner_dim=_TINY["inner_dim"],
        outer_num_heads=_TINY["outer_heads"],
        inner_num_heads=_TINY["inner_heads"],
        depth=_TINY["depth"],
        num_classes=_TINY["num_classes"],
    )
    randomize_torch(model)
    torch.save(model.state_dict(), GOLDEN / "huawei.pth.tar")
    full = ("tnt_s_patch16_224", "tnt_b_patch16_224")
    networks = {name: torch_shapes(getattr(upstream, name)()) for name in full}
    record("huawei", torch_results(model, lambda m: m.blocks), networks)


def timm() -> None:
    import safetensors.torch
    import timm
    from timm.models.tnt import TNT

    full = {
        "timm": ("tnt_s_patch16_224", "tnt_b_patch16_224"),
        "timm_legacy": ("tnt_s_legacy_patch16_224",),
    }
    for framework, names in full.items():
        model = TNT(
            img_size=IMAGE_SHAPE[1],
            embed_dim=_TINY["outer_dim"],
            inner_dim=_TINY["inner_dim"],
            num_heads_outer=_TINY["outer_heads"],
            num_heads_inner=_TINY["inner_heads"],
            depth=_TINY["depth"],
            num_classes=_TINY["num_classes"],
            legacy=framework == "timm_legacy",
        )
        randomize_torch(model)
        path = GOLDEN / f"{framework}.safetensors"
        safetensors.torch.save_file(model.state_dict(), path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors lets only the owner read
        networks = {name: torch_shapes(timm.create_model(name)) for name in names}
        record(framework, torch_results(model, lambda m: m.blocks), networks)


def mmpretrain() -> None:
    import mmengine
    from mmengine.runner.checkpoint import save_checkpoint
    from mmpretrain.registry import MODELS
    from mmpretrain.utils import register_all_modules

    register_all_modules()

    def build(num_classes, width, **backbone):
        head = dict(type="LinearClsHead", num_classes=num_classes, in_channels=width)
        backbone = dict(type="TNT", **backbone)
        return MODELS.build(dict(type="ImageClassifier", backbone=backbone, neck=None, head=head))

    arch = dict(
        embed_dims_outer=_TINY["outer_dim"],
        embed_dims_inner=_TINY["inner_dim"],
        num_layers=_TINY["depth"],
        num_heads_outer=_TINY["outer_heads"],
        num_heads_inner=_TINY["inner_heads"],
    )
    model = build(_TINY["num_classes"], arch["embed_dims_outer"], arch=arch, img_size=32)
    randomize_torch(model)
    meta = dict(epoch=0, iter=0, mmengine_version=mmengine.__version__)
    save_checkpoint(dict(meta=meta, state_dict=model.state_dict()), str(GOLDEN / "mmpretrain.pth"))
    networks = {"tnt-small-p16": torch_shapes(build(1000, 384, arch="s"))}
    record("mmpretrain", torch_results(model, lambda m: m.backbone.layers), networks)


# MindSpore


def mindspore_shapes(net) -> dict[str, list[int]]:
    parameters = list(net.parameters_and_names())
    assert all(name == p.name and str(p.dtype) == "Float32" for name, p in parameters)
    return {name: list(p.shape) for name, p in parameters}


def record_mindspore(framework: str, net, networks: dict) -> None:
    import mindspore

    for name, parameter in net.parameters_and_names():
        if parameter.requires_grad:  # the Pets network's `fake` and `patch_embed` stay zero
            parameter.set_data(mindspore.Tensor(random_tensor(name, parameter.shape)))
    path = GOLDEN / f"{framework}.ckpt"
    mindspore.save_checkpoint(net, str(path))
    path.chmod(0o644)  # MindSpore leaves it read-only
    net.set_train(False)
    logits = net(mindspore.Tensor(images().transpose(0, 3, 1, 2).copy()))
    record(framework, {"logits": logits.asnumpy()}, networks)


def mindspore(source: pathlib.Path) -> None:
    import mindspore

    mindspore.set_context(mode=mindspore.PYNATIVE_MODE, device_target="CPU")
    sys.path.insert(0, str(source))
    upstream = importlib.import_module("src.models.tnt.tnt")
    net = upstream.TNT(
        img_size=IMAGE_SHAPE[1],
        outer_dim=_TINY["outer_dim"],
        inner_dim=_TINY["inner_dim"],
        outer_num_heads=_TINY["outer_heads"],
        inner_num_heads=_TINY["inner_heads"],
        depth=_TINY["depth"],
        num_classes=_TINY["num_classes"],
    )
    args = types.SimpleNamespace(drop_path_rate=0.1, drop_out=0.0, num_classes=1000)
    full = ("tnt_s_patch16_224", "tnt_b_patch16_224")
    networks = {name: mindspore_shapes(getattr(upstream, name)(args)) for name in full}
    record_mindspore("mindspore", net, networks)


def mindspore_pets(source: pathlib.Path) -> None:
    import mindspore

    mindspore.set_context(mode=mindspore.PYNATIVE_MODE, device_target="CPU")
    sys.path.insert(0, str(source))
    upstream = importlib.import_module("src.tnt")
    net = upstream.TNT(
        img_size=IMAGE_SHAPE[1],
        patch_size=16,
        num_channels=3,
        embedding_dim=_PETS["outer_dim"],
        num_heads=_PETS["outer_heads"],
        num_layers=_PETS["depth"],
        hidden_dim=4 * _PETS["outer_dim"],
        num_class=_PETS["num_classes"],
        stride=_PETS["inner_stride"],
    )
    record_mindspore("mindspore_pets", net, {"tnt_b": mindspore_shapes(upstream.tnt_b(37))})


def mindspore_files() -> None:
    import mindspore
    from mindspore.train import serialization

    folder = GOLDEN.parent / "mindspore"
    folder.mkdir(exist_ok=True)

    def save(name, tensors, **options):
        tensors = [{"name": k, "data": mindspore.Tensor(*x)} for k, x in tensors.items()]
        mindspore.save_checkpoint(tensors, str(folder / name), **options)
        (folder / name).chmod(0o644)

    types = {kind: (sample(kind), getattr(mindspore, kind.lower())) for kind in KINDS}
    save("types.ckpt", types, append_dict=APPENDED)
    save("crc.ckpt", types, append_dict=APPENDED, crc_check=True)
    save("encrypted.ckpt", types, enc_key=b"0123456789abcdef")
    serialization.SLICE_SIZE = 1  # in kilobytes
    save("sliced.ckpt", {"a": (np.arange(600, dtype=np.float32).reshape(200, 3),)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="framework", required=True)
    for command in (huawei, timm, mmpretrain, mindspore, mindspore_pets, mindspore_files):
        sub = commands.add_parser(command.__name__)
        if command.__code__.co_argcount:
            sub.add_argument("source", type=pathlib.Path)
        sub.set_defaults(command=command)
    arguments = vars(parser.parse_args())
    GOLDEN.mkdir(exist_ok=True)
    arguments.pop("framework")
    arguments.pop("command")(**arguments)


if __name__ == "__main__":
    main()
