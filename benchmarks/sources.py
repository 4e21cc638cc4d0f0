# SPDX-License-Identifier: Apache-2.0
"""Start and memory of large data sets, and random access to images in Parquet files.

    python -m benchmarks sources
    python -m benchmarks sources --files=100000 --images=500

`plan`: from the start of a process to the first batch of a synthetic source of a billion records.
`folder`: from the start of a process until an image folder of 1.3 million (empty) files in 1,000
classes is open. Both with imports; `megabytes` is the largest resident memory of the process.
`parquet`: images in random order from a shard as `datasets` writes it (row groups of 100 images,
snappy), by our index and by pyarrow's row groups: milliseconds and bytes read per image, with the
files in the page cache.
"""

import argparse
import multiprocessing
import pathlib
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from benchmarks import harness
from tnt_flax.tools.command_line import positive

CLASSES, ROW_GROUP, BATCH = 1000, 100, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--records", type=positive, default=10**9, help="records of the synthetic source")
    add("--files", type=positive, default=1_300_000, help="files of the image folder")
    add("--images", type=positive, default=1000, help="images of the Parquet shard")


def measure_sources(args: argparse.Namespace) -> dict:
    """Measures each task in a process of its own; returns the JSON result."""
    with tempfile.TemporaryDirectory() as folder:
        files, shards = pathlib.Path(folder, "files"), pathlib.Path(folder, "shards")
        write_files(files / "train", args.files)
        write_shard(shards, args.images)
        result = {
            "plan": _in_process(_start_plan, args.records),
            "folder": _in_process(_open_folder, str(files)),
            "parquet": _in_process(_read_parquet, str(shards)),
            "versions": harness.versions("numpy", "grain", "pyarrow"),
        }
    harness.print_facts(result)
    return result


def _in_process(function, *args):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(_report, time.time(), function, *args).result()


def _report(started, function, *args):
    result = function(*args)
    result |= {"seconds": round(time.time() - started, 2)}
    result |= {"cpu_seconds": round(time.process_time(), 2)}
    # The peak since the process began: getrusage would include its parent, from which it forked.
    status = pathlib.Path("/proc/self/status").read_text()
    return result | {"megabytes": int(re.search(r"VmHWM:\s*(\d+)", status)[1]) // 1024}


# ------------------------------------------------------------------------------------------- tasks


class _Synthetic:
    """Images of one value."""

    class_names, storage_path = ("a", "b"), ""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return np.full((8, 8, 3), index % 256, np.uint8), index % 2

    def name_of(self, index):
        return str(index)


def _as_arrays(image, generators):
    return [image for _ in generators]


def _start_plan(records):
    from tnt_flax.data import pipeline
    from tnt_flax.data.plan import TrainPlan

    plan = TrainPlan(records, BATCH, seed=0, repeats=3)
    batches = pipeline.train_batches(
        _Synthetic(records), plan, transform=_as_arrays, start_step=0, num_steps=1
    )
    return {"rows": len(next(batches)["image"]), "records": records}


def _open_folder(root):
    from tnt_flax.data.sources import open_source

    return {"files": len(open_source("folder", "train", root=root))}


def _read_parquet(root):
    import pyarrow.parquet as pq

    from tnt_flax.data.sources import open_source

    source = open_source("table", "train", root=root)
    order = np.random.default_rng(0).permutation(len(source)).tolist()
    table = pq.ParquetFile(source.index.files[0])
    groups = [table.metadata.row_group(k).column(0) for k in range(table.num_row_groups)]

    def by_row_group(record):
        group, row = divmod(record, ROW_GROUP)
        column = table.read_row_group(group, columns=["image"]).column(0)
        return column[row]["bytes"].as_py()

    timed = {}
    for name, read in (("index", lambda i: source[i][0]), ("row_groups", by_row_group)):
        start, some = time.process_time(), order[: 10 * ROW_GROUP]
        images = [len(read(record)) for record in some]
        timed[name] = round(1000 * (time.process_time() - start) / len(some), 3)
    sizes = [source.locate(record)[2] for record in order]
    return {
        "images": len(source),
        "kilobytes": round(float(np.mean(images)) / 1e3, 1),
        "milliseconds": timed,
        "kilobytes_read": {
            "index": round(float(np.mean(sizes)) / 1e3, 1),
            "row_groups": round(
                sum(g.total_compressed_size for g in groups) / len(groups) / 1e3, 1
            ),
        },
    }


# ------------------------------------------------------------------------------------------- files


def write_files(folder: pathlib.Path, count: int) -> None:
    """Writes `count` empty files, named as ImageNet's, into folders of classes."""
    for label in range(min(CLASSES, count)):
        below = folder / f"n{label:08}"
        below.mkdir(parents=True)
        for k in range(label, count, CLASSES):
            (below / f"n{label:08}_{k}.JPEG").touch()


def write_shard(folder: pathlib.Path, count: int) -> None:
    """Writes a shard of `count` photographs of ImageNet's file sizes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    photos = folder / "photos"
    photos.mkdir(parents=True)
    harness.generate_photos(photos, min(count, ROW_GROUP))
    encoded = [path.read_bytes() for path in sorted(photos.iterdir())]
    rows = [
        {"bytes": encoded[k % len(encoded)] + bytes([k % 251, k // 251 % 251])}
        for k in range(count)
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, kind), "label": np.arange(count) % CLASSES})
    pq.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=ROW_GROUP)
