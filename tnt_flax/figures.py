# SPDX-License-Identifier: Apache-2.0
"""The two pictures that a run leaves behind: its curves, and test images with their predictions."""

import pathlib
from typing import Any

import numpy as np

RIGHT, WRONG = "#1b7837", "#b2182b"


def plot_curves(metrics: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Loss, accuracy and learning rate over epochs, from the lines of a metrics.jsonl."""
    plt = _pyplot()
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
    _save(figure, path)


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
    """A sheet of images uint8 [B, H, W, 3] with prediction and confidence, mistakes first.

    `probabilities` is [B, classes]. Of the rest, the least certain come first.
    """
    plt = _pyplot()
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    order = np.lexsort((confidence, predicted == labels))[: rows * columns]
    rows = -(-len(order) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.5 * columns, 1.75 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, order, strict=False):
        right = predicted[i] == labels[i]
        text = f"{class_names[predicted[i]]}  {confidence[i]:.0%}"
        if not right:
            text += f"\n(is {class_names[labels[i]]})"
        axis.imshow(images[i])
        axis.set_title(text, fontsize=9, color=RIGHT if right else WRONG)
    wrong = int((predicted != labels).sum())
    figure.suptitle(
        f"{len(labels)} evaluation images, {wrong} wrong: mistakes first, then the least certain",
        fontsize=10,
    )
    _save(figure, path)


def _pyplot():
    import matplotlib  # slow to import, and only this file needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure, path: pathlib.Path) -> None:
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)
