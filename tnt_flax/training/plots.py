# SPDX-License-Identifier: Apache-2.0
"""Plots: the curves of a run, calibration, images with predictions, training samples."""

import pathlib
from typing import Any

import numpy as np

RIGHT, WRONG = "#1b7837", "#b2182b"
DPI = 110
MIN_SAMPLE_WIDTH = 160  # pixels: narrower training samples are enlarged


def plot_curves(metrics: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Plots loss, accuracy and learning rate over epochs, from the lines of a metrics.jsonl."""
    plt = pyplot()
    train = [m for m in metrics if "train/loss" in m]
    evals = [m for m in metrics if "eval/loss" in m]
    epochs_per_step = train[-1]["train/epoch"] / train[-1]["step"] if train else 1.0
    train_epochs = [m["train/epoch"] for m in train]
    eval_epochs = [m["step"] * epochs_per_step for m in evals]

    figure, (loss, accuracy, rate) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    loss.plot(train_epochs, [m["train/loss"] for m in train], label="training (smoothed labels)")
    loss.plot(eval_epochs, [m["eval/loss"] for m in evals], "o-", ms=3, label="evaluation")
    loss.set(title="Loss", ylim=(0, None))
    loss.legend(frameon=False)
    for name, label in (("eval/top1", "top-1"), ("eval/top5", "top-5")):
        accuracy.plot(eval_epochs, [100 * m[name] for m in evals], "o-", ms=3, label=label)
    accuracy.set(title="Evaluation accuracy", ylabel="%")
    accuracy.legend(frameon=False, loc="lower right")
    if evals:
        accuracy.set_title(f"Evaluation accuracy (last top-1: {evals[-1]['eval/top1']:.2%})")
    rate.plot(train_epochs, [m["train/learning_rate"] for m in train], drawstyle="steps-pre")
    rate.set(title="Learning rate")
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def plot_calibration(sums: np.ndarray, path: pathlib.Path) -> None:
    """Plots accuracy and number of images by confidence, from `evaluate.calibration_sums`."""
    plt = pyplot()
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
    for axes in (reliability, histogram):
        axes.set(xlabel="confidence, %", xlim=(-3, 103))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def plot_predictions(
    images: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: tuple[str, ...],
    path: pathlib.Path,
    *,
    columns: int = 8,
    rows: int = 4,
) -> None:
    """Plots images with prediction and confidence: mistakes first, then the least confident.

    Args:
        images: uint8 [B, H, W, 3].
        labels: int [B].
        probabilities: [B, classes].
        class_names: of all classes.
        path: file to write.
        columns, rows: size of the grid; further images are left out.
    """
    plt = pyplot()
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    order = np.lexsort((confidence, predicted == labels))[: rows * columns]
    rows = -(-len(order) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.5 * columns, 1.75 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, order, strict=False):
        correct = predicted[i] == labels[i]
        text = f"{class_names[predicted[i]]}  {confidence[i]:.0%}"
        if not correct:
            text += f"\n(is {class_names[labels[i]]})"
        axis.imshow(images[i])
        axis.set_title(text, fontsize=9, color=RIGHT if correct else WRONG)
    wrong = int((predicted != labels).sum())
    figure.suptitle(
        f"{len(labels)} evaluation images, {wrong} wrong: mistakes first, then the least confident",
        fontsize=10,
    )
    save(figure, path)


def plot_samples(
    images: np.ndarray, captions: list[str], title: str, path: pathlib.Path, *, columns: int
) -> None:
    """Plots images uint8 [B, H, W, 3] with captions, enlarged by an integer factor if small.

    Captions have one or two lines of at most 24 characters.
    """
    plt = pyplot()
    zoom = -(-MIN_SAMPLE_WIDTH // images.shape[2])
    height, width = images.shape[1] * zoom, images.shape[2] * zoom
    size = min(10, width / 20)  # font size: 24 characters fit
    gap, below, head = 12, 12 + 3 * round(size), 44  # pixels: between images, captions, title
    rows = -(-len(images) // columns)
    across = max(gap + columns * (width + gap), 760)  # the width of the title
    down = head + rows * (height + below + gap)
    figure = plt.figure(figsize=(across / DPI, down / DPI), dpi=DPI)
    figure.text(gap / across, 1 - head / 2 / down, title, fontsize=10, va="center")
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(i, columns)
        left, top = gap + column * (width + gap), head + row * (height + below + gap)
        box = (left / across, 1 - (top + height) / down, width / across, height / down)
        axes = figure.add_axes(box)
        axes.imshow(image, interpolation="nearest")
        axes.axis("off")
        axes.text(0, -4 / height, caption, transform=axes.transAxes, fontsize=size, va="top")
    save(figure, path)


def pyplot():
    """Returns matplotlib's pyplot with a backend that opens no windows."""
    import matplotlib  # slow to import, and only plots need it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure, path: pathlib.Path) -> None:
    figure.savefig(path, dpi=DPI)
    pyplot().close(figure)
