# SPDX-License-Identifier: Apache-2.0
"""Where images come from: a folder, a data set prepared by tfds, or scikit-learn's digits.

A source is a sequence of records. `len(source)` counts them; `source[i]` is `(image, label)`, where
the image is either the encoded file (bytes) or uint8 pixels [H, W] or [H, W, C], and the label an
int; `source.class_names` names the labels; `source.name_of(i)` is what a message calls record i.
Reading a record may raise OSError. Sources pickle, because worker processes get a copy.
"""

import collections
import difflib
import os
import pathlib
import re
from typing import Protocol

import numpy as np

from tnt_flax.errors import InputError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
)
KINDS = ("folder", "tfds", "digits")
NUM_DIGITS_TEST = 360  # a fifth of the 1,797 digits


class Source(Protocol):
    """The interface of this file, for annotations."""

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[bytes | np.ndarray, int]: ...

    def name_of(self, index: int) -> str: ...


def open_source(
    kind: str, split: str, *, root: str = "", name: str = "", class_list: str = ""
) -> Source:
    """Opens the `split` of a data set.

    `kind` is "folder" (`root`, and optionally `class_list`), "tfds" (`name`, and `root` as its
    data_dir; empty means tfds' default) or "digits". Raises InputError for an unknown kind, for an
    argument that the kind needs but did not get, and for whatever the source itself finds wrong.
    """
    if kind not in KINDS:
        guess = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.0)[0]
        raise InputError(
            f"unknown kind of data set {kind!r}: did you mean {guess!r}? ({', '.join(KINDS)})"
        )
    if class_list and kind != "folder":
        raise InputError(f"a class list orders the folders of kind 'folder', not of kind {kind!r}")
    if kind == "folder":
        return ImageFolder(root, split, class_list)
    if kind == "tfds":
        return TfdsSource(name, split, root)
    return Digits(split)


def check_same_classes(train: Source, evaluation: Source) -> None:
    """Raises InputError unless label k means the same class in both splits."""
    ours, theirs = train.class_names, evaluation.class_names
    if ours == theirs:
        return
    counts = f"{len(ours)} and {len(theirs)} classes"
    for label, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            raise InputError(
                f"training and evaluation splits differ ({counts}): label {label} is {a!r} in "
                f"training and {b!r} in evaluation"
            )
    longer = "training" if len(ours) > len(theirs) else "evaluation"
    extra = max(ours, theirs, key=len)[min(len(ours), len(theirs))]
    raise InputError(
        f"training and evaluation splits differ ({counts}): {extra!r} is only in {longer}"
    )


# ----------------------------------------------------------------------------------- image folder


class ImageFolder:
    """timm's and torchvision's layout, `root/split/class/.../image.jpg`.

    Labels number the class folders in natural order ("2" before "10", timm's order), or in the
    order of `class_list`, a text file with one class folder's name per line. Below a class folder
    images are found at any depth and sorted in natural order; names beginning with a dot are
    skipped. The split "validation" (or "val") is the folder `validation` or else `val`.
    """

    def __init__(self, root: str, split: str, class_list: str = ""):
        folder = _find_split(root, split)
        self.folder = str(folder)
        self.class_names = _order_classes(_class_folders(folder), class_list, folder)
        self._files = []  # paths relative to the folder, as text: an ImageNet has 1.3 million
        self._labels = []
        for label, class_name in enumerate(self.class_names):
            files = _images_below(folder / class_name)
            if not files:
                raise InputError(
                    f"class folder {folder / class_name} has no images: add some, or remove it"
                )
            self._files += [os.path.join(class_name, file) for file in files]
            self._labels += [label] * len(files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        with open(self.name_of(index), "rb") as file:
            return file.read(), self._labels[index]

    def name_of(self, index: int) -> str:
        return os.path.join(self.folder, self._files[index])


def natural_key(name: str) -> tuple:
    """Sorts runs of digits as numbers and ignores case, as timm does; ties by the name itself."""
    parts = re.split(r"(\d+)", name.lower())  # text and digits alternate, beginning with text
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _find_split(root, split):
    if not root:
        raise InputError("an image folder needs its root directory: set data.root")
    root = pathlib.Path(root).expanduser()
    existing = _folders_in(root, "data set root")
    wanted = ("validation", "val") if split in ("validation", "val") else (split,)
    for name in wanted:
        if name in existing:
            return root / name
    raise InputError(
        f"no folder {' or '.join(repr(name) for name in wanted)} in {root}: it holds "
        f"{_some(existing)}; expected {root / wanted[0]}/CLASS/IMAGE"
    )


def _class_folders(folder):
    class_names = _folders_in(folder, "split folder")
    if not class_names:
        raise InputError(f"no class folders in {folder}: expected {folder}/CLASS/IMAGE")
    return class_names


def _folders_in(path, what):
    """The names of the visible folders in `path`, in natural order."""
    try:
        entries = [entry for entry in os.scandir(path) if entry.is_dir()]
    except OSError as error:
        raise InputError(f"cannot read the {what} {path}: {error.strerror}") from None
    return sorted((e.name for e in entries if not e.name.startswith(".")), key=natural_key)


def _images_below(folder):
    """Paths of the images below a class folder, relative to it, in natural order."""
    files = []
    for directory, subfolders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                files.append(os.path.relpath(os.path.join(directory, name), folder))
    return sorted(files, key=natural_key)


def _refuse(error):
    # os.walk would silently leave out what it cannot list.
    raise InputError(f"cannot read the class folder {error.filename}: {error.strerror}")


def _order_classes(found, class_list, folder):
    if not class_list:
        return tuple(found)
    try:
        lines = pathlib.Path(class_list).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"cannot read the class list {class_list}: {reason}") from None
    listed = [line.strip() for line in lines if line.strip()]
    if repeated := [name for name, count in collections.Counter(listed).items() if count > 1]:
        raise InputError(f"class list {class_list} names {repeated[0]!r} more than once")
    if absent := [name for name in listed if name not in found]:
        raise InputError(
            f"class list {class_list} names {absent[0]!r}: {folder} has no such folder"
        )
    if unlisted := [name for name in found if name not in listed]:
        raise InputError(f"{folder / unlisted[0]} is not in the class list {class_list}: add it")
    return tuple(listed)


def _some(names, limit=5):
    if not names:
        return "no folders"
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")


# ------------------------------------------------------------------------------------------- tfds


class TfdsSource:
    """A data set that tfds prepared as ArrayRecord files, read at random without TensorFlow.

    `name` is a tfds name ("cifar10", "oxford_iiit_pet", "imagenet2012:5.1.0"), `split` a tfds
    split, slices such as "train[:90%]" included, `data_dir` tfds' directory ("" for its default,
    ~/tensorflow_datasets). Image and label are the data set's supervised pair; images stay encoded.
    """

    def __init__(self, name: str, split: str, data_dir: str = ""):
        self._arguments = (name, split, data_dir)
        builder = _prepared_builder(name, data_dir)
        self._image_key, self._label_key = _supervised_pair(builder)
        self.class_names = tuple(builder.info.features[self._label_key].names)
        self._records = _open_split(builder, split)
        self._name = f"{name}/{split}"

    def __reduce__(self):
        return TfdsSource, self._arguments  # a worker process opens its own files

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        try:
            record = self._records[index]
        except (RuntimeError, ValueError) as error:  # how array_record reports a damaged file
            raise OSError(" ".join(str(error).split())) from None
        return record[self._image_key], int(record[self._label_key])

    def name_of(self, index: int) -> str:
        return f"{self._name} record {index}"


def _prepared_builder(name, data_dir):
    import tensorflow_datasets as tfds

    if not name:
        raise InputError("a tfds data set needs its name: set data.name, for example to cifar10")
    where = os.path.expanduser(data_dir) or tfds.core.constants.DATA_DIR
    advice = f"prepare it with `tfds build {name} --file_format=array_record --data_dir={where}`"
    try:
        builder = tfds.builder(name, data_dir=where)
    except tfds.core.DatasetNotFoundError:
        guess = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False))
        known = f"did you mean {guess[0]!r}? Otherwise " if guess else ""
        raise InputError(
            f"tfds knows no data set {name!r} and finds none in {where}: {known}{advice}"
        ) from None
    except Exception as error:  # an unknown config, damaged metadata, a package that is missing...
        first_line = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"tfds cannot open {name!r} in {where}: {first_line}") from error
    if not builder.info.splits:
        raise InputError(f"tfds data set {name!r} is not prepared in {where}: {advice}")
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise InputError(
            f"tfds data set {name!r} in {where} is prepared as {', '.join(sorted(formats))}, which "
            f"has no random access: {advice} (another data_dir, or remove the old files)"
        )
    return builder


def _supervised_pair(builder):
    import tensorflow_datasets as tfds

    features, keys = builder.info.features, builder.info.supervised_keys or ()
    if (
        len(keys) != 2
        or not isinstance(features[keys[0]], tfds.features.Image)
        or not isinstance(features[keys[1]], tfds.features.ClassLabel)
    ):
        raise InputError(
            f"tfds data set {builder.name!r} has no supervised (image, label) pair: its supervised "
            f"keys are {keys or 'not set'}; choose an image classification data set"
        )
    return keys


def _open_split(builder, split):
    import tensorflow_datasets as tfds

    # Every image stays encoded, the unused ones too: the pets' masks would cost a decode each.
    decoders = {
        key: tfds.decode.SkipDecoding()
        for key, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    }
    try:
        return builder.as_data_source(split, decoders=decoders)
    except (ValueError, KeyError, AssertionError):
        raise InputError(
            f"tfds data set {builder.name!r} has no split {split!r}: it has "
            f"{_some(list(builder.info.splits))}"
        ) from None


# ----------------------------------------------------------------------------------------- digits


class Digits:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: small, embedded, no download.

    The values 0..16 are scaled to uint8 0..255. "test" (or "validation") is 360 of them, drawn by
    a fixed permutation of all (not stratified by class), "train" the other 1,437. Another `seed`
    draws another test split.
    """

    def __init__(self, split: str, seed: int = 0):
        from sklearn.datasets import load_digits

        split = "test" if split == "validation" else split
        if split not in ("train", "test"):
            raise InputError(f"the digits have no split {split!r}: choose train or test")
        digits = load_digits()
        order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(digits.target))
        rows = order[:NUM_DIGITS_TEST] if split == "test" else order[NUM_DIGITS_TEST:]
        self._images = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)
        self._labels = digits.target[rows]
        self._split = split
        self.class_names = tuple(str(name) for name in digits.target_names)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self._images[index], int(self._labels[index])

    def name_of(self, index: int) -> str:
        return f"digits {self._split} image {index}"
