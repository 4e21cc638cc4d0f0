# SPDX-License-Identifier: Apache-2.0
"""PyramidTNT-Ti on ImageNet-1k: see `configs/ptnt.py`."""

from tnt_flax.configs import ptnt


def get_config():
    return ptnt.get_config("ti")
