# SPDX-License-Identifier: Apache-2.0
"""Attention among sentences as one TPU kernel that keeps the N x N attention weights on the chip.

Computes what `layers.Attention` computes between its projections, up to float32 rounding. XLA
writes the weights of all heads to memory and reads them several times, forward and backward. The
kernel holds those of one head at a time, and its backward pass computes them again. A row of
weights fits on the chip, so none of FlashAttention's running sums is needed.

Heads narrower than the 128 lanes of a TPU share them and are never moved: a product over all lanes,
with one operand zero outside of a head, is the product over that head at the same cost. On other
platforms the kernel is interpreted, which is slow and only for tests.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from tnt_flax.models.kernels.platform import devices, free_axes, platform, why_not_shared

Heads = Float[Array, "B N heads d"]

LANES = 128
LONGEST = 640  # tokens for which the weights of a head fit on the chip: images up to 400 pixels
SHORT = 256  # up to so many tokens, a program computes all heads of IMAGES images
IMAGES = 2


def why_not(batch: int, length: int, width: int) -> str:
    """Returns why TPUs cannot run `attend` for [batch, length, heads, width]; "" if they can."""
    if length > LONGEST:
        return f"{length} tokens are more than {LONGEST}"
    if LANES % width and width % LANES:
        return f"heads of width {width} do not fit {LANES} lanes"
    return why_not_shared(batch)


def attend(query: Heads, key: Heads, value: Heads, scale: float) -> Heads:
    """Returns softmax(scale query key^T) value for every head.

    Under a mesh (`jax.set_mesh`) each device runs its share of the batch, sharded over all axes
    that no enclosing `jax.shard_map` has made manual.
    """
    flat = (*query.shape[:2], -1)
    run = functools.partial(_attend, width=query.shape[-1], scale=scale)
    if devices(free_axes()) > 1:
        split = PartitionSpec(free_axes())
        run = jax.shard_map(run, in_specs=split, out_specs=split, check_vma=False)
    return run(query.reshape(flat), key.reshape(flat), value.reshape(flat)).reshape(query.shape)


@functools.partial(jax.custom_vjp, nondiff_argnames=("width", "scale"))
def _attend(query, key, value, width, scale):
    return _call(_forward, 1, width, scale, query, key, value)[0]


def _attend_forward(query, key, value, width, scale):
    return _attend(query, key, value, width, scale), (query, key, value)


def _attend_backward(width, scale, inputs, gradient):
    return tuple(_call(_backward, 3, width, scale, *inputs, gradient))


_attend.defvjp(_attend_forward, _attend_backward)


def _call(kernel, outputs, width, scale, *inputs):
    """Runs `kernel` over blocks of arrays [B, N, heads * d]."""
    batch, length, channels = inputs[0].shape
    images, slab = min(batch, IMAGES), channels
    if length > SHORT:  # all heads of an image would be too much for the memory of a v4
        images, slab = 1, max(LANES, width)
        slab = slab if channels % slab == 0 else channels  # no kernel sees lanes beyond the array
    block = pl.BlockSpec((images, length, slab), lambda i, j: (i, 0, j))
    return pl.pallas_call(
        functools.partial(kernel, width=width, scale=scale),
        grid=(pl.cdiv(batch, images), channels // slab),  # images beyond the batch are not written
        in_specs=[block] * len(inputs),
        out_specs=[block] * outputs,
        out_shape=[jax.ShapeDtypeStruct(inputs[0].shape, inputs[0].dtype)] * outputs,
        interpret=platform() != "tpu",
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        name=f"outer_attention{kernel.__name__}",
    )(*inputs)


def _forward(q_ref, k_ref, v_ref, out_ref, *, width, scale):
    for image, lanes in _slabs(q_ref, width):
        q, k, v = (ref[image, :, lanes] for ref in (q_ref, k_ref, v_ref))
        heads = []
        for head in range(q.shape[1] // width):
            logits = _dot(q, _only(k, head, width), (1, 1))  # [query, key]
            weights = jnp.exp((logits - logits.max(1, keepdims=True)) * scale)
            total = weights.sum(1, keepdims=True)
            heads.append(_dot(weights.astype(v.dtype), v, (1, 0)) / total)
        out_ref[image, :, lanes] = _join(heads, width).astype(out_ref.dtype)


def _backward(q_ref, k_ref, v_ref, g_ref, dq_ref, dk_ref, dv_ref, *, width, scale):
    dtype = q_ref.dtype
    for image, lanes in _slabs(q_ref, width):
        q, k, v, g = (ref[image, :, lanes] for ref in (q_ref, k_ref, v_ref, g_ref))
        dq, dk, dv = [], [], []
        for head in range(q.shape[1] // width):
            # All squares are [key, query], so that only one of five products needs a transpose.
            logits = _dot(k, _only(q, head, width), (1, 1))
            weights = jnp.exp((logits - logits.max(0, keepdims=True)) * scale)
            weights = weights * (1 / weights.sum(0, keepdims=True))
            d_weights = _dot(v, _only(g, head, width), (1, 1))
            mean = (weights * d_weights).sum(0, keepdims=True)
            d_logits = (weights * (d_weights - mean)).astype(dtype)
            dq.append(_dot(d_logits, k, (0, 0)))
            dk.append(_dot(d_logits, q, (1, 0)))
            dv.append(_dot(weights.astype(dtype), g, (1, 0)))
        dq_ref[image, :, lanes] = (_join(dq, width) * scale).astype(dtype)
        dk_ref[image, :, lanes] = (_join(dk, width) * scale).astype(dtype)
        dv_ref[image, :, lanes] = _join(dv, width).astype(dtype)


def _slabs(ref, width):
    """Yields (image, lanes): the images of a block, and in each the heads that share the lanes."""
    step = max(LANES, width)
    for image in range(ref.shape[0]):
        for start in range(0, ref.shape[2], step):
            yield image, slice(start, min(start + step, ref.shape[2]))


def _only(x, head, width):
    """Returns `x` [N, lanes] with zeros outside of `head`."""
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(lane // width == head, x, jnp.zeros_like(x))


def _join(heads, width):
    """Returns [N, lanes] with the lanes of each head from its array in `heads`."""
    lane = jax.lax.broadcasted_iota(jnp.int32, heads[0].shape, 1)
    joined = heads[0]
    for head, x in enumerate(heads[1:], start=1):
        joined = jnp.where(lane < head * width, joined, x)
    return joined


def _dot(a, b, contracted):
    """Contracts axis contracted[0] of `a` with contracted[1] of `b`, in float32."""
    axes = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)
