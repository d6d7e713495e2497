"""One way to open a picture: upright, in 8 bits, named where it is damaged, whichever task asks for it."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

import vtok
from vtok.eval.common import pictures
from vtok.eval.tasks.clip.captions import open_captions
from vtok.eval.tasks.image_folder import Unreadable, open_dataset
from vtok.eval.tasks.vqa.sources.opening import open_vqa
from vtok.eval.viz import input as viz_input

GREYS = np.linspace(0, 65535, 48 * 32).reshape(48, 32).astype("uint16")


def corners():
    """A picture whose turns and mirror images all differ."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10, :20], pixels[:10, 20:], pixels[10:, :20] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return Image.fromarray(pixels)


def saved(path, image, orientation=1):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, exif=exif)
    return path


def by_questions(path):
    (path.parent / "q.jsonl").write_text(json.dumps({"id": 0, "image": path.name, "question": "q", "answers": ["a"]}))
    data = open_vqa(path.parent / "q.jsonl")
    return data.read(data.questions[0].image)


def by_folder(path):
    data = open_dataset(str(path.parent.parent), "", "", "", "RGB", None)
    data.transform = lambda image: image
    item = data[0]
    if isinstance(item, Unreadable):
        raise vtok.ConfigError(f"{item.file}: {item.reason}")
    return item.image


def by_captions(path):
    entry = {"filename": path.name, "split": "test", "sentences": [{"raw": "a picture"}]}
    (path.parent / "dataset_x.json").write_text(json.dumps({"images": [entry]}))
    return open_captions(path.parent)[0][0]


def by_rows(path):
    datasets = pytest.importorskip("datasets")
    from vtok.eval.tasks.vqa.sources.hub import _Rows

    rows = datasets.Dataset.from_dict({"image": [str(path)]}).cast_column("image", datasets.Image())
    return _Rows("rows", rows).read(0)


def by_viz(path):
    return viz_input.open_picture(path)


WAYS = {"questions": by_questions, "class folders": by_folder, "captions": by_captions, "rows": by_rows, "viz": by_viz}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
def test_photos_are_turned_upright(way, orientation, tmp_path):
    path = saved(tmp_path / "class" / "photo.png", corners(), orientation)
    with Image.open(path) as plain:
        expected = ImageOps.exif_transpose(plain).convert("RGB")
    assert np.array_equal(np.asarray(WAYS[way](path)), np.asarray(expected))
    assert (expected.size == (20, 40)) == (orientation in (6, 8))


@pytest.mark.parametrize("way", WAYS)
def test_greys_of_16_bits_are_scaled(way, tmp_path):
    (tmp_path / "class").mkdir()
    Image.fromarray(GREYS).save(tmp_path / "class" / "scan.png")
    found = np.asarray(WAYS[way](tmp_path / "class" / "scan.png"))
    assert np.array_equal(found, np.repeat((GREYS >> 8).astype(np.uint8)[..., None], 3, 2))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_greys_of_16_bits_in_every_format(kind):
    file = io.BytesIO()
    Image.fromarray(GREYS).save(file, kind)
    assert np.array_equal(np.asarray(pictures.open_picture(file.getvalue(), "L")), GREYS >> 8)
    big = Image.frombytes("I;16B", GREYS.shape[::-1], GREYS.byteswap().tobytes())
    assert np.array_equal(np.asarray(pictures.open_picture(big, "L")), GREYS >> 8)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, bits, *chunks):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def encoded(image, kind="JPEG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


ROWS = zlib.compress(np.random.default_rng(0).integers(0, 256, (64, 65), dtype=np.uint8).tobytes())
DAMAGED = {
    "empty": (b"", "cannot identify"),
    "text": (b"no picture at all", "cannot identify"),
    "half a JPEG": (encoded(corners().resize((400, 200)))[:900], "truncated"),
    "a broken chunk": (
        png(64, 64, 8, chunk(b"IDAT", ROWS[:99]), b"\0\0\0\x09\xa9\x8a\xbc\x07123", chunk(b"IDAT", ROWS)),
        "broken PNG|unrecognized data",  # by the release of Pillow
    ),
    "a bomb": (png(20000, 20000, 1, chunk(b"IDAT", zlib.compress(b"\0" * 2501 * 20000))), "decompression bomb"),
    "floating-point pixels": (encoded(Image.fromarray(np.zeros((4, 4), "float32")), "TIFF"), "range is not known; save it"),
    "32-bit pixels": (encoded(Image.fromarray(np.zeros((4, 4), "int32")), "TIFF"), "range is not known; save it with 8 or 16"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_pictures_are_named(way, damage, tmp_path):
    content, words = DAMAGED[damage]
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "pic.png").write_bytes(content)
    with pytest.raises(vtok.ConfigError, match=words) as caught:
        WAYS[way](tmp_path / "class" / "pic.png")
    assert "\n" not in str(caught.value) and ("pic.png" in str(caught.value) or way == "rows")


def test_no_picture_there(tmp_path):
    with pytest.raises(vtok.ConfigError, match=r"nowhere\.png does not exist; name an image file"):
        pictures.open_picture(tmp_path / "nowhere.png")
    with pytest.raises(vtok.ConfigError, match="is no file"):
        pictures.open_picture(tmp_path)


def test_damaged_orientation_data_do_not_hide_a_picture(tmp_path):
    file = tmp_path / "x.png"
    corners().save(file, exif=b"Exif\0\0nonsense")
    assert pictures.open_picture(file).size == (40, 20)


def test_what_systems_leave_behind_does_not_count(tmp_path):
    for name in ("a/1.png", "__MACOSX/a/._1.png", "a/._1.png", "a/.thumbs/2.png", ".DS_Store", "b/3.JPG", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [str(path.relative_to(tmp_path)) for path in pictures.find_pictures(tmp_path)] == ["a/1.png", "b/3.JPG"]
    hidden = tmp_path / ".cache" / "data"
    hidden.mkdir(parents=True)
    (hidden / "x.json").write_text("{}")
    assert pictures.find_files(hidden, "*.json") == [hidden / "x.json"] and pictures.find_files(tmp_path / "none") == []


def test_the_hash_is_that_of_the_content(tmp_path):
    one, other = saved(tmp_path / "1.png", corners()), saved(tmp_path / "copy" / "2.png", corners())
    assert pictures.digest(one) == pictures.digest(str(other)) == pictures.digest(one.read_bytes())
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    assert pictures.digest(red) == pictures.digest(red.copy()) != pictures.digest(blue)
    assert pictures.digest(red.quantize()) != pictures.digest(blue.quantize())  # the same numbers, other colours
    assert pictures.digest(Image.new("RGB", (4, 16))) != pictures.digest(Image.new("RGB", (16, 4)))
    with pytest.raises(vtok.ConfigError, match="cannot be read"):
        pictures.digest(tmp_path / "nowhere.png")
