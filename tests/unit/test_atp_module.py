"""ATP-LLaVA's modules: where they stand, how large they are, what they refuse, how they are saved."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_atp import GRID, Sample, modules, prompts
from helpers_golden import assert_equal
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vtok.errors import ConfigError, MissingExtraError, UnknownNameError, UnsupportedModelError
from vtok.methods.atp import spatial_scores
from vtok.methods.atp.modules import ATPModules, load
from vtok.methods.atp.spec import ATPSpec, scaled_layers

SPEC: dict[str, Any] = {"depth": 8, "width": 16, "grid": (4, 4)}


@pytest.mark.parametrize(
    ("depth", "layers"),
    [
        (32, (4, 14, 24)), (40, (5, 18, 30)), (28, (4, 12, 21)), (20, (3, 9, 15)), (16, (2, 7, 12)),
        (8, (1, 4, 6)), (4, (1, 2, 3)), (3, (1, 2)), (2, (1,)),
    ],
)  # fmt: skip
def test_layers_scale_with_the_depth(depth: int, layers: tuple[int, ...]) -> None:
    assert scaled_layers(depth) == layers
    assert ATPSpec(depth=depth, width=8, grid=(2, 2)).sites == layers


@given(st.integers(2, 200))
def test_scaled_layers_are_always_usable(depth: int) -> None:
    layers = scaled_layers(depth)
    assert list(layers) == sorted(set(layers)) and layers[0] >= 1 and layers[-1] < depth
    assert len(layers) == min(3, depth - 1)
    with pytest.raises(UnsupportedModelError, match="in front of a decoder layer that has another before it; found 1"):
        scaled_layers(1)


def test_sizes_of_the_modules() -> None:
    """The readings' own figures for LLaVA-1.5: 295,682 parameters a module, 20,482 with means and a layer of 4096."""
    for inputs, hidden, expected in (("grid", 256, 295_682), ("means", 4096, 20_482)):
        made = ATPModules(ATPSpec(depth=32, width=4096, grid=(24, 24), hidden=hidden, inputs=inputs))
        assert sum(p.numel() for p in made.parameters()) == 3 * expected
    theta_r, theta_s = made.head(14)(torch.rand(5, 2))
    assert (theta_r == 0.5).all() and (theta_s == 0.5).all()


def test_means_work_on_another_grid() -> None:
    made = modules(4, inputs="means", grid=(24, 24))
    p = prompts([Sample(1, True, 2)], 5)
    decision = made(1, *made.scores(p.attention(), p.slots), p.slots, grid=GRID)
    assert decision.keep.shape == p.slots.real.shape
    assert_equal(made.spatial(p.slots, decision.redundant, GRID)[p.slots.visual], spatial_scores(GRID, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"trained for 3 x 4 visual tokens, this model has 4 x 3; .* inputs='means'"):
        modules().spatial(p.slots, decision.redundant, (4, 3))


# Files.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_file_gives_back_the_same_modules(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "atp.safetensors"
    made = modules(3, dtype, self_score="debiased", strides=(3,), target_tokens=4, unsampled=-100.0).train()
    made.save(path)
    read = load(path, depth=3, width=12, grid=GRID)
    assert read.spec == made.spec
    assert not read.training and made.training
    expected = made.state_dict()
    assert list(read.state_dict()) == list(expected)
    for name, value in read.state_dict().items():
        assert value.dtype == dtype and value.device.type == "cpu"
        assert_equal(value, expected[name])
    assert all(parameter.requires_grad for parameter in read.parameters())  # training can go on

    p = prompts([Sample(1, True, 3)], 2)
    scores = made.scores(p.attention(), p.slots)
    for found, wanted in zip(read(2, *scores, p.slots, temperature=10.0), made(2, *scores, p.slots, temperature=10.0)):
        assert_equal(found, wanted)
    read.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"depth": 32}, "trained for a decoder of 3 decoder layers, this model has 32; thresholds do not carry over"),
        ({"width": 4096}, "trained for a decoder of 12 hidden units, this model has 4096"),
        ({"grid": (24, 24)}, r"trained for 3 x 4 visual tokens, this model has 24 x 24; train modules for this model"),
    ],
)
def test_modules_of_another_model_are_refused(tmp_path: Path, facts: dict[str, Any], message: str) -> None:
    path = tmp_path / "atp.safetensors"
    modules().save(path)
    with pytest.raises(ConfigError, match=f"atp.safetensors: these ATP modules were {message}"):
        load(path, **facts)
    modules(inputs="means").save(path)
    if "grid" in facts:
        assert load(path, depth=3, width=12, **facts).spec.grid == GRID


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ConfigError, match=r"x.safetensors does not exist; ATP modules are trained for a model and written by"):
        load(path)
    path.write_text("hello")
    with pytest.raises(ConfigError, match=r"x.safetensors is not a safetensors file"):
        load(path)
    save_file({"w": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"x.safetensors: holds no ATP modules"):
        load(path)
    with pytest.raises(ConfigError, match=r"cannot be written: the folder .*nowhere does not exist"):
        modules().save(tmp_path / "nowhere" / "x.safetensors")

    good = {"format": 1, **modules().spec.to_dict()}
    modules().save(path)
    tensors = load_file(path)
    for header, error in (
        ("{", "damaged header"),
        ("[]", "expected ATP modules of format 1, found 'list'"),
        (json.dumps({**good, "format": 2}), "expected ATP modules of format 1, found 2"),
        (json.dumps({"format": 1, "depth": 3}), "an ATP file says depth, width and grid; missing: grid, width"),
        (json.dumps({**good, "layers": [0]}), r"layers must rise within 1 to 2, got \(0,\)"),
        (json.dumps({**good, "colour": "red"}), "unknown entry of an ATP file 'colour'"),
        (json.dumps({**good, "hidden": 7}), "the parameters do not fit the header"),
        (json.dumps({**good, "layers": [1]}), "the parameters do not fit the header"),
    ):
        save_file(tensors, path, metadata={"vtok.atp": header})
        with pytest.raises(ConfigError, match=f"x.safetensors: .*{error}"):
            load(path)


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (modules().save, load):
        with pytest.raises(MissingExtraError, match=r'safetensors is not installed; run: pip install "vtok\[transformers\]"'):
            call(tmp_path / "x.safetensors")


# Specs.
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth takes whole numbers >= 1, got 0"),
        ({"width": 8.0}, "width takes whole numbers >= 1, got 8.0"),
        ({"hidden": True}, "hidden takes whole numbers >= 1, got True"),
        ({"grid": 576}, r"grid is \(rows, columns\) of visual tokens, got 576"),
        ({"grid": (24, 0)}, "grid takes whole numbers >= 1, got 0"),
        ({"layers": (0, 2)}, r"layers must rise within 1 to 7, got \(0, 2\); a module reads the attention of the layer before"),
        ({"layers": (2, 8)}, "layers must rise within 1 to 7"),
        ({"layers": (3, 3)}, "layers must rise within 1 to 7"),
        ({"layers": (3, 2)}, "layers must rise within 1 to 7"),
        ({"layers": ()}, "layers must rise within 1 to 7"),
        ({"layers": 4}, "layers is a list of block numbers"),
        ({"strides": (2, 3)}, "grids nest only if strides divide each other; 2 does not divide 3"),
        ({"strides": ()}, r"strides lists whole numbers >= 1 such as \(2, 4\), got \(\)"),
        ({"strides": (0,)}, "strides lists whole numbers >= 1"),
        ({"inputs": "pool"}, "inputs must be one of grid, means, got 'pool'"),
        ({"self_score": "prob"}, "self_score must be one of probs, debiased, logits, got 'prob'"),
        ({"minmax": 1}, "minmax is True or False, got 1"),
        ({"lambda_sample": 0}, "lambda_sample must be a number > 0, got 0"),
        ({"unsampled": float("inf")}, "unsampled must be a number, got inf"),
        ({"target_tokens": -1}, "target_tokens must be a number > 0, got -1"),
    ],
)
def test_specs_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ATPSpec(**{**SPEC, **changes})


def test_specs_are_plain_values() -> None:
    spec = ATPSpec(**{**SPEC, "grid": [4, 4], "layers": [2, 5], "strides": [4, 2]})
    assert (spec.grid, spec.layers, spec.strides, spec.num_slots) == ((4, 4), (2, 5), (2, 4), 16)
    assert ATPSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with pytest.raises(UnknownNameError, match="unknown entry of an ATP file 'stride'; did you mean 'strides'"):
        ATPSpec.from_dict({**SPEC, "stride": (2,)})
    with pytest.raises(ConfigError, match=r"stand in front of the decoder layers \(1, 2\), not 3"):
        modules().head(3)
