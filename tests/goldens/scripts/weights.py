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

expected.npz  logits of `images()`. In float64 and rounded; in float32 for MindSpore, whose networks
              fix that type.
names.json    the tensors of the networks in their full size. Names with {i} repeat `depth` times.
"""

import argparse
import importlib
import json
import pathlib
import re
import sys
import types

import numpy as np

from tests.helpers import timm_weights

GOLDEN = pathlib.Path(__file__).parents[1] / "data" / "weights"
IMAGE_SHAPE = (2, 32, 32, 3)
BLOCK = re.compile(r"(?<=blocks\.|layers\.)\d+(?=\.)")

# The fields of our TNT. The Pets network always has four inner heads and D = M * C; it stays small
# only with two by two words in a patch.
_TINY = dict(outer_dim=6, inner_dim=4, outer_heads=2, inner_heads=2, depth=2, num_classes=5)
_PETS = dict(_TINY, outer_dim=16, inner_heads=4, inner_stride=8)
FIELDS = dict.fromkeys(("huawei", "timm", "timm_legacy", "mmpretrain", "mindspore"), _TINY)
FIELDS["mindspore_pets"] = _PETS
# The arguments of huawei's network, also in MindSpore.
UPSTREAM = dict(img_size=32, outer_dim=6, inner_dim=4, depth=2, num_classes=5)
UPSTREAM |= dict(outer_num_heads=2, inner_num_heads=2)

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


def fold_names(shapes: dict[str, list[int]]) -> dict:
    """The entry of names.json for one network. All its blocks have to be equal."""
    tensors, indices = {}, {0}
    for name, shape in shapes.items():
        indices |= {int(i) for i in BLOCK.findall(name)[:1]}
        name = BLOCK.sub("{i}", name, count=1)
        assert tensors.setdefault(name, shape) == shape, name
    return dict(depth=len(indices), tensors=tensors)


def random_tensor(name: str, shape: tuple) -> np.ndarray:
    return timm_weights.random_tensor(name.replace(".beta", ".bias"), shape, seed=0)


def record(framework: str, logits: np.ndarray, networks: dict[str, dict]) -> None:
    """Replaces a framework's entries of expected.npz and names.json."""
    path = GOLDEN / "expected.npz"
    expected = dict(np.load(path)) | {f"{framework} logits": logits.astype(np.float32)}
    np.savez_compressed(path, **dict(sorted(expected.items())))
    path = GOLDEN / "names.json"
    names = json.loads(path.read_text())
    names[framework] = {name: fold_names(shapes) for name, shapes in networks.items()}
    text = json.dumps(dict(sorted(names.items())), indent=0)
    path.write_text(re.sub(r"\[[^\]]*\]", lambda shape: re.sub(r"\s", "", shape[0]), text) + "\n")


def load_source(folder: pathlib.Path, module: str) -> types.ModuleType:
    sys.path.insert(0, str(folder))
    return importlib.import_module(module)


def randomize_torch(model) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:  # huawei's outer_tokens stay zero
                parameter.copy_(torch.from_numpy(random_tensor(name, tuple(parameter.shape))))


def record_torch(framework: str, model, networks: dict) -> None:
    """Records logits in float64, and the names of `networks`, by name."""
    import torch

    shapes = {
        name: {tensor: list(x.shape) for tensor, x in network.state_dict().items()}
        for name, network in networks.items()
    }
    x = torch.from_numpy(images().transpose(0, 3, 1, 2)).double()
    record(framework, model.double().eval()(x).detach().numpy(), shapes)


def huawei(source: pathlib.Path) -> None:
    import torch

    upstream = load_source(source.parent, source.stem)
    model = upstream.TNT(**UPSTREAM)
    randomize_torch(model)
    torch.save(model.state_dict(), GOLDEN / "huawei.pth.tar")
    full = ("tnt_s_patch16_224", "tnt_b_patch16_224")
    record_torch("huawei", model, {name: getattr(upstream, name)() for name in full})


def timm() -> None:
    import safetensors.torch
    import timm
    from timm.models.tnt import TNT

    full = {
        "timm": ("tnt_s_patch16_224", "tnt_b_patch16_224"),
        "timm_legacy": ("tnt_s_legacy_patch16_224",),
    }
    sizes = dict(img_size=32, embed_dim=6, inner_dim=4, depth=2, num_classes=5)
    for framework, names in full.items():
        legacy = framework == "timm_legacy"
        model = TNT(num_heads_outer=2, num_heads_inner=2, legacy=legacy, **sizes)
        randomize_torch(model)
        path = GOLDEN / f"{framework}.safetensors"
        safetensors.torch.save_file(model.state_dict(), path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors lets only the owner read
        record_torch(framework, model, {name: timm.create_model(name) for name in names})


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

    arch = dict(embed_dims_outer=6, embed_dims_inner=4, num_layers=2)
    arch |= dict(num_heads_outer=2, num_heads_inner=2)
    model = build(5, 6, arch=arch, img_size=32)
    randomize_torch(model)
    meta = dict(epoch=0, iter=0, mmengine_version=mmengine.__version__)
    save_checkpoint(dict(meta=meta, state_dict=model.state_dict()), str(GOLDEN / "mmpretrain.pth"))
    record_torch("mmpretrain", model, {"tnt-small-p16": build(1000, 384, arch="s")})


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
    shapes = {
        name: {tensor: list(p.shape) for tensor, p in network.parameters_and_names()}
        for name, network in networks.items()
    }
    record(framework, logits.asnumpy(), shapes)


def mindspore(source: pathlib.Path) -> None:
    import mindspore

    mindspore.set_context(mode=mindspore.PYNATIVE_MODE, device_target="CPU")
    upstream = load_source(source, "src.models.tnt.tnt")
    args = types.SimpleNamespace(drop_path_rate=0.1, drop_out=0.0, num_classes=1000)
    full = ("tnt_s_patch16_224", "tnt_b_patch16_224")
    networks = {name: getattr(upstream, name)(args) for name in full}
    record_mindspore("mindspore", upstream.TNT(**UPSTREAM), networks)


def mindspore_pets(source: pathlib.Path) -> None:
    import mindspore

    mindspore.set_context(mode=mindspore.PYNATIVE_MODE, device_target="CPU")
    upstream = load_source(source, "src.tnt")
    sizes = dict(img_size=32, patch_size=16, num_channels=3, embedding_dim=16, hidden_dim=64)
    net = upstream.TNT(num_heads=2, num_layers=2, num_class=5, stride=8, **sizes)
    record_mindspore("mindspore_pets", net, {"tnt_b": upstream.tnt_b(37)})


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
    commands = (huawei, timm, mmpretrain, mindspore, mindspore_pets, mindspore_files)
    commands = {command.__name__: command for command in commands}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("framework", choices=commands)
    parser.add_argument("source", type=pathlib.Path, nargs="*")
    arguments = parser.parse_args()
    GOLDEN.mkdir(exist_ok=True)
    commands[arguments.framework](*arguments.source)


if __name__ == "__main__":
    main()
