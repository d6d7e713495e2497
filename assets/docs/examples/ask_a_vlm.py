"""Ask a vision-language model about a picture, with a part of its visual tokens.

python ask_a_vlm.py                                                           # the bundled LLaVA, offline
python ask_a_vlm.py --model llava-hf/llava-1.5-7b-hf --image cat.jpg --question "What is this?"
"""

import argparse

import torch
from PIL import Image

import vtok
from vtok.eval.models.reference_vlm import load_reference_questions
from vtok.eval.models.vlm import load_vlm

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="reference-llava", help="Hugging Face's name (default: the bundled LLaVA)")
parser.add_argument("--image", help="a picture (default: a bundled one)")
parser.add_argument("--question", help="default: a bundled one")
parser.add_argument("--method", default="divprune")
parser.add_argument("--keep", type=float, default=0.25, help="share of the visual tokens that enter the language model")
args = parser.parse_args()

vlm = load_vlm(args.model)
bundled = load_reference_questions("test")
number = 5
picture = bundled.pictures[int(bundled.rows[number])].permute(1, 2, 0).numpy()
image = Image.open(args.image).convert("RGB") if args.image else Image.fromarray(picture)
question = args.question or bundled.texts[number]
inputs = vlm.inputs([image], [question])
length = inputs["input_ids"].shape[1]


@torch.inference_mode()
def answer():
    ids = vlm.net.generate(**inputs, max_new_tokens=16, do_sample=False)
    return vlm.texts(ids[:, length:])[0]


print(f"question: {question}")
print(f"unpatched: {answer()}")
vtok.patch(vlm.net, args.method, keep=args.keep)
print(f"{args.method}, {args.keep:g} of the visual tokens: {answer()}")
print(vtok.info(vlm.net))
