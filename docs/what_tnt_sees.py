# SPDX-License-Identifier: Apache-2.0
"""Plots docs/what_tnt_sees.png, the figure of the README, for a network trained on the digits.

python main.py --config=configs/digits.py --workdir=runs/digits --config.epochs=12
python docs/what_tnt_sees.py runs/digits
"""

import pathlib
import sys

import numpy as np

from tnt_flax.data.sources import Digits
from tnt_flax.data.transforms import eval_transform
from tnt_flax.tools import attention, figures
from tnt_flax.tools.command_line import Parser, exit_on_error
from tnt_flax.training import plots
from tnt_flax.weights.read import read_checkpoint

DIGITS = (8, 4, 16, 9, 3, 11)  # of the test split
OUT = pathlib.Path(__file__).with_suffix(".png")


def main(argv: list[str]) -> None:
    parser = Parser("python docs/what_tnt_sees.py", __doc__)
    parser.add_argument("checkpoint", help="workdir of a run on the digits")
    with exit_on_error("nothing was plotted"):
        found = read_checkpoint(parser.parse_args(argv).checkpoint)
        size = found.network.image_size
        images = [Digits("test")[i][0] for i in DIGITS]
        images = np.stack([eval_transform(x, size=size, crop_fraction=1.0) for x in images])
        plot(attention.trace_attention(found, images), OUT)


def plot(seen: list[attention.Trace], path: pathlib.Path) -> None:
    """Columns are images; rows are the image, both attentions, and the words' features."""
    plt = plots.pyplot()
    rows = (
        "image",
        "attention rollout\nof sentences",
        "inner attention\nin block 1",
        "words after\nthe last block",
    )
    figure, axes = plt.subplots(
        len(rows),
        len(seen),
        figsize=(1.25 * len(seen) + 1.3, 1.27 * len(rows)),
        layout="constrained",
    )
    last = max(seen[0].words)
    words = np.concatenate([one.words[last].reshape(-1, one.words[last].shape[-1]) for one in seen])
    (colors,) = attention.principal_colors([words])  # of all images: colors are comparable
    for column, (one, own) in enumerate(zip(seen, np.split(colors, len(seen)), strict=True)):
        read = one.inner_attention[0].mean(axis=(1, 2))  # by the mean of all heads and words
        figures.show(axes[0, column], one.pixels)
        figures.show(axes[1, column], figures.overlay_heatmap(one.pixels, one.rollout_maps()[-1]))
        figures.show(axes[2, column], attention.words_in_place(read, one.grid), cmap=figures.COLORS)
        figures.show(
            axes[3, column], attention.words_in_place(own.reshape(*read.shape, 3), one.grid)
        )
    for row, name in enumerate(rows):
        axes[row, 0].set_ylabel(name, fontsize=8.5, rotation=0, ha="right", va="center")
    plots.save(figure, path)


if __name__ == "__main__":
    main(sys.argv[1:])
