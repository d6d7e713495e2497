"""Scenes of little things, questions about one of them among many, and the reference LLaVA that answers them.

The card: assets/scenes.md in the repository; what was measured: assets/docs/results/scenes.md.
"""

from vtok.eval.models.scenes.compose import draw_scene
from vtok.eval.models.scenes.model import ReferenceScenes, load_reference_scenes, make_scenes_processor
from vtok.eval.models.scenes.questions import (
    BLIND,
    CALIBRATION_SCENES,
    KINDS,
    TEST_SCENES,
    one_of_each,
)

__all__ = [
    "BLIND",
    "CALIBRATION_SCENES",
    "KINDS",
    "TEST_SCENES",
    "ReferenceScenes",
    "draw_scene",
    "load_reference_scenes",
    "make_scenes_processor",
    "one_of_each",
]
