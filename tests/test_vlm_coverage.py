"""How many of the image-text-to-text classes that transformers lists are shortened, and why the others are not."""

import warnings

import pytest
import torch
import transformers
from helpers_errors import message_of
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as LISTED
from vlm_classes import CLASSES, REFUSED, config_of

import vtok
from vtok.patches import why_no_prompt
from vtok.patches.hf_vlm.families import FAMILIES
from vtok.patches.hf_vlm.generic.refused import REFUSED as REASONS
from vtok.patches.hf_vlm.generic.refused import UNPROMPTED

WRITTEN_FOR = "5.24."  # release of transformers


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
        warnings.warn(f"transformers {transformers.__version__}: not known here: {unknown}; no longer listed: {gone}", stacklevel=1)


@pytest.mark.parametrize("name", [name for name in REFUSED if name in LISTED])
def test_refused(name):
    """Nothing of these is shortened, and somebody says why."""
    with torch.device("meta"):
        model = getattr(transformers, LISTED[name])(config_of(name))
    text, why = message_of(vtok.UnsupportedModelError, vtok.patch, model, "divprune", keep=0.5), why_no_prompt(model)
    if why is None:
        assert any(reason in text for reason in REASONS.values())
    else:
        assert any(reason in why for reason in UNPROMPTED.values())
        assert why in text or name == "vision-encoder-decoder"  # its encoder is found first, and says more of itself
    assert vtok.supports(model).methods.get("divprune", "") is not None
