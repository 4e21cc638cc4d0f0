# SPDX-License-Identifier: Apache-2.0
"""Input pipeline: sources of records, transforms of images, batches as NumPy arrays."""
