# SPDX-License-Identifier: Apache-2.0
"""main.py, in which something goes wrong: $FAULT says where, when and what, as JSON.

{"process": 1, "at": "step 7 ", "do": "SIGTERM"}: process 1 gets SIGTERM as it reaches step 7; all
do, without "process". `at` is the beginning of what the guard of the run is told, or "compile" or
"save".
"""

import json
import os
import pathlib
import signal
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import numpy as np

import main
from tnt_flax.runtime import sharding
from tnt_flax.runtime.checkpoints import Checkpoints
from tnt_flax.runtime.watchdog import Watchdog

FAULT = json.loads(os.environ.get("FAULT", "null")) or {}
told = threading.Event()  # this process to stop, in a run of many


def is_here() -> bool:
    return FAULT.get("process", jax.process_index()) == jax.process_index()


def strike(reached: str) -> None:
    """Does what FAULT says, once, if this is the place."""
    if told.is_set():  # JAX looks for the notice once a second; small steps are quicker
        time.sleep(1)
    if not FAULT or not is_here() or not reached.startswith(FAULT["at"]):
        return
    what = FAULT["do"]
    FAULT.clear()
    print(f"fault: {what} at {reached}", file=sys.stderr, flush=True)
    if what.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[what])
        if jax.process_count() > 1:
            told.set()
    elif what == "raise":
        raise ZeroDivisionError("an injected bug")
    elif what == "hang":
        time.sleep(10_000)


def struck_first(function, reached=lambda *args: args[1]):
    def wrapped(*args, **kwargs):
        strike(reached(*args))
        return function(*args, **kwargs)

    return wrapped


def struck_after_save(save):
    def wrapped(self, state, step, metrics=None):
        save(self, state, step, metrics)  # it goes on in the background
        strike(f"save {step}")

    return wrapped


def struck_train_step(jit_train_step):
    def make(*args):
        train_step, calls = jit_train_step(*args), 0

        def wrapped(state, *rest):
            nonlocal calls
            calls += 1
            if calls == 1 and FAULT.get("at") == "compile":
                jax.monitoring.register_event_duration_secs_listener(struck_compiler)
            if FAULT.get("do") == "nan" and is_here():
                if FAULT["at"] == f"step {calls}":
                    state = state.replace(params=jax.tree.map(not_a_number, state.params))
            return train_step(state, *rest)

        return wrapped

    return make


def struck_compiler(event, *args, **kwargs):
    """JAX has made the program, which XLA now compiles."""
    if event.endswith("jaxpr_to_mlir_module_duration"):
        threading.Timer(0.3, strike, ["compile"]).start()


def not_a_number(x):
    """Of this process only, as if its memory had failed."""
    shards = [np.full(s.data.shape, np.nan, x.dtype) for s in x.addressable_shards]
    devices = [s.device for s in x.addressable_shards]
    pieces = [jax.device_put(s, d) for s, d in zip(shards, devices, strict=True)]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, pieces)


if __name__ == "__main__":
    Watchdog.progress = struck_first(Watchdog.progress)
    Checkpoints.save_async = struck_after_save(Checkpoints.save_async)
    sharding.jit_train_step = struck_train_step(sharding.jit_train_step)
    if FAULT.get("at") == "compile":  # a program that was kept would not be compiled
        jax.config.update("jax_enable_compilation_cache", False)
    sys.exit(main.main())
