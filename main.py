# SPDX-License-Identifier: Apache-2.0
"""Trains or evaluates TNT: `tnt_flax.training.train` and `tnt_flax.training.evaluate`.

    python main.py --config=configs/digits.py --workdir=runs/digits
    python main.py --config=configs/digits.py --workdir=runs/digits --mode=eval

On several hosts, start the same command on each. Processes find each other through a launcher that
JAX knows (Slurm, Kubernetes, Cloud TPU) or through --coordinator, --num-processes and --process-id.
The last line on stdout (of process 0) is one JSON object; progress goes to stderr.
Exit codes: 1 the run failed, 2 bad input, 42 stopped by SIGTERM or Ctrl-C, 75 a process hangs or is
gone. After 42 and 75 the same command resumes from the last checkpoint.
"""

import argparse
import pathlib
import sys
from typing import Any

from tnt_flax.core.errors import InputError
from tnt_flax.runtime import host, processes
from tnt_flax.tools import command_line


def make_parser() -> command_line.Parser:
    parser = command_line.Parser("python main.py", __doc__, takes_config=True)
    add = parser.add_argument
    add("--workdir", type=pathlib.Path, help="folder of the run: checkpoints, logs, plots")
    add("--mode", choices=["train", "eval"], default="train")
    add(
        "--checkpoint",
        default="best",
        help="weights for --mode=eval: best or last of the workdir, a weights file of any "
        "framework, another workdir, the folder of one checkpoint, or hf://OWNER/NAME",
    )
    add("--per-class", metavar="FILE", help="table of --mode=eval: .csv, .jsonl or .parquet")
    add("--coordinator", metavar="HOST:PORT", help="address of process 0")
    add("--num-processes", type=command_line.positive, help="number of processes")
    add("--process-id", type=int, help="number of this process, from 0")
    add(
        "--start-timeout",
        type=command_line.positive,
        default=300,
        help="seconds to wait for the other processes",
    )
    return parser


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    host.keep_memory()
    host.cache_compilations()
    workdir = args.workdir and args.workdir.resolve()
    processes.start(
        args.coordinator,
        args.num_processes,
        args.process_id,
        timeout=args.start_timeout,
        rendezvous_dir=workdir,
    )
    # The imports below initialize JAX's backend, which must not happen before `processes.start`.
    if args.mode == "eval":
        from tnt_flax.training.evaluate import evaluate_checkpoint

        result = evaluate_checkpoint(args.config, workdir, args.checkpoint, args.per_class)
    else:
        from tnt_flax.training.train import train_and_evaluate

        if workdir is None:
            raise InputError("training needs --workdir=FOLDER")
        result = train_and_evaluate(args.config, workdir)
    return result if processes.is_main_process() else None


def main(argv: list[str] | None = None) -> int:
    on_interrupt = "resume from the last checkpoint with the same command"
    return command_line.run(make_parser(), run, argv, on_interrupt=on_interrupt)


if __name__ == "__main__":
    sys.exit(main())
