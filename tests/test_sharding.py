# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tnt_flax import augment, build, sharding
from tnt_flax.errors import InputError
from tnt_flax.state import TrainState

COLLECTIVES = {"all-gather", "all-reduce", "all-to-all", "collective-permute"}


def test_the_batch_is_split_not_copied():
    mesh = sharding.make_mesh()
    assert mesh.shape == {"data": 8, "fsdp": 1, "tensor": 1}
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


def test_a_training_step_sees_the_mesh_that_it_runs_on():
    mesh, seen = sharding.make_mesh(jax.devices()[2:6]), []

    def train_step(state, batch, key):
        seen.append(jax.sharding.get_abstract_mesh())
        return state + batch.sum(), {"mean": batch.mean()}

    step = sharding.jit_train_step(train_step, mesh, jnp.zeros(4))
    before = jax.device_put(jnp.zeros(4), sharding.replicated(mesh))
    after, metrics = step(before, np.arange(8.0), jax.random.key(0))
    assert seen[0] == mesh.abstract_mesh and seen[0].shape["data"] == 4
    assert before.is_deleted() and after.devices() == set(jax.devices()[2:6])
    assert (after[0], metrics["mean"]) == (28, 3.5)


def random_batch():
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
    return {"image": images, "label": np.arange(16, dtype=np.int32) % 10}


@pytest.mark.parametrize("groups", [8, 2])  # within a device; over four of them
def test_eight_devices_augment_as_one_does(groups):
    """To the bit: the numbers drawn do not depend on where they are drawn."""

    def change(key, images, targets):
        images, targets = augment.mix(
            key,
            images,
            targets,
            groups=groups,
            mixup_alpha=0.8,
            cutmix_alpha=1.0,
            prob=1.0,
            switch_prob=0.5,
        )
        images = augment.normalize(images, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        return augment.erase(key, images, prob=0.5, area=(0.02, 1 / 3), ratio=(0.3, 3.3)), targets

    mesh = sharding.make_mesh()
    everywhere, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    args = jax.random.key(1), random_batch()["image"], np.eye(16, 10, dtype=np.float32)
    compiled = jax.jit(change, in_shardings=(everywhere, split, split), out_shardings=split)
    compiled = compiled.lower(*args).compile()
    spread = [jax.device_put(x, split) for x in args[1:]]
    images, targets = compiled(args[0], *spread)
    alone, alone_targets = jax.jit(change)(*args)
    np.testing.assert_array_equal(images, alone)
    np.testing.assert_allclose(targets, alone_targets, rtol=0, atol=1e-7)
    assert not np.isclose(alone, args[1] / 127.5 - 1).all(axis=(1, 2, 3)).any()
    found = {name for name in COLLECTIVES if f" {name}" in compiled.as_text()}
    assert found == (set() if groups == 8 else {"collective-permute"})


def test_eight_devices_train_as_one_does(smoke_config):
    """Same batch, same state: the split step gives the same loss and the same weights."""
    config = smoke_config(
        augment__mixup_alpha=0.8, augment__cutmix_alpha=1.0, augment__erase_prob=0.25
    )
    model = build.build_model(config, 10)
    tx, schedule = build.build_optimizer(config, 29)
    state = TrainState.create(build.init_params(model, config)(jax.random.key(0)), tx)
    batch = random_batch()
    step = build.build_train_step(config, model, tx, schedule)

    mesh = sharding.make_mesh()
    split = sharding.jit_train_step(step, mesh, state)
    with jax.default_matmul_precision("highest"):
        alone, alone_metrics = jax.jit(step)(
            state, jax.tree.map(jnp.asarray, batch), jax.random.key(1)
        )
        spread = sharding.to_global(batch, mesh)
        compiled = split.lower(state, spread, jax.random.key(1)).compile()
        new, metrics = split(state, spread, jax.random.key(1))
    assert new.params["head"]["kernel"].sharding.is_fully_replicated
    np.testing.assert_allclose(metrics["loss"], alone_metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], alone_metrics["grad_norm"], rtol=1e-4)
    moments = lambda s: s.opt_state[0].mu  # the first moment is a tenth of the gradient
    for ours, theirs in zip(
        jax.tree.leaves(moments(new)), jax.tree.leaves(moments(alone)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)

    # The gradient is reduced over the devices, and nothing gathers or shuffles the batch.
    text = compiled.as_text()
    assert " all-reduce(" in text or " all-reduce-start(" in text
    for collective in COLLECTIVES - {"all-reduce"}:
        assert collective not in text, collective
