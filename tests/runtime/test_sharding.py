# SPDX-License-Identifier: Apache-2.0
"""Shardings of arrays, and that training gives the same results on any mesh."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.smoke import SMOKE
from tnt_flax.core.errors import InputError
from tnt_flax.core.trees import named_leaves
from tnt_flax.models import create_model
from tnt_flax.runtime import sharding
from tnt_flax.tools.hlo import Program
from tnt_flax.training import mixup
from tnt_flax.training.experiment import Experiment
from tnt_flax.training.step import TrainState

COLLECTIVES = {"all-gather", "all-reduce", "all-to-all", "collective-permute"}


@pytest.mark.parametrize("size", [0, 4, 12])
def test_a_batch_size_that_the_devices_do_not_divide_is_refused(size):
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


@pytest.mark.parametrize("platform, expected", [("gpu", sharding.DETERMINISTIC), ("cpu", {})])
def test_deterministic_kernels_are_asked_of_gpus(platform, expected):
    devices = np.array([types.SimpleNamespace(platform=platform)])
    mesh = types.SimpleNamespace(devices=devices)
    assert sharding.compiler_options(mesh, True) == expected
    assert sharding.compiler_options(mesh, False) == {}
    assert jax.jit(lambda: 7, compiler_options=expected)() == 7  # jaxlib knows the options


def random_batch():
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
    return {"image": images, "label": np.arange(16, dtype=np.int32) % 10}


# Groups within a device, and over four devices.
@pytest.mark.parametrize("groups", [pytest.param(8, marks=pytest.mark.slow), 2])
def test_augmentation_does_not_depend_on_the_number_of_devices(groups):
    """Bit-identical pixels: random numbers do not depend on the device that computes them."""

    def change(key, images, targets):
        images, targets = mixup.mix(
            key,
            images,
            targets,
            groups=groups,
            mixup_alpha=0.8,
            cutmix_alpha=1.0,
            prob=1.0,
            switch_prob=0.5,
        )
        images = mixup.normalize(images, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        return mixup.erase(key, images, prob=0.5, area=(0.02, 1 / 3), ratio=(0.3, 3.3)), targets

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


@pytest.fixture(scope="module")
def tnt_s():
    """Shapes of the state of TNT-S."""
    model = create_model("tnt_s_patch16_224")
    init = lambda key: model.init(key, jnp.zeros((1, 224, 224, 3)), train=False)
    state = lambda key: TrainState.create(init(key), optax.adamw(1e-3))
    return jax.eval_shape(state, jax.random.key(0))


def sharded_names(tree):
    specs = named_leaves(sharding.shardings(tree, sharding.make_mesh()))
    return {name: tuple(x.spec) for name, x in specs.items() if any(x.spec)}


def test_weights_ema_and_moments_are_sharded_alike(tnt_s):
    sharded = sharded_names(tnt_s.params)
    assert sharded["blocks_0/outer/attention/query/kernel"] == (None, "fsdp", "tensor")
    assert sharded["blocks_0/outer/attention/out/kernel"] == (None, "tensor", "fsdp")
    assert sharded["blocks_0/outer/fc1/bias"] == (None, "tensor")
    assert sharded["head/kernel"] == ("fsdp", None)
    assert sharded_names(tnt_s.ema["params"]) == sharded
    moments = sharded_names(tnt_s.opt_state)
    assert {name.split("/", 2)[2]: spec for name, spec in moments.items()} == sharded
    assert len(moments) == 2 * len(sharded)
    sizes = {name: x.size for name, x in named_leaves(tnt_s.params).items()}
    replicated = sum(size for name, size in sizes.items() if "fsdp" not in sharded.get(name, ()))
    assert replicated < 0.012 * sum(sizes.values())


def test_a_device_holds_only_its_shard(tnt_s):
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    outer = sharding.shardings(tnt_s.params, mesh)["blocks_0"]["outer"]
    assert outer["fc1"]["kernel"].shard_shape((12, 384, 1536)) == (12, 96, 768)
    x = np.arange(12 * 384 * 384, dtype=np.float32).reshape(12, 384, 384)
    tree = {"outer/attention/out/kernel": x}
    (placed,) = sharding.put_global(tree, mesh).values()
    assert {shard.data.shape for shard in placed.addressable_shards} == {(12, 192, 96)}
    np.testing.assert_array_equal(sharding.fetch(placed), x)
    (gathered,) = sharding.unshard_fsdp({"outer/attention/out/kernel": placed}, mesh).values()
    assert {shard.data.shape for shard in gathered.addressable_shards} == {(12, 192, 384)}


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(fsdp=3), "mesh.data=2, mesh.fsdp=3 and mesh.tensor=1 need 6 devices, but there"),
        (dict(data=4), "need 4 devices, but there are 8: use mesh.data=-1"),
        (dict(fsdp=16), "need 16 devices"),
        (dict(fsdp=0), "mesh.fsdp=0 is less than 1"),
        (dict(data=0), "mesh.data=0 is less than 1"),
        (dict(tensor=-1), "mesh.tensor=-1 is less than 1"),
    ],
)
def test_impossible_mesh_sizes_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        sharding.make_mesh(**sizes)


def test_axes_that_do_not_divide_the_network_are_refused(tnt_s, smoke_config):
    mesh = sharding.make_mesh(jax.devices()[:5], fsdp=5)
    with pytest.raises(InputError, match=r"mesh.fsdp=5 does not divide the 384 of params/bl"):
        sharding.shardings(tnt_s, mesh)
    with pytest.raises(InputError, match="mesh.tensor=2 does not divide the 3 heads of the outer"):
        Experiment(smoke_config(mesh__tensor=2)).make_model(10)


def test_a_batch_is_split_over_data_and_fsdp():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    assert mesh.shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sharding.describe(mesh) == "8 cpu devices (data 2, fsdp 2, tensor 2)"
    with pytest.raises(InputError, match="batch_size=6 is not divisible by the 8 devices in 4 gr"):
        sharding.check_batch_size("batch_size", 6, mesh)
    assert sharding.host_rows(mesh) == (0, 1)
    array = sharding.to_global({"x": np.arange(8)}, mesh)["x"]
    assert [x.data.tolist() for x in array.addressable_shards] == [
        rows for rows in ([0, 1], [2, 3], [4, 5], [6, 7]) for _ in range(2)
    ]


@pytest.mark.parametrize(
    "process, tensor, rows",
    [(0, 1, (0, 4)), (3, 1, (3, 4)), (1, 2, (1, 4)), (3, 4, (1, 2)), (2, 8, (0, 1))],
)
def test_rows_of_each_of_four_hosts_of_two_devices(process, tensor, rows):
    own = jax.devices()[2 * process : 2 * process + 2]
    assert sharding.host_rows(sharding.make_mesh(tensor=tensor), own) == rows


def test_hosts_must_read_equal_parts_of_a_batch():
    with pytest.raises(InputError, match=r"rows \[1, 2\] of 8: give each process as many devices"):
        sharding.host_rows(sharding.make_mesh(), jax.devices()[1:3])


MESHES = {"data": dict(), "fsdp": dict(fsdp=4), "tensor": dict(fsdp=2, tensor=2)}


@pytest.fixture(scope="module")
def trained_alone():
    """Twenty steps on one device, with drop path."""
    from configs import digits

    config = digits.get_config()
    config.update_from_flattened_dict(SMOKE)
    config.update_from_flattened_dict(
        {"model.depth": 3, "model.outer_dim": 16, "model.outer_heads": 2, "model.drop_path": 0.3}
    )
    experiment = Experiment(config, num_classes=10, steps_per_epoch=29)
    step, batch, metrics = experiment.make_train_step(), random_batch(), []
    start = jax.jit(experiment.init_state)(jax.random.key(0))
    state, one = start, jax.jit(step)
    for _ in range(20):
        state, found = one(state, batch, jax.random.key(1))
        metrics.append((found["loss"], found["grad_norm"]))
    return config, start, metrics, state


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_training_does_not_depend_on_the_mesh(trained_alone, name):
    """The same batches and the same state give the same losses and weights on any mesh."""
    config, start, expected, end = trained_alone
    step = Experiment(config, num_classes=10, steps_per_epoch=29).make_train_step()
    mesh = sharding.make_mesh(**MESHES[name])
    state = sharding.put_global(start, mesh)
    batch, key = sharding.to_global(random_batch(), mesh), jax.random.key(1)
    compiled = sharding.jit_train_step(step, mesh, start).lower(state, batch, key).compile()
    metrics = []
    key = jax.device_put(key, sharding.replicated(mesh))
    for _ in range(20):
        state, found = compiled(state, batch, key)
        metrics.append((found["loss"], found["grad_norm"]))
    assert found["finite"].all()
    np.testing.assert_allclose(metrics, expected, rtol=1e-4)  # losses, norms of gradients
    np.testing.assert_allclose(np.array(metrics)[:, 0], np.array(expected)[:, 0], rtol=1e-5)
    for ours, alone in zip(jax.tree.leaves(state.ema), jax.tree.leaves(end.ema), strict=True):
        np.testing.assert_allclose(ours, alone, atol=1e-4)

    exchanged = {each.kind: each for each in Program(compiled.as_text()).collectives()}
    if name == "data":  # one sum of gradients for each scanned block, one for all other weights
        assert exchanged.keys() == {"all-reduce"} and exchanged["all-reduce"].executed == 3
    if name == "fsdp":  # weights are gathered block by block; activations are not exchanged
        assert exchanged.keys() == {"all-gather", "all-reduce"}
        assert exchanged["all-gather"].in_loops


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["reference", "cpu", "lanes"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_of_weight_gradients_before_the_sum_over_devices(smoke_config, inner, dtype):
    """XLA sums the products over devices in the dtype that they have in the lowered program."""
    config = smoke_config(
        batch_size=16,
        mesh__gradient_dtype=dtype,
        model__dtype="bfloat16",
        model__inner_impl=inner,
        model__outer_impl="reference",
    )
    experiment = Experiment(config, num_classes=10, steps_per_epoch=29)
    step = jax.jit(experiment.make_train_step())
    text = step.lower(*experiment.step_shapes).as_text()
    batch_axes = re.findall(r"dot_general.*contracting_dims = \[0.*-> tensor<([\dx]+)x(\w+)>", text)
    kernels = {"24x96", "96x24", "16x64"}  # outer fc1 and fc2, proj: contracted over all tokens
    found = {element for shape, element in batch_axes if shape in kernels}
    assert found == {"f32" if dtype == "float32" else "bf16"}
