# SPDX-License-Identifier: Apache-2.0
"""The frame of every command: options, `--config`, logging, one-line errors, exit codes."""

import argparse
import ast
import difflib
import errno
import functools
import importlib.util
import json
import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tnt_flax.core.errors import (
    FAILED,
    INTERRUPTED,
    InputError,
    RunError,
    Stopped,
    did_you_mean,
    print_error,
)

PACKAGE = pathlib.Path(__file__).parents[1]
# Fields of a network that weights of an unpublished size do not determine.
ARCHITECTURE_FIELDS = ("inner_heads", "outer_heads", "patch_size")
EXPECTED = (InputError, RunError, Stopped, KeyboardInterrupt)  # errors that end a command


HelpFormatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=32)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `InputError`s of one line.

    Args:
        prog: the command, such as "tnt-flax predict".
        doc: the text of --help.
        **options: of `argparse.ArgumentParser`.
    """

    def __init__(self, prog: str, doc: str, **options: Any):
        options = {"formatter_class": HelpFormatter} | options
        super().__init__(prog=prog, description=doc, allow_abbrev=False, **options)
        self._takes_config = self._needs_config = False

    def add_config(self, *, required: bool = True) -> None:
        """Adds `--config=FILE` and `--config.KEY=VALUE`; `args.config` is a ConfigDict or None."""
        self._takes_config, self._needs_config = True, required
        text = "a name, or a file with get_config(): tnt_s, configs/tnt_s.py"
        self.add_argument("--config", metavar="FILE", help=text)
        self.epilog = "Any key of the config can be set: --config.batch_size=96."

    def add_weights(self) -> None:
        """Adds the options of a command that reads weights, see `read_weights`."""
        add = self.add_argument
        text = "weights of any framework: file, workdir, checkpoint, hf://OWNER/NAME, network"
        add("source", metavar="CHECKPOINT", help=text)
        text = "which, if CHECKPOINT has both"
        add("--weights", choices=["ema", "raw"], default="ema", help=text)
        add("--checkpoint", choices=["best", "last"], default="best", help="which one of a workdir")
        add("--state", help="which network, if CHECKPOINT has several, such as teacher")
        add("--name", help="network that CHECKPOINT must contain; any other is an error")
        text = "needed only if CHECKPOINT has an unpublished size"
        for field in ARCHITECTURE_FIELDS:
            add(f"--{field.replace('_', '-')}", type=positive, metavar="N", help=text)

    def add_policy(self) -> None:
        """Adds the options of a command that reads image files, see `policy_arguments`."""
        add = self.add_argument
        text = "turn images upright by their EXIF tag"
        add("--exif", action="store_true", default=None, help=text)
        add("--background", type=_numbers, metavar="R,G,B", help="color behind transparent pixels")
        text = "of 16-bit grey and floats: clip, minmax, or black and white"
        add("--deep-pixels", type=_numbers, metavar="LOW,HIGH", help=text)
        text = "largest image, by default Pillow's; 0 is no limit"
        add("--max-pixels", type=int, metavar="N", help=text)

    def format_help(self) -> str:
        """Returns the text of --help, whose first line does not repeat the options."""
        ends = {"?": "[{}]", "+": "{}...", None: "{}"}
        actions = self._get_positional_actions()
        positional = [ends[action.nargs].format(action.metavar) for action in actions]
        self.usage = " ".join(["%(prog)s", *positional, "[OPTIONS]"])
        return super().format_help()

    def parse_args(self, args=None, namespace=None):
        parsed, rest = self.parse_known_args(args, namespace)
        overrides = _take_overrides(rest) if self._takes_config else []
        if rest:
            self._refuse(rest[0])
        if self._takes_config:
            if parsed.config is not None:
                parsed.config = read_config(parsed.config, overrides)
            elif self._needs_config or overrides:
                raise InputError("--config=FILE is missing, for instance --config=digits")
        return parsed

    def error(self, message: str):
        raise InputError(f"{message}; see {self.prog} --help")

    def _refuse(self, argument: str):
        if not argument.startswith("-"):
            self.error(f"unexpected argument {argument!r}: options look like --name=value")
        option = argument.partition("=")[0]
        close = difflib.get_close_matches(option, self._option_string_actions, n=1)
        self.error(f"unknown option {option}" + (f": did you mean {close[0]}?" if close else ""))


def _take_overrides(rest: list[str]) -> list[str]:
    """Removes `--config.KEY=VALUE` and `--config.KEY VALUE` from `rest`; returns them."""
    overrides, others = [], []
    arguments = iter(rest)
    for argument in arguments:
        if not argument.startswith("--config."):
            others.append(argument)
            continue
        overrides.append(argument if "=" in argument else f"{argument}={next(arguments, '')}")
    rest[:] = others
    return overrides


def read_config(file: str, overrides: Sequence[str] = ()):
    """Returns the ConfigDict of `file`, such as "configs/tnt.py:s" or "tnt:s".

    Args:
        file: a Python file with `get_config()`, which gets what follows a colon; or the name of a
            config that ships with the package.
        overrides: such as "--config.batch_size=96".

    Raises:
        InputError: there is no such file, it fails, or an override names no key or has a value of
            another type.
    """
    from absl import flags
    from ml_collections import config_flags

    argv = ["config", f"--config={_find_config(file)}", *overrides]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file(
        "config", flag_values=values, lock_config=True, sys_argv=argv
    )
    try:
        values(argv)
        holder.value.get("seed")  # raises what the file raised when it was loaded
        return holder.value
    except (
        flags.Error,
        ValueError,
        AttributeError,
        KeyError,
        TypeError,
        OSError,
        ImportError,
        SyntaxError,
    ) as error:
        raise InputError(_explain_config_error(error)) from None


def _find_config(file: str) -> str:
    """Returns `file` with the path of its config, which may be given by name."""
    path, colon, argument = file.partition(":")
    if not pathlib.Path(path).is_file():
        shipped = {each.stem: each for each in (PACKAGE / "configs").glob("*.py")}
        if path not in shipped:
            hint = did_you_mean(path, shipped)
            raise InputError(f"there is no config file {path}{hint}")
        path = str(shipped[path])
    return path + colon + argument


def _explain_config_error(error: Exception) -> str:
    """One line for an error of ml_collections, whose message may contain a traceback."""
    message = str(error).replace("\\n", "\n")
    if "Traceback (most recent call last)" in message:  # of the config file itself
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        frame = [line for line in lines if line.startswith('File "')][-1:]
        before, own_error, own_message = lines[-1].partition("tnt_flax.core.errors.InputError: ")
        message = own_message if own_error else f"the config file failed: {before} ({frame[0]})"
    if isinstance(error, SyntaxError):
        message = f"the config file failed: SyntaxError: {message}"
    if "get_config() takes 0 positional" in message:
        message = "the config takes no argument: leave out the colon and what follows"
    close = re.search(r'Did you mean "(.+)" instead of "(.+?)"', message)
    if close:
        message = f"the config has no key {close[2]!r}: did you mean {close[1]!r}?"
    elif (key := message.strip("'\" ")).isidentifier():
        message = f"the config has no key {key!r}: configs/default.py lists all keys"
    return " ".join(message.split())


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """Parses NAME=VALUE: ["depth=4", "dtype=bfloat16"] is {"depth": 4, "dtype": "bfloat16"}."""
    values = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: write NAME=VALUE")
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name] = value  # a string without quotes
    return values


def positive(text: str) -> int:
    """Parses an integer above 0, as an argument's `type`."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def weights_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the weights options as arguments of `read_checkpoint` and `load_classifier`."""
    arguments = {"path": args.source}
    for name in ("name", "weights", "checkpoint", "state", *ARCHITECTURE_FIELDS):
        if getattr(args, name) is not None:
            arguments[name] = getattr(args, name)
    return arguments


def policy_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the policy options as arguments of `load_classifier`; None where not given."""
    from tnt_flax.data.images import POLICY_KEYS  # Pillow is a slow import for --help

    return {key: getattr(args, key) for key in POLICY_KEYS}


def _numbers(text: str) -> Any:
    """Parses "0,4095" into a tuple of numbers; other text stays."""
    if not re.fullmatch(r"[-\d.,e ]*\d[-\d.,e ]*", text):
        return text
    return tuple(ast.literal_eval(f"({text},)"))


def read_weights(args: argparse.Namespace, **options: Any):
    """Reads the weights that the options of `Parser.add_weights` select.

    `options` are further arguments of `read_checkpoint`.

    Returns a `weights.read.LoadedWeights`. Raises InputError as `read_checkpoint` does.
    """
    from tnt_flax.weights.read import read_checkpoint

    return read_checkpoint(**weights_arguments(args), **options)


def run(
    parser: Parser,
    command: Callable[[argparse.Namespace], dict[str, Any] | None],
    argv: Sequence[str] | None = None,
    *,
    on_interrupt: str = "nothing was written",
    failed: Callable[[dict[str, Any]], bool] = lambda result: False,
) -> int:
    """Runs a command and returns its exit code, see `core.errors`.

    Args:
        parser: parses `argv`.
        command: gets the arguments; returns the JSON object of the last line on stdout, or None.
        argv: the arguments, `sys.argv[1:]` by default.
        on_interrupt: the message after Ctrl-C.
        failed: whether the command's result is a failure (exit code 1).
    """
    try:
        args = parser.parse_args(argv)
        setup_logging()
        if hasattr(sys.stdout, "reconfigure"):  # names that stdout cannot encode are escaped
            sys.stdout.reconfigure(errors="backslashreplace")
        result = command(args)
        if result is not None:
            print(json.dumps(result), flush=True)
        return FAILED if result is not None and failed(result) else 0
    except BrokenPipeError:  # the reader of stdout, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return print_error(RunError(f"cannot write the output: {error.strerror}"))
    except EXPECTED as error:
        return print_end(error, on_interrupt)


@contextmanager
def exit_on_error(on_interrupt: str) -> Iterator[None]:
    """Exits with one line for an expected error, or with `on_interrupt` after Ctrl-C."""
    setup_logging()
    try:
        yield
    except EXPECTED as error:
        sys.exit(print_end(error, on_interrupt))


def print_end(error: BaseException, on_interrupt: str) -> int:
    """Prints an expected error to stderr and returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print(f"interrupted: {on_interrupt}", file=sys.stderr)
        return INTERRUPTED
    return print_error(error)


class _StderrHandler(logging.StreamHandler):
    """Writes to the `sys.stderr` of the moment, which tests and notebooks replace."""

    def __init__(self):
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stderr


def setup_logging() -> None:
    """Prints the package's log messages to stderr, bare. Orbax and Grain log errors only."""
    if importlib.util.find_spec("absl"):
        from absl import logging as absl_logging

        absl_logging.set_verbosity(absl_logging.ERROR)  # their warnings are for their developers
    logger = logging.getLogger("tnt_flax")
    if not logger.handlers:
        logger.addHandler(_StderrHandler())
        logger.propagate = False  # absl, imported by others, puts a handler on the root logger
    logger.setLevel(logging.INFO)
