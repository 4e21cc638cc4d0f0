# SPDX-License-Identifier: Apache-2.0
"""The inner transformer with sentences on the vector lanes, against the reference."""

import functools

import jax.numpy as jnp
import pytest

from tests.helpers import networks
from tests.helpers.networks import (
    check_same,
    normal,
    random_variables,
    training_value_and_gradients,
    value_and_gradients,
)
from tnt_flax.models import VARIANTS, layers
from tnt_flax.models.kernels import lanes

VARIANT_FIELDS = VARIANTS | {"layer_scale": {"layer_scale": True}}
build = functools.partial(networks.build, inner_dim=12, depth=2)


# The next test covers the official variant.
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["legacy", "mindspore", "mindspore_pets", "layer_scale"])
def test_every_variant_gives_the_references_values_and_gradients(variant):
    model, params, images = build(inner_impl="lanes", **VARIANT_FIELDS[variant])
    expected = value_and_gradients(model.clone(inner_impl="reference"), params, images)
    check_same(value_and_gradients(model, params, images), expected, 2e-5)


@pytest.mark.slow
def test_the_same_sentences_are_dropped():
    model, params, images = build(inner_impl="lanes", drop_path=0.5, vanilla_blocks=(1,), depth=3)
    run = functools.partial(training_value_and_gradients, params=params, images=images)
    check_same(run(model), run(model.clone(inner_impl="reference")), 2e-5)


@pytest.mark.slow
def test_a_block_in_bfloat16_stays_near():
    module = layers.TransformerBlock(2, dtype=jnp.bfloat16)
    x = normal(1, 7, 16, 12)
    params = random_variables(module, x, None, train=False)["params"]
    exact = layers.TransformerBlock(2).apply({"params": params}, x, None, train=False)
    x = x.astype(jnp.bfloat16)
    ours = lanes.LanesTransformer(2, lanes.block)
    found = ours.apply({"params": params}, lanes.to_lanes(x), None, train=False)
    assert found.dtype == jnp.bfloat16
    half = module.apply({"params": params}, x, None, train=False)
    theirs = jnp.abs(half.astype(jnp.float32) - exact).max()
    # jax 0.12 rounds each product of the attention, where 0.10 rounded their sum.
    assert jnp.abs(found.astype(jnp.float32) - lanes.to_lanes(exact)).max() < 3 * theirs
