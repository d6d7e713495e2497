"""Tables of the demo in 100 columns: no word is broken, and the finding stands on top."""

import io

import numpy as np
import pytest
from rich.console import Console
from test_report_html import record

from vtok.eval.demo.parts import short_table, show
from vtok.eval.report.sections import sections

BASE = np.arange(400) % 10 > 0
MODEL = {"model": "reference-scenes", "dataset": "scenes", "task": "vqa"}


def kept(method, tokens, hits, **params):
    """A setting that says how many tokens it keeps, not its budget."""
    held = {"in": 256.0, "out": float(tokens), "mean_per_layer": [float(tokens)] * 6}
    return record(method, 0.5, hits, BASE, **MODEL, params=params, tokens=held) | {"budget": None, "key": f"{method}{params}"}


def settings():
    few = BASE & (np.arange(400) % 3 > 0)
    return [
        record("unpatched", 1.0, BASE, **MODEL) | {"budget": None},
        kept("cdpruner", 64, BASE, keep_tokens=64),
        kept("cdpruner", 64, few, keep_tokens=64, relevance="none"),
        kept("sparsevlm", 64, few, keep=[0.2, 0.1, 0.05]),
        kept("random", 64, few, keep=0.25),
    ]


@pytest.mark.parametrize("budget", [False, True])
def test_tables_fit_100_columns_and_break_no_word(budget):
    worse = BASE & (np.arange(400) % 7 > 0)
    of_encoder = [record("unpatched", 1.0, BASE), record("zero_tprune", 0.6, worse, BASE), record("random", 0.6, worse, BASE)]
    (section,) = sections(of_encoder if budget else settings())
    console = Console(width=100, record=True, file=io.StringIO(), markup=False)
    table = short_table(section)
    show(section, console, table)
    text = console.export_text()
    lines = text.splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert lines[0].startswith(section.title) and "beat random at the same cost" in " ".join(lines[:3])
    drawn = [line for line in lines if "│" in line or "┃" in line]
    for row in (table.header, *table.rows):
        for cell in row:
            for line in cell.split("\n"):
                if "[" not in line:  # intervals and headings with them may be wrapped at spaces
                    assert any(line in one for one in drawn), line
                assert all(any(word in one for one in drawn) for word in line.split()), line
