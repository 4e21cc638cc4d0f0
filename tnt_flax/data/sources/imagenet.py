# SPDX-License-Identifier: Apache-2.0
"""ImageNet's two original tars, as they were downloaded.

`ILSVRC2012_img_train.tar` holds one tar per class, named by its synset (n01440764.tar);
`ILSVRC2012_img_val.tar` holds the images, whose labels come in another file. Classes are ordered by
their synsets, as torchvision and timm do it.
"""

import functools
import io
import re
import tarfile

import numpy as np

from tnt_flax.core.errors import InputError
from tnt_flax.data.sources import storage
from tnt_flax.data.sources.archives import TarImages, members
from tnt_flax.data.sources.index import Part, open_index
from tnt_flax.data.sources.names import is_image, natural_key, order_classes, some, split_names

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
LABEL_FILES = (  # beside the tars, unless data.eval_labels says otherwise
    "ILSVRC2012_devkit_t12.tar.gz",
    "imagenet_2012_validation_synset_labels.txt",
    "LOC_val_solution.csv",
)
_IN_DEVKIT = ("data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt")
_SYNSET = re.compile(r"n\d{8}")


def imagenet_tars(root: str, split: str, eval_labels: str = "", class_list: str = "") -> TarImages:
    """The training tar, or the validation tar with the labels in `eval_labels`.

    `eval_labels` is the devkit (ILSVRC2012_devkit_t12.tar.gz); or text with a synset per line, in
    the order of the images' names; or text with an image's name and its synset per line, separated
    by a comma or blanks (as in LOC_val_solution.csv). "" is whichever of them lies beside the tars.
    Raises InputError for what is missing, damaged, or does not fit together.
    """
    if not root:
        raise InputError("ImageNet's tars need their folder: set data.root")
    if split == "train":
        return _train(storage.join(root, TRAIN), class_list)
    if "val" in split_names(split):
        return _validation(root, storage.join(root, VALIDATION), eval_labels, class_list)
    raise InputError(f"ImageNet's tars have no split {split!r}: choose train or validation")


def _train(path, class_list):
    index = open_index(
        "imagenet train",
        [path],
        functools.partial(_cut_classes, path),
        functools.partial(_scan_class, path),
    )
    texts = index.texts()
    names = order_classes(sorted(texts), class_list, path, "tar")
    numbers = {name: label for label, name in enumerate(names)}
    return TarImages(index, np.array([numbers[text] for text in texts], np.int32), names)


def _cut_classes(path, sizes):
    """A part for each inner tar."""
    parts = []
    with storage.opened(path) as read:
        for name, start, length in members(read, 0, sizes[0], path):
            stem = re.fullmatch(r"(?:.*/)?([^/.][^/]*)\.tar", name)
            if stem:
                parts.append(Part(0, start, start + length, stem[1]))
            elif re.search(r"\.(tgz|tar\.\w+)$", name):
                raise InputError(f"{path}: {name} is compressed: pack plain tars")
    if not parts:
        raise InputError(f"{path} holds no tars: expected one per class, such as n01440764.tar")
    return parts


def _scan_class(path, read, part):
    what, count = f"{part.text}.tar in {path}", 0
    for name, start, size in members(read, part.start, part.end, what):
        if is_image(name):
            count += 1
            yield start, size, part.text
    if not count:
        raise InputError(f"{what} has no images: download the tar again")


def _validation(root, path, eval_labels, class_list):
    cut = lambda sizes: [Part(0, 0, sizes[0])]
    index = open_index("imagenet val", [path], cut, functools.partial(_scan_images, path))
    labels_file = storage.join(root, eval_labels) if eval_labels else _find_labels(root)
    images = index.texts()
    synsets = read_labels(labels_file, sorted(images, key=natural_key))
    names = order_classes(sorted(set(synsets.values())), class_list, labels_file, "synset")
    numbers = {name: label for label, name in enumerate(names)}
    return TarImages(index, np.array([numbers[synsets[i]] for i in images], np.int32), names)


def _scan_images(path, read, part):
    for name, start, size in members(read, part.start, part.end, path):
        if is_image(name):
            yield start, size, _stem(name)


def _stem(name):
    return name.rpartition("/")[2].partition(".")[0]


def _find_labels(root):
    found = set(storage.list_folder(root))
    for name in LABEL_FILES:
        if name in found:
            return storage.join(root, name)
    raise InputError(
        f"no labels of {VALIDATION} in {root}: put {LABEL_FILES[0]} there, or set data.eval_labels "
        "to a file with a synset per line"
    )


def read_labels(path: str, images: list[str]) -> dict[str, str]:
    """The synset of each of the `images`, which are names without suffix, in their order.

    Raises InputError unless the file has the synset of every image; without names, of no more.
    """
    try:
        data = storage.read_file(path)
        lines = _devkit_lines(path, data) if data[:2] == b"\x1f\x8b" else data.decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the labels {path}: {reason}") from None
    rows = [re.split(r"[,\s]+", line.strip()) for line in lines if line.strip()]
    if rows and not any(map(_SYNSET.fullmatch, rows[0])):
        if all(len(row) == 1 and row[0].isdigit() for row in rows):
            raise InputError(
                f"{path} has numbers, whose order only the devkit knows: set data.eval_labels to "
                f"{LABEL_FILES[0]}"
            )
        rows = rows[1:]  # a line of titles
    column = 1 if rows and not _SYNSET.fullmatch(rows[0][0]) else 0
    for number, row in enumerate(rows):
        if len(row) <= column or not _SYNSET.fullmatch(row[column]):
            raise InputError(
                f"{path}: label {number + 1} is {' '.join(row)!r}, not a synset such as n01440764"
            )
    if column:
        synsets = {_stem(row[0]): row[1] for row in rows}
        if unlabeled := [name for name in images if name not in synsets]:
            raise InputError(f"{path} has no label of {some(unlabeled, limit=2)}")
        return {name: synsets[name] for name in images}
    if len(rows) != len(images):
        raise InputError(f"{path} has {len(rows)} labels for {len(images)} images")
    return {name: row[0] for name, row in zip(images, rows, strict=True)}


def _devkit_lines(path, data):
    """The ground truth of the devkit, its ILSVRC2012_IDs replaced by synsets."""
    import scipy.io

    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            files = {name.partition("/")[2]: name for name in tar.getnames()}
            meta, truth = (tar.extractfile(files[name]).read() for name in _IN_DEVKIT)
        table = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        synset_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
        return [synset_of[int(line)] for line in truth.split()]
    except Exception as error:  # gzip, tar and MAT files each have their own ways to be damaged
        raise InputError(
            f"{path} is not ImageNet's devkit with {' and '.join(_IN_DEVKIT)}: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from None
