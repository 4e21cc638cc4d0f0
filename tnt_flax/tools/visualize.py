# SPDX-License-Identifier: Apache-2.0
"""Draws what a network sees in an image.

    python -m tnt_flax.tools.visualize tnt_s_81.5.pth.tar cat.jpg --out=pictures
    python -m tnt_flax.tools.visualize runs/digits three.png --out=pictures --patches 0,1 1,1

Writes into the folder: outer_attention.png (of the class token, by block and head), rollout.png,
inner_attention.png (inside some patches, by default those of which most reaches the class token),
positions.png (how alike the position embeddings are) and features.png (principal components of
sentences and words at each depth). PyramidTNT has no class token: its head reads the mean of the
sentences, and so do the pictures. The last line on stdout is one JSON object. Exit code 1 is a
picture that cannot be written, 2 is bad input.
"""

import pathlib
import re
import sys
from typing import Any

import numpy as np

from tnt_flax.core.errors import InputError, RunError
from tnt_flax.data.labels import display_names
from tnt_flax.runtime import host
from tnt_flax.tools.command_line import Parser, add_weights_options, read_weights, run
from tnt_flax.weights.read import LoadedWeights

PATCHES = 3  # shown where none are chosen


def make_parser() -> Parser:
    parser = Parser("python -m tnt_flax.tools.visualize", __doc__)
    add_weights_options(parser)
    add = parser.add_argument
    add("image", metavar="IMAGE", help="an image file")
    add("--out", type=pathlib.Path, required=True, help="the folder to write")
    add("--patches", nargs="+", metavar="ROW,COLUMN", help="of inner_attention.png, from 0,0")
    return parser


def main(argv: list[str] | None = None) -> int:
    return run(make_parser(), visualize, argv, on_interrupt="some pictures may be missing")


def visualize(args: Any) -> dict[str, Any]:
    """Writes the pictures; returns what the JSON line says.

    Raises:
        InputError: the weights, the image, the patches or the folder are wrong.
        RunError: a picture cannot be written.
    """
    from tnt_flax.tools import attention, pictures

    host.cache_compilations()
    found = read_weights(args, square_rgb=True)
    grid = found.network.grid
    patches = [parse_patch(patch, grid) for patch in args.patches or ()]
    pixels = attention.prepare(found, args.image)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {args.out}: {error.strerror}") from None
    print(f"looking with {found.summary()}", file=sys.stderr)
    (seen,) = attention.look(found, pixels[None])
    sentences, words = (np.asarray(found.params[f"{of}_pos"][0]) for of in ("sentence", "word"))
    positions = sentences[-grid[0] * grid[1] :], words  # without the class token's
    patches = patches or attention.most_read(seen, PATCHES)
    drawn = {
        "outer_attention": lambda path: pictures.plot_outer_attention(seen, path),
        "rollout": lambda path: pictures.plot_rollout(seen, path),
        "inner_attention": lambda path: pictures.plot_inner_attention(seen, patches, path),
        "positions": lambda path: pictures.plot_positions(*positions, grid, path),
        "features": lambda path: pictures.plot_features(seen, path),
    }
    if not seen.inner_attention:
        del drawn["inner_attention"]
    paths = {name: args.out / f"{name}.png" for name in drawn}
    for name, draw in drawn.items():
        try:
            draw(paths[name])
        except OSError as error:
            raise RunError(f"cannot write {paths[name]}: {error.strerror or error}") from None
    result = {"out": str(args.out), "pictures": [path.name for path in paths.values()]}
    return result | answer(found, seen.probabilities)


def answer(found: LoadedWeights, probabilities: np.ndarray | None) -> dict[str, Any]:
    """The likeliest class; nothing of a network without a head."""
    if probabilities is None:
        return {}
    best = int(probabilities.argmax())
    names = display_names(found.class_names, len(probabilities))
    return {"class": names[best], "probability": round(float(probabilities[best]), 4)}


def parse_patch(text: str, grid: tuple[int, int]) -> int:
    """ "1,2" as the index of the sentence in row 1, column 2. Raises InputError."""
    match = re.fullmatch(r"(\d+),(\d+)", text)
    row, column = map(int, match.groups()) if match else grid
    if row >= grid[0] or column >= grid[1]:
        raise InputError(
            f"--patches {text}: write ROW,COLUMN, from 0,0 to {grid[0] - 1},{grid[1] - 1}"
        )
    return row * grid[1] + column


if __name__ == "__main__":
    sys.exit(main())
