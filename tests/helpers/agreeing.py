# SPDX-License-Identifier: Apache-2.0
"""One of several processes that try to agree: python agreeing.py FOLDER PORT COUNT PROCESS.

Prints what each attempt ended with; tests/runtime/test_processes.py reads it.
"""

import os
import pathlib
import sys
import time

from tnt_flax.runtime import agreement, processes


def attempt(name, function):
    try:
        print(name, function())
    except Exception as error:
        print(name, f"{type(error).__name__}: {error}")


def main(folder: pathlib.Path, port: str, count: int, process: int) -> None:
    processes.start(f"localhost:{port}", count, process, timeout=20, meeting=folder)
    mine = folder / str(process)
    mine.mkdir()

    def fail():
        raise processes.RunError("the disk is gone")

    def late():
        time.sleep(2 * process)
        return processes.exchange("late", "x", 4 if process else 1)

    attempt("program", agreement.agree_on_program)
    attempt("same", lambda: agreement.agree("same", {"a": {"b": 1}}, 20))
    attempt("other", lambda: agreement.agree("config", {"a": {"b": process, "c": 2}}, 20))
    attempt("shared", lambda: agreement.check_shared(folder, 20))
    attempt("apart", lambda: agreement.check_shared(mine, 1))
    attempt("fails", lambda: processes.on_main("fails", fail, 20))
    attempt("does", lambda: processes.on_main("does", lambda: "done", 20))
    attempt("late", late)
    attempt("total", lambda: processes.total(process + 1))
    processes.client = lambda: None  # as if JAX had moved it
    attempt("without", lambda: processes.exchange("without", "é" * (process + 1), 20))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
