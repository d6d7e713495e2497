"""Images whose grid depends on the call: what stays is the same whether the model or generate(), ahead of it, encodes them."""

import pytest
import torch
from vlm_zoo import MaskOracle, assert_same, build, feature_keeps, generate

import vtok
from vtok.patches.hf_vlm.examples.pages import END, IMAGE, START

SIDES = ((64, 32), (32, 64), (48, 48))  # height and width of Pixtral's images


def pixtral():
    """LLaVA-1.5 with a tower that takes images of any shape, and two prompts with three of them; patches of 8 pixels."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config={"model_type": "pixtral", **sizes, "num_hidden_layers": 2, "image_size": 64, "patch_size": 8},
        text_config={
            "model_type": "mistral",
            **sizes,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "vocab_size": 120,
            "head_dim": 8,
            "sliding_window": None,
        },
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(3.0)
    model.generation_config.update(eos_token_id=None, pad_token_id=0, suppress_tokens=[116, 117, 118, 119])
    tokens = [height * width // 64 for height, width in SIDES]
    rows = [[5, 6, *[IMAGE] * tokens[0], 7, *[IMAGE] * tokens[1], 8, 9], [10, 11, *[IMAGE] * tokens[2], 12, 13]]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return model, {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
        "image_sizes": torch.tensor(SIDES),
    }


def tiles(name):
    """Idefics3 and SmolVLM with tiles of half the side that their towers are built for: four in one prompt, two in another."""
    model = build(name)
    side = model.config.vision_config.image_size // 2
    size = (side // model.config.vision_config.patch_size // model.config.scale_factor) ** 2
    rows = [[5, 6, *[t for _ in range(n) for t in (START, *[IMAGE] * size, END)], 7, 8, 9] for n in (4, 2)]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    pixels = torch.randn(2, 4, 3, side, side, generator=torch.Generator().manual_seed(0))
    pixels[1, 2:] = 0.0  # as the processor fills up rows with fewer tiles
    return model, {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}


CASES = {"Pixtral": pixtral, "Idefics3": lambda: tiles("Idefics3"), "SmolVLM": lambda: tiles("SmolVLM")}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_generate_uses_the_grid_of_the_call(name, beams):
    model, values = CASES[name]()
    keep = feature_keeps(model, values, 0.4)  # from the pixels, with all that the processor returned beside them
    with MaskOracle(model, dict.fromkeys(range(4), keep)):
        expected = generate(model, values, num_beams=beams)
    vtok.patch(model, "uniform", keep=0.4)
    found = generate(model, values, num_beams=beams)
    assert torch.equal(found[0], expected[0])
    if beams == 1:
        assert_same(found, expected)
    short = generate(vtok.unpatch(model), vtok.prune_inputs(model, values, "uniform", keep=0.4), num_beams=beams)
    assert torch.equal(short[0], expected[0])


@pytest.mark.parametrize("name", CASES)
def test_images_that_were_encoded_ahead(name):
    """By the caller, who hands over what get_image_features returned."""
    model, values = CASES[name]()
    vtok.patch(model, "uniform", keep=0.4)
    with torch.no_grad():
        expected = model(**values).logits
        call = {key: values[key] for key in ("pixel_values", "image_sizes") if key in values}
        encoded = model.model.get_image_features(**call, return_dict=True)
        rest = {key: value for key, value in values.items() if key not in call}
        found = model(**rest, mm_encoder_outputs={"image": encoded}).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
