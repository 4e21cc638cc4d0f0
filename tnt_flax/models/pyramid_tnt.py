# SPDX-License-Identifier: Apache-2.0
"""PyramidTNT (Han et al., arXiv 2201.00978): TNT in four stages of ever fewer, wider sentences.

A convolutional stem reads sentences (8x8 pixels) and their words. Between two stages 2x2
neighbouring sentences become one, and so do their words, of which every sentence keeps 4x4. Only
the first block or two of a stage read words. All sentences attend to averages of sentences, by
content and by a learned table of their positions. There is no class token: the head reads the mean
over the sentences. Letters in shapes: `tnt_flax.models.tnt`; N is now that of a stage, and K is the
number of averages.

Source: huawei-noah, `tnt_pytorch/pyramid_tnt.py`.
"""

import functools
import itertools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_flax.core.errors import InputError
from tnt_flax.models.checks import check_images, check_known, check_rates, positions
from tnt_flax.models.kernels.mixed_precision import add
from tnt_flax.models.kernels.platform import platform
from tnt_flax.models.kernels.select import PRIMITIVES, REMAT, choose_remat
from tnt_flax.models.layers import Dense, LayerNorm, Primitives, TransformerBlock
from tnt_flax.models.pyramid_layers import Averages, Grid, Merge, Sentences, Stem, tiles
from tnt_flax.models.tnt_blocks import WordsToSentences
from tnt_flax.models.word_embedding import Images, Words

WIDENING = (1, 2, 4, 4)  # widths and heads of the stages, in those of the first
REDUCTION = (4, 2, 1, 1)  # of a stage: the side of the squares of sentences that are averaged
PATCH = 8  # pixels, each side of a sentence of the first stage
IMPLEMENTATIONS = ("auto", "reference", "cpu")  # "auto" is "reference" on GPUs and TPUs

# Over all words of a sentence and all their channels at once.
SentenceNorm = functools.partial(LayerNorm, reduction_axes=(-2, -1), feature_axes=(-2, -1))
token_init = nn.initializers.normal(0.02)


def stage_grids(grid: Grid) -> list[Grid]:
    """The sentences of every stage, of which the first has `grid`."""
    grids = [grid]
    for _ in WIDENING[1:]:
        rows, columns = grids[-1]
        grids.append((-(-rows // 2), -(-columns // 2)))
    return grids


def block_groups(depth: int) -> list[tuple[int, int]]:
    """(first block, end) of a stage's blocks that read words, and of those that do not.

    The first block reads words, in a deep stage the first two.
    """
    with_words = 2 if depth > 6 else 1
    return [(0, with_words)] + [(with_words, depth)] * (with_words < depth)


class PyramidBlock(nn.Module):
    """As `TNTBlock`, but every sentence has words: there is no class token.

    Without `inner` it leaves the words alone. Called as `nn.scan` wants it: what the blocks hand on
    comes first and goes back first.
    """

    inner: Callable[..., nn.Module] | None
    words_to_sentences: Callable[..., WordsToSentences]
    outer: Callable[..., TransformerBlock]
    remat_inner: bool
    train: bool

    @nn.compact
    def __call__(
        self,
        tokens: tuple[Words, Sentences],
        drop_path_rate: Float[Array, ""] | None,
        relative_pos: Float[Array, "1 heads N K"],
    ) -> tuple[tuple[Words, Sentences], None]:
        words, sentences = tokens
        if self.inner:
            attend_within = lambda inner, words: inner(words, drop_path_rate, train=self.train)
            attend_within = nn.remat(attend_within) if self.remat_inner else attend_within
            words = attend_within(self.inner(name="inner"), words)
            sentences = sentences + self.words_to_sentences(name="proj")(words)
        outer = self.outer(name="outer")
        sentences = outer(sentences, drop_path_rate, bias=relative_pos, train=self.train)
        self.sow("intermediates", "words", words)
        self.sow("intermediates", "sentences", sentences)
        return (words, sentences), None


class Stage(nn.Module):
    """Equal blocks, of which the first ones have words, around one table of relative positions.

    Consecutive equal blocks are one scanned group, as in TNT.
    """

    outer_dim: int
    heads: int
    depth: int
    ratio: int  # see REDUCTION
    grid: Grid
    transformer: Callable[..., TransformerBlock]
    inner: Callable[..., TransformerBlock]
    primitives: Primitives
    remat: str
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, words: Words, sentences: Sentences, rates: Float[Array, " depth"] | None, train: bool
    ) -> tuple[Words, Sentences]:
        rows, columns = self.grid
        averages = (rows // self.ratio) * (columns // self.ratio)
        shape = (1, self.heads, rows * columns, averages)
        # float32 whatever `dtype` is, as the logits that it is added to
        init = nn.initializers.normal(1.0)
        relative_pos = positions(self, "relative_pos", shape, init)

        dense = functools.partial(Dense, matmul=self.primitives.matmul)
        reduce = functools.partial(Averages, self.ratio, self.grid, dense, self.dtype)
        outer = functools.partial(
            self.transformer, self.heads, reduce=reduce if self.ratio > 1 else None
        )
        words_to_sentences = functools.partial(
            WordsToSentences, self.outer_dim, dtype=self.dtype, primitives=self.primitives
        )
        block_class = PyramidBlock
        if self.remat == "block":
            # The scan keeps XLA from merging the two.
            block_class = nn.remat(PyramidBlock, prevent_cse=False)
        tokens = (words, sentences)
        for start, stop in block_groups(self.depth):
            blocks = nn.scan(
                block_class,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast),
                length=stop - start,
                check_constancy_invariants=False,  # a second trace, in a form ONNX cannot have
            )(
                self.inner if start == 0 else None,
                words_to_sentences,
                outer,
                self.remat == "inner",
                train,
                name=f"blocks_{start}",
            )
            own_rates = None if rates is None else rates[start:stop]
            tokens, _ = blocks(tokens, own_rates, relative_pos)
        return tokens


class PyramidTNT(nn.Module):
    """Images (B, H, W, channels) to logits (B, num_classes); to features (B, 4 D) without classes.

    The image size is that of the images given to `init`; both sides must be multiples of 8, and at
    least 32. In training, pass `mutable=["batch_stats"]` to `apply` and keep what comes back;
    without, the stem's BatchNorm stays frozen.

    Raises:
        InputError: images that are not floats of rank 4, not divisible by 8, too small or of other
            size than the weights; fields outside of what they may be.
    """

    outer_dim: int  # of the first stage, like the other three
    inner_dim: int
    outer_heads: int
    inner_heads: int
    depths: tuple[int, ...]  # blocks of the four stages
    num_classes: int = 1000
    mlp_ratio: float = 4.0
    se: bool = False  # squeeze-excite after the outer MLP
    dropout: float = 0.0  # of sentence positions, attention outputs and MLPs
    attention_dropout: float = 0.0
    drop_path: float = 0.0  # of the last block, growing linearly from 0 in the first
    dtype: DTypeLike = jnp.float32  # of the computation; weights, norms, softmax stay float32
    remat: str = "auto"  # what is computed twice, to save memory; see `models.implementations`
    inner_impl: str = "auto"  # implementation of the inner transformer: one of IMPLEMENTATIONS
    outer_impl: str = "auto"  # of the outer transformer

    @property
    def patch_size(self) -> int:
        """Pixels, each side of a sentence of the first stage."""
        return PATCH

    @property
    def num_features(self) -> int:
        """Width of what the head reads."""
        return WIDENING[-1] * self.outer_dim

    @property
    def depth(self) -> int:
        return sum(self.depths)

    def stacks(self) -> list[tuple[tuple[str, ...], int]]:
        """Where the parameters of each run of equal blocks are, and how many blocks it has."""
        return [
            ((f"stages_{i}", f"blocks_{start}"), stop - start)
            for i, depth in enumerate(self.depths)
            for start, stop in block_groups(depth)
        ]

    @nn.compact
    def __call__(self, images: Images, *, train: bool = False) -> Float[Array, "B out"]:
        self.check_fields()
        check_images(images, PATCH)
        batch, height, width, _ = images.shape
        if min(height, width) < PATCH * REDUCTION[0]:
            raise InputError(f"images of {height}x{width} are too small: use at least 32 pixels")
        grids = stage_grids((height // PATCH, width // PATCH))
        images = images.astype(self.dtype)

        # Words and sentences, each with its positions.
        stem = Stem(self.outer_dim, self.inner_dim, self.dtype, name="stem")
        words, sentences = stem(images, train=train)
        table = functools.partial(positions, self, init=token_init)
        word_pos = table("word_pos", (1, *words.shape[2:]))
        words = add(words, word_pos[:, None])  # the same for every sentence
        sentence_pos = table("sentence_pos", (1, *sentences.shape[1:]))
        # Dropout drops positions, not sentences, and the same ones for all images.
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        sentences = add(sentences, dropout(sentence_pos))

        # The stages, with the rates of their blocks.
        rates = [None] * len(grids)
        if train and self.drop_path:
            ends = list(itertools.accumulate(self.depths))
            rates = jnp.split(jnp.linspace(0, self.drop_path, self.depth), ends[:-1])
        for i, (grid, own_rates) in enumerate(zip(grids, rates, strict=True)):
            if i:
                words, sentences = self.merge(i, words, sentences, grids[i - 1])
            words, sentences = self.make_stage(i, grid)(words, sentences, own_rates, train)
            if not self.is_initializing():
                self.sow("maps", f"stage_{i}", sentences.reshape(batch, *grid, sentences.shape[-1]))

        norm = LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")
        features = norm(sentences).mean(axis=1)
        if not self.num_classes:
            return features.astype(jnp.float32)
        return Dense(self.num_classes, dtype=self.dtype, name="head")(features).astype(jnp.float32)

    def merge(self, i: int, words: Words, sentences: Sentences, grid: Grid) -> tuple[Array, Array]:
        """The words and sentences that stage `i` begins with; `grid` is the stage before's."""
        batch, _, num_words, _ = words.shape
        to_map = lambda x: x.reshape(batch, *grid, x.shape[-1])
        to_tiles = functools.partial(tiles, grid=grid)
        merge = functools.partial(Merge, dtype=self.dtype)
        inner_dim, outer_dim = WIDENING[i] * self.inner_dim, WIDENING[i] * self.outer_dim
        words = merge(inner_dim, to_tiles, name=f"word_merges_{i - 1}")(words)
        sentences = merge(outer_dim, to_map, name=f"sentence_merges_{i - 1}")(sentences)
        words = words.reshape(batch, -1, num_words, words.shape[-1])
        return words, sentences.reshape(batch, -1, sentences.shape[-1])

    def make_stage(self, i: int, grid: Grid) -> Stage:
        # Which form each transformer takes changes nothing but the time.
        inner_form, outer_form = (
            form if form != "auto" else "cpu" if platform() == "cpu" else "reference"
            for form in (self.inner_impl, self.outer_impl)
        )
        if self.is_initializing():
            inner_form = outer_form = "reference"
        transformer = functools.partial(
            TransformerBlock,
            mlp_ratio=self.mlp_ratio,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            dtype=self.dtype,
        )
        inner = functools.partial(
            transformer,
            WIDENING[i] * self.inner_heads,
            norm=SentenceNorm,
            primitives=PRIMITIVES[inner_form],
        )
        primitives = PRIMITIVES[outer_form]
        return Stage(
            WIDENING[i] * self.outer_dim,
            WIDENING[i] * self.outer_heads,
            self.depths[i],
            REDUCTION[i],
            grid,
            functools.partial(transformer, se=self.se, primitives=primitives),
            inner,
            primitives,
            choose_remat(self.remat),
            self.dtype,
            name=f"stages_{i}",
        )

    def check_fields(self) -> None:
        check_known(self, remat=REMAT, inner_impl=IMPLEMENTATIONS, outer_impl=IMPLEMENTATIONS)
        check_rates(self)
        if len(self.depths) != len(WIDENING) or min(self.depths) < 1:
            raise InputError(f"depths={self.depths} must be the blocks of {len(WIDENING)} stages")
