# SPDX-License-Identifier: Apache-2.0
"""Two epochs of the published recipe on an image folder, interrupted once."""

import contextlib
import io
import math

import numpy as np
import pytest
from PIL import Image

from configs import default
from tests.helpers.photos import jpeg
from tnt_flax.data.sources import ImageFolder
from tnt_flax.training.experiment import Experiment
from tnt_flax.training.metrics import read_metrics_file
from tnt_flax.training.train import train_and_evaluate

CLASSES = ("n3", "n1", "n2")  # in the order of the class list, which is not sorted
SIZES = {"train": (61, 40, 55), "val": (9, 4, 8)}
DAMAGED = {"train": "n1/20.jpg", "val": "n1/2.jpg"}  # both epochs sample the first
BATCH, STEPS = 32, 4  # of 156 images an epoch
PUBLISHED = default.get_config().augment
CHANGES = {
    "epochs": 2,
    "batch_size": BATCH,
    "model.name": "tnt_ti_patch16_224",
    "model.depth": 2,
    "model.outer_dim": 24,
    "model.inner_dim": 4,
    "model.inner_heads": 2,
    "data.image_size": 32,
    "data.corrupt": "skip",
    "data.workers": 2,
    "data.threads": 2,
    "optimizer.warmup_epochs": 1,
    "optimizer.cooldown_epochs": 0,
    "ema.decay": 0.9,
    "eval.batch_size": 16,
    "log.every": "2 steps",
}


def make_folder(root):
    """Writes crops of photographs, one file truncated per split; returns that of training."""
    photos = [Image.open(io.BytesIO(jpeg(name))) for name in ("china", "flower")]
    generator = np.random.default_rng(0)
    for split, counts in SIZES.items():
        for name, count in zip(CLASSES, counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                left, top = generator.integers(0, (560, 360))
                crop = photos[i % 2].crop((left, top, left + 80, top + 60))
                crop.save(root / split / name / f"{i}.jpg")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    for split, name in DAMAGED.items():
        damaged = root / split / name
        damaged.write_bytes(damaged.read_bytes()[:300])
    return root / "train" / DAMAGED["train"]


def planned_records(config, source, damaged):
    """Returns the records of every step according to the plan, and the number of replacements."""
    plan = Experiment(config).plan
    assert plan.steps_per_epoch == STEPS
    records = np.array([[plan.lookup(s, row)[0] for row in range(BATCH)] for s in range(2 * STEPS)])
    broken = [i for i in range(len(source)) if source.name_of(i) == str(damaged)]
    shown = np.where(records == broken, records + 1, records)  # replaced by the next one
    return shown, int((records == broken).sum())


@pytest.mark.soak
def test_two_epochs_of_the_published_recipe(tmp_path, monkeypatch):
    damaged = make_folder(tmp_path / "data")
    config = default.get_config()
    config.update_from_flattened_dict(CHANGES)
    config.data.root = str(tmp_path / "data")
    config.data.class_list = str(tmp_path / "data" / "classes.txt")
    assert config.augment.to_dict() == PUBLISHED.to_dict() and config.model.drop_path == 0.1
    source = ImageFolder(config.data.root, "train", config.data.class_list)
    records, replaced = planned_records(config, source, damaged)
    labels = np.array([source[record][1] for record in range(len(source))])
    assert replaced == 6  # three views per epoch

    batches = []

    make_batches = Experiment.train_batches

    def stop_after(last):
        def train_batches(*args):
            with contextlib.closing(make_batches(*args)) as stream:
                for batch in stream:
                    batches.append(batch["label"])
                    if len(batches) > last:
                        raise KeyboardInterrupt
                    yield batch

        monkeypatch.setattr(Experiment, "train_batches", train_batches)

    stop_after(STEPS + 1)
    with pytest.raises(KeyboardInterrupt):
        train_and_evaluate(config, tmp_path / "run")
    np.testing.assert_array_equal(batches, labels[records[: STEPS + 2]])
    batches.clear()
    stop_after(math.inf)
    result = train_and_evaluate(config, tmp_path / "run")  # resumes at the end of the first epoch

    # Every step has the planned images, three views each, with the labels of the class list.
    np.testing.assert_array_equal(batches, labels[records[STEPS:]])
    epochs = records.reshape(2, STEPS * BATCH)
    assert [len(set(epoch)) for epoch in epochs] == [math.ceil(STEPS * BATCH / 3)] * 2

    lines = read_metrics_file(tmp_path / "run" / "metrics.jsonl")
    steps = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in steps] == [2, 4, 6, 8]
    assert all(math.isfinite(v) for line in steps for v in line.values())
    assert sum(line["train/replaced_images"] for line in steps) == replaced
    assert steps[0]["train/loss"] == pytest.approx(math.log(3), abs=0.1)  # of a random guess
    assert [line["train/epoch"] for line in steps] == [0.5, 1, 1.5, 2]
    rates = [line["train/learning_rate"] for line in steps]
    assert rates[:2] == pytest.approx([1e-6] * 2) and min(rates[2:]) > 1e-4
    assert all(0 <= line["train/data_wait"] <= 1 for line in steps)

    evaluations = [line for line in lines if "eval/top1" in line]
    assert [line["step"] for line in evaluations] == [4, 8]
    for line in evaluations:  # each image once except the damaged one
        assert (line["eval/images"], line["eval/skipped"]) == (sum(SIZES["val"]) - 1, 1)
    assert result == {
        name: evaluations[-1][f"eval/{name}"]
        for name in ("top1", "top5", "loss", "images", "skipped")
    } | {"step": 8, "fingerprint": lines[-1]["fingerprint"]}
