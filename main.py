# SPDX-License-Identifier: Apache-2.0
"""Trains or evaluates TNT; see `tnt_flax.training.train` and `.evaluate`.

    python main.py --config=configs/digits.py --workdir=runs/digits
    python main.py --config=configs/digits.py --workdir=runs/digits --mode=eval

Any key of the config can be set: --config.batch_size=96. On many hosts the same command runs on
each: a launcher that JAX knows tells them of each other, or --coordinator, --num_processes and
--process_id do. The last line on stdout (of process 0) is one JSON object; progress goes to stderr.
Exit codes: 1 the run failed, 2 bad input, 42 told to stop (SIGTERM, Ctrl-C), 75 something hung or
another process is gone; after the last two the same command goes on where it was.
"""

import json
import pathlib

from absl import app, flags, logging

from tnt_flax.core.errors import InputError
from tnt_flax.runtime import host, processes
from tnt_flax.tools import command_line
from tnt_flax.tools.command_line import CONFIG

flags.adopt_module_key_flags(command_line)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder of the run: checkpoints, logs, pictures."
)
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "What to do.")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    "best",
    "What --mode=eval evaluates: best or last of the workdir, or weights of any system: a file, a "
    "workdir, the folder of one checkpoint, hf://OWNER/NAME.",
)
# Of a run of many processes that no launcher known to JAX has started.
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which this one is, from 0.", lower_bound=0)
START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1
)

PER_CLASS = flags.DEFINE_string(
    "per_class", None, "With --mode=eval, a table to write: .csv, .jsonl or .parquet."
)


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.ERROR)  # Orbax's warnings are for its developers
    host.keep_memory()
    host.cache_compilations()
    workdir = pathlib.Path(WORKDIR.value).resolve() if WORKDIR.value else None
    with command_line.exit_on_error("the same command goes on from the last checkpoint"):
        processes.start(
            COORDINATOR.value,
            NUM_PROCESSES.value,
            PROCESS_ID.value,
            timeout=START_TIMEOUT.value,
            meeting=workdir,
        )
        if MODE.value == "eval":
            from tnt_flax.training.evaluate import evaluate_checkpoint

            result = evaluate_checkpoint(CONFIG.value, workdir, CHECKPOINT.value, PER_CLASS.value)
        else:
            from tnt_flax.training.train import train_and_evaluate

            if workdir is None:
                raise InputError("training needs --workdir=FOLDER")
            result = train_and_evaluate(CONFIG.value, workdir)
    if processes.is_main():
        print(json.dumps(result))


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
