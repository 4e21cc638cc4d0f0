# SPDX-License-Identifier: Apache-2.0
"""Trains a network, or resumes a run from its last checkpoint.

    tnt-flax train --config=digits --workdir=runs/digits
    tnt-flax train --config=tnt_s --workdir=runs/tnt_s --config.data.root=IMAGENET

On several hosts, start the same command on each. Processes find each other through a launcher that
JAX knows (Slurm, Kubernetes, Cloud TPU) or through --coordinator, --num-processes and --process-id.
The last line on stdout (of process 0) is one JSON object; progress goes to stderr.
Exit codes: 1 the run failed, 2 bad input, 42 stopped by SIGTERM or Ctrl-C, 75 a process hangs or is
gone. After 42 and 75 the same command resumes from the last checkpoint.
"""

import argparse
import pathlib
from typing import Any

from tnt_flax.core.errors import InputError
from tnt_flax.runtime import host, processes
from tnt_flax.runtime.workdir import check_is_folder
from tnt_flax.tools.command_line import Parser, positive

ON_INTERRUPT = "resume from the last checkpoint with the same command"


def add_arguments(parser: Parser) -> None:
    parser.add_config()
    add = parser.add_argument
    add("--workdir", type=pathlib.Path, help="folder of the run: checkpoints, logs, plots")
    add("--coordinator", metavar="HOST:PORT", help="address of process 0")
    add("--num-processes", type=positive, metavar="N", help="number of processes")
    add("--process-id", type=int, metavar="N", help="number of this process, from 0")
    add(
        "--start-timeout",
        type=positive,
        default=300,
        metavar="SECONDS",
        help="time to wait for the other processes",
    )


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    start_processes(args)
    # Imported late: no import may initialize JAX's backend before `processes.start`.
    from tnt_flax.training.train import train_and_evaluate

    if args.workdir is None:
        raise InputError("training needs --workdir=FOLDER")
    result = train_and_evaluate(args.config, args.workdir, owns_process=True)
    return result if processes.is_main_process() else None


def start_processes(args: argparse.Namespace) -> None:
    """Sets up this process and connects it with the others; makes `args.workdir` absolute."""
    if args.workdir:
        check_is_folder(args.workdir)
    host.keep_memory()
    host.cache_compilations()
    args.workdir = args.workdir and args.workdir.resolve()
    processes.start(
        args.coordinator,
        args.num_processes,
        args.process_id,
        timeout=args.start_timeout,
        rendezvous_dir=args.workdir,
    )
