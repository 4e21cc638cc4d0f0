# SPDX-License-Identifier: Apache-2.0
"""Properties common to all data sources, and scikit-learn's digits."""

import collections

import numpy as np
import pytest

from tests.helpers.source_checks import message_of, records
from tnt_flax.data.sources import Digits, open_source, with_classes
from tnt_flax.data.sources.names import ClassOptions


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (dict(kind="fodler"), "did you mean 'folder'?): choose one of folder, "),
        (dict(kind="TFDS"), "did you mean 'tfds'?): choose one of folder, "),
        (dict(kind="digits", columns=("image", "", "")), "are for kind 'table', not 'digits'"),
        (dict(kind="webdataset", eval_labels="x"), "and 'folder', not 'webdataset'"),
    ],
)
def test_unknown_kinds_and_arguments_of_other_kinds_are_refused(arguments, expected):
    assert expected in message_of(lambda: open_source(split="train", **arguments))


class Named:
    """A source whose record k is (k, k)."""

    storage_path = ""

    def __init__(self, *names):
        self.class_names = names

    def __len__(self):
        return len(self.class_names)

    def __getitem__(self, index):
        return index, index

    def name_of(self, index):
        return f"record {index}"


def test_evaluation_may_lack_classes_but_have_no_others(caplog):
    full, partial = Named("a", "b", "c"), Named("c", "a")
    assert with_classes(full, ("a", "b", "c")) is full
    source = with_classes(partial, ("a", "b", "c"))
    assert source.class_names == ("a", "b", "c")
    assert records(source) == [(0, 2), (1, 0)] and source.name_of(1) == "record 1"
    assert caplog.messages == ["the evaluation split has no images of b"]
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    source = with_classes(Named(decomposed), ("b", composed))
    assert source.class_names == ("b", composed) and records(source) == [(0, 1)]
    assert "has the class 'b', which is not one of the 2 of training (a, c)" in message_of(
        lambda: with_classes(full, ("a", "c"))
    )


def test_class_lists_order_and_choose_the_classes_of_any_source(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("7\n3\n")
    digits = open_source("digits", "test", classes=ClassOptions(str(path), subset=True))
    whole = Digits("test")
    expected = [(i, "73".index(str(whole[i][1]))) for i in range(360) if whole[i][1] in (3, 7)]
    assert digits.class_names == ("7", "3") and len(digits) == len(expected)
    assert [label for _, label in records(digits)] == [label for _, label in expected]
    assert digits.name_of(0) == whole.name_of(expected[0][0])
    assert "set data.subset=true" in message_of(
        lambda: open_source("digits", "test", classes=ClassOptions(str(path)))
    )
    for options, message in (
        (dict(order="alphabetical"), "use natural or string"),
        (dict(subset=True), "needs data.class_list"),
    ):
        assert message in message_of(lambda o=options: ClassOptions(**o))


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
    assert "no split 'all'" in message_of(lambda: Digits("all"))


def test_digits_are_balanced_and_reproducible():
    test = Digits("test")
    counts = collections.Counter(test[i][1] for i in range(len(test)))
    assert len(counts) == 10 and min(counts.values()) >= 24 and max(counts.values()) <= 48
    again = Digits("validation")
    assert all((test[i][0] == again[i][0]).all() for i in range(360))
    assert [test[i][1] for i in range(12)] == [0, 5, 1, 6, 2, 2, 9, 9, 0, 5, 0, 8]
    assert test.name_of(12) == "digits test image 12"
