# SPDX-License-Identifier: Apache-2.0
"""Ends a run early: on a signal, a stall, or the failure of another process.

No port is opened: processes communicate through JAX's coordinator.
"""

import ctypes
import faulthandler
import json
import logging
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import TypeVar

import jax
from jax.experimental import multihost_utils

from tnt_flax.core.errors import (
    INTERRUPTED,
    STALLED,
    STOPPED,
    RunError,
    Stopped,
    one_line,
    print_error,
)
from tnt_flax.runtime import processes
from tnt_flax.runtime.processes import exit_now

# SIGTERM from schedulers, SIGINT from Ctrl-C; SIGHUP from a closed terminal and SIGUSR1 from Slurm
# unless they are ignored, as by nohup, or handled by somebody else. Windows lacks the last two.
SIGNALS = (signal.SIGTERM, signal.SIGINT)
OPTIONAL_SIGNALS = tuple(getattr(signal, x) for x in ("SIGHUP", "SIGUSR1") if hasattr(signal, x))
POLL_INTERVAL = 1.0  # seconds between checks of the clock and of the other processes
# Seconds that process 0 waits before it exits after a failure, so that the others can read the
# cause and exit: its exit ends the coordinator, which aborts those that still run.
EXIT_DELAY = 3.0
# JAX's errors when another process has died: from gloo, NCCL or the coordination service.
CONNECTION_ERRORS = re.compile(
    r"gloo|nccl|connection|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED", re.IGNORECASE
)
NOTHING_TO_SAVE = "nothing to save yet; run the same command to start again"
FAILURE_KEY = "tnt_flax/failure"  # in the coordinator's store: the first failure of any process

logger = logging.getLogger("tnt_flax")
T = TypeVar("T")


class _SignalWhileWaiting(BaseException):
    """Interrupts the wait for a batch."""


class _Stalled(RunError):
    """Raised in the thread of a stalled run by its watchdog, which can pass no arguments."""

    def __init__(self):
        super().__init__("no progress for stall_minutes: see the stacks of all threads on stderr")


class Watchdog:
    """Watches one run from a thread, as a context manager.

    *Stall*: the run calls `progress` after every part of the set-up, every step and every batch of
    an evaluation. If it does not for `stall_minutes`, the watchdog prints the stacks of all threads
    and exits with code 75. 0 disables this.

    *Signal*: SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C to any process stops the run: `progress` raises
    Stopped, in all processes at the same call. During the set-up there is nothing to save, and a
    single process exits at once; a second Ctrl-C also exits at once.

    *Failure*: if one of several processes fails, all exit with its cause and exit code.

    Args:
        stall_minutes: the timeout.
        owns_process: exit as described, as a command may. Otherwise, in a notebook for instance, a
            run of a single process never exits: signals during the set-up raise KeyboardInterrupt
            or Stopped, the second Ctrl-C KeyboardInterrupt, and a stall RunError, in the thread of
            the run. A thread that hangs in XLA cannot be interrupted; the stall is only logged.
    """

    def __init__(self, stall_minutes: float, *, owns_process: bool = False):
        self.stall_seconds = 60 * stall_minutes
        self._distributed = jax.process_count() > 1
        self._may_exit = owns_process or self._distributed
        self._run_thread = threading.get_ident()
        self._interrupts = 0  # number of Ctrl-C that `_handle` has seen
        self._counter = 0  # calls of `progress`, equal on all processes
        self._last = "start"  # the last progress
        self._idle = 0.0  # seconds since then
        self._signal_received = False
        self._in_setup = True
        self._waiting = False  # for a batch, where a signal may interrupt
        self._done = threading.Event()
        self._reporting = threading.Lock()  # kept by the thread that reports another process
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._wakeup, self._wakeup_end = os.pipe()
        os.set_blocking(self._wakeup_end, False)
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            # With several processes JAX handles SIGTERM itself and informs all of them.
            numbers = [signal.SIGINT] if self._distributed else list(SIGNALS)
            numbers += [x for x in OPTIONAL_SIGNALS if signal.getsignal(x) == signal.SIG_DFL]
            for number in numbers:
                self._handlers[number] = signal.signal(number, self._handle)
            # Wakes the thread even while the main thread executes XLA code.
            self._old_wakeup = signal.set_wakeup_fd(self._wakeup_end, warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.abort(error)
        self._done.set()
        os.write(self._wakeup_end, b"\0")  # the thread need not wait for its next check
        if self._handlers:
            signal.set_wakeup_fd(self._old_wakeup)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        self._thread.join()
        os.close(self._wakeup)
        os.close(self._wakeup_end)

    # --------------------------------------------------------------------- called by the run

    def progress(self, what: str, *, setup: bool = False) -> None:
        """Records that the run has reached `what`: a step, a batch or a part of the set-up.

        `setup` means that there is nothing to save yet.

        Raises:
            Stopped: a process has received a signal. All processes raise at the same call.
        """
        self._in_setup = self._in_setup and setup
        self._last, self._idle = what, 0.0
        self._counter += 1
        if self._distributed:
            stop = multihost_utils.reached_preemption_sync_point(self._counter)
        else:
            stop = self._signal_received
        if stop:
            raise Stopped(NOTHING_TO_SAVE)

    def next_batch(self, batches: Iterator[T]) -> T:
        """Returns the next of `batches`.

        Raises:
            Stopped: a signal interrupted the wait, in a single process. With several processes it
                does not, as the others may already be in the next step.
        """
        self._waiting = not self._distributed
        try:
            return next(batches)
        except _SignalWhileWaiting:
            raise Stopped(NOTHING_TO_SAVE) from None
        finally:
            self._waiting = False

    def abort(self, error: BaseException | None) -> None:
        """Ends all processes of the run; returns if there is only one, or on None or Stopped.

        Must be called before anything that waits for the other processes.
        """
        if not self._distributed or error is None or isinstance(error, Stopped):
            return
        if isinstance(error, jax.errors.JaxRuntimeError) and CONNECTION_ERRORS.search(str(error)):
            self._check_other_processes()  # a failed process reports before it exits
            code = STALLED
            cause = f"the connection to another process broke after {self._last}"
            logger.error(f"error: {cause}; it may be dead: see its log")
        else:
            code, cause = print_error(error), one_line(error)
        self._report_failure(code, cause)
        self._exit_after_failure(code)

    # ------------------------------------------------------------------------------- signals

    def _handle(self, number, frame):
        """Signal handler, in the main thread."""
        if self._distributed:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX forwards SIGTERM to all processes
            return
        self._signal_received = True
        self._interrupts += number == signal.SIGINT
        if not self._may_exit and (self._in_setup or self._interrupts > 1):
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(NOTHING_TO_SAVE)
        if self._waiting and not self._in_setup:
            raise _SignalWhileWaiting

    def _on_signal(self, number, interrupts):
        """Called at once, in the watchdog's thread. `interrupts` counts Ctrl-C."""
        name = signal.Signals(number).name
        if not self._may_exit and (self._in_setup or interrupts > 1):
            return  # `_handle` raises
        if self._in_setup and not self._distributed:
            logger.warning(f"stopped: {name} before the first step: nothing to save")
            exit_now(STOPPED)
        if interrupts > 1:
            logger.warning("interrupted: run the same command to resume from the last checkpoint")
            exit_now(INTERRUPTED)
        logger.warning(f"{name}: saving, then stopping; Ctrl-C again stops at once")

    # ------------------------------------------------------------------------------ the thread

    def _watch(self):
        interrupts, previous = 0, time.monotonic()
        while not self._done.is_set():
            if select.select([self._wakeup], [], [], POLL_INTERVAL)[0]:
                for number in os.read(self._wakeup, 64):
                    if number in self._handlers:
                        interrupts += number == signal.SIGINT
                        self._on_signal(number, interrupts)
            now = time.monotonic()
            # The time during which this process was suspended does not count as idle.
            self._idle += min(now - previous, 2 * POLL_INTERVAL)
            previous = now
            if self._distributed:
                self._check_other_processes()
            if 0 < self.stall_seconds < self._idle:
                self._end_stalled()
                return

    def _end_stalled(self):
        faulthandler.dump_traceback(file=sys.__stderr__)
        cause = f"no progress for {self._idle:.0f} s (stall_minutes); last: {self._last}"
        hint = "; another process may be dead: see its log" if self._distributed else ""
        logger.error(f"error: {cause}; stacks of all threads above{hint}")
        if self._may_exit:
            self._report_failure(STALLED, cause)
            self._exit_after_failure(STALLED)
        thread, error = ctypes.c_ulong(self._run_thread), ctypes.py_object(_Stalled)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, error)

    def _check_other_processes(self):
        try:
            failure = json.loads(processes.coordinator_client().key_value_try_get(FAILURE_KEY))
        except jax.errors.JaxRuntimeError:
            return  # no failure, or the coordinator has ended
        if failure["process"] != jax.process_index():
            with self._reporting:  # until the exit, so that one thread alone prints the line
                logger.error(
                    f"error: process {failure['process']} ({failure['host']}) ended the run: "
                    f"{failure['cause']}"
                )
                self._exit_after_failure(failure["code"])

    def _report_failure(self, code, cause):
        if not self._distributed:
            return
        process = jax.process_index()
        host = processes.hosts()[process]
        failure = {"process": process, "host": host, "code": code, "cause": cause}
        try:
            processes.coordinator_client().key_value_set(FAILURE_KEY, json.dumps(failure))
        except jax.errors.JaxRuntimeError:
            pass  # another process failed first, or the coordinator has ended

    def _exit_after_failure(self, code):
        if self._distributed and processes.is_main_process():
            sys.stderr.flush()
            time.sleep(EXIT_DELAY)
        exit_now(code)
