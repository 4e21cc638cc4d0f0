# SPDX-License-Identifier: Apache-2.0
"""How fast the network and its training step are, beside timm's of the same name.

    python -m benchmarks forward --against=timm
    python -m benchmarks step --against=timm --rounds=9

Each side runs in a process of its own, one at a time, on the same cores of the CPU; a round is a
few batches of each, after a round that does not count and compiles. All begin with the same
normalized images and soft targets in memory, and random weights. Everything is float32 but for
"timm bfloat16". The sides:

    ours            drop path 0.1 and remat="block" in training
    ours tuned      step alone: remat="none" and kept memory, as `main.py` trains on a CPU
    timm eager      `timm.create_model`; in inference mode, or with drop path 0.1
    timm compile    the same in `torch.compile`
    timm bfloat16   timm eager in `torch.autocast`, where the CPU has instructions for it

A step is forward pass, soft-target cross entropy, backward pass, AdamW and the moving average of
the weights, on timm's side by what its training script takes for them: `create_optimizer_v2`,
`ModelEmaV3`. Ours also computes the norm of the gradient and looks for NaN.

A ratio is the median over the rounds of ours / theirs, in images per second. `gflops_peak` is what
these cores do in a float32 matrix product of XLA, best of several. `share_of_peak` is of that; it
counts two FLOPs for a multiply-add of the network's products, three times as many in a step, and
neither what is computed twice nor what is spared in the last block.
"""

import argparse
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness
from tnt_flax.core.errors import InputError
from tnt_flax.core.trees import merged, split
from tnt_flax.models import Model, create_model
from tnt_flax.runtime import host
from tnt_flax.tools import contractions
from tnt_flax.training import step as steps
from tnt_flax.training.optimizer import make_optimizer
from tnt_flax.training.step import TrainState

BATCHES = {"forward": 4, "step": 2}  # in a round
FLOPS_PER_MAC = {"forward": 2, "step": 6}
CLASSES, DROP_PATH = 1000, 0.1
ADAMW = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.05)
LEARNING_RATE, EMA_DECAY = 1e-5, 0.99996
PRODUCT, TRIES = 1024, 10  # of which the peak is the best
OURS = {"forward": {"": "ours"}, "step": {"": "ours", "_tuned": "ours tuned"}}
THEIRS = {name: f"timm {name}" for name in ("eager", "compile", "bfloat16")}


class Work(NamedTuple):
    """What all sides do."""

    task: str  # "forward" or "step"
    model: str
    fields: dict[str, Any]  # both of ours and of timm's network
    image_size: int
    batch_size: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sides(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="images")


def add_sides(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="tnt_s_patch16_224", help="one of tnt_flax.list_models()")
    add("--against", choices=["timm"], help="the default where timm is installed and has MODEL")
    add("--rounds", type=int, default=6, help="timed rounds")
    add("--cores", type=int, default=1, help="to which all sides are pinned")


def measure_model(
    args: argparse.Namespace, image_size: int | None = None, **fields: Any
) -> dict[str, Any]:
    """Runs all rounds of the task `args.what`; returns what the JSON line says.

    `image_size` and `fields`, such as depth, are for other networks than the published ones.

    Raises:
        InputError: an unknown model, too few cores, less than one round or image, no timm.
        RunError: a side failed.
    """
    harness.check_counts(args, "rounds", "cores", "batch_size")
    work, facts, hows = set_up(args, args.batch_size, image_size, fields)
    macs = count_macs(create_model(args.model, num_classes=CLASSES, **fields), work.image_size)
    facts["gmacs"] = round(macs / 1e9, 3)
    harness.print_facts(facts)
    harness.say_who_takes_part()
    sides = {
        name: functools.partial(_our_passes, work, bool(tuned))
        for tuned, name in OURS[args.what].items()
    }
    sides |= {THEIRS[how]: functools.partial(_timm_passes, work, how) for how in hows}
    with harness.processes(sides, facts["cores"]) as runs:
        rates = harness.measure(runs, args.what, args.rounds)
        peak = max(runs["ours"]("peak") for _ in range(TRIES + 1))  # the first one compiles
    return summarize(args.what, rates, FLOPS_PER_MAC[args.what] * macs, peak) | facts


def set_up(
    args: argparse.Namespace, batch_size: Any, image_size: int | None, fields: dict[str, Any]
) -> tuple[Work, dict[str, Any], list[str]]:
    """What all sides do, the facts of the JSON line, and which of THEIRS take part."""
    cores = harness.pick_cores(args.cores)
    with_timm = harness.has_timm() and not args.model.startswith("ptnt_")
    if args.against and args.model.startswith("ptnt_"):
        raise InputError(f"--against=timm: timm has no PyramidTNT, so no --model={args.model}")
    if args.against and not with_timm:
        raise InputError('--against=timm needs torch and timm: pip install "tnt_flax[oracle]"')
    create_model(args.model, **fields)  # which refuses what it does not know
    size = image_size or int(args.model.rpartition("_")[2])
    packages = ["jax", "jaxlib", "flax", "optax", *(["torch", "timm"] if with_timm else [])]
    facts = {
        "model": args.model,
        "batch_size": batch_size,
        "cores": cores,
        "versions": harness.versions(*packages),
    }
    hows = [how for how in THEIRS if how != "bfloat16" or has_bfloat16()]  # emulated, it takes ages
    work = Work(args.what, args.model, fields, size, batch_size)
    return work, facts, hows if with_timm else []


def has_bfloat16() -> bool:
    """Does this CPU compute in bfloat16? As Linux lists its instructions."""
    flags = pathlib.Path("/proc/cpuinfo").read_text().split()
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def summarize(task: str, rates: harness.Rates, flops: int, peak: float) -> dict[str, Any]:
    """`flops` are those of an image, `peak` those of a second."""
    medians = {name: harness.median(values) for name, values in rates.items()}
    return {
        **{
            f"{task}{tuned}_vs_{how}": harness.median(
                harness.ratios(rates, ours, [theirs]) if theirs in rates else []
            )
            for tuned, ours in OURS[task].items()
            for how, theirs in THEIRS.items()
        },
        "images_per_second": medians,
        "share_of_peak": {name: round(rate * flops / peak, 3) for name, rate in medians.items()},
        "gflops_peak": round(peak / 1e9, 1),
        "rounds": {name: [round(rate, 3) for rate in values] for name, values in rates.items()},
    }


def count_macs(model: Model, image_size: int) -> int:
    """Multiply-adds of the products for one image, all tokens of the last block included."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    watched = functools.partial(model.apply, mutable=["intermediates"])
    return contractions.count_macs(watched, variables, images)


# -------------------------------------------------------------------------------------- the sides


def make_batch(work: Work) -> tuple[np.ndarray, np.ndarray]:
    """Normalized images [B, H, W, 3] and soft targets [B, CLASSES]."""
    generator = np.random.default_rng(0)
    shape = (work.batch_size, work.image_size, work.image_size, 3)
    labels = generator.integers(0, CLASSES, work.batch_size)
    targets = 0.9 * np.eye(CLASSES, dtype=np.float32)[labels] + 0.1 / CLASSES
    return generator.uniform(-1, 1, shape).astype(np.float32), targets.astype(np.float32)


def _our_passes(work: Work, tuned: bool, cores: int) -> dict[str, harness.Pass]:
    del cores  # XLA has a thread for each that the process has
    jax.config.update("jax_platforms", "cpu")
    if tuned:
        host.keep_memory()
    fields = work.fields | {"remat": "none" if tuned else "block"}
    model = create_model(work.model, num_classes=CLASSES, drop_path=DROP_PATH, **fields)
    images, targets = map(jnp.asarray, make_batch(work))
    params = merged(jax.jit(model.init)(jax.random.key(0), images))
    predict = jax.jit(lambda params, images: model.apply(split(params), images))
    schedule = optax.constant_schedule(LEARNING_RATE)
    tx = make_optimizer(schedule, clip_norm=0.0, **ADAMW)
    prepare = lambda batch, mix_key, erase_key: (batch["image"], batch["target"])
    step = steps.make_train_step(model, tx, schedule, prepare, ema_decay=EMA_DECAY)
    step = jax.jit(step, donate_argnums=0)
    state = TrainState.create(params, tx) if work.task == "step" else None

    def forward_pass():
        for _ in range(BATCHES["forward"]):
            predict(params, images).block_until_ready()
        return BATCHES["forward"] * work.batch_size

    def step_pass():
        nonlocal state
        for _ in range(BATCHES["step"]):
            state, _ = step(state, {"image": images, "target": targets}, jax.random.key(1))
        jax.block_until_ready(state)
        return BATCHES["step"] * work.batch_size

    square = jnp.ones((PRODUCT, PRODUCT))
    multiply = jax.jit(jnp.matmul)

    def product_pass():
        multiply(square, square).block_until_ready()
        return 2 * PRODUCT**3

    return {"forward": forward_pass, "step": step_pass, "peak": product_pass}


def timm_network(work: Work, how: str, cores: int):
    """timm's network, the function that computes it in the way `how`, and the context for that."""
    import timm
    import torch

    torch.set_num_threads(cores)
    if work.model not in timm.list_models("tnt*"):
        raise InputError(f"--model={work.model}: timm has {timm.list_models('tnt*')}")
    network = timm.create_model(
        work.model, img_size=work.image_size, drop_path_rate=DROP_PATH, **work.fields
    )
    network.train(work.task == "step")
    precision = torch.autocast("cpu", torch.bfloat16, enabled=how == "bfloat16")
    return network, torch.compile(network) if how == "compile" else network, precision


def _timm_passes(work: Work, how: str, cores: int) -> dict[str, harness.Pass]:
    import timm.loss
    import timm.optim
    import timm.utils
    import torch

    network, call, precision = timm_network(work, how, cores)
    images, targets = map(torch.from_numpy, make_batch(work))
    images = images.permute(0, 3, 1, 2).contiguous()
    criterion = timm.loss.SoftTargetCrossEntropy()
    weight_decay = ADAMW["weight_decay"]
    optimizer = timm.optim.create_optimizer_v2(
        network, "adamw", lr=LEARNING_RATE, weight_decay=weight_decay
    )
    average = timm.utils.ModelEmaV3(network, EMA_DECAY)

    def forward_pass():
        with torch.inference_mode(), precision:
            for _ in range(BATCHES["forward"]):
                call(images)
        return BATCHES["forward"] * work.batch_size

    def step_pass():
        for _ in range(BATCHES["step"]):
            with precision:
                loss = criterion(call(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(network)
        return BATCHES["step"] * work.batch_size

    return {"forward": forward_pass, "step": step_pass}
