"""Methods beside blind settings at their own places: `at_random` in run files, and the tables of what a choice is worth."""

import numpy as np
import pytest
from rich.console import Console

import vtok
from vtok.eval.common.records import correctness
from vtok.eval.common.statistics import clustered_mean_stderr, paired_difference
from vtok.eval.report.beside import choices
from vtok.eval.report.sections import paired, sections
from vtok.eval.runs import loader, runner

RUN = {
    "model": {"backend": "reference", "name": "reference-vit"},
    "methods": [
        {"name": "tome"},
        {"name": "tome", "prop_attn": False},
        {"name": "tome", "at_random": True},
        {"name": "random"},
    ],
    "task": "imagenet",
    "data": "fashion-mnist/test",
    "sweep": {"flops": [0.5]},
    "num_samples": 40,
    "batch_size": 20,
}


def test_a_run_sets_methods_beside_their_places_random_and_their_default(tmp_path):
    outcome = runner.run(loader.checked("a.yaml", "a", RUN), tmp_path, workers=0)
    (section,) = sections(outcome.records)
    tome, plain, drawn, random = (next(r for r in section.rows if r.record["config"]["method"] == spec | {"flops": 0.5})
                                  for spec in RUN["methods"])  # fmt: skip
    assert drawn.drawn and drawn.baseline and drawn.method == "tome, tokens at random"
    assert drawn.record["tokens"] == tome.record["tokens"]
    assert drawn.record["params"]["of"]["r"] == tome.record["params"]["r"]
    (table,) = choices(section)
    cells = {row[0]: dict(zip(table.header, row)) for row in table.rows}
    assert set(cells) == {tome.label, plain.label, random.label}
    right = [correctness(row.record).astype(float) for row in (tome, plain, drawn, random)]
    for one, other, change in (
        (tome, drawn, right[0] - right[2]),
        (tome, random, right[0] - right[3]),
        (plain, tome, right[1] - right[0]),
    ):
        assert paired(one, other, "top1") == paired_difference(change).scaled(100)
    assert cells[tome.label]["- its places"].startswith(f"{100 * (right[0] - right[2]).mean():+.1f} [")
    assert cells[plain.label]["- its default"].startswith(f"{100 * (right[1] - right[0]).mean():+.1f} [")
    assert cells[random.label]["- its places"] == "-"
    again = loader.checked("b.yaml", "b", drawn.record["config"])  # repeats the record
    assert runner.run(again, tmp_path / "again", workers=0).records[-1]["correct"] == drawn.record["correct"]
    assert all(not section.rows[i].drawn for i in section.rivals)


def test_values_of_one_photograph_go_together():
    def record(key, method, values):
        found = {"key": key, "task": "agreement", "model": "m", "method": method, "setting": method, "n": 12, "params": {},
                 "metrics": {"cosine": float(np.mean(values))}, "primary": "cosine", "percent": False, "budget": 0.5,
                 "per_image": {"cosine": values}, "cluster": [i // 2 for i in range(12)],
                 "config": {"method": {"name": "tome", "flops": 0.5}}}  # fmt: skip
        return found | ({"config": {"method": {"name": "tome", "flops": 0.5, "at_random": True}}} if "random" in method else {})

    a, b = np.linspace(0.9, 0.99, 12), np.linspace(0.8, 0.97, 12)
    (section,) = sections([record("a", "tome", a.tolist()), record("b", "tome, tokens at random", b.tolist())])
    one, other = section.rows
    gap, error = clustered_mean_stderr(a - b, np.arange(12) // 2)
    found = paired(one, other, "cosine")
    assert found.point == pytest.approx(gap) and found.high - found.low == pytest.approx(2 * 1.959964 * error)
    (table,) = choices(section)
    assert len(table.rows) == 1 and table.rows[0][-1] == f"{gap:+.3f} [{found.low:+.3f}, {found.high:+.3f}]*"
    Console(quiet=True).print(table)


def test_only_single_methods_are_drawn():
    both = [[{"name": "tome", "at_random": True}, {"name": "todre"}]]
    with pytest.raises(vtok.ConfigError, match="at_random draws the tokens of one method"):
        loader.checked("a.yaml", "a", RUN | {"methods": both, "sweep": None})
    with pytest.raises(vtok.ConfigError, match="at_random"):
        loader.checked("a.yaml", "a", RUN | {"methods": [{"name": "tome", "at_random": "yes"}]})
