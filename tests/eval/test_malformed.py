"""Malformed inputs by the hundred: none ends in a traceback, a hang, an endless message or a result that means nothing.

A table of seeds, each changed in every place, stands for every kind of thing that users hand over: parameters of methods, files
of patches, of runs, of results and of questions, pictures, folders of them, options and paths of the command line, calibration
and checkpoints. Every test walks through its inputs and names those that fail, all at once.
"""

import dataclasses
import json
import pickle
import struct
from functools import partial

import numpy as np
import pytest
import torch
from malformed import (
    ACCEPTED,
    JUNK,
    REFUSED,
    TEXTS,
    failures,
    finite,
    model,
    mutations,
    pipe,
    plain,
    some,
    told,
)
from PIL import Image

import vtok
from vtok import serialization as files
from vtok.eval.tasks.timm_pipeline import Options, create_model
from vtok.registry import METHODS
from vtok.targets.resolve import towers


def _parameters(name, info):
    cls = METHODS.get(name)
    for field in dataclasses.fields(cls):
        for what, value in JUNK.items():

            def make(field=field.name, value=value):
                config = cls.create(**{field: value})
                assert plain(config.to_dict()) or "weights" in field, "an accepted config cannot be written down"
                assert finite(config.to_dict()), "an accepted config holds NaN"
                assert cls.from_dict(config.to_dict()) == config, "an accepted config does not survive being saved"
                if cls.for_encoders() and not config.needs_budget():
                    config.build(info)

            yield f"{name}: {field.name}={what}", make


@pytest.mark.parametrize("name", METHODS.names())
def test_parameters_of_methods(name):
    info = towers(model(), None)[0][1].info
    found = failures(_parameters(name, info))
    assert not found, told(found)


@pytest.mark.parametrize("name", ["tome", "pitome", "random", "ats"])
def test_numbers_of_numpy_and_torch_are_numbers(name):
    given = {
        "tome": ({"r": np.int64(2)}, {"r": 2}),
        "pitome": ({"ratio": np.float32(0.75)}, {"ratio": 0.75}),
        "random": ({"keep": torch.tensor(0.5), "layers": np.arange(3)}, {"keep": 0.5, "layers": [0, 1, 2]}),
        "ats": ({"num_tokens": np.array(20), "layers": [np.int32(1)]}, {"num_tokens": 20, "layers": [1]}),
    }[name]
    ours, plain_ones = (METHODS.get(name).create(**one) for one in given)
    assert ours == plain_ones and plain(ours.to_dict())
    assert vtok.info(vtok.patch(model(), "tome", flops=np.float32(0.75))).patched


def test_what_patch_takes_beside_a_method():
    net = model()
    calls = []
    for argument in ("flops", "input_size", "trace", "positions", "prompt"):
        for what, value in JUNK.items():
            if value is not None and not (argument == "flops" and value == 0.5):
                calls.append((f"patch: {argument}={what}", lambda a=argument, v=value: vtok.patch(net, "tome", **{a: v})))
    for what, value in JUNK.items():
        calls.append((f"patch: method={what}", lambda v=value: vtok.patch(net, v), (REFUSED,)))
    found = failures(calls)
    assert not found, told(found)


def _saved(folder):
    net = vtok.patch(model(), [vtok.ToMe(r=[2, 2]), vtok.RandomDrop(keep=0.9, layers=[2])])
    vtok.save_config(net, folder)
    return json.loads((folder / "vtok.json").read_text())


def test_files_of_patches(tmp_path):
    content = _saved(tmp_path)
    path, before = tmp_path / "changed.json", files.load(tmp_path / "vtok.json")

    def load(text):
        path.write_bytes(text)
        return files.load(path)

    def changed(value):
        loaded = load(json.dumps(value).encode())  # NaN and Infinity as Python writes them
        same = [configs for _, configs in loaded.towers] == [configs for _, configs in before.towers]
        assert all(finite(config.to_dict()) for _, configs in loaded.towers for config in configs), "NaN was accepted"
        return same

    calls = [(f"vtok.json: {what}", lambda v=value: changed(v)) for what, value in some(mutations(content))]
    calls += [(f"vtok.json: {what}", lambda t=text: load(t), (REFUSED,)) for what, text in TEXTS.items()]
    calls += [
        ("vtok.json: a pipe", lambda: files.load(pipe(tmp_path / "pipe.json")), (REFUSED,)),
        ("vtok.json: a folder", lambda: files.load(tmp_path / "nowhere"), (REFUSED,)),
        ("vtok.json: a zero byte", lambda: files.load("a\0b.json"), (REFUSED,)),
        ("vtok.json: a long name", lambda: files.load("x" * 5000 + ".json"), (REFUSED,)),
    ]
    found = failures(calls)
    assert not found, told(found)


def test_calibration():
    net, images = model(), torch.rand(2, 3, 32, 32)
    wrong = {
        "NaN": images * float("nan"),
        "infinite": images / 0,
        "size": torch.rand(2, 1, 30, 30),
        "no batch": images[0],
        "float64": images.double(),
        "int64": images.long(),
        "empty": images[:0],
        "complex": images.to(torch.complex64),
        "meta": images.to("meta"),
        "sparse": images.to_sparse(),
        "array": images.numpy(),
        "NaN by name": {"x": images * float("nan")},
        "meta by name": {"x": images.to("meta")},
        "float64 by name": {"x": images.double()},
        "another name": {"nonsense": images},
        "no name": {3: images},
        **{name: value for name, value in JUNK.items() if value is not None},
    }
    allowed = {"float64": (ACCEPTED, REFUSED), "int64": (ACCEPTED, REFUSED)}
    calls = [
        (f"calibration: {n}", lambda v=v: vtok.patch(net, "ats", flops=0.7, calibration=v), allowed.get(n, (REFUSED,)))
        for n, v in wrong.items()
    ]
    found = failures(calls)
    assert not found, told(found)


def test_calibration_of_a_vision_language_model():
    from helpers_vqa import tiny_llava

    vlm = tiny_llava()
    good = vlm.processor(images=[Image.new("RGB", (16, 16))], text=["<image> what?"], return_tensors="pt")
    pixels, ids = good["pixel_values"], good["input_ids"]
    wrong = {
        "NaN": {**good, "pixel_values": pixels * float("nan")},
        "meta": {**good, "pixel_values": pixels.to("meta")},
        "ids on meta": {**good, "input_ids": ids.to("meta")},
        "complex": {**good, "pixel_values": pixels.to(torch.complex64)},
        "float ids": {**good, "input_ids": ids.float()},
        "ids beyond": {**good, "input_ids": ids + 10**6},
        "no batch": {**good, "pixel_values": pixels[0]},
        "size": {**good, "pixel_values": pixels[..., :3, :3]},
        "no name": {**good, 3: 1},
        "empty": [],
        **{name: value for name, value in JUNK.items() if value is not None},
        **{f"ids {name}": {**good, "input_ids": value} for name, value in JUNK.items()},
        **{f"pixels {name}": {**good, "pixel_values": value} for name, value in JUNK.items() if value is not None},
    }
    for method, own in (("ats", {"flops": 0.9}), ("correlation", {})):
        run = partial(vtok.patch, vlm.net, method, **own)
        found = failures((f"calibration of {method}: {n}", partial(run, calibration=v), (REFUSED,)) for n, v in wrong.items())
        assert not found, told(found)


def test_checkpoints(tmp_path):
    from safetensors.torch import save

    state = create_model("test_vit", Options(pretrained=False)).state_dict()
    weights = save({name: value.contiguous() for name, value in state.items()})
    shapes = save({name: value.flatten()[:1].clone() for name, value in state.items()})
    files_of = {
        "cut header": weights[:4],
        "cut": weights[: len(weights) // 2],
        "header of endless length": struct.pack("<Q", 2**62) + weights[8:],
        "other shapes": shapes,
        "other names": save({"x": torch.zeros(1)}),
        "code": pickle.dumps(print),
        **TEXTS,
    }
    calls = []
    for number, (name, data) in enumerate(files_of.items()):
        for ending in (".safetensors", ".pth"):
            path = tmp_path / f"{number}{ending}"
            path.write_bytes(data)
            options = Options(pretrained=False, checkpoint=str(path))
            calls.append((f"checkpoint{ending}: {name}", lambda o=options: create_model("test_vit", o), (REFUSED,)))
            calls.append((f"atp weights{ending}: {name}", lambda p=path: _atp(p), (REFUSED,)))
    fifo = pipe(tmp_path / "pipe.pth")
    calls.append(
        ("checkpoint: a pipe", lambda: create_model("test_vit", Options(pretrained=False, checkpoint=str(fifo))), (REFUSED,))
    )
    calls.append(
        (
            "checkpoint: a folder",
            lambda: create_model("test_vit", Options(pretrained=False, checkpoint=str(tmp_path))),
            (REFUSED,),
        )
    )
    calls.append(("atp weights: a pipe", lambda: _atp(fifo), (REFUSED,)))
    found = failures(calls)
    assert not found, told(found)


def _atp(path):
    from vtok.methods.atp.modules import load

    load(path, 4, 32, (8, 8))


def test_there_are_enough_of_them():
    info = towers(model(), None)[0][1].info
    assert sum(len(list(_parameters(name, info))) for name in METHODS) > 1000
