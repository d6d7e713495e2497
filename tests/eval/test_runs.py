"""Run files: what they hold is read; what is wrong in a file is named."""

from pathlib import Path

import pytest

import vtok
from vtok.eval.common.settings import Setting
from vtok.eval.runs import loader as runs
from vtok.eval.runs.methods import portable


def _file(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


GOOD = "model: {backend: timm, name: deit_tiny_patch16_224}\nmethod: {name: tome, r: 8}\ntask: imagenet\n"


CLIP = "model: {backend: open_clip, name: ViT-B-32, pretrained: openai}\nmethod: {name: tome, r: 8}\ntask: retrieval\n"


def test_a_minimal_file(tmp_path):
    run = runs.load(str(_file(tmp_path, GOOD)))
    assert (run.name, run.model, run.method, run.batch_size) == ("run", "deit_tiny_patch16_224", vtok.ToMe(r=8), 64)


def test_a_tag_of_weights(tmp_path):
    run = runs.load(str(_file(tmp_path, CLIP)))
    assert (run.backend, run.pretrained, run.task) == ("open_clip", "openai", "retrieval")


def test_overrides(tmp_path):
    path = str(_file(tmp_path, GOOD))
    run = runs.load(path, ["method.r=[4, 2]", "batch_size=8", "model.name=deit_small_patch16_224"])
    assert run.method == vtok.ToMe(r=[4, 2])
    assert (run.batch_size, run.model) == (8, "deit_small_patch16_224")
    for bad, words in [
        ("batch_size", "--set takes key=value"),
        ("method.r.x=1", "--set method.r.x=1: method.r is not a mapping"),
        ("method.r=[1", "the value is not YAML"),
        ("modle.name=x", "run.yaml with --set modle.name=x: unknown key 'modle'; did you mean 'model'?"),
        ("model.nmae=x", "with --set model.nmae=x: unknown key 'model.nmae'; did you mean 'model.name'?"),
        ("method.rr=1", "with --set method.rr=1: method: unknown parameter of tome 'rr'"),
    ]:
        with pytest.raises(vtok.VtokError) as caught:
            runs.load(path, [bad])
        assert words in str(caught.value)


SEVERAL = """
model: {backend: reference, name: reference-clip}
methods:
- {name: tome, flops: 0.6}
- [{name: pitome, ratio: [0.9, 0.9]}, {name: zero_tprune, layers: [4], retain: [0.5]}]
tasks: [zeroshot, retrieval]
num_samples: 20
options: {recall_k: [1]}
"""


def test_several_methods_and_tasks_on_a_reference_model(tmp_path):
    path = str(_file(tmp_path, SEVERAL))
    run = runs.load(path)
    assert run.settings[0] == Setting("tome", {"flops": 0.6})
    assert [config.name for config in run.settings[1].method] == ["pitome", "zero_tprune"]
    assert run.data == {"zeroshot": "reference-pictures", "retrieval": "reference-pages"}
    assert (run.num_samples, run.options, run.folder) == (20, {"recall_k": [1]}, Path("results/run"))
    changed = runs.load(path, ["methods.0.flops=0.4", "data.retrieval=mine", "methods.1.1.retain=[0.7]"])
    assert changed.settings[0].params == {"flops": 0.4}
    assert changed.settings[1].method[1].retain == (0.7,)
    assert changed.data == {"zeroshot": "reference-pictures", "retrieval": "mine"}
    assert runs.load(path).specs == run.content["methods"]
    with pytest.raises(vtok.ConfigError, match=r"methods is a list of 2; say which by a number from 0, e\.g\. methods\.0"):
        runs.load(path, ["methods.flops=0.4"])
    with pytest.raises(vtok.ConfigError, match="expected one method with its own parameters, found tome"):
        _ = run.method
    with pytest.raises(vtok.ConfigError, match="expected one task, found zeroshot, retrieval"):
        _ = run.task


def test_a_bundled_file_as_a_parameter(tmp_path):
    text = "model: {backend: reference, name: reference-llava}\ntask: vqa\nmethod: {name: atp, weights: %s}\n"
    found = runs.load(str(_file(tmp_path, text % "asset:easyvqa_llava_atp.safetensors"))).method.weights
    assert Path(found).is_file()
    assert portable({"weights": found, "n": [1]}) == {"weights": "asset:easyvqa_llava_atp.safetensors", "n": [1]}
    with pytest.raises(vtok.ConfigError, match=r"nothing\.bin is not in .*assets: weights and pictures"):
        runs.load(str(_file(tmp_path, text % "asset:nothing.bin")))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("task: [imagenet", ["not a YAML file"]),
        ("- a\n- b", ["expected a mapping", "found list"]),
        (GOOD + "mehtod: {}", ["unknown key 'mehtod'", "did you mean 'method'?"]),
        (GOOD + "batch_size: many", ["batch_size must be a whole number", "'many'"]),
        (GOOD + "dtype: fp8", ["dtype must be one of fp32, bf16, fp16", "'fp8'"]),
        (GOOD.replace("task: imagenet\n", ""), ["task is missing"]),
        (GOOD.replace("imagenet", "imagnet"), ["unknown task 'imagnet'", "did you mean 'imagenet'?"]),
        (GOOD + "tasks: [imagenet]\n", ["give task or tasks, not both"]),
        (GOOD + "methods: [{name: tome}]\n", ["give method or methods, not both"]),
        (GOOD.replace("method: {name: tome, r: 8}", "methods: []"), ["methods is an empty list"]),
        (
            GOOD.replace("{name: tome, r: 8}", "[{name: tome, r: 8}, 3]"),
            ["method must be a mapping such as {name: tome, r: 13}", "got 3"],
        ),
        (GOOD.replace("r: 8", "flops: 1.2"), ["method.flops must be a share of the model's FLOPs in (0, 1]", "1.2"]),
        (GOOD.replace("r: 8", "r: 8, flops: 0.5"), ["method: flops sets r of tome"]),
        (
            GOOD.replace("method: {name: tome, r: 8}", "methods: [{name: random}, {name: tome, rr: 8}]"),
            ["methods.1: unknown parameter"],
        ),
        (
            GOOD.replace("method: {name: tome, r: 8}", "methods: [{name: tome, r: 8}, {name: tome, r: 8}]"),
            ["tome(r=8) 2 times"],
        ),
        (
            GOOD.replace("{name: tome, r: 8}", "[{name: pitome, ratio: 0.9}, {name: tome, flops: 0.5}]"),
            ["method: a FLOPs budget sets the knob of one method"],
        ),
        (GOOD + "data: {imagnet: x}", ["unknown key 'data.imagnet'", "did you mean 'data.imagenet'?"]),
        (GOOD + "num_samples: 0", ["num_samples must be at least 1, got 0"]),
        (GOOD + "sweep: {modle.name: [a]}", ["unknown key 'sweep.modle.name'"]),
        (GOOD + "sweep: {flops: 0.5}", ["sweep.flops must be a list, got 0.5"]),
        (
            GOOD.replace("timm, name: deit_tiny_patch16_224", "reference, name: reference-vti"),
            ["model.name must be one of", "reference-vit"],
        ),
        (
            GOOD.replace("timm, name: deit_tiny_patch16_224", "reference, name: reference-clip"),
            ["task imagenet needs", "reference-vit"],
        ),
        (
            CLIP.replace("retrieval", "zeroshot") + "published: {acc1: 1, source: x}\ntasks: [a]",
            ["give task or tasks, not both"],
        ),
        (GOOD.replace("backend: timm, ", ""), ["model.backend is missing"]),
        (GOOD.replace("timm", "tim"), ["model.backend must be one of timm"]),
        (GOOD.replace("name: tome, ", ""), ["method.name is missing"]),
        (GOOD.replace("tome", "tom"), ["unknown method 'tom'", "did you mean 'tome'?"]),
        (GOOD.replace("r: 8", "rr: 8"), ["unknown parameter of tome 'rr'"]),
        (GOOD.replace("r: 8", "r: 8.5"), ["must be whole"]),
        (GOOD + "published: {top1: 3}", ["published.source is missing"]),
        (GOOD + "published: {top1: 3, source: x, top2: 1}", ["unknown key 'published.top2'"]),
        (GOOD + "published: {source: x}", ["published holds no figure", "known: top1"]),
        (GOOD.replace("imagenet", "retrieval"), ["model.backend must be one of open_clip, transformers", "'timm'"]),
        (CLIP + "published: {top1: 3, source: x}", ["unknown key 'published.top1'"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, words):
    path = _file(tmp_path, change)
    with pytest.raises(vtok.VtokError) as caught:
        runs.load(str(path))
    for word in [str(path), *words]:
        assert word in str(caught.value), str(caught.value)


def test_runs_that_do_not_exist():
    with pytest.raises(
        vtok.UnknownNameError, match="unknown run 'tome_vit_s_augreg_r12'; did you mean 'tome_vit_s_augreg_r13'"
    ):
        runs.load("tome_vit_s_augreg_r12")
    with pytest.raises(vtok.ConfigError, match="does not exist"):
        runs.load("nowhere/run.yaml")


def test_yaml_cannot_run_code(tmp_path):
    path = _file(tmp_path, GOOD + "data: !!python/object/apply:os.system ['true']")
    with pytest.raises(vtok.ConfigError, match="not a YAML file"):
        runs.load(str(path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tome", ("tome", {})),
        ("tome:r=13", ("tome", {"r": 13})),
        ("tome:r=(8,-1),prop_attn=false", ("tome", {"r": (8, -1), "prop_attn": False})),
        ("pitome:ratio=0.9,prop_attn=false", ("pitome", {"ratio": 0.9, "prop_attn": False})),
        (
            "zero_tprune:layers=[2,5],retain=[0.9,0.8],head_filter=null",
            ("zero_tprune", {"layers": [2, 5], "retain": [0.9, 0.8], "head_filter": None}),
        ),
    ],
)
def test_methods_on_the_command_line(text, expected):
    assert runs.parse_method(text) == expected


@pytest.mark.parametrize("text", ["tome:13", "tome:r=[1", "tome:r"])
def test_unreadable_methods_on_the_command_line(text):
    with pytest.raises(vtok.ConfigError, match="tome:r=13"):
        runs.parse_method(text)
