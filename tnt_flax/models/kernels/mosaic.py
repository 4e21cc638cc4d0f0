# SPDX-License-Identifier: Apache-2.0
"""The inner transformer block as fused kernels for Hopper GPUs: one forward, two backward.

`block` computes the same function as `lanes.block`. A kernel reads and writes every word once;
everything in between stays on the chip. A thread block of one warpgroup processes tiles of 64 words
(four sentences) one after the other, with all weights in shared memory. All products run on tensor
cores, whose results have 64 rows: attention scores are computed for all pairs of words in a tile,
and those within sentences are selected.

Tensor cores contract 16 channels at a time. Shared memory therefore holds channels in slots of 16.
If they do not fill the last slot, it holds the last 16 channels: 24 channels are stored as channels
0 to 15 and 8 to 23, and channels stored twice meet zeros in the weights. The channels of a head are
padded to 16. A bias is a row of the weights that meets a column of ones.

Products take operands in the dtype of the words; everything else is float32.
"""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_flax.core.errors import InputError
from tnt_flax.models.kernels import mosaic_tiles as tiles
from tnt_flax.models.kernels.inner_pallas import why_not_sizes
from tnt_flax.models.kernels.lanes import Weights, fold
from tnt_flax.models.kernels.mosaic_tiles import CHUNK, HEAD, ROWS, SLOT, WORDS
from tnt_flax.models.kernels.platform import device_kind, devices, free_axes, why_not_shared
from tnt_flax.models.layers import DropPath
from tnt_flax.models.scan import SAVED

SIZES = ((24, 4), (40, 4))  # published word widths and heads
HOPPER = re.compile(r"\bG?H(100|200|800|20)\b")


def why_not(width: int, heads: int, words: int, hidden: int, images: int) -> str:
    """Returns why the kernels cannot run a block of these sizes here; "" if they can."""
    if jax.__version_info__ < (0, 10, 2):
        return f"it needs jax 0.10.2 or newer, not {jax.__version__}"
    if not tiles.INTERPRET and not HOPPER.search(device_kind()):
        return f"it is for Hopper GPUs such as the H100, not for {device_kind()}"
    wrong_size = why_not_sizes(SIZES, width, heads, words, hidden)
    if wrong_size or tiles.INTERPRET and jax.sharding.get_abstract_mesh().empty:
        return wrong_size
    return why_not_shared(images)


class WordsTransformer(nn.Module):
    """`layers.TransformerBlock` for words (B, T, M, C), one row per token, without dropout.

    Raises:
        InputError: the words are float32, whose products would be rounded to TF32.
    """

    num_heads: int
    first: int  # row of the first sentence
    count: int  # number of sentences
    norm_eps: float = 1e-5
    gelu: str = "erf"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T M C"], drop_path_rate: Float[Array, ""] | None, *, train: bool
    ) -> Float[Array, "B T M C"]:
        del train
        dtype = jnp.dtype(self.dtype)
        if not tiles.INTERPRET and dtype.itemsize != 2:
            raise InputError(
                f"inner_impl='mosaic' computes in bfloat16 or float16, not {dtype}: "
                "use dtype='bfloat16' or inner_impl='auto'"
            )
        scales = None
        if drop_path_rate is not None:
            kept = jnp.ones((x.shape[0], self.count, 1, 1), x.dtype)  # sampled as in the reference
            scales = jnp.stack([DropPath()(kept, drop_path_rate)[..., 0, 0] for _ in range(2)])
            rows = self.first, x.shape[1] - self.first - self.count
            scales = jnp.pad(scales.astype(jnp.float32), ((0, 0), (0, 0), rows))
        weights = fold(self.variables["params"], self.num_heads)
        fields = dict(heads=self.num_heads, norm_eps=self.norm_eps, gelu=self.gelu)
        return block(x, weights, scales, **fields)


def block(
    x: Float[Array, "B T M C"],
    weights: Weights,
    scales: Float[Array, "2 B T"] | None,
    *,
    heads: int,
    norm_eps: float,
    gelu: str,
) -> Float[Array, "B T M C"]:
    """Evaluates pre-norm attention and MLP, each added to its input.

    Under an ambient mesh (`jax.set_mesh`) every device runs its images. The gradients of the
    weights are then summed over the devices; nothing else is communicated.

    Args:
        x: words.
        weights: from `lanes.fold`.
        scales: factors of the two updates of each sentence (stochastic depth); None is 1.
        heads, norm_eps, gelu: see `layers.TransformerBlock`.
    """

    def run(x, weights, scales):
        rows = x.reshape(-1, x.shape[-1])
        missing = -rows.shape[0] % ROWS  # of the last tile
        padded = jnp.pad(rows, ((0, missing), (0, 0)))
        if scales is not None:
            scales = jnp.pad(scales.reshape(2, -1), ((0, 0), (0, missing // WORDS)))
        y = _block(padded, weights, scales, heads, norm_eps, gelu)
        return y[: rows.shape[0]].reshape(x.shape)

    axes = free_axes()
    if devices(axes) > 1:
        images = PartitionSpec(axes)
        in_specs = images, PartitionSpec(), PartitionSpec(None, axes)
        run = jax.shard_map(run, in_specs=in_specs, out_specs=images, check_vma=False)
    return run(x, weights, scales)


@functools.partial(jax.custom_vjp, nondiff_argnames=("heads", "norm_eps", "gelu"))
def _block(x, weights, scales, heads, norm_eps, gelu):
    outputs = ["y"] if tiles.INTERPRET else []  # in place, which the interpreter does not support
    return _forward(x, weights, scales, heads, norm_eps, gelu, outputs)["y"]


def _block_forward(x, weights, scales, heads, norm_eps, gelu):
    results = _forward(x, weights, scales, heads, norm_eps, gelu, ["y", "middle"])
    y, middle = (checkpoint_name(results[name], SAVED) for name in ("y", "middle"))
    return y, (x, middle, weights, scales)


def _forward(x, weights, scales, heads, norm_eps, gelu, outputs):
    """Returns the words "y" and, if it is in `outputs`, "middle": those between both updates."""
    qkv, out, fc1, fc2 = _pack(weights, heads)
    return tiles.run(
        functools.partial(tiles.forward_tile, norm_eps=norm_eps, gelu=gelu),
        name="tnt_inner_forward",
        inputs=dict(x=x, scales=scales),
        weights=dict(
            qkv=_from_words(qkv), out=_to_words(out), fc1=_from_words(fc1), fc2=_to_words(fc2)
        ),
        outputs=outputs,
        scratch=dict(
            z=(_slots(x), SLOT), head=(HEAD,), shares=(ROWS,), mixed=(SLOT,), hidden=(CHUNK,)
        ),
    )


def _block_backward(heads, norm_eps, gelu, saved, g):
    x, middle, weights, scales = saved
    packed, unpack = jax.vjp(functools.partial(_pack, heads=heads), weights)
    qkv, out, fc1, fc2 = packed
    slots, mixed, hidden = _slots(x), heads * SLOT, fc1.shape[1]
    zeros = lambda columns: -columns % ROWS  # products have a multiple of 64 rows

    mlp = tiles.run(
        functools.partial(tiles.mlp_backward_tile, norm_eps=norm_eps, gelu=gelu),
        name="tnt_inner_mlp_backward",
        inputs=dict(x=middle, g=g, scales=scales),
        weights=dict(fc1=_from_words(fc1), fc1_back=fc1[:-1], fc2_back=_to_slots(fc2[:-1].T)),
        outputs=["dx"],
        scratch=dict(
            z=(slots, SLOT),
            dy=(slots,),
            hidden=(hidden, SLOT, zeros(hidden + SLOT)),
            d_hidden=(hidden, 0, zeros(hidden)),
        ),
        sums=dict(d_fc1=("d_hidden", "z"), d_fc2=("hidden", "dy")),
    )
    attention = tiles.run(
        functools.partial(tiles.attention_backward_tile, norm_eps=norm_eps),
        name="tnt_inner_attention_backward",
        inputs=dict(x=x, g=mlp["dx"], scales=scales),
        weights=dict(qkv=_from_words(qkv), qkv_back=qkv[:-1], out_back=_to_slots(out[:-1].T)),
        outputs=["dx"],
        scratch=dict(
            z=(slots, SLOT),
            dy=(slots,),
            head=(HEAD, 0, zeros(HEAD)),
            shares=(ROWS,),
            d_scores=(ROWS,),
            mixed=(mixed, SLOT, zeros(mixed + SLOT)),
            d_mixed=(SLOT,),
        ),
        sums=dict(d_qkv=("head", "z"), d_out=("mixed", "dy")),
        repeats=dict(d_qkv=heads),
    )
    d_qkv = attention["d_qkv"].reshape(heads, ROWS, -1)[:, :HEAD].reshape(heads * HEAD, -1)
    gradients = [d_qkv, attention["d_out"], mlp["d_fc1"], mlp["d_fc2"]]
    gradients = [
        _from_slots(d, width=x.shape[1], shape=w.shape)
        for d, w in zip(gradients, packed, strict=True)
    ]
    return attention["dx"], *unpack(tuple(gradients)), jax.tree.map(jnp.zeros_like, scales)


_block.defvjp(_block_forward, _block_backward)


# -- Weights: matrices [inputs + 1, outputs] with the bias as last row


def _pack(weights, heads):
    """Returns `weights` with the channels of heads padded to 16; qkv is [C + 1, (head, qkv, d)]."""
    qkv, out, fc1, fc2 = weights
    width = out.shape[1]
    size = width // heads
    qkv = qkv.reshape(width + 1, 3, heads, size).swapaxes(1, 2)
    qkv = jnp.pad(qkv, ((0, 0), (0, 0), (0, 0), (0, SLOT - size)))
    rows = jnp.pad(out[:-1].reshape(heads, size, width), ((0, 0), (0, SLOT - size), (0, 0)))
    out = jnp.concatenate([rows.reshape(-1, width), out[-1:]])
    return qkv.reshape(width + 1, -1), out, fc1, fc2


def _from_words(weight):
    """Returns the matrix that slots of words, and 16 columns of ones, are multiplied by."""
    return jnp.concatenate([_to_slots(weight[:-1]), _ones(weight[-1:])])


def _to_words(weight):
    """Returns the transposed matrix of products that yield words, with 16 columns for ones."""
    return jnp.concatenate([weight[:-1], _ones(weight[-1:])]).T


def _ones(bias):
    return jnp.pad(bias, ((0, SLOT - 1), (0, 0)))


def _slots(x):
    """Returns the number of columns that hold words [rows, C]."""
    return -(-x.shape[1] // SLOT) * SLOT


def _to_slots(weight):
    """Returns the rows that slots meet: [C, F] to [slots, F]."""
    whole = weight.shape[0] // SLOT * SLOT
    rest = weight[whole:]
    return jnp.concatenate([weight[:whole], jnp.pad(rest, ((-len(rest) % SLOT, 0), (0, 0)))])


def _from_slots(gradient, width, shape):
    """Returns the gradient of a weight of `shape` from that of its matrix, [features, slots]."""
    whole = width // SLOT * SLOT
    end = -(-width // SLOT) * SLOT
    columns = [gradient[:, :whole], gradient[:, end - width + whole : end + 1]]
    gradient = jnp.concatenate(columns, axis=1)
    if shape[1] == width:  # features are inputs
        return gradient[: shape[0]]
    return gradient[: shape[1]].T
