"""Training ATP's modules: a tiny model learns to keep its budget, runs resume, the report measures what it says."""

import json

import pytest
import torch
from PIL import Image

import vtok
from vtok.eval.models.reference_vlm import ReferenceLLaVA, load_reference_questions, make_processor
from vtok.eval.training.atp import report as atp_report
from vtok.eval.training.atp import train as train_atp
from vtok.eval.training.atp.train import Asked, Host, Recipe
from vtok.methods.atp.modules import load

TINY = ReferenceLLaVA(patch_size=16, width=24, depth=2, heads=2, text_width=32, text_hidden=48, text_depth=4, text_heads=2)
RECIPE = Recipe(target_tokens=8, hidden=8, steps=30, batch_size=6, lr=2e-2)


@pytest.fixture(scope="module")
def host():
    torch.manual_seed(0)
    model = TINY.build()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3.0)
    return Host(model.requires_grad_(False), make_processor(TINY))


@pytest.fixture(scope="module")
def asked():
    found = load_reference_questions("calibration")
    return Asked(found.pictures, found.texts[:300], found.answers[:300], found.rows.tolist()[:300])


@pytest.fixture(scope="module")
def trained(host, asked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("atp")
    modules = train_atp.train(host, asked, RECIPE, folder / "checkpoint.pt")
    modules.save(folder / "atp.safetensors")
    return folder


def test_answers_are_labels_and_nothing_else(host, asked):
    inputs, labels = host.batch(asked, [0, 5, 9])
    tokenizer = host.processor.tokenizer
    for row, number in enumerate((0, 5, 9)):
        said = labels[row][labels[row] >= 0].tolist()
        assert tokenizer.convert_ids_to_tokens(said) == [asked.answers[number]]
        assert inputs["input_ids"][row].tolist()[-1:] == said
    question = host.inputs([asked.images[asked.rows[5]]], [host.prompt(asked.questions[5])])["input_ids"]
    real = inputs["attention_mask"][1] == 1
    assert inputs["input_ids"][1, real][:-1].tolist() == question[0].tolist()


def test_steps_draw_different_images_and_can_be_drawn_again(asked):
    first = train_atp.draw(asked, RECIPE, 3)
    assert first == train_atp.draw(asked, RECIPE, 3) != train_atp.draw(asked, RECIPE, 4)
    assert len({asked.rows[i] for i in first}) == len(first) == RECIPE.batch_size


def test_schedules():
    recipe = Recipe(steps=101, warmup=0.1, temperature=(10.0, 40.0), lr=1.0)
    assert recipe.temperature_at(0) == 10
    assert recipe.temperature_at(50) == pytest.approx(20)
    assert recipe.temperature_at(100) == pytest.approx(40)
    rates = [recipe.lr_at(step) for step in range(101)]
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[-1] < 0.001


def test_the_budget_is_reached(host, asked, trained):
    """By hard pruning, on questions that were not trained on, within a fifth; the model is as it was."""
    report = atp_report.measure(host, trained / "atp.safetensors", asked, count=100, batch_size=20)
    assert report.target == 8
    assert report.pruned.average.mean().item() == pytest.approx(8, rel=0.2)
    assert report.pruned.counts.shape == (len(report.unpruned.right), 3)
    assert (report.pruned.counts[:, 0] >= report.pruned.counts[:, 2]).all()
    assert not vtok.info(host.model).patched
    text = atp_report.table(report)
    assert f"{len(report.unpruned.right)} questions, 16 visual tokens, modules in front of the decoder layers 1, 2, 3" in text
    assert "exchanged - atp:" in text


def test_the_report_counts_what_is_kept(host, asked, trained):
    """Against what `info` says, prompt by prompt; exchanged thresholds are those of the prompt before."""
    path = str(trained / "atp.safetensors")
    numbers = atp_report.spread(asked, 4, 4)[0]
    found = atp_report.answer(host, vtok.ATP(weights=path), asked, [numbers])
    modules = load(path)
    inputs = host.inputs([asked.images[asked.rows[i]] for i in numbers], [host.prompt(asked.questions[i]) for i in numbers])
    with vtok.patched(host.model, "atp", weights=path), torch.no_grad():
        logits = host.model(**inputs).logits[:, -1]
        rows = {row.place: row.tokens_out for row in vtok.info(host.model).prompts[0].rows}
    counts, before = [], (16,) * 4
    for layer in modules.spec.sites:
        before = rows.get(f"decoder layer {layer}", before)
        counts.append(before)
    assert found.counts.T.tolist() == [list(map(float, count)) for count in counts]
    assert found.average.tolist() == pytest.approx([(16 + sum(c)) / 4 for c in zip(*counts)])
    answers = [host.processor.tokenizer.convert_tokens_to_ids(asked.answers[i]) for i in numbers]
    expected = [-logits[row].log_softmax(-1)[word].item() for row, word in enumerate(answers)]
    assert found.loss.tolist() == pytest.approx(expected, abs=1e-5)
    assert found.right.tolist() == [float(logits[row].argmax() == word) for row, word in enumerate(answers)]
    reducer = atp_report.ExchangedATP(weights=path).build_vlm(_info(host))
    scores = torch.rand(2, 3, 16)
    slots = vtok.methods.atp.Slots(torch.arange(16).expand(3, -1), torch.zeros(3, 16).bool(), torch.ones(3, 16).bool())
    own, taken = (m.thresholds(1, *scores, slots) for m in (modules, reducer.modules))
    for one, other in zip(own, taken):
        assert torch.equal(other, one[[2, 0, 1]])


def _info(host):
    return vtok.targets.vlm_targets(host.model)[0].info


def test_training_resumes(host, asked, tmp_path):
    recipe = Recipe(target_tokens=8, hidden=4, steps=4, batch_size=3)
    whole = train_atp.train(host, asked, recipe, tmp_path / "whole.pt", save_every=2)
    stopped = tmp_path / "stopped.pt"

    class StopError(Exception):
        pass

    def stop(*args, **kwargs):
        raise StopError

    with pytest.MonkeyPatch.context() as patch:
        draw = train_atp.draw
        patch.setattr(train_atp, "draw", lambda asked, recipe, step: stop() if step == 3 else draw(asked, recipe, step))
        with pytest.raises(StopError):
            train_atp.train(host, asked, recipe, stopped, save_every=2)
    assert torch.load(stopped, weights_only=True)["step"] == 2
    again = train_atp.train(host, asked, recipe, stopped, save_every=2)
    for one, other in zip(again.parameters(), whole.parameters()):
        assert torch.equal(one, other)


def test_batches_of_the_report_are_about_different_images(asked):
    batches = atp_report.spread(asked, None, 10)
    flat = [number for batch in batches for number in batch]
    assert len(set(flat)) == len(flat) >= 0.9 * len(asked.rows)
    assert all(len({asked.rows[number] for number in batch}) == len(batch) for batch in batches)


def test_files_of_questions(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    path = tmp_path / "questions.jsonl"
    lines = [{"image": "a.png", "question": "what?", "answer": "red"}, {"image": "a.png", "question": "is it?", "answer": "no"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    found = train_atp.load_questions_file(path)
    assert found.images == [str(tmp_path / "a.png")]
    assert found.rows == [0, 0]
    assert found.answers == ["red", "no"]
    path.write_text('{"image": "a.png"}')
    with pytest.raises(vtok.ConfigError, match=r"questions.jsonl:1: expected an object with image, question and answer"):
        train_atp.load_questions_file(path)
    path.write_text("")
    with pytest.raises(vtok.ConfigError, match="holds no questions"):
        train_atp.load_questions_file(path)
    with pytest.raises(vtok.ConfigError, match=r"nowhere.jsonl does not exist"):
        train_atp.load_questions_file(tmp_path / "nowhere.jsonl")


def test_targets_that_cannot_be_reached(host):
    for target in (4, 16):
        with pytest.raises(vtok.ConfigError, match=rf"target_tokens={target} cannot be reached: .* alone cost 4 on average"):
            train_atp.make_modules(host, Recipe(target_tokens=target))


def test_the_command(host, asked, tmp_path, capsys):
    """Trains a folder's model on a file of questions, then reports."""
    from vtok.eval.models.reference_vlm import save_folder

    save_folder(tmp_path / "model", host.model, host.processor)
    lines = []
    for number in range(12):
        image = Image.fromarray(asked.images[number].permute(1, 2, 0).numpy())
        image.save(tmp_path / f"{number}.png")
        lines.append({"image": f"{number}.png", "question": "what color is this ?", "answer": "blue"})
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = ["--model", str(tmp_path / "model"), "--questions", str(tmp_path / "questions.jsonl")]
    where = ["--checkpoint", str(tmp_path / "c.pt"), "--export", str(tmp_path)]
    train_atp.main([*common, "--target", "8", "--steps", "2", "--batch-size", "4", *where])
    path = tmp_path / train_atp.ATP_WEIGHTS
    assert load(path, depth=4, width=32, grid=(4, 4)).spec.target_tokens == 8
    train_atp.main([*common, "--report", str(path), "--count", "10"])
    assert "10 questions, 16 visual tokens" in capsys.readouterr().out
