# SPDX-License-Identifier: Apache-2.0
"""What ends a run before its last step: a notice, a stall, the failure of another process.

Nothing here listens on a port. What processes tell each other goes through JAX's coordinator.
"""

import faulthandler
import json
import multiprocessing
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn, TypeVar

import jax
from jax.experimental import multihost_utils

from tnt_flax.core.errors import INTERRUPTED, STALLED, STOPPED, Stopped, one_line, print_error
from tnt_flax.runtime import processes

NOTICES = (signal.SIGTERM, signal.SIGINT)  # of schedulers, of the person at the keyboard
POLL = 1.0  # seconds between two looks at the clock and at the other processes
LINGER = 3.0  # seconds that a failed process 0, whose end ends the others, lets them read why
# What JAX says where another process is at fault: gloo, NCCL, the coordination service.
LOST = re.compile(r"gloo|nccl|connection|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED", re.IGNORECASE)
T = TypeVar("T")
FAILURE = "tnt_flax/failure"  # key of the coordinator's store: who failed first, and why


class _NoticeWhileWaiting(BaseException):
    """Breaks off the wait for a batch."""


class Guard:
    """Watches over one run, from a thread of its own, while it is entered.

    The run calls `reached` after every step, and every batch of an evaluation. Where that does not
    happen for `stall_minutes`, the guard prints the stack of every thread and ends the process
    (0: never). In a run of many processes, the failure of one ends all, with its cause.

    A notice to stop is SIGTERM or Ctrl-C, to any of the processes. Before the first step the
    process leaves at once, as there is nothing to save; in a run of many processes as soon as all
    have come to the next part of the set-up. Later `reached` says so, to all after the same step.
    """

    def __init__(self, stall_minutes: float):
        self.stall_seconds = 60 * stall_minutes
        self.stopping = False  # the run has been told to stop, and knows
        self._many = jax.process_count() > 1
        self._ticks = 0  # calls of `reached` and `check`, alike on all processes
        self._last, self._idle = "its start", 0.0  # what was reached, and seconds since then
        self._notice: str | None = None
        self._may_leave, self._waiting = True, False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="guard", daemon=True)

    def __enter__(self) -> "Guard":
        self._wakeup, end = os.pipe()
        os.set_blocking(end, False)
        self._handlers, self._end = {}, end
        if threading.current_thread() is threading.main_thread():
            # In a run of many processes JAX itself has taken SIGTERM, and tells all of them.
            for number in NOTICES if not self._many else (signal.SIGINT,):
                self._handlers[number] = signal.signal(number, self._handle)
            # The thread learns of a signal even while the main thread is deep in XLA.
            self._old_wakeup = signal.set_wakeup_fd(end, warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None:
            self.failed(error)
        self._done.set()
        if self._handlers:
            signal.set_wakeup_fd(self._old_wakeup)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        self._thread.join()
        os.close(self._wakeup)
        os.close(self._end)

    # ------------------------------------------------------------------- what the run says

    def check(self, what: str) -> None:
        """The set-up has come to `what`. Raises Stopped if the run has been told to stop."""
        if self._poll(what):
            raise Stopped("there was nothing to save; the same command starts again")

    def reached(self, what: str) -> bool:
        """A step or a batch is done; should the run stop? All processes get the same answer."""
        self._may_leave = False
        return self._poll(what)

    def wait(self, batches: Iterator[T]) -> T | None:
        """The next of `batches`; None if the run should stop, also where that is said only now.

        But not in a run of many processes: the others may be in the next step already.
        """
        try:
            self._waiting = not self._many
            return None if self.stopping else next(batches)
        except _NoticeWhileWaiting:
            self.stopping = True
            return None
        finally:
            self._waiting = False

    def failed(self, error: BaseException) -> None:
        """Ends the whole run, if it is one of many processes; returns if it is not.

        To be called before anything that waits for the other processes.
        """
        if not self._many or isinstance(error, Stopped):
            return
        lost = isinstance(error, jax.errors.JaxRuntimeError) and LOST.search(str(error))
        if lost:
            self._look_at_the_others()  # who ends the run says why before it breaks connections
            code = STALLED
            cause = f"the connection to another process broke after {self._last}"
            print(f"error: {cause}; it may be dead: look at its log", file=sys.stderr)
        else:
            code, cause = print_error(error), one_line(error)
        self._announce(code, cause)
        leave(code)

    # ------------------------------------------------------------------------------ notices

    def _poll(self, what):
        self._last, self._idle = what, 0.0
        self._ticks += 1
        if not self.stopping:
            if self._many:
                self.stopping = multihost_utils.reached_preemption_sync_point(self._ticks)
            else:
                self.stopping = self._notice is not None
        return self.stopping

    def _handle(self, number, frame):
        """In the main thread, between two instructions of Python."""
        if self._many:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX's way to all processes
        else:
            self._notice = signal.Signals(number).name
            if self._waiting and not self._may_leave:
                raise _NoticeWhileWaiting

    def _hear(self, number, interrupts):
        """In the thread of the guard, at once."""
        name = signal.Signals(number).name
        if self._may_leave and not self._many:
            print(f"stopped: {name} before the first step: nothing to save", file=sys.stderr)
            leave(STOPPED)
        if interrupts > 1:
            print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
            leave(INTERRUPTED)
        print(f"{name}: saving, then stopping; Ctrl-C again stops at once", file=sys.stderr)

    # --------------------------------------------------------------------------- the thread

    def _watch(self):
        interrupts, looked = 0, time.monotonic()
        while not self._done.is_set():
            if select.select([self._wakeup], [], [], POLL)[0]:
                for number in os.read(self._wakeup, 64):
                    if number in NOTICES:
                        interrupts += number == signal.SIGINT
                        self._hear(number, interrupts)
            now = time.monotonic()
            # A process that was suspended for an hour has not been idle for an hour.
            self._idle += min(now - looked, 2 * POLL)
            looked = now
            if self._many:
                self._look_at_the_others()
            if 0 < self.stall_seconds < self._idle:
                self._end_stalled()

    def _end_stalled(self):
        faulthandler.dump_traceback(file=sys.__stderr__)
        why = (
            f"process {jax.process_index()} of {jax.process_count()} has come no further than "
            f"{self._last} for {self._idle:.0f} s (stall_minutes)"
        )
        hint = "; another process may be dead: look at its log" if self._many else ""
        print(f"error: {why}; the stacks are above{hint}", file=sys.stderr)
        self._announce(STALLED, why)
        leave(STALLED)

    def _look_at_the_others(self):
        try:
            failure = json.loads(processes.client().key_value_try_get(FAILURE))
        except (jax.errors.JaxRuntimeError, AttributeError):
            return  # there is no such key
        if failure["process"] != jax.process_index():
            print(
                f"error: process {failure['process']} on {failure['host']} has ended the run: "
                f"{failure['cause']}",
                file=sys.stderr,
            )
            leave(failure["code"])

    def _announce(self, code, cause):
        if not self._many:
            return
        me = jax.process_index()
        host = processes.hosts()[me]
        failure = {"process": me, "host": host, "code": code, "cause": cause}
        try:
            processes.client().key_value_set(FAILURE, json.dumps(failure))
        except (jax.errors.JaxRuntimeError, AttributeError):
            pass  # another one was first, or the coordinator is gone
        if processes.is_main():
            sys.stderr.flush()
            time.sleep(LINGER)


def leave(code: int) -> NoReturn:
    """Ends this process now. Its exit handlers could wait for other processes, in vain."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
