# SPDX-License-Identifier: Apache-2.0
"""Compares fine-tuning, a linear probe and training from scratch on a few images per class.

    pip install scikit-image
    python examples/textures.py --out=textures
    python docs/few_textures.py --data=textures --out=docs/few_textures.png

Trains the network of `configs/textures.py` on two thirds of the textures. Then trains on a few
images of each other texture: the same network from scratch, the head of the first network, and the
whole first network (`configs/finetune.py`). All three see the same images in the same number of
steps and are evaluated on the same test images, as are the nearest neighbors in pixels, in
histograms and in Fourier amplitudes. Interrupted, the same command resumes. The last line on stdout
is one JSON object: top-1 per method and number of images, and top-1 of the neighbors on all
textures.
"""

import contextlib
import json
import os
import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # for `configs`

import matplotlib
import numpy as np
from absl import logging
from matplotlib import pyplot as plt
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from configs import finetune, textures
from tnt_flax.core.errors import InputError
from tnt_flax.runtime import host
from tnt_flax.tools.command_line import Parser, exit_on_error
from tnt_flax.training.train import train_and_evaluate

COUNTS = (5, 80)  # images of each new texture
STEPS, BATCH = 160, 25
RATES = {"scratch": 1e-3, "probe": 1e-2, "all": 1e-3}  # learning rates
METHODS = {
    "all": ("fine-tuned", "#1b7837"),
    "probe": ("linear probe", "#4393c3"),
    "scratch": ("from scratch", "#7f7f7f"),
    "neighbor": ("nearest neighbor, Fourier amplitudes", "#e08214"),
}
FEATURES = {
    "pixels": lambda images: images.reshape(len(images), -1),
    "histogram": lambda images: np.sqrt([np.histogram(x, 32, (0, 256))[0] for x in images]),
    "Fourier amplitudes": lambda images: np.log1p(np.abs(np.fft.rfft2(images - 128.0))).reshape(
        len(images), -1
    ),
}


def main(argv: list[str]) -> None:
    matplotlib.use("Agg")
    logging.set_verbosity(logging.ERROR)
    host.keep_memory()
    host.cache_compilations()
    with exit_on_error("resume with the same command"):
        parser = Parser("python docs/few_textures.py", __doc__)
        parser.add_argument("--data", type=pathlib.Path, default="textures")
        parser.add_argument("--workdir", type=pathlib.Path, default="runs/few_textures")
        parser.add_argument("--out", type=pathlib.Path, default="docs/few_textures.png")
        args = parser.parse_args(argv)
        names = sorted(path.name for path in args.data.glob("train/*"))
        if len(names) < 3:
            raise InputError(f"{args.data} has no textures: run examples/textures.py first")
        of_all = {
            f"{count} in {name}": neighbors(args.data, args.data, names, name, count)
            for name in FEATURES
            for count in (1, 5)
        }
        top1, images = measure(args.data.resolve(), args.workdir.resolve(), names)
        plot(top1, images, args.out)
    named = {METHODS[method][0]: values for method, values in top1.items()}
    print(json.dumps(named | {"neighbors on all": of_all, "out": str(args.out)}))


def measure(data, workdir, names) -> tuple[dict[str, dict[int, float]], int]:
    """Returns top-1 by method and number of images, and the number of test images."""
    new = names[1::3]
    link(data, workdir / "known_data", [name for name in names if name not in new])
    run(workdir / "known", with_data(textures.get_config(), workdir / "known_data"))
    top1 = {method: {} for method in METHODS}
    for count in COUNTS:
        root = workdir / f"new_data_{count}"
        link(data, root, new, count)
        for method in METHODS:
            if method == "neighbor":
                share = neighbors(root, data, new, "Fourier amplitudes")
            else:
                config = with_data(small(method, workdir / "known", count), root)
                share = run(workdir / f"{method}_{count}", config)["top1"]
            top1[method][count] = share
            print(f"{count} images, {METHODS[method][0]}: {share:.1%}", file=sys.stderr)
    return top1, sum(len(list((data / "test" / name).iterdir())) for name in new)


def link(data, root, names, count=None):
    """Links the images of `names` from `data` into `root`, `count` per class for training."""
    shutil.rmtree(root, ignore_errors=True)
    for split, limit in (("train", count), ("test", None)):
        for name in names:
            (root / split / name).mkdir(parents=True)
            images = sorted((data / split / name).iterdir())
            for image in np.random.default_rng(0).permutation(images)[:limit]:
                (root / split / name / image.name).symlink_to(image)


def small(method, weights, count):
    """Returns the config of one method with `count` images per new texture."""
    config = textures.get_config() if method == "scratch" else finetune.get_config(method)
    if method != "scratch":
        config.init_from = str(weights)
        config.data.update(image_size=32, crop_fraction=1.0, threads=2)
        config.augment.update(textures.get_config().augment)
        config.model.update(drop_path=0.0, dtype="float32")
    config.optimizer.learning_rate = RATES[method]
    config.batch_size = BATCH
    config.epochs = STEPS // (count * 5 // BATCH)
    config.optimizer.warmup_epochs = config.epochs // 20
    config.ema.update(finetune.get_config().ema)
    return config


def with_data(config, root):
    config.data.update(source="folder", root=str(root))
    config.eval.update(every=f"{config.epochs} epochs", batch_size=192)
    config.checkpoint.every = config.eval.every
    return config


def run(workdir, config):
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        return train_and_evaluate(config, workdir)


def neighbors(train, test, names, features, count=1) -> float:
    """Returns the top-1 on the test images of the nearest training images by `features`."""
    (images, labels), (test_images, test_labels) = (
        read(root / split, names) for root, split in ((train, "train"), (test, "test"))
    )
    nearest = KNeighborsClassifier(count).fit(FEATURES[features](images), labels)
    return float(nearest.score(FEATURES[features](test_images), test_labels))


def read(folder, names):
    files = [file for name in names for file in sorted((folder / name).iterdir())]
    return np.stack([np.asarray(Image.open(file)) for file in files]), [
        f.parent.name for f in files
    ]


def plot(top1, images, path):
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for method, (label, color) in METHODS.items():
        share = np.array([top1[method][count] for count in COUNTS])
        error = np.sqrt(share * (1 - share) / images)
        options = dict(fmt="o-", color=color, label=label, capsize=3)
        axes.errorbar(COUNTS, 100 * share, 100 * error, **options)
    axes.set(xscale="log", xlabel="images of each new texture", ylabel="top-1, %")
    axes.set_xticks(COUNTS, [str(count) for count in COUNTS])
    axes.minorticks_off()
    axes.set_title(
        f"After {STEPS} steps, on {images} images; bars: one standard error", fontsize=10
    )
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
