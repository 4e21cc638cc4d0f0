# SPDX-License-Identifier: Apache-2.0
"""The arguments by which a command says which weights it reads, and the reading."""

from typing import Any

from tnt_flax.core.errors import InputError
from tnt_flax.tools.command_line import Parser
from tnt_flax.weights.read import Checkpoint, read_checkpoint

FIELDS = ("inner_heads", "outer_heads", "patch_size")


def add_weights_options(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "source",
        metavar="CHECKPOINT",
        help="a file, a workdir, one of its steps, hf://OWNER/NAME, a name",
    )
    add("--weights", choices=["ema", "raw"], default="ema", help="where a checkpoint holds both")
    add("--checkpoint", choices=["best", "last"], default="best", help="of a workdir")
    add("--name", help="refuse CHECKPOINT unless it is this network")
    for field in FIELDS:
        add(f"--{field}", type=int, help="of sizes that were never published")


def weights_arguments(args: Any) -> dict[str, Any]:
    """What was said, as arguments of `read_checkpoint` and `load_classifier`."""
    said = dict(path=args.source, name=args.name, weights=args.weights, checkpoint=args.checkpoint)
    return said | {f: getattr(args, f) for f in FIELDS if getattr(args, f) is not None}


def read_weights(args: Any) -> Checkpoint:
    """The weights that the arguments name. Raises InputError as `read_checkpoint` does."""
    return read_checkpoint(**weights_arguments(args))


def check_takes_photos(found: Checkpoint) -> None:
    """Raises InputError unless the weights are for square images of three channels."""
    if found.network.grid is None or found.network.channels != 3:
        raise InputError(
            f"{found.path} takes images of {found.network.sentences} patches and "
            f"{found.network.channels} channels; this command needs square ones of 3 channels"
        )
