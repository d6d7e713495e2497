"""The page of results: what it says, what it survives, and that nothing in a result can act on the reader's machine."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from typer.testing import CliRunner

from vtok.errors import ConfigError
from vtok.eval import write_report
from vtok.eval.cli.program import app
from vtok.eval.report import rows, sections, values
from vtok.eval.report.frame import front_of
from vtok.eval.report.html import ReportOptions, page, repeat
from vtok.eval.report.read import read
from vtok.eval.report.summary import gap_columns, table
from vtok.eval.runs import loader as runs
from vtok.eval.runs.loader import parse_setting

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}"
VOID = {"meta", "link", "img", "br", "wbr", "path"}


def pack(hits):
    return np.packbits(np.asarray(hits, bool)).tobytes().hex()


def record(method="tome", budget=0.6, hits=None, base=None, **more):
    """A record as `vtok demo` writes it."""
    hits = np.arange(400) % 10 > 0 if hits is None else hits
    macs = 1.0 if method == "unpatched" else budget
    made = {
        "key": f"{method}-{budget}",
        "model": "net",
        "backend": "timm",
        "method": method,
        "budget": budget,
        "params": {} if method == "unpatched" else {"r": 8, "prop_attn": True} if method == "tome" else {"keep": 0.5},
        "dataset": "pictures",
        "n": len(hits),
        "metrics": {"top1": 100 * hits.mean(), "top1_stderr": 1.5},
        "tokens": {"in": 65.0, "out": 65 * macs, "mean_per_layer": [65.0, 65 * macs, 60 * macs]},
        "gmacs": {"base": 1.0, "model": macs, "pruner": 0.01},
        "implied_speedup": 1 / macs,
        "dtype": "float32",
        "device": "cpu",
        "threads": 2,
        "batch_size": 50,
        "versions": {"torch": "2.14", "vtok": "0.1.0"},
        "correct": pack(hits),
    }
    if method != "unpatched" and base is not None:
        gap = hits.astype(float) - base
        made["metrics"] |= {"difference": 100 * gap.mean(), "difference_stderr": 100 * gap.std(ddof=1) / len(gap) ** 0.5}
        made |= {"speedup": 1.5, "speedup_ci": [1.4, 1.6], "achieved": 1.5 * macs}
    return made | more


@pytest.fixture
def records():
    base = np.arange(400) % 10 > 0
    worse = base & (np.arange(400) % 7 > 0)
    return [
        record("unpatched", 1.0, base),
        record("tome", 0.6, base, base),
        record("random", 0.6, worse, base),
        record("ats", 0.6, worse & (np.arange(400) % 3 > 0), base, speedup=0.9, speedup_ci=[0.85, 0.95], params={}),
    ]


def lines(path, held):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in held))
    return path


class Page(HTMLParser):
    """Tags in order, checked to nest, with the text between them."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.words = [], [], []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "script" not in self.stack and "style" not in self.stack:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


def made(tmp_path, held, **options):
    report = write_report([lines(tmp_path / "results.jsonl", held)], tmp_path / "r.html", ReportOptions(**options))
    return Page(report.path.read_text()), report


def test_what_is_significant_comes_first(tmp_path, records):
    shown, report = made(tmp_path, records)
    ((title, words),) = report.headlines
    assert title == "net on pictures"
    assert "1 of 2 settings beat random" in words and "tome at 60" in words
    assert "1 fall below it (ats" in words and "1 slower than unpatched (ats" in words
    assert "Not apart from unpatched (the 95 % interval holds zero, 400 samples): tome" in shown.text
    assert shown.text.index("What is significant") < shown.text.index(words[:60]) < shown.text.index("All settings")
    gap = sections.sections(records)[0].rivals
    assert all(rival.paired for rival in gap.values()) and len(gap) == 2


def test_gaps_are_those_of_the_samples(records):
    (section,) = sections.sections(records)
    i = next(i for i, row in enumerate(section.rows) if row.method == "tome")
    hits = {row.method: row.correct.astype(float) for row in section.rows}
    gap = 100 * (hits["tome"] - hits["random"])
    rival = section.rivals[i]
    assert rival.gap.point == pytest.approx(gap.mean())
    assert rival.gap.high - rival.gap.low == pytest.approx(2 * 1.96 * gap.std(ddof=1) / len(gap) ** 0.5, rel=0.01)
    records[1].pop("correct")
    again = sections.sections(records)[0].rivals[i]
    assert not again.paired and again.gap.point == pytest.approx(gap.mean())
    assert again.gap.high - again.gap.low > 0


def test_columns_of_gaps_to_random_and_downsample(records):
    """Beside every setting but the baseline itself; no column for a baseline that is not among the settings."""
    (section,) = sections.sections(records)
    assert [column.name for column in gap_columns(section)] == ["vs random [95 %]"]
    other = records[2] | {"method": "downsample", "setting": "downsample", "key": "other"}
    assert records[2]["method"] == "random"
    (section,) = sections.sections([*records, other])
    to_random, to_downsample = gap_columns(section)
    cells = {row.method: (to_random.cell(row), to_downsample.cell(row)) for row in section.rows}
    assert cells["unpatched"] == ("-", "-") and cells["random"][0] == "-" and cells["downsample"][1] == "-"
    hits = {row.method: row.correct.astype(float) for row in section.rows}
    gap = 100 * (hits["tome"] - hits["random"]).mean()
    assert all(float(cell.split()[0].replace("\u2212", "-")) == pytest.approx(gap, abs=0.05) for cell in cells["tome"])
    assert "vs downsample [95 %]" in table(section, gap_columns(section), 1, str).markdown().splitlines()[0]


def test_random_at_another_cost_is_no_rival(records):
    far = [records[0], records[1] | {"budget": 0.5, "key": "x"}, records[2]]
    for one in far[1:]:
        one["tokens"] = {"mean_per_layer": [60.0 if one["method"] == "tome" else 20.0]}
    assert sections.sections(far)[0].rivals == {}
    far[2]["tokens"] = {"mean_per_layer": [57.0]}
    (rival,) = sections.sections(far)[0].rivals.values()
    assert rival.cost == "with 57 tokens"


def test_tables_can_be_sorted_and_read_aloud(tmp_path, records):
    shown, _ = made(tmp_path, records)
    heads = [attrs for attrs in shown.all("th") if attrs.get("scope") == "col" and "aria-sort" in attrs]
    assert len(heads) == len(shown.all("button")) and {attrs["aria-sort"] for attrs in heads} == {"none"}
    assert all(attrs["type"] == "button" and attrs["title"] for attrs in shown.all("button"))
    assert all(
        attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in shown.all("div") if "scroll" in attrs.get("class", "")
    )
    assert next(attrs["href"] for attrs in shown.all("a")) == "#main"
    pictures = [attrs for attrs in shown.all("svg") if attrs.get("role") == "img"]
    ids = {attrs["id"] for _, attrs in shown.tags if "id" in attrs}
    assert len(pictures) >= 4 and all(set(attrs["aria-labelledby"].split()) <= ids for attrs in pictures)
    assert all("aria-hidden" in attrs for attrs in shown.all("svg") if attrs.get("role") != "img")
    assert len(ids) == sum("id" in attrs for _, attrs in shown.tags)  # no id twice
    assert shown.all("html")[0]["lang"] == "en" and "width=device-width" in str(shown.all("meta"))


def test_a_page_is_one_file(tmp_path, records):
    shown, report = made(tmp_path, records)
    for tag, attrs in shown.tags:
        for name in ("src", "href"):
            assert attrs.get(name, "#").startswith(("#", "data:")), (tag, attrs)
    style = re.search(r"<style>(.*?)</style>", report.path.read_text(), re.S).group(1)
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style and "@media print" in style


def test_hostile_text_stays_text(tmp_path, records):
    evil = [
        one
        | {
            "model": EVIL,
            "dataset": EVIL,
            "title": f"{one['method']} {EVIL}",
            "device": EVIL,
            "task": EVIL,
            "key": f"{i}{EVIL}",
        }
        for i, one in enumerate(records)
    ]
    evil[1] |= {"groups": {EVIL: {EVIL: {"n": 5, "top1": 3.0, "top1_difference": -1.0, "top1_difference_ci": [-2.0, -0.5]}}}}
    evil[1]["metrics"][EVIL] = 12.0
    evil[1]["config"] = {"model": {"name": EVIL}, EVIL: EVIL}
    samples = [
        {"key": f"1{EVIL}/7", "doc_id": 7, "question": EVIL, "target": EVIL, "prediction": EVIL, "baseline_prediction": "no"}
    ]
    lines(tmp_path / "samples.jsonl", samples)
    report = write_report(
        [lines(tmp_path / "results.jsonl", evil), tmp_path / "samples.jsonl"], tmp_path / "r.html", ReportOptions(EVIL)
    )
    shown = Page(report.path.read_text())
    assert len(shown.all("script")) == 1 and shown.all("img") == []
    assert not [attrs for _, attrs in shown.tags if any(name.startswith("on") for name in attrs)]
    assert shown.text.count("<script>alert(1)</script>") > 12 and "{{ 7*7 }}" in shown.text and "49" not in shown.text
    policy = next(attrs["content"] for attrs in shown.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "unsafe-eval" not in policy


def test_damaged_lines_are_told_on_the_page(tmp_path, records):
    path = lines(tmp_path / "results.jsonl", records)
    with open(path, "a") as file:
        file.write('{"key": "half\n[1, 2]\n"text"\n' + "[" * 100_000 + "\n")
    report = write_report([path], tmp_path / "r.html")
    shown = Page(report.path.read_text())
    assert len(report.problems) == 4 and "4 places in the results could not be read" in shown.text
    assert f"{path}:5: damaged line" in shown.text and f"{path}:6: not a result" in shown.text


def whole_page(held):
    found = sections.sections(held)
    look = page.charts.looks(found)
    return Page(page.render("t", [page._part(s, i, look, {}, ReportOptions()) for i, s in enumerate(found)], [], ""))


@pytest.mark.parametrize("junk", [None, 3, "text", [{}], {"in": "x"}, float("nan"), 10**400, -1])
def test_any_field_may_be_anything(records, junk):
    for name in record("tome", 0.5, base=np.ones(400)):
        assert "tome" in whole_page([records[0], {**records[1], name: junk}, records[2]]).text or name == "method"
    everything = dict.fromkeys(records[1], junk) | {"method": "tome"}
    assert "tome" in whole_page([records[0], everything]).text


def test_any_field_may_be_missing(records):
    for name in records[1]:
        whole_page([{k: v for k, v in one.items() if k != name} for one in records])
    assert "tome" in whole_page([{"method": "tome", "metrics": {}}]).text


def test_records_that_cannot_be_compared_stand_apart(tmp_path, records):
    other = [one | {"model": "second", "key": f"2{one['key']}"} for one in records]
    shares = {"acc1": 0.9, "acc1_stderr": 0.01, "difference": -0.02, "difference_stderr": 0.005}
    clip = record("tome", 0.6, metrics=shares, task="zeroshot_classification", key="c", n=50, correct="")
    bench = {k: v for k, v in record("tome", base=np.ones(400)).items() if k not in ("metrics", "key", "dataset", "correct")}
    (tmp_path / "bench.json").write_text(json.dumps([bench | {"setting": "tome(r=8)"}]))
    held = lines(tmp_path / "results.jsonl", [*records, *other, clip])
    report = write_report([held, tmp_path / "bench.json"], tmp_path / "r.html")
    assert [name for name, _ in report.headlines] == [
        "net on pictures (400 samples)",
        "second on pictures",
        "net on pictures (zeroshot_classification, 50 samples)",
        "Speed of net",
    ]
    shown = Page(report.path.read_text())
    assert "90.0 ± 1.0" in shown.text and "−2.0 [−3.0, −1.0]" in shown.text
    assert "No record of the unpatched model" in shown.text and "No random setting of the same cost" in shown.text


def test_the_same_record_twice_counts_once(tmp_path, records):
    lines(tmp_path / "results.jsonl", records)
    lines(tmp_path / "part" / "results.jsonl", [records[1] | {"extra": 1}])
    found = read([tmp_path])
    assert len(found.records) == 4 and found.problems == []
    lines(tmp_path / "part" / "results.jsonl", [records[1] | {"speedup": 9.0}])
    found = read([tmp_path])
    assert len(found.records) == 4 and "different results of one setting" in found.problems[0]


def test_what_a_run_keeps_of_its_tasks_is_shown_once(tmp_path, records):
    inner = [one | {"setting": one["method"], "key": f"task-{one['key']}"} for one in records]
    lines(tmp_path / "results.jsonl", [one | {"setting": one["method"], "config": {"task": "vqa"}} for one in records[:3]])
    lines(tmp_path / "vqa" / "net" / "results.jsonl", inner)
    found = read([tmp_path])
    assert [one["key"] for one in found.records] == ["unpatched-1.0", "tome-0.6", "random-0.6", "task-ats-0.6"]
    assert len(read([tmp_path / "vqa"]).records) == 4


def test_nothing_to_show_is_an_error(tmp_path, records):
    with pytest.raises(ConfigError, match="does not exist"):
        write_report([tmp_path / "nothing"])
    with pytest.raises(ConfigError, match="no results there"):
        write_report([tmp_path])
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged file"):
        write_report([tmp_path / "x.json"])
    with pytest.raises(ConfigError, match="it is a folder"):
        write_report([lines(tmp_path / "results.jsonl", records)], tmp_path)


def test_numbers_as_they_stand_on_the_page():
    assert values.figure(-0.04) == "0.0" and values.figure(-1.25, 2, True) == "−1.25" and values.figure(None) == "–"
    assert values.with_ends(values.Interval(1.5, 1.25, 1.75), 2, unit="×") == "1.50× [1.25, 1.75]"
    assert sections.with_sign(values.Interval(-0.9, -1.78, -0.02)) == "−0.90 [−1.78, −0.02]"
    assert values.joined(list("abcdefgh"), 3) == "a, b and 6 more"
    assert rows.label_of({"title": "divprune(keep=None, keep_tokens=64)"}, "divprune", None) == "divprune(keep_tokens=64)"
    assert rows.label_of({"title": "atp(weights=/tmp/a/b.safetensors, x=1)"}, "atp", None) == "atp(weights=b.safetensors, x=1)"


def test_axes_have_round_numbers():
    to, ticks = page.charts._axis([88.0, 98.2], 0, 300)
    assert [tick.words for tick in ticks] == ["87.5", "90.0", "92.5", "95.0", "97.5"]
    assert to(88.0) < ticks[1].place < to(98.2)
    assert [t.words for t in page.charts._axis([0, 11], 0, 100, 5, margin=0, whole=True)[1]] == ["0", "3", "6", "9"]
    assert page.charts._axis([5.0], 0, 1)[1]


def test_the_front_holds_what_nothing_beats(records):
    (section,) = sections.sections(records)
    front = front_of(section.rows, page.total_gmacs, True)
    assert {section.rows[i].method for i in front} == {"tome"}  # as right as unpatched, and cheaper


@pytest.mark.parametrize(
    "setting",
    [
        "tome:r=13",
        "tome:r=(8,-1)",
        "pitome:ratio=0.9,preset=official_clip",
        "zero_tprune:layers=[2, 5],retain=0.9",
        "random:keep=0.25+tome:r=2",
        "todre",
    ],
)
def test_commands_name_the_setting_again(setting):
    chosen = parse_setting(setting)
    configs = chosen if isinstance(chosen, list) else [repeat.METHODS.get(chosen[0]).create(**chosen[1])]
    plain = [json.loads(json.dumps(config.to_dict())) for config in configs]
    held = {"method": " + ".join(c.name for c in configs), "params": plain if len(plain) > 1 else plain[0]}
    again = parse_setting(repeat.method_text(held))
    found = again if isinstance(again, list) else [repeat.METHODS.get(again[0]).create(**again[1])]
    assert found == configs


def test_how_to_repeat(tmp_path, records):
    model = {"backend": "reference", "name": "reference-vit"}
    config = {"model": model, "batch_size": 50, "dtype": "fp32", "seed": 0, "task": "imagenet"}
    methods = {"unpatched": None, "tome": {"name": "tome", "r": 8}, "random": {"name": "random", "flops": 0.6}}
    held = [one | {"config": config | {"method": methods.get(one["method"])}} for one in records]
    shown, _ = made(tmp_path, held)
    assert "vtok run run-1.yaml" in shown.text and "name: reference-vit" in shown.text
    ((_, content),) = repeat.repeat(sections.sections(held)[0], 1).files
    (tmp_path / "run-1.yaml").write_text(content)
    assert [setting.name for setting in runs.load(str(tmp_path / "run-1.yaml")).settings] == ["tome", "random"]
    old = {"task": "imagenet", "backend": "timm", "seed": 3, "dtype": "bfloat16"}
    task = [one | old | {"params": {"r": 8} if one["method"] == "tome" else {}} for one in records[:2]]
    shown, _ = made(tmp_path, task)
    assert "vtok run run-1.yaml" in shown.text and "an earlier release wrote these records" in shown.text
    ((_, content),) = repeat.repeat(sections.sections(task)[0], 1).files
    (tmp_path / "old.yaml").write_text(content)
    again = runs.load(str(tmp_path / "old.yaml"))
    assert (again.model, again.data, again.num_samples, again.batch_size) == ("net", {"imagenet": "pictures"}, 400, 50)
    assert (again.seed, again.dtype, [setting.title for setting in again.settings]) == (3, "bf16", ["tome(r=8)"])
    shown, _ = made(tmp_path, records)
    assert "the records do not say how they were made" in shown.text


def test_the_command(tmp_path, records):
    path = lines(tmp_path / "results.jsonl", records)
    done = CliRunner().invoke(app, ["report", str(path), "-o", str(tmp_path / "out" / "page.html"), "--title", "Mine"])
    assert done.exit_code == 0 and "beat random" in done.output and (tmp_path / "out" / "page.html").is_file()
    assert "<h1>Mine</h1>" in (tmp_path / "out" / "page.html").read_text()
