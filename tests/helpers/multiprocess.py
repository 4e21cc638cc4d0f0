# SPDX-License-Identifier: Apache-2.0
"""One of several processes that test `runtime`; tests/runtime/test_processes.py starts it.

    python multiprocess.py FOLDER PORT COUNT PROCESS [ERROR]

Calls the functions of `processes` and prints their results. With a key of ERRORS, process 1 raises
that error inside a `Watchdog`, and process 0 loses its connection afterwards.
"""

import pathlib
import sys
import time

from jax.errors import JaxRuntimeError

from tnt_flax.core.errors import InputError, RunError
from tnt_flax.runtime import processes
from tnt_flax.runtime.processes import check_same_on_all_processes
from tnt_flax.runtime.watchdog import FAILURE_KEY, Watchdog

ERRORS = {
    "input": InputError("bad"),
    "bug": ZeroDivisionError("bug"),
    "memory": JaxRuntimeError("RESOURCE_EXHAUSTED: memory"),
    "connection": JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"),
}


def attempt(name, function):
    try:
        print(f"{name}: {function()}")
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}")


def call_all(folder: pathlib.Path, process: int) -> None:
    own = folder / str(process)
    own.mkdir()

    def fail():
        raise RunError("the disk is full")

    def late():
        time.sleep(2 * process)
        return processes.all_gather_strings("value", "x", 4 if process else 1)

    config = {"a": {"b": process, "c": 2}}
    attempt("program", processes.check_same_program)
    attempt("same", lambda: check_same_on_all_processes("same", {"a": {"b": 1}}, 20))
    attempt("different", lambda: check_same_on_all_processes("config", config, 20))
    attempt("shared", lambda: processes.check_shared_workdir(folder, 20))
    attempt("not shared", lambda: processes.check_shared_workdir(own, 1))
    attempt("main fails", lambda: processes.run_on_main("fails", fail, 20))
    attempt("main returns", lambda: processes.run_on_main("returns", lambda: "done", 20))
    attempt("late", late)
    attempt("sum", lambda: processes.sum_over_processes(process + 1))


def fail_in_process_1(process: int, error: str) -> None:
    with Watchdog(0) as watchdog:
        watchdog.progress("step 4")
        processes.barrier("step 4")
        if process == 1:
            raise ERRORS[error]
        client = processes.coordinator_client()
        client.blocking_key_value_get(FAILURE_KEY, 20_000)
        raise ERRORS["connection"]  # as if the connection broke before the cause was read


def main(folder: str, port: str, count: str, process: str, *error: str) -> None:
    folder, process = pathlib.Path(folder), int(process)
    processes.start(f"localhost:{port}", int(count), process, timeout=20, rendezvous_dir=folder)
    if error:
        fail_in_process_1(process, *error)
    call_all(folder, process)
    processes.exit_now(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
