# SPDX-License-Identifier: Apache-2.0
"""Plots of a run: its curves, and images with predictions. Helpers for all plots."""

import contextlib
import functools
import logging
import pathlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

logger = logging.getLogger("tnt_flax")
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
    class_names = [shorten(name) for name in class_names]
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    labels = labels.reshape(len(labels), -1)
    hits = (predicted[:, None] == labels).any(axis=1)
    order = np.lexsort((confidence, hits))[: rows * columns]
    rows = -(-len(order) // columns)
    known = [[class_names[label] for label in row if label >= 0] for row in labels]
    with literal_text(name for i in order for name in (class_names[predicted[i]], *known[i])):
        figure, axes = plt.subplots(
            rows, columns, figsize=(1.5 * columns, 1.75 * rows), layout="constrained", squeeze=False
        )
        for axis in axes.flat:
            axis.axis("off")
        for axis, i in zip(axes.flat, order, strict=False):
            text = f"{class_names[predicted[i]]}  {confidence[i]:.0%}"
            if not hits[i]:
                text += f"\n(is {', '.join(known[i]) or 'of no class'})"
            axis.imshow(images[i])
            axis.set_title(text, fontsize=9, color=RIGHT if hits[i] else WRONG)
        wrong = int((~hits).sum())
        figure.suptitle(
            f"{len(labels)} evaluation images, {wrong} wrong: mistakes first, then the least "
            "confident",
            fontsize=10,
        )
        save(figure, path)


def pyplot():
    """Returns matplotlib's pyplot with a backend that opens no windows."""
    import matplotlib  # slow to import, and only plots need it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def shorten(name: str, letters: int = 24) -> str:
    """Returns `name` with an ellipsis in place of what exceeds a number of letters."""
    return name if len(name) <= letters else f"{name[: letters - 1]}\N{HORIZONTAL ELLIPSIS}"


@contextlib.contextmanager
def literal_text(texts: Iterable[str]) -> Iterator[None]:
    """Plots in this context show `texts` in fonts that have their characters; "$" is literal."""
    families = [font.name for font in fonts_for(frozenset("".join(texts)))]
    style = {"font.family": families, "text.parse_math": False}
    with pyplot().rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # `fonts_for` reported it
        yield


@functools.cache
def fonts_for(characters: frozenset[str]) -> tuple[Any, ...]:
    """Returns fonts (matplotlib's FontEntry) that together have the characters.

    The first is DejaVu Sans, which comes with matplotlib. Logs one warning if no font on this
    machine has some of the characters.
    """
    pyplot()
    from matplotlib.font_manager import fontManager

    fonts = [f for f in fontManager.ttflist if not f.name.startswith("Last Resort")]
    regular = [f for f in fonts if f.name == "DejaVu Sans" and f.style == "normal"]
    chosen = [min(regular, key=lambda font: abs(int(font.weight) - 400))]
    missing = {c for c in characters if c.isprintable()} - characters_of(chosen[0].fname)
    while missing:
        best = max(fonts, key=lambda font: len(missing & characters_of(font.fname)))
        if not missing & characters_of(best.fname):
            some = "".join(sorted(missing)[:5])
            logger.warning(
                f"no font on this machine has {len(missing)} characters of the class names, such "
                f"as {some}: install one (Noto Sans, for instance fonts-noto-cjk)"
            )
            break
        chosen.append(best)
        missing -= characters_of(best.fname)
    return tuple(chosen)


@functools.cache
def characters_of(font_file: str) -> frozenset[str]:
    """Returns the characters for which a font has glyphs; none for a damaged font."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(font_file).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()


def style_axes(figure, **properties) -> None:
    """Sets `properties` of all axes, with a light grid and without a frame."""
    for axes in figure.axes:
        axes.set(**properties)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)


def save(figure, path: pathlib.Path) -> None:
    figure.savefig(path, dpi=DPI)
    pyplot().close(figure)
