# SPDX-License-Identifier: Apache-2.0
"""The inner transformer with sentences on the vector lanes: words as [C, M, P] with P = B * N.

Channels and words are few and leave most lanes of a vector unit idle; sentences are thousands. Same
parameters and same function as `tnt_flax.models.layers`.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_flax.models.kernels import mixed_precision
from tnt_flax.models.kernels.platform import shard_batch
from tnt_flax.models.layers import GELU, DropPath

Lanes = Float[Array, "C M P"]
Weights = tuple[Array, Array, Array, Array]


def to_lanes(words: Float[Array, "B N M C"]) -> Lanes:
    batch, sentences, num_words, width = words.shape
    return words.reshape(batch * sentences, num_words, width).transpose(2, 1, 0)


def fold(params: dict, heads: int) -> Weights:
    """Returns the weights of `layers.TransformerBlock` as four matrices [inputs + 1, outputs].

    They are query, key and value side by side, out, fc1 and fc2, each with its bias as last row.
    Each LayerNorm's affine is folded into the next matrix, LayerScale into the matrix before it,
    and head_dim**-0.5 * log2(e) into the query, so that softmax is 2**score / sum.
    """
    attention = params["attention"]
    scale = math.log2(math.e) * (attention["query"]["kernel"].shape[1] // heads) ** -0.5
    parts = [with_bias(attention[name]) for name in ("query", "key", "value")]
    qkv = jnp.concatenate([parts[0] * scale, *parts[1:]], axis=1)
    return (
        behind_norm(params["norm1"], qkv),
        scaled(params, "layer_scale1", with_bias(attention["out"])),
        behind_norm(params["norm2"], with_bias(params["fc1"])),
        scaled(params, "layer_scale2", with_bias(params["fc2"])),
    )


def with_bias(dense: dict) -> Array:
    """Returns the kernel with the bias, or zeros, as last row."""
    kernel = jnp.asarray(dense["kernel"], jnp.float32)
    bias = dense.get("bias", jnp.zeros_like(kernel[0]))
    return jnp.concatenate([kernel, bias[None]])


def behind_norm(norm: dict, weight: Array) -> Array:
    """Returns `weight` with the affine of the LayerNorm before it folded in."""
    kernel, bias = weight[:-1], weight[-1]
    return jnp.concatenate([norm["scale"][:, None] * kernel, (norm["bias"] @ kernel + bias)[None]])


def scaled(params: dict, name: str, weight: Array) -> Array:
    """Returns `weight` with the LayerScale `name` after it folded in, if there is one."""
    return weight * params[name][None] if name in params else weight


def normalize(x: Array, axes: int | tuple[int, ...], norm_eps: float) -> Array:
    """LayerNorm without its affine; computes and returns float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=axes, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=axes, keepdims=True) + norm_eps)


def dense(weight: Array, x: Lanes) -> Float[Array, "O M P"]:
    x = mixed_precision.einsum("imp,io->omp", x, weight[:-1])
    return mixed_precision.add(x, weight[-1][:, None, None])


def block(
    x: Lanes,
    weights: Weights,
    scales: Float[Array, "2 P"],
    *,
    heads: int,
    norm_eps: float,
    gelu: str,
) -> Lanes:
    """Evaluates pre-norm attention and MLP, each added to its input.

    Attention consists of products and sums of vectors of sentences, without small matrix products.

    Args:
        x: words.
        weights: from `fold`.
        scales: factors of the two updates of each sentence (stochastic depth).
        heads, norm_eps, gelu: see `layers.TransformerBlock`.
    """
    qkv, out, fc1, fc2 = weights
    dtype = x.dtype
    scale = scales.astype(dtype)[:, None, None]

    split = (3, heads, x.shape[0] // heads, *x.shape[1:])
    query, key, value = dense(qkv, normalize(x, 0, norm_eps).astype(dtype)).reshape(split)
    scores = (query[:, :, :, None] * key[:, :, None]).astype(jnp.float32).sum(axis=1)
    odds = jnp.exp2(scores - jax.lax.stop_gradient(scores.max(axis=2, keepdims=True)))
    shares = (odds / odds.sum(axis=2, keepdims=True)).astype(dtype)  # [heads, M, M, P]
    mixed = (shares[:, None] * value[:, :, None]).astype(jnp.float32).sum(axis=3)
    x = x + dense(out, mixed.reshape(x.shape).astype(dtype)) * scale[0]

    hidden = GELU[gelu](dense(fc1, normalize(x, 0, norm_eps).astype(dtype)))
    return x + dense(fc2, hidden) * scale[1]


class LanesTransformer(nn.Module):
    """`layers.TransformerBlock` for words on lanes, without dropout."""

    num_heads: int
    block: Callable[..., Array]  # computes it: `lanes.block` or `inner_pallas.block`
    norm_eps: float = 1e-5
    gelu: str = "erf"

    @nn.compact
    def __call__(self, x: Lanes, drop_path_rate: Float[Array, ""] | None, *, train: bool) -> Lanes:
        del train
        # Factors of both updates, sampled as in the reference.
        kept = jnp.ones((x.shape[2], 1, 1), x.dtype)
        scales = [DropPath()(kept, drop_path_rate)[:, 0, 0] for _ in range(2)]
        scales = jnp.stack(scales).astype(jnp.float32)
        weights = fold(self.variables["params"], self.num_heads)
        fields = dict(heads=self.num_heads, norm_eps=self.norm_eps, gelu=self.gelu)
        return self.block(x, weights, scales, **fields)


class LanesToSentences(nn.Module):
    """`tnt_blocks.WordsToSentences` for words on lanes: [C, M, B * N] to (B, N, D)."""

    num_sentences: int  # N
    norm_each_word: bool = False
    norm_eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, words: Lanes) -> Float[Array, "B N D"]:
        params = self.variables["params"]
        width, num_words, _ = words.shape
        x = normalize(words, 0 if self.norm_each_word else (0, 1), self.norm_eps)
        affine = (params["norm1"][name].reshape(-1, width) for name in ("scale", "bias"))
        scale, bias = (values.T[:, :, None] for values in affine)  # [C, 1 or M, 1]
        x = (x * scale + bias).astype(self.dtype)
        kernel = jnp.asarray(params["dense"]["kernel"]).reshape(num_words, width, -1)
        x = shard_batch(mixed_precision.einsum("cmp,mcd->pd", x, kernel))
        if "bias" in params["dense"]:
            x = mixed_precision.add(x, params["dense"]["bias"])
        if "norm2" in params:
            scale, bias = (params["norm2"][name][None] for name in ("scale", "bias"))
            x = normalize(x, 1, self.norm_eps) * scale + bias
        return x.reshape(-1, self.num_sentences, x.shape[-1]).astype(self.dtype)
