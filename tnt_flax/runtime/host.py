# SPDX-License-Identifier: Apache-2.0
"""What a command does to its own process before JAX starts, for speed."""

import ctypes
import glob
import os

import jax

from tnt_flax.core.files import cache_folder

# Devices of TPUs, and of GPUs by NVIDIA and AMD.
ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")
# Of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def runs_on_cpu() -> bool:
    """Will JAX compute on the CPU? Told by what there is: asking JAX would start it.

    Not by what is installed: `tools.compile_check` has use for libtpu on machines without a TPU.
    """
    asked = jax.config.jax_platforms
    return asked == "cpu" if asked else not any(glob.glob(device) for device in ACCELERATORS)


def keep_memory() -> bool:
    """Keeps freed memory in this process for its next allocations, where JAX computes on the CPU.

    XLA allocates the intermediates of a step anew in every step, and glibc gives so large a piece
    back to the system each time; to get it again, page by page, took a third of a training step of
    TNT-S. The price: the process holds on to the most that it ever needed. One arena, because the
    others, of threads, cannot hold such pieces; which is why JAX must not have started its threads.
    Returns whether it could be done: with glibc it can.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not runs_on_cpu():
        return False
    settings = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
    return all([mallopt(name, value) for name, value in settings.items()])


def cache_compilations() -> None:
    """Keeps compiled programs in ~/.cache/tnt_flax/compiled, or in $JAX_COMPILATION_CACHE_DIR.

    JAX finds a program again by what it computes, versions, flags and kind of device.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
