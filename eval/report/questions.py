"""What is derived from records of questions about pictures and pages: tables, findings, the plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtok.eval.cli.vqa import measured, share
from vtok.eval.common.statistics import in_brackets, paired_difference
from vtok.eval.report.tables import FLOOR, correctness
from vtok.writing import replacing

if TYPE_CHECKING:
    from rich.table import Table

Record = dict[str, Any]
HEADER = ("method", "tokens", "GMACs", "implied", "measured [95 %]", "all %", "vs unpatched", "open %", "yes/no %", "loyalty %")
PAGE_HEADER = (*HEADER[:7], "1 filled %", "2 %", "3 %", "4 %", "kept of a blank crop", "of a filled one")
CAPTION = (
    "tokens: visual, mean over decoder layers; implied, measured: until the first token, tower included; ± standard error; vs: "
    "paired"
)


def kept_tokens(record: Record) -> float:
    """Visual tokens, mean over decoder layers."""
    layers = record["tokens"]["mean_per_layer"]
    return sum(layers) / len(layers)


def ordered(records: Sequence[Record]) -> list[Record]:
    """Unpatched first, then by falling number of tokens, rounded so that the floors stand behind the methods they belong to."""
    first = [r for r in records if r["method"] == "unpatched"]
    rest = [r for r in records if r["method"] != "unpatched"]
    budgets = sorted({kept_tokens(r) for r in rest if r["method"] == "random"}, reverse=True)

    def place(r: Record) -> tuple[int, bool, str]:
        nearest = min(range(len(budgets)), key=lambda i: abs(budgets[i] - kept_tokens(r)), default=0)
        return nearest, r["method"] in FLOOR, r["method"]

    return first + sorted(rest, key=place)


def title(records: Sequence[Record]) -> str:
    """Of a table: model, questions, and what is right without the image."""
    first = records[0]
    return (
        f"{first['model']} on {first['dataset']}: {first['n']} questions about {first['n_images']} images, "
        f"{100 * first['blind']:.1f} % right without the image"
    )


def _costs(record: Record) -> list[str]:
    return [
        record["method"],
        f"{kept_tokens(record):.0f}",
        f"{record['gmacs']['model']:.3f}",
        f"{record['implied_speedup']:.2f}x" if "implied_speedup" in record else "-",
        measured(record),
    ]


def _accuracy(record: Record) -> list[str]:
    m = record["metrics"]
    return [share(m), share(m, "exact_match_difference", "+")]


def row(record: Record) -> tuple[str, ...]:
    """The cells of one setting on pictures, as `HEADER` names them."""
    m = record["metrics"]
    loyal = f"{100 * m['loyalty']:.1f}" if "loyalty" in m else "-"
    return (*_costs(record), *_accuracy(record), _part(record, "kind", "open"), _part(record, "kind", "yes/no"), loyal)


def page_row(record: Record) -> tuple[str, ...]:
    """The cells of one setting on pages, as `PAGE_HEADER` names them."""
    kept = record.get("kept_of_crops")
    crops = ("-", "-") if kept is None else (f"{kept['blank']:.1f}", f"{kept['filled']:.1f}")
    return (*_costs(record), *_accuracy(record), *(_part(record, "density", n) for n in "1234"), *crops)


def blind_row(records: Sequence[Record], header: Sequence[str]) -> tuple[str, ...]:
    """What the best answers without the image would give."""
    first = records[0]
    groups = first["groups"]
    parts = groups["density"] if "density" in groups else groups.get("kind", {})
    cells = dict.fromkeys(header, "-") | {header[0]: "blind", "all %": f"{100 * first['blind']:.1f}"}
    names = {"open": "open %", "yes/no": "yes/no %", "1": "1 filled %"}
    for name, part in parts.items():
        cells[names.get(name, f"{name} %")] = f"{100 * part['blind']:.1f}"
    return tuple(cells[name] for name in header)


def table(records: Sequence[Record], header: Sequence[str], cells: Callable[[Record], Sequence[str]], heading: str) -> Table:
    """A rich table, the blind figures last."""
    from rich.table import Table

    result = Table(title=heading, caption=CAPTION)
    for i, name in enumerate(header):
        result.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for record in records:
        result.add_row(*cells(record), style="dim" if record["method"] in FLOOR else None)
    result.add_section()
    result.add_row(*blind_row(records, header), style="dim")
    return result


def markdown(records: Sequence[Record], header: Sequence[str], cells: Callable[[Record], Sequence[str]]) -> str:
    """The same as a GitHub table."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    rows = [cells(record) for record in records] + [blind_row(records, header)]
    return "\n".join(lines + ["| " + " | ".join(one) + " |" for one in rows])


def findings(records: Sequence[Record]) -> list[str]:
    """How every method stands to the random one with as many tokens: paired, in points with the 95 % interval."""
    lines = []
    floors = [r for r in records if r["method"] == "random"]
    for record in records[1:]:
        if record["method"] in FLOOR or not floors:
            continue
        random = min(floors, key=lambda r: abs(kept_tokens(r) - kept_tokens(record)))
        gap = paired_difference(correctness(record).astype(float) - correctness(random)).scaled(100)
        word = {1: "clearly above", -1: "clearly below", 0: "not clearly apart from"}[gap.sign]
        lines.append(
            f"{record['method']} with {kept_tokens(record):.0f} visual tokens is {word} random with {kept_tokens(random):.0f}: "
            f"{gap.point:+.1f}{in_brackets(gap.ends, '+.1f')} points"
        )
    return lines


def _part(record: Record, grouping: str, name: str) -> str:
    """Accuracy of some of the questions; "-" if there are none."""
    found = record["groups"].get(grouping, {}).get(name)
    return "-" if found is None else share(found)


def plot(pictures: Sequence[Record], pages: Sequence[Record], path: Path) -> None:
    """Accuracy against visual tokens: all and open questions about pictures, and questions about pages."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        (pictures, "pictures: all questions (%)", lambda r: r["metrics"], pictures[0]["blind"]),
        (pictures, "pictures: open questions (%)", lambda r: r["groups"]["kind"]["open"], None),
        (pages, "pages: all questions (%)", lambda r: r["metrics"], pages[0]["blind"]),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(5.0 * len(panels), 4.4), layout="constrained")
    names = sorted({r["method"] for r in (*pictures, *pages)} - {"unpatched"}, key=lambda name: (name in FLOOR, name))
    for axis, (records, label, part, blind) in zip(axes, panels):
        for i, name in enumerate(names):
            points = sorted((r for r in records if r["method"] == name), key=kept_tokens)
            if points:
                axis.errorbar(
                    [kept_tokens(r) for r in points],
                    [100 * part(r)["exact_match"] for r in points],
                    yerr=[100 * (part(r)["exact_match_stderr"] or 0) for r in points],
                    label=name,
                    color="0.6" if name in FLOOR else f"C{i}",
                    linestyle="--" if name in FLOOR else "-",
                    marker="x" if name in FLOOR else "o",
                    capsize=2,
                )
        base = part(records[0])
        axis.axhline(100 * base["exact_match"], color="black", linewidth=0.8)
        axis.plot(kept_tokens(records[0]), 100 * base["exact_match"], "k*", markersize=11, label="unpatched")
        blind = base["blind"] if blind is None else blind
        axis.axhline(100 * blind, color="black", linewidth=0.8, linestyle=":", label="without the image")
        axis.set_xlabel("visual tokens, mean over decoder layers")
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(f"reference LLaVA, {pictures[0]['n']} questions, and LLaVA-NeXT, {pages[0]['n']} questions")
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=130)
    plt.close(figure)
