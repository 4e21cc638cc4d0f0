# SPDX-License-Identifier: Apache-2.0
"""What the commands share: --config, one-line errors, exit codes.

A command that takes a config says `flags.adopt_module_key_flags(command)`, so that its --help
lists --config, and ends with `app.run(main, flags_parser=command.parse_flags)`; one without uses
`Parser`.
"""

import argparse
import ast
import contextlib
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags
from ml_collections import config_flags

from tnt_flax.core.errors import INTERRUPTED, InputError, RunError, Stopped, print_error

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file with get_config(), such as configs/tnt_s.py.", lock_config=True
)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with one line instead of a traceback for what the user got wrong."""
    try:
        rest = flags.FLAGS(argv, known_only=False)
        if len(rest) > 1:
            raise InputError(f"unexpected argument {rest[1]!r}: flags look like --name=value")
        if CONFIG.value is None and not flags.FLAGS["help"].value:
            raise InputError("--config=FILE is missing, for instance --config=configs/digits.py")
        file = config_flags.get_config_filename(flags.FLAGS["config"])
        file = file and file.partition(":")[0]  # what follows is the argument of get_config()
        if file and not pathlib.Path(file).is_file():
            raise InputError(f"there is no config file {file}")
        getattr(CONFIG.value, "seed", None)  # a file that failed to load says so on first use
        return rest
    except (flags.Error, InputError, AttributeError, KeyError, TypeError, OSError) as error:
        message = str(error).replace("\\n", "\n").strip("'\"")
        if "Traceback (most recent call last)" in message:  # of the config file itself
            lines = [line.strip() for line in message.splitlines() if line.strip()]
            place = [line for line in lines if line.startswith('File "')][-1:]
            own, ours, said = lines[-1].partition("tnt_flax.core.errors.InputError: ")
            message = said if ours else f"the config file failed: {own} ({', '.join(place)})"
        close = re.search(r'Did you mean "(.+)" instead of "(.+?)"', message)
        if close:
            message = f"the config has no key {close[2]!r}: did you mean {close[1]!r}?"
        elif message.strip().isidentifier():
            message = (
                f"the config has no key {message.strip()!r}: configs/default.py lists all keys"
            )
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def exit_on_error(interrupted: str) -> Iterator[None]:
    """Ends the process with one line for what went wrong, or with `interrupted` after Ctrl-C."""
    try:
        yield
    except (InputError, RunError, Stopped) as error:
        sys.exit(print_error(error))
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """["depth=4", "dtype=bfloat16"] as {"depth": 4, "dtype": "bfloat16"}."""
    values = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: write NAME=VALUE")
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name] = value  # a word
    return values


class Parser(argparse.ArgumentParser):
    """argparse's for the command `prog`; bad arguments are an InputError, `doc` is the --help."""

    def __init__(self, prog: str, doc: str):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=doc, formatter_class=formatter)

    def error(self, message: str):
        raise InputError(f"{message}; see {self.prog} --help")
