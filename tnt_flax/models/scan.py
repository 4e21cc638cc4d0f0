# SPDX-License-Identifier: Apache-2.0
"""Runs equal blocks as one loop over their stacked parameters, so that XLA compiles one block.

The loop carries a float counter. With an integer, XLA proves which block follows the loop and
copies every stacked array; a float32, exact up to 2**24, hides that. In TNT-S the copies are, for
blocks 0 to 10 in the loop and block 11 after it,

    f32[11,384,1536] slice(f32[12,384,1536] params), slice={[0:11], [0:384], [0:1536]}

They also appear where a loop reads the parameters as `xs[:-1]`. `nn.scan` avoids them, but cannot
run the last block apart.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tnt_flax.core.errors import InputError

CAPTURED = ("intermediates", "maps")  # collections that blocks write, stacked here


def scan_blocks(
    parent: nn.Module,
    block: nn.Module,
    length: int,
    tokens: tuple[Array, ...],
    rates: Float[Array, " length"] | None,
    *args: Any,
    train: bool,
    remat: bool,
    last: dict[str, Any] | None = None,
    init_keys: Any = None,
) -> tuple[Array, ...]:
    """Runs `length` blocks that differ in their parameters alone; returns the last block's tokens.

    Parameters, and what the blocks write to mutable collections in CAPTURED, are stored in
    `parent` under the name of `block`, stacked on a leading axis.

    Args:
        parent: the module whose method calls this function.
        block: an unbound module, `block(*tokens, rate, *args, train=train) -> tokens`.
        length: number of blocks.
        tokens: words (B, N, M, C) and sentences (B, T, D), which every block updates.
        rates: drop-path rate of each block; None disables drop path.
        args: further arguments of every block.
        train: gives every block a dropout key.
        remat: computes every block again in the backward pass.
        last: keyword arguments of the last block, which then may return other shapes, such as
            sentences (B, 1, D). Ignored while capturing: all blocks must write equal shapes.
        init_keys: one key per block for initial values; by default split from the parent's.

    Raises:
        InputError: the weights have another number of blocks.
    """
    params = _stacked_params(parent, block, length, (*tokens, None, *args), init_keys)
    has_key = train and parent.has_rng("dropout")
    keys = jax.random.split(parent.make_rng("dropout"), length) if has_key else None
    capture = [] if parent.is_initializing() else [*filter(parent.is_mutable_collection, CAPTURED)]

    def run(tokens, i, **options):
        own_params, rate, key = _pick((params, rates, keys), i)
        rngs = None if key is None else {"dropout": key}
        options |= dict(train=train, rngs=rngs, mutable=capture or False)
        return block.apply({"params": own_params}, *tokens, rate, *args, **options)

    def body(carry, _):
        tokens, i = carry
        out = run(tokens, i)
        tokens, captured = out if capture else (out, None)
        return (tokens, i + 1), captured

    if remat:
        # Inside scan, XLA cannot merge recomputation and original, so no barrier is needed.
        body = jax.checkpoint(body, prevent_cse=False)
    apart = last is not None and not capture
    carry = (tokens, jnp.float32(0))  # a float on purpose: see above
    (tokens, i), captured = jax.lax.scan(body, carry, length=length - 1 if apart else length)
    for collection in capture:
        parent.put_variable(collection, block.name, captured[collection])
    return run(tokens, i, **last) if apart else tokens


def _pick(tree, i):
    """Returns element `i` of every array; None is an empty tree and stays None."""
    pick = lambda x: jax.lax.dynamic_index_in_dim(x, i.astype(int), keepdims=False)
    return jax.tree.map(pick, tree)


def _stacked_params(parent, block, length, args, init_keys):
    def init(key):
        keys = jax.random.split(key, length) if init_keys is None else init_keys
        init_one = lambda key: block.init({"params": key}, *args, train=False)["params"]
        return jax.vmap(init_one)(keys)

    # Parameters of other shapes are refused in `block`, by their own names.
    known = parent.has_variable("params", block.name)
    params = parent.get_variable("params", block.name) if known else parent.param(block.name, init)
    found = {x.shape[0] for x in jax.tree.leaves(params)}
    if found != {length}:
        raise InputError(f"the weights' {block.name} has {sorted(found)} blocks, not {length}")
    return params
