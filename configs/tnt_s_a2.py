# SPDX-License-Identifier: Apache-2.0
"""TNT-S on ImageNet-1k with the recipe A2 of "ResNet strikes back" (Wightman et al., 2110.00476).

    tnt-flax train --config=tnt_s_a2 --workdir=runs/tnt_s_a2 --config.data.root=IMAGENET

Batch size, LAMB, rate, decay, augmentation and regularization are those of A2 in Table 2 of the
paper, as mmpretrain (resnet50_8xb256-rsb-a2-300e_in1k) and public timm commands also have them. The
paper is silent on three settings, which are those of such commands (--bce-target-thresh 0.2
--warmup-lr 1e-4 --min-lr 1e-6, for instance of NEXcepTion): the threshold drops a mixed class with
a share of up to 0.2. Deviations: TNT's mean and std of 0.5; the clipping of timm's Lamb, by the
global norm; one norm each for query, key and value; and an EMA, which `eval.weights=raw` leaves
out.

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
    config.loss.bce_threshold = 0.2  # mixed classes with a larger share are right

    config.optimizer.name = "lamb"
    config.optimizer.learning_rate = 5e-3
    config.optimizer.warmup_learning_rate = 1e-4
    config.optimizer.min_learning_rate = 1e-6
    config.optimizer.weight_decay = 0.02
    config.optimizer.clip_norm = 1.0
    config.optimizer.cooldown_epochs = 0
    return config
