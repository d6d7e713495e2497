"""Models that accelerate's hooks spread over two devices: the same answers as on one. The devices are pretended."""

import pytest
import torch
from helpers_devices import FIRST, SECOND, Devices, There, put
from helpers_towers import METHODS, TOKENWISE, deep
from vlm_zoo import Attended, Columns, assert_same, build, generate, inputs

import vtok

READS = vtok.ToDRE(keep=0.4, pivot="cls", probe=None)
MOST = [
    ("LLaVA-1.5", Columns(((0, 2), (3, 3)))),
    ("LLaVA-1.5", Attended(layer=2)),
    ("LLaVA-1.5", [METHODS["tome"], Attended(layer=3)]),
    ("LLaVA-1.5", READS),
]
REST = [
    ("LLaVA-1.5", vtok.UniformGrid(keep=0.4)),
    ("LLaVA-NeXT", [vtok.UniformGrid(keep=0.5), Attended(layer=3, back=2)]),
    ("PaliGemma", [METHODS["ats"], Columns(((2, 0),))]),
    ("PaliGemma", METHODS["zero_tprune"]),
    ("InternVL", [READS, Columns(((3, 2),))]),
    ("Gemma3", METHODS["tome"]),
]


@pytest.fixture(autouse=True)
def _autocast(monkeypatch):
    """These devices have none to ask about."""
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: kind != (FIRST.type,) and asked(*kind))


def _spread(model):
    """The later half of the tower and of the LLM on another device than the rest; hooks bring inputs where weights are."""
    hooks = pytest.importorskip("accelerate.hooks")
    text, vision = model.model.language_model, model.model.vision_tower
    blocks = next(m for m in vision.modules() if isinstance(m, torch.nn.ModuleList))
    behind = [
        m for name, m in vision.named_modules() if name.endswith(("post_layernorm", "layernorm", "head")) and "." not in name
    ]
    moved = [*list(blocks)[len(blocks) // 2 :], *behind, model.model.multi_modal_projector, *list(text.layers)[2:], text.norm]
    with Devices():
        put(model, FIRST)
        for module in moved:
            put(module, SECOND)
    for module, device in [*((m, FIRST) for m in (*blocks, *text.layers) if m not in moved), *((m, SECOND) for m in moved)]:
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(device))
    hooks.add_hook_to_module(model.lm_head, hooks.AlignDevicesHook(FIRST))
    return model


def _models(name):
    make = deep if name in TOKENWISE else build
    for _ in range(2):
        model = make(name)
        model.set_attn_implementation("eager")
        yield model


@pytest.mark.filterwarnings("ignore:.*put back on the grid")
@pytest.mark.parametrize(
    ("name", "method"), [*MOST, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)], ids=lambda x: str(x)[:60]
)
def test_two_devices(name, method):
    values, (plain, spread) = inputs(name), _models(name)
    vtok.patch(plain, method)
    with Devices():
        vtok.patch(_spread(spread), method)
    there = {key: There(value, FIRST) for key, value in values.items()}
    for cache in (True, False):
        expected = generate(plain, values, steps=3, use_cache=cache)
        with Devices():
            found = generate(spread, there, steps=3, use_cache=cache)
            assert found[1].device == FIRST
            assert_same((found[0].inner, found[1].inner, None), expected)
            assert vtok.info(spread).prompts[0].rows == vtok.info(plain).prompts[0].rows


def test_mixing_devices_raises():
    with Devices(), pytest.raises(RuntimeError, match=r"lazy:0.*lazy:1"):
        There(torch.ones(2), FIRST) + There(torch.ones(2), SECOND)
