# SPDX-License-Identifier: Apache-2.0
"""PyramidTNT on ImageNet-1k (Han et al., arXiv 2201.00978).

    tnt-flax train --config=ptnt:s --workdir=runs/ptnt_s --config.data.root=IMAGENET

IMAGENET contains train/CLASS/*.JPEG and val/CLASS/*.JPEG. The argument after the colon is the size;
configs/ptnt_s.py is the same as configs/ptnt.py:s. The recipe is TNT's with 20 epochs of warm-up,
as in the README of the authors' code. From there, not measured by us:

    size   pixels   parameters   multiply-adds   top-1
    ti     192      10.6 M       0.6 G           75.2 %
    s      256      32.0 M       3.3 G           82.0 %
    m      256      85.0 M       8.2 G           83.5 %
    b      256      157.0 M      16.0 G          84.1 %
"""

from tnt_flax.configs import default

IMAGE_SIZES = {"ti": 192, "s": 256, "m": 256, "b": 256}


def get_config(size="s"):
    default.check_argument("ptnt.py", size, IMAGE_SIZES)
    config = default.get_config()
    config.model.name = f"ptnt_{size}_patch16_{IMAGE_SIZES[size]}"
    config.data.image_size = IMAGE_SIZES[size]
    config.optimizer.warmup_epochs = 20
    return config
