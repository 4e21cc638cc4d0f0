# SPDX-License-Identifier: Apache-2.0
"""TNT on ImageNet-1k (Han et al., arXiv 2103.00112).

    tnt-flax train --config=tnt:s --workdir=runs/tnt_s --config.data.root=IMAGENET

IMAGENET contains train/CLASS/*.JPEG and val/CLASS/*.JPEG. The argument after the colon is the size;
configs/tnt_s.py is the same as configs/tnt.py:s. From Table 4 of the paper, trained on 8 V100 GPUs,
not measured by us:

    size   parameters   multiply-adds   top-1    top-5
    ti     6.1 M        1.4 G           73.9 %   91.9 %
    s      23.8 M       5.2 G           81.5 %   95.7 %
    b      65.6 M       14.1 G          82.9 %   96.3 %
"""

from tnt_flax.configs import default

SIZES = ("ti", "s", "b")


def get_config(size="s"):
    default.check_argument("tnt.py", size, SIZES)
    config = default.get_config()
    config.model.name = f"tnt_{size}_patch16_224"
    return config
