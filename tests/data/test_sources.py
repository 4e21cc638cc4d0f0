# SPDX-License-Identifier: Apache-2.0
"""Properties common to all data sources, and scikit-learn's digits."""

import collections

import numpy as np
import pytest

from tests.helpers.source_checks import message_of
from tnt_flax.data.sources import Digits, check_same_classes, open_source


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (dict(kind="fodler"), "did you mean 'folder'?): choose one of folder, "),
        (dict(kind="TFDS"), "did you mean 'tfds'?): choose one of folder, "),
        (dict(kind="digits", class_list="x.txt"), "not for kind 'digits'"),
        (dict(kind="webdataset", eval_labels="x"), "for kind 'imagenet_tars', not 'webdataset'"),
    ],
)
def test_unknown_kinds_and_arguments_of_other_kinds_are_refused(arguments, expected):
    assert expected in message_of(lambda: open_source(split="train", **arguments))


def test_splits_must_have_the_same_classes():
    named = lambda *names: type("Named", (), {"class_names": names})
    check_same_classes(named("a", "b"), named("a", "b"))
    assert message_of(lambda: check_same_classes(named("a", "b", "c"), named("a", "c"))) == (
        "training and evaluation splits differ (3 and 2 classes): "
        "label 1 is 'b' in training and 'c' in evaluation"
    )
    assert message_of(lambda: check_same_classes(named("a"), named("a", "b"))) == (
        "training and evaluation splits differ (1 and 2 classes): "
        "label 1 is 'no class' in training and 'b' in evaluation"
    )


# ----------------------------------------------------------------------------------------- digits


def test_digits_are_split_without_overlap():
    train, test = Digits("train"), open_source("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.class_names == test.class_names == tuple("0123456789")
    images = [source[i][0].tobytes() for source in (train, test) for i in range(len(source))]
    assert len(set(images)) == 1797  # all digits differ, so none is in both splits
    pixels, label = train[0]
    assert (pixels.dtype, pixels.shape, type(label)) == (np.uint8, (8, 8), int)
    assert max(train[i][0].max() for i in range(50)) == 255
    assert "no split 'valid'" in message_of(lambda: Digits("valid"))


def test_digits_are_balanced_and_reproducible():
    test = Digits("test")
    counts = collections.Counter(test[i][1] for i in range(len(test)))
    assert len(counts) == 10 and min(counts.values()) >= 24 and max(counts.values()) <= 48
    again = Digits("validation")
    assert all((test[i][0] == again[i][0]).all() for i in range(360))
    assert [test[i][1] for i in range(12)] == [0, 5, 1, 6, 2, 2, 9, 9, 0, 5, 0, 8]
    assert test.name_of(12) == "digits test image 12"
