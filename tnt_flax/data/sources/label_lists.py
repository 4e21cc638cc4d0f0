# SPDX-License-Identifier: Apache-2.0
"""Lists with the labels of ImageNet's validation images, which lie in one folder or tar."""

import io
import re
import tarfile

from tnt_flax.core.errors import InputError, as_input_error, listed, one_line
from tnt_flax.data.sources import storage
from tnt_flax.data.sources.names import ClassOptions, number_classes, read_lines

LABEL_FILES = (  # looked for beside the images unless data.eval_labels is set
    "ILSVRC2012_devkit_t12.tar.gz",
    "imagenet_2012_validation_synset_labels.txt",
    "LOC_val_solution.csv",
)
_IN_DEVKIT = ("data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt")
_LABEL = re.compile(r"\s*(?:([^,\s]+)[,\s]+)?(n\d{8})\b")  # a synset, perhaps after a name


def image_stem(name: str) -> str:
    """Returns the file name up to its first dot."""
    return name.rpartition("/")[2].partition(".")[0]


def find_labels(folders: list[str], what: str) -> str:
    """Returns the first of LABEL_FILES in the first of `folders` with one; InputError if none."""
    for folder in folders:
        names = storage.list_folder(folder)
        for name in LABEL_FILES:
            if name in names:
                return storage.join(folder, name)
    raise InputError(
        f"no labels for {what} in {folders[0]}: put {LABEL_FILES[0]} or {LABEL_FILES[2]} there, or "
        "set data.eval_labels to a file with one synset per line"
    )


def number_images(
    path: str, images: list[str], options: ClassOptions
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Returns the class names, and the label of each image or LEFT_OUT.

    `path` and `images` are those of `read_labels`, `options` those of `names.number_classes`.
    Raises InputError as both do.
    """
    synset_of = read_labels(path, images)
    synsets = sorted(set(synset_of.values()))
    class_names, labels = number_classes(synsets, options, path, exact=True)
    label_of = dict(zip(synsets, labels.tolist(), strict=True))
    return class_names, {image: label_of[synset] for image, synset in synset_of.items()}


def read_labels(path: str, images: list[str]) -> dict[str, str]:
    """Reads the synset of each image.

    The file is the devkit (ILSVRC2012_devkit_t12.tar.gz); or text with a synset per line, in the
    order of the image names; or text with an image name and its synset per line, separated by a
    comma or blanks (as in LOC_val_solution.csv). `images` are names without suffix, in natural
    order.

    Raises InputError unless the file has the synset of every image. A file without names must have
    exactly one line per image.
    """
    with as_input_error(f"cannot read the labels {path}"):
        data = storage.read_file(path)
        lines = _devkit_lines(path, data) if data[:2] == b"\x1f\x8b" else read_lines(data)
    if lines and "," in lines[0] and not _LABEL.match(lines[0]):
        lines = lines[1:]  # a header line
    labels = []
    for number, line in enumerate(lines, 1):
        if not (found := _LABEL.match(line)):
            raise InputError(
                f"{path}: label {number} is {line!r}, not a synset such as n01440764; for numbers, "
                f"set data.eval_labels to {LABEL_FILES[0]}"
            )
        labels.append(found.groups())
    if labels and labels[0][0]:
        labels = {image_stem(name or ""): synset for name, synset in labels}
        if unlabeled := [image for image in images if image not in labels]:
            raise InputError(f"{path} has no label for {listed(unlabeled, limit=2)}")
        return {image: labels[image] for image in images}
    if len(labels) != len(images):
        raise InputError(f"{path} has {len(labels)} labels for {len(images)} images")
    return {image: synset for image, (_, synset) in zip(images, labels, strict=True)}


def _devkit_lines(path, data):
    """Returns the devkit's ground truth with each ILSVRC2012_ID replaced by its synset."""
    import scipy.io

    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            files = {name.partition("/")[2]: name for name in tar.getnames()}
            meta, truth = (tar.extractfile(files[name]).read() for name in _IN_DEVKIT)
        table = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        synset_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
        return [synset_of[int(line)] for line in truth.split()]
    except Exception as error:  # gzip, tar and MAT files each raise their own errors
        raise InputError(
            f"{path} is not ImageNet's devkit with {' and '.join(_IN_DEVKIT)}: {one_line(error)}"
        ) from None
