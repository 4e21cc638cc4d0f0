# SPDX-License-Identifier: Apache-2.0
"""Does to real runs what machines do to them, and checks what is left.

    python tests/chaos.py                          # every fault once, in runs of 1 and 2 processes
    python tests/chaos.py --only=kills --kills=50  # kill -9 at random moments of one run

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

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # imports below: E402 in pyproject.toml

from processes import free_port
from smoke import SMOKE

from tnt_flax.checkpoint import step_folders
from tnt_flax.command import Parser
from tnt_flax.errors import InputError
from tnt_flax.metrics import read_metrics_file

KEYS = SMOKE | {"eval.every": "10 steps", "checkpoint.every": "4 steps", "eval.batch_size": 60}
TIMEOUT = 900  # seconds for whatever a process does here; a hang is a failure
PHASES = ("the open data set", "compile", "step 7 ", "batch 2 of", "save 8")


class Run:
    """The processes of one start of a training run."""

    def __init__(self, workdir, processes=1, fault=None, keys=(), program="tests/faulty.py"):
        self.workdir = pathlib.Path(workdir)
        flags = ["--config=configs/digits.py", f"--workdir={workdir}"]
        flags += [f"--config.{key}={value}" for key, value in (KEYS | dict(keys)).items()]
        if processes > 1:
            flags += [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={processes}"]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "FAULT": json.dumps(fault or {})}
        self.processes, self.logs = [], []
        for process in range(processes):
            which = [f"--process_id={process}"] if processes > 1 else []
            self.logs.append(tempfile.NamedTemporaryFile("a"))
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, program, *flags, *which],
                    cwd=ROOT,
                    env=env,
                    stdout=subprocess.PIPE,
                    stderr=self.logs[-1],
                    text=True,
                )
            )

    def said(self, process=0):
        """What a process has written to stderr so far."""
        return pathlib.Path(self.logs[process].name).read_text()

    def wait(self):
        """The exit codes, when all have ended."""
        try:
            return [process.wait(TIMEOUT) for process in self.processes]
        finally:
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


def notice(folder, processes, phase, number):
    """SIGTERM or Ctrl-C to the last process: all save the same step, and leave with 42."""
    run = Run(folder, processes, {"process": processes - 1, "at": phase, "do": number})
    codes = run.wait()
    assert codes == [42] * processes, f"{codes}: {run.said()[-2000:]}"
    steps = {re.search(r"stopped: step (\d+) is saved", run.said(p)) for p in range(processes)}
    steps = {int(found[1]) for found in steps if found}
    saved = [int(p.name) for p in step_folders(folder / "checkpoints")]
    if saved:
        assert steps == {saved[-1]}, f"{steps} said, {saved} saved"
    else:
        assert not steps and phase in PHASES[:2]
    return 0  # steps lost


def failure(folder, processes, which, do, code, said, at="step 7 "):
    """One process fails: all end, and tell why."""
    keys = {"stall_minutes": 1.0} if do == "hang" else {}
    run = Run(folder, processes, {"process": which, "at": at, "do": do}, keys)
    began = time.monotonic()
    codes = run.wait()
    texts = [run.said(process) for process in range(processes)]
    for process in range(processes):
        if do == "SIGKILL":
            expected = (-signal.SIGKILL,) if process == which else (-signal.SIGABRT, code)
        else:
            expected = (code,)
        assert codes[process] in expected, f"{codes}: {texts[process][-3000:]}"
        if do != "SIGKILL" or process != which:
            assert re.search(said, texts[process]), texts[process][-3000:]
    print(f"    all had ended {time.monotonic() - began:.0f} s after the start", file=sys.stderr)
    saved = [int(p.name) for p in step_folders(folder / "checkpoints")]
    return 7 - max(saved, default=0)


def damage(folder, processes, how):
    """A file of the last checkpoint is damaged: it is named, and the one before is used."""
    run = Run(folder, processes, {"process": 0, "at": "step 9 ", "do": "SIGTERM"})
    assert run.wait() == [42] * processes
    newest = step_folders(folder / "checkpoints")[-1]
    arrays = sorted((newest / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(arrays[-1].read_bytes())
    content[len(content) // 2] ^= 1
    arrays[-1].write_bytes({"flip": content, "truncate": content[:100], "delete": b""}[how])
    if how == "delete":
        arrays[-1].unlink()
    run = Run(folder, processes, {"process": 0, "at": "step 9 ", "do": "SIGTERM"})
    assert run.wait() == [42] * processes
    text = run.said()
    assert text.count("is damaged") == 1 and arrays[-1].name in text, text
    assert begun_at(text) < int(newest.name)
    return int(newest.name) - begun_at(text)


def full_disk(folder, processes):
    """The disk fills up in the run and is cleared again: a save is left out, no step is lost."""
    folder.mkdir()
    run = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(run).returncode:
        raise InputError("a full disk needs root, who may mount a small file system: use --only")
    filler = folder / "filler"
    run = Run(folder, processes, keys={"epochs": 8, "checkpoint.every": "20 steps"})
    try:
        while not step_folders(folder / "checkpoints"):
            assert run.processes[0].poll() is None, run.said()
            time.sleep(0.02)
        kept = step_folders(folder / "checkpoints")[0]
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        while "training goes on" not in run.said():
            assert run.processes[0].poll() is None, run.said()[-3000:]
            time.sleep(0.02)
        assert kept.is_dir()
        filler.unlink()
        result = run.result()
        lines = read_metrics_file(folder / "metrics.jsonl")
        assert any(m.get("checkpoint/failed") for m in lines)
    finally:
        run.wait()
        subprocess.run(["umount", "-l", str(folder)], check=True)
    return result["fingerprint"]


def kills(folder, count, seed):
    """kill -9 at random moments: between two saves, while one is in flight, while starting."""
    draw = random.Random(seed)
    keys = {"epochs": 40, "log.every": "1 steps", "eval.every": "9 epochs"}
    keys |= {"checkpoint.every": "10 steps"}
    damaged, lost = 0, []
    for _ in range(count):
        run = Run(folder, keys=keys)
        while begun_at(run.said()) is None and run.processes[0].poll() is None:
            time.sleep(0.02)
        start = begun_at(run.said())
        if lost and start is not None:
            lost[-1] -= start
        # Of five moments one is before the first step, while the run still gets ready.
        if draw.random() < 0.8:
            goal = start + draw.randint(1, 40)
            while last_step(run.said()) < goal and run.processes[0].poll() is None:
                time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.5))
        assert run.processes[0].poll() is None, f"ended before it was killed: {run.said()[-1000:]}"
        run.processes[0].kill()
        run.wait()
        damaged += run.said().count("is damaged")
        lines = read_metrics_file(folder / "metrics.jsonl")
        lost.append(lines[-1]["step"] if lines else 0)
        print(f"  killed after step {lost[-1]}, which had begun at {start}", file=sys.stderr)
    run = Run(folder, keys=keys)
    result = run.result()
    lost[-1] -= begun_at(run.said())
    damaged += run.said().count("is damaged")
    with tempfile.TemporaryDirectory() as other:
        whole = Run(other, keys=keys | {"checkpoint.every": "1000 steps"}).result()
    return {
        "kills": count,
        "damaged_checkpoints": damaged,
        "most_steps_lost": max(lost),
        "mean_steps_lost": round(sum(lost) / count, 1),
        "bit_identical": result["fingerprint"] == whole["fingerprint"],
    }


def faults():
    """(name, processes, function of the workdir and the number of processes)."""
    dead = (
        "unhealthy|has ended the run|the connection to another process broke|coordination service"
    )
    yield "kill -9 of process 1", 2, lambda f, n: failure(f, n, 1, "SIGKILL", 75, dead)
    nan = r"the loss of step \d+ is nan"
    yield "NaN in process 1", 2, lambda f, n: failure(f, n, 1, "nan", 1, nan, "step 7")
    yield "kill -9 of process 0", 2, lambda f, n: failure(f, n, 0, "SIGKILL", 75, dead)
    bug = "ZeroDivisionError: an injected bug"
    yield "a bug in process 1", 2, lambda f, n: failure(f, n, 1, "raise", 1, bug)
    yield "a bug in process 0", 2, lambda f, n: failure(f, n, 0, "raise", 1, bug)
    for processes in (1, 2):
        for phase in PHASES:
            for number in ("SIGTERM", "SIGINT") if phase == "step 7 " else ("SIGTERM",):
                does = lambda f, n, phase=phase, number=number: notice(f, n, phase, number)
                yield f"{number} at {phase.strip()}", processes, does
        for how in ("flip", "truncate", "delete"):
            yield f"{how} a file", processes, lambda f, n, how=how: damage(f, n, how)
        stall = lambda f, n: failure(f, n, n - 1, "hang", 75, "no further than|has ended the run")
        yield "a hang", processes, stall


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
            except (AssertionError, subprocess.TimeoutExpired) as error:
                row["why"] = str(error)
        table.append(row)
        print(f"  {json.dumps(row)}", file=sys.stderr)
    return table


def main(argv):
    parser = Parser("python tests/chaos.py", __doc__)
    parser.add_argument(
        "--only", default="", help="a pattern for NAME, PROCESSES; or: kills; or: full disk"
    )
    parser.add_argument("--kills", type=int, default=3, help="how often one run is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args(argv)
    result, table = {}, []
    if args.only not in ("kills", "full disk"):
        table = try_all(args.only)
    if args.only in ("", "kills"):
        with tempfile.TemporaryDirectory() as folder:
            result["kills"] = kills(pathlib.Path(folder), args.kills, args.seed)
    if args.only in ("", "full disk"):
        with tempfile.TemporaryDirectory() as folder:
            ended = full_disk(pathlib.Path(folder) / "run", 1)
            other = Run(pathlib.Path(folder) / "whole", keys={"epochs": 8}).result()["fingerprint"]
            result["full_disk"] = {"bit_identical": ended == other}
    result["faults"] = len(table)
    result["survived"] = sum(row["survived"] for row in table)
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
