# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of weights of any framework on your own image folder.

    tnt-flax train --config=finetune --workdir=runs/mine \\
        --config.init_from=WEIGHTS --config.data.root=FOLDER
    tnt-flax train --config=finetune:probe ...

The network is that of WEIGHTS. Other classes get a new head; another image size gets resampled
positions. FOLDER contains train/CLASS/IMAGE and val/CLASS/IMAGE, or only train/, or CLASS/IMAGE.
The evaluation folder may also be called valid, validation or test. Without one, a fixed fifth of
each class is held out for evaluation.

Layer-wise learning-rate decay lets lower layers, whose features are general, learn more slowly.
"probe" trains the head alone (linear probing): fast, as no gradient passes the blocks. A warning is
logged if the weights were trained with a mean and std other than 0.5 (MindSpore's on ImageNet).
The values are our own, after BEiT's and those of timm's fine-tuned models, for thousands of images.
With very few images, set more epochs.
"""

from tnt_flax.configs import default

MODES = ("all", "probe")


def get_config(mode="all"):
    default.check_argument("finetune.py", mode, MODES)
    config = default.get_config()
    config.model.name = ""  # the network of init_from
    config.epochs = 30
    config.batch_size = 32
    config.data.holdout = 0.2

    config.augment.repeats = 1
    config.augment.mixup_alpha = 0.0
    config.augment.cutmix_alpha = 0.0
    config.augment.erase_prob = 0.0
    config.augment.scale = (0.3, 1.0)

    config.optimizer.learning_rate = 3e-4  # of the head
    config.optimizer.min_learning_rate = 1e-6
    config.optimizer.warmup_epochs = 2
    config.optimizer.cooldown_epochs = 0
    config.optimizer.layer_decay = 0.75
    config.optimizer.clip_norm = 1.0
    config.ema.decay = 0.9999
    config.ema.warmup = True  # few steps: the EMA would hold on to the initial weights
    config.eval.batch_size = 64
    config.log.every = "10 steps"

    if mode == "probe":
        config.optimizer.freeze = "^(?!head/)"
        config.optimizer.layer_decay = 1.0
        config.optimizer.learning_rate = 1e-3
        config.optimizer.weight_decay = 0.0
        config.model.drop_path = 0.0
        config.augment.randaugment = ""
        config.augment.color_jitter = 0.0
    return config
