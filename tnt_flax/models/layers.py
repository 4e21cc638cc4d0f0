# SPDX-License-Identifier: Apache-2.0
"""The transformer layers of TNT, with torch's defaults where flax's differ.

Every layer acts on sequences `(*batch, T, W)` of T tokens of width W, whatever the batch axes are:
the outer transformer reads sentences `(B, N + 1, D)`, the inner one words `(B, N, M, C)`.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_flax.errors import InputError

Tokens = Float[Array, "*batch T W"]

# torch's trunc_normal_(std=.02, a=-2, b=2) cuts at 100 sigma, so it is a plain normal;
# jax's truncated_normal would cut at 2 sigma and shrink the spread to .0176.
Dense = functools.partial(nn.Dense, kernel_init=nn.initializers.normal(0.02))

# Two passes: flax's fast variance E[x^2] - E[x]^2 loses all digits where the variance is small.
# Statistics and affine are computed in float32 whatever `dtype` is; the result is in `dtype`.
LayerNorm = functools.partial(nn.LayerNorm, use_fast_variance=False)


def gelu_erf(x: Array) -> Array:
    """The exact GELU. jax.nn.gelu computes it with erfc, which is 2.5 times slower on a CPU."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


GELU: dict[str, Callable[[Array], Array]] = {
    "erf": gelu_erf,  # torch's default
    "tanh": functools.partial(jax.nn.gelu, approximate=True),  # MindSpore's default
}


class DropPath(nn.Module):
    """Stochastic depth: drops the whole update of a sequence, or scales it by 1 / (1 - rate).

    One draw per sequence: per image for sentences, but per sentence for words, as in the official
    code, where words are a batch of B * N sequences.
    """

    @nn.compact
    def __call__(self, update: Tokens, rate: Float[Array, ""] | None) -> Tokens:
        if rate is None:
            return update
        draw = jax.random.uniform(self.make_rng("dropout"), (*update.shape[:-2], 1, 1))
        keep = 1 - rate
        return update * (jnp.floor(keep + draw) / keep).astype(update.dtype)


class Attention(nn.Module):
    """Multi-head self-attention; sows its weights `(*batch, heads, T, T)` as an intermediate."""

    num_heads: int
    qkv_bias: bool = False
    out_bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens, *, train: bool) -> Tokens:
        width = x.shape[-1]
        if width % self.num_heads:
            raise InputError(f"width {width} is not divisible by {self.num_heads} attention heads")
        heads = (*x.shape[:-1], self.num_heads, width // self.num_heads)
        project = functools.partial(Dense, width, use_bias=self.qkv_bias, dtype=self.dtype)
        query = project(name="query")(x).reshape(heads)
        key = project(name="key")(x).reshape(heads)
        value = project(name="value")(x).reshape(heads)

        logits = jnp.einsum("...qhd,...khd->...hqk", query, key) * heads[-1] ** -0.5
        weights = nn.softmax(logits.astype(jnp.float32))
        self.sow("intermediates", "weights", weights)
        weights = nn.Dropout(self.attention_dropout, deterministic=not train)(weights)
        x = jnp.einsum("...hqk,...khd->...qhd", weights.astype(self.dtype), value)

        x = Dense(width, use_bias=self.out_bias, dtype=self.dtype, name="out")(
            x.reshape(*heads[:-2], width)
        )
        return nn.Dropout(self.dropout, deterministic=not train)(x)


class SqueezeExcite(nn.Module):
    """Gates the channels by their mean over all tokens (paper Table 12)."""

    norm_eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        width = x.shape[-1]
        gate = x.mean(axis=-2, keepdims=True)
        gate = LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(gate)
        gate = nn.relu(Dense(width // 4, dtype=self.dtype, name="fc1")(gate))
        return x * jnp.tanh(Dense(width, dtype=self.dtype, name="fc2")(gate))


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, each added to its input: the inner and the outer block alike."""

    num_heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    output_bias: bool = True
    se: bool = False
    norm_eps: float = 1e-5
    gelu: str = "erf"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Tokens, drop_path_rate: Float[Array, ""] | None, *, train: bool
    ) -> Tokens:
        norm = functools.partial(LayerNorm, epsilon=self.norm_eps, dtype=self.dtype)
        dropout = functools.partial(nn.Dropout, self.dropout, deterministic=not train)

        attention = Attention(
            self.num_heads,
            self.qkv_bias,
            self.output_bias,
            self.dropout,
            self.attention_dropout,
            self.dtype,
            name="attention",
        )
        x = x + DropPath()(attention(norm(name="norm1")(x), train=train), drop_path_rate)

        width = x.shape[-1]
        update = Dense(int(width * self.mlp_ratio), dtype=self.dtype, name="fc1")(
            norm(name="norm2")(x)
        )
        update = dropout()(GELU[self.gelu](update))
        update = Dense(width, use_bias=self.output_bias, dtype=self.dtype, name="fc2")(update)
        update = dropout()(update)
        if self.se:
            update = update + SqueezeExcite(self.norm_eps, self.dtype, name="se")(update)
        return x + DropPath()(update, drop_path_rate)
