"""Zero-shot classification with CLIP: only the image tower gets shorter.

python zero_shot.py                                                            # the bundled CLIP, offline
python zero_shot.py --model openai/clip-vit-base-patch16 --labels cat,dog cat.jpg
"""

import argparse

import torch
from PIL import Image

import vtok
from vtok.eval.models.clip import load_clip
from vtok.eval.models.reference import load_reference_pictures

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("images", nargs="*", help="pictures (default: some bundled ones)")
parser.add_argument("--model", default="reference-clip", help="of open_clip or Hugging Face (default: the bundled CLIP)")
parser.add_argument("--pretrained", default="", help="open_clip's tag of weights")
parser.add_argument("--labels", default="red circle,blue circle,red rectangle,blue triangle,green triangle")
parser.add_argument("--method", default="pitome")
parser.add_argument("--flops", type=float, default=0.6)
args = parser.parse_args()

clip = load_clip(args.model, args.pretrained)
if args.images:
    pictures = [Image.open(file).convert("RGB") for file in args.images]
else:
    bundled, _ = load_reference_pictures("test")
    pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in bundled[:6]]
labels = args.labels.split(",")
pixels = torch.stack([clip.preprocess(picture) for picture in pictures])

with torch.inference_mode():
    words = clip.encode_text([f"a photo of a {label}" if args.images else label for label in labels])
    plain = clip.encode_image(clip.net, pixels) @ words.T
    with vtok.patched(clip.net, args.method, flops=args.flops):
        short = clip.encode_image(clip.net, pixels) @ words.T
        print(vtok.info(clip.net))

for row, (before, after) in enumerate(zip(plain, short)):
    one, other = labels[int(before.argmax())], labels[int(after.argmax())]
    print(f"picture {row}: unpatched {one} ({before.max():.3f}), {args.method} {other} ({after.max():.3f})")
