"""What a run file may say was published: figures of one task and of several, means, other sources; what is wrong is named."""

import pytest

import vtok
from vtok.eval.published import schema as published
from vtok.eval.runs import loader as runs

ONE = "model: {backend: timm, name: deit_tiny_patch16_224}\nmethod: {name: tome, r: 8}\ntask: imagenet\n"
SEVERAL = "model: {backend: transformers, name: a/b}\nmethod: {name: todre}\ntasks: [mme, gqa]\n"


def _load(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return runs.load(str(path))


def test_figures_of_one_task(tmp_path):
    text = ONE + "published: {top1: 70.0, base_top1: 72.0, gflops: 1, source: x, also: [{top1: 69, source: y}]}"
    run = _load(tmp_path, text + "\ntable: My table")
    assert run.tables == ("My table",)
    own, other = published.figures(run.tasks, run.published)
    assert own == published.Figure("imagenet", "top1", 70.0, 72.0)
    assert other == published.Figure("imagenet", "top1", 69, 72.0, "y"), "measured against the same unpatched model"


def test_figures_of_several_tasks_and_their_mean(tmp_path):
    figures = "gqa: {exact_match: 60.0, base_exact_match: 64.0}, mme: {perception: 1400}, average: 95.0"
    run = _load(tmp_path, SEVERAL + f"published: {{{figures}, average_of: [mme.perception, gqa], source: x}}\ntable: [A, B]")
    assert run.tables == ("A", "B")
    assert published.figures(run.tasks, run.published) == [
        published.Figure("mme", "perception", 1400),
        published.Figure("gqa", "exact_match", 60.0, 64.0),
        published.Figure("", "average", 95.0, 100.0, parts=(("mme", "perception"), ("gqa", "exact_match"))),
    ]
    run = _load(tmp_path, SEVERAL + "published: {average: 95.0, source: x}")
    (mean,) = published.figures(run.tasks, run.published)
    assert mean.parts == (("mme", "total"), ("gqa", "exact_match")), "without a word on it, the headlines"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ONE + "published: {top1: 70.0}", ["published.source is missing"]),
        (ONE + "published: {gflops: 1.0, source: x}", ["published holds no figure", "top1"]),
        (ONE + "published: {top1: high, source: x}", ["published.top1 must be a number", "'high'"]),
        (ONE + "published: {top1: 70.0, average: 1, source: x}", ["unknown key 'published.average'"]),
        (ONE + "published: {top1: 70.0, source: x, also: [{top1: 69}]}", ["published.also.0.source is missing"]),
        (ONE + "published: {top1: 70.0, source: x, also: [69]}", ["published.also.0 must be a mapping", "69"]),
        (ONE + "published: {top1: 70.0, source: x, also: [{also: [], source: y}]}", ["unknown key 'published.also.0.also'"]),
        (SEVERAL + "published: {gqa: 60.0, source: x}", ["published.gqa must be a mapping", "60.0"]),
        (SEVERAL + "published: {gqa: {top1: 60.0}, source: x}", ["unknown key 'published.gqa.top1'"]),
        (SEVERAL + "published: {pope: {f1: 60.0}, source: x}", ["unknown key 'published.pope'"]),
        (
            SEVERAL + "published: {average: 9, average_of: [pope], source: x}",
            ["published.average_of.0 must be one of mme"],
        ),
        (SEVERAL + "published: {source: x}", ["published holds no figure", "mme.perception", "average"]),
        (ONE + "table: [1]", ["table.0 must be text, got 1"]),
        (ONE + "table: [' ']", ["table must be the name of a table", "' '"]),
        (ONE + "table: {a: b}", ["table must be text or a list"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, words):
    with pytest.raises(vtok.ConfigError) as caught:
        _load(tmp_path, text)
    for word in [str(tmp_path / "run.yaml"), *words]:
        assert word in str(caught.value), str(caught.value)


def test_a_task_that_papers_print_nothing_for_may_have_a_source(tmp_path):
    published.check("file", ("mine",), {"source": "x"})
