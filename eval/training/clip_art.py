"""Makes the pictures of the reference DINOv2 and trains its classifier: `python -m vtok.eval.training.clip_art`.

Clip art is Debian's `openclipart-png` (public domain; `apt-get install`, or `apt-get download` and `dpkg -x`, and --clip-art
FOLDER/usr/share/openclipart/png). Its folders are the classes. Of pictures that look alike to the encoder one stays. Test and
calibration pictures are drawn from every class and written as JPEG; on all others a linear classifier of the class token is
trained. Photographs (--photos FOLDER, see `PHOTOS`) are cut into squares. Some minutes on a CPU.
"""

from __future__ import annotations

import argparse
import bz2
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vtok.eval.models.data import stack_pixels
from vtok.eval.models.dinov2 import SIZE, load_dinov2, normalise
from vtok.eval.models.dinov2.model import HEAD
from vtok.writing import write

DEBIAN_FOLDER = Path("/usr/share/openclipart/png")
# Class -> folder; "/*" = without those below. Of the package's folders these are the ones that the encoder tells apart.
CLASSES = {
    "cards": "recreation/games/cards",
    "flags": "signs_and_symbols/flags",
    "flat_icons": "computer/icons/flat-theme/action",
    "fruit": "food/fruit",
    "led_digits": "signs_and_symbols/led",
    "lemon_icons": "computer/icons/lemon-theme",
    "mammals": "animals/mammals",
    "map_symbols": "signs_and_symbols/map_symbols",
    "office": "office",
    "patterns": "special/patterns",
    "people": "people/*",
    "roadsigns": "transportation/roadsigns",
    "stars": "shapes/stars",
    "stickmen": "people/stickmen",
}
PHOTOS = {  # name -> (where the file is from, licence)
    "astronaut": ("scikit-image 0.26.0: skimage/data/astronaut.png", "NASA, public domain"),
    "camera": ("scikit-image 0.26.0: skimage/data/camera.png", "Lav Varshney, CC0"),
    "chelsea": ("scikit-image 0.26.0: skimage/data/chelsea.png", "Stefan van der Walt, CC0"),
    "coffee": ("scikit-image 0.26.0: skimage/data/coffee.png", "Rachel Michetti, CC0"),
    "coins": ("scikit-image 0.26.0: skimage/data/coins.png", "Brooklyn Museum, no known copyright restrictions"),
    "hubble_deep_field": ("scikit-image 0.26.0: skimage/data/hubble_deep_field.jpg", "NASA, public domain"),
    "rocket": ("scikit-image 0.26.0: skimage/data/rocket.jpg", "SpaceX, public domain"),
    "grace_hopper": ("matplotlib 3.11.2: matplotlib/mpl-data/sample_data/grace_hopper.jpg", "US government, public domain"),
    "face": ("scipy 1.7.3: scipy/misc/face.dat (a raccoon)", "Judy Weggelaar, public domain"),
}
_FACE = (1024, 768)
PICTURES, TEST, CALIBRATION, MOST = 200, 0.45, 4, 64  # looked at of a class; share, number, largest number of them
ALIKE = 0.98  # cosine of two pictures of which one is left out
_PIXELS, _QUALITY, _BATCH, _SEED = 40_000_000, 85, 16, 0


def fitted(image: Image.Image) -> Image.Image:
    """The whole picture on a white square of 224 pixels."""
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    scale = SIZE / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (SIZE, SIZE), "white")
    square.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return square


def crops(image: Image.Image) -> list[Image.Image]:
    """Squares of the whole height or width, and of 0.65 of it: at both ends of the picture and in its middle."""
    (width, height), side = image.size, min(image.size)
    found = []
    for s in (side, int(0.65 * side)):
        places = sorted({(0, 0), (width - s, height - s), ((width - s) // 2, (height - s) // 2)})
        found += [image.crop((x, y, x + s, y + s)).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for x, y in places]
    return found


@torch.inference_mode()
def features(model: nn.Module, images: Sequence[Image.Image]) -> Tensor:
    """[n, 384] fp32, of the class token."""
    found = []
    for start in range(0, len(images), _BATCH):
        pixels = normalise(stack_pixels(images[start : start + _BATCH]))
        found.append(model(pixels.to(next(model.parameters()).dtype)).float())
    return torch.cat(found)


def different(found: Tensor) -> list[int]:
    """Numbers of pictures [n, D] of which none looks like an earlier one."""
    unit, kept = F.normalize(found, dim=-1), list[int]()
    for i, one in enumerate(unit):
        if not kept or float((unit[kept] @ one).max()) < ALIKE:
            kept.append(i)
    return kept


def train(x: Tensor, y: Tensor, classes: int, decay: float = 1e-2) -> dict[str, Tensor]:
    """Multinomial logistic regression of classes [n] on standardised features [n, D], as a layer that takes them as they are.

    `decay`: weight of the squared norm, which every feature has as if it had unit variance.
    """
    mean, std = x.mean(0), x.std(0)
    layer = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(layer.weight)
    z = (x - mean) / std
    solver = torch.optim.LBFGS(layer.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(layer(z), y) + decay * layer.weight.square().sum() / 2
        value.backward()
        return value

    solver.step(loss)
    weight = layer.weight.detach() / std
    return {"weight": weight.half(), "bias": (layer.bias.detach() - weight @ mean).half()}


def clip_art(source: Path, out: Path) -> None:
    """Writes `clip_art/test`, `clip_art/calibration`, `clip_art/pictures.csv` and the classifier."""
    from safetensors.torch import save

    model, draw = load_dinov2().bfloat16(), random.Random(_SEED)  # features keep a cosine of 0.9999
    listed, tests = list[str](), list[tuple[Image.Image, int]]()
    xs, ys = list[Tensor](), list[int]()
    for label, (name, folder) in enumerate(sorted(CLASSES.items())):
        paths = _pictures(source, folder)
        images = [fitted(Image.open(path)) for path in paths]
        found = features(model, images)
        kept = different(found)
        draw.shuffle(kept)
        size = min(MOST, round(TEST * len(kept)))
        for part, rows in (("test", kept[:size]), ("calibration", kept[size : size + CALIBRATION])):
            for row in rows:
                file = out / "clip_art" / part / name / f"{paths[row].stem}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                images[row].save(file, quality=_QUALITY)
                listed.append(f"{file.relative_to(out / 'clip_art')},{paths[row].relative_to(source)}")
                if part == "test":
                    tests.append((Image.open(file).convert("RGB"), label))
        xs.append(found[kept[size + CALIBRATION :]])
        ys += [label] * len(xs[-1])
        print(f"{name}: {len(paths)} pictures, {len(kept)} different, {size} for tests, {len(xs[-1])} for training", flush=True)
    weights = train(torch.cat(xs), torch.tensor(ys), len(CLASSES))
    logits = features(model, [image for image, _ in tests]) @ weights["weight"].float().T + weights["bias"].float()
    top1 = (logits.argmax(1) == torch.tensor([label for _, label in tests])).float().mean()
    print(f"{len(ys)} training pictures; top-1 of {len(tests)} test pictures: {100 * top1:.2f} %")
    write(out / HEAD, save(weights))
    write(out / "clip_art" / "pictures.csv", "\n".join(["file,source", *sorted(listed)]) + "\n")


def photographs(source: Path, out: Path) -> None:
    """Writes `photographs/NAME-i.jpg`."""
    for name in PHOTOS:
        (path,) = source.glob(f"{name}.*")
        raw = bz2.decompress(path.read_bytes()) if path.suffix == ".dat" else b""
        image: Any = Image.frombytes("RGB", _FACE, raw) if raw else Image.open(path)
        for i, crop in enumerate(crops(image.convert("RGB"))):
            (out / "photographs").mkdir(parents=True, exist_ok=True)
            crop.save(out / "photographs" / f"{name}-{i}.jpg", quality=_QUALITY)


def _size(path: Path) -> int:
    try:
        with Image.open(path) as image:
            return image.width * image.height
    except Image.DecompressionBombError:  # drawn for posters
        return _PIXELS + 1


def _pictures(source: Path, folder: str) -> list[Path]:
    place = source / folder.removesuffix("/*")
    found = sorted(place.glob("*.png") if folder.endswith("/*") else place.rglob("*.png"))
    found = [path for path in found if _size(path) <= _PIXELS]
    taken = min(len(found), PICTURES)
    return [found[i * len(found) // taken] for i in range(taken)]


def main() -> None:
    """Writes either the photographs or the clip art."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clip-art", type=Path, default=DEBIAN_FOLDER)
    parser.add_argument("--photos", type=Path, help="folder with the files that PHOTOS names")
    parser.add_argument("--export", type=Path, required=True, help="vtok's assets/")
    args = parser.parse_args()
    if args.photos is not None:
        photographs(args.photos, args.export)
        return
    shutil.rmtree(args.export / "clip_art", ignore_errors=True)
    clip_art(args.clip_art, args.export)


if __name__ == "__main__":
    main()
