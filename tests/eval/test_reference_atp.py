"""The bundled modules for the reference LLaVA: they fit it, their budget holds, prompts differ."""

import pytest
import torch

import vtok
from vtok.eval.models.reference import asset
from vtok.eval.training.atp.questions import load_host
from vtok.eval.training.atp.report import answer, load_test_questions, spread
from vtok.eval.training.atp.train import ATP_WEIGHTS
from vtok.methods.atp.modules import load

COUNT = 100


@pytest.fixture(scope="module")
def path():
    return str(asset(ATP_WEIGHTS))


def test_the_file(path):
    modules = load(path, depth=8, width=128, grid=(16, 16))
    assert modules.spec.sites == (1, 4, 6)
    assert asset(ATP_WEIGHTS).stat().st_size < 300_000
    assert all(parameter.isfinite().all() for parameter in modules.parameters())


def test_the_budget_holds_on_test_questions(path):
    host, asked = load_host(None), load_test_questions()
    batches = spread(asked, COUNT, 25)
    whole, pruned = (answer(host, config, asked, batches) for config in (None, vtok.ATP(weights=path)))
    target = load(path).spec.target_tokens
    assert pruned.average.mean().item() == pytest.approx(target, rel=0.1)
    assert len(pruned.counts[:, 0].unique()) > 1, "prompts keep different numbers"
    assert (pruned.counts >= 1).all()
    assert pruned.right.mean() >= whole.right.mean() - 0.1
    assert torch.isfinite(pruned.loss).all()


def test_generate_answers_in_words(path):
    host, asked = load_host(None), load_test_questions()
    inputs = host.inputs([asked.images[asked.rows[i]] for i in range(8)], [host.prompt(asked.questions[i]) for i in range(8)])
    with vtok.patched(host.model, "atp", weights=path):
        out = host.model.generate(**inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    words = host.processor.batch_decode(out, skip_special_tokens=True)
    assert set(words) <= set(asked.answers)
