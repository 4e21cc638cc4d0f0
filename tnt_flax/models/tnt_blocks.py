# SPDX-License-Identifier: Apache-2.0
"""A block of TNT, and how words become sentences. Shape letters: `tnt_flax.models.tnt`."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_flax.models.kernels.lanes import Lanes
from tnt_flax.models.layers import Dense, LayerNorm, Primitives, TransformerBlock
from tnt_flax.models.word_embedding import Words


class WordsToSentences(nn.Module):
    """Projects the M words of every sentence to one vector: (B, N, M, C) to (B, N, D)."""

    outer_dim: int
    norm_each_word: bool = False
    use_bias: bool = False
    norm_out: bool = True
    norm_eps: float = 1e-5
    dtype: DTypeLike = jnp.float32
    primitives: Primitives = Primitives()

    @nn.compact
    def __call__(self, words: Words) -> Float[Array, "B N D"]:
        norm = functools.partial(LayerNorm, epsilon=self.norm_eps, dtype=self.dtype)
        norm_in = norm(name="norm1")
        words = norm_in(words) if self.norm_each_word else words
        batch, sentences, num_words, width = words.shape
        x = words.reshape(batch, sentences, num_words * width)  # word 0's channels, word 1's, ...
        x = x if self.norm_each_word else norm_in(x)
        x = Dense(
            self.outer_dim,
            use_bias=self.use_bias,
            dtype=self.dtype,
            matmul=self.primitives.matmul,
            name="dense",
        )(x)
        return norm(name="norm2")(x) if self.norm_out else x


class TNTBlock(nn.Module):
    """Attend within sentences, write words into sentences, attend across sentences.

    Without `inner` (of the words) it is a plain ViT block: a "vanilla" block of the paper's
    Table 5, which leaves the words alone. With `class_token_only` the other sentences are read but
    not updated, and not returned.
    """

    inner: Callable[..., nn.Module] | None
    words_to_sentences: Callable[..., WordsToSentences]
    outer: Callable[..., TransformerBlock]
    remat_inner: bool = False

    @nn.compact
    def __call__(
        self,
        words: Words | Lanes,
        sentences: Float[Array, "B T D"],
        drop_path_rate: Float[Array, ""] | None,
        *,
        class_token_only: bool = False,
        train: bool,
    ) -> tuple[Words | Lanes, Float[Array, "B queries D"]]:
        if self.inner:
            attend_within = lambda inner, words: inner(words, drop_path_rate, train=train)
            attend_within = nn.remat(attend_within) if self.remat_inner else attend_within
            words = attend_within(self.inner(name="inner"), words)
            update = self.words_to_sentences(name="proj")(words)
            update = update.reshape(sentences[:, 1:].shape)  # words on lanes know no batch
            sentences = sentences.at[:, 1:].add(update)  # index 0 is the class token
        queries = 1 if class_token_only else None
        outer = self.outer(name="outer")
        sentences = outer(sentences, drop_path_rate, queries=queries, train=train)
        self.sow("intermediates", "words", words)
        self.sow("intermediates", "sentences", sentences)
        self.sow("maps", "sentences", sentences)
        return words, sentences
