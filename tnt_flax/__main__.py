# SPDX-License-Identifier: Apache-2.0
"""`python -m tnt_flax COMMAND`: the commands that need neither a config nor weights."""

import importlib
import sys

from tnt_flax.core.errors import BAD_INPUT

COMMANDS = {"selftest": "compare and time all implementations on this machine's device"}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(f"tnt_flax.tools.{argv[0]}").main(argv[1:])
    lines = [f"  {name:<12} {text}" for name, text in COMMANDS.items()]
    wants_help = argv[:1] in (["-h"], ["--help"])
    usage = "\n".join(["usage: python -m tnt_flax COMMAND [OPTIONS]", "", *lines])
    print(usage, file=sys.stdout if wants_help else sys.stderr)
    return 0 if wants_help else BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
