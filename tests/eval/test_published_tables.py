"""Published results: every run is planned on its model without weights, and costs what was published or says why not."""

import math

import pytest
import timm
from typer.testing import CliRunner

import vtok
from vtok.eval.cli.program import app
from vtok.eval.published import schema
from vtok.eval.published import tables as published
from vtok.eval.runs import loader as runs
from vtok.patches.hf_vlm.families import OLDEST, release

RUNS = {name: runs.load(name) for name in runs.bundled()}
RUNS = {name: run for name, run in RUNS.items() if run.tables}
PITOME_COUNT = "attention and MLP of the blocks alone"  # in the reason of runs whose source counts so
PATCHES = {
    "deit": 196,
    "mae_l": 196,
    "mae_h": 256,
    "clip_b": 196,
    "clip_l": 256,
    "clip_l336": 576,
    "blip_b": 576,
    "llava_7b": 576,
}
_models: dict[str, object] = {}


def model_of(run):
    key = repr((run.backend, run.model, run.options))
    if key not in _models:
        _models[key] = published.meta_model(run)
    return _models[key]


@pytest.fixture(autouse=True)
def _backends(request):
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if name in RUNS and RUNS[name].backend != "timm":
        pytest.importorskip(RUNS[name].backend)
        if release() < OLDEST and RUNS[name].tasks != ("retrieval",):
            pytest.skip("vision-language models need a younger transformers")


def test_every_published_run_stands_in_a_table():
    assert {name for name, run in RUNS.items() if run.published} == set(RUNS)
    slugs = [published.slug(table) for table in published.tables()]
    assert len(slugs) == len(set(slugs)) >= 10
    assert sum(len(found) for found in published.tables().values()) > len(RUNS) >= 110


@pytest.mark.parametrize("name", RUNS)
def test_figures_are_plausible_and_have_a_source(name):
    run = RUNS[name]
    found = schema.figures(run.tasks, run.published)
    assert run.published["source"] and found
    for one in found:
        low, high = {"recall_sum": (300, 600), "perception": (900, 2000), "total": (1000, 2800)}.get(one.name, (25, 101))
        assert low < one.value < high, one
        if one.base is not None:
            assert one.value <= one.base * 1.03, one


@pytest.mark.parametrize("name", RUNS)
def test_costs_agree_with_the_published_ones_or_say_why_not(name):
    """Resolved against the model on the meta device. A reason that is not needed is as wrong as one that is missing."""
    run = RUNS[name]
    cost = published.cost(run, model_of(run))
    assert cost.agrees != bool(run.published.get("gflops_note")), cost
    for other in run.published.get("also", ()):
        for figure, gmacs in (("gflops", cost.gmacs), ("base_gflops", cost.base_gmacs)):
            assert gmacs == pytest.approx(other.get(figure, gmacs), rel=published.TOLERANCE)
    assert cost.gmacs <= cost.base_gmacs
    if cost.exact and "behind the last layer" not in run.published.get("note", ""):
        assert cost.gmacs < 0.97 * cost.base_gmacs


@pytest.mark.parametrize("name", [n for n, run in RUNS.items() if PITOME_COUNT in run.published.get("gflops_note", "")])
def test_counted_as_the_authors_of_pitome_do_costs_agree(name):
    """Their logs count attention and MLP of every block on the tokens that enter it."""
    run = RUNS[name]
    model = model_of(run)
    rows = [row for row in vtok.plan(model, run.method).estimate.rows if row.tokens_in]
    width = vtok.eval.common.settings.towers(model)[0][1].info.width
    spared = rows[0].tokens_in
    counts = {"gflops": [row.tokens_in for row in rows], "base_gflops": [spared] * len(rows)}
    for figure, tokens in counts.items():
        macs = sum(12 * n * width**2 + 2 * n**2 * width for n in tokens)
        assert macs / 1e9 == pytest.approx(run.published[figure], rel=0.012), figure


@pytest.mark.parametrize("name", RUNS)
def test_weights_exist(name):
    run = RUNS[name]
    if run.backend == "open_clip":
        import open_clip

        assert (run.model, run.pretrained) in open_clip.list_pretrained()
    elif run.backend == "timm":
        assert run.model in timm.list_pretrained()
        assert ("checkpoint" in run.options) == run.model.endswith(".mae"), "timm has no MAE weights with a head"


def test_pitome_runs_do_what_its_authors_do_for_the_model():
    for name, run in RUNS.items():
        if not name.startswith("pitome_"):
            continue
        family = next(f for f in ("deit", "mae", "clip", "blip", "llava") if f"_{f}_" in name)
        preset = None if family == "deit" else f"official_{family}"
        assert run.method.preset == preset, name
        ratio = float("0." + name.rpartition("_")[2])
        assert run.method.ratio.values[0] == ratio, name
        if preset and family != "llava":
            assert {"mae": "MAE", "clip": "CLIP", "blip": "BLIP"}[family] in run.published["note"]


@pytest.mark.parametrize("name", [n for n in RUNS if n.startswith("tome_") and "_ratio_" in n])
def test_tome_by_ratio_is_what_its_note_says(name):
    """Each block merges floor(N - N ratio) of its N tokens, CLS counted."""
    run = RUNS[name]
    kind, _, ratio = name.removeprefix("tome_").partition("_ratio_")
    patches = next(n for key, n in sorted(PATCHES.items(), key=lambda item: -len(item[0])) if kind.startswith(key))
    n, ratio, expected = patches + 1, float(f"0.{ratio}"), []
    for i, r in enumerate(run.method.r.values):
        idle = "even" in kind and i % 2
        expected.append(0 if idle else math.floor(n - n * ratio))
        n -= r
    assert list(run.method.r.values) == expected


@pytest.mark.parametrize(
    ("name", "visual"), [("pitome_llava_7b_9", 54), ("pitome_llava_7b_95", 183), ("pitome_llava_7b_975", 330)]
)
def test_tokens_that_llava_is_handed_by_the_settings_of_the_authors(name, visual):
    (plan,) = published.plans(RUNS[name], model_of(RUNS[name]))
    assert plan.estimate.layers[0].visual == visual


def test_the_plans_of_a_sweep_are_those_of_its_points():
    """Six methods at three budgets, and not each of them once at its default."""
    found = published.plans(runs.load("sweep_reference_vit"))
    macs = [plan.estimate.macs / plan.estimate.base_macs for plan in found]
    assert len(found) == 18
    for i, budget in enumerate((0.8, 0.6, 0.4)):
        assert all(budget - 0.08 < share <= budget + 0.01 for share in macs[6 * i : 6 * i + 6])


def test_what_the_formula_of_todre_gives():
    """The reason why its FLOPs are not compared: T (4 n d^2 + 2 n^2 d + 2 n d m), in multiply-adds."""
    n, d, m = 2880, 4096, 11008
    billions = 32 * (4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m) / 1e9
    assert round(billions, -1) == 16670
    assert "16,670 billion multiply-adds" in RUNS["todre_llava_next_7b_288"].published["gflops_note"]


def test_other_figures_of_a_point_keep_the_base_of_its_own_source():
    found = schema.figures(("imagenet",), RUNS["zero_tprune_deit_s_258"].published)
    assert [one.value for one in found] == [79.26, 79.192, 79.34]
    assert {one.base for one in found} == {79.826}
    assert [bool(one.source) for one in found] == [False, True, True]
    run = RUNS["todre_llava_next_7b_288"]
    averages = [one for one in schema.figures(run.tasks, run.published) if one.name == schema.AVERAGE]
    assert len(averages) == 2 and averages[0].value == 96.0
    assert averages[0].parts == (("mme", "perception"), ("scienceqa", "exact_match"), ("gqa", "exact_match"), ("pope", "f1"))


def test_points_without_a_run():
    rows = published.missing()
    assert len(rows) >= 60 and len(set(rows)) == len(rows)
    assert {row.paper for row in rows} >= {"ToMe", "ATS", "PiToMe", "Zero-TPrune", "ToDRE", "ATP-LLaVA", "Correlation"}
    for row in rows:
        for word in row.reason.replace(":", " ").split():
            if word.strip(",;.").startswith(("tome_", "pitome_", "ats_", "zero_tprune_", "todre_")):
                assert word.strip(",;.") in RUNS, row


def _ok(*args):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return result.output


def test_published_on_the_command_line():
    text = _ok("configs")
    for name in RUNS:
        assert name in text
    for table in published.tables():
        assert f"{table} (vtok published {published.slug(table)})" in text
    assert _ok("book").endswith(_ok("published")), "the command's name in 0.1"
    assert "differ by more than 3 %" in text and "counts attention and MLP" in text
    text = _ok("configs", "zero_tprune_ablation", "--costs")
    assert "3.117 (4.599); +1.2 %, +1.1 %" in text and "pitome" not in text
    text = _ok("configs", "--missing")
    assert "Zero-TP-a" in text and "no backend has ALBEF" in text
    failed = CliRunner().invoke(app, ["configs", "pitome_deits"])
    assert isinstance(failed.exception, vtok.UnknownNameError) and "did you mean 'pitome_deit'" in str(failed.exception)


def test_plans_come_from_run_files():
    text = _ok("plan", "zero_tprune_deit_s_258")
    assert "zero_tprune" in text and "4.599 -> 3.548" in text
    failed = CliRunner().invoke(app, ["plan", "zero_tprune_deit_s_258", "--img-size", "384"])
    assert "--img-size" in str(failed.exception)
