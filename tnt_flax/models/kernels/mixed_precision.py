# SPDX-License-Identifier: Apache-2.0
"""Products and sums of activations and weights of different dtypes.

Activations may be bfloat16 while the weights are float32. JAX's own rules cast the weights first
and so compute their gradients in bfloat16, which is also what XLA then sums over the devices. Here
the gradient of every operand is accumulated in the dtype of that operand.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tnt_flax.models.kernels.platform import platform


def einsum(subscripts: str, x: Array, weight: Array) -> Array:
    """Returns `jnp.einsum(subscripts, x, weight)`, computed in the dtype of `x`.

    Every axis of an operand must occur in the other operand or in the result. The backward pass
    cannot parse "...". There is no forward-mode derivative if the operands have different dtypes.
    """
    if x.dtype == weight.dtype:
        return jnp.einsum(subscripts, x, weight)
    return _einsum(subscripts, x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(subscripts, x, weight):
    return jnp.einsum(subscripts, *_apart(x, weight.astype(x.dtype)))


def _einsum_forward(subscripts, x, weight):
    return _einsum(subscripts, x, weight), (x, weight)


def _einsum_backward(subscripts, operands, d_out):
    x, weight = operands
    left, right, out = subscripts.replace("->", ",").split(",")
    d_x = jnp.einsum(f"{out},{right}->{left}", d_out, weight.astype(x.dtype))
    if platform() == "cpu":  # XLA's CPU backend lacks some bfloat16 products with float32 results
        x, d_out = x.astype(weight.dtype), d_out.astype(weight.dtype)
    x, d_out = _apart(x, d_out)
    product = functools.partial(jnp.einsum, preferred_element_type=weight.dtype)
    return d_x, product(f"{left},{out}->{right}", x, d_out)


_einsum.defvjp(_einsum_forward, _einsum_backward)


def _apart(x, y):
    """Returns both operands such that XLA does not join their product with others of `x`.

    On GPUs it joins small products such as query, key and value, and then copies the parts.
    """
    return jax.lax.optimization_barrier((x, y)) if platform() == "gpu" else (x, y)


def matmul(x: Array, kernel: Array) -> Array:
    """Returns `x @ kernel` in the dtype of `x`: x [..., inputs], kernel [inputs, outputs]."""
    if x.dtype == kernel.dtype:
        return x @ kernel
    # Rows of one matrix, because the backward pass of `einsum` cannot parse "...i,io->...o".
    rows = einsum("pi,io->po", x.reshape(-1, x.shape[-1]), kernel)
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def add(x: Array, weight: Array) -> Array:
    """Returns `x + weight` in the dtype of `x`, with `weight` broadcast to the shape of `x`."""
    return x + _broadcast(weight, x)


def multiply(x: Array, weight: Array) -> Array:
    """Returns `x * weight` in the dtype of `x`, with `weight` broadcast to the shape of `x`."""
    return x * _broadcast(weight, x)


def _broadcast(weight, x):
    if x.dtype == weight.dtype:
        # No explicit broadcast: jax2onnx takes the length of a surrounding scan for its batch size.
        return jnp.expand_dims(weight, range(x.ndim - weight.ndim))
    # The broadcast comes before the cast, so that its transpose, a sum, comes after a cast.
    return jnp.broadcast_to(weight, x.shape).astype(x.dtype)
