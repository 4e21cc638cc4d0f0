# SPDX-License-Identifier: Apache-2.0
"""The inner transformer with sentences on the vector lanes, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import numpy_tnt
from tests.helpers.jaxprs import equations
from tnt_flax.models import TNT, VARIANTS, block_outputs, layers
from tnt_flax.models.kernels import lanes

# Compiling is what these tests spend their time on; unoptimised code is compiled twice as fast.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SMALL = dict(outer_dim=24, inner_dim=12, outer_heads=3, inner_heads=2, depth=2, num_classes=5)


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def normal(*shape, seed=0):
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape), jnp.float32)


def build(image_shape=(2, 32, 48, 3), **fields):
    model = TNT(**(SMALL | fields))
    images = normal(*image_shape)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return model, numpy_tnt.random_params(shapes), images


def value_and_gradients(model, params, images, **kwargs):
    weights = normal(images.shape[0], 5, seed=3)

    def loss(params):
        return jnp.sum(weights * model.apply({"params": params}, images, **kwargs))

    return jit(jax.value_and_grad(loss))(params)


def check_same(found, expected, tolerance=1e-5):
    """Every leaf to `tolerance` of its largest value; where that is rounding alone, to nothing."""
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    for (path, x), y in zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # A key's bias moves all scores of a query alike: its gradient is nothing but rounding.
        least = 1 if name.endswith("key/bias") else 1e-3
        scale = max(float(jnp.abs(x).max()), least * largest)
        difference = float(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)).max()) / scale
        assert difference < tolerance, (name, difference)


# The official one is that of the next test.
@pytest.mark.parametrize("lineage", ["legacy", "mindspore", "mindspore_pets"])
def test_every_lineage_gives_the_references_values_and_gradients(lineage):
    model, params, images = build(inner_impl="lanes", **VARIANTS[lineage])
    expected = value_and_gradients(model.clone(inner_impl="reference"), params, images)
    check_same(value_and_gradients(model, params, images), expected, 2e-5)


@pytest.mark.slow
def test_the_same_sentences_are_dropped():
    model, params, images = build(inner_impl="lanes", drop_path=0.5, vanilla_blocks=(1,), depth=3)
    run = functools.partial(
        value_and_gradients,
        params=params,
        images=images,
        train=True,
        rngs={"dropout": jax.random.key(1)},
    )
    check_same(run(model), run(model.clone(inner_impl="reference")), 2e-5)


def test_a_block_in_bfloat16_stays_near():
    module = layers.TransformerBlock(2, dtype=jnp.bfloat16)
    x = normal(1, 7, 16, 12)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, None, train=False))
    params = numpy_tnt.random_params(shapes["params"])
    exact = layers.TransformerBlock(2).apply({"params": params}, x, None, train=False)
    x = x.astype(jnp.bfloat16)
    ours = lanes.LanesTransformer(2, lanes.block)
    found = ours.apply({"params": params}, lanes.to_lanes(x), None, train=False)
    assert found.dtype == jnp.bfloat16
    half = module.apply({"params": params}, x, None, train=False)
    theirs = jnp.abs(half.astype(jnp.float32) - exact).max()
    # jax 0.12 rounds each product of the attention, where 0.10 rounded their sum.
    assert jnp.abs(found.astype(jnp.float32) - lanes.to_lanes(exact)).max() < 3 * theirs


def test_the_scanned_blocks_transpose_no_words():
    model, params, images = build(inner_impl="lanes")
    jaxpr = jax.make_jaxpr(model.apply)({"params": params}, images)
    (scan,) = [e for e in equations(jaxpr) if e.primitive.name == "scan"]
    words = 2 * 6 * 16 * 12
    transposes = lambda jaxpr: [
        e.invars[0].aval.shape
        for e in equations(jaxpr)
        if e.primitive.name == "transpose" and e.invars[0].aval.size >= words
    ]
    assert transposes(scan.params["jaxpr"]) == []
    assert len(transposes(jaxpr)) >= 1  # to the lanes: that transposes are seen


def test_block_outputs_are_the_references():
    model, params, images = build(inner_impl="lanes", depth=1)
    (block,) = jax.eval_shape(functools.partial(block_outputs, model), {"params": params}, images)
    assert block["words"].shape == (2, 6, 16, 12)
