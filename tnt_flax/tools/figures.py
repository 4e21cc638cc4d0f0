# SPDX-License-Identifier: Apache-2.0
"""Figures of attention, position embeddings and features, and of calibration."""

import pathlib

import numpy as np

from tnt_flax.tools import attention
from tnt_flax.tools.attention import Trace
from tnt_flax.training import plots

COLORS = "viridis"
MAX_TILES = 7  # per side of the plot of positions: more would be too small
ORDINALS = {2: "2nd", 3: "3rd"}
MIN_SCALE = 2  # smallest upper end of a color scale on which uniform attention is 1


def plot_outer_attention(trace: Trace, path: pathlib.Path) -> None:
    """Plots the attention of the head's input: one row per block, one column per head.

    The last column is the mean. Early stages of PyramidTNT have fewer heads than columns.
    """
    plt = plots.pyplot()
    weights = trace.attention_maps()
    rows, columns = len(weights), 1 + max(map(len, weights))
    figure, axes = plt.subplots(
        rows,
        columns + 1,
        figsize=(1.0 * (columns + 1) + 0.9, 0.98 * rows + 0.9),
        layout="constrained",
        squeeze=False,
    )
    top = max(np.percentile(np.concatenate([maps.ravel() for maps in weights]), 99.5), MIN_SCALE)
    for axis in axes.flat:
        hide_axes(axis)
    for block, maps in enumerate(weights):
        for axis in axes[block, len(maps) + 1 : -1]:
            axis.axis("off")
            axis.set_box_aspect(1)  # the titles of all columns at one height
        shown = [*zip(axes[block, 1:], maps, strict=False), (axes[block, -1], maps.mean(axis=0))]
        for axis, values in shown:
            drawn = axis.imshow(values, cmap=COLORS, vmin=0, vmax=top)
        axes[block, 1].set_ylabel(f"block {block + 1}", fontsize=9)
    for column, axis in enumerate(axes[0, 1:], start=1):
        axis.set_title("mean" if column == columns else f"head {column}", fontsize=9)
    axes[0, 0].imshow(trace.pixels)
    axes[0, 0].set_title("image", fontsize=9)
    for axis in axes[1:, 0]:
        axis.axis("off")
    bar = figure.colorbar(drawn, ax=axes, shrink=min(1, 3 / rows), pad=0.02, extend="max")
    bar.set_label("attention relative to uniform", fontsize=9)
    figure.suptitle(f"Outer attention of {trace.readout_name}", fontsize=11)
    plots.save(figure, path)


def plot_rollout(trace: Trace, path: pathlib.Path) -> None:
    """Plots the share of each patch in the head's input after each block, over the image."""
    plt = plots.pyplot()
    reached = trace.rollout_maps()
    panels = len(reached) + 1
    columns = min(panels, 7)
    rows = -(-panels // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.7 * columns, 1.85 * rows + 0.5), layout="constrained"
    )
    axes = np.atleast_1d(axes).ravel()
    axes[0].imshow(trace.pixels)
    axes[0].set_title("image", fontsize=9)
    for i, (axis, weights) in enumerate(zip(axes[1:], reached, strict=False)):
        axis.imshow(overlay_heatmap(trace.pixels, weights))
        axis.set_title(f"after block {i + 1}", fontsize=9)
    for axis in axes:
        hide_axes(axis)
    for axis in axes[panels:]:
        axis.axis("off")
    figure.suptitle(
        f"Attention rollout: share of each patch in {trace.readout_name} (brighter is more)",
        fontsize=11,
    )
    plots.save(figure, path)


def plot_inner_attention(trace: Trace, patches: list[int], path: pathlib.Path) -> None:
    """Plots the attention among the words of some patches, in the first, middle and last block.

    Later stages of PyramidTNT show the larger sentence that contains the patch.
    """
    plt = plots.pyplot()
    known = sorted(trace.inner_attention)
    blocks = sorted({known[0], known[(len(known) - 1) // 2], known[-1]})
    figure, axes = plt.subplots(
        len(patches),
        2 + len(blocks),
        figsize=(2.0 * (2 + len(blocks)) + 0.9, 2.0 * len(patches) + 0.8),
        layout="constrained",
        squeeze=False,
    )
    columns = trace.grid[1]
    side = trace.pixels.shape[1] // columns  # pixels of a patch
    shown = {  # mean of the heads, of each patch
        block: trace.inner_attention[block][
            [trace.enclosing_sentence(block, patch) for patch in patches]
        ].mean(1)
        for block in blocks
    }
    top = max(MIN_SCALE, *(maps.max() * maps.shape[-1] for maps in shown.values()))
    for row, patch in enumerate(patches):
        y, x = divmod(patch, columns)
        corner = (slice(y * side, (y + 1) * side), slice(x * side, (x + 1) * side))
        axes[row, 0].imshow(trace.pixels)
        frame = plt.Rectangle(
            (x * side - 0.5, y * side - 0.5), side, side, fill=False, color=plots.WRONG, lw=1.5
        )
        axes[row, 0].add_patch(frame)
        axes[row, 0].set_ylabel(f"patch {y},{x}", fontsize=9)
        axes[row, 1].imshow(trace.pixels[corner])
        for column, block in enumerate(blocks):
            maps = shown[block][row]
            words = round(len(maps) ** 0.5)
            tiles = attention.tile(len(maps) * maps.reshape((words,) * 4))
            drawn = axes[row, 2 + column].imshow(tiles, cmap=COLORS, vmin=0, vmax=top)
        if row == 0:
            axes[row, 0].set_title("image", fontsize=9)
            axes[row, 1].set_title("pixels of the patch", fontsize=9)
            for column, block in enumerate(blocks):
                name = f"block {block + 1}, mean of heads"
                if trace.grid_of(block) != trace.grid:
                    pixels = trace.pixels.shape[1] // trace.grid_of(block)[1]
                    name += f"\nenclosing {pixels} pixels"
                axes[row, 2 + column].set_title(name, fontsize=9)
    for axis in axes.flat:
        hide_axes(axis)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.6, pad=0.02)
    bar.set_label("attention relative to uniform", fontsize=9)
    figure.suptitle("Inner attention: each tile is the attention of one word", fontsize=11)
    plots.save(figure, path)


def plot_positions(
    sentences: np.ndarray, words: np.ndarray, grid: tuple[int, int], path: pathlib.Path
) -> None:
    """Plots cosine similarities of the position embeddings: sentences [N, D], words [M, C]."""
    plt = plots.pyplot()
    every = -(-max(grid) // MAX_TILES)
    rows, columns = (slice(every // 2, None, every),) * 2
    maps = attention.similarity(sentences).reshape(*grid, *grid)[rows, columns]
    side = round(len(words) ** 0.5)
    of_words = attention.tile(attention.similarity(words).reshape((side,) * 4))
    figure, axes = plt.subplots(1, 2, figsize=(10, 5.2), layout="constrained")
    nth = ORDINALS.get(every, f"{every}th")
    chosen = f", every {nth} row and column" if every > 1 else ""
    for axis, image, title in (
        (axes[0], attention.tile(maps), f"{grid[0]} x {grid[1]} sentences{chosen}"),
        (axes[1], of_words, f"{side} x {side} words"),
    ):
        drawn = axis.imshow(image, cmap="RdBu_r", vmin=-1, vmax=1)
        axis.set_title(title, fontsize=10)
        hide_axes(axis)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.7, pad=0.02)
    bar.set_label("cosine similarity (mean subtracted)", fontsize=9)
    figure.suptitle(
        "Position embeddings: each tile compares one position with all others",
        fontsize=11,
    )
    plots.save(figure, path)


def plot_features(trace: Trace, path: pathlib.Path) -> None:
    """Plots three principal components of sentences and words as colors, for each block."""
    plt = plots.pyplot()
    depth = len(trace.sentences)
    sentences = attention.principal_colors(trace.sentence_maps())
    read = sorted(trace.words)
    in_place = [attention.words_in_place(trace.words[i], trace.grid_of(i)) for i in read]
    words = dict(zip(read, attention.principal_colors(in_place), strict=True))
    strips = -(-depth // 6)  # of at most six blocks each
    columns = min(depth, 6)
    figure, axes = plt.subplots(
        2 * strips,
        columns + 1,
        figsize=(1.5 * (columns + 1), 1.6 * 2 * strips + 0.5),
        layout="constrained",
        squeeze=False,
    )
    for axis in axes.flat:
        axis.axis("off")
    axes[0, 0].imshow(trace.pixels)
    axes[0, 0].set_title("image", fontsize=9)
    for block in range(depth):
        strip, column = divmod(block, columns)
        upper, lower = axes[2 * strip, column + 1], axes[2 * strip + 1, column + 1]
        upper.imshow(sentences[block])
        upper.set_title(f"block {block + 1}", fontsize=9)
        shown = [upper]
        if block in words:
            lower.imshow(words[block])
            shown.append(lower)
        for axis in shown:
            axis.axis("on")
            hide_axes(axis)
        if column == 0:
            for axis, name in zip(shown, ("sentences", "words"), strict=False):
                axis.set_ylabel(name, fontsize=9)
    figure.suptitle(
        "Features: three principal components as red, green and blue, aligned between blocks",
        fontsize=11,
    )
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


def hide_axes(axis) -> None:
    """Removes ticks and thins the frame; titles and labels stay."""
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(linewidth=0.4, color="0.6")
