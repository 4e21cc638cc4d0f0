# SPDX-License-Identifier: Apache-2.0
"""Which parameters learn, and how fast: layer-wise learning rates, and freezing by name.

Parameters of equal blocks are stacked on a leading axis, so what holds of one block is one element
of a vector along it. Names here are per block, "blocks/3/inner/fc1/kernel", as everywhere that a
user meets them.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tnt_flax.core.errors import InputError
from tnt_flax.core.trees import named_leaves

STEM = ("word_embed", "word_pos", "proj", "cls_token", "sentence_pos")


def names_of(name: str, leaf: Any) -> list[str]:
    """The names of a parameter: one, or one per block where it is stacked."""
    stacked = re.fullmatch(r"(|.*/)blocks_(\d+)/(.*)", name)
    if not stacked:
        return [name]
    before, first, rest = stacked.groups()
    return [f"{before}blocks/{int(first) + i}/{rest}" for i in range(leaf.shape[0])]


def per_block(params: Any, value_of: Callable[[str], Any]) -> Any:
    """A tree like `params` of `value_of` each name: scalars, or [blocks, 1, ...] where stacked."""

    def values(name, leaf):
        names = names_of(name, leaf)
        found = np.array([value_of(n) for n in names])
        return found[0] if names == [name] else found.reshape(-1, *[1] * (leaf.ndim - 1))

    leaves = [values(name, leaf) for name, leaf in named_leaves(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


# --------------------------------------------------------------------------- layer-wise learning


def layer_of(name: str, depth: int) -> int:
    """0 for the stem, positions and class token, 1 to `depth` for the blocks, above for the head.

    The last norm goes with the last block. Source: `group_matcher` of timm's TNT. Raises InputError
    for a part that no TNT has.
    """
    part, _, rest = name.partition("/")
    if part == "blocks":
        return 1 + int(rest.partition("/")[0])
    layers = dict.fromkeys(STEM, 0) | {"norm": depth, "head": depth + 1}
    if part not in layers:
        raise InputError(f"optimizer.layer_decay is for TNT, which has no {name}: leave it at 1")
    return layers[part]


def layer_scales(params: Any, decay: float) -> Any:
    """Factors of the learning rate, as `per_block`: `decay` to the power of the layers above.

    The head has 1, and so has the last layer of a network without one. Source: timm's
    `param_groups_layer_decay`, whose factor also applies to the weight decay.
    """
    names = [n for name, leaf in named_leaves(params).items() for n in names_of(name, leaf)]
    depth = len({name.split("/")[1] for name in names if name.startswith("blocks/")})
    top = max(layer_of(name, depth) for name in names)
    return per_block(params, lambda name: np.float32(decay ** (top - layer_of(name, depth))))


def scale_by_layer(decay: float) -> optax.GradientTransformation:
    """Multiplies updates by `layer_scales`: the last link of a chain."""

    def update(updates, state, params=None):
        del params
        return jax.tree.map(jnp.multiply, updates, layer_scales(updates, decay)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


# -------------------------------------------------------------------------------------- freezing


def trained(params: Any, frozen: str) -> Any:
    """Which parameters learn, as `per_block`, of bool: those whose name `frozen` does not occur in.

    `frozen` is a regular expression: "^blocks/[0-3]/" the first four blocks, "^(?!head/)" all but
    the head.

    Raises:
        InputError: it is no regular expression, no name has it, or every name has it.
    """
    try:
        pattern = re.compile(frozen)
    except re.error as error:
        raise InputError(f"optimizer.freeze={frozen!r} is no regular expression: {error}") from None
    learns = per_block(params, lambda name: pattern.search(name) is None)
    flags = np.concatenate([np.ravel(x) for x in jax.tree.leaves(learns)])
    if flags.all() or not flags.any():
        which = "no" if flags.all() else "every"
        raise InputError(
            f"optimizer.freeze={frozen!r} matches {which} parameter: names are such as "
            "word_embed/conv/kernel, sentence_pos, blocks/3/inner/fc1/kernel, norm/scale, "
            "head/kernel"
        )
    return learns


def only_trained(tx: optax.GradientTransformation, frozen: str) -> optax.GradientTransformation:
    """`tx` without the moments of parameters that are frozen in every block.

    What it returns for the frozen ones is of no use: `keep_frozen` has to follow.
    """

    def mask(params):
        return jax.tree.map(lambda learns: bool(np.any(learns)), trained(params, frozen))

    return optax.masked(tx, mask)


def without_gradients(params: Any, learns: Any) -> Any:
    """`params`, of which only those that learn get a gradient; the others' is not computed."""
    return keep_frozen(params, jax.lax.stop_gradient(params), learns)


def keep_frozen(new: Any, old: Any, learns: Any) -> Any:
    """`new` where parameters learn, `old` to the bit where they do not."""

    def choose(x, y, learn):
        if np.all(learn) or not np.any(learn):  # no operation at all
            return x if np.all(learn) else y
        return jnp.where(learn, x, y)

    return jax.tree.map(choose, new, old, learns)
