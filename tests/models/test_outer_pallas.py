# SPDX-License-Identifier: Apache-2.0
"""The kernel, interpreted, is the attention that it stands for: forward, backward, on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tnt_flax.models.kernels import outer_pallas
from tnt_flax.tools.hlo import Program
from tnt_flax.tools.targets import tpu_devices


def attend(query, key, value):
    return outer_pallas.attend(query, key, value, query.shape[-1] ** -0.5)


def reference(query, key, value):
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits.astype(jnp.float32)).astype(query.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def inputs(shape, dtype=jnp.float32):
    """Query, key, value and a gradient of the output."""
    keys = jax.random.split(jax.random.key(0), 4)
    return [2 * jax.random.normal(key, shape, dtype) for key in keys]


def run(function, arrays):
    """The output and the gradients."""
    *arrays, gradient = arrays
    output, backward = jax.vjp(function, *arrays)
    return output, *backward(gradient)


def assert_equal(found, wanted, tolerance):
    for a, b in zip(found, wanted, strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=tolerance)


# Three heads of 64 leave half of the lanes free, three images half a program; two heads are wider
# than the lanes. Long sentences are done slab by slab, here of two heads each.
@pytest.mark.parametrize(
    "shape, short",
    [
        pytest.param((3, 9, 3, 64), 256, marks=pytest.mark.slow),
        pytest.param((1, 9, 2, 256), 256, marks=pytest.mark.slow),
        ((2, 9, 4, 64), 8),
    ],
)
def test_equals_the_plain_attention(shape, short, monkeypatch):
    monkeypatch.setattr(outer_pallas, "SHORT", short)
    arrays = inputs(shape)
    assert_equal(run(attend, arrays), run(reference, arrays), 1e-5)


@pytest.mark.slow
def test_bfloat16_is_rounded_no_more_than_the_plain_attention():
    arrays = inputs((1, 21, 1, 64))
    low = [x.astype(jnp.bfloat16) for x in arrays]
    exact = run(reference, [x.astype(jnp.float32) for x in low])
    ours, plain = run(attend, low), run(reference, low)
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        errors = [np.abs(x.astype(jnp.float32) - c).mean() for x in (a, b)]
        assert errors[0] <= 1.1 * errors[1]


def test_large_logits_stay_finite():
    arrays = [100 * x for x in inputs((1, 9, 1, 64))]
    assert_equal(run(attend, arrays), run(reference, arrays), 1e-5)


@pytest.mark.slow
def test_on_a_mesh_every_device_does_its_images_without_asking_the_others():
    arrays = inputs((8, 5, 1, 64))
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"))
    split = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, split) for x in arrays]
        compiled = jax.jit(lambda *x: run(attend, x)).lower(*placed).compile()
        found = compiled(*placed)
    assert not [line for line in compiled.as_text().splitlines() if "all-" in line]
    assert all(x.sharding.is_equivalent_to(split, 4) for x in found)
    assert_equal([np.asarray(x) for x in found], run(reference, arrays), 1e-5)


@pytest.mark.tpu_compiler
def test_compiles_for_v5e():
    devices = tpu_devices("v5e:2x2")
    x = jax.ShapeDtypeStruct((8, 197, 6, 64), jnp.bfloat16)
    mesh = jax.sharding.Mesh(devices, ("data",))
    with jax.set_mesh(mesh):
        split = jax.NamedSharding(mesh, jax.P("data"))
        both = jax.jit(lambda *x: run(attend, x), in_shardings=split, out_shardings=split)
        text = both.trace(x, x, x, x).lower(lowering_platforms=("tpu",)).compile().as_text()
    assert "outer_attention_forward" in text and "outer_attention_backward" in text
    assert not Program(text).collectives()


@pytest.mark.parametrize(
    "length, width, reason",
    [
        (577, 64, ""),
        (197, 48, "heads of width 48 do not fit 128 lanes"),
        (1025, 64, "1025 tokens are more than 640"),
    ],
)
def test_sizes_that_the_kernel_cannot_run(length, width, reason, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert outer_pallas.why_not(8, length, width) == reason
