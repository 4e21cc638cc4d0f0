# SPDX-License-Identifier: Apache-2.0
"""The transformer layers of TNT, with torch's defaults where flax's differ.

Every layer acts on sequences `(*batch, T, W)` of T tokens of width W, whatever the batch axes are:
the outer transformer reads sentences `(B, N + 1, D)`, the inner one words `(B, N, M, C)`.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_flax.core.errors import InputError
from tnt_flax.models.kernels import mixed_precision
from tnt_flax.models.kernels.platform import shard_batch

Tokens = Float[Array, "*batch T W"]


class Dense(nn.Module):
    """A linear layer, computed in `dtype`, with gradients in the dtype of its parameters.

    Unlike in `nn.Dense`, the parameters are cast inside `matmul` and after the broadcast of the
    bias: see `tnt_flax.models.kernels.mixed_precision`.
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    matmul: Callable[[Array, Array], Array] = mixed_precision.matmul

    @nn.compact
    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        # torch's trunc_normal_(std=.02, a=-2, b=2) cuts at 100 sigma, so it is a plain normal;
        # jax's truncated_normal would cut at 2 sigma and shrink the spread to .0176.
        init = nn.initializers.normal(0.02)
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        x = self.matmul(shard_batch(x.astype(self.dtype)), jnp.asarray(kernel))
        x = shard_batch(x)
        if not self.use_bias:
            return x
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return mixed_precision.add(x, jnp.asarray(bias))


# Two passes: flax's fast variance E[x^2] - E[x]^2 loses all digits where the variance is small.
# Statistics and affine are computed in float32 whatever `dtype` is; the result is in `dtype`.
LayerNorm = functools.partial(nn.LayerNorm, use_fast_variance=False)


@jax.custom_jvp
def gelu_erf(x: Array) -> Array:
    """The exact GELU. jax.nn.gelu computes it with erfc, which is 2.5 times slower on a CPU.

    Its own derivative is for the memory: of what JAX would keep for the backward pass, four arrays
    as wide as the MLP, only the slope is needed.
    """
    return x * _normal_cdf(x)


@gelu_erf.defjvp
def _gelu_erf_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    slope = _normal_cdf(x) + x * jnp.exp(-0.5 * jnp.square(x)) * (2 * jnp.pi) ** -0.5
    return gelu_erf(x), slope * tangent


def _normal_cdf(x):
    return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


GELU: dict[str, Callable[[Array], Array]] = {
    "erf": gelu_erf,  # torch's default
    "tanh": functools.partial(jax.nn.gelu, approximate=True),  # MindSpore's default
}


class Primitives(NamedTuple):
    """What a transformer spends its time in, to be exchanged for faster forms of the same."""

    matmul: Callable[[Array, Array], Array] = mixed_precision.matmul  # of the dense layers
    # (query, key, value), each (*batch, T, heads, width / heads), and the factor of their products,
    # to such sums of values; None is the attention as it stands in `Attention`, which also serves
    # where not all tokens attend.
    attend: Callable[[Array, Array, Array, float], Array] | None = None
    # Are the tokens of all sequences rows of one matrix to the MLP?
    flat_mlp: bool = False


class DropPath(nn.Module):
    """Stochastic depth: drops the whole update of a sequence, or scales it by 1 / (1 - rate).

    One draw per sequence: per image for sentences, but per sentence for words, as in the official
    code, where words are a batch of B * N sequences.
    """

    @nn.compact
    def __call__(self, update: Tokens, rate: Float[Array, ""] | None) -> Tokens:
        if rate is None:
            return update
        draw = jax.random.uniform(self.make_rng("dropout"), update.shape[:-2])[..., None, None]
        keep = 1 - rate
        return update * (jnp.floor(keep + draw) / keep).astype(update.dtype)


class Dropout(nn.Module):
    """Drops elements, and scales the others by 1 / (1 - rate)."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch T W"], *, train: bool) -> Float[Array, "*batch T W"]:
        if not (train and self.rate):
            return x
        draw = jax.random.uniform(self.make_rng("dropout"), x.shape)
        return jnp.where(draw < 1 - self.rate, x / (1 - self.rate), jnp.zeros_like(x))


class Attention(nn.Module):
    """Multi-head self-attention; sows its weights `(*batch, heads, T, T)` as an intermediate.

    With `queries` only the first so many tokens attend, to all of them. With `context` they attend
    to its K tokens instead of to each other. `bias` is added to the logits `(*batch, heads, T, K)`.
    """

    num_heads: int
    qkv_bias: bool = False
    out_bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    primitives: Primitives = Primitives()

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        *,
        queries: int | None = None,
        context: Float[Array, "*batch K W"] | None = None,
        bias: Float[Array, "#B heads T K"] | None = None,
        train: bool,
    ) -> Float[Array, "*batch Q W"]:
        width = x.shape[-1]
        if width % self.num_heads:
            raise InputError(f"width {width} is not divisible by {self.num_heads} attention heads")
        dense = functools.partial(Dense, width, dtype=self.dtype, matmul=self.primitives.matmul)

        def project(name, x, use_bias):
            projected = dense(use_bias=use_bias, name=name)(x)
            return projected.reshape(*x.shape[:-1], self.num_heads, width // self.num_heads)

        query = project("query", x[..., :queries, :], self.qkv_bias)
        context = x if context is None else context
        key = project("key", context, self.qkv_bias)
        value = project("value", context, self.qkv_bias)
        scale = query.shape[-1] ** -0.5

        weights_are_needed = (
            self.attention_dropout and train or self.is_mutable_collection("intermediates")
        )
        plain = queries is None and bias is None
        if self.primitives.attend and plain and not weights_are_needed:
            x = self.primitives.attend(query, key, value, scale)
        else:
            logits = jnp.einsum("...qhd,...khd->...hqk", query, key) * scale
            logits = logits.astype(jnp.float32)
            weights = nn.softmax(logits if bias is None else logits + bias)
            self.sow("intermediates", "weights", weights)
            weights = Dropout(self.attention_dropout)(weights, train=train)
            x = jnp.einsum("...hqk,...khd->...qhd", weights.astype(self.dtype), value)

        x = x.reshape(*x.shape[:-2], width)
        x = dense(use_bias=self.out_bias, name="out")(x)
        return Dropout(self.dropout)(x, train=train)


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
    """Pre-norm attention and MLP, each added to its input: the inner and the outer block alike.

    With `queries` only the first so many tokens are updated and returned. `reduce` makes of the
    tokens those that they attend to, and `bias` is added to the attention's logits.
    """

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
    primitives: Primitives = Primitives()
    norm: Callable[..., nn.Module] = LayerNorm
    reduce: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        drop_path_rate: Float[Array, ""] | None,
        *,
        queries: int | None = None,
        bias: Float[Array, "#B heads T K"] | None = None,
        train: bool,
    ) -> Float[Array, "*batch Q W"]:
        norm = functools.partial(self.norm, epsilon=self.norm_eps, dtype=self.dtype)
        dense = functools.partial(Dense, dtype=self.dtype, matmul=self.primitives.matmul)

        attention = Attention(
            self.num_heads,
            self.qkv_bias,
            self.output_bias,
            self.dropout,
            self.attention_dropout,
            self.dtype,
            self.primitives,
            name="attention",
        )
        normal = norm(name="norm1")(x)
        context = self.reduce(name="reduce")(normal) if self.reduce else None
        update = attention(normal, queries=queries, context=context, bias=bias, train=train)
        x = x[..., :queries, :] + DropPath()(update, drop_path_rate)

        width = x.shape[-1]
        hidden = int(width * self.mlp_ratio)
        update = norm(name="norm2")(x)
        if self.primitives.flat_mlp:
            update = update.reshape(math.prod(x.shape[:-1]), width)
        update = GELU[self.gelu](dense(hidden, name="fc1")(update))
        rows = update.shape
        update = update.reshape(*x.shape[:-1], hidden)  # dropout draws sequence by sequence
        update = Dropout(self.dropout)(update, train=train).reshape(rows)
        update = dense(width, use_bias=self.output_bias, name="fc2")(update)
        update = Dropout(self.dropout)(update.reshape(x.shape), train=train)
        if self.se:
            update = update + SqueezeExcite(self.norm_eps, self.dtype, name="se")(update)
        return x + DropPath()(update, drop_path_rate)
