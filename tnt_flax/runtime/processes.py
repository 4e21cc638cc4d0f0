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
from collections.abc import Callable, Iterator, Sequence
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
    host = "127.0.0.1" if is_single_host(host) else host
    address = f"{host}:{port}"
    logger.info(
        f"process {job.process_id} of {job.num_processes}: waiting up to {timeout} s for the other "
        f"processes at {address}"
    )
    with _exit_on_timeout(timeout, job, rendezvous_dir):
        try:
            jax.distributed.initialize(
                address,
                job.num_processes,
                job.process_id,
                local_device_ids=job.local_devices,
                cluster_detection_method="deactivate",
                # JAX's own timeout aborts the process without listing the missing processes.
                initialization_timeout=timeout + 60,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
                shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
                coordinator_bind_address=address if host == "127.0.0.1" else None,
            )
        except Exception as error:
            raise RunError(f"cannot join the run at {address}: {one_line(error)}") from error
    hosts()


def exit_now(code: int) -> NoReturn:
    """Exits without running exit handlers, which could wait for other processes forever."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (*logger.handlers, sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # of a closed terminal
            stream.flush()
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
    """Detects Cloud TPU, Slurm, Open MPI and Kubernetes as JAX does; None without a launcher.

    The public `jax.distributed.initialize` detects and initializes in one call.
    """
    from jax._src.clusters import ClusterEnv

    try:
        detected = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, timeout
        )
    except Exception as error:
        raise RunError(
            f"cannot read the settings of this process's launcher: {one_line(error)}; use "
            "--coordinator, --num-processes and --process-id"
        ) from error
    if None in detected[:3]:
        return None
    coordinator, num_processes, process_id, local = detected
    return Job(coordinator, num_processes, process_id, _local_gpus(num_processes, local))


def _local_gpus(num_processes: int, local: Sequence[int] | None) -> list[int] | None:
    """Returns the GPUs of this process among the visible ones; None for all of them.

    JAX assumes one process per GPU, and that every process sees all GPUs of its host (`local` is
    the number of the process on its host). A process that is alone on its host would use one GPU of
    several, and one that sees only its own GPU (`srun --gpus-per-task=1`) would find none:
    github.com/jax-ml/jax/issues/16788, 23452, 28194, 29669.

    Raises:
        InputError: there are more processes than GPUs on this host.
    """
    env = os.environ
    visible = [x for x in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]
    alone = env.get("SLURM_STEP_NUM_NODES") == str(num_processes)
    alone = alone or env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    if local is None or alone or len(visible) == 1 or "JAX_LOCAL_DEVICE_IDS" in env:
        return None
    if visible and max(local) >= len(visible):
        raise InputError(
            f"no GPU is left for process {max(local)} of this host: {len(visible)} are visible "
            f"(CUDA_VISIBLE_DEVICES={','.join(visible)}); start one process per GPU or per host"
        )
    return list(local)


@contextlib.contextmanager
def _exit_on_timeout(timeout: int, job: Job, rendezvous_dir: pathlib.Path | None) -> Iterator[None]:
    """Exits the process if the block takes too long: it waits in C++, where no exception helps.

    Each process leaves a file in `rendezvous_dir` while it waits, so that the missing ones show.
    """
    started = time.time()
    count = job.num_processes if rendezvous_dir else 0
    waiting = [rendezvous_dir / f".waiting.{process}" for process in range(count)]

    def exit_with_error():
        message = f"timed out after {timeout} s waiting for {job.num_processes} processes at "
        message += f"{job.coordinator}: "
        # An old file was left by a process that was killed.
        missing = [str(i) for i, x in enumerate(waiting) if float(_read(x) or 0) < started - 60]
        if missing:
            message += f"process {listed(missing)} did not start or does not see {rendezvous_dir}"
        else:
            message += "check that all processes were started and can reach that address"
        logger.error(f"error: {message}")
        exit_now(FAILED)

    timer = threading.Timer(timeout, exit_with_error)
    timer.daemon = True
    timer.start()
    with contextlib.ExitStack() as stack:
        stack.callback(timer.cancel)
        if rendezvous_dir:
            with contextlib.suppress(OSError):  # a bad folder is reported when it is opened
                rendezvous_dir.mkdir(parents=True, exist_ok=True)
                waiting[job.process_id].write_text(str(started))
                stack.callback(waiting[job.process_id].unlink, missing_ok=True)
        yield


def _read(path: pathlib.Path) -> str:
    """Returns the content of a text file; "" if it cannot be read."""
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


# ------------------------------------------------------------------------------- communication


def coordinator_client() -> Any:
    """Returns the client of the coordinator's key-value store, which JAX does not make public."""
    from jax._src.distributed import global_state

    return global_state.client


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
    client, key = coordinator_client(), f"tnt_flax/{next(_counter)}/{name}"
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


def barrier(name: str, timeout: float = RPC_TIMEOUT) -> None:
    """Returns when all processes have called it. Raises RunError as `all_gather_strings`."""
    all_gather_strings(name, "done", timeout)


def sum_over_processes(count: int) -> int:
    """Returns the sum of the `count` of all processes, which must all call it."""
    if jax.process_count() == 1:
        return count
    return int(multihost_utils.process_allgather(np.int32(count)).sum())


def run_on_main(name: str, function: Callable[[], Any], timeout: float = RPC_TIMEOUT) -> Any:
    """Runs `function` in process 0 while the others wait; returns its JSON result in all of them.

    Raises:
        InputError, RunError: on every process, as raised by `function` in process 0.
        RunError: process 0 took more than `timeout` seconds.
    """
    if jax.process_count() == 1:
        return function()
    message = ""
    if is_main_process():
        try:
            message = json.dumps(["", function()])
        except (InputError, RunError) as error:
            message = json.dumps([type(error).__name__, str(error)])
    raised, result = json.loads(all_gather_strings(name, message, timeout)[0])
    if raised:
        raise (InputError if raised == "InputError" else RunError)(result)
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

    def write_token() -> str:
        text = uuid.uuid4().hex
        write_atomic(token, text)
        return text

    expected = run_on_main("workdir token", write_token, timeout)
    deadline = time.monotonic() + timeout
    while (found := _read(token)) != expected and time.monotonic() < deadline:
        time.sleep(0.1)  # network file systems show the files of other hosts with a delay
    gathered = all_gather_strings("view of the workdir", found, 2 * timeout)
    blind = [process_name(i) for i, text in enumerate(gathered) if text != expected]
    if blind:
        raise InputError(
            f"process {listed(blind)} does not see the workdir {workdir} of process "
            f"{process_name(0)}: use a folder that all hosts share"
        )
