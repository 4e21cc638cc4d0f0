# SPDX-License-Identifier: Apache-2.0
"""TNT-S on ImageNet-1k in 90 epochs, after "Better plain ViT baselines" (arXiv 2205.01580).

    tnt-flax train --config=tnt_s_90ep --workdir=runs/tnt_s_90ep --config.data.root=IMAGENET

Settings are those of Beyer et al. and of big_vision's configs/vit_s16_i1k.py: light augmentation,
gradient clipping, and a cosine in every step after 10,000 steps of warm-up. Its weight decay of
1e-4 per step is 0.1 times the learning rate here. Deviations: timm's RandAugment and eight groups
of mixup, and an EMA (with warm-up), which `eval.weights=raw` leaves out.

Quoted, of another network: ViT-S/16 has a top-1 of 76.5 % after 90 epochs. With TNT the recipe has
not been run: nothing is promised.
"""

from tnt_flax.configs import tnt


def get_config():
    config = tnt.get_config("s")
    config.epochs = 90

    config.model.drop_path = 0.0

    config.data.crop_fraction = 0.875

    config.augment.scale = (0.05, 1.0)
    config.augment.interpolation = "bilinear"
    config.augment.randaugment = "rand-m10-n2"
    config.augment.repeats = 1
    config.augment.label_smoothing = 0.0
    config.augment.mixup_alpha = 0.2
    config.augment.cutmix_alpha = 0.0
    config.augment.erase_prob = 0.0

    config.optimizer.schedule_interval = "step"
    config.optimizer.warmup_learning_rate = 0.0
    config.optimizer.min_learning_rate = 0.0
    config.optimizer.warmup_epochs = 8  # 10,008 steps
    config.optimizer.cooldown_epochs = 0
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0
    config.ema.warmup = True
    return config
