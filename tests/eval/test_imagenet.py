"""Accuracy on an image folder, against a loop written here; files that cannot be read; timm's flags and fields."""

import io
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import vtok
from vtok.eval.common.settings import Setting
from vtok.eval.common.statistics import paired_difference
from vtok.eval.models.reference import FashionViT
from vtok.eval.report.html.repeat import repeat
from vtok.eval.report.sections import sections
from vtok.eval.runs import loader as runs
from vtok.eval.runs import runner
from vtok.eval.tasks import TASKS
from vtok.eval.tasks.image_folder import CheckedImages, Unreadable, collate
from vtok.eval.tasks.imagenet import evaluate
from vtok.eval.tasks.scoring import Scorer
from vtok.eval.tasks.timm_pipeline import Options, data_config

CLASSES = ("ant", "bee", "cat")
PER_CLASS = 6
BROKEN = {"bee/truncated.jpg", "cat/text.jpg"}
TIMM_FIELDS = {"model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation"}


def photo(seed):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((90, 75), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """18 images of 3 classes, named as ImageNet's; a truncated JPEG, a text file called .jpg and one called .txt."""
    root = tmp_path_factory.mktemp("images")
    number = 0
    for name in CLASSES:
        (root / name).mkdir()
        for _ in range(PER_CLASS):
            number += 1
            photo(number).save(root / name / f"ILSVRC2012_val_{number:08d}.JPEG", quality=95)
    data = io.BytesIO()
    photo(99).save(data, "JPEG")
    (root / "bee" / "truncated.jpg").write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
    (root / "cat" / "text.jpg").write_text("not an image")
    (root / "cat" / "notes.txt").write_text("no image at all")
    return root


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, depth=4, num_classes=7).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(6)  # attention sharp enough that images keep different numbers of tokens
    model.pretrained_cfg["label_names"] = [*CLASSES, "dog", "elk", "fox", "gnu"]
    return model


def options(**extra):
    return Options(**{"workers": 0, "batch_size": 4, "class_map": "", **extra})


def plain_loop(model, folder, valid=None):
    """(predictions, labels, top-5 hits) of all readable images, one by one, in timm's order."""
    config = resolve_data_config({"input_size": (3, 64, 64)}, model=model)
    transform = create_transform(**config)
    predictions, labels, top5 = [], [], []
    for label, name in enumerate(CLASSES):
        for path in sorted((folder / name).glob("*.JPEG")):
            with torch.no_grad():
                logits = model(transform(Image.open(path).convert("RGB"))[None])[0]
            if valid is not None:
                logits = logits[valid]
            predictions.append(int(logits.argmax()))
            labels.append(label)
            top5.append(label in logits.argsort(descending=True)[:5])
    return np.array(predictions), np.array(labels), np.array(top5)


@pytest.fixture(scope="module")
def records(model, folder):
    return evaluate(
        model, folder, [None, ("tome", {"r": 8}), ("ats", {"num_tokens": 30}), Setting("tome", {"r": 0})], options()
    )


def test_agrees_with_a_plain_loop(records, model, folder):
    predictions, labels, top5 = plain_loop(model, folder)
    first = records[0]
    assert first["n"] == 18
    assert first["top1"] == round(100 * (predictions == labels).mean(), 4)
    assert first["top5"] == round(100 * top5.mean(), 4)
    assert first["metrics"]["top1_stderr"] == pytest.approx(100 * (predictions == labels).std(ddof=1) / 18**0.5)
    with vtok.patched(model, "tome", r=8):
        predictions, _, _ = plain_loop(model, folder)
    assert records[1]["top1"] == round(100 * (predictions == labels).mean(), 4)


def test_differences_are_paired(records, model, folder):
    before, labels, _ = plain_loop(model, folder)
    with vtok.patched(model, "tome", r=8):
        after, _, _ = plain_loop(model, folder)
    difference = (after == labels).astype(float) - (before == labels)
    paired = records[1]["metrics"]
    assert paired["difference"] == pytest.approx(100 * difference.mean())
    assert paired["difference_stderr"] == pytest.approx(100 * difference.std(ddof=1) / 18**0.5)
    assert paired["agreement"] == pytest.approx(100 * (before == after).mean())
    low, high = paired["difference_ci"]
    assert low < paired["difference"] < high
    assert set(records[0]["metrics"]) == {"top1", "top1_stderr", "top1_ci", "top5"}
    ends = paired_difference(np.zeros(18)).scaled(100).ends  # nothing changed: as far as 18 images can tell
    same = {"difference": 0, "difference_stderr": 0, "difference_ci": ends, "agreement": 100}
    assert records[3]["metrics"] == {**records[0]["metrics"], **same}


def test_fields_of_timm_and_our_own(records, model):
    for r in records:
        assert set(r) >= TIMM_FIELDS
        assert r["top1"] + r["top1_err"] == pytest.approx(100) == r["top5"] + r["top5_err"]
        assert r["param_count"] == round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
        assert (r["img_size"], r["crop_pct"], r["interpolation"]) == (64, 0.9, "bicubic")
        assert (r["model"], r["backend"], r["device"], r["dtype"]) == ("vit_tiny_patch16_224", "timm", "cpu", "float32")
        assert r["gflops"]["model"] == 2 * r["gmacs"]["model"]
    assert json.loads(json.dumps(records)) == records
    assert [r["method"] for r in records] == ["unpatched", "tome", "ats", "tome"]
    assert records[1]["params"] == {"r": 8, "prop_attn": True} and records[0]["params"] == {}
    assert records[1]["tokens"] == {"in": 65, "out": 33, "mean_per_layer": [57, 49, 41, 33]}
    assert records[1]["gmacs"]["model"] == vtok.plan(model, "tome", r=8).estimate.macs / 1e9


def test_tokens_of_adaptive_methods_are_means_over_all_images(records, model, folder):
    kept = []
    with vtok.patched(model, "ats", num_tokens=30):
        config = data_config(model, options())
        transform = create_transform(**config)
        for path in sorted(folder.glob("*/*.JPEG")):
            with torch.no_grad():
                model(transform(Image.open(path).convert("RGB"))[None])
            kept.append(vtok.info(model).towers[0].blocks[-1].mean_tokens)
    assert len(set(kept)) > 1
    assert records[2]["tokens"]["out"] == pytest.approx(np.mean(kept))
    assert records[2]["implied_speedup"] > records[0]["implied_speedup"] == 1


def test_unreadable_files_are_left_out_and_named(records):
    for r in records:
        skipped = {one["file"]: one["reason"] for one in r["skipped"]}
        assert set(skipped) == BROKEN | {"cat/notes.txt"}
        assert r["num_skipped"] == 3
        assert "truncated" in skipped["bee/truncated.jpg"]
        assert "cannot identify" in skipped["cat/text.jpg"]
        assert skipped["cat/notes.txt"] == "not an image extension: .txt"


def test_workers_and_batches_change_nothing(records, model, folder):
    seen = []
    (r,) = evaluate(model, folder, [None], options(workers=2, batch_size=3), progress=lambda *p: seen.append(p))
    differ = ("batch_size", "samples_per_sec", "step_time_ms", "throughput")
    assert {k: v for k, v in r.items() if k not in differ} == {k: v for k, v in records[0].items() if k not in differ}
    assert seen[-1] == (20, 20)  # unreadable files count as done


def test_a_folder_without_a_readable_image(model, tmp_path):
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "x.jpg").write_text("nothing")
    with pytest.raises(vtok.ConfigError, match=r"none of the 1 files .* ant/x.jpg: the picture cannot be read .* identify"):
        evaluate(model, tmp_path, [None], options())


def test_a_batch_of_markers():
    batch = collate([Unreadable("a", "b")])
    assert batch.images is None and batch.rows == [] and batch.skipped == [("a", "b")]


def test_class_map_by_name(records, model, folder, tmp_path):
    names = tmp_path / "classes.txt"
    names.write_text("cat\nbee\n")
    (r,) = evaluate(model, folder, [None], options(class_map=str(names)))
    predictions, labels, _ = plain_loop(model, folder)
    kept = labels != 0
    assert r["n"] == 12 and r["notes"] == []
    assert r["top1"] == round(100 * (predictions == np.array([-1, 1, 0])[labels])[kept].mean(), 4)
    reasons = {one["file"]: one["reason"] for one in r["skipped"]}
    assert reasons["ant/ILSVRC2012_val_00000001.JPEG"] == "its folder is not in the class map"
    assert records[0]["notes"] == ["its 3 classes are some of the model's 7 outputs that count, found by name"]


def test_real_labels(model, folder, tmp_path):
    predictions, _, _ = plain_loop(model, folder)
    sets = [[int(p), 6] for p in predictions[:9]] + [[] for _ in range(4)] + [[(int(p) + 1) % 7] for p in predictions[13:]]
    path = tmp_path / "real.json"
    path.write_text(json.dumps(sets))
    (r,) = evaluate(model, folder, [None], options(real_labels=str(path)))
    assert (r["n"], r["labels"]) == (14, "real")
    assert r["top1"] == round(100 * 9 / 14, 4)
    assert r["notes"] == []


def test_bundled_real_labels():
    real = Scorer.load(real_labels="timm").real
    assert len(real) == 50000 and real[0] == () and real[1] == (970, 795)


def test_valid_labels(model, folder, tmp_path):
    path = tmp_path / "valid.txt"
    path.write_text("6\n2\n4\n")
    (r,) = evaluate(model, folder, [None], options(valid_labels=str(path)))
    predictions, labels, _ = plain_loop(model, folder, valid=[6, 2, 4])
    assert r["top1"] == round(100 * (predictions == labels).mean(), 4)
    assert r["top5"] == 100 and r["notes"] == []  # three outputs: all of them are among the top five


def test_real_labels_speak_of_the_models_outputs():
    scores = Scorer(valid=(6, 2), real=((6,), (2,))).score(
        torch.tensor([[0.0, 9, 0, 0, 0, 0, 1], [0.0, 9, 0, 0, 0, 0, 1]]),
        torch.tensor([0, 0]),
        ["ILSVRC2012_val_00000001.JPEG", "x/ILSVRC2012_val_00000002.JPEG"],
    )
    assert scores.top1.tolist() == [True, False] and scores.prediction.tolist() == [6, 6]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"valid_labels": "7"}, "valid labels must name"),
        ({"valid_labels": "0 1"}, "the data has label 2"),
        ({"valid_labels": "a"}, "one output number a line"),
        ({"real_labels": "{"}, "must be a JSON list"),
        ({"real_labels": "[[1]]"}, "ILSVRC2012_val_00000002.JPEG is none of these"),
        ({"real_labels": "[3]"}, "must be a JSON list"),
    ],
)
def test_label_files_that_do_not_fit(model, folder, tmp_path, extra, message):
    ((key, text),) = extra.items()
    path = tmp_path / "labels"
    path.write_text("\n".join(text.split()))
    with pytest.raises(vtok.ConfigError, match=message):
        evaluate(model, folder, [None], options(**{key: str(path)}))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"img_size": 32}, "was built for \\(3, 64, 64\\), the flags ask for \\(3, 32, 32\\)"),
        ({"class_map": "nowhere.txt"}, "neither a file nor"),
        ({"valid_labels": "nowhere"}, "labels nowhere does not exist"),
        ({"model_dtype": "int4"}, "model_dtype must be one of float32, bfloat16, float16, got 'int4'"),
        ({"dataset": "tfds/x"}, "tfds/x is a stream"),
        ({"dataset": "nope"}, "unknown data set 'nope'; write TYPE/NAME with a TYPE of hfds, torch"),
        ({"dataset": "nope/imagenet"}, "unknown data set 'nope/imagenet'; write TYPE/NAME"),
        ({"dataset": "torch/nonsense"}, "timm cannot open torch/nonsense: Unknown torchvision dataset"),
    ],
)
def test_flags_that_do_not_fit(model, folder, extra, message):
    with pytest.raises(vtok.ConfigError, match=message):
        evaluate(model, folder, [None], options(**extra))


def test_refusals(model, folder, tmp_path):
    with pytest.raises(vtok.ConfigError, match="does not exist"):
        evaluate(model, tmp_path / "nowhere", [None], options())
    with pytest.raises(vtok.ConfigError, match="at least one setting"):
        evaluate(model, folder, [], options())
    with pytest.raises(
        vtok.UnknownNameError, match="unknown timm model 'vit_tinny_patch16_224'; did you mean 'vit_tiny_patch16_224'"
    ):
        evaluate("vit_tinny_patch16_224", folder, [None], options(pretrained=False))
    with pytest.raises(vtok.ConfigError, match=r"checkpoint nowhere.pt does not exist"):
        evaluate("vit_tiny_patch16_224", folder, [None], options(checkpoint="nowhere.pt"))
    with pytest.raises(vtok.ConfigError, match="unexpected keyword argument 'nonsense'"):
        evaluate("vit_tiny_patch16_224", folder, [None], options(pretrained=False, model_kwargs={"nonsense": 1}))
    with pytest.raises(vtok.ConfigError, match="unpatched"), vtok.patched(model, "tome", r=8):
        evaluate(model, folder, [None], options())
    with pytest.raises(vtok.ConfigError, match="no classifier"):
        evaluate("vit_tiny_patch16_224", folder, [None], options(pretrained=False, num_classes=0))


def test_a_model_without_a_tower_is_refused_before_anything_runs(folder):
    net = timm.create_model("resnet10t", num_classes=len(CLASSES)).eval()
    net.register_forward_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(vtok.UnsupportedModelError, match="supported"):
        evaluate(net, folder, [None], options())


def test_a_model_by_name_with_its_flags(folder):
    kwargs = {"img_size": 32, "patch_size": 8, "depth": 2}
    flags = options(pretrained=False, num_classes=3, gp="avg", model_kwargs=kwargs, num_samples=5, crop_pct=1.0)
    first, second = evaluate("vit_tiny_patch16_224", folder, [None, "pitome"], flags)
    assert first["model"] == "vit_tiny_patch16_224"
    assert (first["img_size"], first["crop_pct"], first["n"] + first["num_skipped"] - 1) == (32, 1.0, 5)
    assert second["tokens"]["in"] == 17 and second["metrics"]["agreement"] <= 100


def test_every_record_says_how_it_was_made(folder, tmp_path):
    kwargs = {"img_size": 32, "patch_size": 8, "depth": 2}
    flags = options(pretrained=False, num_classes=3, model_kwargs=kwargs, num_samples=7, crop_pct=1.0, seed=3)
    records = evaluate("vit_tiny_patch16_224", folder, [None, ("tome", {"r": 2}), ("random", {"flops": 0.7})], flags)
    page = repeat(sections([{**record, "path": "results.jsonl"} for record in records])[0], 1)
    assert page.commands == ["vtok run run-1.yaml --no-pretrained"] and page.notes == []
    ((name, content),) = page.files
    (tmp_path / name).write_text(content)
    again = runs.load(str(tmp_path / name))
    assert {setting.title for setting in again.settings} == {"tome(r=2)", "random(flops=0.7)"} and again.num_samples == 7
    found = runner.run(again, tmp_path / "again", pretrained=False, workers=0).records
    hits = {one["setting"]: (one["metrics"]["top1"], one["correct"]) for one in found}
    assert hits == {one["setting"]: (one["metrics"]["top1"], one["correct"]) for one in records}
    alone = repeat(sections([{**records[0], "path": "results.jsonl"}])[0], 1)
    assert "keeps all tokens" in alone.notes[0]
    (tmp_path / "alone.yaml").write_text(alone.files[0][1])
    assert runs.load(str(tmp_path / "alone.yaml")).settings[0].title == "uniform(keep=1)"


def test_a_model_that_has_no_name_cannot_be_named(records):
    assert all("config" not in record for record in records)
    old = [{name: value for name, value in record.items() if name != "backend"} for record in records]
    page = repeat(sections([{**record, "path": "results.jsonl"} for record in old])[0], 1)
    assert page.commands == [] and page.notes[-1] == "the records do not say how they were made"


def test_grey_images_half_precision_and_autocast(folder, tmp_path):
    model = FashionViT(depth=2).build().train()
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    shared = {"num_samples": 4, "channels_last": True, "class_map": str(tmp_path / "classes.txt")}
    bf16, amp = (
        evaluate(model, folder, [None, ("tome", {"r": 8})], options(**shared, **extra))[1]
        for extra in ({"model_dtype": "bfloat16"}, {"amp": True, "amp_dtype": "bfloat16"})
    )
    assert (bf16["dtype"], amp["dtype"]) == ("bfloat16", "bfloat16 autocast")
    assert bf16["img_size"] == 28 and bf16["tokens"]["in"] == 197
    assert model.training and next(model.parameters()).dtype is torch.float32 and not vtok.info(model).patched


def test_sizes_are_the_models_own():
    dynamic = timm.create_model("vit_tiny_patch16_224", num_classes=2, dynamic_img_size=True)
    assert data_config(dynamic, Options(img_size=96))["input_size"] == (3, 96, 96)
    assert data_config(dynamic, Options())["input_size"] == (3, 224, 224)
    assert data_config(FashionViT(depth=1).build(), Options())["mean"] == pytest.approx((0.449,), abs=1e-3)


def test_torchvision_datasets_are_read_too(folder):
    class Pairs:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1:
                raise OSError("bad sector")
            return photo(index), index

    data = CheckedImages(Pairs(), "L")
    data.transform = lambda image: torch.from_numpy(np.array(image))
    batch = collate([data[i] for i in range(3)])
    assert batch.labels.tolist() == [0, 2] and batch.rows == [0, 2] and batch.images.shape == (2, 75, 90)
    assert batch.skipped == [Unreadable("image 1", "OSError: bad sector")]
    assert data.class_to_idx is None


def test_samples_are_spread_evenly(folder):
    data = CheckedImages(list(range(100)), "RGB", num_samples=4)
    assert data.indices == [0, 25, 50, 75]
    assert len(CheckedImages(list(range(3)), "RGB", num_samples=9)) == 3


def test_task_table():
    assert "imagenet" in TASKS and TASKS.get("imagenet") is evaluate
    with pytest.raises(vtok.UnknownNameError, match="did you mean 'imagenet'"):
        TASKS.get("imagnet")
