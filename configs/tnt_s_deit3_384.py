# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of TNT-S at 384 pixels after `configs/tnt_s_deit3.py`, as in DeiT-III.

    tnt-flax train --config=tnt_s_deit3_384 --workdir=runs/tnt_s_deit3_384 \\
        --config.init_from=runs/tnt_s_deit3 --config.data.root=IMAGENET

Settings are those of the command for ViT-S at 384 pixels in README_revenge.md of
facebookresearch/deit, with 8 x 64 images per step: the rate is constant after warm-up. Deviations
as in `configs/tnt_s_deit3.py`, and EMA warm-up for the short run.

Quoted, of another network: ViT-S has a top-1 of 83.4 %. With TNT the recipe has not been run:
nothing is promised.
"""

from tnt_flax.configs import tnt


def get_config():
    config = tnt.get_config("s")
    config.epochs = 20
    config.batch_size = 512

    config.model.drop_path = 0.0
    config.model.layer_scale = True

    config.data.image_size = 384
    config.data.crop_fraction = 1.0

    config.augment.repeats = 1
    config.augment.interpolation = "bicubic"
    config.augment.erase_prob = 0.0

    config.optimizer.learning_rate = 1e-5
    config.optimizer.weight_decay = 0.1
    config.optimizer.cooldown_epochs = 0
    config.ema.warmup = True
    config.eval.batch_size = 512
    return config
