# SPDX-License-Identifier: Apache-2.0
"""Cuts photographs into a data set of textures, without a download.

    pip install scikit-image
    python examples/textures.py --out=textures
    python examples/textures.py --out=mine --photos=FOLDER

Writes OUT/train/CLASS/*.png and OUT/test/CLASS/*.png: grey patches of 32x32 pixels, whose class is
the photograph. The photographs are 13 of scikit-image and 2 of scikit-learn, or those of FOLDER.
Each is divided into blocks of 72x72 pixels, every fourth of which is for testing. Patches end 4
pixels from the edge of their block: training and test patches are at least 8 pixels apart. Training
patches of a block overlap, its test patches do not. All patches get the same mean and contrast,
and flat ones are left out: neither color nor brightness tells the class. The files are the same on
every run.
"""

import argparse
import importlib.util
import json
import pathlib
import sys
from collections.abc import Iterator

import numpy as np
from PIL import Image

PHOTOS = {
    "skimage": "data/astronaut.png data/brick.png data/camera.png data/chelsea.png data/coffee.png "
    "data/coins.png data/grass.png data/gravel.png data/hubble_deep_field.jpg data/ihc.png "
    "data/motorcycle_left.png data/retina.jpg data/rocket.jpg",
    "sklearn": "datasets/images/china.jpg datasets/images/flower.jpg",
}
BLOCK, MARGIN, PATCH = 72, 4, 32
STRIDES = {"train": 16, "test": 32}  # pixels between patches of a block
LIMITS = {"train": 300, "test": 48}  # patches per class, evenly spaced
MIN_CONTRAST, CONTRAST = 8, 48  # standard deviation of a patch: least, and after normalization


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("examples/textures.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="new folder")
    parser.add_argument("--photos", type=pathlib.Path, help="folder of photographs of your own")
    args = parser.parse_args(argv)
    if args.out.exists():
        parser.error(f"{args.out} exists: choose another folder")
    if args.photos and not args.photos.is_dir():
        parser.error(f"{args.photos} is not a folder")
    files = own_photos(args.photos) if args.photos else packaged_photos(parser)
    if len(files) < 2:
        parser.error(f"{args.photos} has fewer than two photographs")
    counts = {}
    for file in files:
        try:
            counts[file.stem] = write_patches(file, args.out)
        except OSError as error:  # unreadable, or a second file of this name
            parser.error(f"{file}: {error}")
        if not min(counts[file.stem].values()):
            parser.error(f"{file} is too small or flat: it has no patches for training or testing")
    print(json.dumps({"out": str(args.out), "patches": counts}))


def own_photos(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of a folder that Pillow reads by their suffix, in order."""
    suffixes = Image.registered_extensions()
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in suffixes)


def packaged_photos(parser: argparse.ArgumentParser) -> list[pathlib.Path]:
    """Returns the files of `PHOTOS`; exits with a message if a package is missing."""
    files = []
    for package, names in PHOTOS.items():
        spec = importlib.util.find_spec(package)
        if spec is None:
            parser.error("no photographs: pip install scikit-image scikit-learn, or set --photos")
        files += [pathlib.Path(spec.origin).parent / name for name in names.split()]
    return files


def write_patches(file: pathlib.Path, out: pathlib.Path) -> dict[str, int]:
    """Writes the patches of one photograph; returns their number by split."""
    pixels = np.asarray(Image.open(file).convert("L"), np.float32)
    counts = {}
    for split, limit in LIMITS.items():
        patches = list(cut(pixels, split))
        counts[split] = min(limit, len(patches))
        folder = out / split / file.stem
        folder.mkdir(parents=True)
        for k in np.linspace(0, len(patches) - 1, counts[split]).astype(int):
            Image.fromarray(patches[k]).save(folder / f"{k:04}.png")
    return counts


def cut(pixels: np.ndarray, split: str) -> Iterator[np.ndarray]:
    """Yields the patches [32, 32] of a grey photograph that belong to a split."""
    height, width = pixels.shape
    offsets = range(MARGIN, BLOCK - MARGIN - PATCH + 1, STRIDES[split])
    for row in range(height // BLOCK):
        for column in range(width // BLOCK):
            if ((row + 2 * column) % 4 == 0) != (split == "test"):
                continue
            for y in (row * BLOCK + offset for offset in offsets):
                for x in (column * BLOCK + offset for offset in offsets):
                    patch = pixels[y : y + PATCH, x : x + PATCH]
                    if patch.std() >= MIN_CONTRAST:
                        yield normalize(patch)


def normalize(patch: np.ndarray) -> np.ndarray:
    """Returns the patch with the same mean and contrast as all others."""
    patch = 128 + CONTRAST * (patch - patch.mean()) / patch.std()
    return patch.round().clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    main(sys.argv[1:])
