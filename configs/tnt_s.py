# SPDX-License-Identifier: Apache-2.0
"""TNT-S on ImageNet-1k: see `configs/tnt.py`."""

from tnt_flax.configs import tnt


def get_config():
    return tnt.get_config("s")
