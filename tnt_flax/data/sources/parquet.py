# SPDX-License-Identifier: Apache-2.0
"""Images inside Parquet files, read one by one: the positions of the values in their pages.

pyarrow reads a Parquet file by row groups, 100 images at a time in data sets of the Hugging Face
hub. A shuffled order would read, and expand, 100 images for each one. So the pages of the image
column are located once, and the index stores where each image is:

- in an uncompressed page, its bytes in the file;
- in a page compressed by snappy, the blocks of 64 KiB that it is in. Encoders compress each block
  by itself; a page of another encoder is read whole;
- in a page compressed otherwise, the page.

The formats are those of https://parquet.apache.org/docs/file-format/ (pages and their headers in
Thrift's compact protocol) and https://github.com/google/snappy/blob/main/format_description.txt.
"""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tnt_flax.core.errors import InputError
from tnt_flax.data.sources.index import CODECS, LENGTH, Part, snappy_length

DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY = 0, 2, 8
BLOCK = 1 << 16  # bytes that snappy's encoders compress at once
HEADER = 1 << 16  # bytes to read for the header of a page


def class_names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """Returns the names of the labels in a column, if the schema has them as of Hugging Face."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[column]["names"]))
    except (KeyError, TypeError, ValueError):
        return None


def label_texts(labels: pa.ChunkedArray, names: tuple[str, ...] | None, where: str) -> pa.Array:
    """Returns labels as dictionary-encoded strings; numbers as their names, if there are `names`.

    Raises InputError for missing labels, and for values that are no strings, integers or booleans.
    """
    kind = labels.type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    integer = pa.types.is_integer(values)
    if not (integer or pa.types.is_boolean(values) or _is_text(values)):
        raise InputError(
            f"{where} has labels of type {values}: use names or integers, one per image"
        )
    if labels.null_count:
        raise InputError(f"{where} has {labels.null_count} rows without a label: remove them")
    texts = pc.cast(labels, pa.string()).dictionary_encode().combine_chunks()
    found = texts.dictionary.to_pylist()
    for text in found:
        missing = text.strip().lower() in ("", "nan")
        if missing or (integer and not 0 <= int(text) < (len(names or ()) or 2**31)):
            raise InputError(
                f"{where} has the label {text!r}: labels are names, or numbers from 0"
                + (f" to {len(names) - 1}" if names else "")
                + "; -1 often means a split without labels"
            )
    if names and integer:
        found = [names[int(text)] for text in found]
    else:
        found = [text.strip() for text in found]
    return pa.DictionaryArray.from_arrays(texts.indices, pa.array(found, pa.string()))


def _is_text(kind):
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def image_leaf(schema: pa.Schema, column: str) -> str | None:
    """Returns the path of the leaf with encoded images of a column; None if it has paths."""
    kind = schema.field(column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{column}.bytes"
    return column if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else None


def scan(image: str, label: str, file: BinaryIO, part: Part, path: str) -> Iterator[tuple]:
    """Yields the position and the label of each row, see `index.open_index`.

    Args:
        image: column of binary values, or of a struct with a field "bytes".
        label: column of the labels.
        file, part, path: the Parquet file.

    Raises:
        InputError: the file is damaged, a row has no image, or its pages are encoded otherwise.
    """
    table = pq.ParquetFile(file)
    leaf, names = image_leaf(table.schema_arrow, image), class_names(table.schema_arrow, label)
    leaves = [table.schema.column(i).path for i in range(len(table.schema.names))]
    if leaf not in leaves:
        raise InputError(f"{path} has no images in the column {image}, unlike the first file")
    number = leaves.index(leaf)
    levels = table.schema.column(number).max_definition_level
    for group in range(table.num_row_groups):
        chunk = table.metadata.row_group(group).column(number)
        try:
            found = list(_values(file, chunk, bool(levels)))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except (IndexError, KeyError, ValueError, pa.ArrowException) as error:
            raise InputError(
                f"{path}: cannot locate the images of row group {group} ({error}): write the file "
                'again, with pyarrow\'s write_table(compression="none")'
            ) from None
        labels = table.read_row_group(group, columns=[label]).column(0)
        texts = label_texts(labels, names, path).to_pylist()
        for (start, size, *block), text in zip(found, texts, strict=True):
            yield start, size, text, *block


# ------------------------------------------------------------------------------------------- pages


class _Page(NamedTuple):
    """The values of a page: bytes [start, start + size) of the file, expanded to `data`."""

    start: int
    size: int
    codec: str
    data: bytes
    compressed: bytes

    def values(self, position: int, count: int) -> list[tuple]:
        """Returns where `count` plain values are; the first is at `position` in `data`."""
        found, blocks = [], None
        if self.codec == "snappy":
            blocks = snappy_blocks(self.compressed)
        for _ in range(count):
            length = int.from_bytes(self.data[position : position + LENGTH], "little")
            end = position + LENGTH + length
            if end > len(self.data):
                raise ValueError("a value ends after its page")
            if not self.codec:
                found.append((self.start + position + LENGTH, length))
            elif blocks:
                first, last = position // BLOCK, -(-end // BLOCK)
                start, stop = blocks[first], blocks[last]
                expanded = min(last * BLOCK, len(self.data)) - first * BLOCK
                block = (CODECS.index("snappy"), expanded, position % BLOCK)
                found.append((self.start + start, stop - start, *block))
            else:
                start, size = self.start, self.size
                if self.codec == "snappy":  # without its length, as for blocks
                    prefix = len(snappy_length(len(self.data)))
                    start, size = start + prefix, size - prefix
                block = (CODECS.index(self.codec), len(self.data), position)
                found.append((start, size, *block))
            position = end
        return found


def _values(file, chunk, has_levels) -> Iterator[tuple]:
    """Yields where each value of a column chunk is: (start, size) and, if compressed, the block."""
    statistics = chunk.statistics
    if statistics is not None and statistics.null_count:
        raise InputError(f"{statistics.null_count} rows have no image: remove them")
    position, dictionary, remaining = chunk.data_page_offset, [], chunk.num_values
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        position = min(position, chunk.dictionary_page_offset)
    codec = {"UNCOMPRESSED": "", "LZ4": "lz4_raw"}.get(chunk.compression, chunk.compression.lower())
    while remaining:
        file.seek(position)
        header, size = _read_struct(file.read(HEADER), 0)
        start, (kind, expanded, compressed) = position + size, (header[1], header[2], header[3])
        position = start + compressed
        about = header[{DATA_PAGE: 5, DICTIONARY_PAGE: 7, DATA_PAGE_V2: 8}[kind]]
        levels = about[5] + about[6] if kind == DATA_PAGE_V2 else 0
        page_codec = codec if about.get(7, True) or kind != DATA_PAGE_V2 else ""
        file.seek(start + levels)
        content = file.read(compressed - levels)
        data = content
        if page_codec and expanded > levels:
            data = pa.decompress(content, expanded - levels, page_codec, asbytes=True)
        page = _Page(start + levels, len(content), page_codec, data, content)
        encoding = about[4] if kind == DATA_PAGE_V2 else about[2]
        if kind == DICTIONARY_PAGE:
            dictionary = page.values(0, about[1])
            continue
        first = 0
        if kind == DATA_PAGE and has_levels:
            first = LENGTH + int.from_bytes(data[:LENGTH], "little")
        if encoding == PLAIN:
            yield from page.values(first, about[1])
        elif encoding in (PLAIN_DICTIONARY, RLE_DICTIONARY):
            for k in _dictionary_indices(data[first:], about[1]):
                yield dictionary[k]
        else:
            raise ValueError(f"pages of encoding {encoding}")
        remaining -= about[1]


def _dictionary_indices(data: bytes, count: int) -> list[int]:
    """Decodes `count` indices: a bit width, then runs, repeated or bit-packed."""
    width, position, found = data[0], 1, []
    while len(found) < count:
        run, position = _read_varint(data, position)
        if run & 1:
            size = (run >> 1) * width
            packed = np.frombuffer(data, np.uint8, size, position)
            bits = np.unpackbits(packed, bitorder="little").reshape(-1, max(width, 1))
            found += (bits @ (1 << np.arange(bits.shape[1]))).tolist()
        else:
            size = -(-width // 8)
            value = int.from_bytes(data[position : position + size], "little")
            found += [value] * (run >> 1)
        position += size
    return found[:count]


def snappy_blocks(data: bytes) -> list[int] | None:
    """Returns where each block of 64 KiB begins in a snappy stream, and its end.

    Returns None if a copy reaches out of its block.
    """
    length, position = _read_varint(data, 0)
    starts, done = [], 0
    while done < length:
        offset = done % BLOCK
        if not offset:
            starts.append(position)
        tag = data[position]
        kind, size, back = tag & 3, (tag >> 2) + 1, 0
        if kind == 0:
            extra = max(size - 60, 0)
            if extra:
                size = 1 + int.from_bytes(data[position + 1 : position + 1 + extra], "little")
            position += 1 + extra + size
        elif kind == 1:
            size, back = 4 + (tag >> 2 & 7), (tag >> 5) << 8 | data[position + 1]
            position += 2
        else:
            extra = {2: 2, 3: 4}[kind]
            back = int.from_bytes(data[position + 1 : position + 1 + extra], "little")
            position += 1 + extra
        if offset + size > BLOCK or back > offset:
            return None
        done += size
    return [*starts, len(data)]


# ------------------------------------------------------------------------- Thrift compact protocol


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7


def _read_struct(data: bytes, position: int) -> tuple[dict[int, Any], int]:
    """Returns the fields of a struct by number, and the position after it."""
    fields, number = {}, 0
    while kind_and_step := data[position]:
        position += 1
        step, kind = kind_and_step >> 4, kind_and_step & 15
        if not step:
            raise ValueError("a page header with distant fields")
        number += step
        if kind in (1, 2):
            value = kind == 1
        elif kind in (4, 5, 6):
            value, position = _read_varint(data, position)
            value = value >> 1 ^ -(value & 1)
        elif kind == 8:
            size, position = _read_varint(data, position)
            value, position = None, position + size  # statistics, which are not used
        elif kind == 12:
            value, position = _read_struct(data, position)
        else:
            raise ValueError(f"a page header with a field of kind {kind}")
        fields[number] = value
    return fields, position + 1
