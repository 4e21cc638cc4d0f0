# SPDX-License-Identifier: Apache-2.0
"""The layers alone, against their equations in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import numpy_tnt
from tests.helpers.jaxprs import equations
from tests.helpers.networks import normal
from tnt_flax.models import layers


def random_variables(module, *args, **kwargs):
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))
    return {"params": numpy_tnt.random_params(shapes["params"])}


# -- LayerNorm


@pytest.mark.parametrize("eps", [1e-5, 1e-7])
def test_layer_norm_is_accurate_at_small_variance(eps):
    x = 3 + 1e-3 * normal(8, 64)  # E[x^2] - E[x]^2 would be wrong in the first digit here
    norm = layers.LayerNorm(epsilon=eps)
    variables = random_variables(norm, x)
    expected = numpy_tnt.layer_norm(variables["params"], np.asarray(x, np.float64), eps)
    np.testing.assert_allclose(norm.apply(variables, x), expected, atol=2e-3)


def test_the_default_epsilon_is_torchs():
    x = 1e-3 * normal(2, 4, 6)
    block = layers.TransformerBlock(2)
    variables = random_variables(block, x, None, train=False)
    expected = numpy_transformer(block, variables, x, norm_eps=1e-5)
    np.testing.assert_allclose(block.apply(variables, x, None, train=False), expected, atol=1e-5)


def test_layer_norm_of_bfloat16_is_computed_in_float32():
    x = 100 + normal(8, 64)
    norm = layers.LayerNorm(epsilon=1e-5, dtype=jnp.bfloat16)
    variables = random_variables(norm, x)
    x = jnp.asarray(x, jnp.bfloat16)
    expected = numpy_tnt.layer_norm(variables["params"], np.asarray(x, np.float64), 1e-5)
    out = norm.apply(variables, x)
    assert out.dtype == jnp.bfloat16
    # One rounding of the result, 2**-9 relative; statistics in bfloat16 would be far off.
    np.testing.assert_allclose(out.astype(np.float32), expected, rtol=2**-8, atol=1e-4)


# -- GELU


@pytest.mark.parametrize("name, value", [("erf", -0.00936083), ("tanh", -0.00888759)])
def test_gelu_is_the_erf_or_tanh_version(name, value):
    np.testing.assert_allclose(layers.GELU[name](jnp.float32(-2.7)), value, atol=1e-6)


@pytest.mark.parametrize("name", ["erf", "tanh"])
def test_gelu_equals_numpy_over_its_range(name):
    x = jnp.linspace(-8, 8, 4001)
    np.testing.assert_allclose(layers.GELU[name](x), numpy_tnt.GELU[name](np.asarray(x)), atol=1e-6)


def test_the_default_gelu_is_exact():
    x = normal(2, 4, 6)
    block = layers.TransformerBlock(2)
    variables = random_variables(block, x, None, train=False)
    variables["params"]["fc1"]["kernel"] *= 0  # so that the GELU sees its bias: -2.7
    variables["params"]["fc1"]["bias"][:] = -2.7
    expected = numpy_transformer(block, variables, x, gelu="erf")
    np.testing.assert_allclose(block.apply(variables, x, None, train=False), expected, atol=1e-5)


# -- Attention and the transformer block


@pytest.mark.parametrize("fields", [{}, {"qkv_bias": True}, {"out_bias": False}])
def test_attention_equals_loops_over_heads(fields):
    x = 2 * normal(2, 3, 5, 12)
    attention = layers.Attention(3, **fields)
    variables = random_variables(attention, x, train=False)
    out, state = attention.apply(variables, x, train=False, mutable=["intermediates"])
    weights = state["intermediates"]["weights"][0]
    assert weights.shape == (2, 3, 3, 5, 5)
    for i, j in np.ndindex(2, 3):
        expected, expected_weights = numpy_tnt.attention(
            variables["params"], np.asarray(x[i, j]), heads=3
        )
        np.testing.assert_allclose(out[i, j], expected, atol=1e-5)
        np.testing.assert_allclose(weights[i, j], expected_weights, atol=1e-6)


def test_leading_queries_with_a_bias_equal_those_of_all_queries():
    x, bias = normal(2, 5, 12), normal(1, 3, 5, 5)
    block = layers.TransformerBlock(3)
    variables = random_variables(block, x, None, train=False)
    run = functools.partial(block.apply, variables, x, None, bias=bias, train=False)
    assert run(num_queries=2).shape == (2, 2, 12)
    np.testing.assert_allclose(run(num_queries=2), run()[:, :2], atol=1e-6)
    assert abs(run() - block.apply(variables, x, None, train=False)).max() > 0.01


def test_large_logits_do_not_overflow():
    x = 50 * normal(1, 4, 6)
    attention = layers.Attention(1)
    variables = random_variables(attention, x, train=False)
    expected, _ = numpy_tnt.attention(variables["params"], np.asarray(x[0], np.float64), heads=1)
    np.testing.assert_allclose(attention.apply(variables, x, train=False)[0], expected, rtol=1e-3)


def test_softmax_of_bfloat16_is_computed_in_float32():
    x = jnp.asarray(normal(1, 5, 6), jnp.bfloat16)
    attention = layers.Attention(2, dtype=jnp.bfloat16)
    variables = random_variables(attention, x, train=False)
    jaxpr = jax.make_jaxpr(lambda x: attention.apply(variables, x, train=False))(x)
    softmax = [e for e in equations(jaxpr) if e.primitive.name in ("exp", "div", "reduce_sum")]
    assert {e.primitive.name for e in softmax} >= {"exp", "div"}
    assert all(e.outvars[0].aval.dtype == jnp.float32 for e in softmax)
    products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) == 6
    assert all(v.aval.dtype == jnp.bfloat16 for e in products for v in e.invars)


def test_indivisible_widths_are_refused():
    with pytest.raises(ValueError, match="width 6 is not divisible by 4 attention heads"):
        layers.Attention(4).init(jax.random.key(0), normal(1, 2, 6), train=False)


class BlockFields:
    """What numpy_tnt reads from a model, for one transformer block."""

    def __init__(self, norm_eps=1e-5, gelu="erf"):
        self.norm_eps, self.gelu = norm_eps, gelu


def numpy_transformer(block, variables, x, **fields):
    params = numpy_tnt.tree(np.float64, variables["params"])
    x = np.asarray(x, np.float64)
    return np.stack(
        [
            numpy_tnt.transformer(BlockFields(**fields), params, sequence, block.num_heads)[0]
            for sequence in x
        ]
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"se": True},
        {"mlp_ratio": 2.5},
        {"qkv_bias": True, "output_bias": False, "norm_eps": 1e-7, "gelu": "tanh"},
    ],
)
def test_transformer_block_equals_the_equations(fields):
    x = normal(2, 5, 12)
    block = layers.TransformerBlock(3, **fields)
    variables = random_variables(block, x, None, train=False)
    options = {name: fields[name] for name in ("norm_eps", "gelu") if name in fields}
    expected = numpy_transformer(block, variables, x, **options)
    np.testing.assert_allclose(block.apply(variables, x, None, train=False), expected, atol=1e-5)


def test_mlp_width_is_truncated_like_torchs():
    block = layers.TransformerBlock(1, mlp_ratio=2.6)
    variables = random_variables(block, normal(1, 2, 7), None, train=False)
    assert variables["params"]["fc1"]["kernel"].shape == (7, 18)  # int(18.2)


# -- Randomness


def test_drop_path_samples_once_per_sequence():
    update = jnp.ones((64, 5, 7, 3))  # B, N, M, C: words
    rate = jnp.float32(0.3)
    out = layers.DropPath().apply({}, update, rate, rngs={"dropout": jax.random.key(0)})
    out = np.asarray(out)
    np.testing.assert_array_equal(out, np.broadcast_to(out[:, :, :1, :1], out.shape))
    samples = out[:, :, 0, 0]
    assert set(np.unique(samples)) == {0, np.float32(1) / (1 - np.float32(0.3))}
    assert 0.6 < np.mean(samples > 0) < 0.8  # 320 samples: 4 sigma
    assert (samples != samples[:, :1]).any()  # not per image
    assert (samples != samples[:1]).any()  # nor the same for all images


def test_drop_path_of_rate_none_and_0_keeps_everything():
    update = normal(2, 3, 4)
    np.testing.assert_array_equal(layers.DropPath().apply({}, update, None), update)
    rngs = {"dropout": jax.random.key(0)}
    out = layers.DropPath().apply({}, update, jnp.float32(0), rngs=rngs)
    np.testing.assert_array_equal(out, update)


def test_drop_path_keeps_the_dtype_of_the_computation():
    update = jnp.ones((2, 3, 4), jnp.bfloat16)
    rngs = {"dropout": jax.random.key(0)}
    assert layers.DropPath().apply({}, update, jnp.float32(0.5), rngs=rngs).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "fields, sites",
    [
        ({}, []),
        ({"attention_dropout": 0.5}, [(2, 3, 5, 5)]),  # 2 sequences, 3 heads
        ({"dropout": 0.5}, [(2, 5, 12), (2, 5, 48), (2, 5, 12)]),  # attention's output, MLP twice
    ],
)
def test_dropout_sites(fields, sites):
    x = normal(2, 5, 12)
    block = layers.TransformerBlock(3, **fields)
    variables = random_variables(block, x, None, train=False)

    def apply(x, train):
        rngs = {"dropout": jax.random.key(0)}
        return block.apply(variables, x, None, train=train, rngs=rngs)

    def draws(train):
        jaxpr = jax.make_jaxpr(lambda x: apply(x, train))(x)
        bits = [e for e in equations(jaxpr) if e.primitive.name in ("random_bits", "threefry2x32")]
        return [e.outvars[0].aval.shape for e in bits]

    assert draws(train=True) == sites
    assert draws(train=False) == []


# -- Initial values


def test_dense_kernels_start_with_an_untruncated_normal():
    kernel = layers.Dense(1000).init(jax.random.key(0), normal(1, 384))["params"]["kernel"]
    assert abs(kernel.std() - 0.02) < 1e-4  # cut at 2 sigma it would be .0176
    assert 0.08 < abs(kernel).max() < 0.14  # 384,000 samples reach 4 to 7 sigma


def test_biases_start_with_zeros_and_norms_with_the_identity():
    block = layers.TransformerBlock(2, se=True, qkv_bias=True)
    init = functools.partial(block.init, drop_path_rate=None, train=False)
    params = jax.jit(init)(jax.random.key(0), normal(1, 2, 8))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert len([path for path, _ in leaves if path[-1].key == "bias"]) == 11
    for path, x in leaves:
        if path[-1].key == "bias":
            np.testing.assert_array_equal(x, 0)
        elif path[-1].key == "scale":
            np.testing.assert_array_equal(x, 1)
