# SPDX-License-Identifier: Apache-2.0
"""The layers alone, against their equations in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import numpy_tnt
from tests.helpers.jaxprs import equations
from tests.helpers.networks import jit, normal, random_variables
from tnt_flax.models import TNT, PyramidTNT, layers

# -- LayerNorm and GELU


def test_layer_norm_is_accurate_at_small_variance():
    x = 3 + 1e-3 * normal(8, 64)  # E[x^2] - E[x]^2 would be wrong in the first digit here
    norm = layers.LayerNorm(epsilon=1e-7)
    variables = random_variables(norm, x)
    expected = numpy_tnt.layer_norm(variables["params"], np.asarray(x, np.float64), 1e-7)
    np.testing.assert_allclose(norm.apply(variables, x), expected, atol=2e-3)


@pytest.mark.parametrize("name", ["erf", "tanh"])
def test_gelu_equals_numpy_over_its_range(name):
    x = jnp.linspace(-8, 8, 4001)
    np.testing.assert_allclose(layers.GELU[name](x), numpy_tnt.GELU[name](np.asarray(x)), atol=1e-6)


# -- Attention and the transformer block


@pytest.mark.parametrize("fields", [{}, {"qkv_bias": True}, {"out_bias": False}])
def test_attention_equals_loops_over_heads(fields):
    x = 2 * normal(2, 3, 5, 12)
    attention = layers.Attention(3, **fields)
    variables = random_variables(attention, x, train=False)
    run = jit(functools.partial(attention.apply, train=False, mutable=["intermediates"]))
    out, state = run(variables, x)
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
    run = jit(functools.partial(block.apply, train=False), static_argnames="num_queries")
    first, full = (
        run(variables, x, None, bias=bias, num_queries=2),
        run(variables, x, None, bias=bias),
    )
    assert first.shape == (2, 2, 12)
    np.testing.assert_allclose(first, full[:, :2], atol=1e-6)
    assert abs(full - run(variables, x, None)).max() > 0.01


def test_large_logits_do_not_overflow():
    x = 50 * normal(1, 4, 6)
    attention = layers.Attention(1)
    variables = random_variables(attention, x, train=False)
    expected, _ = numpy_tnt.attention(variables["params"], np.asarray(x[0], np.float64), heads=1)
    found = jit(functools.partial(attention.apply, train=False))(variables, x)
    np.testing.assert_allclose(found[0], expected, rtol=1e-3)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"se": True, "layer_scale": True},
        {"mlp_ratio": 2.5},
        {"qkv_bias": True, "output_bias": False, "norm_eps": 1e-7, "gelu": "tanh"},
    ],
)
def test_transformer_block_equals_the_equations(fields):
    x = normal(2, 5, 12)
    block = layers.TransformerBlock(3, **fields)
    variables = random_variables(block, x, None, train=False)
    params = numpy_tnt.tree(np.float64, variables["params"])
    expected = [
        numpy_tnt.transformer(block, params, tokens, heads=3)[0]
        for tokens in np.asarray(x, np.float64)
    ]
    found = jit(functools.partial(block.apply, train=False))(variables, x, None)
    np.testing.assert_allclose(found, expected, atol=1e-5)


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


@pytest.mark.parametrize(
    "model",
    [TNT(24, 8, 3, 2, depth=3, drop_path=0.2), PyramidTNT(8, 4, 1, 1, (1, 2, 1, 1), drop_path=0.2)],
)
def test_drop_path_rates_increase_linearly_or_are_uniform(model):
    rates = layers.drop_path_rates(model)
    np.testing.assert_allclose(rates, [0.2 * i / (model.depth - 1) for i in range(model.depth)])
    uniform = layers.drop_path_rates(model.clone(uniform_drop_path=True))
    np.testing.assert_array_equal(uniform, np.full(model.depth, 0.2, np.float32))


def test_drop_path_of_rate_none_or_0_keeps_everything():
    update = normal(2, 3, 4).astype(jnp.bfloat16)
    for rate in (None, jnp.float32(0)):
        out = layers.DropPath().apply({}, update, rate, rngs={"dropout": jax.random.key(0)})
        assert out.dtype == jnp.bfloat16
        np.testing.assert_array_equal(out, update)


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

    def sampled_shapes(train):
        rngs = {"dropout": jax.random.key(0)}
        apply = functools.partial(block.apply, variables, train=train, rngs=rngs)
        bits = ("random_bits", "threefry2x32")
        found = [e for e in equations(jax.make_jaxpr(apply)(x, None)) if e.primitive.name in bits]
        return [e.outvars[0].aval.shape for e in found]

    assert sampled_shapes(train=True) == sites
    assert sampled_shapes(train=False) == []


# -- Initial values
