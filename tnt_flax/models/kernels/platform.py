# SPDX-License-Identifier: Apache-2.0
"""For which machine a network is traced: the platform, and the mesh of its devices."""

import math

import jax
from jax.sharding import AxisType, PartitionSpec

TENSOR = "tensor"  # the mesh axis that splits the outer transformer; all others split the batch


def platform() -> str:
    """Of the ambient mesh's devices, which may be described and not there, or of those here."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.abstract_device.platform if mesh.abstract_device else jax.default_backend()


def free_axes() -> tuple[str, ...]:
    """The axes of the ambient mesh over which the compiler divides the work.

    Not those that an enclosing `jax.shard_map` has made manual.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind != AxisType.Manual)


def devices(axes: tuple[str, ...]) -> int:
    """Along `axes` of the ambient mesh."""
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
    """Does the compiler divide the outer transformer among devices? It cannot divide kernels."""
    return TENSOR in free_axes() and devices((TENSOR,)) > 1
