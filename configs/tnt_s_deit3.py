# SPDX-License-Identifier: Apache-2.0
"""TNT-S on ImageNet-1k with the recipe of DeiT-III (Touvron et al., arXiv 2204.07118).

    tnt-flax train --config=tnt_s_deit3 --workdir=runs/tnt_s_deit3 --config.data.root=IMAGENET
    tnt-flax train --config=tnt_s_deit3:400 ...

The argument after the colon is the number of epochs. Settings are those of the command for
deit_small_patch16_LS in README_revenge.md of facebookresearch/deit, with 8 x 256 images per step;
`configs/tnt_s_deit3_384.py` continues at 384 pixels. Deviations: TNT's mean and std of 0.5, and
LAMB's norms of query, key and value are separate. For fewer devices, set `accumulate`.

Quoted, of another network: ViT-S has a top-1 of 81.4 % after 800 epochs, with the recipe of
DeiT 79.9 %. With TNT the recipe has not been run: nothing is promised.
"""

from tnt_flax.configs import default, tnt

EPOCHS = ("400", "800")


def get_config(epochs="800"):
    default.check_argument("tnt_s_deit3.py", epochs, EPOCHS)
    return set_recipe(tnt.get_config("s"), epochs)


def set_recipe(config, epochs):
    """Changes everything but network, image size and warm-up to the recipe; returns `config`."""
    config.epochs = int(epochs)
    config.batch_size = 2048

    config.model.drop_path = 0.05
    config.model.uniform_drop_path = True
    config.model.layer_scale = True

    config.data.crop_fraction = 1.0

    config.augment.interpolation = "bicubic"
    config.augment.randaugment = ""
    config.augment.three_augment = True
    config.augment.color_jitter = 0.3
    config.augment.label_smoothing = 0.0
    config.augment.erase_prob = 0.0

    config.loss.name = "bce"
    config.loss.bce_threshold = 0.0  # all mixed classes are right

    config.optimizer.name = "lamb"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.clip_norm = 1.0  # that of apex's FusedLAMB
    config.optimizer.cooldown_epochs = 0
    return config
