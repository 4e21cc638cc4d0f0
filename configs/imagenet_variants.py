# SPDX-License-Identifier: Apache-2.0
"""Evaluation on the other test sets of ImageNet, for networks with ImageNet's classes.

    tnt-flax eval --config=imagenet_variants:v2 \\
        --checkpoint=WEIGHTS --config.data.root=FOLDER --per-class=classes.csv

FOLDER contains the unpacked download. The argument after the colon is the test set:

    v2      imagenetv2-matched-frequency-format-val/0, ... 999 (for the other two ImageNet-V2 sets,
            --config.data.eval_split=imagenetv2-top-images-format-val, -threshold0.7-format-val)
    a       imagenet-a/n01498041, ...: 200 classes, to which predictions are restricted
    r       imagenet-r/n01443537, ...: likewise
    sketch  sketch/n01440764, ...
    real    val/n01440764, ... (or, with --config.data.source=imagenet_tars, the tar), and
            real.json of the ReaL labels (arXiv 2006.07159)

With the suffix _tfds (v2_tfds, real_tfds), FOLDER is the data_dir of tfds. Image size, crop, mean
and std are those of the published weights; a warning is logged for weights with other values.
"""

from tnt_flax.configs import default

# Folder; tfds data set and its split; classes that predictions are restricted to.
SETS = {
    "v2": ("imagenetv2-matched-frequency-format-val", "imagenet_v2/matched-frequency", "test", ""),
    "a": ("imagenet-a", "imagenet_a", "test", "imagenet-a"),
    "r": ("imagenet-r", "imagenet_r", "test", "imagenet-r"),
    "sketch": ("sketch", "imagenet_sketch", "test", ""),
    "real": ("validation", "imagenet2012_real", "validation", ""),
}
NAMES = [*SETS, *(f"{name}_tfds" for name in SETS)]


def get_config(name="v2"):
    default.check_argument("imagenet_variants.py", name, NAMES)
    config = default.get_config()
    config.model.name = ""  # the network of the weights
    folder, tfds, split, config.eval.classes = SETS[name.removesuffix("_tfds")]
    config.data.eval_split = folder
    if name.endswith("_tfds"):
        config.data.source, config.data.name, config.data.eval_split = "tfds", tfds, split
    elif name == "real":
        config.eval.real_labels = "real.json"
    config.eval.batch_size = 256
    return config
