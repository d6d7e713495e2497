"""What mkdocs runs on the pages of `assets/docs` (`make docs`): they hold markers that are replaced by what the code knows.

| marker, as an HTML comment | is replaced by |
|---|---|
| `include: PATH` | a file, or a notebook with its outputs; behind a heading of the page its headings go one level down |
| `include: PATH # HEADING` | of a Markdown file the part under that heading |
| `method: NAME` | where a method acts, its class, its knobs and defaults, and the runs of its published operating points |
| `tables` | the tables of published results, and what cannot be repeated |

So no knob, default or published figure is typed twice.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vtok.capabilities import EncoderMethod, HasBudget, HasSearchSpace, PromptMethod
from vtok.errors import ConfigError, MissingExtraError
from vtok.eval.published import report, tables
from vtok.eval.runs import loader as runs
from vtok.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
MARKER = re.compile(r"^<!-- (include|method|tables)(?:: (.+?))? -->$", re.M)
_FENCED = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The hook of mkdocs: a page with its markers replaced. Raises `ConfigError`: a marker names what is not there."""
    makers: dict[str, Callable[[str, bool], str]] = {"include": _included, "method": _method, "tables": _tables}
    return MARKER.sub(lambda found: makers[found[1]](found[2] or "", "\n#" in f"\n{markdown[: found.start()]}"), markdown)


def _included(what: str, deeper: bool) -> str:
    name, _, heading = what.partition(" # ")
    path = ROOT / name
    if not path.is_file():
        raise ConfigError(f"a page includes {name}, which is no file of the repository")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = _notebook(text)
    if path.suffix in _FENCED:
        return f"```{_FENCED[path.suffix]}\n{text.rstrip()}\n```"
    if heading:
        text = section(text, heading, name)
    return _lowered(text) if deeper else text


def _notebook(text: str) -> str:
    """Cells of a notebook as Markdown, with the outputs that are stored in it: pictures, or else text."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = "".join("".join(out["text"]) for out in cell.get("outputs", ()) if out["output_type"] == "stream")
        for data in (out["data"] for out in cell.get("outputs", ()) if "data" in out):
            if "image/png" in data:
                parts.append(f"![what the cell draws](data:image/png;base64,{''.join(data['image/png'].split())})")
            else:
                printed += "".join(data.get("text/plain", ""))
        if printed.strip():
            lines = "\n".join(line for line in printed.splitlines() if line.strip())
            parts.append(f"```text\n{lines}\n```")
    return "\n\n".join(parts)


def section(text: str, heading: str, name: str) -> str:
    """A heading of a Markdown file and what stands under it, up to the next heading of its level or above."""
    fenced, taken, level = False, list[str](), 0
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        found = None if fenced else re.match(r"(#+) (.*)", line)
        if found and level and len(found[1]) <= level:
            break
        if found and not level and found[2].strip() == heading:
            level = len(found[1])
        if level:
            taken.append(line)
    if not taken:
        raise ConfigError(f"a page includes the part {heading!r} of {name}, which has no such heading")
    return "\n".join(taken).strip()


def _lowered(text: str) -> str:
    """Every heading one level down, but what is inside of code."""
    fenced, lines = False, []
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        lines.append(f"#{line}" if line.startswith("#") and not fenced and re.match(r"#+ ", line) else line)
    return "\n".join(lines)


def _method(name: str, _: bool) -> str:
    cls = METHODS.get(name)
    known = knobs(name)
    places = {"inside vision encoders": EncoderMethod, "on prompts of vision-language models": PromptMethod}
    where = [words for words, protocol in places.items() if issubclass(cls, protocol)]
    also = ["takes `flops=`"] if issubclass(cls, HasBudget) else []
    also += ["searched by `vtok tune`"] if issubclass(cls, HasSearchSpace) else []
    also += ["has `preset=`"] if "preset" in known else []
    rows = [f"| `{knob}` | {_cell(default)} | {_cell(meaning)} |" for knob, (default, meaning) in known.items()]
    parts = [
        f"Acts {' and '.join(where)}; {', '.join(also) or 'set by its own knobs alone'}. Class: [`vtok.{cls.__name__}`]"
        f"[{cls.__module__}.{cls.__name__}].",
        "\n".join(["| knob | default | meaning |", "|---|---|---|", *rows]),
    ]
    found = [runs.load(run) for run in runs.bundled() if run.startswith(f"{name}_")]
    found = [run for run in found if run.published and {setting.name for setting in run.settings} == {name}]
    if found:
        listed = report.listing(name, found).markdown().split("\n\n", 1)[-1]
        parts.append(
            f"<details markdown>\n<summary>{len(found)} published operating points</summary>"
            f"\n\n`vtok run NAME` repeats one ([reproduction](evaluate.md#published-tables)).\n\n{listed}\n\n</details>"
        )
    return "\n\n".join(parts)


def knobs(name: str) -> dict[str, tuple[str, str]]:
    """Knob -> (default, meaning), as the docstring of a method's config says it.

    Raises:
        ConfigError: a field without a word.
        MissingExtraError: the reader of docstrings is not installed.
    """
    try:
        import griffe
    except ImportError as error:
        raise MissingExtraError("griffe", "docs") from error
    cls = METHODS.get(name)
    said: dict[str, str] = {}
    for part in griffe.Docstring(inspect.getdoc(cls) or "").parse("google"):
        if part.kind is griffe.DocstringSectionKind.attributes:
            said |= {one.name: one.description for one in part.value}
    defaults = cls().to_dict()
    fields = [field.name for field in dataclasses.fields(cls)]
    if missing := [field for field in fields if field not in said]:
        raise ConfigError(f"{cls.__name__} has fields of which its docstring says nothing: {', '.join(missing)}")
    return {field: (_default(defaults.get(field)), said[field]) for field in said if field in fields}


def _default(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return f"`[{', '.join(_default(one).strip('`') for one in value)}]`"
    return f"`{value:.4g}`" if isinstance(value, float) else f"`{value!r}`"


def _cell(text: str) -> str:
    """Text that may stand in a cell: one line, its bars escaped."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def _tables(_: str, __: bool) -> str:
    listed = report.contents(tables.tables()).markdown()
    missing = tables.missing()
    return (
        f"{listed}\n\n<details markdown>\n<summary>{len(missing)} points without a run, each with the reason</summary>\n\n"
        f"{report.missing_table(missing).markdown()}\n\n</details>"
    )
