# SPDX-License-Identifier: Apache-2.0
"""Runs equal blocks as one loop over their stacked parameters, so that XLA compiles one block.

Unrolled, XLA compiles every block. That takes longer, but a step moves fewer bytes: what the blocks
save for the backward pass is not copied to and from stacks.

The last block may run after the loop, with other arguments. For that the loop carries a float
counter, exact up to 2**24. XLA knows the value of an integer counter after the loop, and so copies
the last block's weights before the loop. For example, the last block of TNT-S, compiled for a CPU
by jax 0.10.2, reads the weights of fc1 by

    f32[384,1536] fusion(%fc1_kernel)            with an integer counter
    f32[384,1536] fusion(%fc1_kernel, %while)    with a float counter

The forward pass of 8 images then needs 33 MiB of temporaries with an integer and 26 MiB with a
float. A loop over slices of the parameters (`xs[:-1]`) would copy them all. `nn.scan` avoids
copies, but cannot run the last block separately.

The gradients of the parameters are an output of the backward loop, one slice per block. From a
loop that simply reads the stacks, JAX would derive one that adds each slice to a sum of stacks.
"""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tnt_flax.core.errors import InputError
from tnt_flax.models.kernels.platform import platform, row_major

SAVED = "saved"  # checkpoint_name of the arrays that `remat` saves instead of recomputing
SMALL = 2**13  # parameters of one block that `_pack` joins with others, at most
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
    unroll: bool = False,
    last: dict[str, Any] | None = None,
) -> tuple[Array, ...]:
    """Runs `length` blocks that differ in their parameters alone; returns the last block's tokens.

    Parameters, and what the blocks write to mutable collections in CAPTURED, are stored in
    `parent` under the name of `block`, stacked on a leading axis.

    Args:
        parent: the module whose method calls this function.
        block: an unbound module, `block(*tokens, rate, *args, train=train) -> tokens`.
        length: number of blocks.
        tokens: words and sentences, which every block updates, in the layout that it reads.
        rates: drop-path rate of each block; None disables drop path.
        args: further arguments of every block.
        train: gives every block a dropout key.
        remat, unroll: compute every block again in the backward pass; compile it separately.
        last: keyword arguments of the last block, which then may return other shapes, such as
            sentences (B, 1, D). Ignored while capturing: all blocks must write equal shapes.

    Raises:
        InputError: the weights have another number of blocks.
    """
    params = _stacked_params(parent, block, length, (*tokens, None, *args))
    if parent.is_initializing():  # `init` needs no outputs, and tracing them takes as long again
        return tokens
    has_key = train and parent.has_rng("dropout")
    keys = jax.random.split(parent.make_rng("dropout"), length) if has_key else None
    capture = [*filter(parent.is_mutable_collection, CAPTURED)]
    packed, unpack = _pack(params)
    constants, tangents = jax.lax.stop_gradient((packed, rates, keys)), _tangents(packed)

    def run_block(tokens, i, own_tangents, **options):
        own_packed, rate, key = _element(constants, i)
        own_params = unpack(jax.tree.map(_with_tangent, own_packed, own_tangents))
        rngs = None if key is None else {"dropout": key}
        options |= dict(train=train, rngs=rngs, mutable=capture or False)
        return block.apply({"params": own_params}, *_pin(tokens, unroll), rate, *args, **options)

    def body(carry, own_tangents):
        tokens, i = carry
        out = run_block(tokens, i, own_tangents)
        return ((out[0], i + 1), out[1]) if capture else ((out, i + 1), None)

    last_apart = last is not None and not capture
    carry = (tokens, jnp.float32(0))  # a float on purpose: see above
    in_loop = [x[: length - last_apart] for x in tangents]
    (tokens, i), captured = _loop(body, carry, in_loop, remat, unroll)
    for collection in capture:
        parent.put_variable(collection, block.name, captured[collection])
    return run_block(tokens, i, [x[-1] for x in tangents], **last) if last_apart else tokens


def _loop(body, carry, xs, remat, unroll):
    if remat:
        # Inside a loop, XLA cannot merge recomputation and original, so no barrier is needed.
        policy = jax.checkpoint_policies.save_only_these_names(SAVED)
        body = jax.checkpoint(body, prevent_cse=unroll, policy=policy)
    return jax.lax.scan(body, carry, xs, unroll=unroll or 1)


def _pin(tokens, unroll):
    """Gives tokens on GPUs the layout of what a loop carries.

    In an unrolled program, XLA stores the words of "gpu" with the batch innermost, where every
    LayerNorm writes its operands to memory, in float32.
    """
    return map(row_major, tokens) if unroll and platform() == "gpu" else tokens


def _element(tree, i):
    """Returns element `i` of every array; None is an empty tree and stays None."""
    pick = lambda x: jax.lax.dynamic_index_in_dim(x, i.astype(int), keepdims=False)
    return jax.tree.map(pick, tree)


def _pack(params):
    """Returns arrays [length, ...] and a function from elements of all to a block's parameters.

    On GPUs all small parameters are one array, so that one kernel reads all of a block and one
    writes their gradients, where XLA would run several for each.
    """
    leaves, treedef = jax.tree.flatten(params)
    size = lambda x: x.size // len(x)
    is_small = lambda x: x.dtype == jnp.float32 and size(x) <= SMALL and platform() == "gpu"
    small = [x for x in leaves if is_small(x)]
    if not small:
        return leaves, treedef.unflatten
    ends = [*itertools.accumulate(map(size, small))]

    def unpack(own):
        parts, others = iter(jnp.split(own[0], ends[:-1])), iter(own[1:])
        own = [next(parts).reshape(x.shape[1:]) if is_small(x) else next(others) for x in leaves]
        return treedef.unflatten(own)

    packed = jnp.concatenate([x.reshape(len(x), -1) for x in small], axis=1)
    return [packed, *[x for x in leaves if not is_small(x)]], unpack


@jax.custom_jvp
def _tangents(x):
    """Returns zeros whose tangents are those of `x`."""
    return jax.tree.map(jnp.zeros_like, x)


@jax.custom_jvp
def _with_tangent(x, carrier):
    """Returns `x` with the tangent of `carrier`."""
    del carrier
    return x


_tangents.defjvp(lambda primals, tangents: (_tangents(*primals), tangents[0]))
_with_tangent.defjvp(lambda primals, tangents: (primals[0], tangents[1]))


def _stacked_params(parent, block, length, args):
    def init(key):
        init_one = lambda key: block.init({"params": key}, *args, train=False)["params"]
        return jax.vmap(init_one)(jax.random.split(key, length))

    # Parameters of other shapes are refused in `block`, by their own names.
    known = parent.has_variable("params", block.name)
    params = parent.get_variable("params", block.name) if known else parent.param(block.name, init)
    found = {x.shape[0] for x in jax.tree.leaves(params)}
    if found != {length}:
        raise InputError(f"the weights' {block.name} has {sorted(found)} blocks, not {length}")
    return params
