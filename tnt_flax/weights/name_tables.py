# SPDX-License-Identifier: Apache-2.0
"""Names of TNT's tensors in all frameworks, side by side.

A row is a layer (with its weight and bias) or a single tensor, a column is a naming. `x:1/3` is the
second third of x's rows, `-` means that the framework has no such tensor, and names that end in `_`
are joined to the leaf without a dot (`in_proj_weight`). `names.py` reads these tables.

Sources: huawei-noah `tnt_pytorch/tnt.py`; timm `models/tnt.py`; mmpretrain `backbones/tnt.py`;
mindspore-ai/models `research/cv/TNT` ("mindspore", trained on ImageNet) and mindspore-ai/mindspore
`model_zoo/research/cv/TNT` of March 2021 ("mindspore_pets", trained on Oxford-IIIT Pets).
"""

STEM = """
tnt_flax         huawei            timm              mmpretrain                 mindspore         mindspore_pets
word_embed/conv  patch_embed.proj  pixel_embed.proj  backbone.pixel_embed.proj  patch_embed.proj  pixel_embed.proj
word_pos         inner_pos         pixel_pos         backbone.pixel_pos         inner_pos         pixel_pos
proj/norm1       proj_norm1        norm1_proj        backbone.norm1_proj        proj_norm1        pixel2patch.norm_proj
proj/dense       proj              proj              backbone.projection        proj              pixel2patch.proj
proj/norm2       proj_norm2        norm2_proj        backbone.norm2_proj        proj_norm2_tnt    -
cls_token        cls_token         cls_token         backbone.cls_token         cls_token         cls_token
sentence_pos     outer_pos         patch_pos         backbone.patch_pos         outer_pos         patch_pos
norm             norm              norm              backbone.norm              norm              head.0
head             head              head              head.fc                    head              head.1
"""

BLOCK_PREFIX = {
    "tnt_flax": "blocks/{}/",
    "huawei": "blocks.{}.",
    "timm": "blocks.{}.",
    "mmpretrain": "backbone.layers.{}.",
    "mindspore": "blocks.{}.",
    "mindspore_pets": "encoder.layers.{}.",
}

BLOCK = """
tnt_flax               huawei              timm              mmpretrain                          mindspore          mindspore_pets
inner/norm1            inner_norm1         norm_in           inner_block.norm_attn               inner_norm1        inner_norm1
inner/attention/query  inner_attn.qk:0/2   attn_in.qk:0/2    inner_block.attn.attn.in_proj_:0/3  inner_attn.q       inner_attn.qk:0/2
inner/attention/key    inner_attn.qk:1/2   attn_in.qk:1/2    inner_block.attn.attn.in_proj_:1/3  inner_attn.k       inner_attn.qk:1/2
inner/attention/value  inner_attn.v        attn_in.v         inner_block.attn.attn.in_proj_:2/3  inner_attn.v       inner_attn.v
inner/attention/out    inner_attn.proj     attn_in.proj      inner_block.attn.attn.out_proj      inner_attn.proj    inner_attn.proj
inner/norm2            inner_norm2         norm_mlp_in       inner_block.norm_ffn                inner_norm2        inner_norm2
inner/fc1              inner_mlp.fc1       mlp_in.fc1        inner_block.ffn.layers.0.0          inner_mlp.fc1      inner_mlp.fc1
inner/fc2              inner_mlp.fc2       mlp_in.fc2        inner_block.ffn.layers.1            inner_mlp.fc2      inner_mlp.fc2
proj/norm1             proj_norm1          norm1_proj        norm_proj                           proj_norm1         pixel2patch.norm_proj
proj/dense             proj                proj              projection                          proj               pixel2patch.proj
proj/norm2             proj_norm2          norm2_proj        -                                   proj_norm2         -
outer/norm1            outer_norm1         norm_out          outer_block.norm_attn               outer_norm1        outer_norm1
outer/attention/query  outer_attn.qk:0/2   attn_out.qk:0/2   outer_block.attn.attn.in_proj_:0/3  outer_attn.q       outer_attn.qk:0/2
outer/attention/key    outer_attn.qk:1/2   attn_out.qk:1/2   outer_block.attn.attn.in_proj_:1/3  outer_attn.k       outer_attn.qk:1/2
outer/attention/value  outer_attn.v        attn_out.v        outer_block.attn.attn.in_proj_:2/3  outer_attn.v       outer_attn.v
outer/attention/out    outer_attn.proj     attn_out.proj     outer_block.attn.attn.out_proj      outer_attn.proj    outer_attn.proj
outer/norm2            outer_norm2         norm_mlp          outer_block.norm_ffn                outer_norm2        outer_norm2
outer/fc1              outer_mlp.fc1       mlp.fc1           outer_block.ffn.layers.0.0          outer_mlp.fc1      outer_mlp.fc1
outer/fc2              outer_mlp.fc2       mlp.fc2           outer_block.ffn.layers.1            outer_mlp.fc2      outer_mlp.fc2
outer/se/norm          se_layer.fc.0       -                 -                                   -                  -
outer/se/fc1           se_layer.fc.1       -                 -                                   -                  -
outer/se/fc2           se_layer.fc.3       -                 -                                   -                  -
"""

# PyramidTNT, for which only the authors' code exists: huawei-noah `tnt_pytorch/pyramid_tnt.py`.
PYRAMID_STEM = """
tnt_flax                     huawei_pyramid
stem/shared/conv             patch_embed.common_conv.0
stem/shared/batch_norm       patch_embed.common_conv.1
stem/words/conv              patch_embed.inner_convs.0
stem/words/batch_norm        patch_embed.inner_convs.1
stem/sentences_0/conv        patch_embed.outer_convs.0
stem/sentences_0/batch_norm  patch_embed.outer_convs.1
stem/sentences_1/conv        patch_embed.outer_convs.3
stem/sentences_1/batch_norm  patch_embed.outer_convs.4
stem/sentences_2/conv        patch_embed.outer_convs.6
stem/sentences_2/batch_norm  patch_embed.outer_convs.7
word_pos                     inner_pos
sentence_pos                 outer_pos
norm                         norm
head                         head
"""
PYRAMID_MERGE = """
tnt_flax  huawei_pyramid
norm      norm
conv      conv.0
"""
PYRAMID_STAGE = """
tnt_flax      huawei_pyramid
relative_pos  relative_pos
"""
PYRAMID_BLOCK = """
tnt_flax               huawei_pyramid
inner/norm1            inner_norm1
inner/attention/query  inner_attn.q
inner/attention/key    inner_attn.kv:0/2
inner/attention/value  inner_attn.kv:1/2
inner/attention/out    inner_attn.proj
inner/norm2            inner_norm2
inner/fc1              inner_mlp.fc1
inner/fc2              inner_mlp.fc2
proj/norm1             proj_norm1
proj/dense             proj
proj/norm2             proj_norm2
outer/norm1            outer_norm1
outer/attention/query  outer_attn.q
outer/attention/key    outer_attn.kv:0/2
outer/attention/value  outer_attn.kv:1/2
outer/attention/out    outer_attn.proj
outer/reduce/dense     outer_attn.linear
outer/reduce/norm      outer_attn.norm
outer/norm2            outer_norm2
outer/fc1              outer_mlp.fc1
outer/fc2              outer_mlp.fc2
outer/se/norm          se_layer.fc.0
outer/se/fc1           se_layer.fc.1
outer/se/fc2           se_layer.fc.3
"""
# (our prefix, their prefix, table); {} is a number.
PYRAMID = (
    ("", "", PYRAMID_STEM),
    ("word_merges_{}/", "word_merges.{}.", PYRAMID_MERGE),
    ("sentence_merges_{}/", "sentence_merges.{}.", PYRAMID_MERGE),
    ("stages_{}/", "stages.{}.", PYRAMID_STAGE),
    ("stages_{}/blocks/{}/", "stages.{}.blocks.{}.", PYRAMID_BLOCK),
)
PYRAMID_NAMINGS = ("huawei_pyramid",)
PYRAMID_WORDS = 16  # M. Norms over all words of a sentence are flat there and (M, C) here.

# Rows that are a tensor, without a weight and a bias.
SINGLE = ("word_pos", "cls_token", "sentence_pos", "relative_pos")

# Layouts of the word positions: (1, M, C), (1, C, M), or (1, C, H, W) with H W = M.
WORD_POS = {
    "tnt_flax": "1MC",
    "huawei": "1MC",
    "timm": "1CHW",
    "mmpretrain": "1CHW",
    "mindspore": "1MC",
    "mindspore_pets": "1CM",
    "huawei_pyramid": "1MC",
}

# Leaves of a norm, of every other layer, and of a BatchNorm besides those of a norm.
NORM_LEAVES = {"tnt_flax": ("scale", "bias")} | {
    naming: ("gamma", "beta") if naming.startswith("mindspore") else ("weight", "bias")
    for naming in WORD_POS
    if naming != "tnt_flax"
}
LAYER_LEAVES = {naming: ("weight", "bias") for naming in WORD_POS} | {
    "tnt_flax": ("kernel", "bias")
}
STATISTICS_LEAVES = {
    "tnt_flax": ("mean", "var", "count"),
    "huawei_pyramid": ("running_mean", "running_var", "num_batches_tracked"),
}

# Tensors that are not weights: (reason, shape). They are written as zeros.
EXTRA = {
    "huawei": {"outer_tokens": ("unused", "ND")},
    "mindspore_pets": {
        "patch_embed": ("zero", "ND"),
        "fake": ("zero", "1D"),
        "pixel2patch.fake": ("zero", "1D"),
        "encoder.layers.{}.pixel2patch.fake": ("zero", "1D"),
    },
}
IGNORED = {
    "unused": "not used by the network",
    "zero": "zeros that the network adds and does not train",
}
# What MindSpore's trainers save beside the weights: optimizer state and counters.
MINDSPORE_TRAINING = (
    r"(adam_[mv]|moment[12]|moments|accum|stat)\..*|momentum|beta[12]_power|learning_rate"
    r"|global_step|(epoch|step)_num|scale_sense|(current|last_overflow)_iterator_step"
)
