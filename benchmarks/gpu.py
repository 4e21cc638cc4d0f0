# SPDX-License-Identifier: Apache-2.0
"""Forward pass and training step on one GPU, relative to timm in bfloat16.

    python -m benchmarks gpu
    python -m benchmarks gpu --forward 256 --step 128 --implementations gpu --rounds=10

Needs jax, flax, optax, orbax and, for the comparison, torch and timm; none of the packages that
train from files. Contenders, each with float32 weights that are cast to bfloat16:

    ours IMPL       dtype="bfloat16", inner_impl and outer_impl IMPL, and remat="auto" in the step
    timm eager      in `torch.autocast`
    timm compile    the same in `torch.compile`

For every batch size each contender runs in a process of its own, alternating with the others. All
start from the same normalized images and soft targets in the memory of the GPU, with random
weights. A step is forward pass, soft-target cross entropy, backward pass, AdamW (timm: fused) and
EMA. Our step also computes the gradient norm and checks for NaN.

A ratio is the median over rounds of ours / theirs in images per second: `forward_vs_compile` that
of our fastest implementation at the largest batch size, `step_vs_compile` likewise. `compile_s` is
the time of the first call; compilation caches are off. `peak_gib` is what the allocator of each
framework had handed out at most. A contender that fails, for instance for want of memory, is
listed under `errors`, and the others go on.
"""

import argparse
import functools
import math
import os
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import harness, model
from tnt_flax.core.errors import InputError, RunError
from tnt_flax.models import create_model
from tnt_flax.tools.command_line import positive

PASS_SECONDS, MOST_CALLS = 0.5, 200  # calls are queued for this long, but not more than so many
PLATFORMS = {"gpu": "cuda", "cpu": "cpu"}  # names that JAX and torch use
NO_CACHES = {
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the contenders share the card
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="tnt_s_patch16_224", help="one of tnt_flax.list_models()")
    add("--forward", type=positive, nargs="*", default=[1, 32, 256], help="batch sizes")
    add("--step", type=positive, nargs="*", default=[128], help="batch sizes")
    implementations = ["reference", "gpu"]
    add("--implementations", nargs="+", default=implementations, help=" ".join(implementations))
    add("--rounds", type=positive, default=5, help="timed rounds")
    add("--platform", choices=list(PLATFORMS), default="gpu", help="cpu: only to try the command")


def measure_gpu(
    args: argparse.Namespace, image_size: int | None = None, **fields: Any
) -> dict[str, Any]:
    """Measures all batch sizes; returns the JSON result.

    `image_size` and `fields`, such as depth, select networks other than the published ones.

    Raises:
        InputError: an unknown model or implementation, or no batch size.
    """
    os.environ.update(NO_CACHES)  # inherited by the measured processes
    size = image_size or int(args.model.rpartition("_")[2])
    for name in args.implementations:  # raises for unknown ones
        network = create_model(args.model, inner_impl=name, outer_impl=name, **fields)
        network.check_fields()
    with_timm = not args.model.startswith("ptnt_") and harness.has_timm()
    packages = ["jax", "jaxlib", "flax", "optax", *(["torch", "timm"] if with_timm else [])]
    result = {"model": args.model, "image_size": size, "versions": harness.versions(*packages)}
    harness.print_facts(result)
    tables: dict[str, dict[str, Any]] = {}
    for task, batch in [("forward", b) for b in args.forward] + [("step", b) for b in args.step]:
        work = model.Work(task, args.model, fields, size, {batch: 1})
        contenders = {
            f"ours {name}": functools.partial(_our_passes, work, name, args.platform)
            for name in args.implementations
        }
        if with_timm:
            for variant in ("eager", "compile"):
                make = functools.partial(_timm_passes, work, variant == "compile", args.platform)
                contenders[f"timm {variant}"] = make
        tables[f"{task} {batch}"] = measure_task(f"{task} {batch}", contenders, args.rounds)
    if not tables:
        raise InputError("--forward and --step name no batch size: nothing to measure")
    return result | {"tasks": tables} | headline(tables, args.forward, args.step)


def measure_task(
    task: str, contenders: dict[str, harness.Contender], rounds: int
) -> dict[str, Any]:
    """Compiles and times all contenders of a task."""
    found: dict[str, dict] = {key: {} for key in ("compile_s", "peak_gib", "errors")}
    cores = sorted(os.sched_getaffinity(0))
    with harness.processes(contenders, cores) as runs:

        def attempt(name, what):
            if name not in runs:  # it has failed before
                return math.nan
            try:
                return runs[name](what)
            except RunError as error:
                found["errors"][name] = str(error)
                del runs[name]
                print(f"{name}, {task}: {error}", file=sys.stderr)
                return math.nan

        for name in contenders:
            seconds = attempt(name, "compile")
            if name in runs:
                found["compile_s"][name] = round(seconds, 2)
                print(f"{name}, {task}: compiled in {seconds:.1f} s", file=sys.stderr)
        rates: harness.Rates = {}
        if runs:
            functions = {name: functools.partial(attempt, name, "run") for name in runs}
            rates = harness.alternate(functions, rounds, f"{task}, images/s")
        rates = {name: values for name, values in rates.items() if name in runs}
        found["peak_gib"] = {name: round(attempt(name, "peak"), 3) for name in rates}
    speeds = {name: harness.median(values) for name, values in rates.items()}
    ratios = {
        f"{ours} / {theirs}": harness.median(harness.ratios(rates, ours, [theirs]))
        for ours in rates
        for theirs in rates
        if ours.startswith("ours") and theirs.startswith("timm")
    }
    return found | {"images_per_second": speeds, "ratios": ratios, "rounds": rates}


def headline(
    tables: dict[str, dict[str, Any]], forward: list[int], step: list[int]
) -> dict[str, float | None]:
    """Returns the ratios of our fastest implementation at the largest batch sizes."""
    result = {}
    for task, batches in (("forward", forward), ("step", step)):
        for variant in ("eager", "compile") if batches else ():
            table = tables[f"{task} {max(batches)}"]
            ratios = [x for pair, x in table["ratios"].items() if pair.endswith(variant)]
            result[f"{task}_vs_{variant}"] = max(ratios, default=None)
    return result


# -------------------------------------------------------------------------------------- contenders


def _passes(call, wait, peak_bytes, images):
    """Passes of a contender: `call` starts one, `wait` ends when all that was started is done."""
    calls = 1

    def compile_pass():
        nonlocal calls
        start = time.perf_counter()
        wait(call())
        compiled = time.perf_counter()
        wait(call())
        calls = min(max(int(PASS_SECONDS / (time.perf_counter() - compiled)), 1), MOST_CALLS)
        return compiled - start, 1.0  # the "rate" is the number of seconds

    def run_pass():
        for _ in range(calls):
            out = call()
        wait(out)
        return calls * images

    return {"compile": compile_pass, "run": run_pass, "peak": lambda: (peak_bytes() / 2**30, 1.0)}


def _our_passes(work: model.Work, impl: str, platform: str, cores: int) -> dict[str, harness.Pass]:
    del cores  # for the GPU's host all are there
    jax.config.update("jax_platforms", PLATFORMS[platform])
    ((batch, _),) = work.batches.items()
    options = {"drop_path": model.DROP_PATH, "dtype": "bfloat16", **work.fields}
    network = create_model(
        work.model, num_classes=model.CLASSES, inner_impl=impl, outer_impl=impl, **options
    )
    images, targets = map(jnp.asarray, model.make_batch(work, batch))
    variables = jax.jit(network.init)(jax.random.key(0), images[:1])
    if work.task == "step":
        call = model.make_step(network, variables, images, targets)
    else:
        call = functools.partial(jax.jit(network.apply), variables, images)
    statistics = lambda: jax.devices()[0].memory_stats() or {}  # None on CPUs
    peak = lambda: statistics().get("peak_bytes_in_use", 0)
    return _passes(call, jax.block_until_ready, peak, batch)


def _timm_passes(
    work: model.Work, compiled: bool, platform: str, cores: int
) -> dict[str, harness.Pass]:
    import timm
    import torch

    del cores
    device = torch.device(PLATFORMS[platform])
    on_gpu = device.type == "cuda"
    ((batch, _),) = work.batches.items()
    network = timm.create_model(
        work.model, img_size=work.image_size, drop_path_rate=model.DROP_PATH, **work.fields
    )
    network.to(device).train(work.task == "step")
    precision = torch.autocast(device.type, torch.bfloat16)
    network_call = torch.compile(network) if compiled else network
    images, targets = map(torch.from_numpy, model.make_batch(work, batch))
    images = images.permute(0, 3, 1, 2).contiguous().to(device)

    def classify():
        with torch.inference_mode(), precision:
            network_call(images)

    call = classify
    if work.task == "step":
        call = model.make_timm_step(
            network, network_call, precision, images, targets.to(device), fused=on_gpu
        )
    wait = (lambda _: torch.cuda.synchronize()) if on_gpu else (lambda _: None)
    peak = torch.cuda.max_memory_allocated if on_gpu else (lambda: 0)
    return _passes(call, wait, peak, batch)
