# SPDX-License-Identifier: Apache-2.0
"""Trains or evaluates TNT. Kept short: what it does lives in `tnt_flax.train` and `.evaluate`.

    python main.py --config=configs/digits.py --workdir=runs/digits
    python main.py --config=configs/digits.py --workdir=runs/digits --mode=eval

Any key of the config can be set: --config.batch_size=96. The last line on stdout is one JSON
object; progress goes to stderr. Exit code 1 is a run that failed, 2 is bad input.
"""

import json
import pathlib
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from tnt_flax.errors import InputError, RunError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file with get_config(), such as configs/tnt_s.py.", lock_config=True
)
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


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.ERROR)  # Orbax's warnings are for its developers
    workdir = pathlib.Path(WORKDIR.value).resolve() if WORKDIR.value else None
    try:
        if MODE.value == "eval":
            from tnt_flax.evaluate import evaluate_checkpoint

            result = evaluate_checkpoint(CONFIG.value, workdir, CHECKPOINT.value)
        else:
            from tnt_flax.train import train_and_evaluate

            if workdir is None:
                raise InputError("training needs --workdir=FOLDER")
            result = train_and_evaluate(CONFIG.value, workdir)
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    print(json.dumps(result))


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with one line instead of a traceback for what the user got wrong."""
    try:
        rest = flags.FLAGS(argv, known_only=False)
        if len(rest) > 1:
            raise InputError(f"unexpected argument {rest[1]!r}: flags look like --name=value")
        if CONFIG.value is None and not flags.FLAGS["help"].value:
            raise InputError("--config=FILE is missing, for instance --config=configs/digits.py")
        file = config_flags.get_config_filename(flags.FLAGS["config"])
        file = file and file.partition(":")[0]  # after the colon comes what get_config() is given
        if file and not pathlib.Path(file).is_file():
            raise InputError(f"there is no config file {file}")
        getattr(CONFIG.value, "seed", None)  # a file that failed to load says so on first use
        return rest
    except (flags.Error, InputError, AttributeError, KeyError, TypeError, OSError) as error:
        message = str(error).replace("\\n", "\n").strip("'\"")
        message = message.rpartition("tnt_flax.errors.InputError: ")[2]  # of the config file's own
        close = re.search(r'Did you mean "(.+)" instead of "(.+?)"', message)
        if close:
            message = f"the config has no key {close[2]!r}: did you mean {close[1]!r}?"
        elif message.strip().isidentifier():
            message = (
                f"the config has no key {message.strip()!r}: configs/default.py lists all keys"
            )
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
