# SPDX-License-Identifier: Apache-2.0
"""`Classifier` and `predict`: inputs, class names, tables, errors."""

import concurrent.futures
import csv
import functools
import io
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy
from PIL import Image
from scipy.special import expit, softmax

import tnt_flax
from tests.helpers import small_network
from tests.helpers.photos import all_photos, png
from tnt_flax.__main__ import load_command
from tnt_flax.core.errors import InputError, RunError
from tnt_flax.data.labels import imagenet_synsets
from tnt_flax.data.transforms import eval_transform
from tnt_flax.tools import predict

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay"]
MEAN, STD, CROP = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5), 0.8
DATA = {"mean": MEAN, "std": STD, "crop_fraction": CROP}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return small_network.save(folder, size=32, class_names=NAMES, data=DATA)


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


# -------------------------------------------------------------------------------- Classifier


def logits_of(classifier, photos):
    """Returns the logits of the network for the pixels of `eval_transform`."""
    transform = functools.partial(eval_transform, size=classifier.image_size, crop_fraction=CROP)
    pixels = np.stack([transform(photo) for photo in photos])
    images = (pixels / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    return np.asarray(jax.jit(classifier.model.apply)(classifier.variables, images))


def check_probabilities(classifier, photos):
    expected = softmax(logits_of(classifier, photos), axis=1)
    for predictions, row in zip(classifier.predict(photos, top=10), expected, strict=True):
        assert [p.index for p in predictions] == np.argsort(-row).tolist()
        found = [p.probability for p in predictions]
        np.testing.assert_allclose(found, np.sort(row)[::-1], rtol=1e-4)
        assert all(p.label == NAMES[p.index] for p in predictions)


def test_preprocessing_is_that_of_evaluation(classifier):
    assert (classifier.image_size, classifier.crop_fraction) == (32, CROP)
    check_probabilities(classifier, list(all_photos().values()))


@pytest.mark.slow
def test_pyramid(one_device, tmp_path):
    """`classifier.variables` include the running statistics."""
    path = small_network.save(tmp_path, "ptnt_ti_patch16_192", 32, class_names=NAMES, data=DATA)
    check_probabilities(tnt_flax.load_classifier(path), [all_photos()["china"]])


def test_paths_pil_images_arrays_and_bytes_give_equal_predictions(classifier, folder):
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


def test_batches(classifier, folder):
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


def test_unreadable_images_have_an_error(classifier, folder):
    broken = [folder / "sub/img9.jpg", folder / "none.png", 3.5, np.zeros((4, 4, 3)), b""]
    mixed = [*broken, folder / "china.png"]
    errors = [outcome.error for outcome in classifier.outcomes(mixed)]
    assert errors == [
        f"{folder}/sub/img9.jpg is not a usable image: not an image format that PIL reads",
        f"{folder}/none.png cannot be read: No such file or directory",
        "image 2 is of type float: give paths, PIL images or uint8 arrays",
        "image 3 is not a usable image: pixels are float64, not uint8: convert them, or set "
        "deep_pixels",
        "image 4 is not a usable image: the file is empty",
        None,
    ]
    with pytest.raises(InputError, match="img9.jpg is not a usable image"):
        classifier.predict(mixed[-1:] + mixed[:1])
    with pytest.raises(InputError, match="top=0 is less than 1"):
        classifier.predict(mixed[-1], top=0)


def test_class_names(tmp_path):
    names_of = lambda path, **options: tnt_flax.load_classifier(path, **options).class_names
    path = small_network.save(tmp_path, num_classes=1000, class_names=[])
    assert names_of(path)[0] == "tench, Tinca tinca"  # of ImageNet
    small_network.save(tmp_path, class_names=list(imagenet_synsets()[:10]))
    assert names_of(path)[1] == "goldfish, Carassius auratus"
    small_network.save(tmp_path, class_names=[])
    assert names_of(path) == tuple("0123456789")
    class_list = tmp_path / "names.txt"
    class_list.write_text("\n".join(NAMES))
    assert names_of(path, class_list=str(class_list)) == tuple(NAMES)
    class_list.write_text("a\nb\n")
    with pytest.raises(InputError, match="2 class names for the 10 classes of .*safetensors"):
        names_of(path, class_list=str(class_list))
    small_network.save(tmp_path, num_classes=0)
    headless = tnt_flax.load_classifier(path)
    assert headless.class_names == ()
    with pytest.raises(InputError, match="has no head.*: use features"):
        headless.predict(all_photos()["small"])


# ------------------------------------------------------------------ batches, features, policy


@pytest.fixture
def one_device(monkeypatch):
    """Compiles for one device: for eight, all small batches are padded to eight rows."""
    one = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: one)


@pytest.mark.slow
def test_services_compile_once_per_power_of_two(one_device, weights):
    classifier = tnt_flax.load_classifier(weights)
    photos = list(all_photos().values())
    with concurrent.futures.ThreadPoolExecutor(6) as pool:  # threads share the programs
        sizes = [1, 3, 2, 5, 6, 3, 1]
        found = list(pool.map(lambda n: classifier.predict(photos[:n], top=1), sizes))
    assert sorted(rows for _, rows in classifier._programs) == [1, 2, 4, 8]
    before = dict(classifier._programs)
    classifier.predict(photos[:7])
    assert classifier._programs == before
    for predictions, size in zip(found, sizes, strict=True):
        assert [p.index for (p,) in predictions] == [p.index for (p,) in found[4][:size]]


@pytest.mark.parametrize("num_classes", [10, pytest.param(0, marks=pytest.mark.slow)])
def test_features_are_the_heads_input(one_device, tmp_path, num_classes):
    path = small_network.save(tmp_path, size=32, num_classes=num_classes)
    classifier = tnt_flax.load_classifier(path)
    photos = [all_photos()[name] for name in ("china", "small")]
    features = classifier.features(photos)
    assert (features.shape, features.dtype) == ((2, 24), np.float32)
    if num_classes:
        head = classifier.variables["params"]["head"]
        logits = features @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
        expected = softmax(logits, axis=1)
        for row, predictions in zip(expected, classifier.predict(photos, top=10), strict=True):
            for p in predictions:
                assert p.probability == pytest.approx(row[p.index], abs=1e-5)
    np.testing.assert_allclose(classifier.features(photos[1])[0], features[1], atol=1e-5)
    assert classifier.features([]).shape == (0, 24)


@pytest.mark.slow
def test_feature_tables(one_device, folder, tmp_path):
    path = small_network.save(tmp_path, size=32, num_classes=0)
    tables = {}
    for suffix in ("PARQUET", "jsonl", "Csv"):  # in any case
        out = tmp_path / f"f.{suffix}"
        result = run(path, folder / "small.png", folder / "sub", "--features", f"--out={out}")
        assert result == {"images": 2, "unreadable": 1, "out": str(out)}
        tables[suffix] = out
    table = pyarrow.parquet.read_table(tables["PARQUET"])
    assert table.schema.field("features").type == pyarrow.list_(pyarrow.float32())
    expected = tnt_flax.load_classifier(path).features(folder / "small.png")[0]
    lines = [json.loads(line) for line in tables["jsonl"].read_text().splitlines()]
    with open(tables["Csv"], newline="") as file:
        rows = list(csv.DictReader(file))
    for vector in (
        table["features"][0].as_py(),
        lines[0]["features"],
        json.loads(rows[0]["features"]),
    ):
        np.testing.assert_allclose(np.float32(vector), expected, atol=1e-5)
    assert rows[1]["features"] == "" and lines[1]["features"] is None and lines[1]["error"]
    with pytest.raises(InputError, match="--features needs a table: --out=FILE.parquet"):
        run(path, folder, "--features")


def test_names_that_are_not_utf_8(weights, folder, tmp_path, capsysbinary):
    name = os.fsencode(folder / "sub") + b"/caf\xe9.png"
    with open(name, "wb") as file:
        file.write(all_photos()["small"])
    os.rename(folder / "sub/img9.jpg", os.fsencode(folder / "sub") + b"/br\xf6ken.jpg")
    for suffix in ("csv", "jsonl", "parquet"):
        assert run(weights, folder / "sub", f"--out={tmp_path / 'a'}.{suffix}")["unreadable"] == 1
    assert b"br\xef\xbf\xbdken.jpg is not a usable image" in (tmp_path / "a.csv").read_bytes()
    assert "caf\ufffd.png" in (tmp_path / "a.jsonl").read_text("utf-8")
    run(weights, folder / "sub")
    out, err = capsysbinary.readouterr()
    assert "caf\ufffd.png: ".encode() in out and "br\ufffdken.jpg".encode() in err


@pytest.mark.slow
def test_policy_of_the_classifier(one_device, weights, tmp_path, caplog):
    upright = Image.open(io.BytesIO(all_photos()["portrait"]))
    tags = Image.Exif()
    tags[0x0112] = 6
    turned, clear = tmp_path / "turned.png", tmp_path / "clear.png"
    upright.rotate(90, expand=True).save(turned, exif=tags)
    alpha = Image.new("L", upright.size, 0)
    Image.merge("RGBA", [*upright.split(), alpha]).save(clear)
    plain = tnt_flax.load_classifier(weights)
    for _ in range(2):
        rotated, hidden = plain.predict([turned, clear])
    expected, white = plain.predict([upright, Image.new("RGB", upright.size, "white")])
    assert rotated != expected and hidden == expected
    warnings = [record.message for record in caplog.records if "loaded" not in record.message]
    assert len(warnings) == 2  # once each
    assert f"{turned} has an EXIF orientation" in warnings[0] and "exif=True" in warnings[0]
    assert f"{clear} has transparent pixels" in warnings[1] and "background=" in warnings[1]

    caplog.clear()
    covered = tnt_flax.load_classifier(weights, exif=True, background=(255, 255, 255))
    assert covered.predict([turned, clear]) == [expected, white]
    assert not [record for record in caplog.records if "loaded" not in record.message]
    with pytest.raises(InputError, match="background=.* is not a color"):
        tnt_flax.load_classifier(weights, background=(1, 2))

    stored = {"exif": True, "background": [255, 255, 255]}  # as in the config of a run
    small_network.save(tmp_path, size=32, class_names=NAMES, data=DATA | stored)
    again = tnt_flax.load_classifier(tmp_path / "small.safetensors")
    assert again.predict([turned, clear]) == [expected, white]


@pytest.mark.slow
def test_policy_options_of_the_command(one_device, weights, tmp_path, monkeypatch):
    deep = tmp_path / "deep.png"
    deep.write_bytes(png(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)))
    classified = []
    monkeypatch.setattr(predict, "ranked", lambda found: classified.append(found) or {})
    out = f"--out={tmp_path / 'a.csv'}"
    for option in ("clip", "minmax", "0,4095"):
        run(weights, deep, f"--deep-pixels={option}", out)
    assert classified[0] != classified[1] == classified[2]
    with pytest.raises(RunError, match="no image could be read"):
        run(weights, deep, "--max-pixels=100", out)
    run(weights, deep, "--max-pixels=0", "--exif", "--background=255,0,0", out)
    with pytest.raises(InputError, match="background='red' is not a color"):
        run(weights, deep, "--background=red")


@pytest.mark.slow
def test_rectangular_images(one_device, tmp_path):
    size = (32, 64)
    path = small_network.save(tmp_path, size=size, class_names=NAMES, data=DATA)
    classifier = tnt_flax.load_classifier(path)
    assert classifier.image_size == size
    check_probabilities(classifier, [all_photos()["china"]])


# ---------------------------------------------------------------------------------- command


def run(*arguments):
    return predict.run(load_command("predict")[1].parse_args(list(map(str, arguments))))


def test_predictions_are_printed_without_corrupt_images(weights, folder, capsys):
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


def test_tables_have_equal_contents(weights, folder, tmp_path):
    tables = {}
    for suffix in ("csv", "jsonl", "parquet"):
        out = tmp_path / f"predictions.{suffix}"
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


# ---------------------------------------------------------------------------- several classes


@pytest.mark.slow
def test_predictions_above_a_threshold(weights, folder, tmp_path, capsys):
    files = [folder / "china.png", folder / "small.png"]
    classifier = tnt_flax.load_classifier(weights)
    expected = expit(np.float64(logits_of(classifier, [file.read_bytes() for file in files])))
    middle = float(np.median(expected))
    found = classifier.predict(files, threshold=middle)
    for predictions, row in zip(found, expected, strict=True):
        best = [i for i in np.argsort(-row) if row[i] > middle]
        assert [p.index for p in predictions] == best
        np.testing.assert_allclose([p.probability for p in predictions], row[best], rtol=1e-4)

    out = tmp_path / "a.csv"
    run(weights, *files, folder / "sub/img9.jpg", f"--threshold={middle}", f"--out={out}")
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert list(rows[0]) == ["image", "error", "label", "probabilities"]
    assert rows[0]["label"] == "|".join(p.label for p in found[0])  # as in a table to train on
    assert json.loads(rows[0]["probabilities"])[0] == pytest.approx(found[0][0].probability)
    assert rows[2]["error"] and not rows[2]["label"]
    run(weights, files[0], "--threshold=0.9999999")
    assert capsys.readouterr().out == f"{files[0]}: no class\n"
    with pytest.raises(InputError, match="threshold=1.0 is outside"):
        classifier.predict(files, threshold=1.0)
    classifier._loss = "softmax"
    with pytest.raises(InputError, match="trained with loss.name='softmax'.* needs weights"):
        classifier.predict(files, threshold=0.5)


@pytest.mark.slow
def test_logits_are_stored_with_the_names_of_the_images(weights, folder, tmp_path):
    files, path = [folder / "china.png", folder / "sub/img9.jpg"], tmp_path / "a.safetensors"
    result = run(weights, *files, f"--logits={path}")
    assert result == {"images": 1, "unreadable": 1, "out": str(path)}
    stored = safetensors.numpy.load_file(path)
    (expected,) = logits_of(tnt_flax.load_classifier(weights), [files[0].read_bytes()])
    np.testing.assert_allclose(stored["logits"][0], expected, rtol=1e-4, atol=1e-5)
    assert np.isnan(stored["logits"][1]).all() and stored["readable"].tolist() == [True, False]
    assert stored["names"].tobytes().decode().split("\0") == list(map(str, files))
    with pytest.raises(InputError, match="leave out --out"):
        run(weights, *files, f"--logits={path}", "--features", "--out=a.csv")
    with pytest.raises(RunError, match="no image could be read: nothing was written"):
        run(weights, files[1], f"--logits={tmp_path / 'b.safetensors'}")
    assert not list(tmp_path.glob("b.*"))


def test_folders_with_loops_and_other_files(folder, caplog):
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "sub" / "@eaDir").mkdir()
    (folder / "sub" / "@eaDir" / "thumb.jpg").write_bytes(b"")
    (folder / "photo.heic").write_bytes(b"")
    found = predict.find_images([str(folder)], [])
    assert len(found) == len(set(map(os.path.realpath, found))) == 9
    assert "1 .txt" in caplog.text and "pip install pillow-heif" in caplog.text


def test_find_images(folder, tmp_path, monkeypatch):
    def find(*paths, stdin=""):
        stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()))
        found = predict.find_images(list(map(str, paths)), stdin)
        return [os.path.relpath(file, folder) for file in found]

    assert find(folder / "sub") == ["sub/img9.jpg", "sub/img10.PNG"]  # in natural order
    assert find(folder / "s*.png") == ["small.png", "square.png"]
    assert find(folder / "**" / "*.PNG") == ["sub/img10.PNG"]
    assert find(folder / "notes.txt", folder / "sub") == [
        *("notes.txt", "sub/img9.jpg", "sub/img10.PNG")
    ]
    listed = f"{folder}/gone.png\n\n{folder}/thin.png\n"
    windows = "\ufeff" + listed.replace("\n", "\r\n")
    assert find("-", stdin=listed) == find("-", stdin=windows) == ["gone.png", "thin.png"]
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
        (
            ["{w}", "{f}", "--out=predictions.xls"],
            "predictions.xls is not a known kind of table: use .csv",
        ),
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
    assert not list(tmp_path.glob("predictions*"))


def test_nothing_readable_leaves_no_table(weights, folder, tmp_path):
    with pytest.raises(RunError, match="no image could be read: nothing was written"):
        run(weights, folder / "sub/img9.jpg", f"--out={tmp_path / 'a.csv'}")
    assert not list(tmp_path.glob("a.csv*"))


@pytest.mark.slow
def test_command_with_stdin_and_closed_stdout(weights, folder, root):
    listed = "\n".join([f"{folder}/sub/img9.jpg", f"{folder}/china.png"])
    command = [sys.executable, "-m", "tnt_flax", "predict", str(weights), "-"]
    done = subprocess.run(command, cwd=root, input=listed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first.startswith(f"{folder}/china.png: ")
    assert json.loads(last) == {"images": 1, "unreadable": 1}

    nul = f"{folder}/china.png\0".encode()  # as `find -print0` writes it
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, cwd=root, input=nul, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.endswith(b"error: cannot write the output: No space left on device\n")

    read, write = os.pipe()
    os.close(read)  # as `head` does
    cut = subprocess.run(
        [*command[:-1], str(folder / "china.png")], cwd=root, stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert cut.returncode == 1 and b"Traceback" not in cut.stderr and b"Broken" not in cut.stderr
