# SPDX-License-Identifier: Apache-2.0
"""For which machine a network is traced."""

import jax


def platform() -> str:
    """Of the ambient mesh's devices, which may be described and not there, or of those here."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.abstract_device.platform if mesh.abstract_device else jax.default_backend()
