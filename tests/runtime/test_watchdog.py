# SPDX-License-Identifier: Apache-2.0
"""Stalls, signals and clean-up of the watchdog; tests/training/test_survival.py has whole runs."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest

from tnt_flax.core.errors import InputError, RunError, Stopped
from tnt_flax.runtime.watchdog import Watchdog

RUN = """
import sys, time
from tnt_flax.runtime.watchdog import Watchdog
with Watchdog(float(sys.argv[1]), owns_process=True) as watchdog:
    watchdog.progress("step 3 of 9", setup=sys.argv[2] == "setup")
    print("ready", flush=True)
    for _ in range(1000):
        time.sleep(0.1)
"""


def start(root, stall_minutes, phase):
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(stall_minutes), phase],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def finish(process):
    return process.communicate(timeout=60)[1], process.returncode


def test_a_stall_prints_all_stacks_and_exits(root):
    err, code = finish(start(root, 0.02, "training"))
    assert code == 75
    assert 'File "<string>", line' in err and "in _watch" in err  # the stacks of both threads
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: no progress for ")
    assert " s (stall_minutes); last: step 3 of 9; stacks" in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_during_setup_exits_at_once(root, number):
    process = start(root, 0, "setup")
    process.send_signal(number)
    err, code = finish(process)
    assert code == 42
    assert err == f"stopped: {number.name} before the first step: nothing to save\n"


def test_only_the_second_ctrl_c_exits_at_once(root):
    process = start(root, 0, "training")
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        line = process.stderr.readline()
        assert line == f"{number.name}: saving, then stopping; Ctrl-C again stops at once\n"
    process.send_signal(signal.SIGINT)
    err, code = finish(process)
    assert code == 130 and err.startswith("interrupted: ")


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@pytest.mark.parametrize("number", SIGNALS)
def test_progress_raises_after_a_signal_and_exit_restores_the_handlers(number):
    before = [signal.getsignal(x) for x in SIGNALS]
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc") else 0
    with Watchdog(0) as watchdog:
        watchdog.progress("step 1")
        os.kill(os.getpid(), number)
        assert watchdog.next_batch(iter([7])) == 7
        with pytest.raises(Stopped, match="nothing to save yet"):
            watchdog.progress("step 2")
    assert [signal.getsignal(x) for x in SIGNALS] == before
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]
    assert not descriptors or len(os.listdir("/proc/self/fd")) <= descriptors


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_that_is_ignored_at_the_start_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)  # as nohup does
    try:
        with Watchdog(0) as watchdog:
            os.kill(os.getpid(), number)
            watchdog.progress("step 1")
    finally:
        signal.signal(number, before)


def test_a_closed_terminal_stops_a_run_as_sigterm_does(root, tmp_path):
    script = """
import os, pathlib, sys, time
from tnt_flax.core.errors import Stopped, print_error
from tnt_flax.runtime.watchdog import Watchdog
from tnt_flax.tools.command_line import setup_logging
setup_logging()
os.open(os.ttyname(0), os.O_RDWR)  # becomes the terminal of this session
try:
    with Watchdog(0, owns_process=True) as watchdog:
        watchdog.progress("step 1")
        print("ready", flush=True)
        while True:
            watchdog.progress("step")
            time.sleep(0.1)
except Stopped as error:
    time.sleep(0.5)  # for the watchdog's message to the closed terminal
    pathlib.Path(sys.argv[1]).write_text(str(print_error(error)))
"""
    terminal, end = pty.openpty()
    command = [sys.executable, "-c", script, str(tmp_path / "code")]
    pipes = dict(stdin=end, stdout=end, stderr=end)
    process = subprocess.Popen(command, cwd=root, start_new_session=True, **pipes)
    os.close(end)
    received = b""
    while b"ready\r\n" not in received:  # the process must have finished writing
        received += os.read(terminal, 1000)
    os.close(terminal)
    process.wait(60)
    assert (tmp_path / "code").read_text() == "42"


def test_a_run_that_does_not_own_its_process_ends_by_exceptions():
    with pytest.raises(KeyboardInterrupt), Watchdog(0) as watchdog:
        watchdog.progress("data opened", setup=True)
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Stopped), Watchdog(0):
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), Watchdog(0) as watchdog:
        watchdog.progress("step 1")
        os.kill(os.getpid(), signal.SIGINT)  # saves at the next step
        os.kill(os.getpid(), signal.SIGINT)


def test_a_stall_in_a_thread_raises_there(capfd):
    errors = []

    def train():
        try:
            with Watchdog(0.01):
                while True:
                    time.sleep(0.1)
        except RunError as error:
            errors.append(str(error))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join(20)
    assert errors == ["no progress for stall_minutes: see the stacks of all threads on stderr"]
    assert "in train" in capfd.readouterr().err


def test_a_signal_interrupts_the_wait_for_a_batch():
    closed = []

    def batches():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1000)
            yield
        finally:
            closed.append(True)

    with Watchdog(0) as watchdog:
        watchdog.progress("step 1")
        with pytest.raises(Stopped):
            watchdog.next_batch(batches())
    assert closed


def test_no_handler_is_installed_outside_the_main_thread():
    reached = []

    def train():
        with Watchdog(0) as watchdog:
            watchdog.progress("step 1")
            reached.append(True)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert reached and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("error", [InputError("bad"), Stopped("saved"), ZeroDivisionError()])
def test_an_error_passes_through_in_a_single_process(error):
    with pytest.raises(type(error)):
        with Watchdog(0):
            raise error
