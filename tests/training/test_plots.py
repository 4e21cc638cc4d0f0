# SPDX-License-Identifier: Apache-2.0
import matplotlib
import numpy as np
import pytest
from PIL import Image

from tnt_flax.tools.figures import plot_calibration
from tnt_flax.tools.preview import font_of
from tnt_flax.training import plots
from tnt_flax.training.evaluate import calibration_sums


@pytest.fixture
def figures(monkeypatch):
    """Figures that were saved, in order."""
    saved, save = [], plots.save
    monkeypatch.setattr(
        plots, "save", lambda figure, path: saved.append(figure) or save(figure, path)
    )
    return saved


def points(line):
    return line.get_xydata().tolist()


def test_curves_show_losses_accuracies_and_learning_rates(tmp_path, figures):
    train = {"train/loss": 2.0, "train/epoch": 0.5, "train/learning_rate": 0.1}
    evaluation = {"eval/loss": 1.0, "eval/top1": 0.5, "eval/top5": 0.9}
    plots.plot_curves([{"step": 5, **train}, {"step": 10, **evaluation}], tmp_path / "run.png")
    loss, accuracy, rate = figures[0].axes
    assert [points(line) for line in loss.lines] == [[[0.5, 2.0]], [[1.0, 1.0]]]
    assert [points(line) for line in accuracy.lines] == [[[1.0, 50.0]], [[1.0, 90.0]]]
    assert [points(line) for line in rate.lines] == [[[0.5, 0.1]]]
    assert accuracy.get_title() == "Evaluation accuracy (last top-1: 50.00%)"
    with Image.open(tmp_path / "run.png") as file:
        assert file.size[0] > 1000 and file.size[1] > 300


def test_curves_of_a_run_without_metrics_are_empty(tmp_path, figures):
    plots.plot_curves([], tmp_path / "none.png")
    assert all(points(line) == [] for axes in figures[0].axes for line in axes.lines)
    assert (tmp_path / "none.png").exists()


def test_calibration_shows_accuracy_and_images_of_each_bin(tmp_path, figures):
    confidence, correct = np.array([0.95, 1.0, 0.5]), np.array([True, False, True])
    plot_calibration(calibration_sums(confidence, correct), tmp_path / "c.png")
    reliability, histogram = figures[0].axes
    np.testing.assert_allclose(points(reliability.lines[1]), [[50, 100], [290 / 3, 50]])
    heights = [bar.get_height() for bar in histogram.patches]
    assert heights == [0] * 7 + [1] + [0] * 6 + [2]


def test_predictions_show_mistakes_first_then_the_least_confident(tmp_path, figures):
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]], np.float32)
    images = np.arange(4, dtype=np.uint8).repeat(8 * 8 * 3).reshape(4, 8, 8, 3)
    labels, names, path = np.array([0, 0, 0, 1]), ("cat", "dog"), tmp_path / "p.png"
    plots.plot_predictions(images, labels, probabilities, names, path, columns=2, rows=2)
    axes = figures[0].axes
    texts = ["dog  80%\n(is cat)", "cat  60%", "dog  70%", "cat  90%"]
    assert [axis.get_title() for axis in axes] == texts
    assert [axis.images[0].get_array()[0, 0, 0] for axis in axes] == [2, 1, 3, 0]
    colors = [matplotlib.colors.to_hex(axis.title.get_color()) for axis in axes]
    assert colors == [plots.WRONG] + [plots.RIGHT] * 3
    with Image.open(path) as file:
        assert file.size[0] > 200


# ------------------------------------------------------------------------------------- class names


def plot_names(names, path):
    images, labels = np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 1])
    plots.plot_predictions(images, labels, np.eye(2, dtype=np.float32), names, path)


def write_font(path, characters):
    """Writes a font that has a square for each character."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 500), (500, 500), (500, 0)):
        pen.lineTo(corner)
    pen.closePath()
    glyph, order = pen.glyph(), [".notdef", "square"]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(order)
    font.setupCharacterMap({ord(c): "square" for c in characters})
    font.setupGlyf(dict.fromkeys(order, glyph))
    font.setupHorizontalMetrics(dict.fromkeys(order, (600, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    font.setupOS2(sTypoAscender=800)
    font.setupPost()
    font.save(path)


@pytest.fixture
def clear_fonts():
    plots.fonts_for.cache_clear()
    yield
    plots.fonts_for.cache_clear()


def test_dollars_are_literal_and_long_names_are_shortened(tmp_path, figures, clear_fonts):
    names = ("$5 bill_{", "x" * 80)
    plot_names(names, tmp_path / "p.png")
    texts = sorted(axis.get_title() for axis in figures[0].axes if axis.get_title())
    assert texts == ["$5 bill_{  100%", "x" * 23 + "\N{HORIZONTAL ELLIPSIS}  100%"]
    assert matplotlib.rcParams["text.parse_math"] is not False  # outside of the figure


def test_names_without_a_font_are_reported_once(tmp_path, clear_fonts, caplog):
    for _ in range(2):
        plot_names(("\U00012000\U00012001", "cat"), tmp_path / "p.png")
    (record,) = caplog.records
    assert "no font on this machine has 2 characters" in record.message
    assert "fonts-noto-cjk" in record.message


def test_names_are_drawn_in_a_font_that_has_them(tmp_path, clear_fonts, caplog, monkeypatch):
    from matplotlib import font_manager

    write_font(tmp_path / "squares.ttf", "\U00012000\U00012001")
    manager = font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", list(manager.ttflist))
    manager.addfont(tmp_path / "squares.ttf")
    plot_names(("\U00012000\U00012001", "cat"), tmp_path / "p.png")
    assert not caplog.records
    fonts = plots.fonts_for(frozenset("\U00012000cat"))
    assert [font.name for font in fonts] == ["DejaVu Sans", "Squares"]
    assert font_of(fonts, "\U00012000", 9).getname()[0] == "Squares"
    assert font_of(fonts, "cat", 9).getname()[0] == "DejaVu Sans"
