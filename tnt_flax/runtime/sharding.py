# SPDX-License-Identifier: Apache-2.0
"""The mesh of all devices, and how arrays are sharded over it.

Three axes. "data" and "fsdp" split every batch. "fsdp" also splits what is stored: parameters,
their EMA and the optimizer's moments (ZeRO). "tensor" splits the outer transformer: its heads
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
DETERMINISTIC = {"xla_gpu_exclude_nondeterministic_ops": True}  # openxla.org/xla/determinism

# (end of a parameter's name, mesh axes over which its last dimensions are sharded); the first rule
# that matches counts. Parameters without a rule are small and replicated.
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
    """Returns a mesh of all devices, or of `devices`, with AXES; `data=-1` takes those left over.

    Raises:
        InputError: the sizes do not use every device.
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
            f"{data * fsdp * tensor} devices, but there are {len(devices)}: use "
            f"mesh.data=-1, and mesh.fsdp * mesh.tensor that divides {len(devices)}"
        )
    # Host by host, so that each host reads consecutive rows of a batch.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    array = np.asarray(devices).reshape(data, fsdp, tensor)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(BATCH))


# ------------------------------------------------------------------------------------ parameters


def partition_spec(name: str, ndim: int) -> PartitionSpec:
    """Returns the sharding of the parameter `name`, "blocks_0/...", by the first rule that matches.

    Its EMA and moments have the same names and so the same specs. An array with fewer axes than the
    rule, such as a factored moment, is replicated.
    """
    for pattern, axes in RULES:
        if re.search(rf"(^|/){pattern}$", name) and ndim >= len(axes):
            return PartitionSpec(*[None] * (ndim - len(axes)), *axes)
    return PartitionSpec()


def shardings(tree: Any, mesh: Mesh, axes: Sequence[str] = AXES) -> Any:
    """Returns the shardings of parameters or of a whole training state, over `axes` only.

    Raises:
        InputError: a mesh axis does not divide the array axis that it shards.
    """

    def of_leaf(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = [axis if axis in axes else None for axis in partition_spec(name, leaf.ndim)]
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis and size % mesh.shape[axis]:
                raise InputError(
                    f"mesh.{axis}={mesh.shape[axis]} does not divide the {size} of {name} "
                    f"{list(leaf.shape)}: use another size of that axis"
                )
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def put_global(tree: Any, mesh: Mesh) -> Any:
    """Returns global arrays with `shardings` from host arrays, the same on all processes."""

    def of_leaf(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(of_leaf, tree, shardings(tree, mesh))


def unshard_fsdp(variables: Any, mesh: Mesh) -> Any:
    """Returns global `variables` sharded over "tensor" only: gathered once, not in every step."""
    if mesh.shape[FSDP] == 1:
        return variables
    out_shardings = shardings(variables, mesh, axes=(TENSOR,))
    return jax.jit(lambda x: x, out_shardings=out_shardings)(variables)


def describe(mesh: Mesh) -> str:
    """Returns a summary such as "8 cpu devices (data 4, fsdp 2) of 2 processes"."""
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    kind = mesh.devices.flat[0].platform
    text = f"{mesh.size} {kind} device{'s' * (mesh.size > 1)}" + (f" ({axes})" if axes else "")
    return text + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else "")


def fetch(x: jax.Array) -> np.ndarray:
    """Returns a global array on this host. All processes must call it."""
    if not x.is_fully_addressable and not x.is_fully_replicated:
        x = jax.jit(lambda x: x, out_shardings=replicated(x.sharding.mesh))(x)
    return np.asarray(x.addressable_data(0) if x.is_fully_replicated else x)


# ----------------------------------------------------------------------------------------- steps


def on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """Returns `function` with `mesh` as its ambient mesh, `jax.sharding.get_abstract_mesh()`.

    Kernels, which XLA cannot partition, need it for a `shard_map` of their own.
    """

    @functools.wraps(function)
    def wrapped(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return wrapped


def jit_train_step(
    train_step: Callable, mesh: Mesh, state: Any, *others: Any, deterministic: bool = False
) -> Callable:
    """Jits the function of `step.make_train_step` for `mesh`; it donates the state.

    `state`, and `others`, further arguments that are sharded like parameters, are examples: arrays
    or their shapes. See `compiler_options` for `deterministic`.
    """
    everywhere, state_shardings = replicated(mesh), shardings(state, mesh)
    return jax.jit(
        on_mesh(train_step, mesh),
        in_shardings=(
            state_shardings,
            batch_sharding(mesh),
            everywhere,
            *(shardings(tree, mesh) for tree in others),
        ),
        out_shardings=(state_shardings, everywhere),
        donate_argnums=0,
        compiler_options=compiler_options(mesh, deterministic),
    )


def jit_eval_step(eval_step: Callable, mesh: Mesh, deterministic: bool = False) -> Callable:
    """Jits the function of `step.make_eval_step` for `mesh`; see `unshard_fsdp`."""
    options = compiler_options(mesh, deterministic)
    step = on_mesh(eval_step, mesh)
    return jax.jit(step, out_shardings=replicated(mesh), compiler_options=options)


def compiler_options(mesh: Mesh, deterministic: bool) -> dict[str, bool]:
    """Returns the options of XLA that make the kernels of GPUs deterministic, if so asked.

    Those of CPUs and TPUs always are. Unlike $XLA_FLAGS, options take effect after JAX has started,
    and an unknown one is an exception instead of the end of the process.
    """
    on_gpu = mesh.devices.flat[0].platform in ("gpu", "cuda", "rocm")
    return dict(DETERMINISTIC) if deterministic and on_gpu else {}


# --------------------------------------------------------------------------------------- batches


def check_batch_size(key: str, batch_size: int, mesh: Mesh) -> None:
    """Raises InputError unless every device gets the same number of images."""
    shares = mesh.shape["data"] * mesh.shape[FSDP]
    if batch_size < 1 or batch_size % shares:
        of = "" if shares == mesh.size else f" in {shares} groups"
        raise InputError(
            f"{key}={batch_size} is not divisible by the {mesh.size} devices{of}: "
            f"use a multiple of {shares}"
        )


def host_rows(mesh: Mesh, devices: Sequence[Any] | None = None) -> tuple[int, int]:
    """Returns (part, parts): this host reads the part-th of `parts` equal parts of every batch.

    Where "tensor" spans hosts, several hosts read the same part. `devices` are those of the host,
    by default of this process.

    Raises:
        InputError: the rows of the devices are not one such part.
    """
    if devices is None:
        devices = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    batch = mesh.shape["data"] * mesh.shape[FSDP]
    indices = batch_sharding(mesh).devices_indices_map((batch,))
    rows = sorted({range(batch)[indices[device][0]].start for device in devices})
    parts, left = divmod(batch, len(rows))
    if left or rows[0] % len(rows) or rows != list(range(rows[0], rows[0] + len(rows))):
        raise InputError(
            f"the devices of process {jax.process_index()} do not read one of several equal parts "
            f"of a batch but rows {rows} of {batch}: give each process as many devices, and a "
            "mesh.tensor that divides their number, or that it divides"
        )
    return rows[0] // len(rows), parts


def to_global(batch: dict[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns global arrays [batch_size, ...] from the rows of a batch that each host has read."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, x) for k, x in batch.items()}
