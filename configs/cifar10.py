# SPDX-License-Identifier: Apache-2.0
r"""A small TNT on CIFAR-10 from scratch: sentences of 4x4 pixels, words of 2x2 pixels.

    tnt-flax train --config=cifar10 --workdir=runs/cifar10
    tnt-flax train --config=cifar10 --workdir=runs/cifar10 --config.data.source=table \
        --config.data.root=CIFAR10
    tnt-flax train --config=cifar10 --workdir=runs/cifar10 --config.data.source=folder \
        --config.data.root=FOLDER
    tnt-flax train --config=cifar10:gpu ...

The images come from tfds, from Parquet (CIFAR10 is a copy of uoft-cs/cifar10 of the Hugging Face
hub) or from a folder train/CLASS/IMAGE and test/CLASS/IMAGE. The argument after the colon is the
machine: "cpu" is for a night on two cores, "gpu" for a larger network in 15 minutes on a GPU.

The settings are our own. Measured on CIFAR-10 (docs/training.md): 52.8 % of the test images after
four epochs, and the settings of "cpu" beside three others in six epochs of a subset. The whole runs
were not made.
"""

from tnt_flax.configs import default

MACHINES = ("cpu", "gpu")


def get_config(machine="cpu"):
    default.check_argument("cifar10.py", machine, MACHINES)
    config = default.get_config()
    config.epochs = 60
    config.batch_size = 128

    config.model.name = "tnt_ti_patch16_224"
    config.model.patch_size = 4
    config.model.inner_stride = 2
    config.model.depth = 6
    config.model.outer_dim = 128
    config.model.outer_heads = 4
    config.model.mlp_ratio = 2.0
    config.model.drop_path = 0.05
    config.model.dtype = "float32"

    config.data.source = "tfds"
    config.data.name = "cifar10"
    config.data.image_size = 32
    config.data.crop_fraction = 1.0
    config.data.threads = 2

    config.augment.scale = (0.5, 1.0)
    config.augment.randaugment = ""
    config.augment.color_jitter = 0.2
    config.augment.repeats = 1
    config.augment.erase_prob = 0.0
    config.augment.mix_off_epochs = 5

    config.optimizer.schedule_interval = "step"  # by epochs, the first is lost to the warm-up
    config.optimizer.cooldown_epochs = 0
    config.ema.decay = 0.999
    config.ema.warmup = True
    config.eval.every = "5 epochs"
    config.eval.batch_size = 1000

    if machine == "gpu":
        config.epochs = 100
        config.batch_size = 512
        config.model.depth = 9
        config.model.outer_dim = 192
        config.model.outer_heads = 3
        config.model.mlp_ratio = 4.0
        config.model.drop_path = 0.1
        config.model.dtype = "bfloat16"
        config.data.threads = 4
        config.data.workers = 4
        config.augment.randaugment = "rand-m7-mstd0.5-inc1"
    return config
