# SPDX-License-Identifier: Apache-2.0
"""Evaluates weights on the evaluation split of a config.

    tnt-flax eval --config=digits --workdir=runs/digits
    tnt-flax eval --config=imagenet_variants:v2 --config.data.root=FOLDER \\
        --checkpoint=tnt_s_81.5.pth.tar --per-class=classes.csv

Every image counts once, on any number of devices and hosts (see `tnt-flax train` for several).
The last line on stdout (of process 0) is one JSON object. Exit code 1 means that the evaluation
failed, 2 that the input was wrong.
"""

import argparse
from typing import Any

from tnt_flax.runtime import processes
from tnt_flax.tools import train
from tnt_flax.tools.command_line import Parser


def add_arguments(parser: Parser) -> None:
    train.add_arguments(parser)
    add = parser.add_argument
    add(
        "--checkpoint",
        default="best",
        help="best or last of the workdir, a weights file of any framework, another workdir, the "
        "folder of one checkpoint, or hf://OWNER/NAME",
    )
    add("--per-class", metavar="FILE", help="table of classes: .csv, .jsonl or .parquet")


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    train.start_processes(args)
    # Imported late: no import may initialize JAX's backend before `processes.start`.
    from tnt_flax.training.evaluate import evaluate_checkpoint

    result = evaluate_checkpoint(
        args.config, args.workdir, args.checkpoint, args.per_class, owns_process=True
    )
    return result if processes.is_main_process() else None
