# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning weights of any system on an image folder of your own.

    python main.py --config=configs/finetune.py --workdir=runs/mine \\
        --config.init_from=WEIGHTS --config.data.root=FOLDER
    python main.py --config=configs/finetune.py:probe ...

The network is that of WEIGHTS; other classes get a new head, another image size new positions.
FOLDER holds train/CLASS/IMAGE and val/CLASS/IMAGE, or train/ alone, or CLASS/IMAGE: then a fifth of
each class is held out for evaluation, the same images each time.

Lower layers, which know what any image needs, learn more slowly than higher ones. The probe trains
the head alone, which is fast, as no gradient passes the blocks. Weights that were made with another
mean and std than 0.5 (MindSpore's for ImageNet) say so when they are loaded. The values are our own
choice after those of BEiT and of timm's fine-tuned models, for thousands of images; with very few,
set more epochs.
"""

from configs import default
from tnt_flax.core.errors import InputError

HOW = ("all", "probe")


def get_config(how="all"):
    if how not in HOW:
        raise InputError(f"configs/finetune.py:{how}: after the colon comes one of {list(HOW)}")
    config = default.get_config()
    config.model.name = ""  # that of init_from
    config.epochs = 30
    config.batch_size = 32
    config.data.holdout = 0.2

    config.augment.repeats = 1
    config.augment.mixup_alpha = 0.0
    config.augment.cutmix_alpha = 0.0
    config.augment.erase_prob = 0.0
    config.augment.scale = (0.3, 1.0)

    config.optimizer.learning_rate = 3e-4  # of the head; layer_decay says what the others have
    config.optimizer.min_learning_rate = 1e-6
    config.optimizer.warmup_epochs = 2
    config.optimizer.cooldown_epochs = 0
    config.optimizer.layer_decay = 0.75
    config.optimizer.clip_norm = 1.0
    config.ema.decay = 0.99
    config.eval.batch_size = 64
    config.log.every = "10 steps"

    if how == "probe":
        config.optimizer.freeze = "^(?!head/)"
        config.optimizer.layer_decay = 1.0
        config.optimizer.learning_rate = 1e-3
        config.optimizer.weight_decay = 0.0
        config.model.drop_path = 0.0
        config.augment.randaugment = ""
        config.augment.color_jitter = 0.0
    return config
