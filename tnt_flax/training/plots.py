# SPDX-License-Identifier: Apache-2.0
"""Plots of a run: its curves, and images with predictions. Helpers for all plots."""

import pathlib
from typing import Any

import numpy as np

RIGHT, WRONG = "#1b7837", "#b2182b"
DPI = 110


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
    last = f" (last top-1: {evals[-1]['eval/top1']:.2%})" if evals else ""
    accuracy.set(title=f"Evaluation accuracy{last}", ylabel="%")
    accuracy.legend(frameon=False, loc="lower right")
    rate.plot(train_epochs, [m["train/learning_rate"] for m in train], drawstyle="steps-pre")
    rate.set(title="Learning rate")
    style_axes(figure, xlabel="epoch")
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


def pyplot():
    """Returns matplotlib's pyplot with a backend that opens no windows."""
    import matplotlib  # slow to import, and only plots need it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def style_axes(figure, **properties) -> None:
    """Sets `properties` of all axes, with a light grid and without a frame."""
    for axes in figure.axes:
        axes.set(**properties)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)


def save(figure, path: pathlib.Path) -> None:
    figure.savefig(path, dpi=DPI)
    pyplot().close(figure)
