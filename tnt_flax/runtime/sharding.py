# SPDX-License-Identifier: Apache-2.0
"""The mesh of all devices, and how arrays are sharded over it.

Three axes. "data" and "fsdp" split every batch. "fsdp" also splits what is stored: parameters,
their average and the optimizer's moments (ZeRO). "tensor" splits the outer transformer: its heads
and the hidden layer of its MLP. From these shardings XLA derives what a step communicates: it sums
the gradients of a block over the devices as soon as they are computed, and gathers the parameters
that "fsdp" splits block by block.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tnt_flax.core.errors import InputError
from tnt_flax.models.kernels.platform import TENSOR

FSDP = "fsdp"
BATCH = ("data", FSDP)
AXES = (*BATCH, TENSOR)

# Of the first rule that matches the end of a parameter's name: the axes that split its last
# dimensions. What matches none is small, and whole on every device.
RULES = (
    (r"outer/attention/(query|key|value)/kernel", (FSDP, TENSOR)),
    (r"outer/attention/(query|key|value)/bias", (TENSOR,)),
    (r"outer/attention/out/kernel", (TENSOR, FSDP)),
    (r"outer/fc1/kernel", (FSDP, TENSOR)),
    (r"outer/fc1/bias", (TENSOR,)),
    (r"outer/fc2/kernel", (TENSOR, FSDP)),
    (r"outer/se/fc[12]/kernel", (FSDP, None)),
    (r"proj/dense/kernel", (FSDP, None)),  # the stem's and the blocks'
    (r"head/kernel", (FSDP, None)),
)


def make_mesh(
    devices: Sequence[Any] | None = None, *, data: int = -1, fsdp: int = 1, tensor: int = 1
) -> Mesh:
    """All devices of all hosts, or `devices`, along AXES; `data=-1` is as many as there are left.

    Raises:
        InputError: these sizes do not make use of every device.
    """
    devices = jax.devices() if devices is None else devices
    for key, size in {"data": data, "fsdp": fsdp, "tensor": tensor}.items():
        if size < 1 and (key, size) != ("data", -1):
            raise InputError(f"mesh.{key}={size} is less than 1")
    if data == -1:
        data = max(len(devices) // (fsdp * tensor), 1)
    if data * fsdp * tensor != len(devices):
        raise InputError(
            f"mesh.data={data}, mesh.fsdp={fsdp} and mesh.tensor={tensor} need "
            f"{data * fsdp * tensor} devices, but there are {len(devices)}: use data=-1 and others "
            "whose product divides that"
        )
    # Host by host, so that the rows of a batch that a host reads lie together.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    array = np.asarray(devices).reshape(data, fsdp, tensor)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(BATCH))


# -------------------------------------------------------------------------------- parameters


def spec(name: str, ndim: int) -> PartitionSpec:
    """How the parameter `name`, or what an optimizer keeps of it, is split: "blocks_0/..."."""
    for pattern, axes in RULES:
        if re.search(rf"(^|/){pattern}$", name) and ndim >= len(axes):
            return PartitionSpec(*[None] * (ndim - len(axes)), *axes)
    return PartitionSpec()


def specs(tree: Any, axes: Sequence[str] = AXES) -> Any:
    """The `spec` of every leaf of parameters or of a whole training state, along `axes` alone."""

    def of_leaf(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return PartitionSpec(*(axis if axis in axes else None for axis in spec(name, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def shardings(tree: Any, mesh: Mesh, axes: Sequence[str] = AXES) -> Any:
    """`specs` on a mesh.

    Raises:
        InputError: an axis does not divide what it should split.
    """

    def check(path, leaf, spec):
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis and size % mesh.shape[axis]:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise InputError(
                    f"mesh.{axis}={mesh.shape[axis]} does not divide the {size} of {name} "
                    f"{list(leaf.shape)}: use another size of that axis"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(check, tree, specs(tree, axes))


def place(tree: Any, shardings: Any) -> Any:
    """Arrays of this host, the same on all hosts, as global arrays: each device gets its part."""

    def of_leaf(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(of_leaf, tree, shardings)


def whole(params: Any, mesh: Mesh) -> Any:
    """`params` as an evaluation wants them: not split along "fsdp", so that no batch gathers."""
    if mesh.shape[FSDP] == 1:
        return params
    return jax.jit(lambda x: x, out_shardings=shardings(params, mesh, (TENSOR,)))(params)


def describe(mesh: Mesh) -> str:
    """Such as "8 cpu devices (data 4, fsdp 2) of 2 processes"."""
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    kind = mesh.devices.flat[0].platform
    text = f"{mesh.size} {kind} device{'s' * (mesh.size > 1)}" + (f" ({axes})" if axes else "")
    return text + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else "")


def fetch(x: jax.Array) -> np.ndarray:
    """A global array, wherever its parts are, as this host's. All hosts must call it."""
    if not x.is_fully_addressable and not x.is_fully_replicated:
        x = jax.jit(lambda x: x, out_shardings=replicated(x.sharding.mesh))(x)
    return np.asarray(x.addressable_data(0) if x.is_fully_replicated else x)


def fetch_on_main(tree: Any) -> Any:
    """`fetch` leaf by leaf for process 0; the others, which must call it too, keep nothing."""
    main = jax.process_index() == 0

    def of_leaf(x):
        array = fetch(x)
        return array if main else None

    return jax.tree.map(of_leaf, tree)


# -------------------------------------------------------------------------------- steps


def on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """`function`, in which `jax.sharding.get_abstract_mesh()` is `mesh`.

    For what it calls that XLA cannot divide among devices, and that has to do so by itself.
    """

    @functools.wraps(function)
    def wrapped(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return wrapped


def jit_train_step(train_step: Callable, mesh: Mesh, state: Any) -> Callable:
    """The function of `steps.make_train_step` as it runs on `mesh`. It consumes the state.

    `state` is an example, arrays or their shapes.
    """
    everywhere, layout = replicated(mesh), shardings(state, mesh)
    return jax.jit(
        on_mesh(train_step, mesh),
        in_shardings=(layout, batch_sharding(mesh), everywhere),
        out_shardings=(layout, everywhere),
        donate_argnums=0,
    )


def jit_eval_step(eval_step: Callable, mesh: Mesh) -> Callable:
    """The function of `steps.make_eval_step` as it runs on `mesh`, on weights made `whole`."""
    return jax.jit(on_mesh(eval_step, mesh), out_shardings=replicated(mesh))


# -------------------------------------------------------------------------------- batches


def check_batch_size(key: str, batch_size: int, mesh: Mesh) -> None:
    """Raises InputError unless every device gets the same number of images."""
    shares = mesh.shape["data"] * mesh.shape[FSDP]
    if batch_size < 1 or batch_size % shares:
        of = "" if shares == mesh.size else f" in {shares} groups"
        raise InputError(
            f"{key}={batch_size} is not divisible by the {shares} devices{of}: "
            f"use a multiple of {shares}"
        )


def host_rows(mesh: Mesh) -> tuple[int, int]:
    """(part, parts): this host reads the part-th of so many equal parts of every batch.

    Where "tensor" spans hosts, several of them read the same part.

    Raises:
        InputError: the rows of this host's devices are no such part.
    """
    batch = mesh.shape["data"] * mesh.shape[FSDP]
    places = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    rows = sorted({range(batch)[index[0]].start for index in places})
    parts, left = divmod(batch, len(rows))
    if left or rows[0] % len(rows) or rows != list(range(rows[0], rows[0] + len(rows))):
        raise InputError(
            f"the devices of process {jax.process_index()} do not read one of several equal parts "
            f"of a batch but rows {rows} of {batch}: give each process as many devices, and a "
            "mesh.tensor that divides their number, or that it divides"
        )
    return rows[0] // len(rows), parts


def to_global(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch, as its part of the global arrays [batch_size, ...]."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, x) for k, x in batch.items()}
