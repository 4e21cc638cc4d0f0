# SPDX-License-Identifier: Apache-2.0
"""For which machine a network is traced: the platform, and the mesh of its devices."""

import math

import jax
from jax.sharding import AxisType

TENSOR = "tensor"  # the mesh axis that splits the outer transformer; all others split the batch


def platform() -> str:
    """Of the ambient mesh's devices, which may be described and not there, or of those here."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.abstract_device.platform if mesh.abstract_device else jax.default_backend()


def manual_axes() -> tuple[str, ...]:
    """The axes of the ambient mesh over which `jax.shard_map` has taken the arrays apart."""
    return _axes(manual=True)


def free_axes() -> tuple[str, ...]:
    """The others: over these the compiler divides the work."""
    return _axes(manual=False)


def _axes(manual):
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if (kind == AxisType.Manual) == manual)


def devices(axes: tuple[str, ...]) -> int:
    """Along `axes` of the ambient mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in axes)


def heads_are_split() -> bool:
    """Does the compiler divide the outer transformer among devices? It cannot divide kernels."""
    return TENSOR in free_axes() and devices((TENSOR,)) > 1
