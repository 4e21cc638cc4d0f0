# SPDX-License-Identifier: Apache-2.0
"""Devices to compile for on a machine that has none of them.

Figures are those of the vendors' data sheets: memory in GiB (TPUs) or GB (GPUs), bandwidth in TB/s,
dense bfloat16 products in TFLOP/s. The GPUs' other fields are what XLA asks of a card.
"""

import importlib.util
import os
import pathlib
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from tnt_flax.core.errors import InputError, one_line, require_extras

GIB = 2**30


class Target(NamedTuple):
    """Devices to compile for."""

    devices: list[jax.Device]
    platform: str  # "tpu" or "cuda"
    memory: int  # bytes per device
    bandwidth: float | None = None  # bytes per second; None: no roofline
    flops: float | None = None  # of bfloat16 products, per second
    compiler_options: dict[str, Any] = {}


class Gpu(NamedTuple):
    name: str
    memory: int  # GB
    bandwidth: float  # TB/s
    tflops: float
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    clock: float  # GHz
    cache: int  # MB
    shared: int  # KB of shared memory per core; a block can have all but one
    threads: int = 2048  # per core


# nvidia.com: data sheets of the cards, CUDA C++ programming guide (compute capabilities).
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 80, 2.039, 312, (8, 0), 108, 1.41, 40, 164),
    "l40s": Gpu("NVIDIA L40S", 48, 0.864, 362, (8, 9), 142, 2.52, 96, 100, 1536),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 24, 1.008, 165, (8, 9), 128, 2.52, 72, 100, 1536),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 80, 3.352, 989, (9, 0), 132, 1.98, 50, 228),
    "h200": Gpu("NVIDIA H200", 141, 4.8, 989, (9, 0), 132, 1.98, 50, 228),
    "b200": Gpu("NVIDIA B200", 180, 8.0, 2250, (10, 0), 148, 1.96, 126, 228),
}
# Memory of a chip in GiB: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e.
TPUS = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
# Without this option a v4 chip is described as two devices, each with half of the memory.
TPU_OPTIONS = {"v4": {"chip_config_name": "megacore"}}
# No kernel can be timed without a card, and XLA's own products need that to choose their tiles.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def find_target(device: str, count: int | None = None) -> Target:
    """Returns the devices of `device`.

    Args:
        device: a GPU such as "h100", or a kind of TPU and the chips along each axis: "v5e:4x4".
        count: number of GPUs of one host; defaults to 1.

    Raises:
        InputError: the device is unknown, or its compiler is not installed.
    """
    kind, _, topology = device.partition(":")
    if kind in TPUS and topology:
        if count is not None:
            raise InputError(f"--device={device} has its number of chips: leave out --devices")
        return Target(tpu_devices(device), "tpu", TPUS[kind] * GIB)
    if kind in GPUS and not topology:
        gpu = GPUS[kind]
        return Target(
            gpu_devices(gpu, count or 1),
            "cuda",
            gpu.memory * 10**9,
            gpu.bandwidth * 1e12,
            gpu.tflops * 1e12,
            GPU_OPTIONS,
        )
    kinds = ", ".join(GPUS), ", ".join(TPUS)
    raise InputError(
        f"--device={device}: use a GPU ({kinds[0]}) or a TPU with its topology ({kinds[1]}), "
        "such as h100 or v5e:4x4"
    )


def tpu_devices(topology: str) -> list[jax.Device]:
    """Returns the chips of a topology such as "v5e:4x4".

    Raises:
        InputError: libtpu is not installed, or it knows no such topology.
    """
    require_extras("compiling for TPUs", "tpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for TPUs of this machine
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # else one process at a time
    options = TPU_OPTIONS.get(topology.partition(":")[0], {})
    try:
        found = topologies.get_topology_desc(topology, "tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"--device={topology}: {one_line(error)}") from None
    return list(found.devices)


def gpu_devices(gpu: Gpu, count: int) -> list[jax.Device]:
    """Returns `count` cards of one host.

    Raises:
        InputError: JAX's CUDA plugin or ptxas is not installed.
    """
    require_extras("compiling for GPUs", "cuda-compile")
    if nvidia := importlib.util.find_spec("nvidia.cu13"):  # ptxas, of nvidia-cuda-nvcc
        bins = str(pathlib.Path(next(iter(nvidia.submodule_search_locations))) / "bin")
        if bins not in os.environ["PATH"].split(os.pathsep):
            os.environ["PATH"] = os.pathsep.join([bins, os.environ["PATH"]])
    found = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1x1x{count}", target_config=describe_gpu(gpu)
    )
    return list(found.devices)


def describe_gpu(gpu: Gpu) -> str:
    """Returns XLA's GpuTargetConfigProto of a card, as text."""
    major, minor = gpu.capability
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_core": gpu.shared * 1024,
        "shared_memory_per_block_optin": (gpu.shared - 1) * 1024,
        "threads_per_core_limit": gpu.threads,
        "core_count": gpu.cores,
        "fpus_per_core": 64 if gpu.capability == (8, 0) else 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": round(gpu.bandwidth * 1e12),
        "l2_cache_size": gpu.cache * 2**20,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": gpu.memory * 10**9,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    lines = [f"  {name}: {value}" for name, value in fields.items()]
    capability = f"  cuda_compute_capability {{ major: {major} minor: {minor} }}"
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            capability,
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 8 }",
            f'device_description_str: "{gpu.name}"',
        ]
    )
