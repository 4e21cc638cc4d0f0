# SPDX-License-Identifier: Apache-2.0
"""Speed of reading, decoding and augmenting images, relative to timm's loader on the same files.

    python -m benchmarks input
    python -m benchmarks input --images=IMAGENET/train/n01440764 --rounds=9

`train` makes uint8 batches of the published recipe: 224 pixels, random crop, flip, RandAugment,
three views per image. `train_opencv` is the same with `augment.resampling="opencv"` on our side,
`train_opencv_device` also with `augment.randaugment_on="device"`: our host leaves RandAugment out,
timm's does not. Both are omitted without OpenCV. `eval` makes the evaluation pixels. Mixing,
normalization and erasing happen on the device and are not included.

Each contender runs in a process of its own on the same cores, one at a time. Ours uses two threads
per core. timm's is `create_transform` in `create_loader`, without the prefetcher's arithmetic and
without worker processes, which would add the cost of handing over. A round is one pass over the
files, after one uncounted pass. The result is the median over rounds of ours / timm in images per
second of CPU time, which depends less on other load than the elapsed time does; without torch and
timm, only our rates.
"""

import argparse
import functools
import importlib.util
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

from PIL import Image

from benchmarks import harness
from tnt_flax.core.errors import InputError
from tnt_flax.data import pipeline, randaugment, sources, transforms
from tnt_flax.data.plan import TrainPlan
from tnt_flax.tools.command_line import positive

# Published recipe: 128 images per process and its augmentation; data.threads per core.
BATCH, GROUPS, REPEATS, THREADS = 128, 8, 3, 2
SCALE, RATIO, FLIP, RANDAUGMENT = (0.08, 1.0), (3 / 4, 4 / 3), 0.5, "rand-m9-mstd0.5-inc1"
MEAN, CROP_FRACTION = (0.5, 0.5, 0.5), 0.9
OPENCV_TASKS = ("train_opencv", "train_opencv_device")
TASKS = ("train", *OPENCV_TASKS, "eval")
GENERATED = 1024  # files if none are given: a pass takes seconds, so its start hardly counts
SUFFIXES = (".jpg", ".jpeg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_arguments(parser, rounds=5)
    add = parser.add_argument
    add("--images", type=pathlib.Path, help="folder of JPEGs; default: generated photographs")
    add("--image-size", type=positive, default=224, help="pixels")


def measure_input(args: argparse.Namespace) -> dict:
    """Measures all tasks; returns the JSON result.

    Raises:
        InputError: no images, or too few cores.
        RunError: a contender failed.
    """
    with_timm = harness.has_timm()
    packages = ["numpy", "pillow", "grain", *(["torch", "timm"] if with_timm else [])]
    with tempfile.TemporaryDirectory() as folder:
        cores = harness.pick_cores(args.cores)
        files = link_images(args.images, pathlib.Path(folder))
        options = (folder, min(BATCH, len(files) // GROUPS * GROUPS), args.image_size)
        facts = {
            "versions": harness.versions(*packages),
            "cores": cores,
            "images": len(files),
            "kilobytes": round(sum(map(os.path.getsize, files)) / len(files) / 1e3, 1),
            "batch_size": options[1],
        }
        harness.print_facts(facts)
        contenders = {"ours": functools.partial(_our_passes, *options)}
        if with_timm:
            contenders["timm"] = functools.partial(_timm_passes, *options)
        tasks = [t for t in TASKS if t not in OPENCV_TASKS or importlib.util.find_spec("cv2")]
        with harness.processes(contenders, cores) as runs:
            rates = {task: harness.measure(runs, task, args.rounds) for task in tasks}
    others = [name for name in contenders if name != "ours"]
    ratios = {task: harness.ratios(rates[task], "ours", others) for task in tasks}
    return {
        **{task: harness.median(ratios.get(task)) for task in TASKS},
        "rounds": ratios,
        "images_per_second": {
            task: {name: harness.median(values) for name, values in rates[task].items()}
            for task in tasks
        },
        **facts,
    }


# -------------------------------------------------------------------------------------- contenders


def _our_passes(folder: str, batch_size: int, size: int, cores: int) -> dict[str, harness.Pass]:
    source = sources.open_source("folder", "train", root=folder)
    plan = TrainPlan(len(source), batch_size, seed=0, repeats=REPEATS, groups=GROUPS)
    train = dict(
        size=size,
        scale=SCALE,
        ratio=RATIO,
        flip=FLIP,
        randaugment=randaugment.parse(RANDAUGMENT, MEAN),
    )
    evaluate = functools.partial(transforms.eval_transform, size=size, crop_fraction=CROP_FRACTION)
    epochs = iter(range(sys.maxsize))
    reading = pipeline.ReadOptions(threads=THREADS * cores)

    def train_pass(resampling="pillow", **changes):
        options = train | changes | dict(resampler=transforms.resampler(resampling))
        transform = functools.partial(transforms.train_transform, **options)
        steps = plan.steps_per_epoch
        part = dict(start_step=next(epochs) * steps, num_steps=steps)
        batches = pipeline.train_batches(source, plan, transform=transform, **part, options=reading)
        return sum(len(batch["image"]) for batch in batches)

    def eval_pass():
        batches = pipeline.eval_batches(
            source, transform=evaluate, batch_size=batch_size, options=reading
        )
        return sum(int(batch["mask"].sum()) for batch in batches)

    passes = {
        "train": train_pass,
        "train_opencv": functools.partial(train_pass, "opencv"),
        "train_opencv_device": functools.partial(train_pass, "opencv", randaugment=None),
        "eval": eval_pass,
    }
    return {task: _with_cpu_time(run) for task, run in passes.items()}


def _timm_passes(folder: str, batch_size: int, size: int, cores: int) -> dict[str, harness.Pass]:
    import timm.data
    import torch
    from timm.data import auto_augment

    torch.set_num_threads(cores)
    # Its repeated-augmentation sampler asks for the number of processes: one, with every view.
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    # timm 1.0.31 fails where Pillow 13 refuses to posterize to 0 bits; older versions gave black.
    posterize = auto_augment.NAME_TO_OP["PosterizeIncreasing"]
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = lambda image, bits, **options: (
        posterize(image, bits, **options) if bits else Image.new("RGB", image.size)
    )
    loader = functools.partial(
        timm.data.create_loader,
        input_size=(3, size, size),
        batch_size=batch_size,
        mean=MEAN,
        std=MEAN,
        num_workers=0,
        device=torch.device("cpu"),
    )
    loaders = {
        "train": loader(
            timm.data.ImageDataset(f"{folder}/train"),
            is_training=True,
            scale=SCALE,
            ratio=RATIO,
            hflip=FLIP,
            auto_augment=RANDAUGMENT,
            interpolation="random",
            num_aug_repeats=REPEATS,
            distributed=True,
        ),
        "eval": loader(
            timm.data.ImageDataset(f"{folder}/train"),
            crop_pct=CROP_FRACTION,
            interpolation="bicubic",
        ),
    }
    loaders |= {task: loaders["train"] for task in OPENCV_TASKS}
    # `.loader` is the loader below the prefetcher, which normalizes and erases on the device.
    return {
        task: _with_cpu_time(lambda loader=loader: sum(len(images) for images, _ in loader.loader))
        for task, loader in loaders.items()
    }


def _with_cpu_time(run: Callable[[], int]) -> harness.Pass:
    """Adds the CPU time of the pass to its result."""

    def timed():
        start = time.process_time()
        return run(), time.process_time() - start

    return timed


# ------------------------------------------------------------------------------------------- files


def link_images(images: pathlib.Path | None, folder: pathlib.Path) -> list[pathlib.Path]:
    """Links the JPEGs of `images`, or generates some, below `folder`/train; returns the paths."""
    below = folder / "train" / "images"
    below.mkdir(parents=True)
    if images is None:
        harness.generate_photos(below, GENERATED)
        return sorted(below.iterdir())
    if not images.is_dir():
        raise InputError(f"--images={images} is not a folder")
    found = sorted(p for p in images.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if len(found) < GROUPS:
        raise InputError(f"--images={images} has {len(found)} JPEGs: at least {GROUPS} are needed")
    links = [below / f"{i:07d}.jpg" for i in range(len(found))]
    for link, path in zip(links, found, strict=True):
        link.symlink_to(path.resolve())
    return links
