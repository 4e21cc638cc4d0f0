# SPDX-License-Identifier: Apache-2.0
r"""Transfer learning as in the paper: fine-tuning at 384 pixels (section 4.4, Table 9).

    tnt-flax train --config=transfer:cifar10 --workdir=runs/cifar10 \
        --config.init_from=WEIGHTS --config.model.name=tnt_b_patch16_224

WEIGHTS is a checkpoint, of any framework, of a network trained on ImageNet at 224 pixels. Positions
are resampled, and the head is replaced. The argument after the colon is a data set: see DATA.

From the paper, not measured by us: top-1 in percent of TNT-S / TNT-B at 384 pixels.

    ImageNet 83.1 / 83.9      CIFAR-10 98.7 / 99.1      CIFAR-100 90.1 / 91.1
    Flowers-102 98.8 / 99.0   Oxford-IIIT Pets 94.7 / 95.0   iNaturalist 2019 81.4 / 83.2

From the paper: settings and augmentation of training, 64 epochs for CIFAR and 300 for the
fine-grained data sets. Learning rate, weight decay and 16 images per GPU are the authors' reply in
issue 76 of Efficient-AI-Backbones, for TNT-B on CIFAR-10. Our own choices: 8 GPUs (the reply names
no number), 30 epochs for ImageNet, and EMA warm-up, without which the published decay would hold on
to the initial weights.
"""

from tnt_flax.configs import default

# tfds data set ("" is an image folder), train and test split, epochs.
DATA = {
    "imagenet": ("", "train", "validation", 30),
    "cifar10": ("cifar10", "train", "test", 64),
    "cifar100": ("cifar100", "train", "test", 64),
    "pets": ("oxford_iiit_pet", "train", "test", 300),  # 3,680 and 3,669 images
    "flowers": ("oxford_flowers102", "train+validation", "test", 300),  # 2,040 and 6,149
    "inat19": ("", "train", "validation", 300),  # 265,240 and 3,003
}


def get_config(data="imagenet"):
    default.check_argument("transfer.py", data, DATA)
    config = default.get_config()
    config.batch_size = 16 * 8
    config.data.image_size = 384
    name, train, evaluation, config.epochs = DATA[data]
    config.data.source = "tfds" if name else "folder"
    config.data.name, config.data.train_split, config.data.eval_split = name, train, evaluation
    config.optimizer.learning_rate = 5e-5
    config.optimizer.warmup_learning_rate = 1e-6
    config.optimizer.min_learning_rate = 1e-6  # the published 1e-5 is a fifth of this peak
    config.optimizer.weight_decay = 5e-4
    config.ema.warmup = True
    config.eval.batch_size = 128
    return config
