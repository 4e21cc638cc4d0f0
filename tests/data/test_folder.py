# SPDX-License-Identifier: Apache-2.0
"""A folder without images to evaluate on is divided: the same way each time, and it is said."""

import os

import numpy as np
import pytest

from tests.helpers.photos import png
from tnt_flax.core.errors import InputError
from tnt_flax.data.sources import Holdout, ImageFolder
from tnt_flax.training.experiment import Experiment

FIFTH = Holdout(0.2, "train", "validation")


def write(folder, **counts):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (folder / name / f"{i}.png").write_bytes(png(np.zeros((2, 2, 3), np.uint8)))


def names(root, split, holdout=FIFTH):
    source = ImageFolder(root, split, holdout=holdout)
    paths = [os.path.relpath(source.name_of(i), root) for i in range(len(source))]
    assert [source.class_names[source[i][1]] for i in range(len(source))] == [
        os.path.basename(os.path.dirname(path)) for path in paths
    ]
    return paths


@pytest.mark.parametrize("below", ["", "train"])
def test_every_image_is_in_one_part(tmp_path, caplog, below):
    write(tmp_path / below, cat=20, dog=2, emu=1)
    rest, held_out = names(tmp_path, "train"), names(tmp_path, "validation")
    assert not set(rest) & set(held_out) and len(rest) + len(held_out) == 23
    count = {name: sum(name in path for path in held_out) for name in ("cat", "dog", "emu")}
    assert count == {"cat": 4, "dog": 1, "emu": 0}  # of one image none can be spared
    assert held_out == names(tmp_path, "validation")
    (message,) = set(caplog.messages)
    assert message == (
        f"{tmp_path} has no split 'validation': holding out a fixed set of 5 images of "
        f"{tmp_path / below}"
    )


def test_further_images_move_hardly_any(tmp_path):
    write(tmp_path, cat=100)
    before = set(names(tmp_path, "validation"))
    write(tmp_path, cat=110)
    after = set(names(tmp_path, "validation"))
    assert (len(before), len(after)) == (20, 22) and len(before & after) >= 16


def test_a_split_that_is_there_is_used(tmp_path, caplog):
    write(tmp_path / "train", cat=9)
    write(tmp_path / "val", cat=3)
    assert len(names(tmp_path, "train")) == 9 and len(names(tmp_path, "validation")) == 3
    assert not caplog.messages


def test_bad_folders(tmp_path):
    write(tmp_path / "one", cat=1, dog=1)
    with pytest.raises(InputError, match="no class in .* has two images, so none can be held out"):
        ImageFolder(tmp_path / "one", "validation", holdout=FIFTH)
    write(tmp_path / "odd" / "Training", cat=5)  # no class called Training with cats in it
    with pytest.raises(
        InputError, match="no folder 'train' in .* it holds Training; .*train_split"
    ):
        ImageFolder(tmp_path / "odd", "train", holdout=FIFTH)
    write(tmp_path / "plain", cat=5)
    for holdout in (None, FIFTH._replace(share=0.0)):
        with pytest.raises(InputError, match="or data.holdout=0.2 to evaluate on a fifth"):
            ImageFolder(tmp_path / "plain", "validation", holdout=holdout)
    with pytest.raises(InputError, match="no folder 'test'"):  # neither of the two
        ImageFolder(tmp_path / "plain", "test", holdout=FIFTH)


def test_the_config_says_how_much(smoke_config, tmp_path):
    write(tmp_path, cat=10)
    config = smoke_config(
        data__source="folder",
        data__root=str(tmp_path),
        data__holdout=0.3,
        data__eval_split="validation",
    )
    assert len(Experiment(config).train_source) == 7
    config.data.holdout = 1.0
    with pytest.raises(InputError, match=r"data.holdout=1.0 is outside \[0, 1\)"):
        Experiment(config)
