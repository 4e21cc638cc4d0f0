# SPDX-License-Identifier: Apache-2.0
"""Both transformers with fewer passes over memory, which take most of the time on a GPU.

From the definition, XLA's program writes the attention weights of words to memory several times, in
float32, and pads the operands of their small products. Here

- the attention of words, softmax included, is one kernel, and its gradient two;
- query, key and value of words are one product;
- the attention of sentences is cuDNN's in bfloat16 and float16, which needs an even length: the
  sentences of TNT are padded;
- words have one row per sentence token, so that LayerNorm and sum are one kernel.

docs/speed.md has the compiler's figures.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_flax.models import layers
from tnt_flax.models.kernels.mixed_precision import multiply
from tnt_flax.models.kernels.platform import platform
from tnt_flax.models.layers import GELU, Dense, DropPath
from tnt_flax.models.scan import SAVED

Heads = Float[Array, "*batch T heads d"]
Projections = Float[Array, "*batch T 3 heads d"]  # query, key, value


# -- Attention of words


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def attend_words(qkv: Projections, scale: float) -> Heads:
    """Returns softmax(scale q k^T) v, the softmax in float32."""
    return _attend(qkv, scale)[0]


def _attend(qkv, scale):
    """Returns the result and the logarithms of the softmax's denominators [..., T, heads]."""
    query, key, value = _channels(qkv)
    scores = scale * _dot(query, key)
    shape = scores.shape  # [..., i, j, heads]: token i attends to token j
    operands = (scores, jnp.ones(shape), *(jnp.broadcast_to(v, shape) for v in value))

    def combine(a, b):  # partial softmax: maximum, denominator, weighted sums
        top = jnp.maximum(a[0], b[0])
        left, right = jnp.exp(a[0] - top), jnp.exp(b[0] - top)
        return top, *(x * left + y * right for x, y in zip(a[1:], b[1:], strict=True))

    start = (jnp.float32(-1e30), *[jnp.float32(0)] * (1 + len(value)))
    top, total, *sums = jax.lax.reduce(operands, start, combine, (len(shape) - 2,))
    out = jnp.stack([(x / total).astype(qkv.dtype) for x in sums], axis=-1)
    return out, top + jnp.log(total)


def _attend_forward(qkv, scale):
    out, log_total = (checkpoint_name(x, SAVED) for x in _attend(qkv, scale))
    return out, (qkv, out, log_total)


def _attend_backward(scale, saved, d_out):
    # A barrier makes XLA read an array again, in each of the two reductions, instead of writing
    # what both need to memory.
    qkv, out, log_total = saved
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    reread = jax.lax.optimization_barrier
    arrays = reread((qkv, d_out, delta, log_total))
    _, key, _ = _channels(reread(arrays[0]))
    d_query = _weighted_sums(*_weights_and_slopes(*arrays, scale), key, [], axis=-2)

    arrays = reread(arrays)
    qkv, d_out = reread(arrays[:2])
    query, _, _ = _channels(qkv)
    d_outs = [jnp.expand_dims(x, -2) for x in _unstack(d_out)]
    d_key_value = _weighted_sums(*_weights_and_slopes(*arrays, scale), query, d_outs, axis=-3)

    d_qkv = jnp.stack([x.astype(qkv.dtype) for x in d_query + d_key_value], axis=-1)
    d_qkv = d_qkv.reshape(*d_qkv.shape[:-1], 3, -1)  # [..., T, heads, 3, d]
    return (jnp.swapaxes(d_qkv, -2, -3),)


attend_words.defvjp(_attend_forward, _attend_backward)


def _channels(qkv):
    """Returns the channels of query [..., i, 1, heads], key and value [..., 1, j, heads]."""
    query, key, value = (_unstack(qkv[..., part, :, :]) for part in range(3))
    expand = lambda channels, axis: [jnp.expand_dims(x, axis) for x in channels]
    return expand(query, -2), expand(key, -3), expand(value, -3)


def _unstack(x):
    """Returns the channels of every head, in float32."""
    return [x[..., d].astype(jnp.float32) for d in range(x.shape[-1])]


def _dot(left, right):
    return sum(x * y for x, y in zip(left, right, strict=True))


def _weights_and_slopes(qkv, d_out, delta, log_total, scale):
    """Returns the attention weights and d loss / d scores, divided by the weights."""
    query, key, value = _channels(qkv)
    d_outs = [jnp.expand_dims(x, -2) for x in _unstack(d_out)]
    weights = jnp.exp(scale * _dot(query, key) - jnp.expand_dims(log_total, -2))
    return weights, scale * (_dot(d_outs, value) - jnp.expand_dims(delta, -2))


def _weighted_sums(weights, slopes, sloped, plain, *, axis):
    """Returns the sums of weights * slopes * x, x in `sloped`, and of weights * x, x in `plain`.

    One reduction of tuples (weight, slope, values): a partial sum has weight and slope 1. If the
    products were its operands, XLA would write the weights to memory.
    """
    count = len(sloped)
    one = jnp.float32(1)

    def combine(a, b):
        left, right = a[0] * a[1], b[0] * b[1]
        left, right = [left] * count + [a[0]] * len(plain), [right] * count + [b[0]] * len(plain)
        terms = zip(a[2:], left, b[2:], right, strict=True)
        return jnp.ones_like(a[0]), jnp.ones_like(a[0]), *(x * p + y * q for x, p, y, q in terms)

    values = [jnp.broadcast_to(x, weights.shape) for x in [*sloped, *plain]]
    start = (one, one, *[jnp.float32(0)] * len(values))
    _, _, *sums = jax.lax.reduce((weights, slopes, *values), start, combine, (weights.ndim + axis,))
    return sums


class WordsTransformer(nn.Module):
    """`layers.TransformerBlock` for words (B, T, M, C), one row per token; it has no dropout."""

    num_heads: int
    first: int  # row of the first sentence
    count: int  # number of sentences
    norm_eps: float = 1e-5
    gelu: str = "erf"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T M C"], drop_path_rate: Float[Array, ""] | None, *, train: bool
    ) -> Float[Array, "B T M C"]:
        del train
        params = self.variables["params"]
        width = x.shape[-1]

        def norm(name):  # over the C channels or, as PyramidTNT does, over all M * C
            flat = jax.tree.map(jnp.ravel, params[name])
            layer = LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, parent=None)
            normalized = layer.apply(
                {"params": flat}, x.reshape(*x.shape[:2], -1, flat["scale"].size)
            )
            return normalized.reshape(x.shape)

        def dense(params, x):
            features = params["kernel"].shape[1]
            layer = Dense(features, use_bias="bias" in params, dtype=self.dtype, parent=None)
            return layer.apply({"params": params}, x)

        def drop(update, name):
            if name in params:
                update = multiply(update, jnp.asarray(params[name]))
            if drop_path_rate is None:
                return update
            ones = jnp.ones((x.shape[0], self.count, 1, 1), x.dtype)  # sampled as in the reference
            end = x.shape[1] - self.first - self.count
            rows = [(0, 0), (self.first, end), (0, 0), (0, 0)]
            return update * jnp.pad(DropPath()(ones, drop_path_rate), rows)

        attention = params["attention"]
        projections = [attention[name] for name in ("query", "key", "value")]
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *projections)
        qkv = dense(joined, norm("norm1"))
        qkv = qkv.reshape(*x.shape[:-1], 3, self.num_heads, width // self.num_heads)
        update = attend_words(qkv, qkv.shape[-1] ** -0.5).reshape(x.shape)
        x = x + drop(dense(attention["out"], update), "layer_scale1")
        hidden = GELU[self.gelu](dense(params["fc1"], norm("norm2")))
        return checkpoint_name(x + drop(dense(params["fc2"], hidden), "layer_scale2"), SAVED)


# -- LayerNorm


class LayerNorm(nn.Module):
    """`layers.LayerNorm` whose gradient reads its input and the result's gradient twice."""

    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch W"]) -> Float[Array, "*batch W"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return normalize(x, jnp.asarray(scale), jnp.asarray(bias), self.epsilon, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(x, scale, bias, epsilon, dtype):
    x = jax.lax.optimization_barrier(x)  # else XLA splits the kernel where `x` is a reshape
    layer = layers.LayerNorm(epsilon=epsilon, dtype=dtype, parent=None)
    return layer.apply({"params": {"scale": scale, "bias": bias}}, x)


def _normalize_forward(x, scale, bias, epsilon, dtype):
    return normalize(x, scale, bias, epsilon, dtype), (x, scale)


def _normalize_backward(epsilon, dtype, saved, d_out):
    x, scale = saved
    axes = tuple(range(x.ndim - 1))
    centered, d_out = x.astype(jnp.float32), d_out.astype(jnp.float32)
    slope = d_out * jnp.broadcast_to(scale, x.shape)
    mean, slope_mean, variance, covariance = _moments(centered, slope)
    centered = centered - mean
    std = jax.lax.rsqrt(variance + epsilon)
    d_x = std * (slope - slope_mean - centered * (covariance * jnp.square(std)))
    # One reduction of pairs: XLA runs two kernels for each of separate sums.
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])
    zeros = (jnp.float32(0), jnp.float32(0))
    d_scale, d_bias = jax.lax.reduce((d_out * centered * std, d_out), zeros, add, axes)
    return d_x.astype(x.dtype), d_scale, d_bias


normalize.defvjp(_normalize_forward, _normalize_backward)


def _moments(x, y):
    """Returns the means of x and y, the variance of x and their covariance, over the last axis.

    One reduction of (count, mean of x, mean of y, sums of squares and products around the means),
    which loses no digits where the variance is small (Chan et al., 1979).
    """

    def combine(a, b):
        count = a[0] + b[0]
        share = b[0] / jnp.maximum(count, 1)
        dx, dy = b[1] - a[1], b[2] - a[2]
        squares = a[3] + b[3] + dx * dx * a[0] * share
        products = a[4] + b[4] + dx * dy * a[0] * share
        return count, a[1] + dx * share, a[2] + dy * share, squares, products

    zeros = jnp.zeros_like(x)
    sums = jax.lax.reduce(
        (jnp.ones_like(x), x, y, zeros, zeros), (jnp.float32(0),) * 5, combine, (x.ndim - 1,)
    )
    _, x_mean, y_mean, squares, products = (jnp.broadcast_to(v[..., None], x.shape) for v in sums)
    return x_mean, y_mean, squares / x.shape[-1], products / x.shape[-1]


# -- Sentences


class AlignedSentences(nn.Module):
    """`proj` for words with one row per token of the outer transformer; zero in other rows."""

    proj: nn.Module  # a WordsToSentences
    first: int  # row of the first sentence
    count: int  # number of sentences

    @nn.compact
    def __call__(self, words: Array) -> Array:
        update = self.proj.apply({"params": self.variables["params"]}, words)
        rows = jax.lax.broadcasted_iota(jnp.int32, update.shape, 1)
        inside = (rows >= self.first) & (rows < self.first + self.count)
        return jnp.where(inside, update, 0)


def attend_sentences(
    query: Heads,
    key: Float[Array, "*batch K heads d"],
    value: Float[Array, "*batch K heads d"],
    scale: float,
    bias: layers.Bias | None = None,
    *,
    length: int | None = None,
) -> Heads:
    """Returns softmax(scale q k^T + bias) v, by cuDNN where it can.

    Args:
        query: of T tokens.
        key: of K tokens.
        value: of K tokens.
        scale: of the logits.
        bias: added to the logits; rounded to the dtype of the query for cuDNN.
        length: number of leading tokens that attend and are attended to; None is all.
    """
    lengths = {}
    if length not in (None, key.shape[-3]):
        count = jnp.full(query.shape[0], length, jnp.int32)
        lengths = dict(query_seq_lengths=count, key_value_seq_lengths=count)
    fast = platform() == "gpu" and query.dtype in (jnp.bfloat16, jnp.float16)
    fast &= query.shape[-1] % 8 == 0 and query.shape[-1] <= 128  # what cuDNN takes
    if bias is not None:
        fast &= query.shape[-3] % 2 == key.shape[-3] % 2 == 0  # these lengths are not padded
        bias = bias.astype(query.dtype) if fast else bias
    return jax.nn.dot_product_attention(
        query, key, value, bias, scale=scale, implementation="cudnn" if fast else "xla", **lengths
    )
