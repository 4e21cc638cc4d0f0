# SPDX-License-Identifier: Apache-2.0
"""The report of a run has the numbers of the evaluation and opens in a browser."""

import html.parser
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from tnt_flax.__main__ import load_command
from tnt_flax.runtime.workdir import current_environment, read_environments, record_environment
from tnt_flax.tools import page, report
from tnt_flax.tools.report import Predictions, confusion, most_confused
from tnt_flax.training.evaluate import calibration_error, calibration_sums, evaluate_checkpoint
from tnt_flax.training.train import train_and_evaluate

CHROMIUM = shutil.which("chromium")
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
QUIET += "--disable-background-networking --disable-component-update --disable-sync"
DARK, LIGHT = 0, 1  # Blink's numbers of the preferred color scheme


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(page, result of the command, last evaluation with `ece`) of a run of 29 steps."""
    from configs import digits
    from tests.helpers.smoke import SMOKE

    workdir = tmp_path_factory.mktemp("run<b>")
    config = digits.get_config()
    config.update_from_flattened_dict(SMOKE)
    evaluated = train_and_evaluate(config, workdir)
    evaluated["ece"] = evaluate_checkpoint(config, workdir, "best")["ece"]
    result = report.run(load_command("report")[1].parse_args([str(workdir)]))
    return workdir / "report.html", result, evaluated


class Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href", "srcset")]


@pytest.mark.slow
def test_page_states_the_results_of_evaluation(made):
    path, result, evaluated = made
    for name in ("top1", "top5", "loss", "images"):
        assert result[name] == pytest.approx(evaluated[name], rel=1e-5), name
    assert result["calibration_error"] == pytest.approx(evaluated["ece"], rel=1e-4)
    text = path.read_text()
    assert f"<b>{result['top1']:.2%}</b>top-1" in text
    cells = re.findall(r'<td style="background[^>]*>(\d*)</td>', text)
    counts = np.array([int(cell or 0) for cell in cells]).reshape(10, 10)
    assert counts.sum() == 360
    assert np.trace(counts) == round(360 * result["top1"])
    for heading in ("Curves", "Confusion", "Calibration", "Largest losses", "Environment"):
        assert f"<h2>{heading}</h2>" in text
    assert "<td>optimizer.learning_rate</td><td>0.001</td>" in text
    (start,) = read_environments(path.parent)
    assert f"From step 0, {start['time']}" in text
    assert f"<td>jaxlib</td><td>{start['environment']['jaxlib']}</td>" in text


@pytest.mark.slow
def test_page_has_no_external_resources(made):
    path, _, _ = made
    text, links = path.read_text(), Links()
    links.feed(text)
    assert len(links.links) > 30 and "script" not in links.tags
    assert all(link.startswith(("data:", "#")) for link in links.links)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert links.tags.count("svg") == 2


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_page_in_a_browser(made, tmp_path):
    path, _, _ = made
    backgrounds = {}
    for scheme in (LIGHT, DARK):
        screenshot = tmp_path / f"{scheme}.png"
        options = [
            *QUIET.split(),
            f"--user-data-dir={tmp_path / f'profile{scheme}'}",
            f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=1120,2400",
            f"--screenshot={screenshot}",
        ]
        subprocess.run(
            [CHROMIUM, *options, path.as_uri()], check=True, timeout=120, capture_output=True
        )
        pixels = np.asarray(Image.open(screenshot).convert("L"), np.int16)
        background = int(np.median(pixels))
        backgrounds[scheme] = background
        # Text and images in every part of the page, with contrast to the background.
        marked = np.abs(pixels - background) > 100
        assert marked.mean() > 0.005
        assert all(part.any() for part in np.array_split(marked, 8))
        # The axes and text of the curves, below the facts.
        assert marked[200:560, 40:380].mean() > 0.002
    assert backgrounds[LIGHT] > 240 and backgrounds[DARK] < 40


def test_environments_of_a_run(tmp_path):
    here = current_environment()
    assert here["python"] and here["numpy"] == np.__version__ and here["hosts"] == 1
    unknown = "<p>Unknown: the workdir has no environment.json.</p>"
    assert report.render_environments(tmp_path) == unknown
    there = {"jax": "0.1", "devices": "4 TPU <v9>"}
    for step, seen in [(0, here), (20, here), (30, there), (40, here), (35, there), (35, there)]:
        record_environment(tmp_path, step, seen)
    starts = read_environments(tmp_path)
    assert [(s["step"], s["environment"]) for s in starts] == [(0, here), (30, there)]
    page = report.render_environments(tmp_path)
    assert page.index("From step 0,") < page.index(here["machine"]) < page.index("From step 30")
    assert page.index("From step 30") < page.index("<td>devices</td><td>4 TPU &lt;v9&gt;</td>")


def test_confusion_and_calibration_by_hand():
    predictions = Predictions(
        record=np.arange(6),
        label=np.array([0, 0, 1, 1, 1, 2]),
        predicted=np.array([0, 1, 1, 0, 0, 2]),
        confidence=np.array([0.9, 0.9, 0.5, 0.6, 0.6, 1.0]),
        loss=np.zeros(6),
        rank=np.zeros(6),
    )
    matrix = [[1, 1, 0], [2, 1, 0], [0, 0, 1]]
    assert confusion(predictions, 3).tolist() == matrix
    assert most_confused(predictions, 5) == [(1, 0, 2), (0, 1, 1)]
    assert most_confused(predictions, 1) == [(1, 0, 2)]
    # Bins of a fifteenth: {.9, .9} half right, {.5} right, {.6, .6} wrong, {1} right.
    expected = (2 * 0.4 + 0.5 + 2 * 0.6 + 0) / 6
    sums = calibration_sums(predictions.confidence, predictions.correct)
    assert calibration_error(sums) == pytest.approx(expected)


def test_names_are_escaped():
    matrix = page.matrix(np.eye(2, dtype=int), ["<b>", "a & b"])
    assert "&lt;b&gt;" in matrix and "a &amp; b" in matrix and "<b>" not in matrix
