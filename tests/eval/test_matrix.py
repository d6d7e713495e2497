"""The support matrix: its oracle can fail, its table says what was found, its page has it. Its cells are contract tests."""

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from helpers_golden import assert_close, assert_equal, start
from hypothesis import given
from hypothesis import strategies as st
from strategies import Shape, normal, properties, random_plan, seeds, shapes
from typer.testing import CliRunner
from zoo import BACKENDS, EXAMPLES, TOO_NEW, Nothing, attach, build, images

import vtok
from vtok.core.reduction import apply_plan
from vtok.core.tokens import gather_mask, gather_positions, log_size_bias
from vtok.eval.cli.program import app
from vtok.eval.matrix import encoder as matrix
from vtok.eval.matrix import report as matrix_report
from vtok.eval.matrix import vlm as vlm_matrix
from vtok.eval.matrix.encoder import FAILED, NO, TOWER, WITH_OPTIONS, YES, Cell
from vtok.methods.baselines.random_drop import RandomDrop
from vtok.patches import block, pooling
from vtok.testing import prompt_oracle, tiny
from vtok.testing.encoder_oracle import Decision, Evidence, differences, masked_plan

PAGE = Path(__file__).resolve().parents[2] / "assets" / "docs" / "support.md"
complete = pytest.mark.skipif(
    bool(TOO_NEW) or set(BACKENDS) != set(vtok.ADAPTERS.names()), reason="an installed backend lacks some of the models"
)


def verified(name, method):
    model = attach(name, build(name, torch.float64), method, trace=True)
    return matrix.check_reduction(model, images(name, 3, torch.float64))


def misplaced(table, state):
    """Rotary tables of the wrong rows: what follows if positions stay behind."""
    right = gather_positions(table, state)
    return right if right is table else right.roll(1, -2)


def misplaced_bias(mask, state):
    right = gather_mask(mask, state)
    return right if right is mask else right.roll(1, -1)


@pytest.mark.parametrize(
    ("name", "method", "module", "attribute", "broken", "replay"),
    [
        ("timm: EVA-02 rotary, SwiGLU", "random", block, "gather_positions", misplaced, "masked"),
        ("timm: BEiT relative bias", "ats", block, "gather_mask", misplaced_bias, "masked"),
        ("timm: ViT average pool", "tome", pooling, "weighted_mean", lambda x, state, first: x[:, first:].mean(1), "masked"),
        ("timm: ViT", "pitome", block, "log_size_bias", lambda s, dtype, sizes: log_size_bias(s, dtype, False), "copies"),
        ("timm: ViT map pool (SigLIP)", "tome", pooling, "log_size_bias", lambda s, dtype: None, "copies"),
    ],
)
def test_the_check_notices(name, method, module, attribute, broken, replay, monkeypatch):
    """Positions, biases, pools and sizes that do not follow the tokens."""
    assert verified(name, method).fault is None
    monkeypatch.setattr(module, attribute, broken)
    evidence = verified(name, method)
    assert f"{replay} replay differs by" in evidence.fault
    assert evidence.differences[replay] > 1e-3


def test_a_patch_that_takes_nothing_away_is_no_yes():
    name = "timm: ViT"
    model, x = build(name, torch.float64), images(name, dtype=torch.float64)
    vtok.patch(model, Nothing(), trace=True)
    assert matrix.check_reduction(model, x).fault == "no token was taken away"
    with pytest.raises(vtok.StateError, match="no block took a token away"):
        differences(model, x)
    for unfit in (vtok.unpatch(model), vtok.patch(build(name), "tome", r=4)):
        with pytest.raises(vtok.StateError, match="trace=True"):
            differences(unfit, x)


def test_the_check_leaves_the_patch_as_it_was():
    name = "timm: ViT"
    model, x = attach(name, build(name, torch.float64), "tome", trace=True), images(name, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        differences(model, x)
        assert torch.equal(model(x), before)
    assert all(not {"decide", "move"} & vars(b._vtok).keys() for b in model.blocks)


def test_without_proportional_attention_a_merged_token_counts_once():
    """Then it is no set of copies, and only masking is asked for."""
    name = "timm: ViT"
    model = attach(name, build(name, torch.float64), "tome", prop_attn=False, trace=True)
    found = differences(model, images(name, dtype=torch.float64))
    assert found.keys() == {"masked"}
    assert found["masked"] <= 1e-10


@properties
@given(shapes(), st.booleans(), st.booleans(), seeds)
def test_a_masked_plan_leaves_the_same_tokens_in_their_rows(shape: Shape, first: bool, second: bool, seed: int) -> None:
    x = normal(seed, shape.batch, shape.n, shape.width)
    short, full, reduced, masked = x, x, start(x, shape.num_prefix), start(x, shape.num_prefix)
    for i, merge in enumerate((first, second)):
        plan = random_plan(shape._replace(n=short.shape[1]), merge, seed + i)
        wide = masked_plan(Decision(reduced, plan))
        short, reduced = apply_plan(short, reduced, plan)
        full, masked = apply_plan(full, masked, wide)
        assert full.shape == x.shape
        rows = reduced.index
        assert rows is not None and masked.keep is not None
        assert_close(full.gather(1, rows[..., None].expand_as(short)), short, 1e-12)
        assert_equal(masked.keep.sum(1), torch.full((shape.batch,), short.shape[1]))
        assert masked.keep.gather(1, rows).all()
        if reduced.size is not None and masked.size is not None:
            assert_close(masked.size.gather(1, rows), reduced.size, 1e-12)


@pytest.fixture(scope="module")
def planned():
    """Every cell as it follows from refusals alone; that the others are right is what the contract tests show."""
    return list(matrix.cells(EXAMPLES, check=lambda model, x: Evidence()))


@pytest.fixture(scope="module")
def spoken():
    """Every cell of vision-language models, each of them run."""
    return list(vlm_matrix.cells(tiny.vlm_examples()))


def on_the_page():
    return PAGE.read_text(encoding="utf-8").partition(matrix_report.BEGIN)[2].partition(matrix_report.END)[0].strip()


@complete
def test_the_page_has_the_matrix(planned, spoken):
    assert on_the_page() == matrix_report.markdown([*planned, *spoken]), "run: vtok matrix --into assets/docs/support.md"


@complete
@pytest.mark.slow
def test_the_command_prints_what_the_page_has():
    result = CliRunner().invoke(app, ["matrix", "--markdown"], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.strip() == on_the_page()


@pytest.mark.parametrize("name", tiny.vlm_examples())
@pytest.mark.parametrize("method", vtok.METHODS.names())
def test_every_cell_of_a_vision_language_model(spoken, name, method):
    """Whatever is not refused took tokens from every prompt, and removing them equals masking them."""
    (found,) = [c for c in spoken if (c.model, c.method) == (name, method)]
    assert found.status in (YES, TOWER, WITH_OPTIONS, NO), found.reason
    if found.status == NO:
        assert found.evidence is None
        assert found.reason
    else:
        assert found.status == TOWER or len(found.evidence.tokens) == 2
        assert all(left < entered for entered, left in found.evidence.tokens)
        assert found.evidence.differences["masked"] <= prompt_oracle.TOLERANCE


def test_prompts_are_those_that_a_method_takes(spoken):
    """Only correlation wants pages cut into crops, only atp one image a prompt, and only where it must; some want videos."""
    kinds = {(c.method, c.evidence.prompts) for c in spoken if c.evidence is not None}
    rare = {("correlation", "cropped pages"), ("atp", "one image each")}
    rare |= {(method, "videos") for method in ("evs", "fastvid", "vidcom2")}
    assert {pair for pair in kinds if pair[1] != "several images"} == rare
    for found in spoken:
        if found.method == "correlation" and found.evidence is not None:
            cuts = tiny.vlm_examples()[found.model].pages is not None
            assert ("overview" in found.request) == (not cuts)
            assert ("never crops" in found.reason) == (not cuts)


def test_notes_of_vision_language_models_are_said_once(spoken):
    """No note differs from another by names of classes alone, and random weights are called random."""
    notes = matrix_report.Report(spoken).notes
    assert len(notes) == len(set(notes)) <= 16
    words = {name for c in spoken for name in c.classes}
    assert not [note for note in notes if any(word in note for word in words)]
    (atp,) = [note for note in notes if note.startswith("atp with")]
    assert "the modules are random, nobody trained them" in atp


def test_the_check_of_vision_language_models_notices(monkeypatch):
    """Columns that were dropped somewhere else than the oracle is told, and patches that take nothing away from some prompt."""
    example = tiny.vlm_examples()["LLaVA-OneVision"]
    model = tiny.build_vlm(example)
    (_, values), _, (_, pages), _ = tiny.vlm_prompts(example, model)
    kept = prompt_oracle.check_prompts(vtok.patch(model, "uniform", keep=1.0), values)
    assert kept.fault == prompt_oracle.NOTHING
    vtok.patch(model, "correlation", alpha=0.2)
    half = prompt_oracle.check_prompts(model, values)  # the second prompt is a video, which the method leaves alone
    assert half.fault == prompt_oracle.NOTHING
    assert [left < entered for entered, left in half.tokens] == [True, False]
    assert prompt_oracle.check_prompts(model, pages).fault is None
    right = prompt_oracle._alive
    monkeypatch.setattr(prompt_oracle, "_alive", lambda last, depth: {i: x.roll(1, 1) for i, x in right(last, depth).items()})
    assert "masked replay differs by" in vlm_matrix.judge(model, example, "uniform")["reason"]
    assert not vtok.info(model).patched


def test_supports_says_what_the_matrix_says(planned):
    for name, example in EXAMPLES.items():
        support = vtok.supports(example.build())
        for cell in [c for c in planned if f"{c.backend}: {c.model}" == name]:
            why, wanted = support.methods[cell.method], support.on_request.get(cell.method)
            assert (why is None) == (cell.status == YES), (name, cell)
            assert wanted == (cell.request or None), (name, cell)
            assert cell.reason == (why or "")
            assert cell.status in (YES, WITH_OPTIONS) or wanted is None


def cell(model, method, status, **extra):
    return Cell("timm", model, model.split()[0], method, status, **extra)


FOUND = [
    cell("ViT", "a", YES),
    cell("ViT", "b", NO, reason="b hates this ViT", classes={"ViT": "the model"}, remark="b is old"),
    cell("ViT pooled", "a", WITH_OPTIONS, request={"query": "mean"}, reason="ViT has no CLS", classes={"ViT": "the model"}),
    cell("ViT pooled", "b", NO, reason="b hates this Pooled", classes={"Pooled": "the model"}, remark="b is old"),
    cell("EVA", "a", WITH_OPTIONS, request={"query": "mean"}, reason="Eva has no CLS"),
    cell("EVA", "b", FAILED, reason="no token was taken away"),
]


def test_the_table_says_what_was_found():
    lines = matrix_report.markdown(FOUND).splitlines()
    assert lines[:4] == [
        "| family | models | a | b |",
        "|---|---:|---|---|",
        "| timm: ViT | 2 | 1 of 2, 1 with options <sup>1</sup> | no <sup>2</sup> |",
        "| timm: EVA | 1 | with options <sup>1</sup> | FAILED <sup>3</sup> |",
    ]
    assert lines[5:8] == [
        '1. a with query="mean"; without: the model has no CLS.',
        "2. no: the method hates this model. b is old.",
        "3. FAILED: no token was taken away.",
    ]
    assert lines[-1] == "**3 models x 2 methods = 6 cells: 1 yes, 2 with options, 2 no, 1 failed.**"
    assert "[3] FAILED" in matrix_report.notes(FOUND)


def test_a_page_takes_the_table():
    page = f"before\n{matrix_report.BEGIN}\n\nold\n\n{matrix_report.END}\nafter"
    new = matrix_report.put_into(page, "| new |")
    assert new == page.replace("old", "| new |")
    with pytest.raises(vtok.ConfigError, match="has no place for the matrix"):
        matrix_report.put_into("before and after", "| new |")


@dataclasses.dataclass(frozen=True)
class Broken(RandomDrop):
    """A method that breaks as soon as it is asked where it acts."""

    name: ClassVar[str] = "broken"

    def build(self, info):
        return dataclasses.replace(super().build(info), keep="much")


def test_whatever_breaks_is_a_failure_and_leaves_the_model_unpatched(monkeypatch):
    name = "timm: ViT"
    model, x = build(name, torch.float64), images(name, dtype=torch.float64)
    monkeypatch.setitem(vtok.METHODS._entries, "broken", Broken)
    monkeypatch.setitem(vtok.METHODS._entries, "nothing", Nothing)
    for method, image, words in (
        ("broken", x, "TypeError: '<' not supported"),
        ("nothing", x, "no token was taken away"),
        ("tome", x[:, :1], "RuntimeError: "),  # a grey image
    ):
        found = matrix.judge(model, image, method)
        assert found["status"] == FAILED
        assert found["reason"].startswith(words)
        assert not vtok.info(model).patched


@pytest.fixture
def two(monkeypatch):
    some = {name: EXAMPLES[name] for name in ("timm: ViT", "timm: ViT average pool")}
    monkeypatch.setattr(tiny, "vlm_examples", lambda names=None: {})
    monkeypatch.setattr(tiny, "examples", lambda names=None: (some, {"timm: Young": some["timm: ViT"]._replace(since="9.0")}))


run = CliRunner()


@pytest.mark.usefixtures("two")
def test_the_command(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{matrix_report.BEGIN}{matrix_report.END}")
    result = run.invoke(app, ["matrix", "--json", str(tmp_path / "cells.json"), "--into", str(page)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "2 models x 6 methods = 12 cells: 10 yes, 2 with options, 0 no, 0 failed." in result.stdout
    assert "left out: timm: Young (needs release 9.0)" in result.stderr
    cells = json.loads((tmp_path / "cells.json").read_text())
    assert len(cells) == 12
    assert all(max(c["evidence"]["differences"].values()) <= 1e-10 for c in cells)
    text = page.read_text()  # methods in rows: there are more of them than models
    assert "| method | ViT, AugReg, DeiT-III, DINOv2 | ViT without class token (SigLIP) |" in text
    assert "| ats | yes | with options <sup>1</sup> |" in text


@pytest.mark.usefixtures("two")
def test_the_command_fails_where_a_method_does(monkeypatch):
    monkeypatch.setitem(vtok.METHODS._entries, "broken", Broken)
    result = run.invoke(app, ["matrix", "--method", "broken", "--method", "random", "--markdown"], catch_exceptions=False)
    assert result.exit_code == 1
    assert "2 yes, 0 with options, 0 no, 2 failed" in result.stdout
    assert "FAILED: TypeError" in result.stdout


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        (["--backend", "tim"], vtok.UnknownNameError, "did you mean 'timm'"),
        (["--method", "tomee"], vtok.UnknownNameError, "did you mean 'tome'"),
        (["--into", "nowhere.md"], vtok.ConfigError, "nowhere.md is no file"),
        (["--into", __file__], vtok.ConfigError, "has no place for the matrix"),
        (["--json", "/"], vtok.ConfigError, "it is a folder"),
    ],
)
def test_wrong_arguments_are_explained_before_anything_runs(args, error, words):
    with pytest.raises(error, match=words):
        run.invoke(app, ["matrix", *args], catch_exceptions=False)


def test_a_backend_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(vtok.ADAPTERS._entries, "missing_backend", object)
    with pytest.raises(vtok.MissingExtraError, match=r'pip install "vtok\[missing_backend\]"'):
        tiny.examples(["missing_backend"])
