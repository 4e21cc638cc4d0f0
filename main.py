# SPDX-License-Identifier: Apache-2.0
"""Runs `tnt-flax train`, or with --mode=eval `tnt-flax eval`, without installation.

python main.py --config=configs/digits.py --workdir=runs/digits
python main.py --config=configs/digits.py --workdir=runs/digits --mode=eval

The commands are `tnt_flax/tools/train.py`, which calls `tnt_flax/training/train.py`, and
`tnt_flax/tools/evaluate.py`.
"""

import sys
from collections.abc import Sequence

from tnt_flax.__main__ import main as run_tnt_flax
from tnt_flax.core.errors import InputError, print_error
from tnt_flax.tools.command_line import Parser


def to_command(argv: Sequence[str] | None) -> list[str]:
    """Returns the arguments of `tnt-flax`: --mode=eval becomes the command "eval"."""
    parser = Parser("python main.py", "", add_help=False)  # the command has the option --help
    parser.add_argument("--mode", choices=["train", "eval"], default="train")
    args, others = parser.parse_known_args(argv)
    return [args.mode, *others]


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return run_tnt_flax(to_command(argv))
    except InputError as error:
        return print_error(error)


if __name__ == "__main__":
    sys.exit(main())
