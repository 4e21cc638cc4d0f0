# SPDX-License-Identifier: Apache-2.0
"""From images of any kind to class names: the Classifier, the command, and its tables."""

import csv
import errno
import importlib.util
import io
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

import tnt_flax
from configs import digits
from tests.helpers import small_network
from tests.helpers.photos import all_photos, png
from tests.helpers.random_weights import random_params
from tests.helpers.smoke import SMOKE
from tnt_flax.__main__ import load_command
from tnt_flax.core.errors import InputError, RunError
from tnt_flax.core.files import open_table
from tnt_flax.data.labels import IMAGENET_SUBSETS, imagenet_synsets, readable_names
from tnt_flax.data.transforms import eval_transform
from tnt_flax.runtime.workdir import config_to_json
from tnt_flax.tools import predict
from tnt_flax.training.experiment import Experiment
from tnt_flax.weights.write import save_weights

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay"]


def save(path, classes=10, class_names=NAMES, image_size=32, **data):
    """A small network's weights, in which every image is a class of its own."""
    config = digits.get_config()
    config.update_from_flattened_dict(SMOKE | {"data.image_size": image_size})
    config.data.update(data)
    model = Experiment(config).make_model(classes)
    params = random_params(model, image_size)
    if classes:
        params["head"]["kernel"] *= 50
    info = {"config": config_to_json(config)}
    save_weights(path, params, info | ({"class_names": class_names} if class_names else {}))
    return model, params


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save(path, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.5), crop_fraction=0.8)
    return path


@pytest.fixture(scope="module")
def classifier(weights):
    return tnt_flax.load_classifier(weights)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pics" / "sub").mkdir(parents=True)
    for name, data in all_photos().items():
        (tmp_path / "pics" / f"{name}.png").write_bytes(data)
    (tmp_path / "pics" / "sub" / "img10.PNG").write_bytes(all_photos()["thin"])
    (tmp_path / "pics" / "sub" / "img9.jpg").write_bytes(b"no image")
    (tmp_path / "pics" / "notes.txt").write_text("")
    return tmp_path / "pics"


# -------------------------------------------------------------------------------- the Classifier


def test_images_are_prepared_as_in_evaluation(classifier):
    """Against the network applied by hand to what `eval_transform` gives."""
    assert (classifier.image_size, classifier.crop_fraction) == (32, 0.8)
    photos = list(all_photos().values())
    pixels = np.stack([eval_transform(p, size=32, crop_fraction=0.8) for p in photos])
    images = (pixels / np.float32(255) - np.float32([[[[0.4, 0.5, 0.6]]]])) / np.float32(
        [[[[0.2, 0.25, 0.5]]]]
    )
    logits = jax.jit(classifier.model.apply)(classifier.variables, images)
    expected = np.asarray(jax.nn.softmax(logits))
    answers = classifier.predict(photos, top=10)
    for mine, row in zip(answers, expected, strict=True):
        assert [a.index for a in mine] == np.argsort(-row).tolist()
        np.testing.assert_allclose([a.probability for a in mine], np.sort(row)[::-1], rtol=1e-4)
        assert all(a.label == NAMES[a.index] for a in mine)


@pytest.mark.slow
def test_a_pyramid_classifies(tmp_path, monkeypatch):
    """With its running statistics, which `classifier.variables` hold, too."""
    one = jax.local_devices()[:1]  # to compile for fewer
    monkeypatch.setattr(jax, "local_devices", lambda: one)
    classifier = tnt_flax.load_classifier(small_network.save(tmp_path, "ptnt_ti_patch16_192", 32))
    assert classifier.image_size == 32
    (answers,) = classifier.predict(all_photos()["china"], top=10)
    pixels = eval_transform(all_photos()["china"], size=32, crop_fraction=1.0)
    images = (pixels[None] / np.float32(255) - 0.5) / np.float32(0.25)
    logits = jax.jit(classifier.model.apply)(classifier.variables, images)
    expected = np.asarray(jax.nn.softmax(logits[0]))
    assert [answer.index for answer in answers] == np.argsort(-expected).tolist()
    found = [answer.probability for answer in answers]
    np.testing.assert_allclose(found, np.sort(expected)[::-1], rtol=1e-4)


def test_paths_pil_images_arrays_and_bytes_are_the_same(classifier, folder):
    path = folder / "china.png"
    with Image.open(path) as opened:
        array = np.asarray(opened)
        as_palette = opened.convert("RGBA")
        (first,) = classifier.predict(path)
        assert len(first) == 5 and first[0].probability >= first[1].probability
        others = [str(path), path.read_bytes(), opened, as_palette, array]
        for other in classifier.predict(others) + classifier.predict(array[None]):
            assert other == first
    grey = array[..., 0]
    assert classifier.predict(grey) == classifier.predict([grey[..., None]]) != [first]


def test_any_number_of_images_in_batches(classifier, folder):
    photos = list(all_photos().values())[:5]
    at_once = classifier.predict(photos, top=1)
    for batch_size in (1, 2, 64):
        few = classifier.predict(iter(photos), 1, batch_size)
        assert [a.index for (a,) in few] == [a.index for (a,) in at_once]
    assert classifier.predict([]) == []
    read = []
    outcomes = classifier.outcomes((read.append(p) or p for p in photos * 9), 1, batch_size=2)
    next(outcomes)
    assert len(read) == 4  # two batches, not all


def test_what_cannot_be_read(classifier, folder):
    broken = [folder / "sub/img9.jpg", folder / "none.png", 3.5, np.zeros((4, 4, 3)), b""]
    mixed = [*broken, folder / "china.png"]
    errors = [outcome.error for outcome in classifier.outcomes(mixed)]
    assert errors == [
        f"{folder}/sub/img9.jpg is not a usable image: not an image format that PIL reads",
        f"{folder}/none.png cannot be read: No such file or directory",
        "image 2 is of type float: give paths, PIL images or uint8 arrays",
        "image 3 is not a usable image: pixels are float64, not uint8",
        "image 4 is not a usable image: the file is empty",
        None,
    ]
    with pytest.raises(InputError, match="img9.jpg is not a usable image"):
        classifier.predict(mixed[-1:] + mixed[:1])
    with pytest.raises(InputError, match="top=0 is less than 1"):
        classifier.predict(mixed[-1], top=0)


def test_names_of_classes(tmp_path):
    path = tmp_path / "w.safetensors"
    save(path, classes=1000, class_names=None)
    assert tnt_flax.load_classifier(path).class_names[0] == "tench, Tinca tinca"  # as published
    save(path, classes=10, class_names=list(imagenet_synsets()[:10]))
    assert tnt_flax.load_classifier(path).class_names[1] == "goldfish, Carassius auratus"
    save(path, class_names=None)
    assert tnt_flax.load_classifier(path).class_names == tuple("0123456789")
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    named = tnt_flax.load_classifier(path, class_list=str(tmp_path / "names.txt"))
    assert named.class_names == tuple(NAMES)
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match="2 class names for the 10 classes of .*w.safetensors"):
        tnt_flax.load_classifier(path, class_list=str(tmp_path / "names.txt"))
    with pytest.raises(InputError, match="cannot read the class list none.txt"):
        tnt_flax.load_classifier(path, class_list="none.txt")
    save(path, classes=0, class_names=None)
    with pytest.raises(InputError, match="has no head"):
        tnt_flax.load_classifier(path)


def folder_of(package):
    """Where it is installed, without the seconds that an import takes."""
    return pathlib.Path(importlib.util.find_spec(package).origin).parent


def test_the_bundled_classes_are_those_of_tfds():
    labels = folder_of("tensorflow_datasets") / "datasets/imagenet2012/labels.txt"
    assert list(imagenet_synsets()) == labels.read_text().split()
    assert len(set(readable_names(imagenet_synsets()))) == 999  # two cranes
    for subset in IMAGENET_SUBSETS:
        assert len(imagenet_synsets(subset)) == 200


@pytest.mark.oracle
def test_the_bundled_subsets_are_those_of_timm():
    info = folder_of("timm") / "data/_info"
    for subset, letter in IMAGENET_SUBSETS.items():
        theirs = (info / f"imagenet_{letter}_synsets.txt").read_text().split()
        assert list(imagenet_synsets(subset)) == theirs


# ----------------------------------------------------------------------------------- the command


def run(*arguments):
    return predict.run(load_command("predict")[1].parse_args(list(map(str, arguments))))


def test_answers_are_printed_and_what_is_corrupt_is_left_out(weights, folder, capsys):
    assert run(weights, folder, "--top=2") == {"images": 8, "unreadable": 1}
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        *(f"{folder}/{name}.png" for name in sorted(all_photos())[:-1]),
        f"{folder}/sub/img10.PNG",
        f"{folder}/thin.png",
    ]
    assert all(line.count("%") == 2 for line in lines)
    assert f"left out: {folder}/sub/img9.jpg is not a usable image" in err


def test_the_three_tables_hold_the_same(weights, folder, tmp_path):
    tables = {}
    for suffix in ("csv", "jsonl", "parquet"):
        out = tmp_path / f"answers.{suffix}"
        result = run(weights, folder, "--top=2", f"--out={out}")
        assert result == {"images": 8, "unreadable": 1, "out": str(out)}
        tables[suffix] = out
    rows = [json.loads(line) for line in tables["jsonl"].read_text().splitlines()]
    assert pyarrow.parquet.read_table(tables["parquet"]).to_pylist() == rows
    as_text = [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]
    with open(tables["csv"], newline="") as file:
        assert list(csv.DictReader(file)) == as_text
    assert list(rows[0]) == [
        *("image", "error"),
        *("label_1", "probability_1", "index_1", "label_2", "probability_2", "index_2"),
    ]
    (bad,) = [row for row in rows if row["error"]]
    assert "not a usable image" in bad["error"] and bad["label_1"] is None
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_table_is_there_whole_or_not(tmp_path):
    columns = {"a": str, "b": int}
    for suffix in ("csv", "jsonl", "parquet"):
        path = tmp_path / f"t.{suffix}"
        with pytest.raises(RunError), open_table(path, columns) as write:
            write({"a": "x", "b": 1})
            raise RunError("interrupted")
        assert not list(tmp_path.iterdir())
        with pytest.raises(RunError, match=f"cannot write {path}: No space left"):
            with open_table(path, columns):
                raise OSError(errno.ENOSPC, "No space left on device")
        path.mkdir()
        with pytest.raises(InputError, match=f"cannot write {path}: Is a directory"):
            with open_table(path, columns):
                pass
        path.rmdir()
        assert not list(tmp_path.iterdir())
    with open_table(tmp_path / "t.parquet", columns) as write:
        for i in range(25_000):
            write({"a": None if i % 2 else "y", "b": i})
    assert pyarrow.parquet.read_table(tmp_path / "t.parquet")["b"].to_pylist() == [*range(25_000)]


def test_paths_of_every_kind(folder, tmp_path, monkeypatch):
    def find(*paths, stdin=""):
        found = predict.find_images(list(map(str, paths)), io.StringIO(stdin))
        return [os.path.relpath(file, folder) for file in found]

    assert find(folder / "sub") == ["sub/img9.jpg", "sub/img10.PNG"]  # in natural order
    assert find(folder / "s*.png") == ["small.png", "square.png"]
    assert find(folder / "**" / "*.PNG") == ["sub/img10.PNG"]
    assert find(folder / "notes.txt", folder / "sub") == [
        *("notes.txt", "sub/img9.jpg", "sub/img10.PNG")
    ]
    listed = f"{folder}/gone.png\n\n{folder}/thin.png\n"
    assert find("-", stdin=listed) == ["gone.png", "thin.png"]
    strange = folder / "[1].png"  # a pattern that is a file
    strange.write_bytes(png(np.zeros((2, 2, 3), np.uint8)))
    assert find(strange) == ["[1].png"]
    (tmp_path / "empty").mkdir()
    for bad, message in {
        folder / "none.png": "none.png does not exist",
        folder / "*.gif": "does not exist",
        tmp_path / "empty": "empty has no images: give image files",
        "-": "there is no file name on stdin",
    }.items():
        with pytest.raises(InputError, match=message):
            find(bad)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{w}"], "the following arguments are required: PATH"),
        (["{w}", "{f}", "--out=answers.xls"], "answers.xls is not a known kind of table: use .csv"),
        (["{w}", "{f}", "--out=/nowhere/a.csv"], "cannot write /nowhere/a.csv: No such file"),
        (["none.pth", "{f}"], "cannot read none.pth: No such file"),
        (["{w}", "{f}", "--name=tnt_s_patch16_224"], "not tnt_s_patch16_224"),
        (["{w}", "{f}", "--batch-size=0"], "batch_size=0 is less than 1"),
        (["{w}", "{f}", "--class-list=none.txt"], "cannot read the class list none.txt"),
    ],
)
def test_bad_arguments(weights, folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        run(*(a.format(w=weights, f=folder) for a in arguments))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("answers*"))


def test_nothing_readable_leaves_no_table(weights, folder, tmp_path):
    with pytest.raises(RunError, match="no image could be read: no table was written"):
        run(weights, folder / "sub/img9.jpg", f"--out={tmp_path / 'a.csv'}")
    assert not list(tmp_path.glob("a.csv*"))


@pytest.mark.slow
def test_the_command(weights, folder, root):
    listed = "\n".join([f"{folder}/sub/img9.jpg", f"{folder}/china.png"])
    command = [sys.executable, "-m", "tnt_flax", "predict", str(weights), "-"]
    done = subprocess.run(command, cwd=root, input=listed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first.startswith(f"{folder}/china.png: ")
    assert json.loads(last) == {"images": 1, "unreadable": 1}

    read, write = os.pipe()
    os.close(read)  # as `head` does
    cut = subprocess.run(
        [*command[:-1], str(folder / "china.png")], cwd=root, stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert cut.returncode == 1 and b"Traceback" not in cut.stderr and b"Broken" not in cut.stderr
