# SPDX-License-Identifier: Apache-2.0
"""Products and sums of activations and weights of different dtypes.

Activations may be bfloat16 while the weights are float32. JAX's own rules cast the weights first
and so compute their gradients in bfloat16, which is also what XLA then sums over the devices. Here
the gradient of every operand is accumulated in the dtype of that operand.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def einsum(subscripts: str, a: Array, b: Array, dtype: DTypeLike) -> Array:
    """Returns `jnp.einsum(subscripts, a, b)`, computed in `dtype`.

    Every axis of an operand must occur in the other operand or in the result. There is no
    forward-mode derivative if the operands have different dtypes.
    """
    if a.dtype == b.dtype:
        return jnp.einsum(subscripts, a.astype(dtype), b.astype(dtype))
    return _einsum(subscripts, jnp.dtype(dtype), a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _einsum(subscripts, dtype, a, b):
    return jnp.einsum(subscripts, a.astype(dtype), b.astype(dtype))


def _einsum_forward(subscripts, dtype, a, b):
    return _einsum(subscripts, dtype, a, b), (a, b)


def _einsum_backward(subscripts, dtype, operands, d_out):
    a, b = operands
    left, right, out = subscripts.replace("->", ",").split(",")
    d_out = d_out.astype(dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=a.dtype)
    d_a = product(f"{out},{right}->{left}", d_out, b.astype(dtype))
    product = functools.partial(jnp.einsum, preferred_element_type=b.dtype)
    d_b = product(f"{left},{out}->{right}", a.astype(dtype), d_out)
    return d_a, d_b


_einsum.defvjp(_einsum_forward, _einsum_backward)


def matmul(x: Array, kernel: Array) -> Array:
    """Returns `x @ kernel` in the dtype of `x`: x [..., inputs], kernel [inputs, outputs]."""
    if x.dtype == kernel.dtype:
        return x @ kernel
    rows = einsum("pi,io->po", x.reshape(-1, x.shape[-1]), kernel, x.dtype)
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def add(x: Array, weight: Array) -> Array:
    """Returns `x + weight` in the dtype of `x`, with `weight` broadcast to the shape of `x`.

    The broadcast comes before the cast, so that its transpose, a sum, comes after a cast.
    """
    return x + jnp.broadcast_to(weight, x.shape).astype(x.dtype)
