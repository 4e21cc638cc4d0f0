# SPDX-License-Identifier: Apache-2.0
"""The layers of TNT and PyramidTNT, initialized as in the official code.

Every layer acts on sequences `(*batch, T, W)` of T tokens of width W: the outer transformer reads
sentences `(B, T, D)`, the inner transformer words `(B, N, M, C)`. Arrays are added or
multiplied only at equal ranks: the tests forbid implicit rank promotion. Weights read from a file
may be NumPy arrays, hence `jnp.asarray(...)`.
"""

import functools
import itertools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_flax.core.errors import InputError
from tnt_flax.models.kernels import mixed_precision
from tnt_flax.models.kernels.platform import shard_batch
from tnt_flax.models.network import Grid

Tokens = Float[Array, "*batch T W"]
Heads = Float[Array, "*batch T heads width"]
Bias = Float[Array, "1 heads T K"]  # of logits: T tokens attend to K tokens, in every image
AttentionFn = Callable[..., Heads]
MatmulFn = Callable[[Array, Array], Array]

# torch's trunc_normal_(std=.02, a=-2, b=2) cuts at 100 sigma, so it is a plain normal;
# jax's truncated_normal would cut at 2 sigma and shrink the standard deviation to .0176.
normal_init = nn.initializers.normal(0.02)

# Two passes: flax's fast variance E[x^2] - E[x]^2 loses all digits where the variance is small.
# Statistics and affine are computed in float32 whatever `dtype` is; the result has type `dtype`.
LayerNorm = functools.partial(nn.LayerNorm, use_fast_variance=False)


class Dense(nn.Module):
    """A linear layer, computed in `dtype`, with gradients in the dtype of its parameters.

    `nn.Dense` casts its parameters first, so that their gradients are computed in `dtype`. Here,
    `matmul_fn` casts the kernel, and the bias is cast after its broadcast: see
    `tnt_flax.models.kernels.mixed_precision`.
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    matmul_fn: MatmulFn = mixed_precision.matmul

    @nn.compact
    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        kernel = self.param("kernel", normal_init, (x.shape[-1], self.features))
        # `shard_batch` of input and output makes FSDP gather the kernel, not exchange activations.
        x = self.matmul_fn(shard_batch(x.astype(self.dtype)), jnp.asarray(kernel))
        x = shard_batch(x)
        if not self.use_bias:
            return x
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return mixed_precision.add(x, jnp.asarray(bias))


@jax.custom_jvp
def gelu_erf(x: Array) -> Array:
    """Evaluates the exact GELU. `jax.nn.gelu` uses erfc, which is 2.5 times slower on a CPU.

    The derivative is written out to save memory: the backward pass needs only the slope, where
    JAX would keep four arrays as wide as the MLP.
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


LAYER_SCALE_INIT = 1e-4  # as in DeiT-III


class DropPath(nn.Module):
    """Stochastic depth: zeroes the update of a whole sequence, or scales it by 1 / (1 - rate).

    One sample per sequence of `update` [*batch, T, W], from the rng "dropout": the outer
    transformer drops the update of all sentences of an image, the inner one that of all words of a
    sentence, as in the official code. A `rate` of None keeps everything.
    """

    @nn.compact
    def __call__(self, update: Tokens, rate: Float[Array, ""] | None) -> Tokens:
        if rate is None:
            return update
        sample = jax.random.uniform(self.make_rng("dropout"), update.shape[:-2])[..., None, None]
        keep = 1 - rate
        # Bernoulli(keep) / keep, written as in timm.
        return update * (jnp.floor(keep + sample) / keep).astype(update.dtype)


def drop_path_rates(model: nn.Module) -> Float[Array, " depth"]:
    """Returns the drop-path rate of every block of a network."""
    first = model.drop_path if model.uniform_drop_path else 0
    return jnp.linspace(first, model.drop_path, model.depth)


# -- The transformer


class Attention(nn.Module):
    """Multi-head attention; sows its weights `(*batch, heads, Q, K)` as an intermediate.

    Args of the call:
        x: [*batch, T, W]: queries, and also keys and values unless `context` is given.
        num_queries: Q, the number of leading tokens of `x` that are queries; None is all T.
        context: keys and values [*batch, K, W]; by default the first `num_keys` tokens of `x`.
        bias: [1, heads, T, K], added to the logits.
        train: enables dropout.

    Raises:
        InputError: the width is not divisible by `num_heads`.
    """

    num_heads: int
    qkv_bias: bool = False
    out_bias: bool = True
    dropout: float = 0.0  # of the result
    attention_dropout: float = 0.0  # of the attention weights
    dtype: DTypeLike = jnp.float32
    num_keys: int | None = None  # number of leading tokens that are attended to; None is all
    # Faster replacements for parts of `__call__`. `attention_fn(query, key, value, scale)` replaces
    # logits, softmax and weighted sum; None computes them below. It is not used with `num_queries`,
    # while attention weights are captured, or with attention dropout. With a bias it is used only
    # if `attention_bias`, which means that the bias is its fifth argument. Without `context` it
    # gets the keys of all tokens, and must itself ignore those from `num_keys` on.
    attention_fn: AttentionFn | None = None
    attention_bias: bool = False
    matmul_fn: MatmulFn = mixed_precision.matmul

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        *,
        num_queries: int | None = None,
        context: Float[Array, "*batch K W"] | None = None,
        bias: Bias | None = None,
        train: bool,
    ) -> Float[Array, "*batch Q W"]:
        width = x.shape[-1]
        if width % self.num_heads:
            raise InputError(f"width {width} is not divisible by {self.num_heads} attention heads")
        dense = functools.partial(Dense, width, dtype=self.dtype, matmul_fn=self.matmul_fn)
        dropout = functools.partial(nn.Dropout, deterministic=not train)

        def project(name, x):
            projected = dense(use_bias=self.qkv_bias, name=name)(x)
            return projected.reshape(*x.shape[:-1], self.num_heads, width // self.num_heads)

        needs_weights = self.is_mutable_collection("intermediates") or (
            train and self.attention_dropout
        )
        use_attention_fn = self.attention_fn and num_queries is None and not needs_weights
        use_attention_fn = use_attention_fn and (bias is None or self.attention_bias)
        query = project("query", x[..., :num_queries, :])
        if context is None:
            context = x if use_attention_fn else x[..., : self.num_keys, :]
        key, value = project("key", context), project("value", context)
        scale = query.shape[-1] ** -0.5
        if use_attention_fn:
            biases = () if bias is None else (bias,)
            x = self.attention_fn(query, key, value, scale, *biases)
        else:
            logits = jnp.einsum("...qhd,...khd->...hqk", query, key) * scale
            logits = logits.astype(jnp.float32)
            if bias is not None:
                logits = logits + bias[..., :num_queries, :]
            weights = nn.softmax(logits)
            self.sow("intermediates", "weights", weights)
            weights = dropout(self.attention_dropout)(weights)
            x = jnp.einsum("...hqk,...khd->...qhd", weights.astype(self.dtype), value)

        x = x.reshape(*x.shape[:-2], width)
        x = dense(use_bias=self.out_bias, name="out")(x)
        return dropout(self.dropout)(x)


class SqueezeExcite(nn.Module):
    """Scales the channels by a function of their mean over all tokens (paper, Table 12)."""

    norm_eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        width = x.shape[-1]
        gate = x.mean(axis=-2, keepdims=True)
        gate = LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(gate)
        gate = nn.relu(Dense(width // 4, dtype=self.dtype, name="fc1")(gate))
        return x * jnp.tanh(Dense(width, dtype=self.dtype, name="fc2")(gate))


def mlp(x: Tokens, fc1: Callable, gelu: Callable, dropout: Callable, fc2: Callable) -> Tokens:
    """Evaluates an MLP from its parts, functions of tokens.

    The default of `TransformerBlock.mlp_fn`; `kernels.cpu.mlp` is another.
    """
    return fc2(dropout(gelu(fc1(x))))


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, each added to its input: an inner or an outer transformer.

    LayerScale (Touvron et al., arXiv 2103.17239) multiplies the channels of both updates by learned
    factors, before drop path. They start at LAYER_SCALE_INIT.

    Args of the call:
        x: tokens.
        drop_path_rate: rate of both updates; None disables drop path.
        num_queries: Q, the number of leading tokens that are updated and returned; None is all T.
        bias: added to the logits of the attention.
        train: enables dropout.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    output_bias: bool = True  # of the attention's output and of fc2
    se: bool = False  # squeeze-excite after the MLP
    layer_scale: bool = False
    norm_eps: float = 1e-5
    gelu: str = "erf"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    reduce: nn.Module | None = None  # maps the tokens to those that are attended to
    num_keys: int | None = None  # as in `Attention`
    # Faster versions of parts, see `Attention` and `mlp`.
    norm_layer: Callable[..., nn.Module] = LayerNorm
    attention_fn: AttentionFn | None = None
    attention_bias: bool = False
    matmul_fn: MatmulFn = mixed_precision.matmul
    mlp_fn: Callable[..., Tokens] = mlp

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        drop_path_rate: Float[Array, ""] | None,
        *,
        num_queries: int | None = None,
        bias: Bias | None = None,
        train: bool,
    ) -> Float[Array, "*batch Q W"]:
        norm = functools.partial(self.norm_layer, epsilon=self.norm_eps, dtype=self.dtype)
        dense = functools.partial(Dense, dtype=self.dtype, matmul_fn=self.matmul_fn)
        dropout = functools.partial(nn.Dropout, self.dropout, deterministic=not train)

        def scaled(name, update):
            if not self.layer_scale:
                return update
            init = nn.initializers.constant(LAYER_SCALE_INIT)
            scale = self.param(name, init, update.shape[-1:])
            return mixed_precision.multiply(update, jnp.asarray(scale))

        attention = Attention(
            num_heads=self.num_heads,
            qkv_bias=self.qkv_bias,
            out_bias=self.output_bias,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            dtype=self.dtype,
            num_keys=self.num_keys,
            attention_fn=self.attention_fn,
            attention_bias=self.attention_bias,
            matmul_fn=self.matmul_fn,
            name="attention",
        )
        normalized = norm(name="norm1")(x)
        context = self.reduce(normalized) if self.reduce else None
        update = attention(
            normalized, num_queries=num_queries, context=context, bias=bias, train=train
        )
        update = scaled("layer_scale1", update)
        x = x[..., :num_queries, :] + DropPath()(update, drop_path_rate)

        width = x.shape[-1]
        update = self.mlp_fn(
            norm(name="norm2")(x),
            dense(int(width * self.mlp_ratio), name="fc1"),
            GELU[self.gelu],
            dropout(),
            dense(width, use_bias=self.output_bias, name="fc2"),
        )
        update = dropout()(update)
        if self.se:
            update = update + SqueezeExcite(self.norm_eps, self.dtype, name="se")(update)
        update = scaled("layer_scale2", update)
        return x + DropPath()(update, drop_path_rate)


# -- Positions and checks


def position_table(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    init: Callable[..., Array] = normal_init,
) -> Array:
    """Returns the parameter `name` of `module`, a table of positions.

    Raises:
        InputError: the weights' table has another shape: they are for images of another size.
    """
    if module.has_variable("params", name):
        found = module.get_variable("params", name).shape
        if found != shape:
            raise InputError(
                f"the weights' {name} has shape {tuple(found)}, but these images and this "
                f"patch size need {shape}: give images of the size the weights were made for"
            )
    return jnp.asarray(module.param(name, init, shape))


def resample(table: Array, axis: int, old: list[Grid], new: list[Grid]) -> Array:
    """Returns a table of positions for other grids: bicubic with antialiasing, as in timm.

    Args:
        table: [*before, n_0, n_1, ..., *after]; an axis n_i enumerates the sentences of a grid.
        axis: index of n_0.
        old: (rows, columns) of the grid of each such axis.
        new: (rows, columns) of the same axes in the result.
    """
    before = table.shape[:axis]
    after = table.shape[axis + len(old) :]
    grids = table.reshape(*before, *itertools.chain(*old), *after)
    shape = (*before, *itertools.chain(*new), *after)
    resampled = jax.image.resize(grids, shape, "cubic", antialias=True)
    return resampled.reshape(*before, *map(math.prod, new), *after)


def check_images(images: Array, patch_size: int) -> None:
    """Raises InputError unless `images` are floats of rank 4, divisible into patches."""
    if images.ndim != 4:
        raise InputError(f"images must be [B, H, W, channels], not {list(images.shape)}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(f"images must be normalized to floats first, these are {images.dtype}")
    height, width = images.shape[1:3]
    if not height or not width or height % patch_size or width % patch_size:
        raise InputError(f"image size {height}x{width} is not divisible by patch size {patch_size}")


def check_choices_and_rates(model: nn.Module, **choices: tuple[str, ...]) -> None:
    """Raises InputError unless the fields of a network are valid.

    Each field in `choices` must have one of the values given for it, and all dropout and drop-path
    rates must be in [0, 1).
    """
    for field, values in choices.items():
        if getattr(model, field) not in values:
            raise InputError(f"{field}={getattr(model, field)!r} is none of {values}")
    for rate in ("dropout", "attention_dropout", "drop_path"):
        if not 0 <= getattr(model, rate) < 1:
            raise InputError(f"{rate}={getattr(model, rate)} is outside [0, 1)")
