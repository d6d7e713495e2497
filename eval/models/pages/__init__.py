"""Pages of words in small print, questions about one of them, and the reference LLaVA-NeXT that answers them.

What was measured: assets/docs/results/pages.md in the repository.
"""

from vtok.eval.models.pages.compose import draw_page
from vtok.eval.models.pages.model import ReferencePrint, load_reference_print, make_print_processor
from vtok.eval.models.pages.questions import (
    BLIND,
    CALIBRATION_PAGES,
    KINDS,
    TEST_PAGES,
    density,
    one_of_each,
)

__all__ = [
    "BLIND",
    "CALIBRATION_PAGES",
    "KINDS",
    "TEST_PAGES",
    "ReferencePrint",
    "density",
    "draw_page",
    "load_reference_print",
    "make_print_processor",
    "one_of_each",
]
