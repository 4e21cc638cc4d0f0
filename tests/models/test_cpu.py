# SPDX-License-Identifier: Apache-2.0
"""The CPU's products and attention equal the reference, and keep their barriers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.jaxprs import equations
from tnt_flax.models.kernels import cpu
from tnt_flax.models.layers import Attention


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def gradients(function, *args):
    """Of a sum that weighs every output differently."""

    def loss(args):
        out = function(*args)
        return (out * normal(*out.shape, seed=9)).sum()

    return jax.jit(jax.grad(loss))(args)


@pytest.mark.parametrize("inputs, outputs", [(5, 12), (12, 5), (6, 6)])
def test_matmul(inputs, outputs):
    x, kernel = normal(2, 3, inputs), normal(inputs, outputs, seed=1)
    np.testing.assert_allclose(cpu.matmul(x, kernel), x @ kernel, rtol=1e-6)
    found, expected = (gradients(f, x, kernel) for f in (cpu.matmul, jnp.matmul))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
    )


@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_attend_equals_the_attention_of_the_layers(tokens):
    x = normal(2, 3, tokens, 8)
    plain = Attention(num_heads=2)
    variables = {"params": plain.init(jax.random.key(0), x, train=False)["params"]}
    variables = jax.tree.map(lambda w: 20 * w, variables)  # far from equal attention weights
    fast = plain.clone(attention_fn=cpu.attend)

    def apply(module, variables, x):
        return module.apply(variables, x, train=True)

    functions = [functools.partial(apply, module) for module in (fast, plain)]
    found, expected = (f(variables, x) for f in functions)
    assert found.shape == (2, 3, tokens, 8)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    found, expected = (gradients(f, variables, x) for f in functions)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest),
        found,
        expected,
    )


def attend(query, key, value):
    return cpu.attend(query, key, value, query.shape[-1] ** -0.5)


def test_the_softmax_is_float32():
    x = normal(1, 4, 2, 8).astype(jnp.bfloat16)
    found = {
        e.invars[0].aval.dtype
        for e in equations(jax.make_jaxpr(attend)(x, x, x))
        if e.primitive.name == "exp"
    }
    assert found == {jnp.dtype("float32")} and attend(x, x, x).dtype == jnp.bfloat16


def test_barriers_cut_the_gradients_apart():
    x, kernel, heads = normal(3, 6), normal(6, 4), normal(1, 4, 2, 8)
    for function, args, barriers in [(cpu.matmul, (x, kernel), 2), (attend, (heads,) * 3, 3)]:
        jaxpr = jax.make_jaxpr(functools.partial(gradients, function))(*args)
        names = [e.primitive.name for e in equations(jaxpr)]
        assert names.count("optimization_barrier") == barriers, function
