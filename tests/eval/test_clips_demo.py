"""Clips of moving pictures, shown to the reference LLaVA's weights in a LLaVA-OneVision."""

import pytest
import torch

pytest.importorskip("transformers")

from vtok.eval.demo import clips
from vtok.patches.hf_vlm.families import OLDEST, release

pytestmark = pytest.mark.skipif(release() < OLDEST, reason="vision-language models need a younger transformers")


def test_a_clip_is_its_picture_moved() -> None:
    picture = torch.arange(3 * 64 * 64, dtype=torch.float32).view(3, 64, 64)
    clip = clips.clip_of(picture, 6, 1)
    assert clip.shape == (6, 3, 64, 64) and torch.equal(clip, clips.clip_of(picture, 6, 1))
    places = {tuple(int(n) for n in (frame == picture[0, 10, 10]).nonzero()[0]) for frame in clip}
    assert len(places) > 1 and all(abs(row - 10) <= 3 and abs(column - 10) <= 3 for _, row, column in places)


@pytest.mark.slow
def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are mostly right, tokens leave, and gaps are those of the hits."""
    monkeypatch.setattr(clips, "METHODS_SHOWN", ("random", "downsample", "evs"))
    found = clips.measure(20, 2, [0.25])
    assert [row.method for row in found] == ["", "random", "downsample", "evs"]
    assert found[0].hits.mean() > 0.7 and found[0].tokens == 2 * 64 + 1
    assert found[1].tokens == 32 and found[2].tokens == 33 and found[3].tokens == 65, "evs keeps a frame whole"
    lines = clips.table(found).markdown().splitlines()
    assert lines[0].endswith("vs random [95 %] | vs downsample [95 %] |") and len(lines) == 6
    gap = 100 * (found[3].hits.astype(float) - found[1].hits.astype(float)).mean()
    cell = lines[-1].split("|")[5].split()[0].replace("\u2212", "-")
    assert float(cell) == pytest.approx(gap, abs=0.05)
