# SPDX-License-Identifier: Apache-2.0
"""Speed of the network (forward, inference) and of its training step, relative to timm.

    python -m benchmarks forward --against=timm
    python -m benchmarks step --against=timm --rounds=9
    python -m benchmarks inference --against=timm --batch-sizes 1 8 64 --cores=2

Each contender runs in a process of its own, one at a time, on the same CPU cores. All start from
the same normalized images and soft targets in memory, with random weights. Contenders:

    ours            float32; drop path 0.1 and remat="block" in training
    ours tuned      step only: remat="none" and retained memory, as `main.py` trains on a CPU
    ours bfloat16   inference only: dtype="bfloat16"
    timm eager      `timm.create_model`; in inference mode, or with drop path 0.1
    timm compile    the same in `torch.compile`
    timm bfloat16   timm eager in `torch.autocast`

bfloat16 inference and "timm bfloat16" are omitted on CPUs without bfloat16 instructions.

A step is forward pass, soft-target cross entropy, backward pass, AdamW and EMA; timm uses
`create_optimizer_v2` and `ModelEmaV3`, as its training script does. Our step also computes the
gradient norm and checks for NaN. `forward` and `step` time batches of one size; `inference` times
batches of several sizes and the latency of single images.

A ratio is the median over rounds of ours / theirs in images per second. `latency_ms` is the median
and the 95th percentile over all timed single images. `gflops_peak` is the best float32 matrix
product of XLA on these cores. `share_of_peak` counts two FLOPs per multiply-add of the network's
matrix products, three times as many in a step; rematerialization is not counted, the unused tokens
of the last block are.
"""

import argparse
import functools
import pathlib
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness
from tnt_flax.core.errors import InputError
from tnt_flax.models import Network, create_model
from tnt_flax.runtime import host
from tnt_flax.tools import describe
from tnt_flax.tools.command_line import positive
from tnt_flax.training.optimizer import make_optimizer
from tnt_flax.training.step import TrainState, make_train_step

FORWARD_BATCHES, STEP_BATCHES = 4, 2  # per pass
INFERENCE_IMAGES = 8  # per pass, at least
SINGLE_IMAGES = 10  # timed per round for the latency
FLOPS_PER_MAC = {"forward": 2, "step": 6}
CLASSES, DROP_PATH = 1000, 0.1
ADAMW = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.05)
LEARNING_RATE, EMA_DECAY = 1e-5, 0.99996
PEAK_SIZE, PEAK_TRIES = 1024, 10  # side of the matrix product; the best of its tries counts

# Contender -> (dtype, whether the process is tuned as main.py's).
OURS = {
    "forward": {"ours": ("float32", False)},
    "step": {"ours": ("float32", False), "ours tuned": ("float32", True)},
    "inference": {"ours": ("float32", False), "ours bfloat16": ("bfloat16", False)},
}
TIMM_VARIANTS = ("eager", "compile", "bfloat16")


class Work(NamedTuple):
    """The task of all contenders."""

    task: str  # "forward", "step" or "inference"
    model: str
    fields: dict[str, Any]  # arguments of both our and timm's `create_model`
    image_size: int
    batches: dict[int, int]  # batch size -> batches per pass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_common_arguments(parser)
    parser.add_argument("--batch-size", type=positive, default=8, help="images per batch")


def add_inference_arguments(parser: argparse.ArgumentParser) -> None:
    _add_common_arguments(parser)
    sizes = [1, 2, 4, 8, 16, 32]
    parser.add_argument(
        "--batch-sizes", type=positive, nargs="+", default=sizes, help="images per batch"
    )


def _add_common_arguments(parser):
    harness.add_arguments(parser, rounds=6)
    add = parser.add_argument
    add("--model", default="tnt_s_patch16_224", help="one of tnt_flax.list_models()")
    add("--against", choices=["timm"], help="default: timm, if installed and if it has MODEL")


def measure_model(
    args: argparse.Namespace, image_size: int | None = None, **fields: Any
) -> dict[str, Any]:
    """Measures the forward pass or the training step (`args.command`); returns the JSON result.

    `image_size` and `fields`, such as depth, select networks other than the published ones.

    Raises:
        InputError: unknown model, too few cores, or timm is missing.
        RunError: a contender failed.
    """
    task, batches = args.command, {args.batch_size: FORWARD_BATCHES}
    work, facts, contenders = _set_up(args, batches, image_size, fields)
    macs = count_macs(create_model(args.model, num_classes=CLASSES, **fields), work.image_size)
    facts |= {"batch_size": args.batch_size, "gmacs": round(macs / 1e9, 3)}
    harness.print_facts(facts)
    with harness.processes(contenders, facts["cores"]) as runs:
        rates = harness.measure(runs, work.task, args.rounds)
        peak = max(runs["ours"]("peak") for _ in range(PEAK_TRIES + 1))  # the first one compiles
    return summarize(task, rates, FLOPS_PER_MAC[task] * macs, peak) | facts


def measure_inference(
    args: argparse.Namespace, image_size: int | None = None, **fields: Any
) -> dict[str, Any]:
    """Measures latency and throughput of inference; returns the JSON result.

    Arguments and exceptions are those of `measure_model`.
    """
    sizes = sorted(set(args.batch_sizes))
    batches = {size: -(-INFERENCE_IMAGES // size) for size in sizes}
    work, facts, contenders = _set_up(args, batches, image_size, fields)
    facts["batch_sizes"] = sizes
    harness.print_facts(facts)
    with harness.processes(contenders, facts["cores"]) as runs:
        singles = {name: functools.partial(_single_images, run) for name, run in runs.items()}
        latencies = harness.alternate(singles, args.rounds, "latency, ms")
        rates = {size: harness.measure(runs, f"batch {size}", args.rounds) for size in sizes}
    return summarize_inference(latencies, rates) | facts


def _single_images(run):
    """Returns the milliseconds of SINGLE_IMAGES single images."""
    return [1e3 / run("single") for _ in range(SINGLE_IMAGES)]


def _set_up(args, batches, image_size, fields):
    """Returns the work, the facts of the JSON result, and the contenders."""
    task, pyramid = args.command, args.model.startswith("ptnt_")
    cores = harness.pick_cores(args.cores)
    if args.against and pyramid:
        raise InputError(f"--against=timm: timm has no PyramidTNT, so no --model={args.model}")
    create_model(args.model, **fields)  # raises for an unknown model
    with_timm = not pyramid and harness.has_timm()
    if args.against and not with_timm:
        raise InputError('--against=timm needs torch and timm: pip install "tnt_flax[oracle]"')
    size = image_size or int(args.model.rpartition("_")[2])
    work = Work(task, args.model, fields, size, batches)
    fast_bfloat16 = has_bfloat16()  # emulated, it takes ages
    contenders = {
        name: functools.partial(_our_passes, work, dtype, tuned)
        for name, (dtype, tuned) in OURS[task].items()
        if dtype == "float32" or fast_bfloat16
    }
    contenders |= {
        f"timm {variant}": functools.partial(_timm_passes, work, variant)
        for variant in TIMM_VARIANTS
        if with_timm and (variant != "bfloat16" or fast_bfloat16)
    }
    packages = ["jax", "jaxlib", "flax", "optax", *(["torch", "timm"] if with_timm else [])]
    facts = {"model": args.model, "cores": cores, "versions": harness.versions(*packages)}
    return work, facts, contenders


def has_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions, according to Linux."""
    flags = pathlib.Path("/proc/cpuinfo").read_text().split()
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def count_macs(model: Network, image_size: int) -> int:
    """Multiply-adds of the matrix products for one image, including unused tokens."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    watched = functools.partial(model.apply, mutable=["intermediates"])
    return describe.count_macs(watched, variables, images)


# ----------------------------------------------------------------------------------------- results


def summarize(task: str, rates: harness.Rates, flops: int, peak: float) -> dict[str, Any]:
    """JSON result of `forward` and `step`; `flops` per image, `peak` in FLOPs per second."""
    medians = {name: harness.median(values) for name, values in rates.items()}
    return {
        **{
            f"{task}{ours.removeprefix('ours').replace(' ', '_')}_vs_{variant}": harness.median(
                harness.ratios(rates, ours, [f"timm {variant}"])
                if f"timm {variant}" in rates
                else []
            )
            for ours in OURS[task]
            for variant in TIMM_VARIANTS
        },
        "images_per_second": medians,
        "share_of_peak": {name: round(rate * flops / peak, 3) for name, rate in medians.items()},
        "gflops_peak": round(peak / 1e9, 1),
        "rounds": _rounded(rates),
    }


def summarize_inference(
    latencies: dict[str, list[list[float]]], rates: dict[int, harness.Rates]
) -> dict[str, Any]:
    """JSON result of `inference`: milliseconds per round and image, rates per batch size."""
    single = {  # images per second, so that larger is better in every ratio
        name: [1e3 / statistics.median(times) for times in rounds]
        for name, rounds in latencies.items()
    }
    tables = {"latency": single} | {str(size): table for size, table in rates.items()}
    return {
        "latency_ms": {
            name: {
                "median": round(float(np.median(times)), 2),
                "p95": round(float(np.percentile(times, 95)), 2),
            }
            for name, times in latencies.items()
        },
        "images_per_second": {
            str(size): {name: harness.median(values) for name, values in table.items()}
            for size, table in rates.items()
        },
        **{
            f"ours_vs_{variant}": {
                name: harness.median(harness.ratios(table, "ours", [f"timm {variant}"]))
                for name, table in tables.items()
                if f"timm {variant}" in table
            }
            for variant in TIMM_VARIANTS
        },
        "rounds": {name: _rounded(table) for name, table in tables.items()},
    }


def _rounded(rates):
    return {name: [round(rate, 3) for rate in values] for name, values in rates.items()}


# -------------------------------------------------------------------------------------- contenders


def make_batch(work: Work, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns normalized images [B, H, W, 3] and soft targets [B, CLASSES]."""
    generator = np.random.default_rng(0)
    shape = (batch_size, work.image_size, work.image_size, 3)
    labels = generator.integers(0, CLASSES, batch_size)
    targets = 0.9 * np.eye(CLASSES, dtype=np.float32)[labels] + 0.1 / CLASSES
    return generator.uniform(-1, 1, shape).astype(np.float32), targets.astype(np.float32)


def _forward_passes(work, classify, as_array):
    """Passes that classify: "forward", or "single" and "batch SIZE" for inference."""

    def run(images, count):
        for _ in range(count):
            classify(images)
        return count * len(images)

    make = lambda size, count: functools.partial(run, as_array(make_batch(work, size)[0]), count)
    if work.task == "inference":
        sizes = {f"batch {size}": make(size, count) for size, count in work.batches.items()}
        return {"single": make(1, 1)} | sizes
    ((size, count),) = work.batches.items()
    return {"forward": make(size, count)}


def _our_passes(work: Work, dtype: str, tuned: bool, cores: int) -> dict[str, harness.Pass]:
    del cores  # XLA starts one thread per available core
    jax.config.update("jax_platforms", "cpu")
    if tuned:
        host.keep_memory()
    options = {"drop_path": DROP_PATH, "remat": "none" if tuned else "block", "dtype": dtype}
    model = create_model(work.model, num_classes=CLASSES, **options, **work.fields)
    images, targets = map(jnp.asarray, make_batch(work, min(work.batches)))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    predict = jax.jit(model.apply)
    classify = lambda images: predict(variables, images).block_until_ready()
    passes = _forward_passes(work, classify, jnp.asarray)

    square = jnp.ones((PEAK_SIZE, PEAK_SIZE))
    multiply = jax.jit(jnp.matmul)

    def peak_pass():
        multiply(square, square).block_until_ready()
        return 2 * PEAK_SIZE**3

    passes["peak"] = peak_pass
    if work.task != "step":
        return passes

    step = make_step(model, variables, images, targets)

    def step_pass():
        for _ in range(STEP_BATCHES):
            state = step()
        jax.block_until_ready(state)
        return STEP_BATCHES * len(images)

    return passes | {"step": step_pass}


def make_step(
    model: Network, variables: Any, images: jax.Array, targets: jax.Array
) -> Callable[[], TrainState]:
    """Returns a function that starts a training step and returns the state after it."""
    schedule = optax.constant_schedule(LEARNING_RATE)
    optimizer = make_optimizer(schedule, clip_norm=0.0, **ADAMW)
    augment = lambda batch, *_: (batch["image"], batch["target"])
    step = make_train_step(model, optimizer, augment, ema_decay=EMA_DECAY)
    step = jax.jit(step, donate_argnums=0)
    state = TrainState.create(variables, optimizer.tx)

    def run():
        nonlocal state
        state, _ = step(state, {"image": images, "target": targets}, jax.random.key(1))
        return state

    return run


def _timm_passes(work: Work, variant: str, cores: int) -> dict[str, harness.Pass]:
    import timm
    import torch

    torch.set_num_threads(cores)
    if work.model not in timm.list_models("tnt*"):
        raise InputError(f"--model={work.model}: timm has {timm.list_models('tnt*')}")
    network = timm.create_model(
        work.model, img_size=work.image_size, drop_path_rate=DROP_PATH, **work.fields
    )
    network.train(work.task == "step")
    precision = torch.autocast("cpu", torch.bfloat16, enabled=variant == "bfloat16")
    call = torch.compile(network) if variant == "compile" else network
    as_tensor = lambda images: torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def classify(images):
        with torch.inference_mode(), precision:
            call(images)

    passes = _forward_passes(work, classify, as_tensor)
    if work.task != "step":
        return passes

    images, targets = make_batch(work, min(work.batches))
    images, targets = as_tensor(images), torch.from_numpy(targets)
    step = make_timm_step(network, call, precision, images, targets)

    def step_pass():
        for _ in range(STEP_BATCHES):
            step()
        return STEP_BATCHES * len(images)

    return passes | {"step": step_pass}


def make_timm_step(
    network: Any, call: Callable, precision: Any, images: Any, targets: Any, **options: Any
) -> Callable[[], None]:
    """Returns a function that starts a training step of timm.

    Args:
        network: the module whose parameters are trained.
        call: `network`, possibly compiled.
        precision: a `torch.autocast`.
        images: tensor [B, 3, H, W].
        targets: tensor [B, CLASSES].
        **options: of the optimizer.
    """
    import timm.loss
    import timm.optim
    import timm.utils

    criterion = timm.loss.SoftTargetCrossEntropy()
    optimizer = timm.optim.create_optimizer_v2(
        network, "adamw", lr=LEARNING_RATE, weight_decay=ADAMW["weight_decay"], **options
    )
    ema = timm.utils.ModelEmaV3(network, EMA_DECAY)

    def step():
        with precision:
            loss = criterion(call(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(network)

    return step
