# SPDX-License-Identifier: Apache-2.0
"""TNT-B on ImageNet-1k (Han et al., arXiv 2103.00112, Table 4).

    python main.py --config=configs/tnt_b.py --workdir=runs/tnt_b --config.data.root=IMAGENET

IMAGENET holds train/CLASS/*.JPEG and val/CLASS/*.JPEG.
Quoted from the paper, not measured by us: 65.6 M parameters, 14.1 G multiply-adds, top-1 82.9 %,
top-5 96.3 %, trained on 8 V100 GPUs.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.name = "tnt_b_patch16_224"
    return config
