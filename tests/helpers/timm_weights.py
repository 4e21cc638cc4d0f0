# SPDX-License-Identifier: Apache-2.0
"""timm's TNT weights for the tests: random ones by name, and their place in our tree."""

import math
import zlib

import numpy as np

STEM = {
    "pixel_embed.proj": "word_embed/conv",
    "norm1_proj": "proj/norm1",
    "proj": "proj/dense",
    "norm2_proj": "proj/norm2",
    "norm": "norm",
    "head": "head",
}
BLOCK = {
    "norm_in": "inner/norm1",
    "attn_in.v": "inner/attention/value",
    "attn_in.proj": "inner/attention/out",
    "norm_mlp_in": "inner/norm2",
    "mlp_in.fc1": "inner/fc1",
    "mlp_in.fc2": "inner/fc2",
    "norm1_proj": "proj/norm1",
    "proj": "proj/dense",
    "norm2_proj": "proj/norm2",
    "norm_out": "outer/norm1",
    "attn_out.v": "outer/attention/value",
    "attn_out.proj": "outer/attention/out",
    "norm_mlp": "outer/norm2",
    "mlp.fc1": "outer/fc1",
    "mlp.fc2": "outer/fc2",
}


def random_state(shapes: dict[str, tuple], seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor random, norms and biases included; each depends on `seed` and its name alone.

    The head's weights are of variance 1 / inputs, so that logits have a spread around 1.
    """
    return {name: random_tensor(name, shape, seed) for name, shape in shapes.items()}


def random_tensor(name: str, shape: tuple, seed: int) -> np.ndarray:
    # RandomState, because numpy promises that its numbers never change.
    values = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode())).standard_normal(shape)
    if name.endswith(("_pos", "_token", ".bias")):
        values *= 0.2
    elif len(shape) == 1:  # the scale of a norm
        values = 1 + 0.2 * values
    else:
        values /= math.sqrt(math.prod(shape[1:]))
    return values.astype(np.float32)


def to_flax(state: dict[str, np.ndarray]) -> dict:
    """Our parameters from timm's state dict (official or legacy); an unknown name is a KeyError."""
    tree, blocks = {}, {}
    for name, value in state.items():
        if name == "pixel_pos":  # (1, C, 4, 4) to (1, M, C)
            tree["word_pos"] = value.reshape(*value.shape[:2], -1).swapaxes(1, 2)
        elif name in ("patch_pos", "cls_token"):
            tree[{"patch_pos": "sentence_pos"}.get(name, name)] = value
        elif name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            insert(blocks.setdefault(int(index), {}), BLOCK, rest, value)
        else:
            insert(tree, STEM, name, value)
    tree["blocks_0"] = stack([blocks[i] for i in range(len(blocks))])
    return tree


def insert(tree: dict, table: dict[str, str], name: str, value: np.ndarray) -> None:
    module, leaf = name.rsplit(".", 1)
    if leaf == "weight":
        leaf = {1: "scale", 2: "kernel", 4: "kernel"}[value.ndim]
    elif leaf != "bias":
        raise KeyError(name)
    if module in ("attn_in.qk", "attn_out.qk"):  # rows: all heads' queries, then all heads' keys
        attention = "inner/attention" if module == "attn_in.qk" else "outer/attention"
        parts = zip((f"{attention}/query", f"{attention}/key"), np.split(value, 2), strict=True)
    else:
        parts = [(table[module], value)]
    for path, part in parts:
        node = tree
        for key in path.split("/"):
            node = node.setdefault(key, {})
        # (out, in, height, width) to (height, width, in, out), and a matrix to its transpose
        node[leaf] = part.transpose(2, 3, 1, 0) if part.ndim == 4 else part.T


def stack(trees: list) -> dict | np.ndarray:
    if isinstance(trees[0], dict):
        assert all(tree.keys() == trees[0].keys() for tree in trees)
        return {key: stack([tree[key] for tree in trees]) for key in trees[0]}
    return np.stack(trees)
