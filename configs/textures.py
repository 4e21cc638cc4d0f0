# SPDX-License-Identifier: Apache-2.0
"""A small TNT on textures cut from photographs: minutes on two CPU cores, no download.

    python examples/textures.py --out=textures
    tnt-flax train --config=textures --workdir=runs/textures

The network is a smaller one than that of `configs/cifar10.py`, with words of 2x2 pixels.
"""

from tnt_flax.configs import cifar10


def get_config():
    config = cifar10.get_config()
    config.epochs = 20
    config.batch_size = 64

    config.model.depth = 4
    config.model.patch_size = 8
    config.model.drop_path = 0.0

    config.data.source = "folder"
    config.data.root = "textures"
    config.data.name = ""

    config.augment.color_jitter = 0.0  # the textures are grey
    config.augment.mixup_alpha = 0.0  # mixing needs longer runs
    config.augment.cutmix_alpha = 0.0

    config.optimizer.warmup_epochs = 2
    config.ema.decay = 0.99
    config.eval.every = "2 epochs"
    config.eval.batch_size = 192
    config.checkpoint.every = "2 epochs"
    config.log.every = "27 steps"
    return config
