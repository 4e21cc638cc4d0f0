# SPDX-License-Identifier: Apache-2.0
"""ImageNet's other test sets, for any network that knows ImageNet's classes.

    python main.py --config=configs/imagenet_variants.py:v2 --mode=eval \\
        --checkpoint=WEIGHTS --config.data.root=FOLDER --per-class=classes.csv

FOLDER holds what was downloaded, unpacked; the set is named after the colon:

    v2      imagenetv2-matched-frequency-format-val/0, ... 999 (for the other two ImageNet-V2 sets,
            --config.data.eval_split=imagenetv2-top-images-format-val, -threshold0.7-format-val)
    a       imagenet-a/n01498041, ...: 200 classes; the answer is one of these
    r       imagenet-r/n01443537, ...: likewise
    sketch  sketch/n01440764, ...
    real    val/n01440764, ... (or, with --config.data.source=imagenet_tars, the tar), and
            real.json of the ReaL labels (arXiv 2006.07159)

With _tfds behind the name (v2_tfds, real_tfds) FOLDER is where tfds prepared the set. The size,
crop, mean and standard deviation are those of the published weights; others say so when they are
loaded.
"""

from configs import default
from tnt_flax.core.errors import InputError

# The folder; the tfds data set and its split; the only answers.
SETS = {
    "v2": ("imagenetv2-matched-frequency-format-val", "imagenet_v2/matched-frequency", "test", ""),
    "a": ("imagenet-a", "imagenet_a", "test", "imagenet-a"),
    "r": ("imagenet-r", "imagenet_r", "test", "imagenet-r"),
    "sketch": ("sketch", "imagenet_sketch", "test", ""),
    "real": ("validation", "imagenet2012_real", "validation", ""),
}
NAMES = [*SETS, *(f"{name}_tfds" for name in SETS)]


def get_config(name="v2"):
    if name not in NAMES:
        raise InputError(
            f"configs/imagenet_variants.py:{name}: after the colon comes one of {NAMES}"
        )
    config = default.get_config()
    config.model.name = ""  # that of the weights
    folder, tfds, split, config.eval.classes = SETS[name.removesuffix("_tfds")]
    config.data.eval_split = folder
    if name.endswith("_tfds"):
        config.data.source, config.data.name, config.data.eval_split = "tfds", tfds, split
    elif name == "real":
        config.eval.real_labels = "real.json"
    config.eval.batch_size = 256
    return config
