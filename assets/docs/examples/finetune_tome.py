"""Fine-tune with ToMe in place: the model learns to do with fewer tokens.

python finetune_tome.py                 # the bundled ViT, 30 steps on bundled images, offline, about a minute
python finetune_tome.py --steps 200 --flops 0.3

The weights that come out are those of a plain model: `state_dict` knows nothing of the patch, which is saved beside them.
"""

import argparse
from pathlib import Path

import torch
from torch.nn import functional as F

import vtok
from vtok.eval.models.data import normalise
from vtok.eval.models.reference import load_reference_images, load_reference_vit, top1

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--flops", type=float, default=0.3, help="share of the model's FLOPs to leave")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--lr", type=float, default=1e-4)
parser.add_argument("--test", type=int, default=500, help="test images")
parser.add_argument("--out", type=Path, default=Path("finetuned"), help="folder of the weights and the patch")
args = parser.parse_args()

torch.manual_seed(0)
model = load_reference_vit()
images, labels = load_reference_images("calibration")  # 1,000 images that the model was not trained on
test_images, test_labels = load_reference_images("test")
test_images, test_labels = normalise(test_images[: args.test]), test_labels[: args.test]
print(f"unpatched: top-1 {100 * top1(model, test_images, test_labels):.1f} %")

vtok.patch(model, "tome", flops=args.flops)
print(f"patched, {args.flops:g} of the FLOPs: top-1 {100 * top1(model, test_images, test_labels):.1f} %")

optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
model.train()
for step in range(args.steps):
    rows = torch.randint(len(images), (args.batch_size,))
    loss = F.cross_entropy(model(normalise(images[rows])), labels[rows])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if (step + 1) % 10 == 0:
        print(f"step {step + 1}: loss {loss.item():.3f}")
model.eval()
print(f"patched, fine-tuned: top-1 {100 * top1(model, test_images, test_labels):.1f} %")

args.out.mkdir(parents=True, exist_ok=True)
torch.save(model.state_dict(), args.out / "weights.pt")
vtok.save_config(model, args.out)
again = vtok.patch(load_reference_vit(), args.out)  # what a user of the weights does
again.load_state_dict(torch.load(args.out / "weights.pt", weights_only=True))
print(f"loaded again from {args.out}: top-1 {100 * top1(again, test_images, test_labels):.1f} %")
