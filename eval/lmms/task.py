"""What it takes to try lmms-eval without a download: the bundled LLaVA with a chat template, and easy-VQA as a local task.

`python -m vtok.eval.lmms.task FOLDER` writes both and says how to go on. The folder `task` shows all that lmms-eval needs for
questions of one's own: a YAML file and the questions as parquet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from vtok.eval.common.pictures import open_picture
from vtok.eval.models.reference_vlm import save_folder
from vtok.eval.models.vlm import REFERENCE_LLAVA, load_vlm
from vtok.eval.tasks.vqa.data import EASY_VQA, VQAData
from vtok.eval.tasks.vqa.metrics import exact_match
from vtok.eval.tasks.vqa.sources.opening import open_vqa
from vtok.writing import write

TASK = "vtok_easy_vqa"
MODEL_FOLDER, TASK_FOLDER = "model", "task"
COUNT = 200
# The prompt that the bundled models were trained on; content is text, or parts of text and images.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)
_FUNCTIONS = ("doc_to_visual", "doc_to_text", "doc_to_target", "process_results")


def write_model(folder: Path, name: str = REFERENCE_LLAVA) -> Path:
    """Writes a bundled model, "reference-llava" or "reference-llava-next", with a chat template; returns the folder."""
    model = load_vlm(name)
    model.processor.chat_template = model.processor.tokenizer.chat_template = CHAT_TEMPLATE
    save_folder(folder, model.net, model.processor)
    return folder


def write_task(folder: Path, data: VQAData, max_new_tokens: int = 16) -> Path:
    """Writes questions with their images as a task of lmms-eval, for `--include_path`; its metric is `exact_match`. Returns the
    folder."""
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "questions.parquet").resolve()
    columns = {
        "question_id": [str(q.doc_id) for q in data.questions],
        "image": [data.read(q.image) for q in data.questions],
        "question": [q.text + data.prompt for q in data.questions],
        "answer": [q.target for q in data.questions],
    }
    text = datasets.Value("string")
    features = datasets.Features({**dict.fromkeys(columns, text), "image": datasets.Image()})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(file))
    write(folder / "utils.py", f"from vtok.eval.lmms.task import {', '.join(_FUNCTIONS)}  # noqa: F401\n")
    settings = {
        "task": TASK,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "generate_until",
        "generation_kwargs": {"max_new_tokens": max_new_tokens, "temperature": 0, "num_beams": 1, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    functions = "".join(f"{name}: !function utils.{name}\n" for name in _FUNCTIONS)
    write(folder / f"{TASK}.yaml", yaml.safe_dump(settings, sort_keys=False) + functions)
    return folder


def doc_to_visual(doc: Mapping[str, Any]) -> list[Any]:
    """The image of a question."""
    return [open_picture(doc["image"])]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """The question."""
    return doc["question"]


def doc_to_target(doc: Mapping[str, Any]) -> str:
    """The right answer."""
    return doc["answer"]


def process_results(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer is the right one."""
    return {"exact_match": float(exact_match(results[0], doc["answer"]))}


def main(
    folder: Path,
    count: Annotated[int, typer.Option(help="questions, one of each of so many equal stretches of the 9,673")] = COUNT,
) -> None:
    """Writes the bundled LLaVA and a task of easy-VQA for lmms-eval, and says how to go on."""
    model = write_model(folder / MODEL_FOLDER)
    task = write_task(folder / TASK_FOLDER, open_vqa(EASY_VQA).take(count))
    print(
        f"lmms-eval --model vtok_llava_hf --model_args pretrained={model},method=todre,keep=0.1 --include_path {task} "
        f"--tasks {TASK} --device cpu --batch_size 1 --log_samples --output_path {folder / 'logs'}"
    )


if __name__ == "__main__":
    typer.run(main)
