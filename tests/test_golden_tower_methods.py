"""Methods that choose among the output of a vision tower, against arrays made by their authors' programs (golden/README.md)."""

from typing import Any

import pytest
import torch
from helpers_golden import assert_close, assert_equal, load

from vtok.methods.visionzip import contextual_tokens, zip_tokens


def cases(name: str, dtype: torch.dtype = torch.float64) -> list[tuple[str, dict[str, Any]]]:
    """(case, its arrays) of a file with several cases."""
    g = load(name, dtype)
    found: dict[str, dict[str, Any]] = {}
    for key, value in g.items():
        case, mark, field = key.partition("__")
        if mark:
            found.setdefault(case, {})[field] = value
    assert found
    return list(found.items())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-5)])
def test_visionzip(dtype: torch.dtype, tolerance: float) -> None:
    """The program computes in float32."""
    g = load("baseline_visionzip", dtype)
    attention = g["cls_attention"].sum(1)[:, 1:]
    hidden = g["hidden"]
    zipped = zip_tokens(attention, g["metric"][:, 1:], g["dominant"], g["contextual"])
    assert_equal(zipped.dominant + 1, g["dominant_index_with_cls"][:, 1:].sort(1).values)
    rows = (zipped.dominant + 1)[..., None].expand(-1, -1, hidden.shape[2])
    kept = [hidden[:, :1], hidden.gather(1, rows)]
    assert_close(torch.cat([*kept, contextual_tokens(hidden[:, 1:], zipped)], 1), g["out_tokens"], tolerance)
    assert contextual_tokens(hidden[:, 1:], zipped).dtype == dtype
