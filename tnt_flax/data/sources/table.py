# SPDX-License-Identifier: Apache-2.0
"""Tables of images and labels: CSV, JSON lines, Parquet, and lists of paths.

Paths are relative to the folder of the table. Parquet files may also hold the images themselves, as
data sets of the Hugging Face hub do; those are read in place, see `parquet`.
"""

import csv
import functools
import io
import json
import logging
import os
import re
import string
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from tnt_flax.core.errors import InputError, as_input_error, did_you_mean, listed
from tnt_flax.data.sources import parquet, storage
from tnt_flax.data.sources.folder import Holdout, ImageFiles, hold_out
from tnt_flax.data.sources.index import IndexedImages, open_index
from tnt_flax.data.sources.names import (
    BY_NAME,
    LEFT_OUT,
    ClassOptions,
    Names,
    find_files,
    find_split,
    has_word,
    number_classes,
    read_lines,
    report_split,
    split_names,
)

logger = logging.getLogger("tnt_flax")

TABLE = re.compile(
    r"(?!readme|classes\.txt|dataset_info)[^.].*\.(csv|tsv|txt|jsonl|json|parquet)", re.IGNORECASE
)
# Names of columns that are looked for, in any case of letters.
IMAGE_COLUMNS = ("image", "img", "path", "file_name", "filename", "image_path", "img_path")
IMAGE_COLUMNS += ("filepath", "file_path", "filepaths", "file", "image_file", "image_name")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target", "species")
LABEL_COLUMNS += ("fine_label", "label_name", "class_id", "category_id")
SPLIT_COLUMNS = ("split", "set", "data set", "data_set", "partition", "is_valid")
BOOLEANS = {"false": "train", "0": "train", "true": "validation", "1": "validation"}  # is_valid
CHUNK = 100_000  # paths that are Python strings at a time


class Columns(NamedTuple):
    """Names of the columns; "" looks for one of the usual names."""

    image: str = ""  # paths, or a pattern of other columns such as "images/{id}.jpg"; or bytes
    label: str = ""
    split: str = ""  # of tables that hold several splits


USUAL_COLUMNS = Columns()


def open_table(
    root: str,
    split: str,
    columns: Columns = USUAL_COLUMNS,
    classes: ClassOptions = BY_NAME,
    holdout: Holdout | None = None,
) -> ImageFiles | IndexedImages:
    """Opens the images of a split that tables list or hold.

    `root` is a table or a folder. The tables of a split are found by `names.find_files`:
    `train.csv`, `train/metadata.jsonl`, `data/train-00000-of-00294.parquet`. A table given as
    `root`, or the only one in it, may list all splits: marked in a column, by the first folder of
    the paths ("train/1.jpg"), or divided by `holdout`. Classes are those of `number_classes`.

    Raises InputError if a table cannot be read or understood.
    """
    shared, part, divided = _only_table(root), holdout and holdout.part_of(split), False
    if shared:
        files = [shared]
    else:
        divided = part and not find_files(root, holdout.eval_split, TABLE, may_be_missing=True)
        files = find_files(root, holdout.train_split if divided else split, TABLE)
    divided = divided or (shared and part)
    named_for_split = not shared or _is_named(shared, split)
    schema, table = _open_first(files[0])
    image = _column("image", columns.image, IMAGE_COLUMNS, schema, files[0])
    label = _column("label", columns.label, LABEL_COLUMNS, schema, files[0])
    names = parquet.class_names(schema, label)
    if image in schema.names and parquet.image_leaf(schema, image):
        scan = functools.partial(parquet.scan, image, label)
        index = open_index(f"parquet {image} {label}", files, scan)
        source = IndexedImages(index, *number_classes(index.texts, classes, files[0], names=names))
    else:
        listing, mark = _ImageList(files[0], table, root), None
        if shared:
            mark = _column("split", columns.split, SPLIT_COLUMNS, schema, shared, optional=True)
        for file in files:
            listing.add(file, image, label, names, mark)
        if shared:
            divided = part and listing.rows_of(holdout.eval_split) is None
            rows = listing.rows_of(holdout.train_split if divided else split)
            named_for_split = named_for_split or rows is not None
            listing.keep(rows)
        source = listing.open(classes, names)
    if divided:
        return hold_out(source, holdout.share, part, split)
    if not named_for_split:
        raise InputError(
            f"{shared} has no rows of the split {split!r}: set data.split_column (its columns are "
            f"{listed(schema.names)}), or data.holdout=0.2 to evaluate on a fifth of its images, "
            "or data.train_split and data.eval_split to tables"
        )
    return source


def _only_table(root):
    """Returns `root` if it is a table, or the only one of all splits in it, or else None."""
    if TABLE.fullmatch(os.path.basename(root)):
        return os.path.expanduser(root)
    names = storage.list_folder(root)
    tables = [n for n in names if TABLE.fullmatch(n) and not n.lower().endswith((".txt", ".json"))]
    folders = [find_split(split, names) for split in ("train", "validation")]
    for folder in (storage.join(root, name) for name in folders if name):
        if storage.is_folder(folder) and any(map(TABLE.fullmatch, storage.list_folder(folder))):
            return None
    return storage.join(root, tables[0]) if len(tables) == 1 else None


def _is_named(file, split):
    name = os.path.basename(file)
    return split == name or any(has_word(name, word) for word in split_names(split))


class _ImageList:
    """Paths and labels of images, gathered from the tables of a split.

    `table` is the content of the file `first`, or None if `add` reads it.
    """

    def __init__(self, first, table, root):
        self.first, self.table, self.data_root = first, table, root
        self.root = None  # of all paths
        self.paths, self.texts, self.marks = [], [], []

    def add(self, file, image, label, names, mark):
        """Adds the rows of a table; `mark` is the column of splits, or None."""
        keys = [key for _, key, _, _ in string.Formatter().parse(image) if key]
        wanted = [*(keys or [image]), label, *([mark] if mark else [])]
        table, self.table = self.table, None
        if table is None:
            table = _read(file, wanted)
        self.texts.append(parquet.label_texts(table[label], names, file))
        if keys:
            columns = {key: table[key].to_pylist() for key in keys}
            rows = zip(*columns.values(), strict=True)
            paths = pa.array([image.format_map(dict(zip(keys, row, strict=True))) for row in rows])
        else:
            column = table[image]
            if pa.types.is_struct(column.type):
                if column.type.get_field_index("path") >= 0:
                    column = pc.struct_field(column, "path")
            if pa.types.is_nested(column.type):
                raise InputError(
                    f"{file} has images of type {column.type}: use one path per image, or one "
                    "encoded image"
                )
            paths = pa.array(pc.cast(column, pa.string()).to_pylist(), pa.string())
        if paths.null_count:
            raise InputError(f"{file}: {paths.null_count} rows have no image")
        folder = self._find_root(file, paths)
        if folder is None and "\\" in paths[0].as_py():
            paths = pc.replace_substring(paths, "\\", "/")  # written on Windows
            folder = self._find_root(file, paths)
        if folder is None:
            raise InputError(
                f"{file}: its first image {paths[0].as_py()!r} is not in "
                f"{os.path.dirname(file) or '.'}: paths are relative to the table; set "
                "data.image_column to the column, or to a pattern such as 'images/{id}.jpg'"
            )
        self.root = folder if self.root is None else self.root
        self.paths.append(_below(folder, self.root, paths))
        if mark:
            self.marks.append(pc.cast(table[mark], pa.string()).combine_chunks())

    def _find_root(self, file, paths):
        """Returns the folder that the paths of a table are relative to, or None."""
        folder = os.path.dirname(file)
        bases = [folder]
        if not storage.is_remote(file) and len(paths):
            stem = os.path.basename(file).partition(".")[0]
            data_root = os.path.expanduser(self.data_root)
            bases += [data_root, os.path.join(data_root, stem)]
            first = paths[0].as_py()
            bases = [base for base in bases if os.path.exists(storage.join(base, first))]
        return next(iter(bases), None)

    def rows_of(self, split):
        """Returns which rows are of a split, by the marks or the first folders; None if unknown."""
        if self.marks:
            marks = pa.chunked_array(self.marks).combine_chunks()
        else:
            marks = pc.replace_substring_regex(self._joined()[0], "/.*", "")
        meaning = {mark: mark for mark in pc.unique(marks).to_pylist() if mark is not None}
        if self.marks and {mark.lower() for mark in meaning} <= BOOLEANS.keys():
            meaning = {mark: BOOLEANS[mark.lower()] for mark in meaning}
        found = find_split(split, meaning.values())
        if not found:
            return None
        report_split(split, found, self.first)
        chosen = [mark for mark in meaning if meaning[mark] == found]
        return pc.is_in(marks, pa.array(chosen, marks.type))

    def keep(self, rows):
        """Keeps some rows, or all if `rows` is None."""
        if rows is not None:
            self.paths, self.texts = ([array.filter(rows)] for array in self._joined())

    def _joined(self):
        texts = pa.chunked_array(self.texts).unify_dictionaries().combine_chunks()
        return pa.chunked_array(self.paths, pa.string()).combine_chunks(), texts

    def open(self, classes, names):
        paths, texts = self._joined()
        spelled, numbers = texts.dictionary.to_pylist(), texts.indices.to_numpy()
        used = np.unique(numbers)
        if not len(used):
            raise InputError(f"{self.first} lists no images: add rows, or choose another table")
        found = sorted({spelled[k] for k in used})
        class_names, of_found = number_classes(found, classes, self.first, names=names)
        label_of = dict(zip(found, of_found.tolist(), strict=True))
        table = np.array([label_of.get(text, LEFT_OUT) for text in spelled], np.int32)
        labels = table[numbers]
        if repeated := len(paths) - pc.count_distinct(paths).as_py():
            message = "%s lists images more than once: %d rows repeat a path"
            logger.warning(message, self.first, repeated)
        kept = labels != LEFT_OUT
        paths = paths.filter(pa.array(kept))
        chunks = (paths.slice(i, CHUNK).to_pylist() for i in range(0, len(paths), CHUNK))
        return ImageFiles(self.root or ".", Names(chunks), labels[kept], class_names)


def _below(base, root, paths):
    """Returns paths relative to `root` for paths relative to `base`."""
    if base == root:
        return paths
    base = base if storage.is_remote(base) else os.path.abspath(base)
    return pa.array([storage.join(base, path) for path in paths.to_pylist()], pa.string())


def _column(what, given, usual, schema, file, optional=False):
    """Returns the column that is `given`, or the first of the `usual` names."""
    fields = schema.names
    if given:
        keys = [key for _, key, _, _ in string.Formatter().parse(given) if key] or [given]
        for key in keys:
            if key not in fields:
                raise InputError(
                    f"data.{what}_column={given!r}: {file} has no column {key!r}"
                    f"{did_you_mean(key, fields)}, but {listed(fields)}"
                )
        return given
    by_name = {name.strip().lower(): name for name in reversed(fields)}
    found = next((by_name[name] for name in usual if name in by_name), None)
    if found is None and not optional:
        raise InputError(
            f"{file} has no column of {what}s, but {listed(fields)}: name the columns in its first "
            f"line, or set data.{what}_column"
        )
    return found


# --------------------------------------------------------------------------------------- formats


def _open_first(file):
    """Returns names and types of the columns; and the table if it is text, else None."""
    if file.lower().endswith(".parquet"):
        with as_input_error(f"cannot read {file}"), storage.open_sequential(file) as opened:
            return pq.read_schema(opened), None
    table = _read(file, None)
    return table.schema, table


def _read(file, columns):
    """Returns the columns of a table, or all of them if `columns` is None."""
    kind = file.rpartition(".")[2].lower()
    with as_input_error(f"cannot read {file}"):
        if kind == "parquet":
            with storage.open_sequential(file) as opened:
                found = pq.read_table(opened, columns=columns)
        else:
            found = READERS[kind](storage.read_file(file))
    if missing := [name for name in columns or () if name not in found.column_names]:
        raise InputError(
            f"{file} has no column {missing[0]!r}: it has {listed(found.column_names)}"
        )
    return found.select(columns) if columns else found


def _read_csv(data):
    lines = read_lines(data)
    delimiter = max(",\t;|", key=lines[0].count) if lines else ","  # the commonest of its header
    text = "\n".join(lines)
    header = next(csv.reader(io.StringIO(text), delimiter=delimiter), [])
    return pyarrow.csv.read_csv(
        io.BytesIO(text.encode()),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string())),
    )


def _read_json_lines(data):
    return pyarrow.json.read_json(io.BytesIO("\n".join(read_lines(data)).encode()))


def _read_json(data):
    rows = json.loads("\n".join(read_lines(data)))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it is not a list of objects with one image each")
    return pa.Table.from_pylist(rows)


def _read_list(data):
    """Reads lines of a path and a label, separated by blanks: Caffe's and mmpretrain's lists."""
    rows = [line.strip().rsplit(None, 1) for line in read_lines(data)]
    if wrong := [row for row in rows if len(row) != 2]:
        raise ValueError(f"the line {wrong[0][0]!r} is not a path and a label")
    return pa.table({"path": [row[0] for row in rows], "label": [row[1] for row in rows]})


READERS = {
    "csv": _read_csv,
    "tsv": _read_csv,
    "txt": _read_list,
    "jsonl": _read_json_lines,
    "json": _read_json,
}
