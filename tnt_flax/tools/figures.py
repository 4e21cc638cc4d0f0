# SPDX-License-Identifier: Apache-2.0
"""Figures of attention, position embeddings and features, and of calibration."""

import pathlib

import numpy as np

from tnt_flax.tools import attention
from tnt_flax.tools.attention import Trace
from tnt_flax.training import plots

COLORS = "viridis"
ATTENTION = "attention relative to uniform"  # label of color bars
SMALL = 9  # font size
MAX_TILES = 7  # per side of the plot of positions: more would be too small
ORDINALS = {2: "2nd", 3: "3rd"}
MIN_SCALE = 2  # smallest upper end of a color scale on which uniform attention is 1


def plot_outer_attention(trace: Trace, path: pathlib.Path) -> None:
    """Plots the attention of the head's input: one row per block, one column per head.

    The last column is the mean. Early stages of PyramidTNT have fewer heads than columns.
    """
    weights = trace.attention_maps()
    columns = 1 + max(map(len, weights))
    title = f"Outer attention of {trace.readout_name}"
    figure, axes = make_grid(len(weights), columns + 1, 1.0, title)
    top = max(np.percentile(np.concatenate([maps.ravel() for maps in weights]), 99.5), MIN_SCALE)
    scale = dict(cmap=COLORS, vmin=0, vmax=top)
    for row, maps in zip(axes, weights, strict=True):
        for axis, values in zip(row[1:], maps, strict=False):
            show(axis, values, **scale)
        show(row[-1], maps.mean(axis=0), **scale)
    for block, row in enumerate(axes, start=1):
        row[1].set_ylabel(f"block {block}", fontsize=SMALL)
    for column, axis in enumerate(axes[0, 1:], start=1):
        axis.set_box_aspect(1)  # the titles of all columns at one height
        axis.set_title("mean" if column == columns else f"head {column}", fontsize=SMALL)
    show(axes[0, 0], trace.pixels, "image")
    add_colorbar(figure, axes, ATTENTION, extend="max")
    plots.save(figure, path)


def plot_rollout(trace: Trace, path: pathlib.Path) -> None:
    """Plots the share of each patch in the head's input after each block, over the image."""
    reached = trace.rollout_maps()
    columns = min(len(reached) + 1, 7)
    title = f"Attention rollout: share of each patch in {trace.readout_name} (brighter is more)"
    figure, axes = make_grid(-(-(len(reached) + 1) // columns), columns, 1.7, title)
    first, *others = axes.flat
    show(first, trace.pixels, "image")
    for block, (axis, weights) in enumerate(zip(others, reached, strict=False), start=1):
        show(axis, overlay_heatmap(trace.pixels, weights), f"after block {block}")
    plots.save(figure, path)


def plot_inner_attention(trace: Trace, patches: list[int], path: pathlib.Path) -> None:
    """Plots the attention among the words of some patches, in the first, middle and last block.

    Later stages of PyramidTNT show the larger sentence that contains the patch.
    """
    known = sorted(trace.inner_attention)
    blocks = sorted({known[0], known[(len(known) - 1) // 2], known[-1]})
    title = "Inner attention: each tile is the attention of one word"
    figure, axes = make_grid(len(patches), 2 + len(blocks), 2.0, title)
    side = trace.pixels.shape[1] // trace.grid[1]  # pixels of a patch
    for row, patch in zip(axes, patches, strict=True):
        y, x = divmod(patch, trace.grid[1])
        show(row[0], trace.pixels)
        row[0].set_ylabel(f"patch {y},{x}", fontsize=SMALL)
        corner = (x * side - 0.5, y * side - 0.5)
        frame = plots.pyplot().Rectangle(corner, side, side, fill=False, color=plots.WRONG, lw=1.5)
        row[0].add_patch(frame)
        show(row[1], trace.pixels[y * side : (y + 1) * side, x * side : (x + 1) * side])
    axes[0, 0].set_title("image", fontsize=SMALL)
    axes[0, 1].set_title("pixels of the patch", fontsize=SMALL)

    shown = {  # mean of the heads, of each patch
        block: trace.inner_attention[block][
            [trace.enclosing_sentence(block, patch) for patch in patches]
        ].mean(1)
        for block in blocks
    }
    top = max(MIN_SCALE, *(maps.max() * maps.shape[-1] for maps in shown.values()))
    for column, (block, maps) in zip(axes.T[2:], shown.items(), strict=True):
        words = round(maps.shape[-1] ** 0.5)
        for axis, weights in zip(column, maps, strict=True):
            tiles = attention.tile(len(weights) * weights.reshape((words,) * 4))
            show(axis, tiles, cmap=COLORS, vmin=0, vmax=top)
        name = f"block {block + 1}, mean of heads"
        if trace.grid_of(block) != trace.grid:
            name += f"\nenclosing {trace.pixels.shape[1] // trace.grid_of(block)[1]} pixels"
        column[0].set_title(name, fontsize=SMALL)
    add_colorbar(figure, axes, ATTENTION)
    plots.save(figure, path)


def plot_positions(
    sentences: np.ndarray, words: np.ndarray, grid: tuple[int, int], path: pathlib.Path
) -> None:
    """Plots cosine similarities of the position embeddings: sentences [N, D], words [M, C]."""
    every = -(-max(grid) // MAX_TILES)
    rows, columns = (slice(every // 2, None, every),) * 2
    maps = attention.similarity(sentences).reshape(*grid, *grid)[rows, columns]
    side = round(len(words) ** 0.5)
    of_words = attention.similarity(words).reshape((side,) * 4)
    nth = ORDINALS.get(every, f"{every}th")
    chosen = f", every {nth} row and column" if every > 1 else ""
    title = "Position embeddings: each tile compares one position with all others"
    figure, axes = make_grid(1, 2, 4.8, title)
    scale = dict(cmap="RdBu_r", vmin=-1, vmax=1)
    show(axes[0, 0], attention.tile(maps), f"{grid[0]} x {grid[1]} sentences{chosen}", **scale)
    show(axes[0, 1], attention.tile(of_words), f"{side} x {side} words", **scale)
    add_colorbar(figure, axes, "cosine similarity (mean subtracted)")
    plots.save(figure, path)


def plot_features(trace: Trace, path: pathlib.Path) -> None:
    """Plots three principal components of sentences and words as colors, for each block."""
    depth = len(trace.sentences)
    sentences = attention.principal_colors(trace.sentence_maps())
    read = sorted(trace.words)
    in_place = [attention.words_in_place(trace.words[i], trace.grid_of(i)) for i in read]
    words = dict(zip(read, attention.principal_colors(in_place), strict=True))
    columns = min(depth, 6)
    title = "Features: three principal components as red, green and blue, aligned between blocks"
    figure, axes = make_grid(2 * -(-depth // columns), columns + 1, 1.5, title)
    show(axes[0, 0], trace.pixels, "image")
    for block in range(depth):
        strip, column = divmod(block, columns)
        upper, lower = axes[2 * strip : 2 * strip + 2, column + 1]
        show(upper, sentences[block], f"block {block + 1}")
        if block in words:
            show(lower, words[block])
        if column == 0:
            upper.set_ylabel("sentences", fontsize=SMALL)
            lower.set_ylabel("words", fontsize=SMALL)
    plots.save(figure, path)


def plot_calibration(sums: np.ndarray, path: pathlib.Path) -> None:
    """Plots accuracy and number of images by confidence, from `evaluate.calibration_sums`."""
    plt = plots.pyplot()
    counts, correct, _ = sums
    centers = 100 * (np.arange(len(counts)) + 0.5) / len(counts)
    filled = counts > 0
    figure, (reliability, histogram) = plt.subplots(1, 2, figsize=(8.7, 3.6), layout="constrained")
    reliability.plot([0, 100], [0, 100], ":", color="0.5", lw=1, label="calibrated")
    accuracy = 100 * correct[filled] / counts[filled]
    reliability.plot(centers[filled], accuracy, "o-", ms=4, label="this network")
    reliability.set(title="Accuracy by confidence", ylabel="correct, %", ylim=(-3, 103))
    reliability.legend(frameon=False, loc="upper left")
    histogram.bar(centers, counts, width=80 / len(counts))
    histogram.set(title="Images by confidence", ylabel="images")
    plots.style_axes(figure, xlabel="confidence, %", xlim=(-3, 103))
    plots.save(figure, path)


def overlay_heatmap(pixels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Darkens uint8 pixels [S, S, 3] where weights [rows, columns] are small, interpolating."""
    from PIL import Image

    share = (weights / weights.max()).astype(np.float32)
    size = (pixels.shape[1], pixels.shape[0])
    share = np.asarray(Image.fromarray(share).resize(size, Image.Resampling.BICUBIC))
    light = 0.12 + 0.88 * np.clip(share, 0, 1)[..., None]
    return np.rint(pixels * light).astype(np.uint8)


def make_grid(rows: int, columns: int, size: float, title: str):
    """Returns a figure of rows x columns hidden axes of `size` inches; `show` fills them."""
    figure, axes = plots.pyplot().subplots(
        rows,
        columns,
        figsize=(size * columns + 0.9, size * rows + 0.9),
        layout="constrained",
        squeeze=False,
    )
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle(title, fontsize=11)
    return figure, axes


def show(axis, image: np.ndarray, title: str = "", **options) -> None:
    """Shows an image in a thin frame without ticks; `options` are those of `imshow`."""
    axis.axis("on")
    axis.imshow(image, **options)
    axis.set_title(title, fontsize=SMALL)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(linewidth=0.4, color="0.6")


def add_colorbar(figure, axes, label: str, **options) -> None:
    """Adds a color bar for the scale of the last axis."""
    mappable = axes[-1, -1].images[0]
    shrink = min(1, 3 / len(axes))
    bar = figure.colorbar(mappable, ax=axes, shrink=shrink, pad=0.02, **options)
    bar.set_label(label, fontsize=SMALL)
