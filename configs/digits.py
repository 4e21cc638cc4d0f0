# SPDX-License-Identifier: Apache-2.0
"""A small TNT on scikit-learn's handwritten digits: minutes on two CPU cores, no download.

    tnt-flax train --config=digits --workdir=runs/digits

The 8x8 digits are enlarged to 32x32: a word (4x4 pixels) is one original pixel, a sentence (16x16
pixels) is a quarter of the digit.
"""

from tnt_flax.configs import default


def get_config():
    config = default.get_config()
    config.epochs = 50
    config.batch_size = 32

    config.model.name = "tnt_ti_patch16_224"
    config.model.depth = 4
    config.model.inner_dim = 24
    config.model.inner_heads = 4
    config.model.drop_path = 0.0
    config.model.dtype = "float32"

    config.data.source = "digits"
    config.data.eval_split = "test"
    config.data.image_size = 32
    config.data.crop_fraction = 1.0
    config.data.threads = 2

    config.augment.scale = (0.5, 1.0)
    config.augment.flip = 0.0  # a mirrored digit is another digit or none
    config.augment.randaugment = ""
    config.augment.color_jitter = 0.0
    config.augment.repeats = 1
    config.augment.mixup_alpha = 0.0  # mixing and erasing need longer runs
    config.augment.cutmix_alpha = 0.0
    config.augment.erase_prob = 0.0

    config.optimizer.warmup_epochs = 3
    config.optimizer.cooldown_epochs = 2
    config.ema.decay = 0.99  # the published decay is for runs 100 times longer
    config.eval.every = "5 epochs"
    config.eval.batch_size = 120
    config.checkpoint.every = "5 epochs"
    config.log.every = "44 steps"
    return config
