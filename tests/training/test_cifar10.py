# SPDX-License-Identifier: Apache-2.0
"""The config for CIFAR-10 on synthetic images in the layouts of tfds, the hub, and a folder."""

import os
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from configs import cifar10, textures
from tests.helpers.parquet import hugging_face
from tests.helpers.photos import png
from tests.helpers.tfds_files import write_tfds
from tnt_flax.core.errors import InputError, Stopped
from tnt_flax.runtime.watchdog import Watchdog
from tnt_flax.training.config import check_config
from tnt_flax.training.experiment import Experiment
from tnt_flax.training.train import train_and_evaluate

NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
SIZES = {"train": 40, "test": 20}


def write_as_tfds(root, examples):
    features = {"id": tfds.features.Text(), "image": tfds.features.Image(shape=(32, 32, 3))}
    features |= {"label": tfds.features.ClassLabel(names=NAMES)}
    rows = {
        split: [
            {"id": f"{split}_{k}", "image": image, "label": k % 10}
            for k, image in enumerate(images)
        ]
        for split, images in examples.items()
    }
    described = tfds.features.FeaturesDict(features)
    write_tfds(root, "cifar10", "3.0.2", described, rows, file_format="tfrecord")


def write_as_table(root, examples):
    (root / "plain_text").mkdir()
    for split, images in examples.items():
        table = hugging_face(images, NAMES, [k % 10 for k in range(len(images))])
        metadata = table.schema.metadata[b"huggingface"].replace(b'"image"', b'"img"')
        table = table.rename_columns(["img", "label"])
        table = table.replace_schema_metadata({"huggingface": metadata})
        pq.write_table(table, root / f"plain_text/{split}-00000-of-00001.parquet")


def write_as_folder(root, examples):
    for split, images in examples.items():
        for k, image in enumerate(images):
            file = root / split / NAMES[k % 10] / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image)


LAYOUTS = {"tfds": write_as_tfds, "table": write_as_table, "folder": write_as_folder}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_trains_evaluates_and_resumes(layout, tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    images = lambda count: generator.integers(0, 256, (count, 32, 32, 3), np.uint8)
    examples = {split: list(map(png, images(count))) for split, count in SIZES.items()}
    (tmp_path / "data").mkdir()
    LAYOUTS[layout](tmp_path / "data", examples)
    config = cifar10.get_config()
    config.update(epochs=2, batch_size=16)
    config.data.update(source=layout, root=str(tmp_path / "data"))
    config.model.update(depth=1, outer_dim=24, outer_heads=2)
    config.optimizer.warmup_epochs = config.augment.mix_off_epochs = 1
    config.eval.update(every="2 epochs", batch_size=16)
    config.log.every = "1 steps"
    expected = train_and_evaluate(config, tmp_path / "whole")
    assert expected["images"] == 20 and expected["step"] == 4
    assert Experiment(config).data.class_names == tuple(NAMES)

    progress = Watchdog.progress

    def stop_once(self, what, **options):
        if what.startswith("step 3 "):
            monkeypatch.undo()
            os.kill(os.getpid(), signal.SIGTERM)
        return progress(self, what, **options)

    monkeypatch.setattr(Watchdog, "progress", stop_once)
    with pytest.raises(Stopped):
        train_and_evaluate(config, tmp_path / "run")
    assert train_and_evaluate(config, tmp_path / "run") == expected


@pytest.mark.slow
def test_networks_have_words_of_two_by_two_pixels():
    for config in (cifar10.get_config(), cifar10.get_config("gpu"), textures.get_config()):
        check_config(config)
        experiment = Experiment(config, num_classes=10, steps_per_epoch=10)
        assert not experiment.training_warnings()
        words = experiment.state_shapes.params["word_pos"].shape[1]
        assert words == (config.model.patch_size // 2) ** 2
    with pytest.raises(InputError, match="cifar10.py:tpu: the argument after the colon"):
        cifar10.get_config("tpu")
