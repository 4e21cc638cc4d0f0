# SPDX-License-Identifier: Apache-2.0
"""Transformer in Transformer (Han et al., NeurIPS 2021, arXiv 2103.00112).

An image is N sentences (16x16 patches) of M words (4x4 pixels). In every block the inner
transformer attends among the words of each sentence, the words are projected and added to their
sentence, and the outer transformer attends among the sentences. Letters in shapes, throughout:

    B images   N sentences per image   M words per sentence   C word width   D sentence width
    T tokens of the outer transformer: the sentences and the class token

The defaults are those of the official network (huawei-noah, `tnt_pytorch/tnt.py`).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_flax.core.errors import InputError
from tnt_flax.models.kernels import select
from tnt_flax.models.kernels.mixed_precision import add
from tnt_flax.models.layers import (
    GELU,
    Dense,
    TransformerBlock,
    check_choices_and_rates,
    check_images,
    drop_path_rates,
    normal_init,
    position_table,
    resample,
)
from tnt_flax.models.network import BlockLayout, Grid, Images
from tnt_flax.models.scan import scan_blocks
from tnt_flax.models.tnt_blocks import (
    Sentences,
    TNTBlock,
    WordEmbedding,
    Words,
    WordsToSentences,
)

# Four variants were published as TNT. "legacy" is timm before 1.0.16 and mmpretrain, written before
# the authors' code was public. Both MindSpore variants are the authors' own, the first for
# ImageNet, the second for Oxford-IIIT Pets.
VARIANTS: dict[str, dict[str, Any]] = {
    "official": {},
    "legacy": dict(conv_first=True, norm_each_word=True, proj_bias=True, proj_norm=False),
    "mindspore": dict(output_bias=False, norm_eps=1e-7, gelu="tanh"),
    "mindspore_pets": dict(
        conv_first=True,
        qkv_bias=True,
        proj_bias=True,
        proj_norm=False,
        stem_norm=False,
        zero_sentences=True,
        norm_eps=1e-7,
        gelu="tanh",
    ),
}


class TNT(nn.Module):
    """Maps images (B, H, W, channels) to logits (B, num_classes); without head to (B, D).

    Image size and number of channels are those of the images given to `init`; both sides must be
    multiples of `patch_size`. Consecutive equal blocks are one group, stored and run as a stack:
    `blocks_{i}` holds the parameters of blocks i, i + 1, ... on a leading axis. For the outputs of
    single blocks see `models.features`.

    Raises:
        InputError: images that are not floats of rank 4, not divisible by `patch_size`, or of
            another size than the weights; an unknown `gelu`, `remat` or implementation; a rate
            outside [0, 1); an index in `vanilla_blocks` outside the depth.
    """

    # -- Architecture
    outer_dim: int
    inner_dim: int
    outer_heads: int
    inner_heads: int  # 0: no words in any block
    depth: int = 12
    num_classes: int = 1000  # 0: no head
    patch_size: int = 16
    inner_stride: int = 4  # pixels from word to word
    mlp_ratio: float = 4.0
    se: bool = False  # squeeze-excite after the outer MLP (paper, Table 12)
    layer_scale: bool = False  # LayerScale of the updates of both transformers (DeiT-III)
    vanilla_blocks: tuple[int, ...] = ()  # indices of blocks without words (paper, Table 5)

    # -- Regularization
    dropout: float = 0.0  # of sentences with positions, attention outputs and MLPs
    attention_dropout: float = 0.0
    drop_path: float = 0.0  # of the last block, increasing linearly from 0 in the first
    uniform_drop_path: bool = False  # the same rate in every block (DeiT-III)

    # -- Variant: see VARIANTS. proj is the `WordsToSentences` of the blocks or of the stem.
    conv_first: bool = False  # convolve the image, then cut patches; otherwise the reverse
    norm_each_word: bool = False  # blocks: first LayerNorm of proj over C; False: over M * C
    proj_bias: bool = False  # blocks: bias of the dense layer of proj
    proj_norm: bool = True  # blocks: LayerNorm after the dense layer of proj
    stem_norm: bool = True  # stem: LayerNorm after the dense layer of proj
    zero_sentences: bool = False  # add the stem's output after positions and dropout, not before
    qkv_bias: bool = False
    output_bias: bool = True  # of stem, attention outputs, fc2 and head
    norm_eps: float = 1e-5
    gelu: str = "erf"  # or "tanh"

    # -- Execution: same function, see `models.kernels.select`
    dtype: DTypeLike = jnp.float32  # of the computation; weights, norms, softmax stay float32
    remat: str = "auto"  # what the backward pass computes again to save memory
    unroll: bool = False  # compile every block separately, see `models.scan`
    inner_impl: str = "auto"  # implementation of the inner transformer
    outer_impl: str = "auto"  # implementation of the outer transformer

    # -- What loading and export ask of a class, see `models.network.Network`
    variants: ClassVar = VARIANTS
    base_name: ClassVar = "tnt_s_patch16_224"
    has_class_token: ClassVar = True
    min_grid: ClassVar = 1
    stem_kernel: ClassVar = ("word_embed", "conv", "kernel")

    @nn.compact
    def __call__(self, images: Images, *, train: bool = False) -> Float[Array, "B out"]:
        self.check_fields()
        check_images(images, self.patch_size)
        words, sentences = self.embed(images.astype(self.dtype), train)

        inner_impl, outer_impl = self.implementations(words, sentences, train)
        counts = dict(num_sentences=words.shape[1], num_tokens=sentences.shape[1])
        # From here on words and sentences may have the shapes of an implementation.
        words, sentences = select.to_layout(inner_impl, outer_impl, words, sentences, train=train)
        rates = drop_path_rates(self) if train and self.drop_path else None
        # The head reads the class token alone, so the last outer transformer updates that token
        # alone: 6 % fewer FLOPs for TNT-S. Squeeze-excite reads the mean over all tokens.
        last_queries = None if self.se else dict(num_queries=1)
        for start, stop, vanilla in self.groups():
            block = self.make_block(f"blocks_{start}", vanilla)
            words, sentences = scan_blocks(
                self,
                select.implement(block, inner_impl, outer_impl, **counts),
                stop - start,
                (words, sentences),
                None if rates is None else rates[start:stop],
                train=train,
                remat=select.remats_blocks(self.remat),
                unroll=self.unroll,
                last=last_queries if stop == self.depth else None,
            )

        # Norms outside the blocks use `self.outer_impl`: the stem runs before it is resolved.
        norm_layer = select.norm_layer(self.outer_impl)
        norm = norm_layer(epsilon=self.norm_eps, dtype=self.dtype, name="norm")
        features = norm(sentences[:, 0])
        if not self.num_classes:
            return features.astype(jnp.float32)
        head = Dense(self.num_classes, use_bias=self.output_bias, dtype=self.dtype, name="head")
        return head(features).astype(jnp.float32)

    def embed(self, images: Images, train: bool) -> tuple[Words, Sentences]:
        """Returns the words and sentences that the first block reads."""
        embed_words = WordEmbedding(
            inner_dim=self.inner_dim,
            patch_size=self.patch_size,
            stride=self.inner_stride,
            conv_first=self.conv_first,
            use_bias=self.output_bias,
            dtype=self.dtype,
            name="word_embed",
        )
        words = embed_words(images)
        word_pos = position_table(self, "word_pos", (1, *words.shape[2:]))
        words = add(words, word_pos[:, None])  # the same for every sentence
        to_sentences = WordsToSentences(
            self.outer_dim,
            use_bias=self.output_bias,
            norm_out=self.stem_norm,
            norm_eps=self.norm_eps,
            dtype=self.dtype,
            norm_layer=select.norm_layer(self.outer_impl),
            name="proj",
        )
        projected = to_sentences(words)

        cls_token = self.param("cls_token", normal_init, (1, 1, self.outer_dim))
        cls_token = jnp.broadcast_to(cls_token, (images.shape[0], 1, self.outer_dim))
        cls_token = cls_token.astype(self.dtype)
        patches = jnp.zeros_like(projected) if self.zero_sentences else projected
        sentences = jnp.concatenate([cls_token, patches], axis=1)
        sentence_pos = position_table(self, "sentence_pos", (1, *sentences.shape[1:]))
        sentences = add(sentences, sentence_pos)
        sentences = nn.Dropout(self.dropout, deterministic=not train)(sentences)
        if self.zero_sentences:
            sentences = sentences.at[:, 1:].add(projected)
        return words, sentences

    def make_block(self, name: str, vanilla: bool) -> TNTBlock:
        """Returns one block.

        Block and parts are unbound (`parent=None`): `scan_blocks` gives them their parameters.
        """
        common = dict(
            mlp_ratio=self.mlp_ratio,
            layer_scale=self.layer_scale,
            qkv_bias=self.qkv_bias,
            output_bias=self.output_bias,
            norm_eps=self.norm_eps,
            gelu=self.gelu,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            dtype=self.dtype,
            parent=None,
        )
        has_words = self.inner_heads and not vanilla
        return TNTBlock(
            inner=TransformerBlock(self.inner_heads, **common) if has_words else None,
            proj=WordsToSentences(
                self.outer_dim,
                norm_each_word=self.norm_each_word,
                use_bias=self.proj_bias,
                norm_out=self.proj_norm,
                norm_eps=self.norm_eps,
                dtype=self.dtype,
                parent=None,
            ),
            outer=TransformerBlock(self.outer_heads, se=self.se, **common),
            parent=None,
            name=name,
        )

    def implementations(self, words: Words, sentences: Sentences, train: bool) -> tuple[str, str]:
        """Returns the implementations of the inner and of the outer transformer.

        Falls back to "reference", even from an explicit choice, where some implementations cannot
        work: in `init`, to sow attention weights, with dropout in the inner transformer, and where
        the padding token of "gpu" would show.
        """
        if self.is_initializing() or self.is_mutable_collection("intermediates"):
            return "reference", "reference"
        outer = select.choose_outer(self.outer_impl, sentences.shape, self.outer_heads)
        if outer == "gpu" and (self.se or self.is_mutable_collection("maps")):
            outer = "reference"  # the mean of `se`, and maps, would include the padding token
        has_dropout = train and (self.dropout or self.attention_dropout)
        if not self.inner_heads or has_dropout:
            return "reference", outer
        inner = select.choose_inner(self.inner_impl, words.shape, self.inner_heads, self.mlp_ratio)
        return inner, outer

    def groups(self) -> Iterator[tuple[int, int, bool]]:
        """Yields (first block, end, vanilla) of every group of equal blocks."""
        start = 0
        for vanilla, run in itertools.groupby(i in self.vanilla_blocks for i in range(self.depth)):
            stop = start + len(list(run))
            yield start, stop, vanilla
            start = stop

    def check_fields(self) -> None:
        impls = dict(inner_impl=select.INNER, outer_impl=select.OUTER)
        check_choices_and_rates(self, gelu=tuple(GELU), remat=select.REMAT, **impls)
        if self.depth < 1:
            raise InputError(f"depth={self.depth}: a network has one block at least")
        if self.conv_first and self.patch_size % self.inner_stride:
            raise InputError(
                f"conv_first needs a patch size ({self.patch_size}) divisible by the inner stride "
                f"({self.inner_stride})"
            )
        unknown = [i for i in self.vanilla_blocks if not 0 <= i < self.depth]
        if unknown:
            raise InputError(f"vanilla_blocks {unknown} are outside the {self.depth} blocks")

    # -- The protocol `models.network.Network`

    @property
    def num_features(self) -> int:
        return self.outer_dim

    @property
    def head_bias(self) -> bool:
        return self.output_bias

    @property
    def map_blocks(self) -> Sequence[int]:
        return range(self.depth)

    @property
    def default_maps(self) -> tuple[int, ...]:
        """The last block of each quarter, as in the paper (section 4.5)."""
        return tuple(sorted({-(-self.depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)}))

    def stacks(self) -> list[tuple[tuple[str, ...], int]]:
        return [((f"blocks_{start}",), stop - start) for start, stop, _ in self.groups()]

    def block_layouts(self, grid: Grid) -> list[BlockLayout]:
        return [BlockLayout(grid, side=1, reduction=1)] * self.depth

    def resampled_positions(
        self, params: Mapping[str, Any], old: Grid, new: Grid
    ) -> dict[tuple[str, ...], Array]:
        """The class token's position stays."""
        table = jnp.asarray(params["sentence_pos"])
        sentences = resample(table[:, 1:], 1, [old], [new])
        return {("sentence_pos",): jnp.concatenate([table[:, :1], sentences], axis=1)}
