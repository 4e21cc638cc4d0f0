# SPDX-License-Identifier: Apache-2.0
"""Names of TNT's tensors in all frameworks, side by side.

A row is a layer (with its leaves, such as weight and bias) or a single tensor, a column is a
naming. `{}` is a number, `x:1/3` the second third of x's rows, `-` means that the framework has
no such tensor, and names that end in `_` are joined to the leaf without a dot (`in_proj_weight`).
`names.py` reads these tables.

Sources: huawei-noah `tnt_pytorch/tnt.py` and `pyramid_tnt.py`; timm `models/tnt.py`; mmpretrain
`backbones/tnt.py`; mindspore-ai/models `research/cv/TNT` ("mindspore", trained on ImageNet) and
mindspore-ai/mindspore `model_zoo/research/cv/TNT` of March 2021 ("mindspore_pets", trained on
Oxford-IIIT Pets).
"""

STEM = """
tnt_flax                     huawei            timm              mmpretrain                 mindspore         mindspore_pets         huawei_pyramid
word_embed/conv              patch_embed.proj  pixel_embed.proj  backbone.pixel_embed.proj  patch_embed.proj  pixel_embed.proj       -
word_pos                     inner_pos         pixel_pos         backbone.pixel_pos         inner_pos         pixel_pos              inner_pos
proj/norm1                   proj_norm1        norm1_proj        backbone.norm1_proj        proj_norm1        pixel2patch.norm_proj  -
proj/dense                   proj              proj              backbone.projection        proj              pixel2patch.proj       -
proj/norm2                   proj_norm2        norm2_proj        backbone.norm2_proj        proj_norm2_tnt    -                      -
cls_token                    cls_token         cls_token         backbone.cls_token         cls_token         cls_token              -
sentence_pos                 outer_pos         patch_pos         backbone.patch_pos         outer_pos         patch_pos              outer_pos
norm                         norm              norm              backbone.norm              norm              head.0                 norm
head                         head              head              head.fc                    head              head.1                 head
stem/shared/conv             -                 -                 -                          -                 -                      patch_embed.common_conv.0
stem/shared/batch_norm       -                 -                 -                          -                 -                      patch_embed.common_conv.1
stem/words/conv              -                 -                 -                          -                 -                      patch_embed.inner_convs.0
stem/words/batch_norm        -                 -                 -                          -                 -                      patch_embed.inner_convs.1
stem/sentences_0/conv        -                 -                 -                          -                 -                      patch_embed.outer_convs.0
stem/sentences_0/batch_norm  -                 -                 -                          -                 -                      patch_embed.outer_convs.1
stem/sentences_1/conv        -                 -                 -                          -                 -                      patch_embed.outer_convs.3
stem/sentences_1/batch_norm  -                 -                 -                          -                 -                      patch_embed.outer_convs.4
stem/sentences_2/conv        -                 -                 -                          -                 -                      patch_embed.outer_convs.6
stem/sentences_2/batch_norm  -                 -                 -                          -                 -                      patch_embed.outer_convs.7
word_merges_{}/norm          -                 -                 -                          -                 -                      word_merges.{}.norm
word_merges_{}/conv          -                 -                 -                          -                 -                      word_merges.{}.conv.0
sentence_merges_{}/norm      -                 -                 -                          -                 -                      sentence_merges.{}.norm
sentence_merges_{}/conv      -                 -                 -                          -                 -                      sentence_merges.{}.conv.0
stages_{}/relative_pos       -                 -                 -                          -                 -                      stages.{}.relative_pos
"""

# (our prefix, their prefix) of the rows of BLOCK.
BLOCK_PREFIXES = {
    "tnt_flax": [("blocks/{}/", "blocks/{}/"), ("stages_{}/blocks/{}/",) * 2],
    "huawei": [("blocks/{}/", "blocks.{}.")],
    "timm": [("blocks/{}/", "blocks.{}.")],
    "mmpretrain": [("blocks/{}/", "backbone.layers.{}.")],
    "mindspore": [("blocks/{}/", "blocks.{}.")],
    "mindspore_pets": [("blocks/{}/", "encoder.layers.{}.")],
    "huawei_pyramid": [("stages_{}/blocks/{}/", "stages.{}.blocks.{}.")],
}

BLOCK = """
tnt_flax               huawei             timm             mmpretrain                          mindspore        mindspore_pets         huawei_pyramid
inner/norm1            inner_norm1        norm_in          inner_block.norm_attn               inner_norm1      inner_norm1            inner_norm1
inner/attention/query  inner_attn.qk:0/2  attn_in.qk:0/2   inner_block.attn.attn.in_proj_:0/3  inner_attn.q     inner_attn.qk:0/2      inner_attn.q
inner/attention/key    inner_attn.qk:1/2  attn_in.qk:1/2   inner_block.attn.attn.in_proj_:1/3  inner_attn.k     inner_attn.qk:1/2      inner_attn.kv:0/2
inner/attention/value  inner_attn.v       attn_in.v        inner_block.attn.attn.in_proj_:2/3  inner_attn.v     inner_attn.v           inner_attn.kv:1/2
inner/attention/out    inner_attn.proj    attn_in.proj     inner_block.attn.attn.out_proj      inner_attn.proj  inner_attn.proj        inner_attn.proj
inner/norm2            inner_norm2        norm_mlp_in      inner_block.norm_ffn                inner_norm2      inner_norm2            inner_norm2
inner/fc1              inner_mlp.fc1      mlp_in.fc1       inner_block.ffn.layers.0.0          inner_mlp.fc1    inner_mlp.fc1          inner_mlp.fc1
inner/fc2              inner_mlp.fc2      mlp_in.fc2       inner_block.ffn.layers.1            inner_mlp.fc2    inner_mlp.fc2          inner_mlp.fc2
proj/norm1             proj_norm1         norm1_proj       norm_proj                           proj_norm1       pixel2patch.norm_proj  proj_norm1
proj/dense             proj               proj             projection                          proj             pixel2patch.proj       proj
proj/norm2             proj_norm2         norm2_proj       -                                   proj_norm2       -                      proj_norm2
inner/layer_scale1     -                  -                -                                   -                -                      -
inner/layer_scale2     -                  -                -                                   -                -                      -
outer/layer_scale1     -                  -                -                                   -                -                      -
outer/layer_scale2     -                  -                -                                   -                -                      -
outer/norm1            outer_norm1        norm_out         outer_block.norm_attn               outer_norm1      outer_norm1            outer_norm1
outer/attention/query  outer_attn.qk:0/2  attn_out.qk:0/2  outer_block.attn.attn.in_proj_:0/3  outer_attn.q     outer_attn.qk:0/2      outer_attn.q
outer/attention/key    outer_attn.qk:1/2  attn_out.qk:1/2  outer_block.attn.attn.in_proj_:1/3  outer_attn.k     outer_attn.qk:1/2      outer_attn.kv:0/2
outer/attention/value  outer_attn.v       attn_out.v       outer_block.attn.attn.in_proj_:2/3  outer_attn.v     outer_attn.v           outer_attn.kv:1/2
outer/attention/out    outer_attn.proj    attn_out.proj    outer_block.attn.attn.out_proj      outer_attn.proj  outer_attn.proj        outer_attn.proj
outer/norm2            outer_norm2        norm_mlp         outer_block.norm_ffn                outer_norm2      outer_norm2            outer_norm2
outer/fc1              outer_mlp.fc1      mlp.fc1          outer_block.ffn.layers.0.0          outer_mlp.fc1    outer_mlp.fc1          outer_mlp.fc1
outer/fc2              outer_mlp.fc2      mlp.fc2          outer_block.ffn.layers.1            outer_mlp.fc2    outer_mlp.fc2          outer_mlp.fc2
outer/se/norm          se_layer.fc.0      -                -                                   -                -                      se_layer.fc.0
outer/se/fc1           se_layer.fc.1      -                -                                   -                -                      se_layer.fc.1
outer/se/fc2           se_layer.fc.3      -                -                                   -                -                      se_layer.fc.3
outer/reduce/dense     -                  -                -                                   -                -                      outer_attn.linear
outer/reduce/norm      -                  -                -                                   -                -                      outer_attn.norm
"""

# Rows that are a tensor, without leaves.
SINGLE = ("word_pos", "cls_token", "sentence_pos", "relative_pos", "layer_scale1", "layer_scale2")
# Leaves of each kind of layer: ours, torch's, MindSpore's.
LAYER_LEAVES = [("kernel", "weight", "weight"), ("bias", "bias", "bias")]
NORM_LEAVES = [("scale", "weight", "gamma"), ("bias", "bias", "beta")]
STATISTICS_LEAVES = [  # of a BatchNorm, besides those of a norm
    ("mean", "running_mean", None),
    ("var", "running_var", None),
    ("count", "num_batches_tracked", None),
]

# Layouts of the word positions other than (1, M, C): (1, C, M), or (1, C, H, W) with H W = M.
WORD_POS = {"timm": "1CHW", "mmpretrain": "1CHW", "mindspore_pets": "1CM"}
PYRAMID_WORDS = 16  # M. Norms over all words of a sentence are flat there and (M, C) here.

# Tensors that are not weights: (reason, shape). They are written as zeros.
UNUSED = "not used by the network"
ZERO = "zeros that the network adds and does not train"
EXTRA = {
    "huawei": {"outer_tokens": (UNUSED, "ND")},
    "mindspore_pets": {
        "patch_embed": (ZERO, "ND"),
        "fake": (ZERO, "1D"),
        "pixel2patch.fake": (ZERO, "1D"),
        "encoder.layers.{}.pixel2patch.fake": (ZERO, "1D"),
    },
}
# What MindSpore's trainers save beside the weights: optimizer state and counters.
MINDSPORE_TRAINING = (
    r"(adam_[mv]|moment[12]|moments|accum|stat)\..*|momentum|beta[12]_power|learning_rate"
    r"|global_step|(epoch|step)_num|scale_sense|(current|last_overflow)_iterator_step"
)
