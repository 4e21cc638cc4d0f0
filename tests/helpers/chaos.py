# SPDX-License-Identifier: Apache-2.0
"""Injects faults into real runs and checks that they resume to a bit-identical end.

    python tests/helpers/chaos.py    # every fault once, in runs of 1 and 2 processes
    python tests/helpers/chaos.py --only=kills --kills=50     # kill -9 of one run at random times
    python tests/helpers/chaos.py --only=kills --processes=2  # the same for one of two processes
    python tests/helpers/chaos.py --only=kills --platform=cuda  # on a GPU, with deterministic=True

A run on the digits is interrupted by a fault and restarted with the same command. It must end
bit-identical to an uninterrupted run. The last line on stdout is one JSON object. The exit code is
1 if a run did not survive a fault.
"""

import contextlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # imports below: E402 in pyproject.toml

from configs import default
from tests.helpers.processes import start
from tests.helpers.smoke import SMOKE
from tnt_flax.core.errors import InputError
from tnt_flax.runtime.checkpoints import step_folders
from tnt_flax.tools.command_line import Parser
from tnt_flax.training.metrics import read_metrics_file

# All random functions: the published augmentation, and drop path.
KEYS = SMOKE | {f"augment.{key}": value for key, value in default.get_config().augment.items()}
KEYS |= {"model.drop_path": 0.2, "eval.every": "10 steps", "checkpoint.every": "4 steps"}
KEYS |= {"eval.batch_size": 60}
TIMEOUT = 900  # seconds after which a process counts as hung, which is a failure
FAILURES = (AssertionError, subprocess.SubprocessError)
SETUP = ("data opened", "state ready", "compile")
PHASES = (*SETUP, "step 7 ", "batch 2 of", "save 8")


class Run:
    """The processes of one start of a training run; see faulty.py for `fault`."""

    platform = "cpu"  # JAX's name; elsewhere, each process gets one device and deterministic steps

    def __init__(self, workdir, count=1, fault=None, keys=(), devices=1):
        keys = KEYS | {"deterministic": self.platform != "cpu"} | dict(keys)
        flags = [f"--config.{key}={value}" for key, value in keys.items()]
        env = {"JAX_PLATFORMS": self.platform, "FAULT": json.dumps(fault or {})}
        self.logs = [pathlib.Path(f"{workdir}.{process}.log") for process in range(count)]
        program = "tests/helpers/faulty.py"
        with contextlib.ExitStack() as stack:
            logs = [stack.enter_context(open(path, "w")) for path in self.logs]
            self.processes = start(ROOT, workdir, flags, count, devices, program, env, logs)

    def log(self, process=0):
        """Returns what a process has written to stderr so far."""
        return self.logs[process].read_text()

    def wait_until(self, condition):
        """Returns when `condition(log)` is true; fails if a process exits before."""
        while not condition(self.log()):
            codes = [process.poll() for process in self.processes]
            assert codes == [None] * len(codes), f"exit codes {codes}: {self.log()[-3000:]}"
            time.sleep(0.02)

    def wait(self, frozen=None):
        """Returns the exit codes of all processes; kills process `frozen` after the others."""
        try:
            for number, process in enumerate(self.processes):
                if number != frozen:
                    process.wait(TIMEOUT)
        finally:
            self.kill()
        self.outputs = [process.communicate()[0] for process in self.processes]
        return [process.returncode for process in self.processes]

    def kill(self):
        for process in self.processes:
            process.kill()

    def result(self):
        """Returns the JSON object that a successful run prints last."""
        codes = self.wait()
        assert not any(codes), f"exit codes {codes}: {self.log()[-2000:]}"
        return json.loads(self.outputs[0].splitlines()[-1])


def start_step(text):
    """Returns the step from which a run started, by its log; None if it has not."""
    found = re.search(r"from step (\d+) to", text)
    return int(found[1]) if found else None


def last_step(text):
    """Returns the last step in the log of a run with log.every="1 steps"."""
    return max(map(int, re.findall(r"^step (\d+)/", text, re.MULTILINE)), default=0)


# ------------------------------------------------------------------------------------- faults


def preemption(folder, processes, phase, number, to_all=False):
    """SIGTERM or Ctrl-C to the last process: all save the same step and exit with 42."""
    target = {} if to_all else {"process": processes - 1}
    run = Run(folder, processes, target | {"at": phase, "do": number})
    codes = run.wait()
    assert codes == [42] * processes, f"{codes}: {run.log()[-2000:]}"
    steps = {re.search(r"stopped: step (\d+) is saved", run.log(p)) for p in range(processes)}
    steps = {int(found[1]) for found in steps if found}
    saved = [int(p.name) for p in step_folders(folder / "checkpoints")]
    if saved:
        assert steps == {saved[-1]}, f"{steps} logged, {saved} saved"
    else:
        assert not steps and phase in SETUP
    return 0


def failure(folder, processes, which, do, code, message, at="step 7 "):
    """One process fails: all exit and log the cause."""
    keys = {"stall_minutes": 1.0} if do == "hang" else {}
    run = Run(folder, processes, {"process": which, "at": at, "do": do}, keys)
    start = time.monotonic()
    codes = run.wait(frozen=which if do == "SIGSTOP" else None)
    killed = do in ("SIGKILL", "SIGSTOP")
    texts = [run.log(process) for process in range(processes)]
    for process in range(processes):
        if killed and process == which:
            expected = (-signal.SIGKILL,)
        else:
            expected = (-signal.SIGABRT, code) if killed else (code,)
            assert re.search(message, texts[process]), texts[process][-3000:]
        assert codes[process] in expected, f"{codes}: {texts[process][-3000:]}"
    print(f"    all had exited {time.monotonic() - start:.0f} s after the start", file=sys.stderr)
    saved = [int(p.name) for p in step_folders(folder / "checkpoints")]
    return 7 - max(saved, default=0)


def damage(folder, processes, kind):
    """A file of the last checkpoint is damaged: it is reported and the previous one is used."""
    run = Run(folder, processes, {"process": 0, "at": "step 9 ", "do": "SIGTERM"})
    assert run.wait() == [42] * processes
    newest = step_folders(folder / "checkpoints")[-1]
    largest = max((newest / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.unlink()
    if kind != "delete":
        largest.write_bytes(content if kind == "flip" else content[:100])
    run = Run(folder, processes, {"process": 0, "at": "step 9 ", "do": "SIGTERM"})
    assert run.wait() == [42] * processes
    text = run.log()
    assert text.count("is damaged") == 1 and largest.name in text, text
    assert start_step(text) < int(newest.name)
    return int(newest.name) - start_step(text)


def full_disk(folder, args):
    """The disk is full for a while: saves are skipped, no step is lost."""
    keys = {"epochs": 8, "checkpoint.every": "20 steps"}
    disk, filler = folder / "disk", folder / "disk" / "filler"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], check=True)
    run = Run(disk, keys=keys)
    try:
        run.wait_until(lambda log: step_folders(disk / "checkpoints"))
        kept = step_folders(disk / "checkpoints")[0]
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        run.wait_until(lambda log: "training continues" in log)
        assert kept.is_dir()
        filler.unlink()
        result = run.result()
        failed = [m.get("checkpoint/failed", 0) for m in read_metrics_file(disk / "metrics.jsonl")]
        assert max(failed) > 0
    finally:
        run.kill()
        subprocess.run(["umount", "-l", str(disk)], check=True)
    whole = Run(folder / "whole", keys=keys).result()
    return {"skipped_saves": int(max(failed)), "bit_identical": result == whole}


def kills(folder, args):
    """kill -9 of a process at random times: between saves, during a save, during the start."""
    rng, count, processes = random.Random(args.seed), args.kills, args.processes
    # Enough steps for all kills.
    keys = {"epochs": 2 * count, "log.every": "1 steps", "eval.every": "1000 epochs"}
    keys |= {"checkpoint.every": "10 steps"}
    damaged, lost = 0, []
    for _ in range(count):
        run = Run(folder / "run", processes, keys=keys)
        run.wait_until(lambda log: start_step(log) is not None)
        begin = start_step(run.log())
        if lost:
            lost[-1] -= begin
        training = rng.random() < 0.8  # one kill in five comes during compilation
        goal = begin + rng.randint(1, 40) if training else 0
        run.wait_until(lambda log, goal=goal: last_step(log) >= goal)
        time.sleep(rng.uniform(0, 0.1 if training else 1))
        victim = rng.randrange(processes)
        run.processes[victim].kill()
        codes = run.wait()
        codes.pop(victim)
        assert set(codes) <= {75, -signal.SIGABRT}, f"{codes}: {run.log()[-3000:]}"
        damaged += run.log().count("is damaged")
        lines = read_metrics_file(folder / "run" / "metrics.jsonl")
        lost.append(lines[-1]["step"] if lines else 0)
        print(f"  killed process {victim}: {begin} to {lost[-1]}", file=sys.stderr)
    run = Run(folder / "run", processes, keys=keys)
    result = run.result()
    lost[-1] -= start_step(run.log())
    damaged += run.log().count("is damaged")
    whole = Run(folder / "whole", processes, keys=keys).result()
    return {
        "kills": count,
        "processes": processes,
        "damaged_checkpoints": damaged,
        "most_steps_lost": max(lost),
        "mean_steps_lost": round(sum(lost) / count, 1),
        "bit_identical": result == whole and not damaged,
    }


def faults():
    """Yields (name, number of processes, function(workdir, number of processes))."""

    def fault(inject, *args, **kwargs):
        return lambda folder, processes: inject(folder, processes, *args, **kwargs)

    dead = "unhealthy|ended the run|connection to another process|coordination service"
    bug = "ZeroDivisionError: an injected bug"
    for which in (1, 0):
        yield f"kill -9 of process {which}", 2, fault(failure, which, "SIGKILL", 75, dead)
        yield f"a frozen process {which}", 2, fault(failure, which, "SIGSTOP", 75, dead)
        yield f"a bug in process {which}", 2, fault(failure, which, "raise", 1, bug)
    nan = r"the loss of step \d+ is nan"
    yield "NaN in process 1", 2, fault(failure, 1, "nan", 1, nan, at="step 7")
    stalled = r"last: step [78] |ended the run"
    for processes in (1, 2):
        for phase in PHASES:
            yield f"SIGTERM at {phase.strip()}", processes, fault(preemption, phase, "SIGTERM")
        for number in ("SIGINT", "SIGHUP", "SIGUSR1"):
            yield f"{number} at step 7", processes, fault(preemption, "step 7 ", number)
        if processes > 1:
            to_all = fault(preemption, "step 7 ", "SIGTERM", to_all=True)
            yield "SIGTERM to all at step 7", processes, to_all
        for kind in ("flip", "truncate", "delete"):
            yield f"{kind} a file", processes, fault(damage, kind)
        yield "a hang", processes, fault(failure, processes - 1, "hang", 75, stalled)


def try_all(only):
    """Injects each fault whose name matches `only` into a run of its own; returns the results."""
    table, whole = [], {}
    for name, processes, inject in faults():
        if not re.search(only, f"{name}, {processes}"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            if processes not in whole:
                whole[processes] = Run(folder / "whole", processes).result()
            row = {"fault": name, "processes": processes, "bit_identical": False}
            try:
                row["steps_lost"] = inject(folder / "run", processes)
                row["bit_identical"] = Run(folder / "run", processes).result() == whole[processes]
            except FAILURES as error:
                row["error"] = str(error)
        table.append(row)
        print(f"  {json.dumps(row)}", file=sys.stderr)
    return table


def main(argv):
    parser = Parser("python tests/helpers/chaos.py", __doc__)
    parser.add_argument(
        "--only", default="", help="regex for NAME, PROCESSES; or: kills; or: full disk"
    )
    parser.add_argument("--kills", type=int, default=3, help="number of kills")
    parser.add_argument("--processes", type=int, default=1, help="number of processes of that run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills")
    parser.add_argument("--platform", default="cpu", help="cpu, cuda or tpu, as JAX names it")
    args = parser.parse_args(argv)
    Run.platform = args.platform
    others = {"kills": kills, "full disk": full_disk}
    if args.only in ("", "full disk") and os.geteuid():
        raise InputError("a full disk needs root to mount a small file system: use --only")
    table = [] if args.only in others else try_all(args.only)
    if not table and args.only not in others:
        raise InputError(f"--only={args.only} matches no fault")
    result = {}
    for name, inject in others.items():
        if args.only in ("", name):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    result[name] = inject(pathlib.Path(folder), args)
                except FAILURES as error:
                    result[name] = {"bit_identical": False, "error": str(error)}
    passed = all(row["bit_identical"] for row in [*table, *result.values()])
    result |= {"faults": len(table), "bit_identical": sum(row["bit_identical"] for row in table)}
    result["most_steps_lost"] = max((row.get("steps_lost", 0) for row in table), default=0)
    print(json.dumps(result))
    return 0 if passed else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
