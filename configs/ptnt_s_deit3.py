# SPDX-License-Identifier: Apache-2.0
"""PyramidTNT-S on ImageNet-1k with the recipe of DeiT-III: see `configs/tnt_s_deit3.py`.

    tnt-flax train --config=ptnt_s_deit3 --workdir=runs/ptnt_s_deit3 --config.data.root=IMAGENET

At 256 pixels and with 20 epochs of warm-up, as published for PyramidTNT. Nobody has run it:
nothing is promised. With `accumulate`, BatchNorm normalizes each micro-batch by itself.
"""

from tnt_flax.configs import default, ptnt, tnt_s_deit3


def get_config(epochs="800"):
    default.check_argument("ptnt_s_deit3.py", epochs, tnt_s_deit3.EPOCHS)
    return tnt_s_deit3.set_recipe(ptnt.get_config("s"), epochs)
