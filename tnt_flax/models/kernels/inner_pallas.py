# SPDX-License-Identifier: Apache-2.0
"""The inner transformer block as two fused TPU kernels: forward and backward.

`block` computes the same function as `lanes.block`, on one device or a mesh. A grid step processes
one tile of sentences, words [C, 16, 128] with sentences on the lanes. Operations on single channels
(norms, attention) use registers of (8 words, 128 sentences). Operations that mix channels use the
matrix unit, whose rows are (word, channel): as many words at once as fit its 128 rows. Strided
loads and stores convert between both orders. Products take operands in the dtype of the words;
everything else is float32.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from tnt_flax.models.kernels.lanes import Lanes, Weights
from tnt_flax.models.kernels.platform import devices, free_axes, platform, why_not_shared

# It moved in jax 0.12.
reciprocal = pltpu.reciprocal if hasattr(pltpu, "reciprocal") else pl.reciprocal

INTERPRET = False  # True, in tests, runs the kernels without a TPU
SIZES = ((12, 2), (24, 4), (40, 4))  # published word widths and heads

WORDS = 16
TILE = 128  # sentences per step: the lanes of a register
HALF = 8  # words per register: its sublanes
ONES = 16  # rows of ones below a product's operand: the fewest that keep bfloat16 tiles whole

TURNS = tuple((half, turn) for half in range(2) for turn in range(HALF))

LN_2 = 0.6931471805599453
NORMAL = 0.3989422804014327  # the normal density at 0
TO_LANES = (((1,), (1,)), ((), ()))  # contracts both operands' lanes: a @ b.T
TO_ROWS = (((0,), (0,)), ((), ()))  # contracts both operands' rows: a.T @ b


def why_not(width: int, heads: int, words: int, hidden: int, images: int) -> str:
    """Returns why the kernels cannot run a block of these sizes here; "" if they can."""
    if platform() != "tpu" and not INTERPRET:
        return f"it is for TPUs, not for {platform()}"
    wrong_size = why_not_sizes(SIZES, width, heads, words, hidden)
    if wrong_size or INTERPRET and jax.sharding.get_abstract_mesh().empty:
        return wrong_size
    return why_not_shared(images)


def why_not_sizes(
    sizes: tuple[tuple[int, int], ...], width: int, heads: int, words: int, hidden: int
) -> str:
    """Returns why a block has none of the published sizes (width, heads); "" if it has one."""
    if (width, heads) not in sizes:
        return f"words of width {width} with {heads} heads are none of {sizes}"
    if words != WORDS:
        return f"a sentence has {words} words, not {WORDS}"
    if hidden != 4 * width:
        return f"the MLP has {hidden / width:g} times the width, not 4"
    return ""


def block(
    x: Lanes,
    weights: Weights,
    scales: Float[Array, "2 P"],
    *,
    heads: int,
    norm_eps: float,
    gelu: str,
) -> Lanes:
    """See `lanes.block`. Under an ambient mesh (`jax.set_mesh`) every device runs its sentences.

    The gradients of the weights are then summed over the devices; nothing else is communicated.
    """
    run = functools.partial(_block, heads=heads, norm_eps=norm_eps, gelu=gelu)
    axes = free_axes()
    if devices(axes) > 1:
        words = PartitionSpec(None, None, axes)
        in_specs = (words, PartitionSpec(), PartitionSpec(None, axes))
        run = jax.shard_map(run, in_specs=in_specs, out_specs=words, check_vma=False)
    return run(x, weights, scales)


@functools.partial(jax.custom_vjp, nondiff_argnames=("heads", "norm_eps", "gelu"))
def _block(x, weights, scales, heads, norm_eps, gelu):
    width = x.shape[0]
    fc2_bias = jnp.broadcast_to(weights[3][-1][:, None, None], (width, 1, TILE))
    (y,) = _call(
        functools.partial(_forward_kernel, heads=heads, norm_eps=norm_eps, gelu=gelu),
        tiled=(x, scales),
        whole=(*_packed(weights, x), fc2_bias),
        sums=(),
        scratch=[
            *_scratch(width, heads),
            _mlp_scratch(width, jnp.float32),
            _mlp_scratch(width, x.dtype),
        ],
        name="tnt_inner_forward",
    )
    return y


def _block_forward(x, weights, scales, heads, norm_eps, gelu):
    return _block(x, weights, scales, heads, norm_eps, gelu), (x, weights, scales)


def _block_backward(heads, norm_eps, gelu, residuals, g):
    x, weights, scales = residuals
    width, _, sentences = x.shape
    packed = _packed(weights, x)
    kernel = functools.partial(
        _backward_kernel, heads=heads, norm_eps=norm_eps, gelu=gelu, sentences=sentences
    )
    statistics = pltpu.VMEM((heads, 2, HALF, TILE), jnp.float32)
    dx, *gradients = _call(
        kernel,
        tiled=(x, g, scales),
        whole=packed,
        sums=[jax.ShapeDtypeStruct(w.shape, jnp.float32) for w in packed],
        scratch=[
            *_scratch(width, heads),
            *[_mlp_scratch(width, x.dtype)] * 2,
            *_row_scratch(width, 1, 1, 3),
            *[statistics] * 2,
        ],
        name="tnt_inner_backward",
    )
    gradients = [_unpack(d, w) for d, w in zip(gradients, weights, strict=True)]
    d_bias = (g.astype(jnp.float32) * scales[1:][None]).sum(axis=(1, 2))
    gradients[3] = jnp.concatenate([gradients[3], d_bias[None]])
    return dx, tuple(gradients), jnp.zeros_like(scales)


_block.defvjp(_block_forward, _block_backward)


def _call(kernel, tiled, whole, sums, scratch, name):
    """Runs `kernel` on every tile of sentences.

    `tiled` arrays have the sentences on their last axis, beginning with words [C, M, P]. `whole`
    arrays are read by every step. Returns an array like the words, and the float32 arrays `sums`,
    to which all steps add.
    """
    tile = lambda x: pl.BlockSpec((*x.shape[:-1], TILE), lambda i: (*[0] * (x.ndim - 1), i))
    entire = lambda x: pl.BlockSpec(x.shape, lambda i: (0,) * x.ndim)
    words = tiled[0]
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(words.shape[-1], TILE),),
        in_specs=[*map(tile, tiled), *map(entire, whole)],
        out_specs=[tile(words), *map(entire, sums)],
        out_shape=[jax.ShapeDtypeStruct(words.shape, words.dtype), *sums],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary" if sums else "parallel",)
        ),
        interpret=INTERPRET,
        name=name,
    )(*tiled, *whole)


def _packed(weights, x):
    """Returns `weights` as the block-diagonal matrices that act on rows (word, channel).

    Each is transposed. Its columns are followed by the bias, which meets the rows of ones, and by
    zeros for the other rows of ones; fc2, the last, has no bias there.
    """
    words = _words_per_product(x.shape[0])

    def pack(weight, bias):
        inputs, outputs = weight.shape[0] - 1, weight.shape[1]
        blocks = jnp.einsum("io,vw->vowi", weight[:-1], jnp.eye(words))
        blocks = blocks.reshape(words * outputs, words * inputs)
        if bias:
            column = jnp.tile(weight[-1], words)[:, None]
            column = jnp.pad(column, ((0, 0), (0, ONES - 1)))
            blocks = jnp.concatenate([blocks, column], axis=1)
        return blocks.astype(x.dtype)

    return [pack(w, bias=i < 3) for i, w in enumerate(weights)]


def _unpack(gradient, weight):
    """Returns the gradient of `weight` from that of its packed matrix, without a bias for fc2."""
    inputs, outputs = weight.shape[0] - 1, weight.shape[1]
    words = gradient.shape[0] // outputs
    blocks = gradient[:, : words * inputs].reshape(words, outputs, words, inputs)
    kernel = jnp.einsum("wowi->io", blocks)
    if gradient.shape[1] == words * inputs:
        return kernel
    bias = gradient[:, words * inputs].reshape(words, outputs).sum(axis=0)
    return jnp.concatenate([kernel, bias[None]])


def _row_scratch(width, *multiples):
    """Float32 scratch for rows (word, channel): that many times the words' channels."""
    return [pltpu.VMEM((n * WORDS * width, TILE), jnp.float32) for n in multiples]


def _scratch(width, heads):
    """Scratch of `_attention`: normalized words, query with key with value, output, turns."""
    turns = pltpu.VMEM((2, 2, width // heads, 2 * HALF, TILE), jnp.float32)
    return [*_row_scratch(width, 1, 3, 1), turns]


def _mlp_scratch(width, dtype):
    words = _words_per_product(width)
    return pltpu.VMEM((4 * width * words, WORDS // words * TILE), dtype)


def _words_per_product(width):
    """Returns how many words go through the matrix unit together."""
    return max(words for words in (8, 4, 2) if words * width + ONES <= 128)


# -- The kernels. Words are [C, 2, 8, tile]: both halves of a sentence's words.


def _forward_kernel(*refs, heads, norm_eps, gelu):
    x_ref, scale_ref, qkv, out, fc1, fc2, fc2_bias, y_ref, *refs = refs
    z_rows, qkv_rows, out_rows, turns, u_ref, act_ref = refs
    dtype = y_ref.dtype
    x, scale = _words(x_ref), _scales(scale_ref)
    width = x.shape[0]
    height = _words_per_product(width) * width

    rows = (z_rows, qkv_rows, out_rows)
    _attention(x, qkv, rows, turns, (), heads=heads, norm_eps=norm_eps, dtype=dtype)
    _put_products(z_rows, _product(out[...], _operand(out_rows, height, dtype)), height)
    x = x + _load(z_rows, width) * scale[0]

    _store(out_rows, _normalize(x, norm_eps)[0])
    z = _operand(out_rows, height, dtype)
    for rows in _row_blocks(u_ref):
        u_ref[rows] = _product(fc1[rows], z)
    for rows in _row_blocks(u_ref):
        act_ref[rows] = gelu_and_slope(u_ref[rows], gelu, dtype == jnp.float32)[0].astype(dtype)
    _put_products(z_rows, _product(fc2[...], act_ref[...]), height)
    y = x + (_load(z_rows, width) + fc2_bias[...][:, None]) * scale[1]
    y_ref[...] = y.reshape(y_ref.shape).astype(dtype)


def _backward_kernel(*refs, heads, norm_eps, gelu, sentences):
    x_ref, g_ref, scale_ref, qkv, out, fc1, fc2, dx_ref, d_qkv, d_out, d_fc1, d_fc2, *refs = refs
    z_rows, qkv_rows, out_rows, turns, act_ref, du_ref, *refs = refs
    mlp_rows, g_rows, dqkv_rows, *statistics = refs
    dtype = dx_ref.dtype
    width = x_ref.shape[0]
    height = _words_per_product(width) * width
    wide = functools.partial(_operand, height=height, dtype=dtype)

    @pl.when(pl.program_id(0) == 0)
    def _():
        for reference in (d_qkv, d_out, d_fc1, d_fc2):
            reference[...] = jnp.zeros_like(reference)

    x, g, scale = _words(x_ref), _words(g_ref), _scales(scale_ref)
    if sentences % TILE:  # lanes beyond the last sentence hold anything, even NaN
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, 1, 1, TILE), 3)
        inside = lane < sentences - pl.program_id(0) * TILE
        x, g, *scale = (jnp.where(inside, values, 0.0) for values in (x, g, *scale))

    # Forward again, up to the MLP's input.
    rows = (z_rows, qkv_rows, out_rows)
    options = dict(heads=heads, norm_eps=norm_eps, dtype=dtype)
    z1, inverse1 = _attention(x, qkv, rows, turns, statistics, **options)
    _put_products(mlp_rows, _product(out[...], wide(out_rows)), height)
    z2, inverse2 = _normalize(x + _load(mlp_rows, width) * scale[0], norm_eps)

    # The MLP.
    _store(mlp_rows, z2)
    _store(g_rows, g * scale[1])
    z, d_y = wide(mlp_rows), wide(g_rows, ones=False)
    for rows in _row_blocks(act_ref):
        act, slope = gelu_and_slope(_product(fc1[rows], z), gelu, dtype == jnp.float32)
        act_ref[rows] = act.astype(dtype)
        du_ref[rows] = (_product(fc2[:, rows], d_y, TO_ROWS) * slope()).astype(dtype)
    d_fc2[...] += _product(d_y, act_ref[...], TO_LANES)
    d_fc1[...] += _product(du_ref[...], z, TO_LANES)
    _put_products(mlp_rows, _product(fc1[...], du_ref[...], TO_ROWS), height)
    g = g + _normalize_back(_load(mlp_rows, width), z2, inverse2)

    # Attention.
    _store(g_rows, g * scale[0])
    d_y = wide(g_rows, ones=False)
    d_out[...] += _product(d_y, wide(out_rows), TO_LANES)
    _put_products(mlp_rows, _product(out[...], d_y, TO_ROWS), height)
    rows = (qkv_rows, out_rows, mlp_rows, dqkv_rows)

    def head(h, carry):
        _attention_back(h, width, width // heads, rows, turns, statistics)
        return carry

    jax.lax.fori_loop(0, heads, head, 0)
    d_y = _operand(dqkv_rows, 3 * height, dtype, ones=False)
    d_qkv[...] += _product(d_y, wide(z_rows), TO_LANES)
    _put_products(mlp_rows, _product(qkv[...], d_y, TO_ROWS), height)
    dx = g + _normalize_back(_load(mlp_rows, width), z1, inverse1)
    dx_ref[...] = dx.reshape(dx_ref.shape).astype(dtype)


def _attention(x, weight, rows, turns, statistics, *, heads, norm_eps, dtype):
    """Norm, query, key, value and softmax of the words x; returns the norm's two results.

    `rows` are three references, which receive the normalized words, query with key with value, and
    the output. `statistics`, if any, are two that receive the largest score and 1 / sum.
    """
    z_rows, qkv_rows, out_rows = rows
    width = x.shape[0]
    size = width // heads
    normal, inverse = _normalize(x, norm_eps)
    _store(z_rows, normal)
    height = _words_per_product(width) * width
    qkv = _product(weight[...], _operand(z_rows, height, dtype))
    _put_products(qkv_rows, qkv, 3 * height)

    def head(h, carry):
        _fill_turns(turns, qkv_rows, width, h * size, size)
        query = _load(qkv_rows, size, 3 * width, h * size)
        scores = [(query * _turned(turns, 0, *turn)).sum(axis=0) for turn in TURNS]
        largest = functools.reduce(jnp.maximum, scores)
        odds = [jnp.exp2(score - largest) for score in scores]
        share = reciprocal(_total(odds), approx=dtype != jnp.float32)
        mixed = _total(p[None] * _turned(turns, 1, *t) for p, t in zip(odds, TURNS, strict=True))
        _store(out_rows, mixed * share[None], width, h * size)
        for reference, found in zip(statistics, (largest, share), strict=False):
            reference[h] = found
        return carry

    jax.lax.fori_loop(0, heads, head, 0)
    return normal, inverse


def _attention_back(h, width, size, rows, turns, statistics):
    """Gradients of one head's query, key and value, from that of its output.

    `rows` hold query with key with value, the output, its gradient, and receive the gradients. The
    gradient of a turned key is turned back, so that all sums are over registers, none within one.
    """
    qkv_rows, out_rows, d_out_rows, d_qkv_rows = rows
    first = h * size
    largest, share = (reference[h] for reference in statistics)
    _fill_turns(turns, qkv_rows, width, first, size)
    query, output = _load(qkv_rows, size, 3 * width, first), _load(out_rows, size, width, first)
    d_output = _load(d_out_rows, size, width, first) * share[None]
    common = (d_output * output).sum(axis=0)
    d_scores = {}
    for half in range(2):
        d_key = d_value = 0.0
        for turn in reversed(range(HALF)):
            key, value = (_turned(turns, i, half, turn) for i in (0, 1))
            odds = jnp.exp2((query * key).sum(axis=0) - largest)
            d_score = odds * ((d_output * value).sum(axis=0) - common)
            d_scores[half, turn] = d_score
            d_key += (d_score[None] * query).sum(axis=1)
            d_value += (odds[None] * d_output).sum(axis=1)
            if turn:
                d_key, d_value = (pltpu.roll(x, 1, 1) for x in (d_key, d_value))
        _store_half(d_qkv_rows, half, d_key * LN_2, 3 * width, width + first)
        _store_half(d_qkv_rows, half, d_value, 3 * width, 2 * width + first)
    # On its own: with the keys' and values' sums it would not fit into the registers.
    d_query = _total(d_scores[turn][None] * _turned(turns, 0, *turn) for turn in TURNS)
    _store(d_qkv_rows, d_query * LN_2, 3 * width, first)


def _fill_turns(turns, qkv_rows, width, first, size):
    """Keys and values of a head, each half twice in a row, so that any turn of it is one load."""
    for half in range(2):
        for i in (0, 1):
            found = _load_half(qkv_rows, half, size, 3 * width, (1 + i) * width + first)
            for copy in (0, HALF):
                turns[half, i, :, copy : copy + HALF] = found


def _turned(turns, i, half, turn):
    """Keys (i = 0) or values (1): word w holds that of word (w + turn) % 8 of the half."""
    return turns[half, i, :, turn : turn + HALF][:, None]


def gelu_and_slope(u, kind: str, exact: bool):
    """Returns the GELU of `u` and a function that returns its derivative.

    Unless `exact`, erf(u / sqrt(2)) is tanh(u P(u^2)) with P fitted to move the GELU by 2.6e-5 at
    most, which is far inside the rounding of bfloat16 and takes a third of the operations.
    """
    square = u * u
    if kind == "tanh":
        curve = jnp.tanh(u * (0.7978845608028654 + 0.035677408136300125 * square))
        inner = lambda: (1 - curve * curve) * (NORMAL + 0.053516112204450186 * square)
    else:
        if exact:
            curve = jax.lax.erf(u * 0.5**0.5)
        else:
            near = jnp.minimum(square, 25.0)
            curve = jnp.tanh(u * (0.7975078774 + near * (0.03700565178 - 0.000351517653 * near)))
        inner = lambda: NORMAL * jnp.exp2((-0.5 / LN_2) * square)
    below = 0.5 + 0.5 * curve
    return u * below, lambda: below + u * inner()


def _normalize(x, eps):
    """LayerNorm over the channels without its affine; also returns 1 / standard deviation."""
    x = x - _mean(x)
    inverse = jax.lax.rsqrt(_mean(x * x) + eps)
    return x * inverse, inverse


def _normalize_back(gradient, normal, inverse):
    return (gradient - _mean(gradient) - normal * _mean(gradient * normal)) * inverse


def _mean(x):
    return x.mean(axis=0, keepdims=True)


def _total(values):
    return functools.reduce(operator.add, values)


def _product(a, b, dimensions=(((1,), (0,)), ((), ()))):
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


# -- Words [C, 2, 8, tile] and rows (word, channel)


def _words(ref):
    return ref[...].astype(jnp.float32).reshape(ref.shape[0], 2, HALF, TILE)


def _scales(ref):
    return [ref[i : i + 1][None, None] for i in range(2)]


def _load_half(rows, half, count, width, first):
    """Returns `count` channels of half of the words, [count, 8, tile]; a word is `width` rows."""
    start = half * HALF * width + first
    return jnp.stack([rows[pl.ds(start + c, HALF, stride=width)] for c in range(count)])


def _store_half(rows, half, values, width, first):
    for c in range(values.shape[0]):
        rows[pl.ds(half * HALF * width + first + c, HALF, stride=width)] = values[c]


def _load(rows, count, width=None, first=0):
    """Returns `count` channels of all words, [count, 2, 8, tile]; by default, all channels."""
    return jnp.stack(
        [_load_half(rows, half, count, width or count, first) for half in range(2)], axis=1
    )


def _store(rows, values, width=None, first=0):
    """Inverts `_load`."""
    for half in range(2):
        _store_half(rows, half, values[:, half], width or len(values), first)


def _operand(rows, height, dtype, ones=True):
    """Rows (word, channel) with all products' operands side by side: [height, products x tile]."""
    parts = [rows[i : i + height].astype(dtype) for i in range(0, rows.shape[0], height)]
    wide = jnp.concatenate(parts, axis=1)
    return jnp.concatenate([wide, jnp.ones((ONES, wide.shape[1]), dtype)]) if ones else wide


def _put_products(rows, wide, height):
    """Writes results that lie side by side as rows (word, channel) again; drops rows of ones."""
    for i in range(wide.shape[1] // TILE):
        rows[i * height : (i + 1) * height] = wide[:height, i * TILE : (i + 1) * TILE]


def _row_blocks(ref):
    """Slices of 128 rows: what the matrix unit fills while the vector unit works on the last."""
    return [slice(i, i + 128) for i in range(0, ref.shape[0], 128)]
