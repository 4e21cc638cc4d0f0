# SPDX-License-Identifier: Apache-2.0
"""Settings of this process that make JAX faster; to be applied before JAX starts."""

import contextlib
import ctypes
import glob
import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from tnt_flax.core.errors import InputError, RunError, one_line
from tnt_flax.core.files import cache_folder

# Devices of TPUs, NVIDIA GPUs and AMD GPUs.
NVIDIA = "/dev/nvidia[0-9]*"
ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", NVIDIA, "/dev/kfd")
# How XLA, CUDA and NCCL report it. A gRPC message that is too large is RESOURCE_EXHAUSTED as well.
OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED.*(memory|alloc)|out.of.memory", re.I | re.S)
# Parameters of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8

logger = logging.getLogger("tnt_flax")


def runs_on_cpu() -> bool:
    """True if JAX will use the CPU, judging by device files: asking JAX would initialize it.

    Installed packages prove nothing: ahead-of-time compilation uses libtpu without a TPU.
    """
    platforms = jax.config.jax_platforms
    return platforms == "cpu" if platforms else not any(glob.glob(x) for x in ACCELERATORS)


def warn_of_unused_gpu() -> None:
    """Warns if this machine has an NVIDIA GPU but JAX, once started, uses the CPU."""
    if jax.default_backend() == "cpu" and not jax.config.jax_platforms and glob.glob(NVIDIA):
        logger.warning(
            "warning: this machine has an NVIDIA GPU, but JAX uses the CPU: "
            'pip install "tnt_flax[cuda]" (JAX_PLATFORMS=cpu silences this)'
        )


def keep_memory() -> bool:
    """Makes glibc keep freed memory for later allocations if JAX runs on the CPU.

    XLA allocates the buffers of a step again in every step. By default glibc returns such large
    buffers to the system; mapping them again, page by page, took a third of a TNT-S training step.
    The process then never shrinks below its peak memory. A single arena is used because thread
    arenas cannot hold buffers of this size, hence this must run before JAX starts its threads.

    Returns:
        True if the settings were applied, which requires glibc.
    """
    if not sys.platform.startswith("linux") or not runs_on_cpu():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
    return all([mallopt(name, value) for name, value in settings.items()])


def cache_compilations() -> None:
    """Caches compiled programs in ~/.cache/tnt_flax/compiled or $JAX_COMPILATION_CACHE_DIR."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    if folder := cache_folder():
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    else:
        logger.warning(
            "compiled programs are not cached: there is no writable home folder; "
            "set XDG_CACHE_HOME to a writable folder"
        )


@contextlib.contextmanager
def keep_compilations(folder: pathlib.Path) -> Iterator[None]:
    """Stores all compiled programs in `folder`, with XLA's autotuning results.

    Compiling a program again for a GPU may choose other kernels, by timing them. A run that stores
    its programs continues with the same ones.
    """
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        _set_compilation_cache(settings)
        yield
    finally:
        _set_compilation_cache(before)


def _set_compilation_cache(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX opens it once


@contextlib.contextmanager
def disable_x64() -> Iterator[None]:
    """Disables JAX's 64-bit types, as they are by default, in this thread.

    As a decorator it may be entered several times at once, unlike `jax.enable_x64` of jax 0.10.1.
    """
    with jax.enable_x64(False):
        yield


@contextlib.contextmanager
def explain_device_errors(suggest: Callable[[], str] | None = None) -> Iterator[None]:
    """Turns a device's out-of-memory error into a RunError with the config keys that help.

    `suggest` returns the end of the message, and may take minutes.

    Raises an InputError if `config.deterministic` needs another version of jaxlib.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" in str(error):
            raise InputError(
                f"deterministic=True needs another version of jaxlib ({one_line(error)}): "
                "install one, or set deterministic=False"
            ) from None
        if not OUT_OF_MEMORY.search(str(error)):
            raise
        message = (
            f"out of memory on the device ({one_line(error)}): reduce batch_size, or "
            "eval.batch_size if it happened in an evaluation; set accumulate=2 or more, or "
            "model.remat='block'; or shard the state over more devices with mesh.fsdp"
        )
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # not even the compiler has memory
            message += f"; {suggest()}" if suggest else ""
        raise RunError(message) from None
