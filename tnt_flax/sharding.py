# SPDX-License-Identifier: Apache-2.0
"""The device mesh, and how arrays lie on it: batches split over "data", parameters replicated."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tnt_flax.errors import InputError


def make_mesh() -> Mesh:
    """All devices of all hosts on one axis, "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("data"))


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
