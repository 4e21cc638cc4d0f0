# SPDX-License-Identifier: Apache-2.0
"""`tnt-flax COMMAND`, or `python -m tnt_flax COMMAND`: the table of commands and its dispatch."""

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import tnt_flax
from tnt_flax.core.errors import BAD_INPUT, InputError, did_you_mean, require_extras
from tnt_flax.tools import command_line


class Command(NamedTuple):
    """A command. Its module in `tnt_flax.tools` has `add_arguments` and `run`, see `main`."""

    module: str
    help: str
    extras: tuple[str, ...] = ()  # the optional dependencies that it needs, see pyproject.toml


TRAIN = ("train",)
COMMANDS = {
    "train": Command("train", "train a network, or resume a run", TRAIN),
    "eval": Command("evaluate", "evaluate weights on a data set", TRAIN),
    "predict": Command("predict", "classify images"),
    "convert": Command("convert", "convert weights between frameworks, or describe them"),
    "export": Command("export", "write StableHLO, ONNX, or a folder for timm", TRAIN),
    "visualize": Command("visualize", "plot attention and features of an image", TRAIN),
    "explore": Command("explore", "write a page to explore attention", TRAIN),
    "demo": Command("demo", "serve a page that classifies and explores images", ("train", "demo")),
    "report": Command("report", "write a run as one HTML page", TRAIN),
    "describe": Command("describe", "list parts: parameters, FLOPs, bytes"),
    "check-data": Command("check_data", "find corrupt and unusual images", TRAIN),
    "preview": Command("preview", "plot augmented training images", TRAIN),
    "compile-check": Command("compile_check", "compile programs for GPUs and TPUs", TRAIN),
    "selftest": Command("selftest", "compare and time implementations on this device"),
}
USAGE = """usage: tnt-flax COMMAND [OPTIONS]

Transformer in Transformer (TNT) in JAX. Commands:

{commands}

Options and examples: tnt-flax COMMAND --help. Version: tnt-flax --version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code, see `core.errors`.

    A command's module has `add_arguments(parser)` and `run(args)`, which returns the JSON object of
    the last line on stdout. It may have `failed(result)`, true for exit code 1, and `ON_INTERRUPT`,
    the message after Ctrl-C. Its docstring is the text of --help.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        return run_command(name, arguments)
    if name == "--version":
        print(f"tnt_flax {tnt_flax.__version__}")
    elif name in ("-h", "--help"):
        rows = [f"  {key:<14}{command.help}" for key, command in COMMANDS.items()]
        print(USAGE.format(commands="\n".join(rows)))
    else:
        hint = did_you_mean(name, COMMANDS) or ": tnt-flax --help lists all commands"
        print(f"error: there is no command {name!r}{hint}", file=sys.stderr)
        return BAD_INPUT
    return 0


def run_command(name: str, arguments: Sequence[str]) -> int:
    try:
        require_extras(f"tnt-flax {name}", *COMMANDS[name].extras)
        module, parser = load_command(name)
    except (InputError, KeyboardInterrupt) as error:
        return command_line.print_end(error, "nothing was written")
    return command_line.run(
        parser,
        module.run,
        arguments,
        on_interrupt=getattr(module, "ON_INTERRUPT", "nothing was written"),
        failed=getattr(module, "failed", lambda result: False),
    )


def load_command(name: str) -> tuple[ModuleType, command_line.Parser]:
    """Imports the module of a command; returns it with its parser."""
    module = importlib.import_module(f"tnt_flax.tools.{COMMANDS[name].module}")
    parser = command_line.Parser(f"tnt-flax {name}", module.__doc__)
    module.add_arguments(parser)
    return module, parser


if __name__ == "__main__":
    sys.exit(main())
