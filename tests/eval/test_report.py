"""Tables, frames, plots, findings and overlays made from records: of this release and of earlier ones."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console
from test_report_html import record
from zoo import build, images

import vtok
from vtok.eval import write_report
from vtok.eval.report import plots
from vtok.eval.report.frame import CSV, frame, front_of, total_gmacs
from vtok.eval.report.html import charts
from vtok.eval.report.html.page import ReportOptions, _part
from vtok.eval.report.html.table import summary
from vtok.eval.report.read import read
from vtok.eval.report.sections import findings, sections
from vtok.eval.report.summary import gap_columns, metric_columns, table
from vtok.eval.report.tables import Column, Table, write_csv
from vtok.eval.viz.overlay import outlines, overlay_sheet, paint, token_groups


@pytest.fixture
def records():
    """As `vtok demo` of the first release wrote them: no task, no setting, no primary metric, no seed."""
    base = np.arange(400) % 10 > 0
    worse = base & (np.arange(400) % 7 > 0)
    slow = {"speedup": 0.9, "speedup_ci": [0.85, 0.95]}
    found = [record("unpatched", 1.0, base)]
    for budget in (0.4, 0.6):
        found += [
            record("random", budget, worse, base),
            record("tome", budget, base, base),
            record("ats", budget, worse, base, **slow),
        ]
    return found


def shown(made, width=160):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(made)
    return console.export_text()


def test_a_table_in_a_terminal_and_as_markdown():
    columns = [Column("name", lambda row: row[0], left=True), Column("value", lambda row: f"{row[1]:.1f}")]
    made = Table.of([("a", 1), ("b|c", 2), ("d", 3)], columns, "above", "below", part=lambda row: row[1] < 3)
    made.add(["last", "-"])
    text = shown(made)
    assert all(word in text for word in ("above", "below", "b|c", "2.0"))
    assert made.rules == {1, 2} and made.styles == {3: "dim"}
    assert made.markdown().splitlines() == [
        "| name | value |", "|---|---:|", "| a | 1.0 |", "| b\\|c | 2.0 |", "| d | 3.0 |", "| last | - |",
    ]  # fmt: skip


@pytest.mark.parametrize("width", [80, 100, 130, 160])
def test_no_width_breaks_words_or_loses_what_a_row_is_called(records, width):
    """Numbers, intervals and words stay whole; every printed part has the settings beside its numbers."""
    (section,) = sections(records)
    made = table(section, gap_columns(section))
    text = shown(made, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    whole = " ".join(text.split())
    for row in made.rows:
        for cell in row[1:]:
            first, bracket, rest = cell.partition(" [")
            assert first in text and (not bracket or f"[{rest}" in text), cell
    for name in ("reduction", "unpatched", "measured", "achieved", "implied", "random", "[95 %]", "on the Pareto front"):
        assert name in whole
    parts = text.count("setting")
    assert parts == text.count("│ unpatched") and (width < 160 or parts == 1) and (width > 80 or parts > 1)


def test_a_long_name_of_a_row_is_broken_between_its_parameters():
    made = Table.plain(("setting", "x"), [("zero_tprune(layers=[3, 6, 9], retain=[0.9, 0.9, 0.9], flops=0.6)", "1")])
    lines = [line.split("│")[1].strip() for line in shown(made, 60).splitlines() if "│" in line]
    assert lines == ["zero_tprune(layers=[3, 6, 9],", "retain=[0.9, 0.9, 0.9],", "flops=0.6)"]


def test_columns_that_say_nothing_are_left_out_of_a_terminal():
    text = shown(Table.plain(("method", "memory MB", "GMACs"), [("tome", "-", "1.0"), ("ats", "-", "-")]))
    assert "memory" not in text and "GMACs" in text


def test_table_picture_and_page_mark_the_same_front(records):
    """A method's own MACs count everywhere: the cheaper setting by the model's alone is not on the front for that."""
    cheap, dear = dict(records[1]), dict(records[1])
    cheap |= {"method": "tome", "setting": "tome", "gmacs": {"base": 1.0, "model": 0.5, "pruner": 0.01}}
    dear |= {"method": "ats", "setting": "ats", "gmacs": {"base": 1.0, "model": 0.4, "pruner": 0.2}}
    (section,) = sections([records[0], cheap, dear])
    assert {row.label for row in section.rows if row.score.value == section.rows[1].score.value} == {"tome", "ats"}
    starred = {row[0].removesuffix(" *") for row in table(section).rows if row[0].endswith(" *")}
    data = frame([section])
    page = summary(section, front_of(section.rows, total_gmacs, True))
    best = next(i for i, column in enumerate(page.columns) if column.name == "Pareto")
    assert (
        starred == set(data["label"][data["pareto"].astype(bool)]) == {r.label for r, cells in page.rows if cells[best].words}
    )
    assert "tome" in starred and "ats" not in starred
    plot = charts.pareto(section, charts.looks([section]), total_gmacs, True, "GMACs")
    assert {line.name for line in plot.lines if any(mark.front for mark in line.marks)} == {"tome"}
    whole = _part(section, 1, charts.looks([section]), {}, ReportOptions()).table
    assert [cells for _, cells in whole.rows] == [cells for _, cells in page.rows]


def test_the_summary_of_settings(records):
    (section,) = sections(records)
    made = table(section, metric_columns(["top1"]))
    assert [row[0].removesuffix(" *") for row in made.rows] == [
        "unpatched", "ats at 60\u00a0%", "tome at 60\u00a0%", "random at 60\u00a0%", "ats at 40\u00a0%", "tome at 40\u00a0%",
        "random at 40\u00a0%",
    ]  # fmt: skip
    assert made.rules == {0, 3} and set(made.styles) == {3, 6}
    base, ats = made.rows[0], made.rows[1]
    assert tuple(base[1:]) == ("63.3", "1.000", "0.0100", "90.00 ± 1.50", "-", "-", "-", "-", "90.0 ± 1.5", "-")
    assert tuple(ats[1:4]) == ("46.7", "0.600", "0.0100") and ats[6:9] == ("1.67x", "0.90x [0.85, 0.95]", "90 %")
    assert ats[5].startswith("-13.00 [-16.") and "*" in made.rows[5][0]
    assert "net on pictures, 400 samples, float32 on cpu" in shown(made)


def test_findings_speak_up(records):
    (section,) = sections(records)
    words = [one.words for one in findings(section)]
    assert any(one.startswith("Better than random at the same cost") and "tome at 60" in one for one in words)
    assert any(one.startswith("Not clearly apart from random") and "ats at 40" in one for one in words)
    assert any(one.startswith("Slower than unpatched: ats at 60") for one in words)
    (ranks,) = [one for one in words if "to rank methods" in one]
    assert ranks.startswith("random at 40\u00a0% loses 13.00 points to unpatched, 7.7 standard errors: enough")
    few = [one | {"metrics": {**one["metrics"], "difference": -0.1}} for one in records[1:]]
    assert "too little to rank methods" in " ".join(one.words for one in findings(sections([records[0], *few])[0]))
    gains = [one | {"metrics": {**one["metrics"], "difference": 0.1}} for one in records[1:]]
    assert "loses nothing to unpatched" in " ".join(one.words for one in findings(sections([records[0], *gains])[0]))


def test_a_frame_holds_what_records_say(records, tmp_path):
    data = frame(sections(records))
    assert list(data[data["pareto"]]["label"]) == ["tome at 40\u00a0%"]
    assert data["measured"].tolist()[:2] == [1.0, 0.9] and data["mean_tokens"][0] == pytest.approx(190 / 3)
    write_csv(data[list(CSV)], tmp_path / "sweep.csv")
    again = pd.read_csv(tmp_path / "sweep.csv")
    assert list(again.columns) == list(CSV) and len(again) == len(records)
    by_key = {one["key"]: one for one in records}
    for row in again.itertuples():
        held = by_key[row.key]
        assert (row.value, row.gmacs, row.batch_size) == (held["metrics"]["top1"], held["gmacs"]["model"], 50)
        assert row.speedup_low == held["speedup_ci"][0] if "speedup_ci" in held else np.isnan(row.speedup_low)
    assert (
        (tmp_path / "sweep.csv")
        .read_text()
        .splitlines()[1]
        .startswith("net,timm,,pictures,unpatched,,1.0,{},400,top1,90.0,1.5,,")
    )


def test_plots_show_every_section(records, tmp_path):
    other = [one | {"seed": 7, "key": f"s{one['key']}"} for one in records]
    found = sections([*records, *other])
    assert [section.title for section in found] == ["net on pictures", "net on pictures (seed 7)"]
    plots.plot(found, tmp_path / "two.png")
    plots.plot(found[:1], tmp_path / "one.png")
    (width, height), (_, half) = (Image.open(tmp_path / f"{name}.png").size for name in ("two", "one"))
    assert width > 1000 and height > 1.9 * half > 800


def test_paint_shows_what_stays_merges_and_goes():
    image = np.linspace(0, 1, 64).reshape(8, 8)
    groups = np.array([0, 1, 1, -1])  # 2 x 2 patches of 4 x 4 pixels
    out = paint(image, groups, (2, 2))
    assert np.allclose(out[:4, :4], image[:4, :4, None])
    assert np.ptp(out[:4, 4:], axis=(0, 1)).max() == 0
    assert np.allclose(out[:4, 4:], out[4:, :4].mean((0, 1)))
    dropped, was = out[4:, 4:].mean((0, 1)), image[4:, 4:].mean()  # dark, and blue on any background
    assert dropped[2] > 1.3 * dropped[:2].max() and dropped[:2].max() < 0.6 * was
    assert len(outlines(groups, (2, 2))) == 4


def test_overlay_sheet(tmp_path):
    model, x = build("timm: ViT"), images("timm: ViT", batch=2)
    pictures = [np.random.rand(64, 64, 3) for _ in x]
    overlay_sheet(
        model, x, pictures, [("tome", "tome", {"r": 8}), ("random", "random", {})], tmp_path / "o.png", ["one", "two"], "h"
    )
    assert min(Image.open(tmp_path / "o.png").size) > 200
    assert not vtok.info(model).patched
    with pytest.raises(vtok.StateError, match="trace=True"):
        token_groups(vtok.patch(model, "tome"), x)


# What the release that wrote them printed: tokens, GMACs, score, difference to unpatched, implied, measured.
PRINTED = {
    "fashion_vit@145cd04e on fashion-mnist/test": {
        "tome at 40\u00a0%": ("79", "0.141", "88.00 ± 2.30", "-1.50", "2.48x", "2.25x"),
        "ats at 40\u00a0%": ("80", "0.140", "78.00 ± 2.94", "-11.50", "2.51x", "1.86x"),
    },
    "reference-llava on easy-vqa": {
        "todre": ("26", "0.309", "92.5 ± 1.9", "-4.5", "2.58x", "3.56x"),
        "random(keep=0.1)": ("26", "0.309", "96.5 ± 1.3", "-0.5", "2.58x", "4.26x"),
    },
    "reference-llava-next on easy-vqa-pages": {
        "correlation(target_keep=0.33)": ("166", "0.577", "92.5 ± 2.4", "-5.0", "1.75x", "1.28x"),
    },
}


def test_records_of_the_first_release_are_read_as_it_printed_them(tmp_path):
    path = Path(__file__).parents[1] / "golden" / "records_0_1_0.jsonl"
    found = {section.title: section for section in sections(read([path]).records)}
    assert set(found) == {*PRINTED, "reference-clip on easyvqa + easyvqa_pages"}
    for title, rows in PRINTED.items():
        made = table(found[title], digits=2 if "vit" in title else 1)
        cells = {row[0].removesuffix(" *"): row for row in made.rows}
        for label, (tokens, macs, score, change, implied, measured) in rows.items():
            row = cells[label]
            assert f"{float(row[1]):.0f}" == tokens
            assert (row[2], row[4], row[5].split()[0], row[6], row[7]) == (macs, score, change, implied, measured)
    questions = found["reference-llava on easy-vqa"]
    assert all("agreement" in row.scores and "loyalty" not in row.scores for row in questions.rows if row.method != "unpatched")
    clip = found["reference-clip on easyvqa + easyvqa_pages"]
    recalls = {row.method: round(row.scores["text_retrieval_recall@1"].value, 1) for row in clip.rows if not row.baseline}
    assert recalls == {
        "unpatched": 96.0, "tome": 96.0, "zero_tprune": 11.5,
    }  # fmt: skip
    report = write_report([path], tmp_path / "r.html")
    text = report.path.read_text(encoding="utf-8")
    assert report.problems == [] and "vtok demo --images 200" in text and "vtok run run-3.yaml" in text
    assert "88.0 ± 2.3" in text and "92.5 ± 1.9" in text
