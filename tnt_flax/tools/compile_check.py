# SPDX-License-Identifier: Apache-2.0
"""Compiles a config's programs for GPUs and TPUs that this machine does not have.

    tnt-flax compile-check --config=tnt_b --device=v5e:16x16
    tnt-flax compile-check --config=tnt_s --device=h100 --config.batch_size=128
    tnt-flax compile-check --config=tnt_s --device=h100 --program=forward

Reports memory, FLOPs and collectives, and for a training step that does not fit into memory the
smallest `accumulate` that does; for GPUs also the kernels, the bytes that they move and the
time that bytes and FLOPs take at least. Reads no data. Needs `pip install "tnt_flax[tpu]"` or
"tnt_flax[cuda-compile]". The figures are the compiler's: nothing is executed, and another version
may give others. The last line on stdout is one JSON object. Exit code 1 means that the program
does not fit into memory, 2 that the input was wrong.
"""

import argparse
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from tnt_flax.core.errors import InputError, one_line
from tnt_flax.tools.command_line import Parser, positive
from tnt_flax.tools.describe import count_macs
from tnt_flax.tools.hlo import Kernel, Program
from tnt_flax.tools.targets import GIB, Target, find_target
from tnt_flax.training.experiment import Experiment
from tnt_flax.training.memory import describe_accumulate, memory_of, smallest_accumulate

logger = logging.getLogger(__name__)
PROGRAMS = ("step", "forward", "eval")


class Compiled(NamedTuple):
    """What the compiler reports about a program. Memory is per device; None if it does not fit."""

    fits: bool
    arguments_gib: float | None  # arguments, and results that do not reuse their memory
    temporaries_gib: float | None
    compile_s: float
    hlo: str  # the optimized program


def add_arguments(parser: Parser) -> None:
    parser.add_config()
    add = parser.add_argument
    add("--device", help="a GPU such as h100, or a TPU and its topology such as v5e:4x4")
    add("--devices", type=positive, metavar="N", help="number of GPUs of one host (default: 1)")
    add("--program", choices=PROGRAMS, default="step", help="what is compiled (default: step)")
    add("--classes", type=positive, default=1000, metavar="N", help="number of classes")


def run(args: argparse.Namespace) -> dict[str, Any]:
    jax.config.update("jax_platforms", "cpu")  # do not occupy the devices of this machine
    if not args.device:
        raise InputError("--device is missing, for instance --device=h100 or --device=v5e:4x4")
    target = find_target(args.device, args.devices)
    return compile_check(args.config, target, program=args.program, classes=args.classes)


def failed(result: dict[str, Any]) -> bool:
    return not result["fits"]


def compile_check(
    config: ConfigDict, target: Target, *, program: str = "step", classes: int = 1000
) -> dict[str, Any]:
    """Compiles a program and prints what the compiler reports.

    Args:
        config: see `configs/default.py`.
        target: devices to compile for.
        program: "step", the training step; "forward", the forward pass of normalized images; or
            "eval", the evaluation step.
        classes: number of classes.

    Returns:
        The JSON object of the last line.

    Raises:
        InputError: the config is wrong, or does not fit the devices.
    """
    count = len(target.devices)
    experiment = Experiment(config, devices=target.devices, num_classes=classes, steps_per_epoch=1)
    jitted, arguments = make_program(experiment, program)
    _, batch, *_ = experiment.step_shapes
    batch_size, size, _, _ = batch["image"].shape
    logger.info(
        f"{experiment.config.model.name}, {program}, {size} pixels, batch size {batch_size}, "
        f"{count} x {target.devices[0].device_kind}"
    )
    with jax.set_mesh(experiment.mesh):
        compiled = compile_for(target, jitted, arguments)
        result = {"devices": count, "images_per_device": batch_size / count}
        result |= report_memory(compiled, target)
        if program == "step" and not compiled.fits:
            fits = lambda step: compile_for(target, step, arguments).fits
            result["accumulate"] = smallest_accumulate(experiment, fits)
            print(f"  {describe_accumulate(result['accumulate'])}")
    hlo = Program(compiled.hlo)
    if target.bandwidth and compiled.hlo:
        result |= report_kernels(hlo.kernels(), target, batch_size / count)
    if program == "step":
        flops = train_step_flops(config, classes) / count
        print(f"matrix products      {flops / 1e12:.3f} TFLOP per device, each computed once")
        result["flops"] = flops
    collectives = hlo.collectives()
    for each in collectives:
        print(
            f"{each.kind:<20} {each.bytes / 1e6:.2f} MB of {each.dtype}: {each.instructions} "
            f"instructions ({each.in_loops} in loops), executed {each.executed} times"
        )
    print(f"compile time         {compiled.compile_s:.0f} s on this machine")
    collectives = [each._asdict() for each in collectives]
    return result | {"collectives": collectives, "compile_s": round(compiled.compile_s, 1)}


def make_program(experiment: Experiment, program: str) -> tuple[Callable, tuple]:
    """Returns one of PROGRAMS as a jitted function and the shapes of its arguments."""
    if program == "step":
        return experiment.train_step, experiment.step_shapes
    state, batch, *_ = experiment.step_shapes
    variables = experiment.eval_variables(state)
    if program == "eval":
        mask = jax.ShapeDtypeStruct(batch["label"].shape, bool)
        return experiment.eval_step, (variables, batch | {"mask": mask})
    images = jax.ShapeDtypeStruct(batch["image"].shape, experiment.model.dtype)
    everywhere = jax.NamedSharding(experiment.mesh, jax.P())
    split = jax.NamedSharding(experiment.mesh, jax.P(experiment.mesh.axis_names))
    forward = jax.jit(experiment.model.apply, in_shardings=(everywhere, split))
    return forward, (variables, images)


def report_memory(compiled: Compiled, target: Target) -> dict[str, Any]:
    """Prints the memory per device and returns it for the JSON object."""
    device_gib = round(target.memory / GIB, 3)
    print(f"memory per device    {device_gib:g} GiB")
    if compiled.temporaries_gib is not None:
        print(f"  arguments          {compiled.arguments_gib:.2f} GiB")
        print(f"  temporaries        {compiled.temporaries_gib:.2f} GiB")
    print(f"  the program        {'fits' if compiled.fits else 'DOES NOT FIT'}")
    return {
        "fits": compiled.fits,
        "temporaries_gib": compiled.temporaries_gib,
        "arguments_gib": compiled.arguments_gib,
        "device_gib": device_gib,
    }


def report_kernels(kernels: list[Kernel], target: Target, images: float) -> dict[str, Any]:
    """Prints the kernels' figures and returns them for the JSON object."""
    count = sum(each.executions for each in kernels)
    moved = sum(each.executions * each.bytes for each in kernels)
    flops = sum(each.executions * each.flops for each in kernels)
    times = [
        each.executions * max(each.bytes / target.bandwidth, each.flops / target.flops)
        for each in kernels
    ]
    seconds = sum(times)
    libraries = sum(each.executions for each in kernels if each.kind == "library call")
    print(f"kernels              {count}, of which {libraries} library calls")
    print(f"bytes moved          {moved / 1e9:.1f} GB, {moved / images / 1e6:.1f} MB per image")
    print(f"matrix products      {flops / 1e12:.3f} TFLOP executed")
    print(f"at least             {seconds * 1e3:.2f} ms, {images / seconds:.0f} images per second")
    longest, slowest = max(zip(times, kernels, strict=True))
    print(f"most of it           {longest * 1e3:.2f} ms in {slowest.name} {slowest.op_name}")
    return {
        "kernels": count,
        "library_calls": libraries,
        "gigabytes": moved / 1e9,
        "megabytes_per_image": moved / images / 1e6,
        "teraflops": flops / 1e12,
        "roofline_ms": seconds * 1e3,
        "slowest_kernel": slowest.name,
        "slowest_kernel_ms": longest * 1e3,
    }


def compile_for(target: Target, jitted: Callable, arguments: tuple) -> Compiled:
    """Compiles a jitted function whose shardings are on the devices of `target`."""
    lowered = jitted.trace(*arguments).lower(lowering_platforms=(target.platform,))
    start = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=target.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        logger.info(one_line(error))
        return Compiled(False, None, None, time.perf_counter() - start, "")
    seconds = time.perf_counter() - start
    memory = memory_of(compiled)
    return Compiled(
        fits=sum(memory) <= target.memory,
        arguments_gib=round(memory.held / GIB, 3),
        temporaries_gib=round(memory.temporaries / GIB, 3),
        compile_s=seconds,
        hlo=compiled.as_text(),
    )


def train_step_flops(config: ConfigDict, num_classes: int) -> int:
    """FLOPs of the matmuls and convolutions of a step, without rematerialization."""
    experiment = Experiment(config, num_classes=num_classes, steps_per_epoch=1)
    plain = dict(inner_impl="reference", outer_impl="reference", remat="none")
    experiment.model = experiment.model.clone(**plain)
    return 2 * count_macs(experiment.make_train_step(), *experiment.step_shapes)
