"""What methods see of the vision tower: the tower's own attention, for the views of every image, whoever encodes them."""

import copy
import threading
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from vlm_zoo import EXAMPLES, assert_same, build, generate, inputs, tower_probs

import vtok
from vtok.config import MethodConfig
from vtok.core.prompt import ImageFeatures, VLMInfo, VLMReducer
from vtok.core.reduction import Plan
from vtok.core.tokens import Place, Site
from vtok.patches.hf_vlm import image_features as hf
from vtok.patches.hf_vlm.families import feature_block

TOWERS = [name for name in EXAMPLES if not name.startswith("Qwen")]
SHORT = ["LLaVA-1.5", "LLaVA-NeXT", "LLaVA-OneVision", "InternVL", "Idefics3", "Gemma3", "PaliGemma"]


@dataclass(frozen=True)
class Looking(MethodConfig):
    """Keeps every second token, and what it saw."""

    name: ClassVar[str] = "looking"
    blocks: tuple[int, ...] = (0, 1)
    seen: list[Any] = field(default_factory=list, compare=False)

    def build_vlm(self, info: VLMInfo) -> VLMReducer:
        return _LookingReducer(self)


@dataclass(frozen=True)
class _LookingReducer(VLMReducer):
    config: Looking

    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site(Place.IMAGE_FEATURES, 0),)

    @property
    def tower_blocks(self) -> tuple[int, ...]:
        return self.config.blocks

    def features(self, images: ImageFeatures) -> Plan:
        self.config.seen.append(images)
        batch, n, _ = images.tokens.shape
        return Plan(torch.arange(0, n, 2).expand(batch, -1))


def _kernel(name):
    return EXAMPLES[name].kernels[-1]


@pytest.mark.parametrize("name", TOWERS)
def test_the_attention_of_the_tower(name):
    """Of every view, image by image, as generate() encodes them; pruning the inputs sees the same."""
    values, expected, looking = inputs(name), tower_probs(name, inputs(name)), Looking()
    model = vtok.patch(build(name, _kernel(name)), looking)
    generate(model, values, steps=2)
    patched = list(looking.seen)
    looking.seen.clear()
    vtok.unpatch(model)
    vtok.prune_inputs(model, values, looking)
    assert len(patched) == len(looking.seen)
    for modality, blocks in expected.items():
        for images in (patched, looking.seen):
            of = [i for i in images if i.modality == modality]
            for number, probs in blocks.items():
                found = torch.cat([i.tower[number].view.probs() for i in of])
                assert (found - probs).abs().max() <= 1e-5
                assert probs.std(dim=-1).mean() > 1e-3, "uniform attention would prove little"
                assert all(len(i.tokens) * i.views_per_image == len(i.tower[number].view.q) for i in of)


@pytest.mark.parametrize("name", SHORT)
def test_beams_see_what_one_beam_sees(name):
    values, looking = inputs(name), Looking()
    model = vtok.patch(build(name, _kernel(name)), looking)
    generate(model, values, steps=1)
    once = list(looking.seen)
    looking.seen.clear()
    model.generate(**{k: copy.copy(v) for k, v in values.items()}, num_beams=3, max_new_tokens=2, do_sample=False)
    assert sum(len(i.tokens) for i in looking.seen) == 3 * sum(len(i.tokens) for i in once)
    pairs = [(i.tokens[b], _of_image(i, b)) for i in once for b in range(len(i.tokens))]
    for images in looking.seen:
        for b, tokens in enumerate(images.tokens):
            assert any(
                tokens.shape == x.shape and torch.equal(tokens, x) and torch.equal(_of_image(images, b), q) for x, q in pairs
            )


def _of_image(images, b):
    step = images.views_per_image
    return images.tower[1].view.q[b * step : (b + 1) * step]


@pytest.mark.parametrize("name", SHORT)
def test_nothing_is_left_and_nothing_changes(name):
    model, values = build(name, _kernel(name)), inputs(name)
    before = generate(model, values, steps=2)
    classes = [type(m) for m in model.modules()]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    short = generate(vtok.patch(model, Looking()), values, steps=2)
    assert not torch.equal(short[1], before[1])
    vtok.unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert not any(key.startswith("_vtok") for m in model.modules() for key in m.__dict__)
    vtok.prune_inputs(model, values, Looking())
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert torch.equal(generate(model, values, steps=2)[1], before[1])


def test_only_blocks_that_are_asked_for():
    model, looking = build("LLaVA-1.5"), Looking(blocks=(1,))
    vtok.patch(model, looking)
    tower = model.model.vision_tower.encoder.layers
    assert [len(block._forward_pre_hooks) for block in tower] == [0, 1]
    generate(model, inputs("LLaVA-1.5"), steps=1)
    assert set(looking.seen[0].tower) == {1}
    assert looking.seen[0].source.views == 1
    assert not looking.seen[0].source.cropped
    vtok.patch(model, "uniform", keep=0.5)
    assert [len(block._forward_pre_hooks) for block in tower] == [0, 0]
    assert "WatchedModel" in str(type(model.model).__mro__)  # for the sizes of the images
    vtok.unpatch(model)
    assert "WatchedModel" not in str(type(model.model).__mro__)


def test_copies_go_their_own_way():
    model, values = vtok.patch(build("LLaVA-1.5"), Looking()), inputs("LLaVA-1.5")
    other = copy.deepcopy(model)
    assert other.model.__dict__["_vtok_taps"] is not model.model.__dict__["_vtok_taps"]
    assert_same(generate(other, values, steps=2), generate(model, values, steps=2))


def test_threads_see_their_own_images():
    looking = [Looking(), Looking()]
    model = build("LLaVA-1.5")
    prompts = [inputs("LLaVA-1.5", seed) for seed in range(2)]
    expected = [tower_probs("LLaVA-1.5", p)["image"][1] for p in prompts]

    def work(i):
        for _ in range(10):
            vtok.prune_inputs(model, prompts[i], looking[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(looking[i].seen) == 10
        for images in looking[i].seen:
            assert (images.tower[1].view.probs() - expected[i]).abs().max() <= 1e-5


def test_images_that_somebody_else_encoded():
    model, values = build("LLaVA-1.5"), inputs("LLaVA-1.5")
    with torch.no_grad():
        outputs = hf.encode(model.model, values)
    call = {k: v for k, v in values.items() if k != "pixel_values"}
    vtok.patch(model, Looking())
    with pytest.raises(vtok.StateError, match="was encoded before vtok patched the model"):
        model(**call, mm_encoder_outputs=outputs)
    with torch.no_grad():
        outputs = {"image": model.get_image_features(values["pixel_values"], return_dict=True)}
        assert torch.equal(model(**call, mm_encoder_outputs=outputs).logits, model(**values).logits)
        outputs["image"].pooler_output = [x + 1 for x in outputs["image"].pooler_output[:2]]
        with pytest.raises(vtok.StateError, match="holds 2 images, some of which are none of the 3"):
            model(**call, mm_encoder_outputs=outputs)


def test_what_is_refused():
    with pytest.raises(vtok.UnsupportedModelError, match=r"attention of Qwen2_5_VLModel's vision tower"):
        vtok.patch(build("Qwen2.5-VL"), Looking())
    with pytest.raises(vtok.ConfigError, match=r"block 7 of the vision tower, LlavaModel has blocks 0 to 1"):
        vtok.patch(build("LLaVA-1.5"), Looking(blocks=(7,)))


def test_features_of_another_layer_than_the_one_that_is_looked_at():
    """A layer that a call names moves the features away from the block whose attention chooses among them."""
    values = inputs("LLaVA-1.5")
    model = vtok.patch(build("LLaVA-1.5"), "fastervlm", keep=0.5)
    call = "with vision_feature_layer=-2 the features come from another"
    with torch.no_grad():
        expected = model(**copy.copy(values)).logits
        for same in (-1, 2, None):
            assert torch.equal(model(**copy.copy(values), vision_feature_layer=same).logits, expected)
    with pytest.raises(vtok.StateError, match=f"looks at block 1 of the vision tower, but {call}"):
        model(**copy.copy(values), vision_feature_layer=-2)
    with pytest.raises(vtok.StateError, match=call):
        generate(model, values, vision_feature_layer=-2)
    with pytest.raises(vtok.StateError, match=call):
        vtok.prune_inputs(vtok.unpatch(model), {**values, "vision_feature_layer": -2}, "fastervlm", keep=0.5)
    vtok.patch(model, "uniform", keep=0.5)  # looks at no block
    with torch.no_grad():
        assert model(**copy.copy(values), vision_feature_layer=-2).logits.isfinite().all()


def test_the_block_that_the_features_come_from():
    assert [feature_block(layer, 24) for layer in (-2, -1, 24, 1)] == [22, 23, 23, 0]
    assert feature_block([-2, -5, 6], 24) == 22
    assert feature_block([-24], 24) == 0
    for layer in (0, -25, 25, []):
        with pytest.raises(vtok.UnsupportedModelError, match="output of no block"):
            feature_block(layer, 24)
