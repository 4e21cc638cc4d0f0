# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tnt_flax import build, sharding
from tnt_flax.errors import InputError
from tnt_flax.state import TrainState


def test_the_batch_is_split_not_copied():
    mesh = sharding.make_mesh()
    assert mesh.shape == {"data": 8}
    images = np.arange(16 * 2, dtype=np.uint8).reshape(16, 2)
    array = sharding.to_global({"image": images}, mesh)["image"]
    assert array.shape == (16, 2)
    for i, shard in enumerate(array.addressable_shards):
        np.testing.assert_array_equal(shard.data, images[2 * i : 2 * i + 2])


@pytest.mark.parametrize("size", [0, 4, 12])
def test_a_batch_that_the_devices_cannot_share(size):
    mesh = sharding.make_mesh()
    sharding.check_batch_size("batch_size", 16, mesh)
    with pytest.raises(InputError, match=f"batch_size={size} is not divisible by the 8 devices"):
        sharding.check_batch_size("batch_size", size, mesh)


def test_eight_devices_train_as_one_does(smoke_config):
    """Same batch, same state: the split step gives the same loss and the same weights."""
    config = smoke_config()
    model = build.build_model(config, 10)
    tx, schedule = build.build_optimizer(config, 29)
    state = TrainState.create(build.init_params(model, config)(jax.random.key(0)), tx)
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
    batch = {"image": images, "label": np.arange(16, dtype=np.int32) % 10}
    step = build.build_train_step(config, model, tx, schedule)

    mesh = sharding.make_mesh()
    everywhere = sharding.replicated(mesh)
    split = jax.jit(
        step,
        in_shardings=(everywhere, sharding.batch_sharding(mesh), everywhere),
        out_shardings=everywhere,
    )
    with jax.default_matmul_precision("highest"):
        new, metrics = split(state, sharding.to_global(batch, mesh), jax.random.key(1))
        alone, alone_metrics = jax.jit(step)(
            state, jax.tree.map(jnp.asarray, batch), jax.random.key(1)
        )
    assert new.params["head"]["kernel"].sharding.is_fully_replicated
    np.testing.assert_allclose(metrics["loss"], alone_metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], alone_metrics["grad_norm"], rtol=1e-4)
    moments = lambda s: s.opt_state[0].mu  # the first moment is a tenth of the gradient
    for ours, theirs in zip(
        jax.tree.leaves(moments(new)), jax.tree.leaves(moments(alone)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)

    # The gradient is reduced over the devices, and nothing gathers or shuffles the batch.
    text = (
        split.lower(state, sharding.to_global(batch, mesh), jax.random.key(1)).compile().as_text()
    )
    assert " all-reduce(" in text or " all-reduce-start(" in text
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text, collective
