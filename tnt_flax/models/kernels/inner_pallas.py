# SPDX-License-Identifier: Apache-2.0
"""The inner transformer block as one fused TPU kernel, differentiable, on one device or a mesh.

`block` has the signature of `lanes.block` and is equal to it. The kernels are in `inner_kernels`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from tnt_flax.models.kernels import inner_kernels as kernels
from tnt_flax.models.kernels.platform import devices, free_axes, platform, why_not_shared

INTERPRET = False  # True, in tests, runs the kernels without a TPU
SIZES = ((12, 2), (24, 4), (40, 4))  # published word widths and heads

Lanes = Float[Array, "C M P"]
Weights = tuple[Array, Array, Array, Array]  # of query-key-value, out, fc1, fc2: [inputs + 1, ...]


def why_not(width: int, heads: int, words: int, hidden: int, images: int) -> str:
    """Returns why the kernels cannot run a block of these sizes here; "" if they can."""
    if platform() != "tpu" and not INTERPRET:
        return f"it is for TPUs, not for {platform()}"
    if (width, heads) not in SIZES:
        return f"words of width {width} with {heads} heads are none of {SIZES}"
    if words != kernels.WORDS:
        return f"a sentence has {words} words, not {kernels.WORDS}"
    if hidden != 4 * width:
        return f"the MLP has {hidden / width:g} times the width, not 4"
    if INTERPRET and jax.sharding.get_abstract_mesh().empty:
        return ""
    return why_not_shared(images)


def block(
    x: Lanes,
    weights: Weights,
    scales: Float[Array, "2 P"] | None,
    *,
    heads: int,
    norm_eps: float,
    gelu: str,
) -> Lanes:
    """See `lanes.block`. Under an ambient mesh (`jax.set_mesh`) every device runs its sentences.

    The gradients of the weights are then summed over the devices; nothing else is communicated.
    """
    return _block((heads, norm_eps, gelu), x, weights, scales)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(options, x, weights, scales):
    return _on_every_device(functools.partial(_forward, options), "ss", "s", x, scales, weights)


def _block_forward(options, x, weights, scales):
    return _block(options, x, weights, scales), (x, weights, scales)


def _block_backward(options, residuals, g):
    x, weights, scales = residuals
    backward = functools.partial(_backward, options)
    dx, gradients = _on_every_device(backward, "sss", "sw", x, g, scales, weights)
    return dx, gradients, jax.tree.map(jnp.zeros_like, scales)


_block.defvjp(_block_forward, _block_backward)


def _on_every_device(function, inputs, outputs, *args):
    """Calls `function(*args, axes)`; "s" marks what is split by sentences, on its last axis.

    The last of `args`, the weights, is whole everywhere.
    """
    axes = free_axes()
    if devices(axes) == 1:
        return function(*args, ())

    def spec(kind, x):
        split = PartitionSpec(*[None] * (x.ndim - 1), axes)
        return split if kind == "s" else PartitionSpec()

    in_specs = tuple(
        jax.tree.map(functools.partial(spec, kind), arg)
        for kind, arg in zip(inputs + "w", args, strict=True)
    )
    words = PartitionSpec(None, None, axes)
    out_specs = words if outputs == "s" else (words, PartitionSpec())
    run = functools.partial(function, axes=axes)
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)


def _pack(weight, words, dtype, bias=True):
    """[inputs + 1, outputs] to the transposed matrix that acts on rows (word, channel).

    Its columns are followed by the bias, and by zeros for the other rows of ones.
    """
    inputs, outputs = weight.shape[0] - 1, weight.shape[1]
    blocks = jnp.einsum("io,vw->vowi", weight[:-1], jnp.eye(words))
    blocks = blocks.reshape(words * outputs, words * inputs)
    if not bias:
        return blocks.astype(dtype)
    column = jnp.tile(weight[-1], words)[:, None]
    column = jnp.pad(column, ((0, 0), (0, kernels.ONES - 1)))
    return jnp.concatenate([blocks, column], axis=1).astype(dtype)


def _unpack(gradient, words, weight):
    """The gradient of `weight` from that of its packed form."""
    inputs, outputs = weight.shape[0] - 1, weight.shape[1]
    blocks = gradient[:, : words * inputs].reshape(words, outputs, words, inputs)
    kernel = jnp.einsum("wowi->io", blocks)
    if gradient.shape[1] == words * inputs:
        return kernel
    bias = gradient[:, words * inputs].reshape(words, outputs).sum(axis=0)
    return jnp.concatenate([kernel, bias[None]])


def _packed(weights, words, dtype):
    return [_pack(w, words, dtype, bias=w is not weights[3]) for w in weights]


def _row_scratch(width, *multiples):
    """Float32 scratch for rows (word, channel): that many times the words' channels."""
    rows = kernels.WORDS * width
    return [pltpu.VMEM((multiple * rows, kernels.TILE), jnp.float32) for multiple in multiples]


def _turns(size):
    return pltpu.VMEM((2, 2, size, 2 * kernels.HALF, kernels.TILE), jnp.float32)


def _mlp_scratch(width, dtype):
    words = kernels.words_per_product(width)
    return pltpu.VMEM((4 * width * words, kernels.WORDS // words * kernels.TILE), dtype)


def _tile(*leading):
    return pl.BlockSpec((*leading, kernels.TILE), lambda i: (0,) * len(leading) + (i,))


def _whole(x):
    return pl.BlockSpec(x.shape, lambda i: (0,) * x.ndim)


def _forward(options, x, scales, weights, axes):
    heads, norm_eps, gelu = options
    width, num_words, sentences = x.shape
    words = kernels.words_per_product(width)
    bias = jnp.broadcast_to(weights[3][-1][:, None, None], (width, 1, kernels.TILE))
    constants = [*_packed(weights, words, x.dtype), bias]
    tile, turns = _tile(width, num_words), _turns(width // heads)
    return pl.pallas_call(
        functools.partial(
            kernels.forward_kernel,
            heads=heads,
            norm_eps=norm_eps,
            gelu_kind=gelu,
            drops=scales is not None,
        ),
        grid=(pl.cdiv(sentences, kernels.TILE),),
        in_specs=[tile, *([] if scales is None else [_tile(2)]), *map(_whole, constants)],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[
            *_row_scratch(width, 1, 3, 1),
            turns,
            _mlp_scratch(width, jnp.float32),
            _mlp_scratch(width, x.dtype),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=INTERPRET,
        name="tnt_inner_forward",
    )(x, *([] if scales is None else [scales]), *constants)


def _backward(options, x, g, scales, weights, axes):
    heads, norm_eps, gelu = options
    width, num_words, sentences = x.shape
    words = kernels.words_per_product(width)
    constants = _packed(weights, words, x.dtype)
    tile, turns = _tile(width, num_words), _turns(width // heads)
    statistics = pltpu.VMEM((heads, 2, kernels.HALF, kernels.TILE), jnp.float32)
    dx, *gradients = pl.pallas_call(
        functools.partial(
            kernels.backward_kernel,
            heads=heads,
            norm_eps=norm_eps,
            gelu_kind=gelu,
            drops=scales is not None,
            sentences=sentences,
        ),
        grid=(pl.cdiv(sentences, kernels.TILE),),
        in_specs=[tile, tile, *([] if scales is None else [_tile(2)]), *map(_whole, constants)],
        out_specs=[tile, *map(_whole, constants)],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            *(jax.ShapeDtypeStruct(w.shape, jnp.float32) for w in constants),
        ],
        scratch_shapes=[
            *_row_scratch(width, 1, 3, 1),
            turns,
            _mlp_scratch(width, x.dtype),
            _mlp_scratch(width, x.dtype),
            *_row_scratch(width, 1, 1, 3),
            statistics,
            statistics,
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=INTERPRET,
        name="tnt_inner_backward",
    )(x, g, *([] if scales is None else [scales]), *constants)
    gradients = [_unpack(d, words, w) for d, w in zip(gradients, weights, strict=True)]
    update = g.astype(jnp.float32) if scales is None else g.astype(jnp.float32) * scales[1:][None]
    gradients[3] = jnp.concatenate([gradients[3], update.sum(axis=(1, 2))[None]])
    return dx, jax.lax.psum(tuple(gradients), axes) if axes else tuple(gradients)
