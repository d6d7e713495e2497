"""Image files, the bundled reference model and data, and the training script."""

import gzip
import re

import pytest
import torch

from vtok.eval.models.data import load_fashion_mnist, normalise, read_idx, write_idx
from vtok.eval.models.reference import FashionViT, asset, load_reference_images, load_reference_vit, top1
from vtok.eval.training.loop import Every
from vtok.eval.training.vit import Recipe, Stage, augment, train


def test_idx_round_trip(tmp_path):
    data = torch.randint(0, 256, (5, 4, 3), dtype=torch.uint8)
    write_idx(tmp_path / "a.gz", data)
    assert torch.equal(read_idx(tmp_path / "a.gz"), data)
    first = (tmp_path / "a.gz").read_bytes()
    write_idx(tmp_path / "a.gz", data)
    assert (tmp_path / "a.gz").read_bytes() == first
    (tmp_path / "plain").write_bytes(gzip.decompress(first))
    assert torch.equal(read_idx(tmp_path / "plain"), data)


def test_damaged_idx_files(tmp_path):
    data = torch.zeros(50, 8, dtype=torch.uint8)
    write_idx(tmp_path / "a.gz", data)
    raw = (tmp_path / "a.gz").read_bytes()
    (tmp_path / "cut.gz").write_bytes(raw[:-12])
    with pytest.raises(ValueError, match="damaged gzip"):
        read_idx(tmp_path / "cut.gz")
    (tmp_path / "short").write_bytes(gzip.decompress(raw)[:-1])
    with pytest.raises(ValueError, match=r"promises \[50, 8\] = 400 bytes, the file holds 399"):
        read_idx(tmp_path / "short")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="not an IDX file"):
        read_idx(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        load_fashion_mnist("train", tmp_path)


def test_the_bundled_data():
    images, labels = load_reference_images("test")
    assert images.shape == (10000, 1, 28, 28)
    assert torch.bincount(labels).tolist() == [1000] * 10
    calibration, _ = load_reference_images("calibration")
    assert calibration.shape == (1000, 1, 28, 28)
    assert normalise(images).mean().abs() < 0.01


def test_the_bundled_model_is_as_good_as_its_card_says():
    """On 200 of the images that the card's figure is about."""
    model = load_reference_vit()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.4e6, rel=0.05)
    assert model.patch_embed.num_patches == 196
    stated = float(re.search(r"\*\*([0-9.]+) %\*\*", asset("fashion_vit.md").read_text()).group(1)) / 100
    assert stated >= 0.85
    images, labels = load_reference_images("test")
    found = top1(model, normalise(images[:200]), labels[:200])
    assert found == pytest.approx(stated, abs=4 * (stated * (1 - stated) / 200) ** 0.5)


def test_assets_stay_small():
    folder = asset("fashion_vit.md").parent
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 43e6  # a clone holds them, a wheel does not


def test_augmentation_moves_and_mirrors():
    torch.manual_seed(0)
    x = torch.zeros(64, 1, 9, 9)
    x[:, :, 4, 4] = 1
    moved = augment(x, shift=2)
    places = {tuple(p.tolist()) for p in moved[:, 0].nonzero()[:, 1:]}
    assert places <= {(r, c) for r in range(2, 7) for c in range(2, 7)}
    assert len(places) > 15
    x = torch.arange(81.0).view(1, 1, 9, 9).repeat(64, 1, 1, 1)
    mirrored = augment(x, shift=0)
    assert {torch.equal(m, x[0]) for m in mirrored} == {True, False}
    assert all(torch.equal(m, x[0]) or torch.equal(m, x[0].flip(-1)) for m in mirrored)


@pytest.fixture
def small_set(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 60), ("t10k", 10)):
        images = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", images)
        labels = torch.randint(0, 10, (count,), generator=generator, dtype=torch.uint8)
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", labels)
    return tmp_path


def test_training_resumes_to_the_same_weights(small_set, tmp_path, monkeypatch):
    """Stopped in each stage and started again, training ends where an uninterrupted run ends; patches are resampled between."""
    recipe = Recipe(stages=(Stage(14, 2, 1e-3, 0.5), Stage(7, 2, 1e-3, 0.0)), batch_size=8, held_out=20)
    straight = train(recipe, tmp_path / "a.pt", small_set, every=Every(save=2))
    assert straight.patch_embed.num_patches == 16

    class StopError(Exception):
        pass

    import vtok.eval.training.loop as module

    real, calls = module.save_atomically, []

    def stopping(payload, path):
        real(payload, path)
        calls.append(payload["step"])
        if len(calls) in (2, 6, 8):
            raise StopError

    monkeypatch.setattr(module, "save_atomically", stopping)
    for _ in range(3):
        with pytest.raises(StopError):
            train(recipe, tmp_path / "b.pt", small_set, every=Every(save=2))
    resumed = train(recipe, tmp_path / "b.pt", small_set, every=Every(save=2))
    for name, weight in straight.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_the_learning_rate_rises_and_falls():
    stage = Stage(4, 1, 1e-3, 0.2)
    rates = [stage.lr_at(step, 100, 0.1) for step in range(100)]
    assert max(rates) == pytest.approx(1e-3)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[-1] == pytest.approx(0.2e-3, rel=0.05)
    assert FashionViT().build().patch_embed.num_patches == 196
