# SPDX-License-Identifier: Apache-2.0
"""TNT-Ti on ImageNet-1k (Han et al., arXiv 2103.00112, Table 4).

    python main.py --config=configs/tnt_ti.py --workdir=runs/tnt_ti --config.data.root=IMAGENET

IMAGENET holds train/CLASS/*.JPEG and val/CLASS/*.JPEG.
Quoted from the paper, not measured by us: 6.1 M parameters, 1.4 G multiply-adds, top-1 73.9 %,
top-5 91.9 %, trained on 8 V100 GPUs.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.model.name = "tnt_ti_patch16_224"
    return config
