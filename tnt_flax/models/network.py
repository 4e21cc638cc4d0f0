# SPDX-License-Identifier: Apache-2.0
"""What every network offers to the code that loads, resizes, inspects and exports networks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from jax.typing import DTypeLike
from jaxtyping import Array, Float

Grid = tuple[int, int]  # rows and columns of sentences
Images = Float[Array, "B H W channels"]


class BlockLayout(NamedTuple):
    """Where the sentences of a block lie in the image."""

    grid: Grid  # the block's sentences
    side: int  # of a sentence, in sentences of the first block
    reduction: int  # outer attention reads averages of `reduction` x `reduction` sentences


@runtime_checkable
class Network(Protocol):
    """A network of blocks with words and sentences; a flax module and a dataclass.

    A new network implements these members and is entered in `models.MODELS` and in
    `models.NETWORKS`, whose key begins its names. No other file tests which network it has.
    """

    outer_dim: int  # of the first block
    outer_heads: int  # of the first block
    num_classes: int  # 0: no head
    dtype: DTypeLike
    init: Callable[..., Any]
    apply: Callable[..., Any]
    clone: Callable[..., Any]

    variants: ClassVar[Mapping[str, Mapping[str, Any]]]  # fields of each published variant
    base_name: ClassVar[str]  # published name; fields describe other sizes relative to it
    has_class_token: ClassVar[bool]  # before the sentences, also in the table of positions
    min_grid: ClassVar[int]  # smallest number of rows and of columns
    stem_kernel: ClassVar[tuple[str, ...]]  # path of the parameter that reads the pixels

    # Properties in some networks.
    patch_size: int  # pixels on each side of a sentence of the first block
    depth: int  # number of blocks
    num_features: int  # width of the head's input
    head_bias: bool  # whether the head has a bias
    map_blocks: Sequence[int]  # blocks whose sentences `feature_maps` can return, indexed by `at`
    default_maps: tuple[int, ...]  # default of `at`

    def stacks(self) -> list[tuple[tuple[str, ...], int]]:
        """Returns the path of each group of stacked blocks in the parameters, and its length."""

    def block_layouts(self, grid: Grid) -> list[BlockLayout]:
        """Returns the layout of every block for images of `grid` sentences."""

    def resampled_positions(
        self, params: Mapping[str, Any], old: Grid, new: Grid
    ) -> dict[tuple[str, ...], Array]:
        """Returns the parameters that depend on the grid, resampled from `old` to `new`."""
