"""Results of benchmarks as JSON, and as tables for the terminal or, in GitHub markdown, for a README."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from vtok.errors import MissingExtraError
from vtok.eval.common.statistics import in_brackets

if TYPE_CHECKING:
    from rich.table import Table


class Timed(Protocol):
    """What the result of a setting has, whatever was timed (a dataclass).

    Attributes:
        setting: what was asked for, e.g. "tome(r=13)".
        speedup_ci: 95 % interval of unpatched / patched time; `None` = from too few pairs for one.
        verdict: what the interval supports, in words.
        versions: of python, torch, vtok and the backends.
        baseline_check: `plain_ms` (median of a plain loop), `ratio` (interleaved / plain), `ok` (within 3 %).
    """

    @property
    def setting(self) -> str: ...
    @property
    def speedup_ci(self) -> list[float] | None: ...
    @property
    def verdict(self) -> str: ...
    @property
    def versions(self) -> dict[str, str]: ...
    @property
    def baseline_check(self) -> dict[str, Any]: ...


def to_json(results: Sequence[Any]) -> str:
    """A JSON list of dataclasses, plain values under the names of their fields."""
    return json.dumps([asdict(result) for result in results], indent=2)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], results: Sequence[Timed], caption: str) -> Table:
    """A rich table, one row a result; settings that are slower than the unpatched model are red.

    Raises:
        MissingExtraError: rich is not installed.
    """
    try:
        from rich.table import Table
    except ImportError as error:
        raise MissingExtraError("rich", "eval") from error
    made = Table(*header, caption=caption)
    for row, result in zip(rows, results):
        made.add_row(*row, style="red" if slower(result) else None)
    return made


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], results: Sequence[Timed], caption: str) -> str:
    """A GitHub-markdown table with its caption under it and one sentence a setting on its speed."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    words = [f"- {r.setting}: {r.verdict}." for r in results]
    return "\n".join([*lines, "", caption, "", *words, ""])


def slower(result: Timed) -> bool:
    """Whether the whole interval of the speed-up lies below 1."""
    return result.speedup_ci is not None and result.speedup_ci[1] < 1


def speed(point: float, result: Timed) -> str:
    """A speed-up with its interval, marked where it is none."""
    return interval(point, result.speedup_ci) + (" SLOWER" if slower(result) else "")


def interval(point: float, ends: Sequence[float] | None, unit: str = "x") -> str:
    """ "1.52x [1.48, 1.55]", or "1.52x" where no interval is known."""
    return f"{point:.2f}{unit}{in_brackets(ends)}"


def arrow(values: dict[str, float], digits: int, ends: tuple[str, str] = ("base", "patched")) -> str:
    """ "12.5 -> 8.1"."""
    return " -> ".join(f"{values[end]:.{digits}f}" for end in ends)


def software(result: Timed) -> str:
    """Versions in a line."""
    return ", ".join(f"{name} {version}" for name, version in result.versions.items())


def trust(result: Timed, digits: int) -> str:
    """Whether the unpatched times of the run agree with those of a plain loop; the loop's time in ms with so many digits."""
    check = result.baseline_check
    found = "agrees" if check["ok"] else "DOES NOT AGREE: the machine was busy, measure again"
    return f"{check['plain_ms']:.{digits}f} ms, ratio {check['ratio']:.3f}: {found}"
