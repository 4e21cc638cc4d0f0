# SPDX-License-Identifier: Apache-2.0
"""Platform and mesh that a network is traced for."""

import math

import jax
from jax.sharding import AxisType, PartitionSpec

TENSOR = "tensor"  # mesh axis of the outer transformer's heads; all others shard the batch


def platform() -> str:
    """Returns the platform of the ambient mesh (possibly abstract, as in AOT), else the default."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.abstract_device.platform if mesh.abstract_device else jax.default_backend()


def free_axes() -> tuple[str, ...]:
    """Returns the axes of the ambient mesh that no enclosing `jax.shard_map` has made manual.

    Over these the compiler partitions.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind != AxisType.Manual)


def devices(axes: tuple[str, ...]) -> int:
    """Returns the number of devices along `axes` of the ambient mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in axes)


def shard_batch(x: jax.Array) -> jax.Array:
    """Keeps the first axis of `x` sharded over all mesh axes but TENSOR, as the batch is.

    Next to a weight that is sharded over one of these axes (FSDP), XLA could exchange activations
    instead; with this constraint it gathers the weight.
    """
    axes = tuple(axis for axis in free_axes() if axis != TENSOR)
    if devices(axes) == 1 or x.shape[0] % devices(axes):
        return x
    spec = PartitionSpec(axes, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, spec)


def heads_are_split() -> bool:
    """True if the compiler shards the outer transformer over devices; it cannot shard kernels."""
    return TENSOR in free_axes() and devices((TENSOR,)) > 1
