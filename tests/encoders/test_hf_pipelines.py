"""Patched models in the pipelines that Hugging Face users run: pipeline(), saving and loading, PEFT, accelerate, Trainer."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

import numpy as np
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
    pipeline,
)

import vtok
from vtok.eval.benchmarks.flops import count_macs
from vtok.patches.hf_vision.examples import _TEXT, _TINY

SIZE = {"height": 64, "width": 64}


def vit(kind=ViTForImageClassification, seed=0, **extra):
    torch.manual_seed(seed)
    return kind(ViTConfig(**{**_TINY, "num_labels": 3, "initializer_range": 0.3, **extra})).eval()


def photo(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def processor(kind=ViTImageProcessor):
    if kind is CLIPImageProcessor:
        return kind(size={"shortest_edge": 64}, crop_size=SIZE)
    return kind(size=SIZE)


def pixels(images, kind=ViTImageProcessor):
    return processor(kind)(images, return_tensors="pt").pixel_values


def test_image_classification_pipeline():
    model = vit()
    classify = pipeline("image-classification", model=model, image_processor=processor())
    plain = {row["label"]: row["score"] for row in classify(photo())}
    vtok.patch(model, "tome", r=12)
    merged = {row["label"]: row["score"] for row in classify(photo())}
    with torch.no_grad():
        direct = model(pixels(photo())).logits.softmax(-1)[0]
    assert merged == {model.config.id2label[i]: pytest.approx(p.item(), abs=1e-6) for i, p in enumerate(direct)}
    assert merged != plain
    assert [b.tokens_out for b in vtok.info(classify.model).towers[0].blocks] == [53, 41, 29, 17]
    batched = classify([photo(0), photo(1)], batch_size=2)
    assert {row["label"]: row["score"] for row in batched[0]} == {k: pytest.approx(v, abs=1e-5) for k, v in merged.items()}
    vtok.unpatch(model)
    assert {row["label"]: row["score"] for row in classify(photo())} == plain


def tokenizer(words):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[BOS]", "[EOS]", "[UNK]", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]", model_max_length=8, model_input_names=["input_ids"]
    )


def clip():
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config={**_TEXT, "eos_token_id": 2}, vision_config=_TINY, projection_dim=24)).eval()


def test_zero_shot_pipeline_patches_the_image_tower_alone():
    model, labels = clip(), ["cat", "dog", "bird"]
    ask = pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=tokenizer(["this", "is", "a", *labels]),
        image_processor=processor(CLIPImageProcessor),
    )
    options = {"candidate_labels": labels, "hypothesis_template": "this is a {}"}
    plain = ask(photo(), **options)
    text = [type(m) for m in model.text_model.modules()]
    vtok.patch(model, "pitome", ratio=0.8)
    assert [type(m) for m in model.text_model.modules()] == text
    merged = ask(photo(), **options)
    assert {row["label"] for row in merged} == set(labels)
    assert merged != plain
    assert sum(row["score"] for row in merged) == pytest.approx(1)
    assert [t.path for t in vtok.info(model).towers] == ["vision_model"]
    assert vtok.info(model).towers[0].blocks[-1].tokens_out < 40
    assert ask(photo(), **options) == merged
    vtok.unpatch(model)
    assert ask(photo(), **options) == plain


def test_feature_extraction_pipeline():
    model = vtok.patch(vit(ViTModel), "tome", r=12, trace=True)
    extract = pipeline("image-feature-extraction", model=model, image_processor=processor())
    tokens = torch.tensor(extract(photo()))
    assert tokens.shape == (1, 17, 48)
    assert vtok.unmerge(model, tokens).shape == (1, 65, 48)
    with torch.no_grad():
        out = model(pixels(photo()))
    assert torch.allclose(tokens, out.last_hidden_state, atol=1e-5)
    assert torch.allclose(torch.tensor(extract(photo(), pool=True)), out.pooler_output, atol=1e-5)


def test_from_pretrained_then_patch_and_back_from_a_folder(tmp_path):
    vit().save_pretrained(tmp_path / "plain")
    model = ViTForImageClassification.from_pretrained(tmp_path / "plain").eval()
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    x = pixels([photo(0), photo(1)])
    vtok.patch(model, "pitome", ratio=0.8)
    with torch.no_grad():
        merged = model(x).logits
    folder = tmp_path / "merged"
    model.save_pretrained(folder)
    vtok.save_config(model, folder)
    assert (folder / "config.json").read_text() == (tmp_path / "plain" / "config.json").read_text()
    loaded = ViTForImageClassification.from_pretrained(folder).eval()
    assert {name: torch.equal(p, weights[name]) for name, p in loaded.state_dict().items()} == dict.fromkeys(weights, True)
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, vtok.unpatch(model)(x).logits), "what is saved is the unpatched model"
        assert torch.equal(vtok.patch(loaded, folder)(x).logits, merged)


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "fc1"], init_lora_weights=False)
    )
    return adapted.eval()


def test_peft_then_vtok():
    model, x = lora(vit()), pixels([photo(0), photo(1)])
    merged = copy.deepcopy(model).merge_and_unload()
    vtok.patch(model, "tome", r=8)
    vtok.patch(merged, "tome", r=8)
    with torch.no_grad():
        assert torch.allclose(model(pixel_values=x).logits, merged(x).logits, atol=1e-4), "the method looked past the adapter"
    seen = vtok.info(model).towers[0].estimate
    assert count_macs(by_name(model), x).model == seen.macs
    model.train()
    model(pixel_values=x, labels=torch.tensor([0, 1])).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora" in name for name in trained)


def by_name(model):
    """PEFT's models take pixel values by name."""

    class ByName(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(pixel_values=x)

    return ByName()


def test_vtok_then_peft_says_so():
    model = lora(vtok.patch(vit(), "tome", r=8))
    with pytest.raises(vtok.StateError, match=r"k_proj .* replaced after vtok .* PEFT first"):
        model(pixel_values=pixels(photo()))


@pytest.mark.parametrize("first", ["accelerate", "vtok"])
def test_accelerate_offloads_before_and_after(first):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    x = pixels([photo(0), photo(1)])
    model = vit()
    with torch.no_grad():
        plain = model(x).logits
        reduced = vtok.patch(model, "ats", num_tokens=20)(x).logits
        if first == "accelerate":
            vtok.unpatch(model)
            cpu_offload(model, execution_device="cpu")
            vtok.patch(model, "ats", num_tokens=20)
        else:
            cpu_offload(model, execution_device="cpu")
        assert torch.equal(model(x).logits, reduced)
        assert torch.equal(vtok.unpatch(model)(x).logits, plain)
        remove_hook_from_submodules(model)


class Photos(torch.utils.data.Dataset):
    def __init__(self):
        self.pixels = pixels([photo(i) for i in range(4)])

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return {"pixel_values": self.pixels[i], "labels": i % 3}


def test_trainer_with_gradient_checkpointing(tmp_path):
    weights = []
    for checkpointing in (False, True):
        model = vtok.patch(vit(), "tome", r=8)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(checkpointing)),
            per_device_train_batch_size=2,
            max_steps=3,
            gradient_checkpointing=checkpointing,
            use_cpu=True,
            report_to=[],
            learning_rate=1e-2,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        Trainer(model, arguments, train_dataset=Photos()).train()
        assert vtok.info(model).towers[0].blocks[-1].tokens_out == 33
        weights.append(torch.cat([p.flatten() for p in vtok.unpatch(model).parameters()]))
    start = torch.cat([p.flatten() for p in vit().parameters()])
    assert (weights[0] - start).abs().max() > 1e-3
    assert torch.allclose(weights[0], weights[1], atol=1e-5)
