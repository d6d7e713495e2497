"""Which class of a model a folder of images is: labels are the model's own, whatever the folder lacks, or there are none.

The models here are right about every picture: a score below 100 % says that labels have moved.
"""

import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import vtok
from vtok.eval.tasks.class_folders import ClassFolders, labels_for, read_class_map, wordnet_ids
from vtok.eval.tasks.clip.zeroshot import ZeroshotOptions, _names
from vtok.eval.tasks.image_folder import open_dataset
from vtok.eval.tasks.imagenet import evaluate, folder_labels
from vtok.eval.tasks.timm_pipeline import Options

NUMBERS = (0, 217, 482)
IDS = ("n01440764", "n02102040", "n02979186")  # ImageNet's classes of these numbers


def picture(shade):
    return Image.fromarray(np.full((40, 40, 3), (shade * 20, 255 - shade * 20, (shade * 77) % 255), dtype=np.uint8))


def knowing(labels, outputs):
    """A model that says `labels[i]` about `picture(i)`."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=outputs, img_size=32, depth=1).eval()
    transform = create_transform(**{**resolve_data_config({}, model=model), "input_size": (3, 32, 32)})
    with torch.no_grad():
        shown = torch.stack([transform(picture(i)) for i in range(len(labels))])
        features = model.forward_head(model.forward_features(shown), pre_logits=True)
        middle = features.mean(0)
        weight = torch.linalg.pinv(features - middle).T
        model.head.weight.zero_()
        model.head.bias.fill_(-99.0)
        model.head.weight[list(labels)] = weight
        model.head.bias[list(labels)] = -(weight @ middle)
    return model


@pytest.fixture(scope="module")
def six():
    return knowing(range(6), 6)


@pytest.fixture(scope="module")
def thousand():
    return knowing(NUMBERS, 1000)


def folders(root, shades, empty=()):
    for name, shade in shades.items():
        (root / name).mkdir(parents=True)
        for i in range(2):
            picture(shade).save(root / name / f"{i}.png")
    for name in empty:
        (root / name).mkdir(parents=True)
    return root


def top1(model, root, **extra):
    (record,) = evaluate(model, root, [None], Options(workers=0, batch_size=8, **extra))
    return record["top1"], record["n"], record["notes"]


ORDER = "nothing names its 6 classes among the model's 6 outputs that count: they are taken in their natural order"
SIX = {f"class{i}": i for i in range(6)}


@pytest.mark.parametrize(
    ("shades", "empty", "note"),
    [
        (SIX, (), ORDER),
        ({f"{name}/images": i for name, i in SIX.items()}, (), ORDER),
        ({f"group/{name}/deep/images": i for name, i in SIX.items()}, (), ORDER),
        ({f"group{i % 2}/{name}": i for name, i in SIX.items()}, (), ORDER),
        ({name: i for name, i in SIX.items() if i != 2}, ("class2",), "1 folders hold no image: class2"),
        ({f"{name}/images": i for name, i in SIX.items() if i != 2}, ("class2/images",), "1 folders hold no image: class2"),
        ({name: i for name, i in SIX.items() if i != 2}, (), "refused"),
        ({**{name: i for name, i in SIX.items() if i < 5}, ".ipynb_checkpoints": 0}, (), "refused"),
        ({**SIX, ".ipynb_checkpoints": 0, "__MACOSX/class1": 3}, (), ORDER),
        ({**SIX, "class1/thumbnails": 1}, (), ORDER),
        ({**SIX, "class6": 0}, (), "the data has label 6"),
        ({**SIX}, ("notes",), ORDER),
        ({str(i): i for i in range(6)}, (), None),
        ({str(i): i for i in (0, 3, 5)}, (), "some of the model's 6 outputs that count, by the numbers"),
        ({str(i): i for i in (1, 3, 5)}, (), "refused"),  # from 0 or from 1 on?
        ({**SIX, "train/class1": 1}, (), "two folders class1, class1 and train/class1"),
    ],
)  # fmt: skip
def test_labels_are_the_models_or_none(six, tmp_path, shades, empty, note):
    root = folders(tmp_path, shades, empty)
    if note is not None and not note.startswith(("1 folders", "some of", "nothing names")):
        words = r"which of the model's 6 outputs that count they are is not known" if note == "refused" else note
        with pytest.raises(vtok.ConfigError, match=words):
            top1(six, root)
        return
    score, n, notes = top1(six, root)
    assert score == 100 and n == 2 * sum(not name.startswith((".", "__")) for name in shades)
    assert notes == [] if note is None else note in notes[0]


def test_subsets_of_imagenet_by_their_ids(thousand, tmp_path):
    root = folders(tmp_path / "some", {name: i for i, name in enumerate(IDS)})
    score, _, notes = top1(thousand, root)
    assert score == 100 and "its 3 classes are some of the model's 1000 outputs" in notes[0] and "valid_labels" in notes[0]
    (tmp_path / "valid.txt").write_text("482\n0\n217\n")  # in whatever order
    assert top1(thousand, root, valid_labels=str(tmp_path / "valid.txt")) == (100, 6, [])
    with pytest.raises(vtok.ConfigError, match=r"3 classes \(n01440764, n02102040, n99999999\), which of the model's 1000"):
        top1(thousand, folders(tmp_path / "other", {name: i for i, name in enumerate((*IDS[:2], "n99999999"))}))
    numbered = folders(tmp_path / "numbers", {str(number): i for i, number in enumerate(NUMBERS)})
    assert top1(thousand, numbered)[0] == 100


def test_ids_are_timms():
    ids = wordnet_ids(1000)
    assert [ids.index(name) for name in IDS] == list(NUMBERS) and len(wordnet_ids(21841)) == 21841 and wordnet_ids(7) == ()


def test_names_that_a_model_brings(six, tmp_path):
    root = folders(tmp_path, {"kiwi": 4, "apple": 1})
    six.pretrained_cfg["label_names"] = ["fig", "apple", "plum", "pear", "kiwi", "lime"]
    try:
        score, _, notes = top1(six, root)
    finally:
        del six.pretrained_cfg["label_names"]
    assert score == 100 and "found by name" in notes[0]


def test_a_class_map_with_a_byte_order_mark(six, tmp_path):
    root = folders(tmp_path / "data", {"kiwi": 0, "apple": 1})
    (tmp_path / "map.txt").write_text("\ufeffkiwi\napple\n", encoding="utf-8")
    assert top1(six, root, class_map=str(tmp_path / "map.txt")) == (100, 4, [])


def test_images_beside_the_classes_are_told(six, tmp_path):
    root = folders(tmp_path, SIX)
    picture(0).save(root / "overview.png")
    (record,) = evaluate(six, root, [None], Options(workers=0))
    assert (record["top1"], record["n"]) == (100, 12)
    assert record["skipped"] == [{"file": "overview.png", "reason": "it lies beside the folders of the classes"}]


def test_the_split_is_looked_for(six, tmp_path):
    folders(tmp_path / "val", SIX)
    folders(tmp_path / "train", {name: 5 - i for name, i in SIX.items()})
    assert top1(six, tmp_path)[0] == 100
    with pytest.raises(vtok.ConfigError, match="has two folders class0"):
        top1(six, tmp_path, split="test")


def test_archives_are_held_to_the_same(thousand, six, tmp_path):
    folders(tmp_path / "some", {name: i for i, name in enumerate(IDS)})
    with tarfile.open(tmp_path / "some.tar", "w") as archive:
        archive.add(tmp_path / "some", "some")
    assert top1(thousand, tmp_path / "some.tar")[0] == 100
    with pytest.raises(vtok.ConfigError, match="which of the model's 6 outputs"):
        top1(six, tmp_path / "some.tar")


def test_the_order_of_images_is_timms(tmp_path):
    root = folders(tmp_path, {f"class{i}": i for i in (2, 10, 1)})
    ours, theirs = ClassFolders(str(root)), timm.data.create_dataset("", root=str(root)).reader
    assert ours.samples == theirs.samples and ours.class_to_idx == theirs.class_to_idx


def test_links_that_lead_back(tmp_path):
    root = folders(tmp_path, {"a": 0, "b": 1})
    (root / "a" / "again").symlink_to(root)
    assert len(ClassFolders(str(root))) == 4


def test_labels_for_a_search(thousand, six, tmp_path):
    data = open_dataset(str(folders(tmp_path / "some", {name: i for i, name in enumerate(IDS)})), "", "", "", "RGB", None)
    assert folder_labels(data, thousand) and sorted(data.relabel.values()) == list(NUMBERS)
    assert not folder_labels(data, six)


def test_names_that_stand_twice_are_refused():
    with pytest.raises(vtok.ConfigError, match="x hold a twice"):
        labels_for({"a": 0, "b": 1}, (), 2, [["a", "a", "b"]], "x", "y")
    found, note = labels_for({"c": 0, "d": 1}, (), 2, [["a", "a", "b"]], "x", "y")
    assert found == {0: 0, 1: 1} and "taken in their natural order" in note


def test_one_name_that_is_spelled_otherwise_is_refused():
    """By order it would have moved the others too."""
    with pytest.raises(vtok.ConfigError, match="2 of the data's 3 classes are found among x by name, but yellow is not; mend"):
        labels_for({"blue": 0, "red": 1, "yellow": 2}, (), 3, [["red", "yelow", "blue"]], "x", "pass class_map")


def test_an_order_that_decides_is_noted():
    assert labels_for({"0": 0, "1": 1}, (), 2, [["dog", "cat"]], "x", "y") == ({0: 0, 1: 1}, "")
    assert "nothing names its 2 classes among x" in labels_for({"a": 0, "b": 1}, (), 2, [], "x", "y")[1]


def names_of(root, **extra):
    data = open_dataset(str(root), "", "", extra.get("class_map", ""), "RGB", None)
    names, notes = _names(data, ZeroshotOptions(**extra))
    return [names[data.relabel.get(label, label)] for _, label in data.inner.samples][::2], notes


def test_names_for_a_text_encoder(tmp_path):
    pytest.importorskip("open_clip")
    some = folders(tmp_path / "some", {name: i for i, name in enumerate(IDS)})
    expected = ["tench", "English Springer Spaniel", "cassette player"]
    assert [name.lower() for name in names_of(some)[0]] == [name.lower() for name in expected]
    by_number, notes = names_of(some, classnames="imagenet")
    assert by_number == names_of(some)[0] and "its 3 classes are some of the 1000 class names" in notes[0]
    numbered = folders(tmp_path / "numbers", {str(number): i for i, number in enumerate(NUMBERS)})
    assert names_of(numbered, classnames="imagenet")[0] == by_number
    with pytest.raises(vtok.ConfigError, match=r"the folders are numbers \(0, 217, 482, ...\), which say nothing"):
        names_of(numbered)
    with pytest.raises(vtok.ConfigError, match="n99999999 is none of ImageNet's 1,000 classes"):
        names_of(folders(tmp_path / "other", {"n99999999": 0, IDS[0]: 1}))
    plain = folders(tmp_path / "plain", {"sea_lion": 0, "cat": 1})
    assert names_of(plain)[0] == ["cat", "sea lion"]
    with pytest.raises(vtok.ConfigError, match=r"2 classes \(cat, sea_lion\), which of the 1000 class names"):
        names_of(plain, classnames="imagenet")


def test_class_names_in_another_order_than_the_folders(tmp_path):
    plain = folders(tmp_path / "plain", {"sea_lion": 0, "cat": 1})
    (tmp_path / "names.txt").write_text("\ufeffsea lion\ncat\n", encoding="utf-8")
    assert names_of(plain, classnames=str(tmp_path / "names.txt"))[0] == ["cat", "sea lion"]
    (tmp_path / "names.json").write_text(json.dumps(["dog", "sea lion", "cat"]))
    assert names_of(plain, classnames=str(tmp_path / "names.json"))[0] == ["cat", "sea lion"]
    (tmp_path / "names.json").write_text(json.dumps(["gatto", "leone marino"]))  # as many, in the order of the folders
    assert names_of(plain, classnames=str(tmp_path / "names.json"))[0] == ["gatto", "leone marino"]
    for wrong, words in ((["dog", "x", "y"], "which of the 3 class names"), ({"a": 1}, "must hold a list of texts")):
        (tmp_path / "names.json").write_text(json.dumps(wrong))
        with pytest.raises(vtok.ConfigError, match=words):
            names_of(plain, classnames=str(tmp_path / "names.json"))


def test_a_pickled_class_map_holds_plain_values_alone(tmp_path):
    (tmp_path / "map.pkl").write_bytes(pickle.dumps({"cat": 1, "dog": 0}))
    assert read_class_map("map.pkl", str(tmp_path)) == {"cat": 1, "dog": 0}
    (tmp_path / "code.pkl").write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(vtok.ConfigError, match=r"code.pkl cannot be read: UnpicklingError it holds posix\.getcwd"):
        read_class_map(str(tmp_path / "code.pkl"), "")
