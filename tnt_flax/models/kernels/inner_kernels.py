# SPDX-License-Identifier: Apache-2.0
"""The inner transformer block and its gradient as two TPU kernels, one tile of sentences a step.

Sentences lie on the lanes: a tile is words [C, 16, 128]. What is elementwise in the words (norms,
attention) works on (8 words, 128 sentences) registers of one channel. What mixes channels goes
through the matrix unit in the other order of rows, (word, channel), for as many words at once as
its 128 rows hold; strided stores and loads change the order. Weights come as `inner_pallas` packs
them: block-diagonal, the LayerNorm's affine, the softmax's scale and log2(e) inside, biases as a
column that meets rows of ones. Everything but the products' operands is float32.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# It moved in jax 0.12.
reciprocal = pltpu.reciprocal if hasattr(pltpu, "reciprocal") else pl.reciprocal

WORDS = 16
TILE = 128  # sentences per step: the lanes of a register
HALF = 8  # words per register: its sublanes
ONES = 16  # rows of ones below a product's operand: the fewest that keep bfloat16 tiles whole

TURNS = tuple((half, turn) for half in range(2) for turn in range(HALF))

LN_2 = 0.6931471805599453
NORMAL = 0.3989422804014327  # the normal density at 0
TO_LANES = (((1,), (1,)), ((), ()))  # contracts both operands' lanes: a @ b.T
TO_ROWS = (((0,), (0,)), ((), ()))  # contracts both operands' rows: a.T @ b


def words_per_product(width: int) -> int:
    """How many words go through the matrix unit together."""
    return max(words for words in (8, 4, 2) if words * width + ONES <= 128)


def gelu(u, kind: str, exact: bool):
    """The GELU and its derivative, without the latter's cost where it is not used.

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


def product(a, b, dimensions=(((1,), (0,)), ((), ()))):
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def normalize(x, eps):
    """LayerNorm over the channels without its affine; also returns 1 / standard deviation."""
    x = x - mean(x)
    inverse = jax.lax.rsqrt(mean(x * x) + eps)
    return x * inverse, inverse


def normalize_back(gradient, normal, inverse):
    return (gradient - mean(gradient) - normal * mean(gradient * normal)) * inverse


def mean(x):
    return x.mean(axis=0, keepdims=True)


def channels(rows, width, first, count, half):
    """`count` channels of half of the words, [count, 8, tile], of rows (word, `width`)."""
    start = half * HALF * width + first
    return jnp.stack([rows[pl.ds(start + c, HALF, stride=width)] for c in range(count)])


def put_channels(rows, width, first, half, values):
    for c in range(values.shape[0]):
        rows[pl.ds(half * HALF * width + first + c, HALF, stride=width)] = values[c]


def pairs(rows, width, first, count):
    """`channels` of both halves: [count, 2, 8, tile]."""
    return jnp.stack([channels(rows, width, first, count, half) for half in range(2)], axis=1)


def put_pairs(rows, width, first, values):
    for half in range(2):
        put_channels(rows, width, first, half, values[:, half])


def scatter(rows, x):
    """Writes x [C, 16, tile] as rows (word, channel)."""
    for half in range(2):
        put_channels(rows, x.shape[0], 0, half, x[:, half * HALF : (half + 1) * HALF])


def gather(rows, width):
    """The inverse of `scatter`."""
    return jnp.concatenate([channels(rows, width, 0, width, half) for half in range(2)], axis=1)


def operand(rows, height, dtype, ones=True):
    """Rows (word, channel) with all products' operands side by side: [height, products x tile]."""
    parts = [rows[i : i + height].astype(dtype) for i in range(0, rows.shape[0], height)]
    wide = jnp.concatenate(parts, axis=1)
    return jnp.concatenate([wide, jnp.ones((ONES, wide.shape[1]), dtype)]) if ones else wide


def put_products(rows, wide, height):
    """Writes results that lie side by side as rows (word, channel) again; drops rows of ones."""
    for i in range(wide.shape[1] // TILE):
        rows[i * height : (i + 1) * height] = wide[:height, i * TILE : (i + 1) * TILE]


def attention(x, weight, rows, turns, statistics, *, heads, norm_eps, dtype):
    """Norm, query, key, value and softmax of x [C, 16, tile]; returns the norm's two results.

    `rows` are three references, which receive the normal words, query with key with value, and the
    output. `statistics`, if any, are two that receive the largest score and 1 / sum.
    """
    z_rows, qkv_rows, out_rows = rows
    width = x.shape[0]
    size = width // heads
    normal, inverse = normalize(x, norm_eps)
    scatter(z_rows, normal)
    words = words_per_product(width)
    qkv = product(weight[...], operand(z_rows, words * width, dtype))
    put_products(qkv_rows, qkv, words * 3 * width)

    def head(h, carry):
        fill_turns(turns, qkv_rows, width, h * size, size)
        query = pairs(qkv_rows, 3 * width, h * size, size)
        scores = [(query * turned(turns, 0, *turn)).sum(axis=0) for turn in TURNS]
        largest = functools.reduce(jnp.maximum, scores)
        odds = [jnp.exp2(score - largest) for score in scores]
        share = reciprocal(total(odds), approx=dtype != jnp.float32)
        mixed = total(p[None] * turned(turns, 1, *t) for p, t in zip(odds, TURNS, strict=True))
        put_pairs(out_rows, width, h * size, mixed * share[None])
        for reference, found in zip(statistics, (largest, share), strict=False):
            reference[h] = found
        return carry

    jax.lax.fori_loop(0, heads, head, 0)
    return normal, inverse


def fill_turns(turns, qkv_rows, width, first, size):
    """Keys and values of a head, each half twice in a row, so that any turn of it is one load."""
    for half in range(2):
        for i in (0, 1):
            found = channels(qkv_rows, 3 * width, (1 + i) * width + first, size, half)
            for copy in (0, HALF):
                turns[half, i, :, copy : copy + HALF] = found


def turned(turns, i, half, turn):
    """Keys (i = 0) or values (1): word w holds that of word (w + turn) % 8 of the half."""
    return turns[half, i, :, turn : turn + HALF][:, None]


def total(values):
    return functools.reduce(operator.add, values)


def row_blocks(rows):
    """Slices of 128 rows: what the matrix unit fills while the vector unit works on the last."""
    return [slice(i, i + 128) for i in range(0, rows, 128)]


def forward_kernel(*refs, heads, norm_eps, gelu_kind, drops):
    x_ref, *refs = refs
    scale_ref, refs = (refs[0], refs[1:]) if drops else (None, refs)
    qkv, out, fc1, fc2, fc2_bias, y_ref, z_rows, qkv_rows, out_rows, turns, u_ref, act_ref = refs
    dtype = y_ref.dtype
    x = x_ref[...].astype(jnp.float32)
    width = x.shape[0]
    height = words_per_product(width) * width
    scale = [scale_ref[i : i + 1][None] for i in range(2)] if drops else [1.0, 1.0]

    rows = (z_rows, qkv_rows, out_rows)
    attention(x, qkv, rows, turns, (), heads=heads, norm_eps=norm_eps, dtype=dtype)
    put_products(z_rows, product(out[...], operand(out_rows, height, dtype)), height)
    x = x + gather(z_rows, width) * scale[0]

    scatter(out_rows, normalize(x, norm_eps)[0])
    z = operand(out_rows, height, dtype)
    for rows in row_blocks(u_ref.shape[0]):
        u_ref[rows] = product(fc1[rows], z)
    for rows in row_blocks(u_ref.shape[0]):
        act_ref[rows] = gelu(u_ref[rows], gelu_kind, dtype == jnp.float32)[0].astype(dtype)
    put_products(z_rows, product(fc2[...], act_ref[...]), height)
    y_ref[...] = (x + (gather(z_rows, width) + fc2_bias[...]) * scale[1]).astype(dtype)


def attention_back(h, width, size, rows, turns, statistics):
    """Gradients of one head's query, key and value, from that of its output.

    `rows` hold query with key with value, the output, its gradient, and receive the gradients. A
    turned key's gradient is turned back: so all sums are over registers, none within one.
    """
    qkv_rows, out_rows, d_out_rows, d_qkv_rows = rows
    first = h * size
    largest, share = (reference[h] for reference in statistics)
    fill_turns(turns, qkv_rows, width, first, size)
    query, output = pairs(qkv_rows, 3 * width, first, size), pairs(out_rows, width, first, size)
    d_output = pairs(d_out_rows, width, first, size) * share[None]
    common = (d_output * output).sum(axis=0)
    d_scores = {}
    for half in range(2):
        d_key = d_value = 0.0
        for turn in reversed(range(HALF)):
            key, value = (turned(turns, i, half, turn) for i in (0, 1))
            odds = jnp.exp2((query * key).sum(axis=0) - largest)
            d_score = odds * ((d_output * value).sum(axis=0) - common)
            d_scores[half, turn] = d_score
            d_key += (d_score[None] * query).sum(axis=1)
            d_value += (odds[None] * d_output).sum(axis=1)
            if turn:
                d_key, d_value = (pltpu.roll(x, 1, 1) for x in (d_key, d_value))
        put_channels(d_qkv_rows, 3 * width, width + first, half, d_key * LN_2)
        put_channels(d_qkv_rows, 3 * width, 2 * width + first, half, d_value)
    # On its own: with the keys' and values' sums it would not fit into the registers.
    d_query = total(d_scores[turn][None] * turned(turns, 0, *turn) for turn in TURNS)
    put_pairs(d_qkv_rows, 3 * width, first, d_query * LN_2)


def mlp_back(z, d_y, fc1, fc2, act_ref, du_ref, gelu_kind):
    """Writes fc2's input and the gradient of fc1's output; `d_y` is that of fc2's output."""
    exact = z.dtype == jnp.float32
    for rows in row_blocks(act_ref.shape[0]):
        act, slope = gelu(product(fc1[rows], z), gelu_kind, exact)
        act_ref[rows] = act.astype(z.dtype)
        du_ref[rows] = (product(fc2[:, rows], d_y, TO_ROWS) * slope()).astype(z.dtype)


def backward_kernel(*refs, heads, norm_eps, gelu_kind, drops, sentences):
    x_ref, g_ref, *refs = refs
    scale_ref, refs = (refs[0], refs[1:]) if drops else (None, refs)
    qkv, out, fc1, fc2, dx_ref, d_qkv, d_out, d_fc1, d_fc2, *refs = refs
    z_rows, qkv_rows, out_rows, turns, act_ref, du_ref, *refs = refs
    mlp_rows, g_rows, dqkv_rows, *statistics = refs
    dtype = dx_ref.dtype
    width = x_ref.shape[0]
    height = words_per_product(width) * width
    wide = functools.partial(operand, height=height, dtype=dtype)

    @pl.when(pl.program_id(0) == 0)
    def _():
        for reference in (d_qkv, d_out, d_fc1, d_fc2):
            reference[...] = jnp.zeros_like(reference)

    x, g = x_ref[...].astype(jnp.float32), g_ref[...].astype(jnp.float32)
    scale = [scale_ref[i : i + 1][None] for i in range(2)] if drops else [1.0, 1.0]
    if sentences % TILE:  # what lies behind the last sentence is anything, NaN too
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, 1, TILE), 2)
        inside = lane < sentences - pl.program_id(0) * TILE
        x, g = jnp.where(inside, x, 0.0), jnp.where(inside, g, 0.0)
        scale = [jnp.where(inside, factor, 0.0) for factor in scale] if drops else scale

    # Forward again, up to the MLP's input.
    rows = (z_rows, qkv_rows, out_rows)
    options = dict(heads=heads, norm_eps=norm_eps, dtype=dtype)
    z1, inverse1 = attention(x, qkv, rows, turns, statistics, **options)
    put_products(mlp_rows, product(out[...], wide(out_rows)), height)
    z2, inverse2 = normalize(x + gather(mlp_rows, width) * scale[0], norm_eps)

    # The MLP.
    scatter(mlp_rows, z2)
    scatter(g_rows, g * scale[1])
    z, d_y = wide(mlp_rows), wide(g_rows, ones=False)
    mlp_back(z, d_y, fc1, fc2, act_ref, du_ref, gelu_kind)
    d_fc2[...] += product(d_y, act_ref[...], TO_LANES)
    d_fc1[...] += product(du_ref[...], z, TO_LANES)
    put_products(mlp_rows, product(fc1[...], du_ref[...], TO_ROWS), height)
    g = g + normalize_back(gather(mlp_rows, width), z2, inverse2)

    # Attention.
    scatter(g_rows, g * scale[0])
    d_y = wide(g_rows, ones=False)
    d_out[...] += product(d_y, wide(out_rows), TO_LANES)
    put_products(mlp_rows, product(out[...], d_y, TO_ROWS), height)
    rows = (qkv_rows, out_rows, mlp_rows, dqkv_rows)

    def head(h, carry):
        attention_back(h, width, width // heads, rows, turns, statistics)
        return carry

    jax.lax.fori_loop(0, heads, head, 0)
    d_y = operand(dqkv_rows, 3 * height, dtype, ones=False)
    d_qkv[...] += product(d_y, wide(z_rows), TO_LANES)
    put_products(mlp_rows, product(qkv[...], d_y, TO_ROWS), height)
    dx_ref[...] = (g + normalize_back(gather(mlp_rows, width), z1, inverse1)).astype(dtype)
