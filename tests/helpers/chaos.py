# SPDX-License-Identifier: Apache-2.0
"""Does to real runs what machines do to them, and checks what is left.

    python tests/helpers/chaos.py                       # every fault once, 1 and 2 processes
    python tests/helpers/chaos.py --only=kills --kills=50  # kill -9 at random moments of one run
    python tests/helpers/chaos.py --only=kills --processes=2  # the same to one of two processes

A run on the digits is disturbed, started again by the same command, and must end with the bytes of
an undisturbed one. The last line on stdout is one JSON object; exit code 1 if a fault was not
survived.
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

from tests.helpers.processes import free_port
from tests.helpers.smoke import SMOKE
from tnt_flax.core.errors import InputError
from tnt_flax.runtime.checkpoints import step_folders
from tnt_flax.tools.command_line import Parser
from tnt_flax.training.metrics import read_metrics_file

KEYS = SMOKE | {"eval.every": "10 steps", "checkpoint.every": "4 steps", "eval.batch_size": 60}
TIMEOUT = 900  # seconds for whatever a process does here; a hang is a failure
FAILURES = (AssertionError, subprocess.SubprocessError)
SETUP = ("data opened", "state ready", "compile")
PHASES = (*SETUP, "step 7 ", "batch 2 of", "save 8")


class Run:
    """The processes of one start of a training run."""

    def __init__(self, workdir, processes=1, fault=None, keys=()):
        flags = ["--config=configs/digits.py", f"--workdir={workdir}"]
        flags += [f"--config.{key}={value}" for key, value in (KEYS | dict(keys)).items()]
        if processes > 1:
            flags += [f"--coordinator=127.0.0.1:{free_port()}", f"--num-processes={processes}"]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "FAULT": json.dumps(fault or {})}
        options = {"cwd": ROOT, "env": env, "stdout": subprocess.PIPE, "text": True}
        self.processes, self.logs = [], []
        for process in range(processes):
            which = [f"--process-id={process}"] if processes > 1 else []
            command = [sys.executable, "tests/helpers/faulty.py", *flags, *which]
            self.logs.append(tempfile.NamedTemporaryFile("a"))
            self.processes.append(subprocess.Popen(command, stderr=self.logs[-1], **options))

    def said(self, process=0):
        """What a process has written to stderr so far."""
        return pathlib.Path(self.logs[process].name).read_text()

    def ended(self):
        """Has one of the processes?"""
        return any(process.poll() is not None for process in self.processes)

    def wait(self, but=None):
        """The exit codes, when all have ended; `but` one that is killed after the others."""
        try:
            for number, process in enumerate(self.processes):
                if number != but:
                    process.wait(TIMEOUT)
        finally:
            self.kill()
        return [process.wait() for process in self.processes]

    def kill(self):
        for process in self.processes:
            process.kill()

    def result(self):
        """What a run that should succeed prints as its last line."""
        codes = self.wait()
        assert not any(codes), f"exit codes {codes}: {self.said()[-2000:]}"
        return json.loads(self.processes[0].stdout.read().splitlines()[-1])


def begun_at(text):
    """The step that a start went on from."""
    found = re.search(r"from step (\d+) to", text)
    return int(found[1]) if found else None


def last_step(text):
    """The last step in the log of a run that tells all."""
    return max(map(int, re.findall(r"^step (\d+)/", text, re.MULTILINE)), default=0)


# --------------------------------------------------------------------------------- the faults


def notice(folder, processes, phase, number, to_all=False):
    """SIGTERM or Ctrl-C to the last process: all save the same step, and leave with 42."""
    which = {} if to_all else {"process": processes - 1}
    run = Run(folder, processes, which | {"at": phase, "do": number})
    codes = run.wait()
    assert codes == [42] * processes, f"{codes}: {run.said()[-2000:]}"
    steps = {re.search(r"stopped: step (\d+) is saved", run.said(p)) for p in range(processes)}
    steps = {int(found[1]) for found in steps if found}
    saved = [int(p.name) for p in step_folders(folder / "checkpoints")]
    if saved:
        assert steps == {saved[-1]}, f"{steps} said, {saved} saved"
    else:
        assert not steps and phase in SETUP
    return 0


def failure(folder, processes, which, do, code, said, at="step 7 "):
    """One process fails: all end, and tell why."""
    keys = {"stall_minutes": 1.0} if do == "hang" else {}
    run = Run(folder, processes, {"process": which, "at": at, "do": do}, keys)
    began = time.monotonic()
    codes = run.wait(but=which if do == "SIGSTOP" else None)
    gone = do in ("SIGKILL", "SIGSTOP")
    texts = [run.said(process) for process in range(processes)]
    for process in range(processes):
        if gone and process == which:
            expected = (-signal.SIGKILL,)
        else:
            expected = (-signal.SIGABRT, code) if gone else (code,)
            assert re.search(said, texts[process]), texts[process][-3000:]
        assert codes[process] in expected, f"{codes}: {texts[process][-3000:]}"
    print(f"    all had ended {time.monotonic() - began:.0f} s after the start", file=sys.stderr)
    saved = [int(p.name) for p in step_folders(folder / "checkpoints")]
    return 7 - max(saved, default=0)


def damage(folder, processes, how):
    """A file of the last checkpoint is damaged: it is named, and the one before is used."""
    run = Run(folder, processes, {"process": 0, "at": "step 9 ", "do": "SIGTERM"})
    assert run.wait() == [42] * processes
    newest = step_folders(folder / "checkpoints")[-1]
    largest = max((newest / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.unlink()
    if how != "delete":
        largest.write_bytes(content if how == "flip" else content[:100])
    run = Run(folder, processes, {"process": 0, "at": "step 9 ", "do": "SIGTERM"})
    assert run.wait() == [42] * processes
    text = run.said()
    assert text.count("is damaged") == 1 and largest.name in text, text
    assert begun_at(text) < int(newest.name)
    return int(newest.name) - begun_at(text)


def full_disk(folder, args):
    """The disk fills up in the run and is cleared again: a save is left out, no step is lost."""
    keys = {"epochs": 8, "checkpoint.every": "20 steps"}
    disk, filler = folder / "disk", folder / "disk" / "filler"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], check=True)
    run = Run(disk, keys=keys)
    try:
        while not step_folders(disk / "checkpoints"):
            assert not run.ended(), run.said()
            time.sleep(0.02)
        kept = step_folders(disk / "checkpoints")[0]
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        while "training continues" not in run.said():
            assert not run.ended(), run.said()[-3000:]
            time.sleep(0.02)
        assert kept.is_dir()
        filler.unlink()
        result = run.result()
        failed = [m.get("checkpoint/failed", 0) for m in read_metrics_file(disk / "metrics.jsonl")]
        assert max(failed) > 0
    finally:
        run.kill()
        subprocess.run(["umount", "-l", str(disk)], check=True)
    whole = Run(folder / "whole", keys=keys).result()
    return {
        "saves_left_out": int(max(failed)),
        "bit_identical": result["fingerprint"] == whole["fingerprint"],
    }


def kills(folder, args):
    """kill -9 of a process at random moments: between two saves, in one, while starting."""
    draw, count, processes = random.Random(args.seed), args.kills, args.processes
    # Enough steps for all the kills, however quick they are.
    keys = {"epochs": 2 * count, "log.every": "1 steps", "eval.every": "1000 epochs"}
    keys |= {"checkpoint.every": "10 steps"}
    damaged, lost = 0, []
    for _ in range(count):
        run = Run(folder / "run", processes, keys=keys)
        while begun_at(run.said()) is None and not run.ended():
            time.sleep(0.02)
        start = begun_at(run.said())
        if lost and start is not None:
            lost[-1] -= start
        # Of five moments one is before the first step, while the run still gets ready.
        if draw.random() < 0.8:
            goal = start + draw.randint(1, 40)
            while last_step(run.said()) < goal and not run.ended():
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 0.1))
        else:
            time.sleep(draw.uniform(0, 1))
        assert not run.ended(), f"ended before it was killed: {run.said()[-1000:]}"
        victim = draw.randrange(processes)
        run.processes[victim].kill()
        codes = run.wait()
        codes.pop(victim)
        assert set(codes) <= {75, -signal.SIGABRT}, f"{codes}: {run.said()[-3000:]}"
        damaged += run.said().count("is damaged")
        lines = read_metrics_file(folder / "run" / "metrics.jsonl")
        lost.append(lines[-1]["step"] if lines else 0)
        print(f"  killed process {victim}: {start} to {lost[-1]}", file=sys.stderr)
    run = Run(folder / "run", processes, keys=keys)
    result = run.result()
    lost[-1] -= begun_at(run.said())
    damaged += run.said().count("is damaged")
    whole = Run(folder / "whole", processes, keys=keys).result()
    return {
        "kills": count,
        "processes": processes,
        "damaged_checkpoints": damaged,
        "most_steps_lost": max(lost),
        "mean_steps_lost": round(sum(lost) / count, 1),
        "bit_identical": result["fingerprint"] == whole["fingerprint"],
    }


def faults():
    """(name, processes, function of the workdir and the number of processes)."""
    dead = "unhealthy|ended the run|connection to another process|coordination service"
    bug = "ZeroDivisionError: an injected bug"
    for which in (1, 0):
        for name, do, code, said in (
            ("kill -9 of", "SIGKILL", 75, dead),
            ("a frozen", "SIGSTOP", 75, dead),
            ("a bug in", "raise", 1, bug),
        ):
            does = lambda f, n, args=(which, do, code, said): failure(f, n, *args)
            yield f"{name} process {which}", 2, does
    nan = r"the loss of step \d+ is nan"
    yield "NaN in process 1", 2, lambda f, n: failure(f, n, 1, "nan", 1, nan, "step 7")
    stalled = r"last: step [78] |ended the run"
    for processes in (1, 2):
        for phase in PHASES:
            for number in ("SIGTERM", "SIGINT") if phase == "step 7 " else ("SIGTERM",):
                does = lambda f, n, phase=phase, number=number: notice(f, n, phase, number)
                yield f"{number} at {phase.strip()}", processes, does
        if processes > 1:
            to_all = lambda f, n: notice(f, n, "step 7 ", "SIGTERM", to_all=True)
            yield "SIGTERM to all at step 7", processes, to_all
        for how in ("flip", "truncate", "delete"):
            yield f"{how} a file", processes, lambda f, n, how=how: damage(f, n, how)
        yield "a hang", processes, lambda f, n: failure(f, n, n - 1, "hang", 75, stalled)


def try_all(only):
    """Each fault in a run of its own; the table of what became of it."""
    table, whole = [], {}
    for name, processes, disturb in faults():
        if not re.search(only, f"{name}, {processes}"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            if processes not in whole:
                whole[processes] = Run(folder / "whole", processes).result()["fingerprint"]
            row = {"fault": name, "processes": processes, "survived": False}
            try:
                row["steps_lost"] = disturb(folder / "run", processes)
                again = Run(folder / "run", processes).result()["fingerprint"]
                row["bit_identical"] = row["survived"] = again == whole[processes]
            except FAILURES as error:
                row["why"] = str(error)
        table.append(row)
        print(f"  {json.dumps(row)}", file=sys.stderr)
    return table


def main(argv):
    parser = Parser("python tests/helpers/chaos.py", __doc__)
    parser.add_argument(
        "--only", default="", help="a pattern for NAME, PROCESSES; or: kills; or: full disk"
    )
    parser.add_argument("--kills", type=int, default=3, help="how often one run is killed")
    parser.add_argument("--processes", type=int, default=1, help="of the run that is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args(argv)
    others = {"kills": kills, "full disk": full_disk}
    if args.only in ("", "full disk") and os.geteuid():
        raise InputError("a full disk needs root, who may mount a small file system: use --only")
    table = [] if args.only in others else try_all(args.only)
    if not table and args.only not in others:
        raise InputError(f"--only={args.only} matches no fault")
    result = {}
    for name, disturb in others.items():
        if args.only in ("", name):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    result[name] = disturb(pathlib.Path(folder), args)
                except FAILURES as error:
                    result[name] = {"bit_identical": False, "why": str(error)}
    result |= {"faults": len(table), "survived": sum(row["survived"] for row in table)}
    result["most_steps_lost"] = max((row.get("steps_lost", 0) for row in table), default=0)
    result["bit_identical"] = sum(row.get("bit_identical", False) for row in table)
    print(json.dumps(result))
    fine = result["survived"] == len(table)
    fine &= all(part["bit_identical"] for part in result.values() if isinstance(part, dict))
    return 0 if fine and not result.get("kills", {}).get("damaged_checkpoints") else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
