# SPDX-License-Identifier: Apache-2.0
"""PyramidTNT (Han et al., arXiv 2201.00978): TNT in four stages of fewer, wider sentences.

A convolutional stem reads sentences (8x8 pixels) and their words. Between two stages, 2x2
neighbouring sentences become one sentence, and so do their words; every sentence keeps 4x4 words.
Only the first block or two of a stage read words. Sentences attend to averages of sentences, by
content and by a learned table of relative positions. There is no class token: the head reads the
mean over the sentences. Letters in shapes: `tnt_flax.models.tnt`; N depends on the stage, and K is
the number of averages.

Source: huawei-noah, `tnt_pytorch/pyramid_tnt.py`.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_flax.core.errors import InputError
from tnt_flax.models.kernels import select
from tnt_flax.models.kernels.mixed_precision import add, matmul
from tnt_flax.models.layers import (
    Dense,
    LayerNorm,
    MatmulFn,
    TransformerBlock,
    check_choices_and_rates,
    check_images,
    drop_path_rates,
    position_table,
    resample,
)
from tnt_flax.models.network import BlockLayout, Grid, Images
from tnt_flax.models.scan import scan_blocks
from tnt_flax.models.tnt_blocks import Sentences, TNTBlock, Words, WordsToSentences, cut_patches

WIDENING = (1, 2, 4, 4)  # widths and heads of each stage, relative to the first
REDUCTION = (4, 2, 1, 1)  # each stage attends to averages of squares with this side
PATCH = 8  # pixels, each side of a sentence of the first stage
SIDE = 4  # words, each side of a sentence
IMPLEMENTATIONS = ("auto", "reference", "cpu", "gpu")  # "auto": "cpu" on CPUs, else "reference"

Maps = Float[Array, "B h w C"]

# Over all words of a sentence and all their channels at once.
SentenceNorm = functools.partial(LayerNorm, reduction_axes=(-2, -1), feature_axes=(-2, -1))

Conv3x3 = functools.partial(
    nn.Conv,
    kernel_size=(3, 3),
    padding=((1, 1), (1, 1)),  # torch's padding=1; "SAME" would shift windows of stride 2
    kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
)


def stage_grids(grid: Grid) -> list[Grid]:
    """Returns the grid of every stage, given that of the first."""
    grids = [grid]
    for _ in WIDENING[1:]:
        rows, columns = grids[-1]
        grids.append((-(-rows // 2), -(-columns // 2)))
    return grids


def block_groups(depth: int) -> list[tuple[int, int]]:
    """Returns (first block, end) of a stage's blocks with words, then of those without.

    The first block has words; in a stage of more than six blocks, the first two.
    """
    with_words = 2 if depth > 6 else 1
    return [(0, with_words)] + [(with_words, depth)] * (with_words < depth)


# -- Stem, and what lies between stages


class BatchNorm(nn.Module):
    """Normalizes every channel by its mean and variance, as torch.nn.BatchNorm2d does.

    With `train` and a mutable collection `batch_stats`, mean and variance are those of the batch,
    and the running averages are updated. Otherwise the running averages are used ("frozen"). As in
    torch, and unlike flax's BatchNorm, the running variance is the unbiased one, scaled by
    n / (n - 1). `count` is the number of batches (torch's `num_batches_tracked`); nothing reads it.

    Under `jax.jit` the statistics are those of the global batch, on any number of devices (torch's
    SyncBatchNorm). The official recipe normalizes the batch of each GPU apart.
    """

    dtype: DTypeLike = jnp.float32  # of the result; statistics are computed in float32
    epsilon: float = 1e-5
    momentum: float = 0.1  # weight of the new value, as in torch

    @nn.compact
    def __call__(self, x: Float[Array, "*batch W"], *, train: bool) -> Float[Array, "*batch W"]:
        width = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, width)
        running_var = self.variable("batch_stats", "var", jnp.ones, width)
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)
        expand = lambda values: jnp.broadcast_to(values, x.shape)
        x = x.astype(jnp.float32)
        if train and self.is_mutable_collection("batch_stats"):
            axes = tuple(range(x.ndim - 1))
            mean = x.mean(axes)
            # Two passes: E[x^2] - E[x]^2 loses digits.
            var = jnp.square(x - expand(mean)).mean(axes)
            values = math.prod(x.shape[:-1])
            for running, new in ((running_mean, mean), (running_var, var * values / (values - 1))):
                new = jax.lax.stop_gradient(new)
                running.value = (1 - self.momentum) * running.value + self.momentum * new
            count.value = count.value + 1
        else:
            mean, var = running_mean.value, running_var.value
        x = (x - expand(mean)) * expand(jax.lax.rsqrt(var + self.epsilon) * scale) + expand(bias)
        return x.astype(self.dtype)


class ConvNormReLU(nn.Module):
    """3x3 convolution, BatchNorm and ReLU."""

    features: int
    stride: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Images, *, train: bool) -> Maps:
        x = Conv3x3(self.features, strides=self.stride, dtype=self.dtype, name="conv")(x)
        return nn.relu(BatchNorm(self.dtype, name="batch_norm")(x, train=train))


class Stem(nn.Module):
    """Maps images (B, H, W, channels) to words (B, N, M, C) and sentences (B, N, D)."""

    outer_dim: int
    inner_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Images, *, train: bool) -> tuple[Words, Sentences]:
        conv = functools.partial(ConvNormReLU, dtype=self.dtype)
        shared = conv(2 * self.inner_dim, 2, name="shared")(images, train=train)
        words = conv(self.inner_dim, 1, name="words")(shared, train=train)
        words = cut_patches(words, SIDE)
        words = words.reshape(*words.shape[:2], SIDE * SIDE, self.inner_dim)
        x = conv(4 * self.inner_dim, 2, name="sentences_0")(shared, train=train)
        x = conv(8 * self.inner_dim, 2, name="sentences_1")(x, train=train)
        x = conv(self.outer_dim, 1, name="sentences_2")(x, train=train)
        return words, x.reshape(x.shape[0], -1, self.outer_dim)


class Merge(nn.Module):
    """LayerNorm of tokens, then a 3x3 convolution of stride 2 over maps of them."""

    features: int
    to_maps: Callable[[Array], Array]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "B N *words W"]) -> Float[Array, "maps h w C"]:
        x = LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(tokens)
        conv = Conv3x3(self.features, strides=2, dtype=self.dtype, name="conv")
        return conv(self.to_maps(x))


def word_maps(words: Words, grid: Grid) -> Float[Array, "maps 8 8 C"]:
    """Returns a map of the words of each 2x2 sentences, padded with zeros where `grid` is odd."""
    batch, _, _, width = words.shape
    rows, columns = grid
    x = words.reshape(batch, rows, columns, SIDE, SIDE, width)
    x = jnp.pad(x, ((0, 0), (0, rows % 2), (0, columns % 2), (0, 0), (0, 0), (0, 0)))
    x = x.reshape(batch, -(-rows // 2), 2, -(-columns // 2), 2, SIDE, SIDE, width)
    x = x.transpose(0, 1, 3, 2, 5, 4, 6, 7)  # rows: sentence, then word; columns likewise
    return x.reshape(-1, 2 * SIDE, 2 * SIDE, width)


class Averages(nn.Module):
    """Averages squares of sentences and projects them: (B, N, D) to (B, K, D).

    Rows and columns beyond the last whole square are ignored.
    """

    ratio: int  # side of a square, in sentences
    grid: Grid
    dtype: DTypeLike = jnp.float32
    matmul_fn: MatmulFn = matmul
    norm_layer: Callable[..., nn.Module] = LayerNorm

    @nn.compact
    def __call__(self, x: Sentences) -> Float[Array, "B K D"]:
        batch, _, width = x.shape
        square = (self.ratio, self.ratio)
        x = x.reshape(batch, *self.grid, width)
        x = nn.avg_pool(x, window_shape=square, strides=square).reshape(batch, -1, width)
        x = Dense(width, dtype=self.dtype, matmul_fn=self.matmul_fn, name="dense")(x)
        return self.norm_layer(epsilon=1e-5, dtype=self.dtype, name="norm")(x)


class Stage(nn.Module):
    """A stage's blocks, which share one table of relative positions.

    Consecutive equal blocks are one group, stored and run as a stack, as in TNT.
    """

    depth: int
    grid: Grid
    ratio: int  # see REDUCTION
    remat: bool
    unroll: bool

    @nn.compact
    def __call__(
        self,
        block_with_words: TNTBlock,
        words: Words,
        sentences: Sentences,
        rates: Float[Array, " depth"] | None,
        train: bool,
    ) -> tuple[Words, Sentences]:
        rows, columns = self.grid
        averages = (rows // self.ratio) * (columns // self.ratio)
        shape = (1, block_with_words.outer.num_heads, rows * columns, averages)
        init = nn.initializers.normal(1.0)
        relative_pos = position_table(self, "relative_pos", shape, init)

        for start, stop in block_groups(self.depth):
            inner = None if start else block_with_words.inner
            block = block_with_words.clone(inner=inner, name=f"blocks_{start}")
            if self.is_initializing():
                init_stack(self, block, stop - start, words, sentences, None, relative_pos)
            words, sentences = scan_blocks(
                self,
                block,
                stop - start,
                (words, sentences),
                None if rates is None else rates[start:stop],
                relative_pos,
                train=train,
                remat=self.remat,
                unroll=self.unroll,
            )
        return words, sentences


def init_stack(stage: Stage, block: TNTBlock, length: int, *args: Any) -> None:
    """Creates the parameters of `length` blocks with the random keys of `nn.vmap`.

    `scan_blocks` would derive other keys, which would change the initial values of a seed.
    """

    def init(block, *args):
        block(*args, train=False)

    stacked = dict(variable_axes={"params": 0}, split_rngs={"params": True})
    init = nn.vmap(init, **stacked, in_axes=None, axis_size=length)
    init(block.copy(parent=stage, name=block.name), *args)


class PyramidTNT(nn.Module):
    """Maps images (B, H, W, channels) to logits (B, num_classes); without head to (B, 4 D).

    The image size is that of the images given to `init`; both sides must be multiples of 8, and at
    least 32. In training, pass `mutable=["batch_stats"]` to `apply` and keep what it returns;
    otherwise the stem's BatchNorms stay frozen.

    Raises:
        InputError: images that are not floats of rank 4, not divisible by 8, too small or of
            another size than the weights; an unknown `remat` or implementation; a rate outside
            [0, 1); other than four stages.
    """

    # -- Architecture; widths and heads are those of the first stage
    outer_dim: int
    inner_dim: int
    outer_heads: int
    inner_heads: int
    depths: tuple[int, ...]  # blocks of the four stages
    num_classes: int = 1000  # 0: no head
    mlp_ratio: float = 4.0
    se: bool = False  # squeeze-excite after the outer MLP
    layer_scale: bool = False  # LayerScale of the updates of both transformers (DeiT-III)

    # -- Regularization
    dropout: float = 0.0  # of sentence positions, attention outputs and MLPs
    attention_dropout: float = 0.0
    drop_path: float = 0.0  # of the last block, increasing linearly from 0 in the first
    uniform_drop_path: bool = False  # the same rate in every block (DeiT-III)

    # -- Execution: same function, see `models.kernels.select`
    dtype: DTypeLike = jnp.float32  # of the computation; weights, norms, softmax stay float32
    remat: str = "auto"  # what the backward pass computes again to save memory
    unroll: bool = False  # compile every block separately, see `models.scan`
    inner_impl: str = "auto"  # implementation of the inner transformer
    outer_impl: str = "auto"  # implementation of the outer transformer

    variants: ClassVar = {"pyramid": {}}
    base_name: ClassVar = "ptnt_s_patch16_256"
    has_class_token: ClassVar = False
    min_grid: ClassVar = REDUCTION[0]
    stem_kernel: ClassVar = ("stem", "shared", "conv", "kernel")
    patch_size: ClassVar = PATCH
    head_bias: ClassVar = True

    @nn.compact
    def __call__(self, images: Images, *, train: bool = False) -> Float[Array, "B out"]:
        self.check_fields()
        check_images(images, PATCH)
        height, width = images.shape[1:3]
        if min(height, width) < PATCH * self.min_grid:
            raise InputError(f"images of {height}x{width} are too small: use at least 32 pixels")
        grids = stage_grids((height // PATCH, width // PATCH))
        words, sentences = self.embed(images.astype(self.dtype), train)

        rates = [None] * len(grids)
        if train and self.drop_path:
            ends = list(itertools.accumulate(self.depths))
            rates = jnp.split(drop_path_rates(self), ends[:-1])
        for i, (grid, own_rates) in enumerate(zip(grids, rates, strict=True)):
            if i:
                words, sentences = self.merge(i, words, sentences, grids[i - 1])
            loop = select.remats_blocks(self.remat), self.unroll
            stage = Stage(self.depths[i], grid, REDUCTION[i], *loop, name=f"stages_{i}")
            block = self.make_block(i, grid, train)
            words, sentences = stage(block, words, sentences, own_rates, train)

        norm = LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")
        features = norm(sentences).mean(axis=1)
        if not self.num_classes:
            return features.astype(jnp.float32)
        return Dense(self.num_classes, dtype=self.dtype, name="head")(features).astype(jnp.float32)

    def embed(self, images: Images, train: bool) -> tuple[Words, Sentences]:
        """Returns the words and sentences that the first stage reads."""
        stem = Stem(self.outer_dim, self.inner_dim, self.dtype, name="stem")
        words, sentences = stem(images, train=train)
        word_pos = position_table(self, "word_pos", (1, *words.shape[2:]))
        words = add(words, word_pos[:, None])  # the same for every sentence
        sentence_pos = position_table(self, "sentence_pos", (1, *sentences.shape[1:]))
        # Dropout drops positions, not sentences, and the same ones for all images.
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        return words, add(sentences, dropout(sentence_pos))

    def merge(self, i: int, words: Words, sentences: Sentences, grid: Grid) -> tuple[Array, Array]:
        """Returns the words and sentences that stage `i` reads; `grid` is that of stage i - 1."""
        batch, _, num_words, _ = words.shape
        to_map = lambda x: x.reshape(batch, *grid, x.shape[-1])
        to_word_maps = functools.partial(word_maps, grid=grid)
        merge = functools.partial(Merge, dtype=self.dtype)
        inner_dim = WIDENING[i] * self.inner_dim
        outer_dim = WIDENING[i] * self.outer_dim
        words = merge(inner_dim, to_word_maps, name=f"word_merges_{i - 1}")(words)
        sentences = merge(outer_dim, to_map, name=f"sentence_merges_{i - 1}")(sentences)
        words = words.reshape(batch, -1, num_words, words.shape[-1])
        return words, sentences.reshape(batch, -1, sentences.shape[-1])

    def make_block(self, i: int, grid: Grid, train: bool) -> TNTBlock:
        """Returns a block with words of stage `i`, unbound."""
        common = dict(
            mlp_ratio=self.mlp_ratio,
            layer_scale=self.layer_scale,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            dtype=self.dtype,
            parent=None,
        )
        widening = WIDENING[i]
        reduce = Averages(REDUCTION[i], grid, self.dtype, parent=None)
        block = TNTBlock(
            inner=TransformerBlock(widening * self.inner_heads, norm_layer=SentenceNorm, **common),
            proj=WordsToSentences(widening * self.outer_dim, dtype=self.dtype, parent=None),
            outer=TransformerBlock(
                widening * self.outer_heads,
                se=self.se,
                reduce=reduce if REDUCTION[i] > 1 else None,
                **common,
            ),
            parent=None,
        )
        if self.is_initializing():
            return block
        inner, outer = map(select.resolve_auto, (self.inner_impl, self.outer_impl))
        has_dropout = train and (self.dropout or self.attention_dropout)
        if inner == "gpu" and (has_dropout or self.is_mutable_collection("intermediates")):
            inner = "reference"  # "gpu" has no dropout of words and sows no attention weights
        count = math.prod(grid)
        return select.implement(block, inner, outer, num_sentences=count, num_tokens=count)

    def check_fields(self) -> None:
        impls = dict(inner_impl=IMPLEMENTATIONS, outer_impl=IMPLEMENTATIONS)
        check_choices_and_rates(self, remat=select.REMAT, **impls)
        if len(self.depths) != len(WIDENING) or min(self.depths) < 1:
            raise InputError(f"depths={self.depths} must be the blocks of {len(WIDENING)} stages")

    # -- The protocol `models.network.Network`

    @property
    def depth(self) -> int:
        return sum(self.depths)

    @property
    def num_features(self) -> int:
        return WIDENING[-1] * self.outer_dim

    @property
    def map_blocks(self) -> Sequence[int]:
        """The last block of each stage."""
        return tuple(end - 1 for end in itertools.accumulate(self.depths))

    @property
    def default_maps(self) -> tuple[int, ...]:
        return tuple(range(len(self.depths)))

    def stacks(self) -> list[tuple[tuple[str, ...], int]]:
        return [
            ((f"stages_{i}", f"blocks_{start}"), stop - start)
            for i, depth in enumerate(self.depths)
            for start, stop in block_groups(depth)
        ]

    def block_layouts(self, grid: Grid) -> list[BlockLayout]:
        stages = zip(stage_grids(grid), self.depths, REDUCTION, strict=True)
        return [
            BlockLayout(own_grid, 2**i, ratio)
            for i, (own_grid, depth, ratio) in enumerate(stages)
            for _ in range(depth)
        ]

    def resampled_positions(
        self, params: Mapping[str, Any], old: Grid, new: Grid
    ) -> dict[tuple[str, ...], Array]:
        """Resamples relative positions along four axes: rows and columns of queries and keys."""
        found = {("sentence_pos",): resample(jnp.asarray(params["sentence_pos"]), 1, [old], [new])}
        grids = zip(stage_grids(old), stage_grids(new), REDUCTION, strict=True)
        for i, (*both, ratio) in enumerate(grids):
            before, after = ([grid, (grid[0] // ratio, grid[1] // ratio)] for grid in both)
            table = jnp.asarray(params[f"stages_{i}"]["relative_pos"])
            found[f"stages_{i}", "relative_pos"] = resample(table, 2, before, after)
        return found
