# SPDX-License-Identifier: Apache-2.0
"""TNT-S on ImageNet-1k with the recipe A2 of "ResNet strikes back" (Wightman et al., 2110.00476).

    tnt-flax train --config=tnt_s_a2 --workdir=runs/tnt_s_a2 --config.data.root=IMAGENET

Settings are those of A2 in Table 2 of the paper. Our own choices, where the paper is silent: the
final learning rate, LAMB's clipping, which is timm's, and the EMA, which the paper does not use:
`eval.weights=raw` evaluates without it.

Quoted, of another network: ResNet-50 has a top-1 of 79.8 %. With TNT the recipe has not been run:
nothing is promised.
"""

from tnt_flax.configs import tnt


def get_config():
    config = tnt.get_config("s")
    config.batch_size = 2048

    config.model.drop_path = 0.05

    config.data.crop_fraction = 0.95

    config.augment.randaugment = "rand-m7-mstd0.5-inc1"
    config.augment.label_smoothing = 0.0
    config.augment.mixup_alpha = 0.1
    config.augment.erase_prob = 0.0

    config.loss.name = "bce"
    config.loss.bce_threshold = 0.0  # all mixed classes are right

    config.optimizer.name = "lamb"
    config.optimizer.learning_rate = 5e-3
    config.optimizer.weight_decay = 0.02
    config.optimizer.clip_norm = 1.0
    config.optimizer.cooldown_epochs = 0
    return config
