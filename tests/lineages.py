# SPDX-License-Identifier: Apache-2.0
"""The fields in which the published lineages differ from the official network."""

LEGACY = dict(conv_first=True, norm_each_word=True, proj_bias=True, proj_norm=False)
MINDSPORE_IMAGENET = dict(output_bias=False, norm_eps=1e-7, gelu="tanh")
MINDSPORE_PETS = dict(
    conv_first=True,
    qkv_bias=True,
    proj_bias=True,
    proj_norm=False,
    stem_norm=False,
    zero_sentences=True,
    norm_eps=1e-7,
    gelu="tanh",
)
