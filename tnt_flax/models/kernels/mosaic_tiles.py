# SPDX-License-Identifier: Apache-2.0
"""What the kernels of `mosaic` compute of a tile of 64 words, and how they run all tiles.

Loops are not unrolled. Otherwise the addresses of all iterations occupy registers, and the backward
kernels spill them.
"""

import functools
import inspect
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tnt_flax.models.kernels.inner_pallas import LN_2, WORDS, gelu_and_slope

INTERPRET: Any = None  # in tests, InterpretGPUParams runs the kernels without a GPU
CORES = 132  # of an H100 or H200
SHARED_MEMORY = 226 * 1024  # bytes of a core, without those that are reserved

ROWS = 64  # words of a tile
SENTENCES = ROWS // WORDS
SLOT = 16  # channels that a tensor core contracts
HEAD = 3 * SLOT  # query, key and value
CHUNK = 32  # hidden channels of the MLP that are processed at a time
LOAD_INDEX = (...,) if "idx" in inspect.signature(plgpu.load).parameters else ()  # jax < 0.12


def run(tile, *, name, inputs, weights, outputs, scratch, sums=None, repeats=None):
    """Runs `tile(refs, i)` for every tile i, with references to all arrays by name.

    Args:
        tile: a function.
        name: of the kernel.
        inputs: arrays in global memory by name, or None. `x` are the words.
        weights: matrices, which are cast to the dtype of the words and copied to shared memory.
        outputs: names of arrays like the words, in global memory. If there are none, `y` is
            written over `x`.
        scratch: matrices of 64 rows in shared memory; their numbers of columns that tiles write,
            columns of ones, and columns of zeros.
        sums: for each float32 matrix in shared memory to which all tiles add, the names of the
            scratch a and b of the products a^T b.
        repeats: numbers of such matrices below each other, if not 1.

    Returns:
        Outputs and sums by name.
    """
    x, sums, repeats = inputs["x"], sums or {}, repeats or {}
    inputs = {key: array for key, array in inputs.items() if array is not None}
    weights = {key: array.astype(x.dtype) for key, array in weights.items()}
    shapes = {key: (ROWS, sum(columns)) for key, columns in scratch.items()}
    sums = {key: (repeats.get(key, 1) * shapes[a][1], shapes[b][1]) for key, (a, b) in sums.items()}
    shapes |= {key: w.shape for key, w in weights.items()}
    used = x.dtype.itemsize * sum(map(math.prod, shapes.values()))
    used += 4 * sum(map(math.prod, sums.values()))
    tiles = x.shape[0] // ROWS
    blocks = min(tiles, CORES * max(SHARED_MEMORY // used, 1))  # 0 in float32, in tests
    names = inputs, weights, outputs, sums
    kernel = functools.partial(_run_tiles, tile, names, scratch, tiles, blocks)
    scratch_types = dict(
        matrices={key: _matrix(shape, x.dtype, 32) for key, shape in shapes.items()},
        totals={key: _matrix(shape, jnp.float32, 64) for key, shape in sums.items()},
        barrier=plgpu.Barrier(num_arrivals=len(weights)),
    )
    out_type = [jax.ShapeDtypeStruct(x.shape, x.dtype) for _ in outputs]
    out_type += [jax.ShapeDtypeStruct((blocks, *shape), jnp.float32) for shape in sums.values()]
    if not outputs:
        inputs["x"] = jax.new_ref(x)
    results = pl.kernel(
        lambda *memory: pl.run_scoped(functools.partial(kernel, memory), **scratch_types),
        out_type=out_type,
        mesh=plgpu.Mesh(grid=(blocks,), grid_names=("block",)),
        name=name,
        interpret=INTERPRET or False,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*inputs.values(), *weights.values())
    if not outputs:
        return {"y": jax.freeze(inputs["x"])}
    results = dict(zip([*outputs, *sums], results, strict=True))
    return results | {key: results[key].sum(axis=0) for key in sums}


def _run_tiles(tile, names, scratch, tiles, blocks, memory, *, matrices, totals, barrier):
    """Runs every `blocks`-th tile, beginning with the number of this thread block."""
    memory = list(memory)
    inputs, weights, outputs, sums = ({key: memory.pop(0) for key in keys} for keys in names)
    for key, source in weights.items():
        plgpu.copy_gmem_to_smem(source, matrices[key], barrier)
    for key, (columns, *ones) in scratch.items():
        _fill(matrices[key], 0)
        if ones and ones[0]:
            _fill(matrices[key].at[:, columns : columns + ones[0]], 1)
    for total in totals.values():
        _fill(total, 0)
    plgpu.barrier_wait(barrier)

    refs = {"scales": None, "middle": None, "y": inputs["x"]} | inputs | outputs
    refs = SimpleNamespace(**refs, **matrices, **totals)
    block = jax.lax.axis_index("block")
    _loop((tiles - block + blocks - 1) // blocks)(lambda i: tile(refs, block + i * blocks))
    plgpu.commit_smem()
    for key, target in sums.items():
        plgpu.copy_smem_to_gmem(totals[key], target.at[block])
    plgpu.wait_smem_to_gmem(0)


def _matrix(shape, dtype, swizzle):
    """Returns the type of a matrix in shared memory, in the order that tensor cores read."""
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


# -- Tiles. x, g, scales, y, middle and dx are in global memory, all others in shared memory.


def forward_tile(refs, tile, norm_eps, gelu):
    """Writes `y` and, if it is an output, `middle`."""
    x = _load(refs.x, tile)
    _put_slots(refs.z, _normalize(x, norm_eps)[0])
    plgpu.commit_smem()
    heads = refs.qkv.shape[1] // HEAD

    @_loop(heads, _bias(refs.z, refs.out))
    def update(h, update):
        _attend(refs, h)
        _put(refs.mixed, _product(refs.shares, _columns(refs.head, 2)))
        plgpu.commit_smem()
        return update + _product(refs.mixed, _columns(refs.out, h), (1, 1))

    x = x + _scale(update, refs.scales, 0, tile)
    if refs.middle is not None:
        _store(refs.middle, tile, x)
    _put_slots(refs.z, _normalize(x, norm_eps)[0])
    plgpu.commit_smem()

    @_loop(refs.fc1.shape[1] // CHUNK, _bias(refs.z, refs.fc2))
    def update(i, update):
        u = _product(refs.z, _columns(refs.fc1, i, CHUNK))
        _put(refs.hidden, gelu_and_slope(u, gelu, refs.x.dtype == jnp.float32)[0])
        plgpu.commit_smem()
        return update + _product(refs.hidden, _columns(refs.fc2, i, CHUNK), (1, 1))

    _store(refs.y, tile, x + _scale(update, refs.scales, 1, tile))


def mlp_backward_tile(refs, tile, norm_eps, gelu):
    """Writes `dx`, the gradient of the MLP's input `x`, from `g`, that of the MLP's result."""
    g = _load(refs.g, tile)
    normal, inverse = _normalize(_load(refs.x, tile), norm_eps)
    _put_slots(refs.z, normal)
    _put_slots(refs.dy, _scale(g, refs.scales, 1, tile))
    plgpu.commit_smem()
    hidden = refs.fc1.shape[1]

    @_loop(hidden // CHUNK)
    def _(i):
        u = _product(refs.z, _columns(refs.fc1, i, CHUNK))
        value, slope = gelu_and_slope(u, gelu, refs.x.dtype == jnp.float32)
        _put(_columns(refs.hidden, i, CHUNK), value)
        d_value = _product(refs.dy, _columns(refs.fc2_back, i, CHUNK))
        _put(_columns(refs.d_hidden, i, CHUNK), d_value * slope())

    plgpu.commit_smem()
    _add_product(refs.d_fc1, refs.d_hidden, refs.z)
    _add_product(refs.d_fc2, refs.hidden, refs.dy)
    d_normal = _product(refs.d_hidden.at[:, :hidden], refs.fc1_back, (1, 1))
    _store(refs.dx, tile, g + _normalize_back(d_normal, normal, inverse))


def attention_backward_tile(refs, tile, norm_eps):
    """Writes `dx`, the gradient of the block's input `x`, from `g`, that of `middle`."""
    g = _load(refs.g, tile)
    normal, inverse = _normalize(_load(refs.x, tile), norm_eps)
    _put_slots(refs.z, normal)
    _put_slots(refs.dy, _scale(g, refs.scales, 0, tile))
    plgpu.commit_smem()
    heads = refs.qkv.shape[1] // HEAD

    @_loop(heads, _in_registers(jnp.zeros_like(g)))
    def d_normal(h, d_normal):
        shares = _attend(refs, h)
        query, key, value = (_columns(refs.head, i) for i in range(3))
        _put(_columns(refs.mixed, h), _product(refs.shares, value))
        _put(refs.d_mixed, _product(refs.dy, _columns(refs.out_back, h)))
        plgpu.commit_smem()
        d_shares = _within_sentences(_product(refs.d_mixed, value, (1, 1)))
        common = _across((d_shares * shares).sum(axis=1), shares.shape)
        _put_blocks(refs.d_scores, shares * (d_shares - common) * LN_2)
        plgpu.commit_smem()
        d_query = _product(refs.d_scores, key)
        d_key = _product(refs.d_scores, query, (0, 0))
        d_value = _product(refs.shares, refs.d_mixed, (0, 0))
        for ref, gradient in ((query, d_query), (key, d_key), (value, d_value)):
            _put(ref, gradient)
        plgpu.commit_smem()
        _add_product(refs.d_qkv.at[_rows(h)], refs.head, refs.z)
        d_head = refs.head.at[:, :HEAD]
        return d_normal + _product(d_head, _columns(refs.qkv_back, h, HEAD), (1, 1))

    _add_product(refs.d_out, refs.mixed, refs.dy)
    _store(refs.dx, tile, g + _normalize_back(d_normal, normal, inverse))


def _attend(refs, h):
    """Computes query, key and value of a head, and its attention weights [64, 16].

    Both are left in `head` and `shares`, the weights as a block-diagonal matrix.
    """
    _put(refs.head.at[:, :HEAD], _product(refs.z, _columns(refs.qkv, h, HEAD)))
    plgpu.commit_smem()
    scores = _product(_columns(refs.head, 0), _columns(refs.head, 1), (1, 1))
    scores = _within_sentences(scores)
    odds = jnp.exp2(scores - _across(scores.max(axis=1), scores.shape))
    shares = odds * _across(1 / odds.sum(axis=1), odds.shape)
    _put_blocks(refs.shares, shares)
    plgpu.commit_smem()
    return shares


def _within_sentences(scores):
    """Returns the diagonal blocks [64, 16] of a matrix [64, 64]."""
    blocks = scores[:, :WORDS]
    sentence = _sentence(blocks.shape)
    for i in range(1, SENTENCES):
        blocks = jnp.where(sentence == i, scores[:, i * WORDS : (i + 1) * WORDS], blocks)
    return blocks


def _put_blocks(ref, blocks):
    """Writes a block-diagonal matrix."""
    sentence = _sentence(blocks.shape)
    for i in range(SENTENCES):
        _put(_columns(ref, i), jnp.where(sentence == i, blocks, 0.0))


def _sentence(shape):
    """Returns the number of each row's sentence."""
    return _in_registers(jax.lax.broadcasted_iota(jnp.int32, shape, 0)) // WORDS


def _scale(update, scales, which, tile):
    """Multiplies the rows of each sentence by its factor."""
    if scales is None:
        return update
    first = tile * SENTENCES
    sentence = _sentence(update.shape)
    factor = scales[which, first]
    for i in range(1, SENTENCES):
        factor = jnp.where(sentence == i, scales[which, first + i], factor)
    return update * factor


def _normalize(x, norm_eps):
    """LayerNorm without its affine; also returns 1 / standard deviation."""
    x = x - _mean(x)
    inverse = jax.lax.rsqrt(_mean(x * x) + norm_eps)
    return x * inverse, inverse


def _normalize_back(gradient, normal, inverse):
    return (gradient - _mean(gradient) - normal * _mean(gradient * normal)) * inverse


def _mean(x):
    return _across(x.sum(axis=1) / x.shape[1], x.shape)


def _across(vector, shape):
    return jax.lax.broadcast_in_dim(vector, shape, (0,))


# -- Memory and products


def _loop(count, *start):
    """Decorates a loop's body, a function of a number and what it returned before."""

    def run(body):
        if start:
            return jax.lax.fori_loop(0, count, body, *start)
        return jax.lax.fori_loop(0, count, lambda i, carry: (body(i), carry)[1], 0)

    return run


def _rows(i):
    return pl.ds(i * ROWS, ROWS)


def _columns(ref, i, count=SLOT):
    return ref.at[:, pl.ds(i * count, count)]


def _in_registers(x):
    """Gives a constant the layout of products, which the interpreter does not know."""
    return x if INTERPRET else plgpu.layout_cast(x, plgpu.Layout.WGMMA)


def _load(ref, tile):
    """Returns the words of a tile in float32."""
    words = ref.at[_rows(tile)]
    if INTERPRET:
        return words[...].astype(jnp.float32)
    words = plgpu.load(words, *LOAD_INDEX, layout=plgpu.Layout.WGMMA, optimized=False)
    return words.astype(jnp.float32)


def _store(ref, tile, x):
    """Writes the words of a tile."""
    words = ref.at[_rows(tile)]
    if INTERPRET or not hasattr(plgpu, "store"):  # which is new in jax 0.12
        _put(words, x)
    else:
        plgpu.store(words, x.astype(ref.dtype), optimized=False)


def _put(ref, x):
    ref[...] = x.astype(ref.dtype)


def _put_slots(ref, x):
    """Writes words [64, C] to slots."""
    width = x.shape[1]
    whole = width // SLOT
    _put(ref.at[:, : whole * SLOT], x[:, : whole * SLOT])
    if width % SLOT:
        _put(_columns(ref, whole), x[:, width - SLOT :])


def _fill(ref, value):
    ref[...] = _in_registers(jnp.full(ref.shape, value, ref.dtype))


def _bias(z, weight):
    """Returns the bias [64, C] in the last columns of `weight`, which meet the ones of `z`."""
    ones, bias = (_columns(ref, ref.shape[1] // SLOT - 1) for ref in (z, weight))
    return _product(ones, bias, (1, 1))


def _add_product(total, a, b):
    """Adds a^T b to `total`, 64 rows at a time."""

    @_loop(total.shape[0] // ROWS)
    def _(i):
        total[_rows(i)] += _product(_columns(a, i, ROWS), b, (0, 0))


def _product(a, b, axes=(1, 0)):
    """Returns the float32 product of two matrices in shared memory, contracted over `axes`."""
    if INTERPRET and axes != (1, 0):  # the interpreter's `wgmma` refuses transposed operands
        axes = (axes[:1], axes[1:]), ((), ())
        return jax.lax.dot_general(a[...], b[...], axes, preferred_element_type=jnp.float32)
    a = plgpu.transpose_ref(a, (1, 0)) if axes[0] == 0 else a
    b = plgpu.transpose_ref(b, (1, 0)) if axes[1] == 1 else b

    def multiply(total):
        plgpu.wgmma(total, a, b)
        return total[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))
