"""The control that draws tokens at random, at a method's own places and counts."""

import pytest
import torch
from rich.console import Console
from zoo import build, images

import vtok
from vtok.eval.common.control import RandomChoice
from vtok.eval.demo.control import attention_kept, controls, measure_controls, value_of_choice
from vtok.eval.report.sections import sections
from vtok.eval.tasks.imagenet import evaluate
from vtok.eval.tasks.timm_pipeline import Options

METHODS = [vtok.ToMe(r=2), vtok.PiToMe(r=2), vtok.ZeroTPrune(layers=[0, 1], retain=0.7, r=1), vtok.ATS(num_tokens=9)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_as_many_tokens_at_the_same_places_but_others(method):
    x = images("timm: ViT", batch=3)
    patched, control = vtok.patch(build("timm: ViT"), method), vtok.patch(build("timm: ViT"), RandomChoice(method))
    other = vtok.patch(build("timm: ViT"), RandomChoice(method, seed=1))
    with torch.no_grad():
        out = [model(x) for model in (patched, control, other)]
    assert all(o.isfinite().all() for o in out)
    assert not torch.allclose(out[0], out[1])
    assert not torch.allclose(out[1], out[2])
    first = [vtok.info(model).towers[0].blocks for model in (patched, control)]
    if method.name != "ats":  # whose later counts depend on the tokens that are left
        assert [b.tokens_out for b in first[0]] == [b.tokens_out for b in first[1]]
    else:
        reduced = next(i for i, b in enumerate(first[0]) if b.tokens_out < b.tokens_in)
        assert first[0][reduced].mean_tokens == first[1][reduced].mean_tokens


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_an_image_alone_and_in_a_batch(method):
    x = images("timm: ViT", batch=4).double()
    model = vtok.patch(build("timm: ViT").double(), RandomChoice(method))
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([model(image) for image in x.split(1)]), model(x))


def test_attention_kept_by_an_early_choice():
    model, x = build("timm: ViT"), images("timm: ViT", batch=3)
    shares = attention_kept(model, x, block=1)
    assert not vtok.info(model).patched
    seen = {}
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            block.attn.register_forward_pre_hook(lambda m, args, i=i: seen.__setitem__(i, args[0]))
        model(x)
        maps = []
        for i, block in enumerate(model.blocks):
            attn = block.attn
            q, k, _ = attn.qkv(seen[i]).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            row = ((attn.q_norm(q) * attn.scale) @ attn.k_norm(k).transpose(-1, -2)).softmax(-1)[:, :, 0, 1:].mean(1)
            maps.append(row / row.sum(-1, keepdim=True))
    best = maps[1].topk(32, -1).indices
    torch.testing.assert_close(torch.tensor(shares), torch.stack([m.gather(1, best).sum(1).mean() for m in maps]))
    assert shares[1] == max(shares) > 0.5


def test_the_table_sets_a_method_beside_its_control(tmp_path):
    settings = [None, vtok.ToMe(r=8), ("uniform", {"keep": 0.9})]
    options = Options(num_samples=8, batch_size=4, workers=0, device="cpu")
    made = evaluate("reference-vit", "fashion-mnist/test", settings, options)
    told = {"threads": 1, "device_name": "x"}
    (section,) = sections([one | told | {"key": str(i), "budget": 0.7} for i, one in enumerate(made)])
    ((row, choice),) = controls(section)  # baselines have none
    assert (row.method, choice.method.name) == ("tome", "tome")
    found = measure_controls(section, tmp_path, Console(quiet=True))
    (control,) = found.values()
    assert control["tokens"] == row.record["tokens"] and control["method"] == "tome, tokens at random"
    before = (tmp_path / "results.jsonl").read_bytes()
    assert measure_controls(section, tmp_path, Console(quiet=True)) == found
    assert (tmp_path / "results.jsonl").read_bytes() == before  # nothing was measured again
    (cells,) = value_of_choice(section, found).rows
    assert cells[:4] == ("tome", "0.7", f"{row.record['metrics']['top1']:.2f}", f"{control['metrics']['top1']:.2f}")
