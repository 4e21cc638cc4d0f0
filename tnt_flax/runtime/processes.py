# SPDX-License-Identifier: Apache-2.0
"""Many processes as one run: how they find each other, and talk outside of the devices.

JAX's own runtime does the work. Its coordinator, in process 0, is the only service that is opened
here; in runs on one host it listens on the loopback interface alone.
"""

import contextlib
import functools
import itertools
import json
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from tnt_flax.core.errors import InputError, RunError, listed, one_line

HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead
PATIENCE = 60  # seconds that an answer of a process that runs may take
SHUTDOWN = 30  # seconds that a process which has ended waits for the others

_questions = itertools.count()  # a key of the store can be set once


class Job(NamedTuple):
    """The processes of a run, and which of them this one is."""

    coordinator: str  # HOST:PORT of process 0
    processes: int
    process: int
    local_devices: list[int] | None = None  # None: all


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
    meeting: pathlib.Path | None = None,
) -> None:
    """Joins the other processes, as the arguments say or else a launcher that JAX knows.

    Does nothing where neither speaks of more than one process. Call it before JAX has looked for
    its devices. `meeting` is a folder that all hosts see: there, who waits in vain finds out for
    whom; after `timeout` seconds the process ends, with exit code 1.

    Raises:
        InputError: the arguments are incomplete or contradict each other.
        RunError: JAX could not start its runtime.
    """
    job = _explicit(coordinator, num_processes, process_id) or _launched(timeout)
    if job is None or job.processes == 1:
        return
    host, _, port = job.coordinator.rpartition(":")
    bind = None
    if on_one_host(host):
        host = "127.0.0.1"
        bind = f"{host}:{port}"
    print(
        f"process {job.process} of {job.processes} waits for the others at {host}:{port}, "
        f"at most {timeout} s",
        file=sys.stderr,
    )
    with _ends_after(timeout, job, meeting):
        try:
            jax.distributed.initialize(
                f"{host}:{port}",
                job.processes,
                job.process,
                local_device_ids=job.local_devices,
                cluster_detection_method="deactivate",
                # It would end the process without a word on who is missing.
                initialization_timeout=timeout + 60,
                heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=SHUTDOWN,
                coordinator_bind_address=bind,
            )
        except Exception as error:
            raise RunError(f"cannot join the run at {host}:{port}: {one_line(error)}") from error
    hosts()


def _explicit(coordinator, num_processes, process_id) -> Job | None:
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is None]
    if num_processes == 1 and coordinator is None:  # whatever a launcher says
        return Job("", 1, 0)
    if len(missing) == len(given):
        return None
    if missing:
        raise InputError(f"a run of many processes also needs {' and '.join(missing)}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"--coordinator={coordinator} is not HOST:PORT, such as 10.0.0.1:8476")
    if not 0 <= process_id < num_processes:
        raise InputError(
            f"--process-id={process_id} is not one of 0 to {num_processes - 1}, the processes of "
            f"--num-processes={num_processes}"
        )
    return Job(coordinator, num_processes, process_id)


def _launched(timeout: int) -> Job | None:
    """What JAX finds out about this process: Cloud TPU, Slurm, Open MPI, Kubernetes."""
    try:
        from jax._src.clusters import ClusterEnv
    except ImportError:  # it is not public; what is, starts at once, or says that it found nothing
        with contextlib.suppress(ValueError):
            jax.distributed.initialize(initialization_timeout=timeout)
        return None
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, timeout
        )
    except Exception as error:
        raise RunError(
            f"the launcher of this process cannot be understood: {one_line(error)}; use "
            "--coordinator, --num-processes and --process-id"
        ) from error
    return None if None in found[:3] else Job(*found)


def on_one_host(host: str) -> bool:
    """Are all processes on this machine? `host` is where process 0 is."""
    env = os.environ
    return (
        host in ("localhost", "[::1]")
        or host.startswith("127.")
        or env.get("SLURM_STEP_NUM_NODES") == "1"
        or env.get("OMPI_COMM_WORLD_SIZE", "") == env.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    )


@contextlib.contextmanager
def _ends_after(timeout: int, job: Job, meeting: pathlib.Path | None) -> Iterator[None]:
    """Ends the process if what is inside takes too long: it waits in C++, deaf to exceptions."""
    sign = meeting and meeting / f".waiting.{job.process}"
    if sign:
        with contextlib.suppress(OSError):  # what is wrong with the folder is said later
            meeting.mkdir(parents=True, exist_ok=True)
            sign.write_text(socket.gethostname())

    def end():
        print(f"error: {_who_is_missing(timeout, job, meeting)}", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(timeout, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if sign:
            with contextlib.suppress(OSError):
                sign.unlink(missing_ok=True)


def _who_is_missing(timeout, job, meeting):
    message = f"not all {job.processes} processes met at {job.coordinator} within {timeout} s"
    missing = []
    for process in range(job.processes) if meeting else ():
        try:
            seen = (meeting / f".waiting.{process}").stat().st_mtime
        except OSError:
            seen = 0
        if process != job.process and time.time() - seen > timeout + 60:
            missing.append(str(process))
    if missing:
        return f"{message}: process {listed(missing)} did not start, or does not see {meeting}"
    return f"{message}: look whether all have started, and whether that address can be reached"


def client() -> Any | None:
    """The client of the coordinator's key-value store; None where there is none.

    JAX has no public way to it. Nothing else here touches what is not public after the start.
    """
    try:
        from jax._src.distributed import global_state
    except ImportError:
        return None
    return getattr(global_state, "client", None)


def is_main() -> bool:
    """Is this the process that writes what one process writes: logs, pictures, config.json?"""
    return jax.process_index() == 0


@functools.cache
def hosts() -> list[str]:
    """The host of every process."""
    return exchange("host", socket.gethostname(), PATIENCE)


def exchange(name: str, value: str, timeout: float) -> list[str]:
    """What every process says, in their order. All must ask the same things in the same order.

    Raises:
        RunError: naming those who did not answer within `timeout` seconds.
    """
    if jax.process_count() == 1:
        return [value]
    store = client()
    if store is None or not hasattr(store, "blocking_key_value_get"):
        return _gather(value)
    question = f"tnt_flax/{next(_questions)}/{name}"
    store.key_value_set(f"{question}/{jax.process_index()}", value)
    deadline, answers, silent = time.monotonic() + timeout, [], []
    for process in range(jax.process_count()):
        left = max(deadline - time.monotonic(), 0.01)
        try:
            answers.append(store.blocking_key_value_get(f"{question}/{process}", int(1000 * left)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise RunError(f"the run's coordinator failed: {one_line(error)}") from error
            silent.append(process)
    if silent:
        names = [str(process) if name == "host" else name_of(process) for process in silent]
        raise RunError(f"process {listed(names)} did not tell its {name} within {timeout:g} s")
    return answers


def _gather(value):
    """`exchange` by a collective, which waits as long as it takes."""
    encoded = np.frombuffer(value.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(encoded)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(encoded)] = encoded
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def name_of(process: int) -> str:
    """Such as "3 (tpu-host-3)"."""
    return f"{process} ({hosts()[process]})"


def total(count: int) -> int:
    """The sum of what all processes have counted; all must ask."""
    if jax.process_count() == 1:
        return count
    return int(multihost_utils.process_allgather(np.int32(count)).sum())


def on_main(what: str, function: Callable[[], Any], timeout: float = PATIENCE) -> Any:
    """Runs `function` in process 0; the others wait, and get None.

    Raises:
        InputError, RunError: on every process alike, what process 0 has raised.
    """
    result, error = None, None
    if is_main():
        try:
            result = function()
        except (InputError, RunError) as caught:
            error = caught
    said = json.dumps([type(error).__name__, str(error)] if error else None)
    kind_and_message = json.loads(exchange(what, said, timeout)[0])
    if error:
        raise error
    if kind_and_message:
        kind, message = kind_and_message
        raise (InputError if kind == "InputError" else RunError)(message)
    return result
