# SPDX-License-Identifier: Apache-2.0
import matplotlib
import numpy as np
from PIL import Image

from tnt_flax.training.plots import plot_curves, plot_predictions


def test_curves_of_a_run_and_of_a_run_that_just_began(tmp_path):
    train = {"train/loss": 2.0, "train/epoch": 0.5, "train/learning_rate": 0.1}
    evals = {"eval/loss": 1.0, "eval/top1": 0.5, "eval/top5": 0.9}
    plot_curves([{"step": 5, **train}, {"step": 10, **evals}], tmp_path / "run.png")
    plot_curves([], tmp_path / "none.png")
    for name in ("run.png", "none.png"):
        with Image.open(tmp_path / name) as file:
            image = np.asarray(file.convert("RGB"))
        assert image.shape[0] > 300 and image.shape[1] > 1000
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10  # something is drawn


def test_mistakes_come_first(tmp_path, monkeypatch):
    titles = []
    original = matplotlib.axes.Axes.set_title
    monkeypatch.setattr(
        matplotlib.axes.Axes,
        "set_title",
        lambda self, text, **kw: titles.append((text, kw["color"])) or original(self, text, **kw),
    )
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]], np.float32)
    plot_predictions(
        np.zeros((4, 8, 8, 3), np.uint8),
        np.array([0, 0, 0, 1]),
        probabilities,
        ("cat", "dog"),
        tmp_path / "p.png",
        columns=2,
        rows=2,
    )
    texts = [text for text, _ in titles]
    assert texts == ["dog  80%\n(is cat)", "cat  60%", "dog  70%", "cat  90%"]
    assert titles[0][1] != titles[1][1]
    with Image.open(tmp_path / "p.png") as file:
        assert file.size[0] > 200
