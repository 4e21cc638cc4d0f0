# SPDX-License-Identifier: Apache-2.0
"""The fused inner block: the kernels interpreted on a CPU, and compiled for TPUs not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.helpers import networks
from tests.helpers.networks import (
    check_same,
    jit,
    normal,
    random_variables,
    value_and_gradients,
)
from tnt_flax.models import layers
from tnt_flax.models.kernels import inner_pallas, lanes

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(inner_pallas, "INTERPRET", True)
    with jax.default_matmul_precision("highest"):
        yield


def block_and_gradients(module, params, x, rate):
    """Output, and gradients of words and parameters, of an inner block in any layout."""

    def loss(params, x):
        rngs = {"dropout": jax.random.key(3)}
        out = module.apply({"params": params}, x, rate, train=True, rngs=rngs)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    run = jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, out), (d_params, dx) = run(params, x)
    return out, dx, d_params


def compare(width, heads, sentences, rate=None, dtype=jnp.float32, tolerance=1e-5, **fields):
    x = normal(sentences, 16, width).astype(dtype)
    reference = layers.TransformerBlock(heads, dtype=dtype, **fields)
    params = random_variables(reference, x, None, train=False)["params"]
    expected = block_and_gradients(reference, params, x, rate)
    expected = [jnp.moveaxis(y, 0, 2).swapaxes(0, 1) for y in expected[:2]] + [expected[2]]
    kept = {name: fields[name] for name in ("norm_eps", "gelu") if name in fields}
    ours = lanes.LanesTransformer(heads, inner_pallas.block, **kept)
    found = block_and_gradients(ours, params, lanes.to_lanes(x[None]), rate)
    check_same(list(found), expected, tolerance)


@pytest.mark.slow
def test_values_and_gradients_of_a_part_of_a_tile_with_dropped_sentences(interpreted):
    """With an epsilon that is large enough to be seen."""
    compare(12, 2, 7, jnp.float32(0.4), gelu="tanh", norm_eps=1e-3, output_bias=False)


@pytest.mark.slow
def test_values_and_gradients_of_two_tiles_with_every_bias_and_dropped_sentences(interpreted):
    compare(24, 4, 131, jnp.float32(0.4), qkv_bias=True)


@pytest.mark.slow
def test_values_and_gradients_of_the_widest_words(interpreted):
    compare(40, 4, 3)


@pytest.mark.slow
def test_bfloat16(interpreted):
    """As near as two orders of bfloat16 roundings come; GELU's erf is another formula, too."""
    compare(12, 2, 5, dtype=jnp.bfloat16, tolerance=0.05)


@pytest.mark.parametrize("exact", [True, False])
def test_gelu_and_its_slope(exact):
    u = jnp.linspace(-12, 12, 4001)
    value, slope = inner_pallas.gelu_and_slope(u, "erf", exact)
    bound = 1e-6 if exact else 2.7e-5
    np.testing.assert_allclose(value, layers.gelu_erf(u), atol=bound)
    expected = jax.vmap(jax.grad(layers.gelu_erf))(u)
    np.testing.assert_allclose(slope(), expected, atol=1e-6 if exact else 6e-5)


@pytest.mark.soak
def test_eight_devices_run_the_network_as_one_does(interpreted):
    """Words, dropped sentences and all parameters' gradients; the forward pass is silent."""
    model, params, images = networks.build(
        (8, 32, 48, 3), inner_dim=12, depth=2, inner_impl="pallas", drop_path=0.5
    )
    run = functools.partial(value_and_gradients, train=True, rngs={"dropout": jax.random.key(1)})
    expected = run(model.clone(inner_impl="reference"), params, images)

    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        split = jax.device_put(images, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
        whole = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        check_same(run(model, whole, split), expected, 2e-5)
        text = jit(model.apply).lower({"params": whole}, split).compile().as_text()
    assert "num_partitions=8" in text
    assert not [name for name in COLLECTIVES if name in text]


@pytest.mark.tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiles_for_v5e(dtype, monkeypatch):
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    module = lanes.LanesTransformer(4, inner_pallas.block)
    x = jax.ShapeDtypeStruct((24, 16, 4 * 196), dtype)
    reference = layers.TransformerBlock(4)
    words = jnp.zeros((1, 16, 24))
    init = functools.partial(reference.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), words, None)

    def loss(params, x):
        return module.apply({"params": params}, x, None, train=False).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        assert not inner_pallas.why_not(24, 4, 16, 96, 4)
        split = NamedSharding(mesh, PartitionSpec(None, None, "data"))
        whole = NamedSharding(mesh, PartitionSpec())
        step = jax.jit(jax.grad(loss, (0, 1)), in_shardings=(whole, split))
        text = step.lower(shapes["params"], x).compile().as_text()
    assert "tnt_inner_backward" in text
    assert not [name for name in COLLECTIVES if f" {name}(" in text and name != "all-reduce"]
