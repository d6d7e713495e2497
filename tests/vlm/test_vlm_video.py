"""Videos: what stays is the same whether the model encodes them itself or generate() does so ahead, without their sizes."""

import copy

import pytest
import torch
from vlm_zoo import build, feature_keeps, generate, inputs, text_model, visual

import vtok
from vtok.patches.hf_vlm.examples import VIDEO
from vtok.patches.hf_vlm.examples.pages import END, IMAGE, START
from vtok.patches.hf_vlm.layout import _first_grid

QWEN = ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"]


def video_inputs(name, grids, image=False):
    """Two prompts, the first padded on the left: a video in each, in the second behind an image, if asked for."""
    if name == "LLaVA-OneVision":
        return inputs(name)  # an image in one prompt, a video in the other
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i, (frames, height, width) in enumerate(grids):
        row, size = [5, 6, 7 + i], height * width // 4
        if image and i == 1:
            row += [START, *[IMAGE] * 8, END, 9, 10, 11, 12, 13]
        if name == "Qwen3-VL":  # a time stamp in front of every frame
            row += [t for f in range(frames) for t in (20 + f, 21, START, *[VIDEO] * size, END)]
        else:
            row += [START, *[VIDEO] * frames * size, END]
        rows.append([*row, 30, 31, *range(32, 32 + i)])
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    sizes = torch.tensor(grids)
    values = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values_videos": torch.randn(int(sizes.prod(1).sum()), 96, generator=generator),
        "video_grid_thw": sizes,
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
    }
    if image:
        values["pixel_values"] = torch.randn(32, 96, generator=generator)
        values["image_grid_thw"] = torch.tensor([[1, 4, 8]])
    return values


GRIDS = [(3, 4, 12), (2, 12, 4)]


CASES = [(name, method) for name in (*QWEN, "LLaVA-OneVision") for method in ("uniform", "random", "todre")]


@pytest.mark.parametrize(("name", "method"), [*CASES, ("LLaVA-OneVision", "correlation")])
def test_generate_decides_as_the_forward_pass(name, method):
    values, seen = video_inputs(name, GRIDS, image=True), []
    model = vtok.patch(build(name), method, **({"alpha": 0.1} if method == "correlation" else {"keep": 0.4}))

    def look(module, args, kwargs):
        if kwargs.get("inputs_embeds") is not None and kwargs["inputs_embeds"].shape[1] > 1:
            seen.append(kwargs["position_ids"])

    handle = text_model(model).register_forward_pre_hook(look, with_kwargs=True)
    numbered = (values["attention_mask"].cumsum(1) - 1).clamp_min(0)  # as generate() does; Qwen-VL has three numbers a token
    with torch.no_grad():
        whole = model(**values, **({} if name in QWEN else {"position_ids": numbered})).logits[:, -1]
    made = generate(model, values, steps=2)
    beams = model.generate(**copy.copy(values), max_new_tokens=2, num_beams=2, do_sample=False)
    handle.remove()
    assert (whole - made[1][:, 0]).abs().max() <= 1e-5
    assert beams.shape[0] == len(values["input_ids"])
    forward, ahead, spread = (place if place.ndim == 2 else place[-1] for place in seen)
    assert torch.equal(forward, ahead), "the same tokens stay"
    assert torch.equal(spread[::2], ahead)
    assert forward.shape[-1] < values["input_ids"].shape[1]
    if method in ("uniform", "random"):
        alive = feature_keeps(build(name), values, 0.4, method) & values["attention_mask"].bool()
        assert (alive & visual(model, values["input_ids"])).sum() > 0
        assert forward.shape[-1] == alive.sum(1).max()


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("grid", [(1, 4, 8), (4, 4, 4), (3, 2, 16), (3, 16, 2), (5, 2, 2)], ids=str)
def test_grids_read_from_positions(name, grid):
    values, model = video_inputs(name, [grid, (2, 4, 8)]), build(name)
    place = model.model.get_rope_index(
        values["input_ids"],
        video_grid_thw=values["video_grid_thw"],
        attention_mask=values["attention_mask"],
        mm_token_type_ids=values["mm_token_type_ids"],
    )[0]
    here, first = place[-2:, values["input_ids"] == VIDEO], grid[0] * grid[1] * grid[2] // 4
    assert _first_grid(*here[:, :first].tolist()) == (grid[1] // 2, grid[2] // 2)
    assert _first_grid(*here[:, first:].tolist()) == (2, 4)
