# SPDX-License-Identifier: Apache-2.0
"""PyramidTNT-Ti on ImageNet-1k: see `configs/ptnt_s.py`.

    python main.py --config=configs/ptnt_ti.py --workdir=runs/ptnt_ti --config.data.root=IMAGENET

Quoted, not measured by us: 10.6 M parameters, 0.6 G multiply-adds, top-1 75.2 %.
"""

from configs import ptnt_s


def get_config():
    config = ptnt_s.get_config()
    config.model.name = "ptnt_ti_patch16_192"
    config.data.image_size = 192
    return config
