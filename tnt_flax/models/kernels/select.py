# SPDX-License-Identifier: Apache-2.0
"""Which of several equal implementations of its two transformers a network runs.

All read the same parameters. "reference" is the plain definition (`models.layers`), the only one
with forward-mode derivatives. "auto" is what suits the machine.
"""

from typing import Any

from tnt_flax.core.errors import InputError
from tnt_flax.models.kernels import cpu, inner_pallas, lanes, outer_pallas
from tnt_flax.models.kernels.platform import platform
from tnt_flax.models.layers import Primitives

INNER = ("auto", "reference", "cpu", "lanes", "pallas")  # of words
REMAT = ("auto", "none", "inner", "block")  # activations that the backward pass computes again
OUTER = ("auto", "reference", "cpu", "pallas")  # of sentences

PRIMITIVES = {
    "reference": Primitives(),
    "cpu": Primitives(cpu.dot_general, cpu.attend, flat_mlp=True),
    "pallas": Primitives(attend=outer_pallas.attend),
}
LANES_FORMS = {"lanes": lanes.block, "pallas": inner_pallas.block}  # with words as [C, M, P]


def choose_inner(
    asked: str, words_shape: tuple[Any, int, int, int], heads: int, mlp_ratio: float
) -> str:
    """One of INNER but "auto", for words [B, N, M, C]; in an export B is a symbol.

    On GPUs "auto" is "lanes", unmeasured: it spares them batches of thousands of small products.

    Raises:
        InputError: "pallas" was asked for and cannot run.
    """
    if asked not in ("auto", "pallas"):
        return asked
    images, _, words, width = words_shape
    refusal = inner_pallas.refusal(width, heads, words, int(width * mlp_ratio), images)
    if asked == "pallas" and refusal:
        raise InputError(f"inner='pallas' cannot run here: {refusal}; use inner='auto'")
    if asked == "pallas":
        return asked
    if platform() == "cpu":
        return "cpu"
    return "lanes" if refusal else "pallas"


def choose_outer(asked: str, sentences_shape: tuple[Any, int, int], heads: int) -> str:
    """One of OUTER but "auto", for sentences [B, N + 1, D]."""
    if asked != "auto":
        return asked
    if platform() == "cpu":
        return "cpu"
    batch, length, width = sentences_shape
    return "pallas" if outer_pallas.suits(batch, length, width // heads) else "reference"


def choose_remat(asked: str) -> str:
    """One of REMAT but "auto": on a CPU "none", as time is short there, else "block", as memory is.

    TNT-S keeps 240 MB an image in float32 with "none", and 60 MB with "block".
    """
    if asked != "auto":
        return asked
    return "none" if platform() == "cpu" else "block"
