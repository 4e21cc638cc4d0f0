# SPDX-License-Identifier: Apache-2.0
"""Trains or evaluates TNT. Kept short: what it does lives in `tnt_flax.train` and `.evaluate`.

    python main.py --config=configs/digits.py --workdir=runs/digits
    python main.py --config=configs/digits.py --workdir=runs/digits --mode=eval

Any key of the config can be set: --config.batch_size=96. The last line on stdout is one JSON
object; progress goes to stderr. Exit code 1 is a run that failed, 2 is bad input.
"""

import json
import pathlib

from absl import app, flags, logging

from tnt_flax import command, host
from tnt_flax.command import CONFIG
from tnt_flax.errors import InputError

flags.adopt_module_key_flags(command)
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

PER_CLASS = flags.DEFINE_string(
    "per_class", None, "With --mode=eval, a table to write: .csv, .jsonl or .parquet."
)


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.ERROR)  # Orbax's warnings are for its developers
    host.keep_memory()
    host.cache_compilations()
    workdir = pathlib.Path(WORKDIR.value).resolve() if WORKDIR.value else None
    with command.exit_on_error("the same command goes on from the last checkpoint"):
        if MODE.value == "eval":
            from tnt_flax.evaluate import evaluate_checkpoint

            result = evaluate_checkpoint(CONFIG.value, workdir, CHECKPOINT.value, PER_CLASS.value)
        else:
            from tnt_flax.train import train_and_evaluate

            if workdir is None:
                raise InputError("training needs --workdir=FOLDER")
            result = train_and_evaluate(CONFIG.value, workdir)
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main, flags_parser=command.parse_flags)
