# SPDX-License-Identifier: Apache-2.0
"""The device mesh, and how arrays lie on it: batches split over "data", parameters replicated."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tnt_flax.errors import InputError


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """All devices of all hosts, or `devices`, on one axis, "data"."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("data"))


def on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """`function`, in which `jax.sharding.get_abstract_mesh()` is `mesh`.

    For what it calls that XLA cannot divide among devices, and that has to do so by itself.
    """

    @functools.wraps(function)
    def wrapped(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return wrapped


def jit_train_step(train_step: Callable, mesh: Mesh) -> Callable:
    """The function of `steps.make_train_step` as it runs on `mesh`. It consumes the state."""
    everywhere = replicated(mesh)
    return jax.jit(
        on_mesh(train_step, mesh),
        in_shardings=(everywhere, batch_sharding(mesh), everywhere),
        out_shardings=everywhere,
        donate_argnums=0,
    )


def check_batch_size(key: str, batch_size: int, mesh: Mesh) -> None:
    """Raises InputError unless every device gets the same number of images."""
    devices = mesh.shape["data"]
    if batch_size < 1 or batch_size % devices:
        raise InputError(
            f"{key}={batch_size} is not divisible by the {devices} devices: "
            f"use a multiple of {devices}"
        )


def to_global(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch, as its part of the global arrays [batch_size, ...]."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, x) for k, x in batch.items()}
