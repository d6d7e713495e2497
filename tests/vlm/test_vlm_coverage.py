"""How many of the image-text-to-text classes that transformers lists are shortened, and why the others are not."""

import warnings
from pathlib import Path

import pytest
import transformers
from helpers_errors import message_of

import vtok
from vtok.eval.matrix import generic as matrix
from vtok.patches import why_no_prompt
from vtok.patches.hf_vlm.families import FAMILIES
from vtok.patches.hf_vlm.generic.refused import REFUSED as REASONS
from vtok.patches.hf_vlm.generic.refused import UNPROMPTED
from vtok.testing.generic_models import CLASSES, REFUSED, empty, listed

WRITTEN_FOR = "5.24."  # release of transformers
LISTED = listed()
PAGE = (Path(__file__).resolve().parents[2] / "assets" / "docs" / "support.md").read_text(encoding="utf-8")


def _by_row():
    """Names of the classes that a row describes; the contract tests and the matrix run those."""
    stems = {path.rsplit(".", 1)[1].removesuffix("Model") for path in FAMILIES}
    return {name for name, cls in LISTED.items() if cls.split("For")[0] in stems}


def test_every_class_is_tested_or_refused():
    rows, generic, refused, listed = _by_row(), set(CLASSES), set(REFUSED), set(LISTED)
    assert not generic & refused and not generic & rows and not refused & rows
    unknown, gone = sorted(listed - rows - generic - refused), sorted((generic | refused) - listed)
    if transformers.__version__.startswith(WRITTEN_FOR):
        assert not unknown and not gone
        assert len(rows) >= 12 and len(rows | generic) >= 60
    elif unknown or gone:  # another release: say so, and let it be
        warnings.warn(
            f"transformers {transformers.__version__}: not known here: {unknown}; no longer listed: {gone}", stacklevel=1
        )


@pytest.mark.parametrize("name", [name for name in REFUSED if name in LISTED])
def test_refused(name):
    """Nothing of these is shortened, and somebody says why."""
    model = empty(name)
    text, why = message_of(vtok.UnsupportedModelError, vtok.patch, model, "divprune", keep=0.5), why_no_prompt(model)
    if why is None:
        assert any(reason in text for reason in REASONS.values())
    else:
        assert any(reason in why for reason in UNPROMPTED.values())
        assert why in text or name == "vision-encoder-decoder"  # its encoder is found first, and says more of itself
    assert vtok.supports(model).methods.get("divprune", "") is not None


def test_the_page_names_every_class():
    """With numbers that are counted anew; cells of the table are compared by the test below."""
    assert all(f"| {name} |" in PAGE for name in CLASSES)
    assert f"{len(CLASSES)} classes x" in PAGE


def test_the_readme_counts_what_the_page_has():
    """Models by their interfaces, and those of them between whose decoder layers tokens may leave: fastv's column."""
    table = PAGE[PAGE.index("<!-- generic matrix") : PAGE.index("<!-- end of the generic matrix")]
    header, _, *rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if line.startswith("|")]
    inside = sum(row[header.index("fastv")].startswith("generic") for row in rows)
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"{len(rows)} more before the language model, {inside} of them also in it" in readme


@pytest.mark.slow
@pytest.mark.skipif(not transformers.__version__.startswith(WRITTEN_FOR), reason="the table is that of another release")
def test_the_page_has_the_matrix():
    assert matrix.markdown(matrix.answers()) in PAGE, "run: vtok matrix --generic --into assets/docs/support.md"
