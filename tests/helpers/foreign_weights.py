# SPDX-License-Identifier: Apache-2.0
"""Weights files of all frameworks, golden and made up, and the converter."""

import contextlib
import io
import json

import jax
import numpy as np
import safetensors.numpy

from tests.goldens.scripts.weights import FIELDS, GOLDEN
from tnt_flax.__main__ import main
from tnt_flax.models import TNT, VARIANTS
from tnt_flax.weights import identify, names
from tnt_flax.weights.formats import mindspore, torch

FILES = {  # name: (file, naming, variant)
    "huawei": ("huawei.pth.tar", "huawei", "official"),
    "timm": ("timm.safetensors", "timm", "official"),
    "timm_legacy": ("timm_legacy.safetensors", "timm", "legacy"),
    "mmpretrain": ("mmpretrain.pth", "mmpretrain", "legacy"),
    "mindspore": ("mindspore.ckpt", "mindspore", "mindspore"),
    "mindspore_pets": ("mindspore_pets.ckpt", "mindspore_pets", "mindspore_pets"),
}
HEADS = dict(inner_heads=2, outer_heads=3)
SMALL = dict(outer_dim=12, inner_dim=4, depth=2, num_classes=5) | HEADS


def random_params(variant, sentences=4, **fields):
    """Returns normally distributed parameters of a small TNT."""
    model = TNT(**SMALL | VARIANTS[variant] | fields)
    abstract = identify.SizedNetwork(model, sentences, 3).abstract_variables()["params"]
    rng = np.random.RandomState(0)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), abstract)


def golden(framework):
    heads = {key: FIELDS[framework][key] for key in ("inner_heads", "outer_heads")}
    return GOLDEN / FILES[framework][0], heads


def flags(heads):
    """Returns the converter's options for these numbers of heads."""
    return [f"--{key.replace('_', '-')}={value}" for key, value in heads.items()]


def raw_tensors(path):
    """The tensors in a file, by the readers of file formats alone."""
    if path.suffix == ".safetensors":
        return safetensors.numpy.load_file(path)
    if path.suffix == ".ckpt":
        return mindspore.read(path)
    content = torch.read(path)
    return content.get("state_dict", content)


def run(*arguments, code=0):
    """Returns the converter's JSON line, or its stderr for an exit code other than 0."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        found = main(["convert", *map(str, arguments)])
    assert found == code, err.getvalue()
    return json.loads(out.getvalue().splitlines()[-1]) if code == 0 else err.getvalue()


def state(variant="official", naming="huawei", seed=0, **fields):
    params = random_params(variant, **fields)
    params["cls_token"] = params["cls_token"] + np.float32(seed)
    return dict(names.export(naming, params)), params
