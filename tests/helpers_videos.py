"""Small videos, and tiny vision-language models that read them, with processors."""

from __future__ import annotations

import numpy as np
from vlm_zoo import build

from vtok.eval.models.vlm import VisionLanguageModel
from vtok.patches.hf_vlm.examples.pages import END, IMAGE, START
from vtok.patches.hf_vlm.examples.videos import VIDEO

FPS, SIDE = 10, 16


def save_video(path, count=30, seed=0):
    """`count` frames whose brightness rises from black to white, 10 a second."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 8, (SIDE, SIDE, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for i in range(count):
            level = np.full((SIDE, SIDE, 3), 8 * i) + noise
            frame = av.VideoFrame.from_ndarray(level.clip(0, 255).astype(np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def brightness(frame):
    return float(np.asarray(frame).mean())


def tokenizer():
    """Words of the questions under the numbers that the tiny models know."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    placed = {IMAGE: "<image>", VIDEO: "<video>", START: "<start>", END: "<end>"}
    vocabulary = {placed.get(i, ("<pad>", "<s>", "</s>", "<unk>")[i] if i < 4 else f"w{i}"): i for i in range(120)}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, extra_special_tokens=list(placed.values()), **names)


def tiny_onevision():
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    size = {"height": SIDE, "width": SIDE}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[SIDE, SIDE]]),
        tokenizer=tokenizer(),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )
    return VisionLanguageModel(build("LLaVA-OneVision"), processor, "tiny-onevision")


def tiny_qwen():
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    bounds = {"size": {"shortest_edge": 256, "longest_edge": 16384}}
    words = tokenizer()
    words.image_token, words.video_token = "<image>", "<video>"
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes, **bounds),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(**sizes, **bounds),
    )
    return VisionLanguageModel(build("Qwen2.5-VL"), processor, "tiny-qwen")
