# SPDX-License-Identifier: Apache-2.0
"""Starts main.py, or a script like it, as several processes of one run on this machine."""

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import IO


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(
    root: pathlib.Path,
    workdir: pathlib.Path,
    flags: Sequence[str],
    count: int,
    devices: int,
    program: str = "main.py",
    env: dict[str, str] | None = None,
    logs: Sequence[IO] = (),
) -> list[subprocess.Popen]:
    """Starts `count` processes with `devices` virtual devices each and returns them.

    `logs` are files for the stderr of each process; by default it is a pipe.
    """
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)} | (env or {})
    on_cpu = environment.get("JAX_PLATFORMS", "cpu") == "cpu"
    if on_cpu:
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    command = [sys.executable, program, "--config=configs/digits.py", f"--workdir={workdir}"]
    port = free_port()
    started = []
    for process in range(count):
        own = [*flags]
        if count > 1 and not on_cpu:
            environment["CUDA_VISIBLE_DEVICES"] = str(process)
        if count > 1:
            own += [f"--coordinator=localhost:{port}", f"--num-processes={count}"]
            own += [f"--process-id={process}"]
        stderr = logs[process] if logs else subprocess.PIPE
        pipes = dict(stdout=subprocess.PIPE, stderr=stderr, text=True)
        started.append(subprocess.Popen([*command, *own], cwd=root, env=environment, **pipes))
    return started


def finish(started: Sequence[subprocess.Popen], timeout: float = 900) -> list[tuple[int, str, str]]:
    """Returns (exit code, stdout, stderr) of each process; after `timeout` seconds kills all."""
    results = []
    try:
        for process in started:
            out, err = process.communicate(timeout=timeout)
            results.append((process.returncode, out, err))
    finally:
        for process in started:
            process.kill()
    return results
