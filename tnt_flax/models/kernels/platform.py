# SPDX-License-Identifier: Apache-2.0
"""Platform and mesh that a network is traced for."""

import math

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, PartitionSpec

TENSOR = "tensor"  # mesh axis of the outer transformer's heads; all others shard the batch


def platform() -> str:
    """Returns the platform that is traced for, "cpu", "gpu" or "tpu".

    It is the ambient mesh's, which may be abstract, else the default backend's.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.abstract_device.platform if mesh.abstract_device else jax.default_backend()


def device_kind() -> str:
    """Returns the kind of device that is traced for, such as "NVIDIA H100 80GB HBM3"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind


def free_axes() -> tuple[str, ...]:
    """Returns the axes of the ambient mesh over which the compiler partitions.

    They are the axes that no enclosing `jax.shard_map` has made manual.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind != AxisType.Manual)


def devices(axes: tuple[str, ...]) -> int:
    """Returns the number of devices along `axes` of the ambient mesh; 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in axes)


def batch_axes() -> tuple[str, ...]:
    """Returns the free axes that shard the batch: all except TENSOR."""
    return tuple(axis for axis in free_axes() if axis != TENSOR)


def shard_batch(x: jax.Array) -> jax.Array:
    """Keeps the first axis of `x` sharded like the batch: over all mesh axes except TENSOR.

    Next to a weight that is sharded over one of these axes (FSDP), XLA could exchange activations
    instead; with this constraint it gathers the weight.
    """
    axes = batch_axes()
    if devices(axes) == 1 or x.shape[0] % devices(axes):
        return x
    spec = PartitionSpec(axes, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, spec)


def row_major(x: jax.Array) -> jax.Array:
    """Makes the compiler store `x`, and its gradient, with the last axis innermost.

    Each device pins the layout of its own images, because the compiler would gather the operand of
    the constraint. A batch that does not split over the devices is returned as it is.
    """
    pin = lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    axes = batch_axes()
    if devices(axes) == 1:
        return pin(x)
    if x.shape[0] % devices(axes):
        return x
    images = PartitionSpec(axes)
    return jax.shard_map(
        pin, in_specs=images, out_specs=images, axis_names=set(axes), check_vma=False
    )(x)


def why_not_shared(batch: int) -> str:
    """Returns why the devices cannot share a kernel over `batch` images; "" if they can.

    The compiler cannot partition a kernel, hence the ambient mesh must shard the batch alone.
    """
    axes = free_axes()
    if jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1:
        return f"it must be told how {jax.device_count()} devices share it: use jax.set_mesh(mesh)"
    if TENSOR in axes and devices((TENSOR,)) > 1:
        return f"the mesh splits more than the batch: its axis {TENSOR!r} has several devices"
    if batch < 1 or batch % devices(axes):
        return f"{batch} images do not split over {devices(axes)} devices"
    return ""
