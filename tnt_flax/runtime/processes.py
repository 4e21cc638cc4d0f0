# SPDX-License-Identifier: Apache-2.0
"""Runs of several processes: start-up, host-side communication, consistency checks.

Built on JAX's distributed runtime. Its coordinator, in process 0, is the only service that listens
on a port; in single-host runs it listens on the loopback interface only.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from tnt_flax.core.errors import FAILED, InputError, RunError, listed, one_line
from tnt_flax.core.files import write_atomic
from tnt_flax.core.trees import diff_nested

HEARTBEAT_TIMEOUT = 30  # seconds without a heartbeat after which a process counts as dead
RPC_TIMEOUT = 60  # seconds to wait for a value from another process
SHUTDOWN_TIMEOUT = 30  # seconds that a finished process waits for the others

logger = logging.getLogger("tnt_flax")
_counter = itertools.count()  # makes keys unique: the coordinator's store accepts a key only once

# ------------------------------------------------------------------------------- start and end


class Job(NamedTuple):
    """The processes of a run, and the place of this process among them."""

    coordinator: str  # HOST:PORT of process 0
    num_processes: int
    process_id: int
    local_devices: list[int] | None = None  # None: all devices of the host


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
    rendezvous_dir: pathlib.Path | None = None,
) -> None:
    """Initializes `jax.distributed` from the arguments or from a launcher that JAX recognizes.

    Does nothing for a single process. Must be called before JAX initializes its devices. If the
    other processes do not connect in time, the process logs an error and exits with code 1.

    Args:
        coordinator: HOST:PORT of process 0.
        num_processes: number of processes of the run.
        process_id: index of this process, from 0.
        timeout: seconds to wait for the other processes.
        rendezvous_dir: a folder shared by all hosts, for an error message that lists the missing
            processes.

    Raises:
        InputError: the arguments are incomplete or inconsistent.
        RunError: JAX could not start its runtime.
    """
    job = _job_from_flags(coordinator, num_processes, process_id) or _job_from_launcher(timeout)
    if job is None or job.num_processes == 1:
        return
    host, _, port = job.coordinator.rpartition(":")
    bind_address = None
    if is_single_host(host):
        host = "127.0.0.1"
        bind_address = f"{host}:{port}"
    logger.info(
        f"process {job.process_id} of {job.num_processes}: waiting up to {timeout} s for the other "
        f"processes at {host}:{port}"
    )
    with _exit_on_timeout(timeout, job, rendezvous_dir):
        try:
            jax.distributed.initialize(
                f"{host}:{port}",
                job.num_processes,
                job.process_id,
                local_device_ids=job.local_devices,
                cluster_detection_method="deactivate",
                # JAX's own timeout aborts the process without listing the missing processes.
                initialization_timeout=timeout + 60,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
                shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
                coordinator_bind_address=bind_address,
            )
        except Exception as error:
            raise RunError(f"cannot join the run at {host}:{port}: {one_line(error)}") from error
    hosts()


def exit_now(code: int) -> NoReturn:
    """Exits without running exit handlers, which could wait for other processes forever."""
    for child in multiprocessing.active_children():
        child.kill()
    for handler in logger.handlers:
        handler.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_single_host(coordinator_host: str) -> bool:
    """True if all processes run on this machine, judging by the coordinator and the launcher."""
    env = os.environ
    return (
        coordinator_host in ("localhost", "[::1]")
        or coordinator_host.startswith("127.")
        or env.get("SLURM_STEP_NUM_NODES") == "1"
        or env.get("OMPI_COMM_WORLD_SIZE", "") == env.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    )


def _job_from_flags(coordinator, num_processes, process_id) -> Job | None:
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is None]
    if num_processes == 1 and coordinator is None:  # overrides the launcher
        return Job("", 1, 0)
    if len(missing) == len(given):
        return None
    if missing:
        raise InputError(f"a run of several processes also needs {' and '.join(missing)}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"--coordinator={coordinator} is not HOST:PORT, such as 10.0.0.1:8476")
    if not 0 <= process_id < num_processes:
        raise InputError(
            f"--process-id={process_id} is not in 0 to {num_processes - 1} "
            f"(--num-processes={num_processes})"
        )
    return Job(coordinator, num_processes, process_id)


def _job_from_launcher(timeout: int) -> Job | None:
    """Detects Cloud TPU, Slurm, Open MPI and Kubernetes as JAX does; None without a launcher."""
    try:
        from jax._src.clusters import ClusterEnv
    except ImportError:  # not public; the public function detects and initializes in one call
        with contextlib.suppress(ValueError):  # no launcher
            jax.distributed.initialize(initialization_timeout=timeout)
        return None
    try:
        detected = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, timeout
        )
    except Exception as error:
        raise RunError(
            f"cannot read the settings of this process's launcher: {one_line(error)}; use "
            "--coordinator, --num-processes and --process-id"
        ) from error
    return None if None in detected[:3] else Job(*detected)


@contextlib.contextmanager
def _exit_on_timeout(timeout: int, job: Job, rendezvous_dir: pathlib.Path | None) -> Iterator[None]:
    """Exits the process if the block takes too long: it waits in C++, where no exception helps."""
    present = rendezvous_dir and _presence_file(rendezvous_dir, job.process_id)
    if present:
        with contextlib.suppress(OSError):  # a bad folder is reported when it is opened
            rendezvous_dir.mkdir(parents=True, exist_ok=True)
            present.write_text(socket.gethostname())

    def exit_with_error():
        logger.error(f"error: {_start_timeout_message(timeout, job, rendezvous_dir)}")
        exit_now(FAILED)

    timer = threading.Timer(timeout, exit_with_error)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if present:
            with contextlib.suppress(OSError):
                present.unlink(missing_ok=True)


def _presence_file(rendezvous_dir, process):
    return rendezvous_dir / f".waiting.{process}"


def _start_timeout_message(timeout, job, rendezvous_dir):
    count, missing = job.num_processes, []
    message = f"timed out after {timeout} s waiting for {count} processes at {job.coordinator}"
    for process in range(count) if rendezvous_dir else ():
        try:
            modified = _presence_file(rendezvous_dir, process).stat().st_mtime
        except OSError:
            modified = 0
        # An old file was left by a process that was killed.
        if process != job.process_id and time.time() - modified > timeout + 60:
            missing.append(str(process))
    if missing:
        missing = f"process {listed(missing)}"
        return f"{message}: {missing} did not start or does not see {rendezvous_dir}"
    return f"{message}: check that all processes were started and can reach that address"


# ------------------------------------------------------------------------------- communication


def coordinator_client() -> Any | None:
    """Returns the client of the coordinator's key-value store; None if JAX has none.

    JAX has no public access to it. After `start`, nothing else here uses private parts of JAX.
    """
    try:
        from jax._src.distributed import global_state
    except ImportError:
        return None
    return getattr(global_state, "client", None)


def is_main_process() -> bool:
    """True in process 0, which writes logs, plots, config.json and the like."""
    return jax.process_index() == 0


@functools.cache
def hosts() -> list[str]:
    """Returns the host name of every process."""
    return all_gather_strings("host", socket.gethostname())


def process_name(process: int) -> str:
    """Returns a process and its host, such as "3 (tpu-host-3)"."""
    return f"{process} ({hosts()[process]})"


def all_gather_strings(name: str, value: str, timeout: float = RPC_TIMEOUT) -> list[str]:
    """Returns the `value` of every process, in their order.

    All processes must make the same calls in the same order; `name` is for the error message.

    Raises:
        RunError: listing the processes that did not call it within `timeout` seconds.
    """
    if jax.process_count() == 1:
        return [value]
    client = coordinator_client()
    if client is None or not hasattr(client, "blocking_key_value_get"):
        return _all_gather_on_devices(value)
    key = f"tnt_flax/{next(_counter)}/{name}"
    client.key_value_set(f"{key}/{jax.process_index()}", value)
    deadline, values, missing = time.monotonic() + timeout, [], []
    for process in range(jax.process_count()):
        left = max(deadline - time.monotonic(), 0.01)
        try:
            values.append(client.blocking_key_value_get(f"{key}/{process}", int(1000 * left)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise RunError(f"the run's coordinator failed: {one_line(error)}") from error
            missing.append(process)
    if missing:
        names = [str(process) if name == "host" else process_name(process) for process in missing]
        timed_out = f"timed out after {timeout:g} s waiting for process {listed(names)}"
        raise RunError(f"{timed_out} to report its {name}")
    return values


def _all_gather_on_devices(value):
    """Implements `all_gather_strings` by a collective, which has no timeout."""
    encoded = np.frombuffer(value.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(encoded)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(encoded)] = encoded
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def barrier(name: str, timeout: float = RPC_TIMEOUT) -> None:
    """Returns when all processes have called it. Raises RunError as `all_gather_strings`."""
    all_gather_strings(name, "done", timeout)


def sum_over_processes(count: int) -> int:
    """Returns the sum of the `count` of all processes, which must all call it."""
    if jax.process_count() == 1:
        return count
    return int(multihost_utils.process_allgather(np.int32(count)).sum())


def run_on_main(name: str, function: Callable[[], Any], timeout: float = RPC_TIMEOUT) -> Any:
    """Runs `function` in process 0 while the others wait; returns its result there, else None.

    Raises:
        InputError, RunError: on every process, as raised by `function` in process 0.
    """
    result, error = None, None
    if is_main_process():
        try:
            result = function()
        except (InputError, RunError) as caught:
            error = caught
    message = json.dumps([type(error).__name__, str(error)] if error else None)
    raised = json.loads(all_gather_strings(name, message, timeout)[0])
    if error:
        raise error
    if raised:
        raise (InputError if raised[0] == "InputError" else RunError)(raised[1])
    return result


# ------------------------------------------------------------------------------- consistency


def check_same_on_all_processes(
    name: str, values: dict[str, Any], timeout: float = RPC_TIMEOUT
) -> None:
    """Checks that every process passes the same `values`, nested dictionaries of JSON values.

    Raises:
        InputError: on every process, with the first process that differs and the differing keys.
        RunError: see `all_gather_strings`.
    """
    gathered = [json.loads(x) for x in all_gather_strings(name, json.dumps(values), timeout)]
    for process, other in enumerate(gathered):
        if changed := diff_nested(gathered[0], other):
            raise InputError(
                f"process {process_name(process)} differs from process {process_name(0)} in its "
                f"{name}: {listed(changed, separator='; ')}"
            )


def check_same_program() -> None:
    """Checks that all processes run the same code on the same number and kind of devices."""
    devices = jax.local_devices()
    program = {
        "tnt_flax": _source_digest(),
        "jax": jax.__version__,
        "devices": f"{len(devices)} {devices[0].device_kind}",
    }
    check_same_on_all_processes("program", program)


def _source_digest() -> str:
    package = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def check_shared_workdir(workdir: pathlib.Path, timeout: float = RPC_TIMEOUT) -> None:
    """Checks that all hosts see the same folder `workdir`, which process 0 has created.

    Raises:
        InputError: on every process, listing the processes that do not see it.
        RunError: see `all_gather_strings`.
    """
    token = workdir / ".token"
    if is_main_process():
        write_atomic(token, uuid.uuid4().hex)
    own = token.read_text() if is_main_process() else ""
    expected = all_gather_strings("workdir token", own, timeout)[0]
    visible = json.dumps(_wait_for_content(token, expected, timeout))
    gathered = all_gather_strings("view of the workdir", visible, 2 * timeout)
    blind = [process_name(i) for i, visible in enumerate(gathered) if not json.loads(visible)]
    if blind:
        raise InputError(
            f"process {listed(blind)} does not see the workdir {workdir} of process "
            f"{process_name(0)}: use a folder that all hosts share"
        )


def _wait_for_content(path: pathlib.Path, text: str, timeout: float) -> bool:
    """True once a file holds `text`; network file systems show the writes of others with delay."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if path.read_text() == text:
                return True
        time.sleep(0.1)
    return False
