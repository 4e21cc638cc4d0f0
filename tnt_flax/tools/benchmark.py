# SPDX-License-Identifier: Apache-2.0
"""How fast images are read, decoded and augmented, beside timm's loader on the same files.

    python -m tnt_flax.tools.benchmark input
    python -m tnt_flax.tools.benchmark input --images=IMAGENET/train/n01440764 --rounds=9

Both sides make the batches of the published recipe: uint8, 224 pixels, random crop, flip,
RandAugment, three views of each image; or the evaluation pixels. `train_opencv` is the first with
`augment.resampling="opencv"` on our side, if OpenCV is installed. Neither mixes, normalizes or
erases, which belongs on the device. Each runs in a process of its own on the same cores, one at a
time. Ours has its default threads; timm's is `create_transform` in `create_loader` without the
prefetcher's arithmetic, and counts with the faster of 0 and 1 worker processes in every round. A
round is one pass over the files, from making the iterator to its end, after one pass that does not
count. The result is the median over the rounds of ours / timm's images per second.

The last line on stdout is one JSON object. Without torch and timm it has our figures alone. Exit
code 1 is a failure of one side, 2 is bad input.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from tnt_flax.command import Parser
from tnt_flax.data import pipeline, randaugment, sources, transforms
from tnt_flax.data.plan import TrainPlan
from tnt_flax.errors import InputError, RunError, one_line

# The published recipe: 128 images a process, their augmentation, and the default of data.threads.
BATCH, GROUPS, REPEATS, THREADS = 128, 8, 3, 8
SCALE, RATIO, FLIP, RANDAUGMENT = (0.08, 1.0), (3 / 4, 4 / 3), 0.5, "rand-m9-mstd0.5-inc1"
MEAN, CROP_FRACTION = (0.5, 0.5, 0.5), 0.9
TASKS = ("train", "train_opencv", "eval")
# Generated files: ImageNet's usual sizes, and about as large as its files, 110 kB on average.
GENERATED, SIDES, QUALITY = 256, ((500, 375), (500, 333), (375, 500)), 97
SUFFIXES = (".jpg", ".jpeg")
Pass = Callable[[], int]  # makes all batches once; returns the number of images


def make_parser() -> Parser:
    parser = Parser("python -m tnt_flax.tools.benchmark", __doc__)
    add = parser.add_argument
    add("what", choices=["input"], help="the input pipeline, against timm's")
    add("--images", type=pathlib.Path, help="a folder of JPEGs; default: generated photographs")
    add("--rounds", type=int, default=5, help="timed passes of each side")
    add("--cores", type=int, default=1, help="to which both sides are pinned")
    add("--size", type=int, default=224, help="pixels, each side")
    return parser


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    try:
        result = measure_input(make_parser().parse_args(argv))
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    print(json.dumps(result))
    return 0


def measure_input(args: argparse.Namespace) -> dict:
    """Runs all rounds; returns what the JSON line says.

    Raises:
        InputError: no images, too few cores, or less than one round or pixel.
        RunError: a side failed.
    """
    for name in ("rounds", "cores", "size"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name}={getattr(args, name)} is less than 1")
    with_timm = all(importlib.util.find_spec(name) for name in ("torch", "timm"))
    packages = ["numpy", "pillow", "grain", *(["torch", "timm"] if with_timm else [])]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        cores = _cores(args.cores)
        files = _link_images(args.images, pathlib.Path(folder))
        options = (folder, min(BATCH, len(files) // GROUPS * GROUPS), args.size)
        facts = {
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "cores": cores,
            "images": len(files),
            "kilobytes": round(sum(map(os.path.getsize, files)) / len(files) / 1e3, 1),
            "batch_size": options[1],
        }
        for name, fact in facts.items():
            print(f"{name:<11} {fact}", file=sys.stderr)
        sides = {"ours": functools.partial(_our_passes, *options)}
        if with_timm:
            for workers in (0, 1):
                key = f"timm, {workers} workers"
                sides[key] = functools.partial(_timm_passes, *options, workers)
        else:
            print("torch or timm is not installed: our figures alone", file=sys.stderr)
        runs = {name: stack.enter_context(_process(side, cores)) for name, side in sides.items()}
        tasks = [t for t in TASKS if t != "train_opencv" or importlib.util.find_spec("cv2")]
        rates = {task: _rounds(runs, task, args.rounds) for task in tasks}
    ratios = {task: _ratios(rates[task]) for task in tasks}
    return {
        **{task: _median(ratios.get(task)) for task in TASKS},
        "rounds": ratios,
        "images_per_second": {
            task: {name: _median(values) for name, values in rates[task].items()} for task in tasks
        },
        **facts,
    }


def _rounds(runs, task, rounds):
    """Images per second of every side in every round, {side: [...]}."""
    rates = {name: [] for name in runs}
    for i in range(-1, rounds):  # the first does not count
        for name in list(runs) if i % 2 else reversed(runs):  # who comes first changes
            rate = runs[name](task)
            if i >= 0:
                rates[name].append(rate)
        if i >= 0:
            line = ", ".join(f"{name} {values[-1]:.0f}" for name, values in rates.items())
            print(f"{task} round {i + 1}: images/s: {line}", file=sys.stderr)
    return rates


def _ratios(rates):
    """Ours to the fastest other side, in every round."""
    others = [values for name, values in rates.items() if name != "ours"]
    best = [max(values) for values in zip(*others, strict=True)]
    return [round(ours / theirs, 3) for ours, theirs in zip(rates["ours"], best, strict=bool(best))]


def _median(values):
    return round(statistics.median(values), 3) if values else None


# ---------------------------------------------------------------------------------- the two sides


def _our_passes(folder: str, batch_size: int, size: int, cores: int) -> dict[str, Pass]:
    del cores  # our threads are what they are on any machine
    source = sources.open_source("folder", "train", root=folder, name="", class_list="")
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

    def train_pass(transform=transforms.train_transform):
        transform = functools.partial(transform, **train)
        steps = plan.steps_per_epoch
        part = dict(start_step=next(epochs) * steps, num_steps=steps)
        batches = pipeline.train_batches(source, plan, transform=transform, **part, threads=THREADS)
        return sum(len(batch["image"]) for batch in batches)

    def train_opencv_pass():
        from tnt_flax.data import opencv

        return train_pass(opencv.train_transform)

    def eval_pass():
        batches = pipeline.eval_batches(
            source, transform=evaluate, batch_size=batch_size, threads=THREADS
        )
        return sum(int(batch["mask"].sum()) for batch in batches)

    return {"train": train_pass, "train_opencv": train_opencv_pass, "eval": eval_pass}


def _timm_passes(
    folder: str, batch_size: int, size: int, workers: int, cores: int
) -> dict[str, Pass]:
    import timm.data
    import torch
    from timm.data import auto_augment

    multiprocessing.set_start_method("fork", force=True)  # its loader's choice, but for our spawn
    torch.set_num_threads(cores)
    # Its sampler of repeats asks how many processes there are: one, which has every view.
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    # Where Pillow 13 refuses to keep no bits at all, timm 1.0.31 stops. Older versions gave black.
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
        num_workers=workers,
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
    loaders["train_opencv"] = loaders["train"]
    # `.loader` is below the prefetcher, which normalizes and erases: on a GPU, where there is one.
    return {
        task: lambda loader=loader: sum(len(images) for images, _ in loader.loader)
        for task, loader in loaders.items()
    }


# ------------------------------------------------------------------------ processes, cores, files


@contextlib.contextmanager
def _process(make_passes, cores) -> Iterator[Callable[[str], float]]:
    """A process for one side; yields what runs one pass of a task there, in images per second."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, make_passes, cores))
    process.start()
    theirs.close()

    def run(task):
        try:
            ours.send(task)
            answer = ours.recv()
        except (EOFError, OSError):
            raise RunError("a measured process ended too early") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    try:
        yield run
    finally:
        ours.close()
        process.join()


def _serve(connection, make_passes, cores):
    os.sched_setaffinity(0, cores)
    passes = None
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):  # the other end closed
        while True:
            task = connection.recv()
            try:
                passes = passes or make_passes(len(cores))
                start = time.perf_counter()
                images = passes[task]()
                connection.send(images / (time.perf_counter() - start))
            except InputError as error:
                connection.send(InputError(str(error)))
            except Exception as error:
                connection.send(RunError(one_line(error)))


def _cores(count):
    if not hasattr(os, "sched_setaffinity"):
        raise InputError("this system cannot pin a process to cores: run the benchmark on Linux")
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        raise InputError(f"--cores={count}: this process may use {len(cores)}")
    return cores[-count:]


def _link_images(images, folder):
    """Puts the JPEGs below `folder`/train, as both sides read them; returns their paths there."""
    below = folder / "train" / "images"
    below.mkdir(parents=True)
    if images is None:
        _generate(below)
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


def _generate(folder):
    """Crops of the two photographs of scikit-learn (640 x 427)."""
    import sklearn.datasets

    generator = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in sklearn.datasets.load_sample_images().images]
    for i in range(GENERATED):
        photo, (width, height) = photos[i % len(photos)], SIDES[i % len(SIDES)]
        scale = max(1.0, height / photo.height)
        photo = photo.resize((round(photo.width * scale), round(photo.height * scale)))
        left = int(generator.integers(photo.width - width, endpoint=True))
        top = int(generator.integers(photo.height - height, endpoint=True))
        crop = photo.crop((left, top, left + width, top + height))
        crop.save(folder / f"{i:07d}.jpg", quality=QUALITY)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
