# SPDX-License-Identifier: Apache-2.0
"""TNT-S on ImageNet-1k (Han et al., arXiv 2103.00112, Table 4).

    python main.py --config=configs/tnt_s.py --workdir=runs/tnt_s --config.data.root=IMAGENET

IMAGENET holds train/CLASS/*.JPEG and val/CLASS/*.JPEG.
Quoted from the paper, not measured by us: 23.8 M parameters, 5.2 G multiply-adds, top-1 81.5 %,
top-5 95.7 %, trained on 8 V100 GPUs.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.name = "tnt_s_patch16_224"
    return config
