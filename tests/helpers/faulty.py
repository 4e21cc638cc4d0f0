# SPDX-License-Identifier: Apache-2.0
"""Runs main.py with an injected fault, described by $FAULT as JSON.

{"process": 1, "at": "step 7 ", "do": "SIGTERM"} sends SIGTERM to process 1 when it reaches step 7;
without "process", to all. "at" is a prefix of what the run reports to `Watchdog.progress`, or
"compile" or "save STEP". "do" is a signal, "raise", "hang" or "nan".
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
signaled = threading.Event()  # this process, in a run of several


def concerns_this_process() -> bool:
    return FAULT.get("process", jax.process_index()) == jax.process_index()


def inject(reached: str) -> None:
    """Injects FAULT once, if `reached` is where it belongs."""
    if signaled.is_set():  # JAX checks for signals once a second, and these steps are shorter
        time.sleep(1)
    if not FAULT or not concerns_this_process() or not reached.startswith(FAULT["at"]):
        return
    what = FAULT["do"]
    FAULT.clear()
    print(f"fault: {what} at {reached}", file=sys.stderr, flush=True)
    if what.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[what])
        if jax.process_count() > 1:
            signaled.set()
    elif what == "raise":
        raise ZeroDivisionError("an injected bug")
    elif what == "hang":
        time.sleep(10_000)


def inject_in_train_step(jit_train_step):
    def make(*args, **options):
        train_step, calls = jit_train_step(*args, **options), 0

        def wrapped(state, *rest):
            nonlocal calls
            calls += 1
            if calls == 1 and FAULT.get("at") == "compile":
                jax.monitoring.register_event_duration_secs_listener(inject_during_compilation)
            if FAULT.get("do") == "nan" and concerns_this_process():
                if FAULT["at"] == f"step {calls}":
                    state = state.replace(params=jax.tree.map(set_to_nan, state.params))
            return train_step(state, *rest)

        return wrapped

    return make


def inject_during_compilation(event, *args, **kwargs):
    """Called after JAX has lowered the program and before XLA compiles it."""
    if event.endswith("jaxpr_to_mlir_module_duration"):
        threading.Timer(0.3, inject, ["compile"]).start()


def set_to_nan(x):
    """Sets an array to NaN on this process only, as a memory failure would."""
    shards = [np.full(s.data.shape, np.nan, x.dtype) for s in x.addressable_shards]
    devices = [s.device for s in x.addressable_shards]
    pieces = [jax.device_put(s, d) for s, d in zip(shards, devices, strict=True)]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, pieces)


if __name__ == "__main__":
    progress, save_async = Watchdog.progress, Checkpoints.save_async
    Watchdog.progress = lambda self, what, **args: inject(what) or progress(self, what, **args)
    Checkpoints.save_async = lambda self, state, step, metrics=None: (
        save_async(self, state, step, metrics) or inject(f"save {step}")
    )
    sharding.jit_train_step = inject_in_train_step(sharding.jit_train_step)
    if FAULT.get("at") == "compile":  # a cached program would not be compiled
        jax.config.update("jax_enable_compilation_cache", False)
    sys.exit(main.main())
