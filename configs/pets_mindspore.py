# SPDX-License-Identifier: Apache-2.0
"""The authors' first release: TNT-B in MindSpore on Oxford-IIIT Pets, at 384 pixels.

    tnt-flax train --config=pets_mindspore --workdir=runs/pets --config.data.root=TFDS
    tnt-flax eval --config=pets_mindspore --checkpoint=tnt_b_pets.ckpt

TFDS is the data_dir in which tfds prepared oxford_iiit_pet. Settings from `src/config.py` and
`src/pet_dataset.py` of mindspore-ai/mindspore, model_zoo/research/cv/TNT (commit 50d7062f), whose
training script was never published. From there, not measured by us: top-1 of 95 %. Deviations:
AdamW with bias correction, a cosine that ends at `min_learning_rate`, and crops resampled with
bilinear or bicubic filters at random, not always bicubic.
"""

from tnt_flax.configs import default


def get_config():
    config = default.get_config()
    config.model.name = "tnt_b_mindspore_pets_patch16_384"
    config.batch_size = 48  # upstream 50, which few device counts divide
    config.epochs = 300

    config.data.source = "tfds"
    config.data.name = "oxford_iiit_pet"
    config.data.eval_split = "test"
    config.data.image_size = 384
    config.data.crop_fraction = 1.0

    config.augment.randaugment = ""  # enables color_jitter
    config.augment.repeats = 1
    config.augment.mixup_alpha = 0.0
    config.augment.cutmix_alpha = 0.0
    config.augment.erase_prob = 0.0
    config.model.drop_path = 0.0  # upstream constructs drop path but never calls it

    config.optimizer.cooldown_epochs = 0
    config.ema.decay = 0.0  # no EMA
    config.eval.batch_size = 48
    return config
