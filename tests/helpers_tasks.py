"""A few bundled pictures and questions, written as the public data sets distribute theirs."""

import base64
import csv
import io
import json
import pickle
from functools import cache

from vtok.eval.tasks.vqa.data import EASY_VQA
from vtok.eval.tasks.vqa.sources.opening import open_vqa

SUFFIX = "\nAnswer the question using a single word or phrase."
COUNT = 3


@cache
def asked():
    """(image, question, answer) of yes/no and open questions about the first pictures."""
    found, seen = [], {}
    for q in open_vqa(EASY_VQA).questions:
        kinds = seen.setdefault(q.image, {})
        if len(seen) > COUNT:
            break
        kinds.setdefault((q.groups["kind"], q.target if q.groups["kind"] == "yes/no" else ""), q)
    for image, kinds in list(seen.items())[:COUNT]:
        found += [(image, q.text, q.target) for q in kinds.values()]
    return found


def yes_no():
    return [(image, text, answer) for image, text, answer in asked() if answer in ("yes", "no")]


def save_images(folder, name):
    """`name` makes a file name of a number."""
    read = open_vqa(EASY_VQA).read
    for image in dict.fromkeys(image for image, _, _ in asked()):
        path = folder / name(image)
        path.parent.mkdir(parents=True, exist_ok=True)
        read(image).save(path)


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_vqav2(folder):
    save_images(folder, lambda i: f"val2014/COCO_val2014_{i:012d}.jpg")
    rows = list(enumerate(asked(), 1000))
    put(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        {"questions": [{"question_id": n, "image_id": i, "question": q} for n, (i, q, _) in rows]},
    )
    notes = [
        {
            "question_id": n,
            "answer_type": "yes/no" if a in ("yes", "no") else "other",
            "answers": [{"answer": a if k < 8 else "?", "answer_id": k + 1} for k in range(10)],
        }
        for n, (_, _, a) in rows
    ]
    put(folder / "v2_mscoco_val2014_annotations.json", {"annotations": notes})


def write_gqa(folder):
    save_images(folder, lambda i: f"images/n{i}.jpg")
    content = {
        f"20{n}": {
            "imageId": f"n{i}",
            "question": q,
            "answer": a,
            "fullAnswer": f"It is {a}.",
            "types": {"structural": "verify" if a in ("yes", "no") else "query", "semantic": "attr"},
        }
        for n, (i, q, a) in enumerate(asked())
    }
    put(folder / "questions" / "testdev_balanced_questions.json", content)


def write_textvqa(folder):
    save_images(folder, lambda i: f"train_images/{i:016x}.jpg")
    rows = [
        {"question_id": 34602 + n, "image_id": f"{i:016x}", "question": q, "answers": [a] * 9 + ["unanswerable"]}
        for n, (i, q, a) in enumerate(asked())
    ]
    put(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": rows})
    tokens = [{"image_id": row["image_id"], "ocr_tokens": ["HELLO", "x2"]} for row in rows]
    put(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": tokens})


def write_pope(folder):
    save_images(folder, lambda i: f"val2014/COCO_val2014_{i:012d}.jpg")
    for variant in ("adversarial", "popular", "random"):
        lines = [
            {"question_id": n, "image": f"COCO_val2014_{i:012d}.jpg", "text": q, "label": a}
            for n, (i, q, a) in enumerate(yes_no(), 1)
        ]
        put(folder / f"coco_pope_{variant}.json", "\n".join(json.dumps(line) for line in lines) + "\n")


def write_mme(folder):
    """One category with everything side by side, one with folders of its own, one of cognition."""
    for category, images, texts in (
        ("color", "", ""),
        ("celebrity", "images/", "questions_answers_YN/"),
        ("code_reasoning", "", ""),
    ):
        save_images(folder / category, lambda i, images=images: f"{images}{i:04d}.jpg")
        for image in dict.fromkeys(i for i, _, _ in asked()):
            lines = [f"{q} Please answer yes or no.\t{a.capitalize()}" for i, q, a in yes_no() if i == image]
            put(folder / category / f"{texts}{image:04d}.txt", "\n".join(lines) + "\n")


def write_scienceqa(folder):
    problems = {}
    for n, (i, q, a) in enumerate(asked()):
        problems[str(n)] = {
            "question": q,
            "choices": [a, "something else"] if n % 2 else ["something else", a, "neither"],
            "answer": 0 if n % 2 else 1,
            "hint": "Look at the picture." if n % 3 else "",
            "image": "image.png",
            "grade": f"grade{n + 2}",
            "subject": "natural science",
            "split": "test",
        }
        save_one(folder / "test" / str(n) / "image.png", i)
    problems["77"] = {
        "question": "what shape is present?",
        "choices": ["circle", "triangle"],
        "answer": 0,
        "hint": "",
        "image": None,
    }
    put(folder / "problems.json", problems)
    put(folder / "pid_splits.json", {"train": [], "test": ["77", *(n for n in problems if n != "77")]})


def save_one(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    open_vqa(EASY_VQA).read(image).save(path)


def write_docvqa(folder):
    save_images(folder, lambda i: f"documents/page{i}_1.png")
    rows = [
        {
            "questionId": 49153 + n,
            "question": q,
            "image": f"documents/page{i}_1.png",
            "docId": i,
            "answers": [a.capitalize(), f"a {a}"],
            "question_types": ["layout"],
        }
        for n, (i, q, a) in enumerate(asked())
    ]
    put(folder / "val_v1.0_withQT.json", {"dataset_split": "val", "data": rows})


def write_chartqa(folder):
    save_images(folder, lambda i: f"test/png/{i}.png")
    rows = [{"imgname": f"{i}.png", "query": q, "label": a} for i, q, a in asked()]
    put(folder / "test" / "test_human.json", rows[::2])
    put(folder / "test" / "test_augmented.json", rows[1::2])


def box_of(number):
    """[x, y, width, height] in pixels of a picture of 64 x 64."""
    return [4.0 + number, 8.0, 32.0, 16.0]


def write_refcoco(folder):
    """Two sentences about the first thing, one about every other; one reference of another split."""
    save_images(folder, lambda i: f"train2014/COCO_train2014_{i:012d}.jpg")
    images = list(dict.fromkeys(i for i, _, _ in asked()))
    refs = [
        {
            "ref_id": 100 + n,
            "ann_id": 200 + n,
            "image_id": i,
            "split": "val" if n else "testA",
            "sentences": [{"sent": f"the thing {n} {k}", "raw": "", "sent_id": k} for k in range(1 + (n == 1))],
        }
        for n, i in enumerate([images[0], *images])
    ]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    coco = {
        "images": [{"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "width": 64, "height": 64} for i in images],
        "annotations": [{"id": ref["ann_id"], "bbox": box_of(n)} for n, ref in enumerate(refs)],
    }
    put(folder / "instances.json", coco)


def write_ocrbench(folder):
    save_images(folder, lambda i: f"svt/image/img_{i:04d}.png")
    rows = [
        {
            "dataset_name": "svt",
            "id": n,
            "image_path": f"svt/image/img_{i:04d}.png",
            "question": q,
            "answers": [a.upper(), "?"] if n % 2 else a.upper(),
            "type": "Regular Text Recognition" if n % 2 else "Doc-oriented VQA",
        }
        for n, (i, q, a) in enumerate(asked())
    ]
    put(folder / "OCRBench.json", rows)


def write_vizwiz(folder):
    rows = []
    for n, (i, q, a) in enumerate(asked()):
        save_one(folder / "val" / f"VizWiz_val_{n:08d}.jpg", i)
        answers = [{"answer": a if k < 8 else "unanswerable", "answer_confidence": "yes"} for k in range(10)]
        kind = "yes/no" if a in ("yes", "no") else "other"
        rows.append({"image": f"VizWiz_val_{n:08d}.jpg", "question": q, "answers": answers, "answer_type": kind})
    put(folder / "val.json", rows)


def write_seedbench(folder):
    """The last question is about a video."""
    for image in dict.fromkeys(i for i, _, _ in asked()):
        path = folder / "SEED-Bench-image" / f"{image}_77"
        path.parent.mkdir(parents=True, exist_ok=True)
        open_vqa(EASY_VQA).read(image).save(path, "PNG")
    rows = [
        {
            "question_id": str(n),
            "question": q,
            **dict(zip(("choice_a", "choice_b", "choice_c", "choice_d"), (a, "one", 2, "three"))),
            "answer": "A",
            "data_type": "image",
            "data_id": f"{i}_77",
            "question_type_id": 1 + n % 2,
        }
        for n, (i, q, a) in enumerate(asked())
    ]
    video = {**rows[0], "question_id": "v", "data_type": "video", "data_id": "123.webm"}
    put(
        folder / "SEED-Bench.json",
        {"questions": [*rows, video], "question_type": {"Scene Understanding": 1, "Instance Identity": 2}},
    )


def mmbench_rows():
    """Every question twice, its choices rotated; the second has no picture of its own."""
    rows = []
    for n, (i, q, a) in enumerate(asked()):
        common = {"question": q, "hint": "Look." if n % 2 else "", "category": f"kind {n % 2}", "l2-category": "perception"}
        rows.append({"index": n, **common, "A": a, "B": "one", "C": "", "D": "", "answer": "A", "image": i})
        rows.append({"index": n + 10**6, **common, "A": "one", "B": a, "C": "", "D": "", "answer": "B", "image": None})
    return rows


def write_mmbench(folder):
    read = open_vqa(EASY_VQA).read
    with open(folder / "mmbench_dev_20230712.tsv", "w", encoding="utf-8", newline="") as file:
        out = csv.DictWriter(file, list(mmbench_rows()[0]), delimiter="\t")
        out.writeheader()
        for row in mmbench_rows():
            image = str(row["index"] % 10**6)
            if row["image"] is not None:
                read(row["image"]).save(held := io.BytesIO(), "PNG")
                image = base64.b64encode(held.getvalue()).decode()
            out.writerow({**row, "image": image})


WRITERS = {
    "chartqa": write_chartqa,
    "docvqa": write_docvqa,
    "gqa": write_gqa,
    "mmbench": write_mmbench,
    "mme": write_mme,
    "ocrbench": write_ocrbench,
    "pope": write_pope,
    "refcoco": write_refcoco,
    "scienceqa": write_scienceqa,
    "scienceqa_img": write_scienceqa,
    "seedbench": write_seedbench,
    "textvqa": write_textvqa,
    "vizwiz": write_vizwiz,
    "vqav2": write_vqav2,
}


def written(task, folder):
    """The folder with a task's data in it."""
    folder.mkdir(parents=True, exist_ok=True)
    WRITERS[task](folder)
    return folder
