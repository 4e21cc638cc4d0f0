# SPDX-License-Identifier: Apache-2.0
"""PyramidTNT-M on ImageNet-1k: see `configs/ptnt_s.py`.

    python main.py --config=configs/ptnt_m.py --workdir=runs/ptnt_m --config.data.root=IMAGENET

Quoted, not measured by us: 85.0 M parameters, 8.2 G multiply-adds, top-1 83.5 %.
"""

from configs import ptnt_s


def get_config():
    config = ptnt_s.get_config()
    config.model.name = "ptnt_m_patch16_256"
    config.data.image_size = 256
    return config
