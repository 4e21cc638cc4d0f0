# SPDX-License-Identifier: Apache-2.0
"""The nnx modules: equal to the linen networks, and usable with all of nnx."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import tnt_flax
import tnt_flax.nnx
from tnt_flax.core.errors import InputError
from tnt_flax.weights.write import save_weights

NETWORKS = {
    "tnt": ("tnt_ti_patch16_224", dict(depth=3, vanilla_blocks=(1,), drop_path=0.3)),
    "ptnt": ("ptnt_ti_patch16_192", dict(depths=(2, 1, 1, 1), drop_path=0.3)),
}
IMAGES = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))


def create(network):
    name, fields = NETWORKS[network]
    return tnt_flax.nnx.create_model(name, rngs=nnx.Rngs(0), image_size=32, num_classes=4, **fields)


@pytest.fixture(params=["tnt", pytest.param("ptnt", marks=pytest.mark.slow)])
def model(request):
    return create(request.param)


def call(model, images):
    return model(images)


def mean_square(model, images):
    return jnp.square(model(images)).mean()


def assert_trees_equal(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **{"rtol": 0, "atol": 0} | tolerance)


@pytest.mark.slow
def test_logits_equal_linen(model):
    name, fields = NETWORKS["tnt" if hasattr(model, "blocks") else "ptnt"]
    linen = tnt_flax.create_model(name, num_classes=4, **fields)
    variables = jax.jit(linen.init)(nnx.Rngs(0).params(), jnp.zeros((1, 32, 32, 3)))
    expected = jax.jit(linen.apply)(variables, IMAGES)
    np.testing.assert_array_equal(nnx.jit(call)(model, IMAGES), expected)


def test_every_block_has_its_own_parameters():
    model = create("tnt")
    kernels = [block.outer.fc1.kernel[...] for block in model.blocks]
    stacked = model.variables()["params"]
    np.testing.assert_array_equal(kernels[2], stacked["blocks_2"]["outer"]["fc1"]["kernel"][0])
    assert not hasattr(model.blocks[1], "inner")  # vanilla
    model.blocks[2].outer.fc1.kernel[...] = jnp.zeros_like(kernels[2])
    assert not model.variables()["params"]["blocks_2"]["outer"]["fc1"]["kernel"].any()


@pytest.mark.slow
def test_gradients_and_statistics_equal_linen_in_training(model):
    model.train()
    variables, key = model.variables(), nnx.Rngs(0)
    key.params()
    key = key.dropout()

    def loss(params):
        out, changed = model.linen.apply(
            variables | {"params": params},
            IMAGES,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return jnp.square(out).mean(), changed

    expected, changed = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    gradients = nnx.jit(nnx.grad(mean_square))(model, IMAGES)
    model_of_gradients = nnx.clone(model)
    nnx.update(model_of_gradients, gradients)
    found = model_of_gradients.variables()["params"]
    scale = max(jnp.abs(x).max() for x in jax.tree.leaves(expected))
    assert_trees_equal(found, expected, atol=1e-6 * scale)
    if changed:
        assert_trees_equal(model.variables()["batch_stats"], changed["batch_stats"], rtol=1e-6)


@pytest.mark.slow
def test_evaluation_ignores_random_keys_and_keeps_the_statistics(model):
    model.train()
    model(IMAGES)
    model.eval()
    before = nnx.state(model)
    np.testing.assert_array_equal(model(IMAGES), model(IMAGES))
    assert_trees_equal(nnx.state(model, nnx.BatchStat), nnx.filter_state(before, nnx.BatchStat))


@pytest.mark.slow
def test_an_optimizer_lowers_the_loss():
    model = create("tnt")
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(mean_square)(model, IMAGES)
        optimizer.update(model, gradients)
        return loss

    first = step(model, optimizer)
    assert [step(model, optimizer) for _ in range(3)][-1] < first


def test_state_survives_split_merge_and_a_checkpoint(model, tmp_path):
    graph, state = nnx.split(model)
    merged = nnx.merge(graph, state)
    parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", parameters)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, parameters)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    other = nnx.clone(model)
    nnx.update(other, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    zeros = nnx.state(other, nnx.Param)
    nnx.replace_by_pure_dict(zeros, restored)
    nnx.update(other, zeros)
    for copy in (merged, other):
        assert_trees_equal(copy.variables(), model.variables())


@pytest.mark.slow
def test_a_sharded_model_is_created_in_place():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))

    def sharding(x):
        return NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "data"))

    @nnx.jit
    def create_sharded():
        model = create("tnt")
        state = nnx.state(model, nnx.Param)
        specs = jax.tree.map(lambda x: sharding(x) if x.shape[-1] % 4 == 0 else None, state)
        constrain = lambda x, s: x if s is None else jax.lax.with_sharding_constraint(x, s)
        nnx.update(model, jax.tree.map(constrain, state, specs))
        return model

    model = create_sharded()
    kernel = model.blocks[0].outer.fc1.kernel
    assert kernel.sharding.shard_shape(kernel.shape) == (192, 192)
    expected = create("tnt")(IMAGES)
    np.testing.assert_allclose(model(IMAGES), expected, atol=1e-5)


def test_weights_load_per_block(tmp_path):
    linen = tnt_flax.create_model("tnt_ti_patch16_224", num_classes=4, depth=1)
    variables = jax.jit(linen.init)(jax.random.key(0), IMAGES)
    save_weights(tmp_path / "w.safetensors", variables["params"], {})
    model = tnt_flax.nnx.load(tmp_path / "w.safetensors")
    logits = nnx.jit(call)(model, IMAGES)
    np.testing.assert_array_equal(logits, jax.jit(linen.apply)(variables, IMAGES))


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="unknown model 'tnt_x'"):
        tnt_flax.nnx.create_model("tnt_x", rngs=nnx.Rngs(0))
