# SPDX-License-Identifier: Apache-2.0
"""How long training takes to begin: from `python main.py` to the end of its first step.

    python -m benchmarks start --config=configs/tnt_s.py
    python -m benchmarks start --config=configs/digits.py --batch-size=32

Run it where main.py is. A round starts it twice, with a new workdir each time: `cold` with an empty
compilation cache, `warm` with what the first start left there. Each is ended after its first step.

    seconds     from the start of the process until it has printed the metrics of step 1
    compile_s   of these, in XLA's compiler, or in reading from the cache what it made before
    trace_s     of these, in Python: tracing functions, and lowering them to what XLA compiles
    cpu_s       what it computed in that time, by its own account: less than `seconds` if it had to
                share its cores, more if it had several
    programs    how many were compiled or read
    peak_gib    the most memory that the process held

If the config names no folder of images, photographs are generated. Any key can be changed:
`--set model.dtype=float32 model.remat=block`.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import harness, synthetic_run
from tnt_flax.core.errors import InputError, RunError

MARK = "watched: "  # begins a line of the started process that is for this one
# Of jax.monitoring.
COMPILE = "/jax/core/compile/backend_compile_duration"
TRACE = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
)
WATCHED = "from benchmarks.start import run_watched; run_watched()"
SLOWEST = 5  # programs that are listed

add_arguments = synthetic_run.add_arguments


def measure_start(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all rounds; returns what the JSON line says.

    Raises:
        InputError: no main.py here, too few cores, less than one round or image, or what main.py
            says.
        RunError: the run failed before its first step.
    """
    harness.check_counts(args, "rounds", "cores", "batch_size")
    if not pathlib.Path("main.py").is_file():
        raise InputError("there is no main.py here: run this in a checkout of tnt_flax")
    facts = {
        "config": args.config,
        "batch_size": args.batch_size,
        "cores": harness.pick_cores(args.cores),
        "versions": harness.versions("jax", "jaxlib", "flax"),
    }
    harness.print_facts(facts)
    found = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        changes = {"log.every": "1 steps"} | synthetic_run.settings(
            args, folder / "images", steps=2
        )
        flags = [f"--config={args.config}", *(f"--config.{k}={v}" for k, v in changes.items())]
        for i in range(args.rounds):
            for kind, starts in found.items():
                workdir, cache = folder / f"{kind}{i}", folder / f"cache{i}"
                starts.append(start([*flags, f"--workdir={workdir}"], cache, facts["cores"]))
                line = ", ".join(f"{name} {starts[-1][name]}" for name in medians(starts))
                print(f"round {i + 1}: {kind}: {line}", file=sys.stderr)
    return {
        **{kind: medians(starts) for kind, starts in found.items()},
        "slowest": found["cold"][-1]["slowest"],
        "rounds": {
            kind: [[start["seconds"], start["compile_s"]] for start in starts]
            for kind, starts in found.items()
        },
        **facts,
    }


def medians(starts: list[dict[str, Any]]) -> dict[str, float]:
    names = [name for name in starts[0] if name != "slowest"]
    return {name: round(statistics.median(s[name] for s in starts), 3) for name in names}


def start(flags: list[str], cache: pathlib.Path, cores: list[int]) -> dict[str, Any]:
    """Starts main.py with `flags`, waits for its first step, ends it; returns what it cost."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    began = time.perf_counter()
    with harness.pinned(cores):
        process = subprocess.Popen(
            [sys.executable, "-c", WATCHED, *flags],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    events, said = [], ""
    with process:
        try:
            for line in process.stderr:
                if line.startswith(MARK):
                    events.append(json.loads(line.removeprefix(MARK)))
                elif line.startswith("step 1/"):
                    return summarize(time.perf_counter() - began, process.pid, events)
                else:
                    said = line.strip() or said
        finally:
            process.kill()
    if process.returncode == 2:
        raise InputError(said.removeprefix("error: "))
    raise RunError(f"main.py ended before its first step: {said}")


def summarize(seconds: float, pid: int, events: list[dict[str, Any]]) -> dict[str, Any]:
    process = pathlib.Path(f"/proc/{pid}")
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())[1])
    ticks = (process / "stat").read_text().rpartition(")")[2].split()[11:13]  # user, system
    compiled = [event for event in events if event["event"] == COMPILE]
    slowest = sorted(compiled, key=lambda event: -event["seconds"])[:SLOWEST]
    return {
        "seconds": round(seconds, 3),
        "compile_s": round(covered(compiled), 3),
        "trace_s": round(covered(event for event in events if event["event"] in TRACE), 3),
        "cpu_s": sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
        "programs": len(compiled),
        "peak_gib": round(peak / 2**20, 3),
        "slowest": {event["name"]: round(event["seconds"], 3) for event in slowest},
    }


def covered(events) -> float:
    """Seconds in at least one of the events: of a function that calls another both are traced."""
    total, until = 0.0, 0.0
    for event in sorted(events, key=lambda event: event["end"] - event["seconds"]):
        begin = max(until, event["end"] - event["seconds"])
        total += max(0.0, event["end"] - begin)
        until = max(until, event["end"])
    return total


def run_watched() -> None:
    """Runs main.py in this process, which says on stderr whenever JAX has made a program."""
    from jax import monitoring

    def watch(event, seconds, **about):
        if event == COMPILE or event in TRACE:
            said = dict(event=event, seconds=seconds, end=time.time(), name=about.get("fun_name"))
            with contextlib.suppress(BrokenPipeError):
                print(f"{MARK}{json.dumps(said)}", file=sys.stderr, flush=True)

    monitoring.register_event_duration_secs_listener(watch)
    sys.argv[0] = "main.py"
    runpy.run_path("main.py", run_name="__main__")
