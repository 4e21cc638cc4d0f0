# SPDX-License-Identifier: Apache-2.0
"""What ends a process early; test_train and test_processes do it to whole runs."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from tnt_flax.core.errors import InputError, Stopped
from tnt_flax.runtime import watchdog
from tnt_flax.runtime.watchdog import Guard

RUN = """
import sys, time
from tnt_flax.guard import Guard
with Guard(float(sys.argv[1])) as guard:
    if sys.argv[2] != "set-up":
        guard.reached("step 3 of 9")
    print("ready", flush=True)
    for _ in range(1000):
        time.sleep(0.1)
"""


def run(root, stall_minutes, phase):
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(stall_minutes), phase],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def end(process):
    return process.communicate(timeout=60)[1], process.returncode


def test_a_stall_is_shown_and_ended(root):
    err, code = end(run(root, 0.02, "training"))
    assert code == 75
    assert 'File "<string>", line' in err and "in _watch" in err  # the stacks of both threads
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: process 0 of 1 has come no further than step 3 of 9 for ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_notice_during_the_set_up_ends_at_once(root, number):
    process = run(root, 0, "set-up")
    process.send_signal(number)
    err, code = end(process)
    assert code == 42
    assert err == f"stopped: {number.name} before the first step: nothing to save\n"


def test_only_the_second_ctrl_c_ends_at_once(root):
    process = run(root, 0, "training")
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        line = process.stderr.readline()
        assert line == f"{number.name}: saving, then stopping; Ctrl-C again stops at once\n"
    process.send_signal(signal.SIGINT)
    err, code = end(process)
    assert code == 130 and err.startswith("interrupted: ")


def test_a_run_polls_and_leaves_no_trace():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc") else 0
    with Guard(0) as watchdog:
        assert not watchdog.reached("step 1") and watchdog.wait(iter([7])) == 7
        os.kill(os.getpid(), signal.SIGTERM)
        assert not watchdog.stopping  # until it is asked
        assert watchdog.reached("step 2") and watchdog.reached("step 3") and watchdog.stopping
        assert watchdog.wait(iter([7])) is None
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert "guard" not in [thread.name for thread in threading.enumerate()]
    assert not descriptors or len(os.listdir("/proc/self/fd")) == descriptors


def test_a_notice_breaks_off_the_wait_for_data():
    closed = []

    def batches():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1000)
            yield
        finally:
            closed.append(True)

    with Guard(0) as watchdog:
        watchdog.reached("step 1")
        assert watchdog.wait(batches()) is None
    assert watchdog.stopping and closed


def test_without_the_main_thread_there_is_no_handler():
    reached = []

    def train():
        with Guard(0) as watchdog:
            reached.append(watchdog.reached("step 1"))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert reached == [False] and signal.getsignal(signal.SIGTERM) == before


class Store:
    """The coordinator's key-value store."""

    def __init__(self, **values):
        self.values = values

    def key_value_try_get(self, key):
        if key not in self.values:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return self.values[key]

    def key_value_set(self, key, value):
        if key in self.values:
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
        self.values[key] = value


@pytest.mark.parametrize(
    "error, others, code, said, announced",
    [
        (InputError("bad"), None, 2, "error: bad", "InputError: bad"),
        (ZeroDivisionError("bug"), None, 1, "ZeroDivisionError: bug", "ZeroDivisionError: bug"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: memory"), None, 1, "RESOURCE_", "RESOU"),
        (
            jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"),
            None,
            75,
            "error: the connection to another process broke after step 4; it may be dead",
            "the connection to another process broke after step 4",
        ),
        (  # the other one has said why
            jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"),
            {"process": 3, "host": "h3", "code": 2, "cause": "InputError: bad"},
            2,
            "error: process 3 on h3 has ended the run: InputError: bad",
            "InputError: bad",
        ),
    ],
)
def test_the_failure_of_one_ends_all(monkeypatch, capsys, error, others, code, said, announced):
    store = Store(**({watchdog.FAILURE: json.dumps(others)} if others else {}))
    monkeypatch.setattr(watchdog.jax, "process_count", lambda: 4)
    monkeypatch.setattr(watchdog.jax, "process_index", lambda: 2)
    monkeypatch.setattr(watchdog.distributed, "client", lambda: store)
    monkeypatch.setattr(watchdog.distributed, "hosts", lambda: ["h0", "h1", "h2", "h3"])

    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)

    monkeypatch.setattr(watchdog, "leave", leave)
    watcher = Guard(0)
    watcher._last = "step 4"
    with pytest.raises(Left, match=f"^{code}$"):
        watcher.failed(error)
    assert said in capsys.readouterr().err
    failure = json.loads(store.values[watchdog.FAILURE])
    assert announced in failure["cause"] and failure["code"] == code
    assert failure["process"] == (3 if others else 2)
    assert watcher.failed(Stopped("x")) is None  # all do that alike
