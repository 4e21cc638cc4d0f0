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
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_flax.core.errors import InputError
from tnt_flax.models.checks import check_images, check_known, check_rates, positions
from tnt_flax.models.kernels import lanes
from tnt_flax.models.kernels.mixed_precision import add
from tnt_flax.models.kernels.select import (
    INNER,
    LANES_BLOCKS,
    OUTER,
    PRIMITIVES,
    REMAT,
    choose_inner,
    choose_outer,
    choose_remat,
)
from tnt_flax.models.layers import GELU, Dense, Dropout, LayerNorm, TransformerBlock
from tnt_flax.models.tnt_blocks import TNTBlock, WordsToSentences
from tnt_flax.models.word_embedding import Images, WordEmbedding

token_init = nn.initializers.normal(0.02)


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
    remat: str = "auto"  # what is computed twice, to save memory; see `models.implementations`
    inner_impl: str = "auto"  # implementation of the inner transformer, see `kernels.select`
    outer_impl: str = "auto"  # of the outer transformer
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
        check_images(images, self.patch_size)
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
        words = add(
            words, self.positions("word_pos", words)[:, None]
        )  # the same for every sentence
        stem = WordsToSentences(
            self.outer_dim,
            use_bias=self.output_bias,
            norm_out=self.stem_norm,
            norm_eps=self.norm_eps,
            dtype=self.dtype,
            name="proj",
        )
        stem_sentences = stem(words)

        # The class token goes first, then the positions are added.
        cls_token = self.param("cls_token", token_init, (1, 1, self.outer_dim))
        cls_token = jnp.broadcast_to(cls_token, (images.shape[0], 1, self.outer_dim))
        cls_token = cls_token.astype(self.dtype)
        start = jnp.zeros_like(stem_sentences) if self.zero_sentences else stem_sentences
        sentences = jnp.concatenate([cls_token, start], axis=1)
        sentences = add(sentences, self.positions("sentence_pos", sentences))
        sentences = Dropout(self.dropout)(sentences, train=train)
        if self.zero_sentences:
            sentences = sentences.at[:, 1:].add(stem_sentences)

        # The blocks. Which form each transformer takes changes nothing but the time.
        inner, outer = self.choose_forms(words.shape, sentences.shape, train)
        words = lanes.to_lanes(words) if inner in LANES_BLOCKS else words
        for start, stop, vanilla in self.groups():
            block = self.make_block(f"blocks_{start}", inner, outer, vanilla)
            words, sentences = self.run_blocks(block, start, stop, words, sentences, train=train)

        norm = LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")
        features = norm(sentences[:, 0])  # of the class token alone: no other token is used
        if not self.num_classes:
            return features.astype(jnp.float32)
        head = Dense(self.num_classes, use_bias=self.output_bias, dtype=self.dtype, name="head")
        return head(features).astype(jnp.float32)

    def choose_forms(self, words_shape, sentences_shape, train: bool) -> tuple[str, str]:
        """The form of the inner transformer and that of the outer one."""
        if self.is_initializing() or self.is_mutable_collection("intermediates"):
            return "reference", "reference"
        outer = choose_outer(self.outer_impl, sentences_shape, self.outer_heads)
        if not self.inner_heads or train and (self.dropout or self.attention_dropout):
            return "reference", outer
        return choose_inner(self.inner_impl, words_shape, self.inner_heads, self.mlp_ratio), outer

    def make_block(self, name: str, inner_form: str, outer_form: str, vanilla: bool) -> TNTBlock:
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
        primitives = PRIMITIVES[outer_form]
        outer = functools.partial(transformer, self.outer_heads, se=self.se, primitives=primitives)
        if inner_form in LANES_BLOCKS:
            inner = functools.partial(
                lanes.LanesTransformer,
                self.inner_heads,
                block=LANES_BLOCKS[inner_form],
                norm_eps=self.norm_eps,
                gelu=self.gelu,
            )
            words_to_sentences = functools.partial(
                lanes.LanesToSentences, self.norm_each_word, self.norm_eps, self.dtype
            )
        else:
            inner = functools.partial(
                transformer, self.inner_heads, primitives=PRIMITIVES[inner_form]
            )
            words_to_sentences = functools.partial(
                WordsToSentences,
                self.outer_dim,
                norm_each_word=self.norm_each_word,
                use_bias=self.proj_bias,
                norm_out=self.proj_norm,
                norm_eps=self.norm_eps,
                dtype=self.dtype,
                primitives=primitives,
            )
        inner = inner if self.inner_heads and not vanilla else None
        remat_inner = choose_remat(self.remat) == "inner"
        return TNTBlock(inner, words_to_sentences, outer, remat_inner, parent=None, name=name)

    def run_blocks(self, block, start, stop, words, sentences, *, train):
        """Runs the blocks from `start` to before `stop`, which differ in their parameters alone.

        They are one scanned `block`. The network's very last block stands apart, because of its
        output only the class token is used: it spares most of its work, 6 % of TNT-S.
        """

        def init(key):
            keys = jax.random.split(key, stop - start)
            init_one = lambda key: block.init(key, words, sentences, None, train=False)["params"]
            return jax.vmap(init_one)(keys)

        name = block.name
        # Weights that do not fit are refused in `block`, by their own names.
        known = self.has_variable("params", name)
        params = self.get_variable("params", name) if known else self.param(name, init)
        found = {x.shape[0] for x in jax.tree.leaves(params)}
        if found != {stop - start}:
            raise InputError(f"the weights' {name} has {sorted(found)} blocks, not {stop - start}")
        rates = keys = None
        if train and self.drop_path:
            rates = jnp.linspace(0, self.drop_path, self.depth)[start:stop]
        if train and (self.dropout or self.attention_dropout or self.drop_path):
            keys = jax.random.split(self.make_rng("dropout"), stop - start)
        capture = [
            collection
            for collection in ("intermediates", "maps")
            if self.is_mutable_collection(collection) and not self.is_initializing()
        ]

        def pick(i):
            pick_one = lambda x: jax.lax.dynamic_index_in_dim(x, i.astype(int), keepdims=False)
            return jax.tree.map(pick_one, (params, rates, keys))

        def run(tokens, own, **options):
            params, rate, key = own
            return block.apply(
                {"params": params},
                *tokens,
                rate,
                train=train,
                rngs=None if key is None else {"dropout": key},
                mutable=capture or False,
                **options,
            )

        def body(carry, _):
            tokens, i = carry
            out = run(tokens, pick(i))
            tokens, sown = out if capture else (out, None)
            return (tokens, i + 1), sown

        if choose_remat(self.remat) == "block":
            body = jax.checkpoint(body, prevent_cse=False)  # scan keeps XLA from merging the two
        stands_apart = stop == self.depth and not self.se and not capture  # SE reads every token
        turns = stop - start - stands_apart
        # The weights are picked out by a number that XLA cannot foresee, as it could an integer:
        # it would copy the last block's at the beginning, and all others to scan over them.
        start_carry = (words, sentences), jnp.float32(0)
        (tokens, i), sown = jax.lax.scan(body, start_carry, length=turns)
        for collection in capture:
            self.put_variable(collection, name, sown[collection])
        if stands_apart:
            tokens = run(tokens, pick(i), class_token_only=True)
        return tokens

    @property
    def num_features(self) -> int:
        """Width of what the head reads."""
        return self.outer_dim

    def stacks(self) -> list[tuple[tuple[str, ...], int]]:
        """Where the parameters of each run of equal blocks are, and how many blocks it has."""
        return [((f"blocks_{start}",), stop - start) for start, stop, _ in self.groups()]

    def positions(self, name: str, tokens: Array) -> Array:
        """The position table `name`, one row per token, the same for every image."""
        return positions(self, name, (1, *tokens.shape[-2:]), token_init)

    def groups(self) -> Iterator[tuple[int, int, bool]]:
        """Yields (first block, end, vanilla) for every run of equal blocks."""
        start = 0
        for vanilla, run in itertools.groupby(i in self.vanilla_blocks for i in range(self.depth)):
            stop = start + len(list(run))
            yield start, stop, vanilla
            start = stop

    def check_fields(self) -> None:
        if self.gelu not in GELU:
            raise InputError(f"gelu={self.gelu!r} is none of {sorted(GELU)}")
        check_known(self, remat=REMAT, inner_impl=INNER, outer_impl=OUTER)
        check_rates(self)
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


def block_outputs(model: nn.Module, variables: dict, images: Images) -> list[dict[str, Array]]:
    """What every block of `model` computes for `images`, first block first.

    Returns one dictionary per block, in evaluation mode:
        words (B, N, M, C) and sentences (B, N + 1, D): the block's outputs, class token first;
        outer_attention (B, heads, N + 1, N + 1): softmax weights, queries on the last but one axis;
        inner_attention (B, N, heads, M, M): likewise, absent from vanilla blocks.
    PyramidTNT has no class token, N as its stages have it, and outer attention (B, heads, N, K).
    Under `jax.jit`, what the caller does not use costs nothing.
    """
    _, state = model.apply(variables, images, train=False, mutable=["intermediates"])
    blocks = []
    for path, length in model.stacks():
        group = functools.reduce(lambda tree, name: tree[name], path, state["intermediates"])
        stacked = {
            "words": group["words"][0],
            "sentences": group["sentences"][0],
            "outer_attention": group["outer"]["attention"]["weights"][0],
        }
        if "inner" in group:
            stacked["inner_attention"] = group["inner"]["attention"]["weights"][0]
        blocks += [{name: x[i] for name, x in stacked.items()} for i in range(length)]
    return blocks
