"""Requests that every test asks: text with pictures of several sizes, some twice, some in pairs, some without any."""

import numpy as np
from PIL import Image

SIZES = [(64, 64), (96, 64), (64, 130), (200, 120), (33, 41), (640, 480)]
GRID_SIZES = [(224, 112), (112, 252), (168, 168), (84, 224), (280, 140), (56, 56)]  # of a tower that takes any size


def picture(seed, size):
    """Blobs and stripes in some colours; size: (width, height)."""
    rng = np.random.default_rng(seed)
    w, h = size
    y, x = np.mgrid[0:h, 0:w] / max(w, h)
    image = np.zeros((h, w, 3))
    for _ in range(6):
        cx, cy, r, colour = rng.random(), rng.random(), 0.05 + 0.3 * rng.random(), rng.random(3)
        image[(x - cx) ** 2 + (y - cy) ** 2 < r * r] = colour
    image += 0.15 * np.sin(40 * rng.random() * x + 30 * rng.random() * y)[..., None]
    return Image.fromarray((image.clip(0, 1) * 255).astype("uint8"))


def clip(seed, size):
    """[F, H, W, 3], two to eight frames: a part of the picture moves. Not longer than wide or high: transformers counts the
    positions of the text behind a video by its height and width alone, and vLLM by its time as well."""
    still = np.asarray(picture(seed, size))
    frames = [still.copy() for _ in range(2 * min(1 + seed % 4, max(size) // 28))]
    for i, frame in enumerate(frames):
        frame[:, : size[0] // 2] = np.roll(still, 5 * i, 0)[:, : size[0] // 2]
    return np.stack(frames)


def with_clips(found, image, video):
    """The same requests, with clips in place of three in four pictures."""
    out, count = [], 0
    for text, pictures in found:
        first, *rest = text.split(image)
        media = []
        for part, one in zip(rest, pictures, strict=True):
            count += 1
            media.append(clip(count // 2, one.size) if count % 4 else one)
            first += f"{video if count % 4 else image}{part}"
        out.append((first, media))
    return out


def requests(mark, sizes, count=14):
    """[(text, pictures)]: one picture each, every third one again; then two with two pictures, and two without any."""
    rng = np.random.default_rng(1)

    def words(least, most):
        return " ".join(f"w{n}" for n in rng.integers(0, 200, rng.integers(least, most)))

    found = []
    for i in range(count):
        seed = i - 1 if i % 3 == 2 else i
        found.append((f"<s> {words(0, 9)} {mark} {words(1, 12)}", [picture(seed, sizes[seed % len(sizes)])]))
    for i in range(2):
        pair = [picture(3 * i + j, sizes[(3 * i + j) % len(sizes)]) for j in range(2)]
        found.append((f"<s> w1 {mark} w2 w{i} {mark} w3 w4", pair))
    found.insert(3, (f"<s> {words(4, 9)}", []))
    found.insert(9, (f"<s> {words(20, 40)}", []))
    return found


_QWEN = "<|vision_start|> <|image_pad|> <|vision_end|>"
MARKS = {
    "qwen2": (_QWEN, GRID_SIZES),
    "qwen25": (_QWEN, GRID_SIZES),
    "qwen3": (_QWEN, GRID_SIZES),
    "qwen35": (_QWEN, GRID_SIZES),
    "llava": ("<image>", SIZES),
    "llava_siglip": ("<image>", SIZES),
    "llava_next": ("<image>", SIZES),
    "onevision": ("<image>", SIZES),
    "internvl": ("<IMG_CONTEXT>", SIZES),
    "idefics3": ("<image>", SIZES),
    "smolvlm": ("<image>", SIZES),
    "gemma3": ("<start_of_image>", SIZES),
}


CLIPS = {
    "onevision_video": ("onevision", "<video>"),
    "qwen2_video": ("qwen2", _QWEN.replace("image", "video")),
    "qwen25_video": ("qwen25", _QWEN.replace("image", "video")),
}


def of(model):
    """The requests for a tiny model."""
    if model not in CLIPS:
        return requests(*MARKS[model])
    base, video = CLIPS[model]
    image, sizes = MARKS[base]
    return with_clips(requests(image, sizes), image, video)


def told(clip):
    """What is said of a clip: 16 frames a second, all of which are to be read."""
    count = len(clip)
    return {
        "fps": 16.0,
        "duration": count / 16,
        "total_num_frames": count,
        "frames_indices": list(range(count)),
        "video_backend": "opencv",
    }
