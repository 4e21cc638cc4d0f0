# SPDX-License-Identifier: Apache-2.0
"""Images of several classes: names, targets, metrics, and a run on folders "blue|red"."""

import csv

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.photos import png
from tnt_flax.__main__ import main
from tnt_flax.core.errors import InputError, RunError
from tnt_flax.data.labels import split_names
from tnt_flax.data.sources import labels_of, open_source
from tnt_flax.training.evaluate import evaluate_checkpoint, multi_label_metrics
from tnt_flax.training.experiment import Experiment
from tnt_flax.training.run import check_data
from tnt_flax.training.step import make_augment
from tnt_flax.training.train import train_and_evaluate

COLORS = {"red": 0, "green": 1, "blue": 2}


@pytest.fixture
def folder(tmp_path):
    """Images whose channels of the named colors are bright, 24 for training, 12 for evaluation."""
    random = np.random.default_rng(0)
    for split, names, count in (
        ("train", ("red", "green|red", "blue|green", "blue", "|"), 8),
        ("validation", ("red", "blue|red", "blue", "green"), 3),
    ):
        for name in names:
            for i in range(count):
                pixels = random.integers(0, 60, (32, 32, 3), np.uint8)
                pixels[..., [COLORS[color] for color in filter(None, name.split("|"))]] += 180
                path = tmp_path / "data" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(pixels))
    return tmp_path / "data"


def test_names_are_split_into_classes(folder):
    source = split_names(open_source("folder", "train", root=str(folder)))
    assert source.class_names == ("blue", "green", "red")
    found = {
        open_source("folder", "train", root=str(folder)).class_names[label]: tuple(row)
        for label, row in zip(
            labels_of(open_source("folder", "train", root=str(folder))),
            labels_of(source),
            strict=True,
        )
    }
    assert found == {
        "red": (2, -1),
        "green|red": (1, 2),
        "blue|green": (0, 1),
        "blue": (0, -1),
        "|": (-1, -1),
    }
    evaluation = open_source("folder", "validation", root=str(folder))
    assert split_names(evaluation, source.class_names).class_names == source.class_names
    with pytest.raises(InputError, match="no training image has the class 'red'"):
        split_names(evaluation, ("blue", "green"))
    plain = open_source("folder", "validation", root=str(folder))
    plain.class_names = ("a", "b", "c", "d")
    assert split_names(plain) is plain


def test_targets_are_multi_hot_and_smoothed():
    augment = make_augment(4, label_smoothing=0.2, mean=(0.5,) * 3, std=(0.5,) * 3)
    labels = jnp.array([[0, 2], [3, -1], [-1, -1]])
    batch = {"image": jnp.zeros((3, 2, 2, 3), jnp.uint8), "label": labels}
    _, targets = augment(batch, None, None, 0)
    expected = 0.8 * np.array([[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]) + 0.05
    np.testing.assert_allclose(targets, expected, rtol=1e-6)


def test_average_precision_and_loss_by_hand():
    logits = np.array([[3.0, 0.0, 1.0], [2.0, 0.0, 0.0], [1.0, 0.0, 0.0], [9.0, 9.0, 9.0]])
    targets = np.array([[1, 0, 0], [0, 0, 0], [1, 0, 1], [1, 1, 1]], bool)
    rows = [{"logits": logits, "targets": targets, "mask": np.array([True, True, True, False])}]
    loss, (images, precision) = multi_label_metrics(rows)
    assert images.tolist() == [2, 0, 1]
    # Class 0: right at ranks 1 and 3. Class 2: its image ties with another at ranks 2 and 3.
    np.testing.assert_allclose(precision, [(1 + 2 / 3) / 2, np.nan, 1 / 3])
    p = 1 / (1 + np.exp(-logits[:3]))
    expected = -np.where(targets[:3], np.log(p), np.log(1 - p)).mean()
    np.testing.assert_allclose(loss, expected)
    with pytest.raises(RunError, match="none has a class"):
        multi_label_metrics([rows[0] | {"targets": np.zeros((4, 3), bool)}])


def test_settings_for_images_of_one_class_are_refused(folder, smoke_config):
    multi = dict(data__source="folder", data__root=str(folder), loss__name="bce")
    for best, data in (("mean_per_class", multi), ("mean_average_precision", {})):
        config = smoke_config(checkpoint__best=best, data__eval_split="validation", **data)
        with pytest.raises(InputError, match=f"{best}' is no metric of"):
            check_data(Experiment(config))
    config = smoke_config(data__balanced=True, data__eval_split="validation", **multi)
    with pytest.raises(InputError, match="data.balanced is for images of one class each"):
        _ = Experiment(config).data.plan


@pytest.fixture
def table(folder):
    """The images of `folder` as train.csv and validation.csv."""
    for split in ("train", "validation"):
        paths = sorted((folder / split).rglob("*.png"))
        lines = [f"{path.relative_to(folder)},{path.parent.name}" for path in paths]
        (folder / f"{split}.csv").write_text("\n".join(["image,label", *lines]))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("source", ["folder", "table"])
def test_a_run_learns_several_classes_and_reports_average_precision(
    table, source, smoke_config, tmp_path
):
    config = smoke_config(
        data__source=source, data__root=str(table), data__eval_split="validation",
        loss__name="bce", checkpoint__best="mean_average_precision", epochs=40, batch_size=40,
        eval__batch_size=8, eval__every="20 epochs", ema__decay=0.0, model__outer_dim=24,
    )  # fmt: skip
    result = train_and_evaluate(config, tmp_path / "run")
    assert result["mean_average_precision"] > 0.9
    assert result["images"] == 12 and "mean_per_class" not in result
    per_class = tmp_path / "classes.csv"
    again = evaluate_checkpoint(config, tmp_path / "run", "last", str(per_class))
    assert again["mean_average_precision"] == pytest.approx(result["mean_average_precision"])
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-5)
    rows = list(csv.DictReader(per_class.read_text().splitlines()))
    assert [(row["class"], row["images"]) for row in rows] == [
        ("blue", "6"), ("green", "3"), ("red", "6")
    ]  # fmt: skip
    values = [float(row["average_precision"]) for row in rows]
    assert np.mean(values) == pytest.approx(result["mean_average_precision"])
    assert "eval/mean_average_precision" in (tmp_path / "run/metrics.jsonl").read_text()

    out, images = tmp_path / "predictions.csv", sorted((table / "validation").rglob("*.png"))
    options = ["--threshold=0.4", f"--out={out}", *map(str, images)]
    assert main(["predict", str(tmp_path / "run"), *options]) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert {label for row in rows for label in row["label"].split("|")} == {*COLORS}
    found = open_source("table", "predictions", root=str(tmp_path))  # predictions are a table
    assert [found.class_names[label] for label in found.labels] == [row["label"] for row in rows]
