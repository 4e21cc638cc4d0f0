# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: pinned processes, alternating rounds, ratios, synthetic photographs.

A contender is a picklable function `make_passes(cores) -> {task: pass}`. It is called once, in a
process of its own, with the number of cores available there. A pass executes its task once.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import multiprocessing
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from PIL import Image

from tnt_flax.core.errors import InputError, RunError, one_line
from tnt_flax.tools.command_line import positive, read_config

# Returns the amount of work done, such as a number of images, optionally with the seconds it took
# where not all of the elapsed time counts.
Pass = Callable[[], int | tuple[int, float]]
Contender = Callable[[int], dict[str, Pass]]
Run = Callable[[str], float]  # executes one pass of a task, returns the amount per second
Rates = dict[str, list[float]]  # per contender and round

# Synthetic photographs: ImageNet's most frequent sizes; about its mean file size of 110 kB.
PHOTO_SIZES, PHOTO_QUALITY = ((500, 375), (500, 333), (375, 500)), 97


# --------------------------------------------------------------------------------- arguments, facts


def add_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Adds the arguments of every benchmark, `rounds` by default."""
    parser.add_argument("--rounds", type=positive, default=rounds, help="timed rounds")
    parser.add_argument("--cores", type=positive, default=1, help="cores to pin each process to")


def pick_cores(count: int) -> list[int]:
    """Returns the last `count` of the cores that this process may use."""
    if not hasattr(os, "sched_setaffinity"):
        raise InputError("this system cannot pin a process to cores: run the benchmark on Linux")
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        raise InputError(f"--cores={count}: this process may use {len(cores)}")
    return cores[-count:]


def has_timm() -> bool:
    """Whether timm can be a contender; warns on stderr if torch or timm is not installed."""
    found = all(importlib.util.find_spec(name) for name in ("torch", "timm"))
    if not found:
        print("torch or timm is not installed: measuring tnt_flax alone", file=sys.stderr)
    return found


def versions(*packages: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}


def print_facts(facts: Mapping[str, Any]) -> None:
    """Prints a table to stderr."""
    for name, fact in facts.items():
        print(f"{name:<11} {fact}", file=sys.stderr)


# --------------------------------------------------------------------------------------- processes


@contextlib.contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
    """Pins processes started inside to `cores`."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@contextlib.contextmanager
def processes(
    contenders: Mapping[str, Contender], cores: Sequence[int]
) -> Iterator[dict[str, Run]]:
    """Yields a function per contender that runs a pass in a pinned process of the contender's own.

    Raises:
        InputError: raised by a contender, from the yielded function.
        RunError: a contender failed otherwise.
    """
    with contextlib.ExitStack() as stack:
        runs = {}
        for name, make_passes in contenders.items():
            context = multiprocessing.get_context("spawn")
            executor = stack.enter_context(ProcessPoolExecutor(1, context))
            runs[name] = functools.partial(_run, executor, make_passes, cores)
        yield runs


def _run(executor, make_passes, cores, task):
    try:
        with pinned(cores):  # the first call starts the process
            future = executor.submit(_run_here, make_passes, len(cores), task)
        return future.result()
    except BrokenProcessPool:
        raise RunError("a measured process ended too early") from None


_passes: dict[str, Pass] = {}  # of the contender that runs in this process


def _run_here(make_passes, cores, task):
    try:
        if not _passes:
            _passes.update(make_passes(cores))
        start = time.perf_counter()
        done = _passes[task]()
        elapsed = time.perf_counter() - start
    except InputError as error:
        raise InputError(str(error)) from None
    except Exception as error:
        raise RunError(one_line(error)) from None
    amount, seconds = done if isinstance(done, tuple) else (done, elapsed)
    return amount / seconds


# ------------------------------------------------------------------------------------------ rounds


def alternate(
    functions: Mapping[str, Callable[[], Any]], rounds: int, label: str
) -> dict[str, list[Any]]:
    """Calls each function once per round and returns the results by name, in order.

    One round that compiles comes first and does not count. The order of the functions is reversed
    from round to round.
    """
    results = {name: [] for name in functions}
    for i in range(-1, rounds):
        for name in list(functions)[:: 1 if i % 2 else -1]:
            result = functions[name]()
            if i >= 0:
                results[name].append(result)
        if i >= 0:
            line = ", ".join(f"{name} {np.median(all[-1]):.2f}" for name, all in results.items())
            print(f"{label}, round {i + 1}: {line}", file=sys.stderr)
    return results


def measure(runs: Mapping[str, Run], task: str, rounds: int) -> Rates:
    """Returns the images per second of each contender in each round of `task`."""
    functions = {name: functools.partial(run, task) for name, run in runs.items()}
    return alternate(functions, rounds, f"{task}, images/s")


def ratios(rates: Rates, contender: str, others: Sequence[str]) -> list[float]:
    """Rates of `contender` relative to the fastest of `others`, per round; empty without others."""
    best = [max(values) for values in zip(*(rates[name] for name in others), strict=True)]
    return [
        round(rate / other, 3) for rate, other in zip(rates[contender], best, strict=bool(best))
    ]


def median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 3) if values else None


# ------------------------------------------------------------------------------- synthetic training


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of benchmarks that start a training run."""
    add_arguments(parser, rounds=3)
    add = parser.add_argument
    add("--config", default="configs/tnt_s.py", help="config of the run")
    add("--batch-size", type=positive, default=16, help="images per step")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="config keys to change")


def synthetic_overrides(args: argparse.Namespace, folder: pathlib.Path, steps: int) -> list[str]:
    """Returns config overrides for a short run: ["--config.batch_size=16", ...].

    If the config reads an image folder but names none, photographs for `steps` steps are written
    below `folder`.

    Raises:
        InputError: the config cannot be read, or an item of `args.set` is not a valid KEY=VALUE.
    """
    batch = args.batch_size
    settings = [f"batch_size={batch}", f"eval.batch_size={batch}", *args.set]
    overrides = [f"--config.{setting}" for setting in settings]
    data = read_config(args.config, overrides).data
    if data.source == "folder" and not data.root:
        for split, count in (("train", steps * batch), ("val", batch)):
            generate_photos(folder / split / "photographs", count)
        overrides.append(f"--config.data.root={folder}")
    return overrides


def generate_photos(folder: pathlib.Path, count: int) -> None:
    """Writes `count` JPEG crops of the two photographs of scikit-learn (640 x 427)."""
    import sklearn.datasets

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in sklearn.datasets.load_sample_images().images]
    for i in range(count):
        photo, (width, height) = photos[i % len(photos)], PHOTO_SIZES[i % len(PHOTO_SIZES)]
        scale = max(1.0, height / photo.height)
        photo = photo.resize((round(photo.width * scale), round(photo.height * scale)))
        left = int(generator.integers(photo.width - width, endpoint=True))
        top = int(generator.integers(photo.height - height, endpoint=True))
        crop = photo.crop((left, top, left + width, top + height))
        crop.save(folder / f"{i:07d}.jpg", quality=PHOTO_QUALITY)
