"""Classify pictures with fewer tokens: timm's models, or the bundled ViT on Fashion-MNIST.

python classify.py                                                  # bundled model and images, offline
python classify.py --model deit_small_patch16_224.fb_in1k cat.jpg   # timm's weights, your pictures
"""

import argparse
import time

import torch

import vtok
from vtok.eval.models.data import FASHION_CLASSES, normalise
from vtok.eval.models.reference import load_reference_images, load_reference_vit


def bundled(count):
    images, labels = load_reference_images("test")
    return (
        load_reference_vit(),
        normalise(images[:count]),
        [FASHION_CLASSES[label] for label in labels[:count]],
        FASHION_CLASSES,
    )


def of_timm(name, files):
    import timm
    from PIL import Image

    model = timm.create_model(name, pretrained=True).eval()
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    known = timm.data.ImageNetInfo()
    classes = [known.index_to_description(i) for i in range(model.num_classes)]
    return model, torch.stack([prepare(Image.open(file).convert("RGB")) for file in files]), files, classes


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("images", nargs="*", help="pictures, for a model of timm")
parser.add_argument("--model", default="reference", help="timm's name, with its weights (default: the bundled ViT)")
parser.add_argument("--method", default="tome")
parser.add_argument("--flops", type=float, default=0.6, help="share of the model's FLOPs to leave")
parser.add_argument("--count", type=int, default=64, help="bundled images")
args = parser.parse_args()

model, images, names, classes = bundled(args.count) if args.model == "reference" else of_timm(args.model, args.images)


@torch.inference_mode()
def classify():
    model(images)  # the first pass is slower
    start = time.perf_counter()
    found = model(images).argmax(-1).tolist()
    return [classes[i] for i in found], time.perf_counter() - start


before, slow = classify()
vtok.patch(model, args.method, flops=args.flops)
after, fast = classify()

for name, one, other in list(zip(names, before, after))[:8]:
    print(f"{name:20} unpatched: {one:20} {args.method}: {other}")
same = sum(one == other for one, other in zip(before, after))
print(f"the same class for {same} of {len(names)} images; {1e3 * slow:.0f} ms unpatched, {1e3 * fast:.0f} ms patched")
print(vtok.info(model))
