"""Train the modules of ATP for a vision-language model that stays frozen, then prune with them.

python finetune_atp.py                  # a few steps on the bundled LLaVA and bundled questions, offline
python finetune_atp.py --steps 200      # as many as the bundled modules had

For a model of your own: python -m vtok.eval.training.atp --model FOLDER --questions FILE, which resumes after a stop.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

import vtok
from vtok.eval.models.reference_vlm import load_reference_questions
from vtok.eval.training.atp.questions import Asked, load_host
from vtok.eval.training.atp.train import Recipe, train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--target", type=float, default=36, help="visual tokens on average over the decoder layers")
parser.add_argument("--out", type=Path, default=Path("modules.safetensors"))
args = parser.parse_args()

found = load_reference_questions("calibration")  # about pictures that the model was not trained on
pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in found.pictures]
asked = Asked(pictures, found.texts, found.answers, found.rows.tolist())

host = load_host(None)  # the bundled LLaVA and its processor
with TemporaryDirectory() as folder:
    recipe = Recipe(args.target, steps=args.steps, batch_size=args.batch_size)
    modules = train(host, asked, recipe, Path(folder) / "checkpoint.pt", log_every=1)
modules.save(args.out)

vtok.patch(host.model, "atp", weights=str(args.out))
inputs = host.inputs(pictures[:1], [host.prompt(found.texts[0])])
with torch.inference_mode():
    answer = host.model.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
print(found.texts[0], "->", host.processor.tokenizer.batch_decode(answer, skip_special_tokens=True)[0].strip())
print(vtok.info(host.model))  # how many tokens every layer read
