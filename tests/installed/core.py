# SPDX-License-Identifier: Apache-2.0
"""Creates, stores, converts and loads a network and predicts, with the core dependencies alone.

.ci/run starts it outside the checkout, where the wheel is installed without extras;
tests/test_packaging.py in the checkout, with the modules of the extras hidden.
"""

import pathlib
import sys
import tempfile

import jax
import numpy as np
from PIL import Image

import tnt_flax
from tnt_flax.__main__ import main
from tnt_flax.weights.write import save_weights

NAME, SIZE = "tnt_ti_patch16_224", 32
FIELDS = dict(depth=1, outer_dim=24, inner_dim=4, outer_heads=2, inner_heads=2)

folder = pathlib.Path(tempfile.mkdtemp())
first = str(folder / "first.safetensors")
images = np.random.default_rng(0).integers(0, 256, (1, 48, 48, 3), np.uint8)
Image.fromarray(images[0]).save(folder / "noise.png")

assert NAME in tnt_flax.list_models()
model = tnt_flax.create_model(NAME, num_classes=10, **FIELDS)
variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, SIZE, SIZE, 3), np.float32))
data = {"image_size": SIZE, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_fraction": 1.0}
info = {"config": {"model": {"name": NAME} | FIELDS, "data": data}}
save_weights(first, variables["params"], info)

expected = None
for framework, suffix in (("flax", ".safetensors"), ("timm", ".pth"), ("huawei", ".pth.tar")):
    path = str(folder / f"{framework}{suffix}")
    assert main(["convert", first, path, f"--to={framework}"]) == 0
    heads = {} if framework == "flax" else dict(outer_heads=2, inner_heads=2)
    loaded, loaded_variables = tnt_flax.load(path, **heads)
    logits = np.asarray(loaded.apply(loaded_variables, np.zeros((1, SIZE, SIZE, 3), np.float32)))
    expected = logits if expected is None else expected
    np.testing.assert_allclose(logits, expected, atol=1e-5)

classifier = tnt_flax.load_classifier(first)
((best, *_),) = classifier.predict(images[0])
assert 0 < best.probability <= 1
assert main(["predict", first, str(folder / "noise.png"), f"--out={folder / 'table.csv'}"]) == 0
assert f",{best.label}," in (folder / "table.csv").read_text()
assert main(["describe", NAME]) == 0
assert main(["train", "--config=digits", f"--workdir={folder / 'run'}"]) == 2
assert not (folder / "run").exists()
unneeded = {"clu", "grain", "matplotlib", "ml_collections", "pyarrow", "scipy", "sklearn"}
assert not unneeded & sys.modules.keys(), unneeded & sys.modules.keys()
print(f"tnt_flax {tnt_flax.__version__} from {pathlib.Path(tnt_flax.__file__).parent}")
