# SPDX-License-Identifier: Apache-2.0
"""Compares and times the implementations of TNT's transformers on this machine's first device.

    tnt-flax selftest
    tnt-flax selftest --model=tnt_b_patch16_224 --batch-size=256 --rounds=30

Each implementation of the inner and of the outer transformer that can run here is compared with
"reference": logits and gradients of a network of two blocks, in float32 and in bfloat16. Then the
forward pass and a training step (AdamW) are timed, one call of each implementation per round.
Weights and images are random; nothing is read or written.

Differences are relative L2 norms to the reference in float32, of the logits and of the worst
parameter's gradient. In bfloat16 the tolerance is three times the reference's own rounding error.

Progress goes to stderr. The last line on stdout is one JSON object. Exit code 1 means that a
comparison failed, 2 that the input was wrong.
"""

import argparse
import functools
import logging
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax

from tnt_flax.core.errors import InputError, one_line
from tnt_flax.models import create_model
from tnt_flax.runtime import sharding
from tnt_flax.tools.command_line import Parser, positive

logger = logging.getLogger(__name__)
IMPLEMENTATIONS = {  # fields of the network
    "reference": {"inner_impl": "reference", "outer_impl": "reference"},
    "inner=cpu": {"inner_impl": "cpu", "outer_impl": "reference"},
    "inner=gpu": {"inner_impl": "gpu", "outer_impl": "reference"},
    "inner=mosaic": {"inner_impl": "mosaic", "outer_impl": "reference"},
    "inner=lanes": {"inner_impl": "lanes", "outer_impl": "reference"},
    "inner=pallas": {"inner_impl": "pallas", "outer_impl": "reference"},
    "outer=cpu": {"inner_impl": "reference", "outer_impl": "cpu"},
    "outer=gpu": {"inner_impl": "reference", "outer_impl": "gpu"},
    "outer=pallas": {"inner_impl": "reference", "outer_impl": "pallas"},
}
DTYPES = ("float32", "bfloat16")
COMPARED = {"depth": 2, "batch_size": 4}
TOLERANCES = {"logits": 1e-4, "gradients": 1e-3}  # in float32
ROUNDING = 3.0  # in bfloat16: tolerance relative to the reference's own difference
CPU_DEPTH, CPU_BATCH, BATCH = 2, 4, 128  # defaults of what is timed


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--model", default="tnt_s_patch16_224", help="one of tnt_flax.list_models()")
    add("--batch-size", type=positive, metavar="N", help=f"{CPU_BATCH} on CPUs, else {BATCH}")
    add("--image-size", type=positive, metavar="N", help="pixels; default: that of the model")
    add("--depth", type=positive, metavar="N", help=f"{CPU_DEPTH} on CPUs, else the model's")
    add("--dtype", choices=DTYPES, help="of what is timed: float32 on CPUs, else bfloat16")
    add("--rounds", type=positive, default=10, metavar="N", help="timed calls of each")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the comparisons and the timings; returns the JSON object of the last line.

    Raises:
        InputError: an unknown model, or an image size that the patches do not divide.
    """
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    depth = create_model(args.model).depth  # refuses an unknown model
    size = args.image_size or int(args.model.rpartition("_")[2])
    timed = {
        "batch_size": args.batch_size or (CPU_BATCH if on_cpu else BATCH),
        "dtype": args.dtype or ("float32" if on_cpu else "bfloat16"),
        "depth": args.depth or (CPU_DEPTH if on_cpu else depth),
    }
    logger.info(f"{args.model} on {device.device_kind}, jax {jax.__version__}")
    with jax.set_mesh(sharding.make_mesh([device])):
        tolerances, results, unavailable = compare(args.model, size)
        timings = measure(list(results), args.model, size, timed, args.rounds)
    for name, found in results.items():
        found.update(timings[name])
    return {
        "passed": all(found["passed"] for found in results.values()),
        "device": device.device_kind,
        "platform": device.platform,
        "model": args.model,
        "image_size": size,
        "compared": COMPARED,
        "timed": timed,
        "tolerances": tolerances,
        "implementations": results,
        "unavailable": unavailable,
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "backend": device.client.platform_version,  # that of libtpu or CUDA
        },
    }


def failed(result: dict[str, Any]) -> bool:
    return not result["passed"]


def random_inputs(model: Any, batch_size: int, size: int) -> tuple[Any, jax.Array, jax.Array]:
    """Returns variables in which no parameter is zero, images [B, S, S, 3] and labels [B]."""
    generator = np.random.default_rng(0)
    images = generator.standard_normal((batch_size, size, size, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)

    def random_leaf(path, x):
        values = 0.05 * generator.standard_normal(x.shape, np.float32)
        return values + 1 if path[-1].key in ("scale", "var") else values

    variables = jax.tree.map_with_path(random_leaf, shapes)
    return jax.device_put((variables, images, np.arange(batch_size) % model.num_classes))


def loss_and_logits(model, variables, images, labels) -> tuple[jax.Array, jax.Array]:
    """Returns the mean cross-entropy and the logits of inference, without dropout."""
    logits = model.apply(variables, images).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), logits


# ------------------------------------------------------------------------------------ comparisons


def compare(model_name: str, size: int) -> tuple[dict, dict[str, dict], dict[str, str]]:
    """Compares each implementation with the reference in float32.

    Returns:
        The tolerances by dtype; for each implementation the differences by dtype and "passed"; and
        for each that cannot run here, or not in one of the dtypes, the reason.
    """

    def make(name, dtype):
        fields = IMPLEMENTATIONS[name] | {"depth": COMPARED["depth"]}
        return create_model(model_name, dtype=dtype, **fields)

    inputs = random_inputs(make("reference", "float32"), COMPARED["batch_size"], size)
    expected = logits_and_gradients(make("reference", "float32"), inputs)
    rounding = difference(logits_and_gradients(make("reference", "bfloat16"), inputs), expected)
    tolerances = {
        "float32": TOLERANCES,
        "bfloat16": {key: float(f"{ROUNDING * x:.3g}") for key, x in rounding.items()},
    }
    results, unavailable = {"reference": {"bfloat16": rounding, "passed": True}}, {}
    for name in IMPLEMENTATIONS:
        if "pallas" in name and jax.default_backend() != "tpu":
            unavailable[name] = "for TPUs only"
        if name == "reference" or name in unavailable:
            continue
        found = {"passed": True}
        for dtype in DTYPES:
            try:
                found[dtype] = difference(logits_and_gradients(make(name, dtype), inputs), expected)
                # Not the negation of ">": a NaN fails.
                good = all(x <= tolerances[dtype][key] for key, x in found[dtype].items())
            except InputError as error:  # such as a dtype that the implementation does not support
                unavailable[name] = str(error)
                continue
            except Exception as error:  # whatever a kernel raises on a device it has not run on
                found[dtype], good = {"error": one_line(error)}, False
            found["passed"] &= good
            logger.info(f"{name} {dtype}: {found[dtype]}{'' if good else ' FAILED'}")
        if len(found) > 1:
            results[name] = found
    return tolerances, results, unavailable


def logits_and_gradients(model: Any, inputs: tuple) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns float32 logits [B, classes] and the gradient of every parameter."""
    gradient = jax.value_and_grad(lambda *args: loss_and_logits(model, *args), has_aux=True)
    with jax.default_matmul_precision("highest"):
        (_, logits), gradients = jax.device_get(jax.jit(gradient)(*inputs))
    return logits, [np.asarray(x, np.float32) for x in jax.tree.leaves(gradients)]


def difference(found: tuple, expected: tuple) -> dict[str, float]:
    """Relative L2 norms of the difference: of the logits, and of the worst gradient."""

    def relative(a, b):
        return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))

    gradients = [relative(a, b) for a, b in zip(found[1], expected[1], strict=True)]
    values = {"logits": relative(found[0], expected[0]), "gradients": float(np.max(gradients))}
    return {key: float(f"{value:.3g}") for key, value in values.items()}


# ---------------------------------------------------------------------------------------- timings


def measure(
    names: list[str], model_name: str, size: int, timed: dict[str, Any], rounds: int
) -> dict[str, dict[str, Any]]:
    """Times forward pass and training step in interleaved rounds.

    Returns:
        For each implementation the median milliseconds and the ratio of its time to the
        reference's, or an error.
    """
    results = {name: {} for name in names}
    for task, make in {"forward": make_forward, "step": make_step}.items():
        calls = {}
        for name in names:
            fields = IMPLEMENTATIONS[name] | {"depth": timed["depth"], "dtype": timed["dtype"]}
            try:
                call = make(create_model(model_name, **fields), timed["batch_size"], size)
                call()  # warm-up
                calls[name] = call
            except Exception as error:  # such as too little memory: the others can still be timed
                results[name][f"{task}_error"] = one_line(error)
        medians = time_rounds(calls, rounds)
        for name, seconds in medians.items():
            results[name][f"{task}_ms"] = float(f"{1e3 * seconds:.4g}")
            if "reference" in medians:
                results[name][f"{task}_ratio"] = round(seconds / medians["reference"], 3)
            logger.info(f"{name} {task}: {1e3 * seconds:.4g} ms, median of {rounds} rounds")
    return results


def time_rounds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Returns the median seconds of each call; every round has one call of each."""
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def make_forward(model: Any, batch_size: int, size: int) -> Callable[[], Any]:
    """Returns a call of the forward pass, which waits for the result."""
    variables, images, _ = random_inputs(model, batch_size, size)
    forward = jax.jit(model.apply)
    return lambda: jax.block_until_ready(forward(variables, images))


def make_step(model: Any, batch_size: int, size: int) -> Callable[[], Any]:
    """Returns a call of the training step, which waits for the loss."""
    (variables, images, labels), tx = random_inputs(model, batch_size, size), optax.adamw(1e-4)
    # Like the step's results, these have the ambient mesh in their type: otherwise the second call
    # would compile again.
    state = list(jax.jit(lambda variables: (variables, tx.init(variables)))(variables))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(variables, moments, images, labels):
        def loss(variables):
            rngs = {"dropout": jax.random.key(0)}
            logits = model.apply(variables, images, train=True, rngs=rngs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradients = jax.value_and_grad(loss)(variables)
        updates, moments = tx.update(gradients, moments, variables)
        return optax.apply_updates(variables, updates), moments, value

    def call():
        state[0], state[1], value = step(*state, images, labels)
        jax.block_until_ready(value)

    return call
