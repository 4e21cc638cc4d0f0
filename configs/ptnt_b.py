# SPDX-License-Identifier: Apache-2.0
"""PyramidTNT-B on ImageNet-1k: see `configs/ptnt_s.py`.

    python main.py --config=configs/ptnt_b.py --workdir=runs/ptnt_b --config.data.root=IMAGENET

Quoted, not measured by us: 157.0 M parameters, 16.0 G multiply-adds, top-1 84.1 %.
"""

from configs import ptnt_s


def get_config():
    config = ptnt_s.get_config()
    config.model.name = "ptnt_b_patch16_256"
    config.data.image_size = 256
    return config
