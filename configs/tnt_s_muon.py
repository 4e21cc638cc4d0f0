# SPDX-License-Identifier: Apache-2.0
"""TNT-S on ImageNet-1k: the published recipe with Muon instead of AdamW.

    tnt-flax train --config=tnt_s_muon --workdir=runs/tnt_s_muon --config.data.root=IMAGENET

Muon updates the matrices of blocks, AdamW all other parameters (`training.optimizer`). Its updates
have the size of AdamW's (Liu et al., arXiv 2502.16982), so that learning rate and weight decay are
the published ones. We quote no accuracy, as we know of none on ImageNet-1k for a network of this
size with this augmentation: nothing is promised.
"""

from tnt_flax.configs import tnt


def get_config():
    config = tnt.get_config("s")
    config.optimizer.name = "muon"
    config.optimizer.momentum = 0.95
    return config
