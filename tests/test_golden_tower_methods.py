"""Methods that choose among the output of a vision tower, against arrays made by their authors' programs (golden/README.md)."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers_golden import FOLDER, assert_close, assert_equal, convert, load

from vtok.methods.fastervlm import most_attended
from vtok.methods.visionzip import contextual_tokens, zip_tokens
from vtok.methods.vispruner import prune_views


def cases(name: str, dtype: torch.dtype = torch.float64) -> list[tuple[str, dict[str, Any]]]:
    """(case, its arrays) of a file with several cases."""
    found: dict[str, dict[str, Any]] = {}
    with np.load(FOLDER / f"{name}.npz") as arrays:
        for case in arrays["cases"].tolist():
            keys = [key for key in arrays if key.startswith(f"{case}__")]
            found[case] = {key.removeprefix(f"{case}__"): convert(arrays[key], dtype) for key in keys}
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


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


@DTYPES
def test_fastervlm(dtype: torch.dtype) -> None:
    for _, g in cases("baseline2_fastervlm", dtype):
        assert_equal(most_attended(g["attention"].mean(1), int(g["k"])), g["kept"])


@DTYPES
@pytest.mark.parametrize("name", ["", "_576", "_extension"])
def test_vispruner(name: str, dtype: torch.dtype) -> None:
    """In the cases of the extension the program raises an error."""
    for case, g in cases(f"baseline2_vispruner{name}", dtype):
        found = prune_views(g["attention"].mean(1), g["features"], int(g["k"]), float(g["ratio"]))
        assert found.tolist() == g["kept"].tolist(), case
