"""Evaluations on questions that are stopped, killed or started again on something else."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
import warnings

import pytest

pytest.importorskip("transformers")

from helpers_vqa import picture, questions, save_tiny, tiny_llava, write_lines
from typer.testing import CliRunner

from vtok.eval.cli.program import app
from vtok.eval.common.records import Records
from vtok.eval.tasks.vqa import pipeline as vqa_pipeline
from vtok.eval.tasks.vqa.evaluate import VQAOptions, evaluate
from vtok.eval.tasks.vqa.sources.opening import open_vqa

SETTINGS = [None, ("uniform", {"keep": 0.5}), ("random", {"keep": 0.25})]


def options(**extra):
    return VQAOptions(**{"batch_size": 4, "max_new_tokens": 3, "device": "cpu", **extra})


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny_llava"))


@pytest.fixture(scope="module")
def evaluated(llava, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated")
    return out, evaluate(llava, questions(), SETTINGS, options(output=str(out)))


class StopError(Exception):
    pass


def test_a_stop_loses_the_batch_in_progress_alone(llava, evaluated, tmp_path, monkeypatch):
    _, whole = evaluated
    plain, asked = vqa_pipeline.answer, []

    def counting(model, net, inputs, limit):
        if len(asked) == 4:
            raise StopError
        asked.append(len(inputs["input_ids"]))
        return plain(model, net, inputs, limit)

    monkeypatch.setattr(vqa_pipeline, "answer", counting)
    with pytest.raises(StopError):
        evaluate(llava, questions(), SETTINGS, options(output=str(tmp_path)))
    assert len(Records(tmp_path / "samples.jsonl").load()) == 16  # three settings on the first batch, one on the second
    with open(tmp_path / "samples.jsonl", "ab") as file:
        file.write(b'{"key": "half a li')
    asked.clear()
    monkeypatch.setattr(vqa_pipeline, "answer", lambda *args: asked.append(1) or plain(*args))
    with pytest.warns(UserWarning, match="damaged line"):
        again = evaluate(llava, questions(), SETTINGS, options(output=str(tmp_path)))
    assert len(asked) == 2 + 3  # the second and the third batch; for the times it runs again on every other one alone
    for one, other in zip(whole, again):
        assert one["metrics"] == other["metrics"] and one["key"] == other["key"] and one["tokens"] == other["tokens"]
    asked.clear()
    with pytest.warns(UserWarning, match="damaged line"):
        evaluate(llava, questions(), SETTINGS, options(output=str(tmp_path)))
    assert asked == [] and len(Records(tmp_path / "results.jsonl").load()) == 3


def test_another_model_data_or_flag_is_another_run(llava, tmp_path):
    def keys(model=llava, data=None, **extra):
        return {r["key"] for r in evaluate(model, data or questions(4), [None], options(output=str(tmp_path), **extra))}

    found = [keys(), keys(tiny_llava(1)), keys(data=questions(5)), keys(max_new_tokens=2), keys(prompt=" now"), keys(seed=3)]
    found.append(keys(model_dtype="bfloat16"))
    assert len(set().union(*found)) == len(found) and keys() == found[0]


def asked_of(out):
    return Records(out / "samples.jsonl").load()


@pytest.mark.parametrize("change", ["questions", "answers", "pictures", "groups"])
def test_other_questions_of_the_same_name_are_asked(llava, tmp_path, change):
    """What is stored of one data set never stands in for another of the same name, size and numbering."""
    first = questions(4)
    changed = {
        "questions": [q._replace(text="what shape is present?") for q in first.questions],
        "answers": [q._replace(answers=("teal",)) for q in first.questions],
        "groups": [q._replace(groups={"kind": "open"}) for q in first.questions],
        "pictures": first.questions,
    }[change]
    read = (lambda number: picture(number + 50)) if change == "pictures" else first.read
    second = dataclasses.replace(first, questions=changed, read=read)
    (fresh,) = evaluate(llava, second, [None], options(output=str(tmp_path / "fresh")))
    evaluate(llava, first, [None], options(output=str(tmp_path / "both")))
    if change == "questions":
        (record,) = evaluate(llava, second, [None], options(output=str(tmp_path / "both")))
    else:  # the same words: it is said that nothing is taken over
        with pytest.warns(UserWarning, match=r"samples.jsonl holds 4 answers to the same words, .* are asked again"):
            (record,) = evaluate(llava, second, [None], options(output=str(tmp_path / "both")))
    said, expected = asked_of(tmp_path / "both")[4:], asked_of(tmp_path / "fresh")
    compared = ("key", "doc_id", "question", "prediction", "target", "score")
    assert [[x[name] for name in compared] for x in said] == [[x[name] for name in compared] for x in expected]
    assert record["metrics"] == fresh["metrics"] and record["groups"] == fresh["groups"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(llava, second, [None], options(output=str(tmp_path / "both")))  # what is known belongs to it now
    assert len(asked_of(tmp_path / "both")) == 8


def test_answers_of_an_earlier_release_are_asked_again(llava, tmp_path):
    (record,) = evaluate(llava, questions(4), [None], options(output=str(tmp_path)))
    lines = [{**line, "key": f"0123456789abcdef/{line['doc_id']}"} for line in asked_of(tmp_path)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.warns(UserWarning, match=r"4 answers to the same words, .* or an earlier release wrote them"):
        (again,) = evaluate(llava, questions(4), [None], options(output=str(tmp_path)))
    assert len(asked_of(tmp_path)) == 8 and again["metrics"] == record["metrics"]


def test_pictures_are_told_apart_by_their_bytes(llava, tmp_path):
    """Files of the same names in two folders, as two subsets of one data set have them."""
    first, second = write_lines(tmp_path / "a", 4), write_lines(tmp_path / "b", 4)
    same, moved = (open_vqa(path).identity() for path in (first, second))
    assert same == moved  # wherever it lies
    picture(77).save(tmp_path / "b" / "0.png")
    assert open_vqa(second).identity() != same
    assert open_vqa(second).take(1).identity() != open_vqa(second).identity()


def test_numbers_and_texts_are_other_questions(llava, tmp_path):
    data = questions(4)
    names = [0, "0", "0/1", 1]
    data = dataclasses.replace(data, questions=[q._replace(doc_id=name) for q, name in zip(data.questions, names)])
    records = evaluate(llava, data, [None], options(output=str(tmp_path)))
    lines = asked_of(tmp_path)
    assert [line["doc_id"] for line in lines] == names and len({line["key"] for line in lines}) == 4
    plain = evaluate(llava, questions(4), [None], options(output=str(tmp_path / "plain")))
    assert [line["prediction"] for line in lines] == [line["prediction"] for line in asked_of(tmp_path / "plain")]
    assert records[0]["metrics"] == plain[0]["metrics"]
    assert len(evaluate(llava, data, [None], options(output=str(tmp_path)))) == 1 and len(asked_of(tmp_path)) == 4


def test_a_killed_program_goes_on(folder, tmp_path):
    data, out = write_lines(tmp_path / "data", 40), tmp_path / "out"
    command = ["eval", "vqa", "--model", str(folder), "--data", str(data), "-b", "1"]
    command += ["-M", "uniform:keep=0.5", "--max-new-tokens", "2", "--output", str(out)]
    program = [sys.executable, "-m", "vtok.eval", *command]
    running = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    samples, until = out / "samples.jsonl", time.monotonic() + 120
    while not samples.is_file() or samples.read_bytes().count(b"\n") < 10:
        assert running.poll() is None and time.monotonic() < until, running.communicate()
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    kept = Records(samples).by_key()
    assert 10 <= len(kept) < 80
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    after = Records(samples).by_key()
    assert len(after) == 80 and {key: after[key] for key in kept} == kept
