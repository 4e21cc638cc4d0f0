# SPDX-License-Identifier: Apache-2.0
"""Starts main.py, or a script like it, as several processes of one run on this machine."""

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence


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
) -> list[subprocess.Popen]:
    """Starts `count` processes with `devices` virtual devices each and returns them.

    An element of `flags` may be a sequence of `count` strings, one for each process.
    """
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        **(env or {}),
    }
    command = [sys.executable, program, "--config=configs/digits.py", f"--workdir={workdir}"]
    port = free_port()
    started = []
    for process in range(count):
        own = [flag if isinstance(flag, str) else flag[process] for flag in flags]
        if count > 1:
            own += [f"--coordinator=localhost:{port}", f"--num-processes={count}"]
            own += [f"--process-id={process}"]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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
