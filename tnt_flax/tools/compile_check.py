# SPDX-License-Identifier: Apache-2.0
"""Compiles a config's training step for TPUs on any machine: memory, FLOPs, collectives.

    tnt-flax compile-check --config=tnt_b --topology=v5e:16x16
    tnt-flax compile-check --config=tnt_s --topology=v5p:2x2x1 \\
        --config.batch_size=512

Needs `pip install "tnt_flax[tpu]"` but no TPU, reads no data, and takes one or two minutes. The
figures are the compiler's: nothing is executed, and another libtpu may give others. The last line
on stdout is one JSON object. Exit code 1 means that the step does not fit into memory, 2 that the
input was wrong.
"""

import argparse
import collections
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from tnt_flax.core.errors import InputError, one_line, require_extras
from tnt_flax.tools.command_line import Parser, positive
from tnt_flax.tools.describe import count_macs
from tnt_flax.training.experiment import Experiment

logger = logging.getLogger(__name__)
GIB = 2**30
# Memory of a chip in GiB: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e.
CHIP_MEMORY = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
# Without this option a v4 chip is described as two devices, each with half of the memory.
TOPOLOGY_OPTIONS = {"v4": {"chip_config_name": "megacore"}}


class Compiled(NamedTuple):
    """What the compiler reports about a program. Memory is per chip; None if it does not fit."""

    fits: bool
    arguments_gib: float | None  # arguments, and results that do not reuse their memory
    temporaries_gib: float | None
    compile_s: float
    hlo: str  # the optimized program


class Collectives(NamedTuple):
    """All collectives of one kind and dtype, as one device executes them."""

    kind: str
    dtype: str
    instructions: int
    in_loops: int  # how many of the instructions are in the body of a loop
    executed: int  # executions per call of the program
    bytes: int  # size of the results of all executions


def add_arguments(parser: Parser) -> None:
    parser.add_config()
    parser.add_argument("--topology", help="kind of TPU and chips along each axis, such as v5e:4x4")
    parser.add_argument(
        "--classes", type=positive, default=1000, metavar="N", help="number of classes"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    jax.config.update("jax_platforms", "cpu")  # do not occupy the TPUs of this machine
    return compile_check(args.config, args.topology, args.classes)


def failed(result: dict[str, Any]) -> bool:
    return not result["fits"]


def compile_check(config: ConfigDict, topology: str | None, classes: int = 1000) -> dict[str, Any]:
    """Compiles the training step and prints what the compiler reports.

    Returns:
        The JSON object of the last line.

    Raises:
        InputError: the config or the topology is wrong, or libtpu is not installed.
    """
    if not topology:
        raise InputError("--topology=KIND:CHIPS is missing, for instance --topology=v5e:4x4")
    chips = tpu_devices(topology)
    experiment = Experiment(config, devices=chips, num_classes=classes, steps_per_epoch=1)
    memory = CHIP_MEMORY[topology.partition(":")[0]]
    _, batch, _ = experiment.step_shapes
    batch_size, size, _, _ = batch["image"].shape
    images = batch_size / len(chips)
    logger.info(
        f"{experiment.config.model.name}, {size} pixels, batch size {batch_size}, "
        f"{len(chips)} chips of {topology}: {images:g} images per chip"
    )
    compiled = compile_for_tpu(experiment.train_step, experiment.step_shapes, memory)
    exchanges = collectives(compiled.hlo)
    flops = train_step_flops(config, classes) / len(chips)
    print(f"memory per chip      {memory:g} GiB")
    if compiled.temporaries_gib is not None:
        print(f"  state and batch    {compiled.arguments_gib:.2f} GiB")
        print(f"  temporaries        {compiled.temporaries_gib:.2f} GiB")
    print(f"  the step           {'fits' if compiled.fits else 'DOES NOT FIT'}")
    print(f"matmuls per chip     {flops / 1e12:.3f} TFLOP per step, without rematerialization")
    for each in exchanges:
        print(
            f"{each.kind:<20} {each.bytes / 1e6:.2f} MB of {each.dtype} per step: "
            f"{each.instructions} instructions ({each.in_loops} in loops), "
            f"executed {each.executed} times"
        )
    print(f"compile time         {compiled.compile_s:.0f} s on this machine")
    return {
        "fits": compiled.fits,
        "temporaries_gib": compiled.temporaries_gib,
        "arguments_gib": compiled.arguments_gib,
        "chip_gib": memory,
        "chips": len(chips),
        "images_per_chip": images,
        "flops": flops,
        "collectives": [each._asdict() for each in exchanges],
        "compile_s": round(compiled.compile_s, 1),
    }


def tpu_devices(topology: str) -> list[jax.Device]:
    """Returns the chips of a topology such as "v5e:4x4", as devices to compile for.

    Raises:
        InputError: libtpu is not installed, or it knows no such topology.
    """
    require_extras("compiling for TPUs", "tpu")
    kind = topology.partition(":")[0]
    if kind not in CHIP_MEMORY:
        kinds = ", ".join(CHIP_MEMORY)
        raise InputError(f"--topology={topology}: use one of {kinds}, as in v5e:4x4")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for TPUs of this machine
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # else one process at a time
    try:
        found = topologies.get_topology_desc(topology, "tpu", **TOPOLOGY_OPTIONS.get(kind, {}))
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"--topology={topology}: {one_line(error)}") from None
    return list(found.devices)


def compile_for_tpu(jitted: Callable, arguments: tuple, chip_gib: float) -> Compiled:
    """Compiles a jitted function whose shardings are on TPU devices."""
    lowered = jitted.trace(*arguments).lower(lowering_platforms=("tpu",))
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        logger.info(one_line(error))
        return Compiled(False, None, None, time.perf_counter() - start, "")
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    # Donated arguments share their memory with outputs.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    held = memory.argument_size_in_bytes + results + memory.generated_code_size_in_bytes
    temporaries = memory.temp_size_in_bytes
    return Compiled(
        fits=held + temporaries <= chip_gib * GIB,
        arguments_gib=round(held / GIB, 3),
        temporaries_gib=round(temporaries / GIB, 3),
        compile_s=seconds,
        hlo=compiled.as_text(),
    )


def train_step_flops(config: ConfigDict, num_classes: int) -> int:
    """FLOPs of the matmuls and convolutions of a step, without rematerialization."""
    experiment = Experiment(config, num_classes=num_classes, steps_per_epoch=1)
    plain = dict(inner_impl="reference", outer_impl="reference", remat="none")
    experiment.model = experiment.model.clone(**plain)
    return 2 * count_macs(experiment.make_train_step(), *experiment.step_shapes)


# ------------------------------------------------------------------------------------- collectives

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}  # of other dtypes, the number in the name
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")  # first line of a computation
# Its shape is that of the result. "-start" is left out: its shape contains the operand, too.
COLLECTIVE = re.compile(rf" = (.*?) ({KINDS})(?:-done)?\(")
SHAPE = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")


def collectives(hlo: str) -> list[Collectives]:
    """Lists the collectives of an optimized program by kind and dtype.

    Args:
        hlo: the text of the program, `jax.stages.Compiled.as_text()`. An instruction in the body
            of a loop is executed once per iteration, or once if the trip count is unknown; all
            branches of a conditional count.
    """
    computations, entry = {}, ""
    for line in hlo.splitlines():
        if header := HEADER.match(line):
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif computations:
            lines.append(line)
    sums = collections.defaultdict(lambda: np.zeros(4, int))
    for kind, shape, executed, in_loop in _walk(computations, entry, 1, False):
        sizes = collections.Counter()
        for dtype, dimensions in SHAPE.findall(shape):
            sizes[dtype] += _array_bytes(dtype, dimensions)
        for dtype, size in sizes.items():
            sums[kind, dtype] += (1, in_loop, executed, executed * size)
    return [Collectives(*key, *sums[key].tolist()) for key in sorted(sums)]


def _walk(computations, name, times, in_loop) -> Iterator[tuple[str, str, int, bool]]:
    """Yields (kind, shape, executions, in a loop) of each collective, starting at `name`."""
    for line in computations.get(name, ()):
        if collective := COLLECTIVE.search(line):
            yield collective[2], collective[1], times, in_loop
        elif body := re.search(r"\bbody=%?([\w.\-]+)", line):
            trips = _trip_count(computations, line)
            yield from _walk(computations, body[1], times * trips, True)
        elif called := re.search(r"\b(?:calls|to_apply)=(%?[\w.\-]+)|computations=\{(.*?)\}", line):
            for each in (called[1] or called[2]).split(", "):
                yield from _walk(computations, each.lstrip("%"), times, in_loop)


def _trip_count(computations, loop: str) -> int:
    """Returns the annotated trip count of the `while` instruction, or its condition's bound."""
    if known := re.search(r'known_trip_count[^\d}]*"?(\d+)', loop):
        return int(known[1])
    condition = computations[re.search(r"condition=%?([\w.\-]+)", loop)[1]]
    root = next((line for line in condition if line.lstrip().startswith("ROOT")), "")
    if bound := re.search(r" compare\(.*, %?([\w.\-]+)\), direction=LT", root):
        for line in condition:
            if found := re.match(rf"\s+%?{re.escape(bound[1])} = .* constant\((\d+)\)", line):
                return int(found[1])
    return 1


def _array_bytes(dtype: str, dimensions: str) -> int:
    itemsize = BYTES.get(dtype) or int(re.search(r"\d+", dtype)[0]) / 8
    return round(itemsize * math.prod(int(n) for n in dimensions.split(",") if n))
