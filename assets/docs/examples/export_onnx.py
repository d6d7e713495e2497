"""Export a patched encoder as an ONNX file and run it in onnxruntime (pip install "vtok[onnx]").

python export_onnx.py                                        # the bundled ViT, offline
python export_onnx.py --model deit_small_patch16_224.fb_in1k --out deit.onnx
"""

import argparse
from pathlib import Path

import onnxruntime
import torch

import vtok
from vtok.eval.models.by_name import load_model, sample_images

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="reference", help="timm's name, with its weights (default: the bundled ViT)")
parser.add_argument("--method", default="tome")
parser.add_argument("--flops", type=float, default=0.6)
parser.add_argument("--out", type=Path, default=Path("vit.onnx"))
args = parser.parse_args()

model = load_model(args.model, pretrained=True)
images = sample_images(args.model, model, 4)
vtok.patch(model, args.method, flops=args.flops)
print(vtok.export.onnx(model, images[:2], args.out))  # written only if onnxruntime and the model agree

session = onnxruntime.InferenceSession(str(args.out), providers=["CPUExecutionProvider"])
(logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})  # a batch of another size
with torch.inference_mode():
    difference = (torch.from_numpy(logits) - model(images)).abs().max().item()
print(f"{len(images)} images, classes {logits.argmax(-1).tolist()}; largest difference to the model: {difference:.1e}")
