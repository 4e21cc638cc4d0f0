# SPDX-License-Identifier: Apache-2.0
"""Compares fine-tuning, a linear probe and training from scratch on a few images per class.

    python docs/few_digits.py --workdir=runs/few_digits --out=docs/few_digits.png

Trains a small TNT on the handwritten digits 0 to 4. Then trains on a few images of each digit from
5 to 9: the same network from scratch, the head of the first network, and the whole first network
(`configs/finetune.py`). All three see the same images in the same number of steps and are evaluated
on the same held-out images. Interrupted, the same command resumes. The last line on stdout is one
JSON object: top-1 per method and number of images.
"""

import contextlib
import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # for `configs`

import matplotlib
import numpy as np
from absl import logging
from matplotlib import pyplot as plt
from PIL import Image

from configs import digits, finetune
from tnt_flax.data.sources import Digits
from tnt_flax.runtime import host
from tnt_flax.tools.command_line import Parser, exit_on_error
from tnt_flax.training.train import train_and_evaluate

KNOWN, NEW = range(0, 5), range(5, 10)
COUNTS = (2, 10, 50)  # images of each new digit
STEPS, BATCH = 100, 10
RATES = {"scratch": 1e-3, "probe": 1e-2, "all": 1e-3}  # learning rates
METHODS = {"scratch": "from scratch", "probe": "linear probe", "all": "fine-tuned"}


def main(argv: list[str]) -> None:
    matplotlib.use("Agg")
    logging.set_verbosity(logging.ERROR)
    host.keep_memory()
    host.cache_compilations()
    with exit_on_error("resume with the same command"):
        parser = Parser("python docs/few_digits.py", __doc__)
        parser.add_argument("--workdir", type=pathlib.Path, default="runs/few_digits")
        parser.add_argument("--out", type=pathlib.Path, default="docs/few_digits.png")
        args = parser.parse_args(argv)
        top1 = measure(args.workdir.resolve())
        plot(top1, args.out)
    print(
        json.dumps(
            {METHODS[method]: values for method, values in top1.items()} | {"out": str(args.out)}
        )
    )


def measure(workdir: pathlib.Path) -> dict[str, dict[int, float]]:
    """Returns top-1 by method and number of images."""
    root = workdir / "data"
    write_digits(root / "known", Digits("train"), KNOWN)
    write_digits(root / "known_test", Digits("test"), KNOWN)
    write_digits(root / "new_test", Digits("test"), NEW)
    run(workdir / "known", from_folder(digits.get_config(), root, "known", "known_test"))
    top1 = {method: {} for method in METHODS}
    for count in COUNTS:
        train = f"new_{count}"
        write_digits(root / train, Digits("train"), NEW, count)
        for method in METHODS:
            config = small(method, workdir / "known", count)
            result = run(
                workdir / f"{train}_{method}", from_folder(config, root, train, "new_test")
            )
            top1[method][count] = result["top1"]
            print(f"{count} images, {METHODS[method]}: {result['top1']:.1%}", file=sys.stderr)
    return top1


def write_digits(folder, source, wanted, count=None):
    """Writes `count` digits per class, or all, as folder/CLASS/NUMBER.png."""
    for label in wanted:
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        rows = [i for i in range(len(source)) if source[i][1] == label]
        if count:
            rows = np.random.default_rng(0).permutation(rows)[:count]
        for i in rows:
            Image.fromarray(source[i][0]).save(folder / str(label) / f"{i}.png")


def small(method, weights, count):
    """Returns the config of one method with `count` images per new digit."""
    config = digits.get_config() if method == "scratch" else finetune.get_config(method)
    if method != "scratch":
        config.init_from = str(weights)
        config.data.update(image_size=32, crop_fraction=1.0)
        config.augment.update(digits.get_config().augment)
        config.model.update(drop_path=0.0, dtype="float32")
    config.optimizer.learning_rate = RATES[method]
    config.batch_size = BATCH
    config.epochs = STEPS // (count * len(NEW) // BATCH)
    config.optimizer.warmup_epochs = config.epochs // 20
    config.optimizer.cooldown_epochs = 0
    config.ema.update(finetune.get_config().ema)
    return config


def from_folder(config, root, train, test):
    config.data.update(source="folder", root=str(root), train_split=train, eval_split=test)
    config.data.threads = 2
    config.eval.update(every=f"{config.epochs + 5} epochs", batch_size=180)
    config.checkpoint.every = config.eval.every
    return config


def run(workdir, config):
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        return train_and_evaluate(config, workdir)


def plot(top1, path):
    images = sum(Digits("test")[i][1] in NEW for i in range(len(Digits("test"))))
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for (method, label), color in zip(
        METHODS.items(), ("#7f7f7f", "#4393c3", "#1b7837"), strict=True
    ):
        share = np.array([top1[method][count] for count in COUNTS])
        error = np.sqrt(share * (1 - share) / images)
        options = dict(fmt="o-", color=color, label=label, capsize=3)
        axes.errorbar(COUNTS, 100 * share, 100 * error, **options)
    axes.set(xscale="log", xlabel="images of each new digit (5 to 9)", ylabel="top-1, %")
    axes.set_xticks(COUNTS, [str(count) for count in COUNTS])
    axes.minorticks_off()
    axes.set_title(
        f"After {STEPS} steps, on {images} images; bars: one standard error", fontsize=10
    )
    axes.legend(frameon=False, loc="upper left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
