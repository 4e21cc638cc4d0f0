# SPDX-License-Identifier: Apache-2.0
"""Selects the implementations of the inner and the outer transformer.

All implementations read the same parameters and compute the same function. "reference" is the
definition in `models.layers`, the only one with forward-mode derivatives. "auto" never selects an
implementation that has not run on that kind of hardware:

- On CPUs, "cpu" for both transformers.
- On GPUs, "reference" for both: nothing was measured there. "gpu" and, for Hopper GPUs, the fused
  kernels "mosaic" move fewer bytes by the figures of the compiler, see docs/speed.md.
- On TPUs nothing has run yet. "auto" selects plain XLA programs and, among them, the one that the
  TPU compiler rates better: "lanes" for the inner transformer (a training step of TNT-S needs 1.94
  GiB of temporaries with 128 images per chip of v5e:2x2, bfloat16, libtpu 0.0.42.1; with
  "reference" 2.80 GiB), and "reference" for the outer one.

The Pallas kernels are opt-in.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from tnt_flax.core.errors import InputError
from tnt_flax.models.kernels import cpu, gpu, lanes
from tnt_flax.models.kernels.platform import platform
from tnt_flax.models.layers import LayerNorm

INNER = ("auto", "reference", "cpu", "gpu", "mosaic", "lanes", "pallas")
OUTER = ("auto", "reference", "cpu", "gpu", "pallas")
REMAT = ("auto", "none", "block")


def attend_pallas(*args: Any, **kwargs: Any) -> Array:
    from tnt_flax.models.kernels import outer_pallas  # slow to import, and only "pallas" needs it

    return outer_pallas.attend(*args, **kwargs)


def block_pallas(*args: Any, **kwargs: Any) -> Array:
    from tnt_flax.models.kernels import inner_pallas  # likewise

    return inner_pallas.block(*args, **kwargs)


def words_mosaic(*args: Any, **kwargs: Any) -> nn.Module:
    from tnt_flax.models.kernels import mosaic  # likewise

    return mosaic.WordsTransformer(*args, **kwargs)


# Fields of `layers.TransformerBlock`.
FUNCTIONS: dict[str, dict[str, Any]] = {
    "reference": {},
    "cpu": dict(attention_fn=cpu.attend, matmul_fn=cpu.matmul, mlp_fn=cpu.mlp),
    "gpu": dict(norm_layer=gpu.LayerNorm),
    "pallas": dict(attention_fn=attend_pallas),
}
WORDS_TRANSFORMERS = {"gpu": gpu.WordsTransformer, "mosaic": words_mosaic}  # words as [B, T, M, C]
LANES_BLOCKS = {"lanes": lanes.block, "pallas": block_pallas}  # words as [C, M, P]


def choose_inner(
    impl: str, words_shape: tuple[Any, int, int, int], heads: int, mlp_ratio: float
) -> str:
    """Returns the implementation, one of INNER other than "auto", for words [B, N, M, C].

    Raises:
        InputError: `impl` is "pallas" or "mosaic", and the kernels cannot run here.
    """
    if impl in ("pallas", "mosaic"):
        if impl == "pallas":
            from tnt_flax.models.kernels import inner_pallas as kernels
        else:
            from tnt_flax.models.kernels import mosaic as kernels
        images, _, words, width = words_shape  # in an export the number of images is symbolic
        reason = kernels.why_not(width, heads, words, int(width * mlp_ratio), images)
        _refuse("inner_impl", impl, reason)
    if impl == "auto" and platform() == "tpu":
        return "lanes"
    return resolve_auto(impl)


def choose_outer(impl: str, sentences_shape: tuple[Any, int, int], heads: int) -> str:
    """Returns the implementation, one of OUTER other than "auto", for sentences [B, T, D].

    Raises:
        InputError: `impl` is "pallas", and the kernel does not fit this TPU.
    """
    batch, length, width = sentences_shape
    if impl == "pallas" and platform() == "tpu":  # elsewhere the kernel is interpreted, in tests
        from tnt_flax.models.kernels import outer_pallas

        _refuse("outer_impl", impl, outer_pallas.why_not(batch, length, width // heads))
    return resolve_auto(impl)


def _refuse(field, impl, reason):
    if reason:
        raise InputError(f"{field}='{impl}' cannot run here: {reason}; use {field}='auto'")


def resolve_auto(impl: str) -> str:
    """Returns `impl`; for "auto", "cpu" or "reference", which take any shapes."""
    if impl != "auto":
        return impl
    return "cpu" if platform() == "cpu" else "reference"


def norm_layer(outer_impl: str) -> Callable[..., nn.Module]:
    """Returns the LayerNorm of sentences before and after all blocks."""
    return FUNCTIONS[resolve_auto(outer_impl)].get("norm_layer", LayerNorm)


def remats_blocks(remat: str) -> bool:
    """True if the backward pass computes every block again; "auto" does except on CPUs.

    TNT-S keeps 240 MB of activations per image in float32 without, and 60 MB with it. On a CPU time
    is scarcer than memory. On a GPU, by the compiler's figures, a step that keeps the activations
    even moves more bytes than one that computes them again (775 and 640 MB per image of TNT-S in
    bfloat16 with "gpu" on an H100), so that "auto" does not depend on the card's memory.
    """
    return remat == "block" or remat == "auto" and platform() != "cpu"


def implement(
    block: Any, inner_impl: str, outer_impl: str, *, num_sentences: int, num_tokens: int
) -> Any:
    """Returns a TNTBlock with the parameters of `block`, in other implementations.

    Args:
        block: in the reference implementation.
        inner_impl: one of INNER other than "auto".
        outer_impl: one of OUTER other than "auto".
        num_sentences: N, the number of sentences.
        num_tokens: T, the number of tokens of the outer transformer: N, plus 1 with a class token.
    """
    outer = block.outer.clone(**FUNCTIONS[outer_impl])
    if outer_impl == "gpu":
        attend = functools.partial(
            gpu.attend_sentences, length=None if outer.reduce else num_tokens
        )
        outer = outer.clone(attention_fn=attend, attention_bias=True, num_keys=num_tokens)
    proj = block.proj.clone(matmul_fn=outer.matmul_fn)
    if outer.reduce:
        fields = dict(matmul_fn=outer.matmul_fn, norm_layer=outer.norm_layer)
        outer = outer.clone(reduce=outer.reduce.clone(**fields))
    inner = block.inner
    if inner and inner_impl in LANES_BLOCKS:
        fields = dict(norm_eps=inner.norm_eps, gelu=inner.gelu, parent=None)
        inner = lanes.LanesTransformer(inner.num_heads, LANES_BLOCKS[inner_impl], **fields)
        fields = proj.norm_each_word, proj.norm_eps, proj.dtype
        proj = lanes.LanesToSentences(num_sentences, *fields, parent=None)
    elif inner and inner_impl in WORDS_TRANSFORMERS:
        rows = num_tokens - num_sentences, num_sentences
        fields = dict(norm_eps=inner.norm_eps, gelu=inner.gelu, dtype=inner.dtype, parent=None)
        inner = WORDS_TRANSFORMERS[inner_impl](inner.num_heads, *rows, **fields)
        proj = proj.clone(norm_layer=gpu.LayerNorm)
        if num_tokens > num_sentences:
            proj = gpu.AlignedSentences(proj, *rows, parent=None)
    elif inner:
        inner = inner.clone(**FUNCTIONS[inner_impl])
    return block.clone(inner=inner, proj=proj, outer=outer)


def to_layout(
    inner_impl: str, outer_impl: str, words: Array, sentences: Array, *, train: bool
) -> tuple[Array, Array]:
    """Returns words [B, N, M, C] and sentences [B, T, D] in the layout of the implementations.

    In training, the outer "gpu" appends a token where T is odd: cuDNN's gradient takes even lengths
    only. For WORDS_TRANSFORMERS, words have a row for every token.
    """
    first = sentences.shape[1] - words.shape[1]  # the class token has no words
    padding = sentences.shape[1] % 2 if outer_impl == "gpu" and train else 0
    if padding:
        sentences = jnp.pad(sentences, [(0, 0), (0, padding), (0, 0)])
    if inner_impl in WORDS_TRANSFORMERS:
        words = jnp.pad(words, [(0, 0), (first, padding), (0, 0), (0, 0)])
    return lanes.to_lanes(words) if inner_impl in LANES_BLOCKS else words, sentences
