# SPDX-License-Identifier: Apache-2.0
"""Sides of a comparison in turns: each in a process of its own, all pinned to the same cores.

A side is a function `make_passes(cores) -> {task: pass}` that can be pickled; it is called in its
process, with the number of cores there. A pass works off its task once.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tnt_flax.core.errors import InputError, RunError, one_line

# Returns how much it did, such as the number of images; with the seconds that this took, where not
# all of its time counts.
Pass = Callable[[], int | tuple[int, float]]
Side = Callable[[int], dict[str, Pass]]
Run = Callable[[str], float]  # runs one pass of a task; returns how much it did per second
Rates = dict[str, list[float]]  # of every side, in every round


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Raises InputError if one of these arguments is less than 1."""
    for name in names:
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')}={getattr(args, name)} is less than 1")


def pick_cores(count: int) -> list[int]:
    """The last `count` of the cores that this process may use."""
    if not hasattr(os, "sched_setaffinity"):
        raise InputError("this system cannot pin a process to cores: run the benchmark on Linux")
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        raise InputError(f"--cores={count}: this process may use {len(cores)}")
    return cores[-count:]


def has_timm() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "timm"))


def say_who_takes_part() -> None:
    """To stderr, where timm could have taken part and is not installed."""
    if not has_timm():
        print("torch or timm is not installed: our figures alone", file=sys.stderr)


def versions(*packages: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}


def print_facts(facts: Mapping[str, Any]) -> None:
    """To stderr."""
    for name, fact in facts.items():
        print(f"{name:<11} {fact}", file=sys.stderr)


@contextlib.contextmanager
def processes(sides: Mapping[str, Side], cores: Sequence[int]) -> Iterator[dict[str, Run]]:
    """One for every side; yields what runs a pass in each.

    Raises:
        InputError: as a side raised it, when run.
        RunError: a side failed otherwise.
    """
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(_process(side, cores)) for name, side in sides.items()}


@contextlib.contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
    """What is started inside runs on these cores alone, and finds no others."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@contextlib.contextmanager
def _process(make_passes, cores):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, make_passes, len(cores)))
    with pinned(cores):
        process.start()
    theirs.close()

    def run(task):
        try:
            ours.send(task)
            answer = ours.recv()
        except (EOFError, OSError):
            raise RunError("a measured process ended too early") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    try:
        yield run
    finally:
        ours.close()
        process.join()


def _serve(connection, make_passes, cores):
    passes = None
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):  # the other end closed
        while True:
            task = connection.recv()
            try:
                passes = passes or make_passes(cores)
                start = time.perf_counter()
                done = passes[task]()
                whole = time.perf_counter() - start
                amount, seconds = done if isinstance(done, tuple) else (done, whole)
                connection.send(amount / seconds)
            except InputError as error:
                connection.send(InputError(str(error)))
            except Exception as error:
                connection.send(RunError(one_line(error)))


def measure(runs: Mapping[str, Run], task: str, rounds: int) -> Rates:
    """Images per second of every side in every round, after one round that does not count."""
    rates = {name: [] for name in runs}
    for i in range(-1, rounds):
        for name in list(runs) if i % 2 else reversed(runs):  # who comes first changes
            rate = runs[name](task)
            if i >= 0:
                rates[name].append(rate)
        if i >= 0:
            line = ", ".join(f"{name} {values[-1]:.2f}" for name, values in rates.items())
            print(f"{task} round {i + 1}: images/s: {line}", file=sys.stderr)
    return rates


def ratios(rates: Rates, side: str, others: Sequence[str]) -> list[float]:
    """`side` to the fastest of the others, in every round; empty if there are none."""
    best = [max(values) for values in zip(*(rates[name] for name in others), strict=True)]
    return [round(rate / other, 3) for rate, other in zip(rates[side], best, strict=bool(best))]


def median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 3) if values else None
