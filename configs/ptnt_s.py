# SPDX-License-Identifier: Apache-2.0
"""PyramidTNT-S on ImageNet-1k (Han et al., arXiv 2201.00978).

    python main.py --config=configs/ptnt_s.py --workdir=runs/ptnt_s --config.data.root=IMAGENET

The recipe of TNT with 20 epochs of warm-up, as in the readme of the authors' code, from which these
numbers are quoted, not measured by us: 32.0 M parameters, 3.3 G multiply-adds, top-1 82.0 %.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.name = "ptnt_s_patch16_256"
    config.data.image_size = 256
    config.optimizer.warmup_epochs = 20
    return config
