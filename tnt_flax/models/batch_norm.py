# SPDX-License-Identifier: Apache-2.0
"""BatchNorm as torch defines it."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

EPSILON, MOMENTUM = 1e-5, 0.1  # torch's defaults; its momentum is the weight of the new


class BatchNorm(nn.Module):
    """Normalizes every channel by its mean and variance, like torch.nn.BatchNorm2d.

    In training and with the collection `batch_stats` mutable, they are those of this batch, and
    the running ones move towards them; else they are the running ones ("frozen"). As in torch, and
    not as in flax's own, the running variance is the unbiased one of n / (n - 1). `count` is of the
    batches so far; nothing reads it, but torch's files have it (`num_batches_tracked`).

    Under `jax.jit` the statistics are those of the global batch, on any number of devices, which
    torch calls SyncBatchNorm. The official recipe uses the batch of each GPU.
    """

    dtype: DTypeLike = jnp.float32  # of the result; statistics are computed in float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch W"], *, train: bool) -> Float[Array, "*batch W"]:
        width = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, width)
        running_var = self.variable("batch_stats", "var", jnp.ones, width)
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
        of_all = lambda values: jnp.broadcast_to(values, x.shape)  # said, not silently promoted
        x = x.astype(jnp.float32)
        if train and self.is_mutable_collection("batch_stats"):
            axes = tuple(range(x.ndim - 1))
            mean = x.mean(axes)
            # Two passes: E[x^2] - E[x]^2 loses digits.
            var = jnp.square(x - of_all(mean)).mean(axes)
            values = math.prod(x.shape[:-1])
            for running, new in ((running_mean, mean), (running_var, var * values / (values - 1))):
                new = jax.lax.stop_gradient(new)
                running.value = (1 - MOMENTUM) * running.value + MOMENTUM * new
            count.value = count.value + 1
        else:
            mean, var = running_mean.value, running_var.value
        x = (x - of_all(mean)) * of_all(jax.lax.rsqrt(var + EPSILON) * scale) + of_all(bias)
        return x.astype(self.dtype)
