# SPDX-License-Identifier: Apache-2.0
"""Mapping of a data set's labels to the classes of a network."""

import importlib.util
import json
import pathlib
import re

import pytest

from tnt_flax.core.errors import InputError
from tnt_flax.data.labels import (
    IMAGENET_SUBSETS,
    imagenet_synsets,
    map_to_network,
    read_real_labels,
    readable_names,
    select_classes,
)

SYNSETS = imagenet_synsets()


def test_labels_are_mapped_by_name():
    names = ["ant", "bee", "cat", "dog"]
    assert map_to_network(["dog", "ant"], names, 4).tolist() == [3, 0]
    assert map_to_network(names, names, 4).tolist() == [0, 1, 2, 3]
    with pytest.raises(InputError, match=r"4 classes \(ant, .*\) and none is called 'cow', one"):
        map_to_network(["ant", "cow"], names, 4)
    with pytest.raises(InputError, match="and none is called '0'"):  # not ImageNet's classes
        map_to_network(["0", "1", "2", "3"], names, 4)


def test_labels_are_mapped_for_weights_without_class_names():
    assert map_to_network(["b", "a"], None, 2).tolist() == [0, 1]
    with pytest.raises(InputError, match=r"2 classes \(of unknown names\) and none is called 'a'"):
        map_to_network(["a"], None, 2)
    # 1,000 classes without names are ImageNet's.
    r = imagenet_synsets("imagenet-r")
    assert map_to_network(r, None, 1000)[:4].tolist() == [1, 2, 4, 6]
    assert map_to_network([f"class {i}" for i in range(1000)], None, 1000)[7] == 7


@pytest.mark.parametrize(
    "natural, warns",
    [
        (("0", "1", "2", "10"), r"natural order \(2, 10 from class 2\).*as strings \(10, 2\)"),
        (
            ("apple", "Banana"),
            r"natural order \(apple, Banana from class 0\).*class_order='string'",
        ),
        (("a", "b"), None),
        (("2", "10", "1"), None),  # the order of a class list
        (("1", "10", "2"), None),
    ],
)
def test_an_uncertain_order_of_classes_is_a_warning(caplog, natural, warns):
    labels = map_to_network(natural, None, len(natural))
    assert labels.tolist() == list(range(len(natural)))
    assert bool(caplog.text) == bool(warns) and re.search(warns or "", caplog.text)
    caplog.clear()
    map_to_network(natural, natural, len(natural))
    assert not caplog.text


def test_numbers_are_imagenet_classes_as_in_imagenet_v2():
    numbers = [str(i) for i in range(1000)]
    assert map_to_network(numbers, None, 1000).tolist() == list(range(1000))
    backwards = map_to_network(numbers, SYNSETS[::-1], 1000)
    assert backwards.tolist() == list(range(999, -1, -1))
    with pytest.raises(InputError, match="and none is called '0'"):
        map_to_network(numbers[:999], SYNSETS, 1000)


def test_selected_classes(tmp_path):
    assert select_classes("", None, 7) is None
    assert select_classes("imagenet-a", None, 1000)[:3] == (6, 11, 13)
    (tmp_path / "few.txt").write_text("dog\nant\n")
    few = str(tmp_path / "few.txt")
    assert select_classes(few, ["ant", "bee", "dog"], 3) == (0, 2)
    (tmp_path / "none.txt").write_text("\n")
    for selection, names, message in [
        ("imagenet-b", None, "'imagenet-b' is neither imagenet-a nor imagenet-r: cannot read"),
        (few, ["ant", "bee"], "and none is called 'dog'"),
        ("imagenet-r", ["ant", "bee"], "and none is called 'n01443537'"),
        (str(tmp_path / "none.txt"), ["ant"], "names no class"),
    ]:
        with pytest.raises(InputError, match=message):
            select_classes(selection, names, len(names or SYNSETS))


class Named:
    """A source that has only names of records."""

    class_names = SYNSETS

    def __init__(self, names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def name_of(self, index):
        return self.names[index]


def test_real_labels(tmp_path):
    path = tmp_path / "real.json"
    path.write_text(json.dumps([[1, 2], [], [5]]))
    source = Named([f"val/n0/ILSVRC2012_val_{i:08}.JPEG" for i in (3, 1, 2)])
    assert read_real_labels(str(path), source).tolist() == [[5, -1], [1, 2], [-1, -1]]
    for names, message in [
        (["cat.jpg"], "cat.jpg is not named like one of the 3 validation images"),
        (["ILSVRC2012_val_00000004.JPEG"], "of the 3 validation images in .*real.json"),
        (["ILSVRC2012_val_00000000.JPEG"], "of the 3 validation images in .*real.json"),
    ]:
        with pytest.raises(InputError, match=message):
            read_real_labels(str(path), Named(names))
    for content, message in {
        "[[1000]]": "is not ReaL's real.json",
        '{"a": 1}': "is not ReaL's real.json",
        "[[1": "cannot read the ReaL labels .*real.json: ",
    }.items():
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            read_real_labels(str(path), source)
    with pytest.raises(InputError, match="cannot read the ReaL labels .*none.json: No such file"):
        read_real_labels(str(tmp_path / "none.json"), source)


def folder_of(package):
    """Folder of an installed package, without importing it."""
    return pathlib.Path(importlib.util.find_spec(package).origin).parent


def test_bundled_classes_equal_those_of_tfds():
    labels = folder_of("tensorflow_datasets") / "datasets/imagenet2012/labels.txt"
    assert list(SYNSETS) == labels.read_text().split()
    assert len(set(readable_names(SYNSETS))) == 999  # two cranes
    assert {len(imagenet_synsets(subset)) for subset in IMAGENET_SUBSETS} == {200}


@pytest.mark.oracle
def test_bundled_subsets_equal_those_of_timm():
    for subset, letter in IMAGENET_SUBSETS.items():
        theirs = folder_of("timm") / f"data/_info/imagenet_{letter}_synsets.txt"
        assert list(imagenet_synsets(subset)) == theirs.read_text().split()
