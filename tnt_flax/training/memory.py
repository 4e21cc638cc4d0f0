# SPDX-License-Identifier: Apache-2.0
"""Memory of the compiled training step, and the micro-batches that make it fit."""

import bisect
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from tnt_flax.runtime import sharding
from tnt_flax.training.experiment import Experiment

logger = logging.getLogger(__name__)
FIND_ACCUMULATE = "tnt-flax compile-check names the smallest accumulate that fits"


class Memory(NamedTuple):
    """Bytes per device that a compiled program needs, by the compiler's figures."""

    held: int  # arguments, results that do not reuse their memory, and code
    temporaries: int


def memory_of(compiled: Any) -> Memory:
    """Returns the memory of the result of `jax.stages.Lowered.compile`."""
    memory = compiled.memory_analysis()
    # Donated arguments share their memory with outputs.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    held = memory.argument_size_in_bytes + results + memory.generated_code_size_in_bytes
    return Memory(held, memory.temp_size_in_bytes)


def smallest_accumulate(experiment: Experiment, fits: Callable[[Callable], bool]) -> int | None:
    """Returns the smallest `accumulate`, greater than the config's, whose step fits.

    Compiles a few steps, as the memory falls with `accumulate`.

    Args:
        experiment: whose step does not fit.
        fits: whether a jitted training step fits.

    Returns:
        None if no step fits.
    """
    rows, current = experiment.config.batch_size, experiment.config.accumulate
    shares = math.prod(experiment.mesh.shape[axis] for axis in sharding.BATCH)
    counts = [n for n in range(current + 1, rows // shares + 1) if rows % (n * shares) == 0]
    found = bisect.bisect_left(counts, True, key=lambda n: fits(experiment.jit_train_step(n)))
    return counts[found] if found < len(counts) else None


def suggest_accumulate(experiment: Experiment) -> str:
    """Returns the end of the message of a run whose step does not fit into memory.

    It names the smallest `accumulate` that fits, or the command that finds it if there are several
    processes or a device does not tell its memory.
    """
    limit = device_memory(experiment.mesh.devices.flat[0])
    if limit is None or jax.process_count() > 1:
        return FIND_ACCUMULATE
    logger.info("out of memory: compiling steps with other values of accumulate")
    compile_step = lambda step: step.lower(*experiment.step_shapes).compile()
    count = smallest_accumulate(
        experiment, lambda step: sum(memory_of(compile_step(step))) <= limit
    )
    return describe_accumulate(count)


def describe_accumulate(count: int | None) -> str:
    """Returns what the result of `smallest_accumulate` means."""
    if count is None:
        return "no accumulate fits"
    return f"accumulate={count} is the smallest that fits, by the compiler's figures"


def device_memory(device: jax.Device) -> int | None:
    """Returns the bytes that JAX may use on a device; None on CPUs."""
    return (device.memory_stats() or {}).get("bytes_limit")
