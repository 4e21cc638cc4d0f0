# SPDX-License-Identifier: Apache-2.0
"""The CPU's products and attention equal the reference, and keep their barriers."""

import functools

import jax
import jax.numpy as jnp
import pytest

from tests.helpers.jaxprs import equations
from tests.helpers.networks import check_same, normal, random_variables
from tnt_flax.models.kernels import cpu
from tnt_flax.models.layers import Attention


def values_and_gradients(function, *args):
    """Returns the output, and gradients of a sum that weights every element differently."""

    def loss(args):
        out = function(*args)
        return (out * normal(*out.shape, seed=9)).sum(), out

    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(args)
    return out, gradients


@pytest.mark.parametrize("inputs, outputs", [(5, 12), (12, 5), (6, 6)])
def test_matmul_equals_the_plain_product(inputs, outputs):
    args = normal(2, 3, inputs), normal(inputs, outputs, seed=1)
    check_same(values_and_gradients(cpu.matmul, *args), values_and_gradients(jnp.matmul, *args))


@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_attend_equals_the_attention_of_the_layers(tokens):
    x = normal(2, 3, tokens, 8)
    plain = Attention(num_heads=2)
    variables = random_variables(plain, x, train=False)
    variables = jax.tree.map(lambda w: 4 * w, variables)  # far from equal attention weights
    fast = plain.clone(attention_fn=cpu.attend)
    fast, plain = (functools.partial(each.apply, train=True) for each in (fast, plain))
    check_same(values_and_gradients(fast, variables, x), values_and_gradients(plain, variables, x))


def attend(query, key, value):
    return cpu.attend(query, key, value, query.shape[-1] ** -0.5)


def test_barriers_cut_the_gradients_apart():
    x, kernel, heads = normal(3, 6), normal(6, 4), normal(1, 4, 2, 8)
    for function, args, barriers in [(cpu.matmul, (x, kernel), 2), (attend, (heads,) * 3, 3)]:
        run = functools.partial(values_and_gradients, function)
        names = [e.primitive.name for e in equations(jax.make_jaxpr(run)(*args))]
        assert names.count("optimization_barrier") == barriers, function
