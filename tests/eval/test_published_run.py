"""A table of runs at once: what is shared, what is left out and why, and published figures beside measured ones."""

import json

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

import vtok
from vtok.eval.cli.program import app
from vtok.eval.published import report
from vtok.eval.published import run as table_run
from vtok.eval.published import tables as published
from vtok.eval.runs import loader as runs

VIT = "model: {backend: reference, name: reference-vit}\ntask: imagenet\nnum_samples: 24\nbatch_size: 12\n"
MAE = "options: {checkpoint: none.pth}\nmethod: {name: tome, r: 8}\npublished: {top1: 1.0, source: x, note: from there}\n"


def _folder(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def _run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def _shown(table):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_a_table_from_start_to_end_and_on(tmp_path):
    other = "also: [{top1: 89.5, source: elsewhere}]"
    published = f"published: {{top1: 90.0, base_top1: 91.0, gflops: 0.25, base_gflops: 0.35, source: a log, {other}}}\n"
    folder = _folder(
        tmp_path / "mine",
        merge=VIT + "method: {name: tome, r: 8}\n" + published,
        drop=VIT + "method: {name: random, keep: 0.9}\npublished: {top1: 80.0, source: another log}\n",
        other=VIT.replace("reference-vit", "x").replace("reference", "timm") + MAE,
    )
    result = _run("published", folder, "-o", tmp_path / "out", "--data", f"imagenet={tmp_path}")
    assert result.exit_code == 2 and "left out: drop, merge, imagenet: " in " ".join(result.output.split()), "no images there"

    result = _run("published", folder, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert sorted(record["setting"] for record in records) == ["random(keep=0.9)", "tome(r=8)", "unpatched"], "one unpatched"
    text = " ".join(result.output.split())
    for words in ("mine", "90.0 of 91.0", "-1.00", "89.5 of 91.0", "0.25 of 0.35", "0.252 of 0.351", "source: a log (merge)"):
        assert words in text
    by_setting = {record["setting"]: record for record in records}
    top1 = by_setting["tome(r=8)"]["metrics"]["top1"]
    assert f"{top1:.2f} ±" in text and f"of {by_setting['unpatched']['metrics']['top1']:.2f}" in text
    assert "* top-1 89.5: elsewhere (merge)" in text
    assert "left out: other: other needs the checkpoint none.pth" in text and "--weights" in text and "from there" in text

    again = _run("published", folder, "-o", tmp_path / "out")
    assert again.exit_code == 0 and len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 3
    assert f"{top1:.2f} ±" in " ".join(again.output.split())


def test_runs_for_which_nothing_was_published_are_shown_as_measured():
    run = runs.checked("mine.yaml", "mine", {**yaml.safe_load(VIT), "method": {"name": "tome", "r": 8}})
    pair = _pair(True, top1=(91.0, 90.0))
    for record in pair.values():
        record |= {"primary": "top1", "gmacs": {"model": 0.25}}
    pair["patched"]["metrics"] |= {"top1_stderr": 1.0, "difference_ci": [-3.0, 1.0]}
    (line,) = report.beside("mine", [(run, {"imagenet": pair})]).rows
    assert line == ("mine", "top-1", "-", "90.00 ± 1.00 of 91.00", "-", "-1.00 [-3.00, +1.00]", "-", "0.250 of 0.250")


def test_runs_that_differ_in_the_method_alone_are_one():
    _, found = published.table_of("zero_tprune_deit")
    ready = [one for run in found for one in table_run.with_paths(run, {"imagenet": "somewhere"}, None).values()]
    groups = published.groups(ready)
    assert len(groups) == 3 and sum(len(group) for group in groups) == 10, "three models"
    whole = table_run.joined(max(groups, key=len))
    assert whole.data == {"imagenet": "somewhere"} and whole.tasks == ("imagenet",)
    assert [s.title for s in whole.settings] == [run.settings[0].title for run in max(groups, key=len)]


def test_tasks_of_several_runs_share_the_unpatched_model():
    """Runs of four and of five tasks: what they have in common is asked once."""
    _, found = published.table_of("todre_pivot")
    data = {"pope": "p", "vqav2": "v"}
    each = [one for run in found for one in table_run.with_paths(run, data, None).values()]
    assert sorted((group[0].task, len(group)) for group in published.groups(each)) == [("pope", 8), ("vqav2", 2)]


def test_checkpoints_are_found_in_the_folder_of_weights(tmp_path):
    run = runs.load("tome_mae_l_r8")
    with pytest.raises(vtok.ConfigError, match=r"needs the checkpoint mae_finetuned_vit_large.pth.*dl.fbaipublicfiles.com"):
        table_run.with_paths(run, {"imagenet": "x"}, tmp_path)
    (tmp_path / "mae_finetuned_vit_large.pth").write_bytes(b"")
    ready = table_run.with_paths(run, {"imagenet": "x"}, tmp_path)["imagenet"]
    assert ready.options["checkpoint"] == str(tmp_path / "mae_finetuned_vit_large.pth")
    assert ready.settings == run.settings


def test_data_on_the_command_line(tmp_path):
    tasks = ["gqa", "pope"]
    assert table_run.read_data([], tasks) == {}
    assert table_run.read_data(["/d"], tasks) == {"gqa": "/d", "pope": "/d"}
    assert table_run.read_data(["gqa=/g", "/d"], tasks) == {"gqa": "/g", "pope": "/d"}
    assert table_run.read_data(["pope=/p"], tasks) == {"pope": "/p"}
    with pytest.raises(vtok.UnknownNameError, match="unknown task 'popee'; did you mean 'pope'"):
        table_run.read_data(["popee=/p"], tasks)
    with pytest.raises(vtok.ConfigError, match="both for all tasks"):
        table_run.read_data(["/a", "/b"], tasks)


def _pair(percent, **metrics):
    base = {name: before for name, (before, _) in metrics.items()}
    after = {name: value for name, (_, value) in metrics.items()}
    return {"base": {"metrics": base, "percent": percent}, "patched": {"metrics": after, "percent": percent}}


def test_published_beside_measured_over_several_tasks():
    run = runs.load("todre_llava_next_7b_720")
    records = {
        "mme": _pair(True, perception=(1500.0, 1470.0), total=(1800.0, 1700.0)),
        "scienceqa": _pair(False, exact_match=(0.7, 0.7)),
        "gqa": _pair(False, exact_match=(0.64, 0.608)),
        "pope": _pair(False, f1=(0.88, 0.8712)),
    }
    records["gqa"]["patched"]["metrics"] |= {"exact_match_stderr": 0.004, "exact_match_difference_ci": [-0.04, -0.024]}
    text = _shown(report.beside("a table", [(run, records)]))
    rows = [[cell.strip() for cell in line.split("│")] for line in text.splitlines() if "│" in line]
    lines = {row[2]: row[3:7] for row in rows}
    assert lines["mme"] == ["1504.3 of 1519.6", "1470.00 of 1500.00", "-15.30", "-30.00"]
    assert lines["gqa"] == ["63.3 of 64.2", "60.80 ± 0.40 of 64.00", "-0.90", "-3.20 [-4.00, -2.40]"]
    assert lines["vqav2"] == ["77.5 of 80.1", "-", "-2.60", "-"]
    assert lines["average *"][:2] == ["98.9", f"{(98 + 100 + 95 + 99) / 4:.1f}"]
    del records["pope"]
    assert "98.0" not in _shown(report.beside("a table", [(run, records)])), "no mean while a task is missing"


def test_a_metric_that_is_called_average_is_no_mean_over_tasks():
    run = runs.load("vidcom2_llava_onevision_7b_25")
    text = _shown(report.beside("a table", [(run, {"mvbench": _pair(True, average=(56.9, 57.0))})]))
    rows = [[cell.strip() for cell in line.split("│")] for line in text.splitlines() if "│" in line]
    (line,) = [row for row in rows if row[2] == "mvbench"]
    assert line[3:6] == ["57.2 of 56.9", "57.00 of 56.90", "+0.30"]
    assert "mvbench 57.2 (56.9)" in report.listing("a table", [run]).markdown()


def test_a_table_without_data_says_which():
    result = _run("published", "todre_pivot")
    for task in ("mme", "scienceqa", "gqa", "pope", "vqav2"):
        assert f"--data {task}=FOLDER" in str(result.exception)
    assert "vtok published todre_pivot" in _run("published").output
    assert isinstance(_run("published", "/nowhere/at/all").exception, vtok.ConfigError)


def test_a_folder_that_is_not_there_is_said_first(monkeypatch):
    """Before any model is built, and without a table of nothing."""
    monkeypatch.setattr("vtok.eval.runs.models.load_for", lambda *args: pytest.fail("weights before data"))
    for command in (["published", "pitome_deit", "--data", "/missing"], ["run", "sweep_reference_vit", "--data", "missing"]):
        result = CliRunner().invoke(app, command)
        assert "data of task imagenet" in str(result.exception) and "missing does not exist" in str(result.exception)
        assert result.output == ""
    monkeypatch.setattr("vtok.eval.tasks.imagenet.load_named", lambda *args: pytest.fail("weights before data"))
    with pytest.raises(vtok.ConfigError, match="/missing does not exist"):
        vtok.evaluate("deit_small_patch16_224", "imagenet", "tome", data="/missing")
