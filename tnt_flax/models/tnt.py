# SPDX-License-Identifier: Apache-2.0
"""Transformer in Transformer (Han et al., NeurIPS 2021, arXiv 2103.00112).

An image is N sentences (16x16 patches) of M words (4x4 pixels). In every block the inner
transformer attends among the words of each sentence, the words of a sentence are projected onto
it, and the outer transformer attends among the sentences. Letters in shapes, here and everywhere:

    B images   N sentences per image   M words per sentence   C word width   D sentence width

The defaults are the official network (huawei-noah, `tnt_pytorch/tnt.py`); each field that a
published lineage sets otherwise says which lineage does.
"""

import functools
import itertools
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_flax.errors import InputError
from tnt_flax.models.layers import GELU, Dense, LayerNorm, TransformerBlock
from tnt_flax.models.word_embedding import Images, WordEmbedding, Words

token_init = nn.initializers.normal(0.02)


class WordsToSentences(nn.Module):
    """Projects the M words of every sentence to one vector: (B, N, M, C) to (B, N, D)."""

    outer_dim: int
    norm_each_word: bool = False
    use_bias: bool = False
    norm_out: bool = True
    norm_eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, words: Words) -> Float[Array, "B N D"]:
        norm = functools.partial(LayerNorm, epsilon=self.norm_eps, dtype=self.dtype)
        norm_in = norm(name="norm1")
        words = norm_in(words) if self.norm_each_word else words
        batch, sentences, num_words, width = words.shape
        x = words.reshape(batch, sentences, num_words * width)  # word 0's channels, word 1's, ...
        x = x if self.norm_each_word else norm_in(x)
        x = Dense(self.outer_dim, use_bias=self.use_bias, dtype=self.dtype, name="dense")(x)
        return norm(name="norm2")(x) if self.norm_out else x


class TNTBlock(nn.Module):
    """Attend within sentences, write words into sentences, attend across sentences.

    Without `transformer` for words (`inner_heads == 0`) it is a plain ViT block: a "vanilla" block
    of the paper's Table 5, which leaves the words alone.
    """

    transformer: Callable[..., TransformerBlock]
    words_to_sentences: Callable[..., WordsToSentences]
    inner_heads: int
    outer_heads: int
    se: bool = False

    @nn.compact
    def __call__(
        self,
        words: Words,
        sentences: Float[Array, "B N+1 D"],
        drop_path_rate: Float[Array, ""] | None,
        *,
        train: bool,
    ) -> tuple[Words, Float[Array, "B N+1 D"]]:
        if self.inner_heads:
            inner = self.transformer(self.inner_heads, name="inner")
            words = inner(words, drop_path_rate, train=train)
            update = self.words_to_sentences(name="proj")(words)
            sentences = sentences.at[:, 1:].add(update)  # index 0 is the class token
        outer = self.transformer(self.outer_heads, se=self.se, name="outer")
        sentences = outer(sentences, drop_path_rate, train=train)
        self.sow("intermediates", "words", words)
        self.sow("intermediates", "sentences", sentences)
        return words, sentences


class TNT(nn.Module):
    """Images (B, H, W, channels) to logits (B, num_classes); to features (B, D) without classes.

    The image size and the number of channels are those of the images given to `init`; both sides
    must be multiples of `patch_size`. Consecutive equal blocks are one scanned group: group
    `blocks_{i}` holds the parameters of blocks i, i+1, ... stacked on a leading axis.
    `block_outputs` undoes the stacking for what comes out of the blocks.

    Raises:
        InputError: images that are not floats of rank 4, not divisible by `patch_size`, or of other
            size than the weights; unknown `gelu` or `remat`; a rate outside [0, 1); an index of
            `vanilla_blocks` outside the depth.
    """

    outer_dim: int
    inner_dim: int
    outer_heads: int
    inner_heads: int
    depth: int = 12
    num_classes: int = 1000
    patch_size: int = 16
    inner_stride: int = 4  # pixels from word to word
    mlp_ratio: float = 4.0
    se: bool = False  # squeeze-excite after the outer MLP (paper Table 12)
    vanilla_blocks: tuple[int, ...] = ()  # blocks without an inner branch, from 0 (paper Table 5)
    dropout: float = 0.0  # of positions, attention outputs and MLPs
    attention_dropout: float = 0.0
    drop_path: float = 0.0  # of the last block, growing linearly from 0 in the first
    dtype: DTypeLike = jnp.float32  # of the computation; weights, norms, softmax stay float32
    remat: str = "block"  # "block" recomputes a block's activations in the backward pass, or "none"
    # What the published lineages do differently.
    conv_first: bool = False  # convolve, then cut patches: timm legacy, mmpretrain, MindSpore Pets
    norm_each_word: bool = False  # normalise C before proj, not M * C: timm legacy, mmpretrain
    proj_bias: bool = False  # of the blocks' proj: timm legacy, mmpretrain, MindSpore Pets
    proj_norm: bool = True  # the norm after proj: not in timm legacy, mmpretrain, MindSpore Pets
    stem_norm: bool = True  # the norm after the stem's proj: not in MindSpore Pets
    zero_sentences: bool = False  # sentences start as zeros, the stem adds to them: MindSpore Pets
    qkv_bias: bool = False  # MindSpore Pets
    output_bias: bool = True  # of the stem, attention outputs, fc2, head: not in MindSpore ImageNet
    norm_eps: float = 1e-5  # 1e-7 in both MindSpore forms
    gelu: str = "erf"  # "tanh" in both MindSpore forms

    @nn.compact
    def __call__(self, images: Images, *, train: bool = False) -> Float[Array, "B out"]:
        self.check_fields()
        self.check_images(images)
        images = images.astype(self.dtype)

        # Words, and the sentences they begin as.
        embed = WordEmbedding(
            self.inner_dim,
            self.patch_size,
            self.inner_stride,
            self.conv_first,
            self.output_bias,
            self.dtype,
            name="word_embed",
        )
        words = embed(images)
        words = words + self.positions("word_pos", words)[:, None]  # the same for every sentence
        words_to_sentences = functools.partial(
            WordsToSentences, self.outer_dim, norm_eps=self.norm_eps, dtype=self.dtype
        )
        stem = words_to_sentences(use_bias=self.output_bias, norm_out=self.stem_norm, name="proj")
        stem_sentences = stem(words)

        # The class token goes first, then the positions are added.
        cls_token = self.param("cls_token", token_init, (1, 1, self.outer_dim))
        cls_token = jnp.asarray(cls_token, self.dtype)  # weights read from a file may be numpy's
        cls_token = jnp.broadcast_to(cls_token, (images.shape[0], 1, self.outer_dim))
        start = jnp.zeros_like(stem_sentences) if self.zero_sentences else stem_sentences
        sentences = jnp.concatenate([cls_token, start], axis=1)
        sentences = sentences + self.positions("sentence_pos", sentences)
        sentences = nn.Dropout(self.dropout, deterministic=not train)(sentences)
        if self.zero_sentences:
            sentences = sentences.at[:, 1:].add(stem_sentences)

        transformer = functools.partial(
            TransformerBlock,
            mlp_ratio=self.mlp_ratio,
            qkv_bias=self.qkv_bias,
            output_bias=self.output_bias,
            norm_eps=self.norm_eps,
            gelu=self.gelu,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            dtype=self.dtype,
        )
        words_to_sentences = functools.partial(
            words_to_sentences,
            norm_each_word=self.norm_each_word,
            use_bias=self.proj_bias,
            norm_out=self.proj_norm,
        )
        rates = jnp.linspace(0, self.drop_path, self.depth) if train and self.drop_path else None
        for start, stop, vanilla in self.groups():
            block = TNTBlock(
                transformer,
                words_to_sentences,
                0 if vanilla else self.inner_heads,
                self.outer_heads,
                self.se,
                name=f"blocks_{start}",
            )
            group_rates = None if rates is None else rates[start:stop]
            words, sentences = self.scan(block, stop - start, words, sentences, group_rates, train)

        norm = LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")
        features = norm(sentences[:, 0])  # of the class token alone: no other token is used
        if not self.num_classes:
            return features.astype(jnp.float32)
        head = Dense(self.num_classes, use_bias=self.output_bias, dtype=self.dtype, name="head")
        return head(features).astype(jnp.float32)

    def scan(self, block, length, words, sentences, rates, train):
        """Runs `length` blocks that share one structure; their parameters are stacked."""

        def body(block, tokens, rate):
            return block(*tokens, rate, train=train), None

        if self.remat == "block":
            body = nn.remat(body, prevent_cse=False)  # scan already keeps XLA from merging the two
        scanned = nn.scan(
            body,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            length=length,
        )
        return scanned(block, (words, sentences), rates)[0]

    def groups(self) -> Iterator[tuple[int, int, bool]]:
        """Yields (first block, end, vanilla) for every run of equal blocks."""
        start = 0
        for vanilla, run in itertools.groupby(i in self.vanilla_blocks for i in range(self.depth)):
            stop = start + len(list(run))
            yield start, stop, vanilla
            start = stop

    def positions(self, name: str, tokens: Array) -> Array:
        """The position table `name`, one row per token, the same for every image."""
        shape = (1, *tokens.shape[-2:])
        if self.has_variable("params", name):
            found = self.get_variable("params", name).shape
            if found != shape:
                raise InputError(
                    f"the weights' {name} has shape {tuple(found)}, but these images and this "
                    f"patch size need {shape}: give images of the size the weights were made for"
                )
        return jnp.asarray(self.param(name, token_init, shape), self.dtype)

    def check_images(self, images: Array) -> None:
        if images.ndim != 4:
            raise InputError(f"images must be [B, H, W, channels], not {list(images.shape)}")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(f"images must be normalized to floats first, these are {images.dtype}")
        height, width = images.shape[1:3]
        if not height or not width or height % self.patch_size or width % self.patch_size:
            raise InputError(
                f"image size {height}x{width} is not divisible by patch size {self.patch_size}"
            )

    def check_fields(self) -> None:
        if self.gelu not in GELU:
            raise InputError(f"gelu={self.gelu!r} is none of {sorted(GELU)}")
        if self.remat not in ("none", "block"):
            raise InputError(f"remat={self.remat!r} is neither 'none' nor 'block'")
        if self.conv_first and self.patch_size % self.inner_stride:
            raise InputError(
                f"conv_first needs a patch size ({self.patch_size}) divisible by the inner stride "
                f"({self.inner_stride})"
            )
        for rate in ("dropout", "attention_dropout", "drop_path"):
            if not 0 <= getattr(self, rate) < 1:
                raise InputError(f"{rate}={getattr(self, rate)} is outside [0, 1)")
        unknown = [i for i in self.vanilla_blocks if not 0 <= i < self.depth]
        if unknown:
            raise InputError(f"vanilla_blocks {unknown} are outside the {self.depth} blocks")


def block_outputs(model: TNT, variables: dict, images: Images) -> list[dict[str, Array]]:
    """What every block of `model` computes for `images`, first block first.

    Returns one dictionary per block, in evaluation mode:
        words (B, N, M, C) and sentences (B, N + 1, D): the block's outputs, class token first;
        outer_attention (B, heads, N + 1, N + 1): softmax weights, queries on the last but one axis;
        inner_attention (B, N, heads, M, M): likewise, absent from vanilla blocks.
    Under `jax.jit`, what the caller does not use costs nothing.
    """
    _, state = model.apply(variables, images, train=False, mutable=["intermediates"])
    blocks = []
    for start, stop, _ in model.groups():
        group = state["intermediates"][f"blocks_{start}"]
        stacked = {
            "words": group["words"][0],
            "sentences": group["sentences"][0],
            "outer_attention": group["outer"]["attention"]["weights"][0],
        }
        if "inner" in group:
            stacked["inner_attention"] = group["inner"]["attention"]["weights"][0]
        blocks += [{name: x[i] for name, x in stacked.items()} for i in range(stop - start)]
    return blocks
