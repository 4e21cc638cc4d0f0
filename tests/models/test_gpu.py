# SPDX-License-Identifier: Apache-2.0
"""The implementation "gpu" against the reference, on a CPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from tests.helpers import networks, numpy_tnt
from tests.helpers.networks import (
    check_same,
    normal,
    training_value_and_gradients,
    value_and_gradients,
)
from tnt_flax.models import VARIANTS, block_outputs, layers, scan
from tnt_flax.models.kernels import gpu
from tnt_flax.models.kernels.platform import row_major

build = functools.partial(networks.build, inner_dim=4, depth=2)
GPU = dict(inner_impl="gpu", outer_impl="gpu")
REFERENCE = dict(inner_impl="reference", outer_impl="reference")
ODD = (2, 32, 48, 3)  # six sentences and the class token
EVEN = (2, 16, 48, 3)


# The next test covers the official variant.
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["legacy", "mindspore", "mindspore_pets"])
def test_every_variant_gives_the_references_values_and_gradients(variant):
    model, params, images = build(ODD, **GPU, **VARIANTS[variant])
    expected = value_and_gradients(model.clone(**REFERENCE), params, images)
    check_same(value_and_gradients(model, params, images), expected)


@functools.cache
def reference_in_training(shape):
    """Returns a network with every optional part, and its values and gradients."""
    fields = dict(drop_path=0.5, vanilla_blocks=(1,), depth=3, layer_scale=True, remat="none")
    model, params, images = build(shape, **REFERENCE, **fields)
    return model, params, images, training_value_and_gradients(model, params, images)


@pytest.mark.slow
@pytest.mark.parametrize(
    "impl, shape, remat",
    [
        (GPU, ODD, "block"),
        (GPU, EVEN, "none"),
        ({"inner_impl": "gpu"}, ODD, "none"),
        ({"outer_impl": "gpu"}, ODD, "none"),
    ],
)
def test_training_drops_the_same_sentences(impl, shape, remat):
    """With a token appended to an odd number, and a block without words."""
    model, params, images, expected = reference_in_training(shape)
    model = model.clone(remat=remat, **impl)
    check_same(training_value_and_gradients(model, params, images), expected)


@pytest.mark.slow
def test_outputs_of_blocks_have_no_appended_token():
    model, params, images = build(ODD, **GPU)
    found = block_outputs(model, {"params": params}, images)
    expected = block_outputs(model.clone(**REFERENCE), {"params": params}, images)
    check_same(found, expected)
    _, state = model.apply(
        {"params": params},
        images,
        train=True,
        mutable=["maps"],
        rngs={"dropout": jax.random.key(0)},
    )
    assert state["maps"]["blocks_0"]["sentences"][0].shape[2] == 7


def attend(qkv, scale):
    query, key, value = (qkv[..., part, :, :] for part in range(3))
    weights = jax.nn.softmax(scale * jnp.einsum("...qhd,...khd->...hqk", query, key))
    return jnp.einsum("...hqk,...khd->...qhd", weights, value)


@pytest.mark.parametrize("gain, tolerance", [(1, 1e-5), (30, 1e-4)])
def test_attention_of_words(gain, tolerance):
    """With a gain of 30 the softmax is near a maximum; its exponentials must not overflow."""
    qkv, weights = gain * normal(2, 3, 16, 3, 2, 3), normal(2, 3, 16, 2, 3, seed=1)
    run = lambda fn: jax.jit(jax.value_and_grad(lambda x: (weights * fn(x, 0.4)).sum()))(qkv)
    check_same(run(gpu.attend_words), run(attend), tolerance)


def test_gradient_of_the_layer_norm():
    """Where the mean is a thousand standard deviations, E[x^2] - E[x]^2 would be noise."""
    x, weights = 1 + 1e-3 * normal(5, 24), normal(5, 24, seed=1)
    params = {"params": {"scale": normal(24, seed=2), "bias": normal(24, seed=3)}}

    def run(module):
        loss = lambda params, x: (weights * module(epsilon=1e-9).apply(params, x)).sum()
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)

    check_same(run(gpu.LayerNorm), run(layers.LayerNorm), 1e-3)


@pytest.mark.parametrize("length", [7, 8])
def test_attention_of_sentences_ignores_appended_tokens(length):
    query, key, value = (normal(2, 8, 3, 4, seed=seed) for seed in range(3))
    found = gpu.attend_sentences(query, key, value, 0.5, length=length)
    kept = jnp.stack([x[:, :length] for x in (query, key, value)], axis=-3)
    check_same(found[:, :length], attend(kept, 0.5))


@pytest.mark.slow
def test_bfloat16_is_as_near_as_the_reference():
    model, params, images = build(ODD, **REFERENCE)
    networks.check_bfloat16(model.clone(**GPU), model, {"params": params}, images)


def test_attention_of_sentences_with_a_bias():
    query, key, value = normal(2, 8, 3, 4), normal(2, 6, 3, 4, seed=1), normal(2, 6, 3, 4, seed=2)
    bias = normal(1, 3, 8, 6, seed=3)
    weights = jax.nn.softmax(0.5 * jnp.einsum("bqhd,bkhd->bhqk", query, key) + bias)
    expected = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
    check_same(gpu.attend_sentences(query, key, value, 0.5, bias), expected)


def test_parameters_are_those_of_the_reference():
    model, params, images = build(ODD, **GPU)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    numpy_shapes = jax.tree.map(jnp.shape, numpy_tnt.random_params(shapes))
    assert numpy_shapes == jax.tree.map(jnp.shape, params)


def test_unrolled_blocks_pin_the_layout_of_tokens(monkeypatch):
    model, params, images = build(EVEN, **GPU, unroll=True)
    monkeypatch.setattr(scan, "platform", lambda: "gpu")
    program = jax.jit(model.apply).lower({"params": params}, images).as_text()
    assert program.count("custom_call @LayoutConstraint") == 2 * model.depth  # words and sentences


def test_pinning_a_layout_on_several_devices():
    """The compiler must not gather the images, and the gradient is pinned, too."""
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)):
        x = jax.device_put(normal(4, 3, 5), jax.P("data"))
        run = jax.jit(jax.grad(lambda x: jnp.sin(row_major(x)).sum())).lower(x)
        assert run.as_text().count("custom_call @LayoutConstraint") == 2
        assert "all-gather" not in run.compile().as_text()
        check_same(run.compile()(x), jnp.cos(x))
        assert row_major(normal(3, 5)).shape == (3, 5)  # which the devices cannot share
