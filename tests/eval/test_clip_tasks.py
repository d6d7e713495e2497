"""Zero-shot and retrieval with tiny open_clip and Hugging Face models, against loops written here and clip_benchmark."""

import csv
import json
import sys

import numpy as np
import pytest
import torch
from helpers_clip import Letters, tiny_hugging_face, tiny_native
from PIL import Image
from typer.testing import CliRunner

import vtok
from vtok.eval.common.statistics import paired_difference
from vtok.eval.models.clip import BACKENDS, hugging_face_encoder, load_clip
from vtok.eval.report.html.repeat import repeat
from vtok.eval.report.sections import sections
from vtok.eval.runs import loader as runs
from vtok.eval.runs import runner
from vtok.eval.tasks import TASKS
from vtok.eval.tasks.clip.captions import open_captions
from vtok.eval.tasks.clip.retrieval import RetrievalOptions
from vtok.eval.tasks.clip.retrieval import evaluate as retrieval
from vtok.eval.tasks.clip.zeroshot import ZeroshotOptions, mean_per_class, templates
from vtok.eval.tasks.clip.zeroshot import evaluate as zeroshot

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")

CLASSES = ("ant", "bee", "cat", "dog", "eel_fish", "fox")
PER_CLASS = 3
TIMM_TOWER = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}


def photo(seed):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((80, 70), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six classes of three images, and a file that is no image."""
    root = tmp_path_factory.mktemp("classes")
    for number, name in enumerate(CLASSES):
        (root / name).mkdir()
        for i in range(PER_CLASS):
            photo(10 * number + i).save(root / name / f"{i}.png")
    (root / "cat" / "broken.jpg").write_text("not an image")
    return root


@pytest.fixture(scope="module")
def karpathy(tmp_path_factory):
    """12 test images with two or three captions, some equal across images; one file is missing; two images of another split."""
    root = tmp_path_factory.mktemp("captions")
    (root / "val2014").mkdir()
    entries = []
    for i in range(14):
        name, split = f"{i}.jpg", "test" if i < 12 else "val"
        if i != 5:
            photo(100 + i).save(root / "val2014" / name)
        words = [f"a photo of number {i}", f"thing {i % 4} on a table"] + ([f"{i} again"] if i % 3 == 0 else [])
        sentences = [{"raw": text, "tokens": text.split()} for text in words]
        entries.append({"filename": name, "filepath": "val2014", "split": split, "sentences": sentences, "imgid": i})
    (root / "dataset_tiny.json").write_text(json.dumps({"images": entries, "dataset": "tiny"}))
    return root


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny open_clip model as a folder, with a timm trunk, which vtok can patch."""
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("open_clip")
    torch.manual_seed(0)
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 224, **TIMM_TOWER},
        "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
    }
    model = open_clip.model.CustomTextCLIP(**config)
    save_file(model.state_dict(), root / "open_clip_model.safetensors")
    whole = {"model_cfg": config | {"custom_text": True}, "preprocess_cfg": {}}
    (root / "open_clip_config.json").write_text(json.dumps(whole))
    return root


@pytest.fixture(scope="module")
def encoder(clip_folder):
    return load_clip(str(clip_folder))


def options(kind, **extra):
    return kind(**{"workers": 0, "batch_size": 4, **extra})


def image_features(encoder, paths):
    with torch.no_grad():
        return torch.cat([encoder.encode_image(encoder.net, encoder.preprocess(photo_of(p))[None]) for p in paths])


def photo_of(path):
    return Image.open(path).convert("RGB")


def paths_of(folder):
    return [folder / name / f"{i}.png" for name in CLASSES for i in range(PER_CLASS)]


PROMPTS = ("a {c}", "a photo of a {c}.")


def plain_scores(encoder, folder):
    """[18, 6] by the definition: mean of the normalised prompts, normalised again."""
    rows = []
    with torch.no_grad():
        for name in CLASSES:
            mean = encoder.encode_text([p.format(c=name.replace("_", " ")) for p in PROMPTS]).mean(0)
            rows.append(mean / mean.norm())
        return image_features(encoder, paths_of(folder)) @ torch.stack(rows).T


@pytest.mark.parametrize("make", [tiny_native, lambda: tiny_hugging_face("clip"), lambda: tiny_hugging_face("siglip")])
def test_zeroshot_agrees_with_a_plain_loop(make, folder):
    encoder = make()
    (r,) = zeroshot(encoder, folder, [None], options(ZeroshotOptions, templates=PROMPTS))
    scores, labels = plain_scores(encoder, folder), torch.arange(18) // 3
    hits = (scores.argmax(1) == labels).double()
    assert r["metrics"]["acc1"] == pytest.approx(float(hits.mean()))
    assert r["metrics"]["acc1_stderr"] == pytest.approx(float(hits.std() / 18**0.5))
    assert r["metrics"]["acc5"] == pytest.approx(float((scores.topk(5).indices == labels[:, None]).any(1).double().mean()))
    recalls = [float(hits[labels == c].mean()) for c in range(6)]
    assert r["metrics"]["mean_per_class_recall"] == pytest.approx(np.mean(recalls))
    assert (r["n"], r["num_classes"], r["num_templates"], r["num_skipped"]) == (18, 6, 2, 1)
    assert r["skipped"][0]["file"] == "cat/broken.jpg"
    assert (r["dataset"], r["task"], r["backend"]) == (folder.name, "zeroshot_classification", encoder.backend)
    assert json.loads(json.dumps(r, allow_nan=False)) == r


def test_zeroshot_differences_are_paired(encoder, folder):
    before = plain_scores(encoder, folder).argmax(1)
    with vtok.patched(encoder.net, "tome", r=13):
        after = plain_scores(encoder, folder).argmax(1)
    records = zeroshot(
        encoder, folder, [None, ("tome", {"r": 13}), ("tome", {"r": 0})], options(ZeroshotOptions, templates=PROMPTS)
    )
    labels = torch.arange(18) // 3
    difference = ((after == labels).double() - (before == labels).double()).numpy()
    metrics = records[1]["metrics"]
    assert metrics["difference"] == pytest.approx(difference.mean())
    assert metrics["difference_stderr"] == pytest.approx(difference.std(ddof=1) / 18**0.5)
    assert metrics["agreement"] == pytest.approx(float((before == after).double().mean()))
    assert "difference" not in records[0]["metrics"]
    ends = paired_difference(np.zeros(18)).ends  # nothing changed: as far as 18 images can tell
    unchanged = {"difference": 0, "difference_stderr": 0, "difference_ci": ends, "agreement": 1}
    assert records[2]["metrics"] == {**records[0]["metrics"], **unchanged}
    assert records[1]["tokens"]["in"] == 197 and records[1]["tokens"]["out"] == 41
    assert records[1]["implied_speedup"] > 1.4 > records[0]["implied_speedup"] == 1
    assert [r["method"] for r in records] == ["unpatched", "tome", "tome"] and records[1]["params"]["r"] == 13
    assert not vtok.info(encoder.net).patched


def plain_recalls(images, texts, captions, ks):
    """Sum over queries, by sorting; an image matches every text that equals one of its own."""
    owner = [i for i, own in enumerate(captions) for _ in own]
    words = [text for own in captions for text in own]
    right = np.array([[words[t] in captions[i] for i in range(len(captions))] for t in range(len(words))])
    assert all(right[t, owner[t]] for t in range(len(words)))
    scores = (texts @ images.T).numpy()
    found = {}
    for k in ks:
        for name, table, good in (("image", scores, right), ("text", scores.T, right.T)):
            best = np.argsort(-table, axis=1)[:, :k]
            found[f"{name}_retrieval_recall@{k}"] = np.take_along_axis(good, best, 1).any(1).mean()
    return found


@pytest.mark.parametrize(
    "make", [tiny_native, *(lambda kind=kind: tiny_hugging_face(kind) for kind in ("clip", "siglip", "blip"))]
)
def test_retrieval_agrees_with_a_plain_loop(make, karpathy):
    encoder = make()
    (r,) = retrieval(encoder, karpathy, [None], options(RetrievalOptions, recall_k=(1, 3)))
    source = open_captions(karpathy)
    kept = [i for i in range(12) if i != 5]
    with torch.no_grad():
        captions = [list(source.captions[i]) for i in kept]
        texts = encoder.encode_text([text for own in captions for text in own])
    images = image_features(encoder, [karpathy / source.files[i] for i in kept])
    expected = plain_recalls(images, texts, captions, (1, 3))
    found = r["metrics"]
    assert {k: found[k] for k in expected} == pytest.approx(expected)
    assert found["recall_sum"] == pytest.approx(sum(expected.values()))
    assert (r["n"], r["num_texts"], r["num_skipped"]) == (11, len(texts), 1)
    assert "5.jpg does not exist" in r["skipped"][0]["reason"] and r["skipped"][0]["file"] == "val2014/5.jpg"
    assert (r["dataset"], r["task"]) == ("dataset_tiny", "zeroshot_retrieval")
    assert json.loads(json.dumps(r, allow_nan=False)) == r


def test_retrieval_patched_and_unpatched(encoder, karpathy):
    settings = [None, ("random", {"keep": 0.7}), ("tome", {"r": 0})]
    records = retrieval(encoder, karpathy / "dataset_tiny.json", settings, options(RetrievalOptions))
    base, patched, idle = (r["metrics"] for r in records)
    for name in ("image_retrieval_recall@5", "text_retrieval_recall@1"):
        assert patched[f"{name}_difference"] == pytest.approx(patched[name] - base[name])
        assert patched[f"{name}_difference_stderr"] >= 0
        assert idle[name] == base[name] and idle[f"{name}_difference"] == idle[f"{name}_difference_stderr"] == 0
    assert not any("difference" in name for name in base)
    assert records[1]["tokens"]["out"] < 197


@pytest.mark.parametrize("make", [tiny_native, lambda: tiny_hugging_face("blip")])
def test_retrieval_with_the_presets_of_the_runs(make, karpathy):
    """Two encoders, also where a model holds a text model that looks at image tokens besides."""
    encoder = make()
    preset = "official_clip" if encoder.backend == "open_clip" else "official_blip"
    records = retrieval(encoder, karpathy, [None, ("pitome", {"ratio": 0.8, "preset": preset})], options(RetrievalOptions))
    assert records[1]["tokens"]["in"] == 17 and records[1]["tokens"]["out"] == 12
    assert records[1]["params"]["preset"] == preset and records[1]["implied_speedup"] > 1.1
    assert "image_retrieval_recall@1_difference" in records[1]["metrics"]


def test_captions_that_are_equal_can_be_told_apart(karpathy):
    encoder = tiny_native()
    together, apart = (
        retrieval(encoder, karpathy, [None], options(RetrievalOptions, equal_captions=flag))[0]["metrics"]
        for flag in (True, False)
    )
    assert all(together[name] >= apart[name] for name in together if name.endswith(("@1", "@5", "@10")))
    assert together["recall_sum"] > apart["recall_sum"]


def test_the_first_captions_only(karpathy):
    assert {len(own) for own in open_captions(karpathy).captions} == {2, 3}
    assert {len(own) for own in open_captions(karpathy, max_captions=1).captions} == {1}
    assert len(open_captions(karpathy, "val")) == 2
    r = retrieval(tiny_native(), karpathy, [None], options(RetrievalOptions, num_samples=4, max_captions=1, amp=True))[0]
    assert (r["n"], r["num_texts"], r["dtype"]) == (4, 4, "bfloat16 autocast")


def test_clip_benchmark_builds_a_table_of_the_files(karpathy, folder, tmp_path, monkeypatch):
    cli = pytest.importorskip("clip_benchmark.cli")
    from vtok.eval.cli.tasks import write_records

    encoder = tiny_native()
    files = write_records(retrieval(encoder, karpathy, [None], options(RetrievalOptions)), tmp_path / "out")
    files += write_records(zeroshot(encoder, folder, [None], options(ZeroshotOptions, templates=PROMPTS)), tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", "build", str(tmp_path / "out"), "--output", str(tmp_path / "b.csv")])
    assert not cli.main()
    rows = {row["task"]: row for row in csv.DictReader((tmp_path / "b.csv").open())}
    assert set(rows) == {"zeroshot_retrieval", "zeroshot_classification"} and len(files) == 2
    for path in files:
        record = json.loads(path.read_text())
        for name in ("acc1", "acc5", "mean_per_class_recall", "image_retrieval_recall@5", "text_retrieval_recall@10"):
            if name in record["metrics"]:
                assert float(rows[record["task"]][name]) == record["metrics"][name]
        assert rows[record["task"]]["model_fullname"] == "tiny "


def test_the_command_line(clip_folder, karpathy, folder, tmp_path):
    from vtok.eval.cli.program import app

    def run(*args):
        result = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    common = ["--model", clip_folder, "-b", 6, "-j", 0, "-M", "tome:r=8", "--output", tmp_path]
    text = run("eval", "retrieval", *common, "--data", karpathy, "--recall-k", "1,2")
    assert "image R@2" in text and "vs unpatched: paired" in text and "5.jpg was skipped" in text
    text = run("eval", "zeroshot", *common, "--data", folder, "--templates", "a {c}|one {c}")
    assert "acc1" in text and "implied" in text
    records = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert sorted(r["method"] for r in records) == ["tome", "tome", "unpatched", "unpatched"]
    assert {r["num_templates"] for r in records if "num_templates" in r} == {2}
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{backend: open_clip, name: '{clip_folder}'}}\nmethod: {{name: tome, r: 8}}\ntask: retrieval\nbatch_size: 6\n"
        "published: {text_retrieval_recall@1: 79.3, base_text_retrieval_recall@1: 82.4, recall_sum: 509.2, source: a log}\n"
    )
    text = run("run", path, "--data", karpathy, "-j", 0, "-o", tmp_path / "out")
    for word in ("79.3", "82.4", "-3.100", "509.2", "text R@1", "a log", "±"):
        assert word in text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, k: zeroshot("no-such-model", f), "unknown open_clip model 'no-such-model'"),
        (lambda f, k: zeroshot(str(f), f), "transformers cannot load"),
        (
            lambda f, k: zeroshot("x", f, [None], ZeroshotOptions(backend="jax")),
            "backend must be one of open_clip, transformers, got 'jax'",
        ),
        (lambda f, k: zeroshot(tiny_native(), f, []), "at least one setting"),
        (lambda f, k: zeroshot(tiny_native(), f, [None], ZeroshotOptions(templates=("a photo",))), "a prompt needs {c}"),
        (lambda f, k: zeroshot(tiny_native(), f, [None], ZeroshotOptions(classnames="nowhere")), "nowhere does not exist"),
        (lambda f, k: zeroshot(tiny_native(), f / "nowhere"), "does not exist"),
        (
            lambda f, k: zeroshot(tiny_native(), f, [None], options(ZeroshotOptions, model_dtype="int4")),
            "bfloat16, float16, got 'int4'",
        ),
        (lambda f, k: retrieval(tiny_native(), f), "holds 0 files dataset"),
        (lambda f, k: retrieval(tiny_native(), k, [None], RetrievalOptions(split="tset")), "split 'tset'; it has: test, val"),
        (
            lambda f, k: retrieval(tiny_native(), k, [None], RetrievalOptions(recall_k=(0,))),
            "recall_k.0 must be at least 1",
        ),
        (lambda f, k: retrieval(tiny_native(), k, [None], RetrievalOptions(images=str(f))), "none of the 12 images"),
        (
            lambda f, k: retrieval(tiny_native(), k, [None], RetrievalOptions(max_captions=0)),
            "captions must be at least 1, got 0",
        ),
    ],
)
def test_refusals(folder, karpathy, call, message):
    with pytest.raises(vtok.VtokError, match=message):
        call(folder, karpathy)


def test_files_of_another_form(tmp_path):
    for text in ("[", "[]", '{"images": [{"split": "test"}]}', '{"images": [3]}'):
        (tmp_path / "dataset_x.json").write_text(text)
        with pytest.raises(vtok.ConfigError, match="Karpathy's form"):
            open_captions(tmp_path)


def test_models_that_are_no_dual_encoders():
    with pytest.raises(vtok.UnsupportedModelError, match="has no get_image_features"):
        hugging_face_encoder(torch.nn.Linear(2, 2), None, None, "x")
    encoder = tiny_hugging_face("clip")
    odd = hugging_face_encoder(encoder.net, lambda images, return_tensors: {"patches": 1}, Letters(), "naflex")
    with pytest.raises(vtok.UnsupportedModelError, match="naflex takes images as patches"):
        odd.preprocess(photo(0))


def test_too_few_class_names(folder, tmp_path):
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with pytest.raises(
        vtok.ConfigError,
        match=r"the data has 6 classes \(ant, bee, cat, ...\), which of the 2 class names they are is not known; pass",
    ):
        zeroshot(tiny_native(), folder, [None], options(ZeroshotOptions, classnames=str(tmp_path / "names.txt")))


def test_prompts_by_name_and_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("a {c}\n\nthe {c}\n")
    assert templates([str(tmp_path / "prompts.txt"), "my {c}"]) == ["a {c}", "the {c}", "my {c}"]
    assert len(templates(["openai"])) == 80 and len(templates(["simple"])) == 7


def test_classes_count_the_same_however_many_images_they_have():
    hits, labels = np.array([1.0, 1, 1, 1, 0, 1]), np.array([0, 0, 0, 0, 3, 3])
    mean, error = mean_per_class(hits, labels)
    assert mean == 0.75 and error == pytest.approx((0 + 0.5**2) ** 0.5 / 2)


def test_siglip_texts_are_padded_as_in_training():
    for kind, padding in (("siglip", "max_length"), ("clip", "longest")):
        encoder = tiny_hugging_face(kind)
        encoder.encode_text(["ab", "c"])
        words = encoder.tokenizer.__closure__
        assert any(getattr(cell.cell_contents, "padding", None) == padding for cell in words)


def test_the_bundled_pages_and_pictures():
    encoder = tiny_native()
    r = retrieval(encoder, "reference-pages", [None], options(RetrievalOptions, num_samples=20))[0]
    assert (r["dataset"], r["n"], r["num_texts"]) == ("easyvqa_pages", 20, 20)
    r = zeroshot(encoder, "reference-pictures", [None], options(ZeroshotOptions, num_samples=20))[0]
    assert (r["dataset"], r["n"], r["num_classes"], r["num_templates"]) == ("easyvqa", 20, 24, 3)


def test_tables_know_the_tasks():
    assert TASKS.get("retrieval") is retrieval and TASKS.get("zeroshot") is zeroshot
    assert {backend for task in ("retrieval", "zeroshot") for backend in runs.BACKENDS[task]} == {*BACKENDS, "reference"}


@pytest.mark.parametrize("task", ["zeroshot", "retrieval"])
def test_every_record_says_how_it_was_made(task, clip_folder, folder, karpathy, tmp_path):
    evaluate, kind, data = (
        (zeroshot, ZeroshotOptions, folder) if task == "zeroshot" else (retrieval, RetrievalOptions, karpathy)
    )
    own = {"templates": ("my {c}",)} if task == "zeroshot" else {"recall_k": (1, 3)}
    records = evaluate(str(clip_folder), str(data), [None, ("random", {"keep": 0.5})], options(kind, num_samples=8, **own))
    page = repeat(sections([{**record, "path": "results.jsonl"} for record in records])[0], 1)
    assert page.commands == ["vtok run run-1.yaml"] and page.notes == []
    ((name, content),) = page.files
    (tmp_path / name).write_text(content)
    again = runs.load(str(tmp_path / name))
    assert again.num_samples == 8 and again.options == {key: list(value) for key, value in own.items()}
    found = runner.run(again, tmp_path / "again", workers=0).records
    for one, other in zip(found, records):
        shared = set(one["metrics"]) & set(other["metrics"])
        assert {key: one["metrics"][key] for key in shared} == {key: other["metrics"][key] for key in shared}
    assert [one["correct"] for one in found] == [one["correct"] for one in records]
