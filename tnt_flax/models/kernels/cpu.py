# SPDX-License-Identifier: Apache-2.0
"""Dense products and attention whose gradients XLA computes fast on a CPU.

They compute what `models.layers` computes, with backward passes of their own. Four things slow
down the backward passes that JAX and XLA derive:

- XLA fuses the sum of all later blocks' residual gradients into a strided transpose, once in every
  block. A barrier on the incoming gradient keeps it from that.
- The gradient of a kernel with more inputs than outputs is faster when computed transposed.
- The attention weights, which the backward pass computes again, would be computed for each use.
- With several batch axes the GELU's result is a second array as wide as the MLP beside its input;
  of rows of one matrix it takes the input's place (`mlp`). A program that holds less than 32 MiB
  gets them from glibc without a system call.

`jax.custom_vjp` has no forward mode: `jax.jvp`, `jax.hessian` and the like need the plain layers.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Heads = Float[Array, "*batch T heads d"]

barrier = jax.lax.optimization_barrier


@jax.custom_vjp
def matmul(x: Float[Array, "*batch i"], kernel: Float[Array, "i o"]) -> Float[Array, "*batch o"]:
    """See `mixed_precision.matmul`."""
    return x @ kernel.astype(x.dtype)


def _matmul_forward(x, kernel):
    return matmul(x, kernel), (x, kernel)


def _matmul_backward(saved, d_out):
    x, kernel = saved
    d_out = barrier(d_out)
    rows, d_rows = x.reshape(-1, x.shape[-1]), d_out.reshape(-1, d_out.shape[-1])
    more_inputs = rows.shape[-1] > d_rows.shape[-1]
    product = functools.partial(jnp.matmul, preferred_element_type=kernel.dtype)
    d_kernel = barrier(product(d_rows.T, rows)).T if more_inputs else product(rows.T, d_rows)
    return d_out @ kernel.astype(x.dtype).T, d_kernel


matmul.defvjp(_matmul_forward, _matmul_backward)


def mlp(x: Array, fc1: Callable, gelu: Callable, dropout: Callable, fc2: Callable) -> Array:
    """See `models.layers.mlp`. The tokens of all sequences are rows of one matrix."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    hidden = gelu(fc1(rows))
    flat = hidden.shape
    hidden = dropout(hidden.reshape(*x.shape[:-1], flat[-1]))  # samples sequence by sequence
    return fc2(hidden.reshape(flat)).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(query: Heads, key: Heads, value: Heads, scale: float) -> Heads:
    """softmax(scale q k^T) v, the softmax in float32."""
    return jnp.einsum("...hqk,...khd->...qhd", _weights(query, key, scale), value)


def _weights(query, key, scale):
    logits = jnp.einsum("...qhd,...khd->...hqk", query, key) * scale
    return jax.nn.softmax(logits.astype(jnp.float32)).astype(query.dtype)


def _attend_forward(query, key, value, scale):
    return attend(query, key, value, scale), (query, key, value)


def _attend_backward(scale, saved, d_out):
    query, key, value = saved
    d_out = barrier(d_out)
    weights = barrier(_weights(query, key, scale))  # computed once for both of its uses
    d_weights = jnp.einsum("...qhd,...khd->...hqk", d_out, value)
    d_logits = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True))
    d_logits = barrier(d_logits * scale)
    d_query = jnp.einsum("...hqk,...khd->...qhd", d_logits, key)
    d_key = jnp.einsum("...hqk,...qhd->...khd", d_logits, query)
    d_value = jnp.einsum("...hqk,...qhd->...khd", weights, d_out)
    return d_query, d_key, d_value


attend.defvjp(_attend_forward, _attend_backward)
