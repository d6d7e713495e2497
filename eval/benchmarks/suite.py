"""A list of benchmarks as a YAML file, such as configs/suites/gpu.yaml, run one after the other: `vtok bench-suite gpu`.

Every combination of the lists in one of its `cells` is one benchmark. Results are kept after every benchmark, and a second
start goes on where the first stopped. What fails is told and passed over.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

import vtok
from vtok.errors import ConfigError, VtokError, brief
from vtok.eval.benchmarks.compiled import Compiler
from vtok.eval.benchmarks.prefill import measure_prompts
from vtok.eval.benchmarks.result import interval
from vtok.eval.benchmarks.throughput import PAIRS, device_name, dtype_of, measure
from vtok.eval.common.records import Record, Records, key_of
from vtok.eval.models.architectures import sample_prompts
from vtok.eval.models.by_name import load_model, sample_images
from vtok.eval.report.tables import Column, Table
from vtok.eval.runs import yaml_text
from vtok.eval.runs.loader import SUITES
from vtok.eval.runs.methods import parse_setting
from vtok.registry import METHODS
from vtok.targets import vlm_targets
from vtok.writing import write

_BUSY = "†: unreliable timing: interleaved and plain loops over the unpatched model differ by more than 3 %"


class Cell(BaseModel):
    """Benchmarks of one model: one for every batch size, type and way to compile.

    Attributes:
        model: as for `vtok bench`; weights are random.
        methods: settings, as the command line has them.
        batch_size: images, or prompts, of a batch.
        dtype: "fp32", "bf16" or "fp16".
        compile: modes of torch.compile; `None` = as it is. Encoders only.
        pairs: timed pairs of batches.
        images, text_tokens: of the prompts of a vision-language model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str
    methods: list[str] = Field(min_length=1)
    batch_size: list[int] = [1]
    dtype: list[str] = ["fp32"]
    compile: list[str | None] = [None]
    pairs: int = Field(PAIRS, ge=5)
    images: int = 1
    text_tokens: int = 64


class _Suite(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    cells: list[Cell] = Field(min_length=1)


def bundled() -> dict[str, Path]:
    """The suites that come with vtok, by name."""
    folder = Path(str(resources.files("vtok.configs"))) / SUITES
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(name: str) -> list[dict[str, Any]]:
    """The benchmarks of a bundled suite, or of a file, in its order; a `ConfigError` if there is none, or it holds something
    else."""
    path = bundled().get(name, Path(name))
    if not path.is_file():
        raise ConfigError(f"no suite {name!r}; bundled: {', '.join(bundled())}; or name a YAML file")
    try:
        suite = _Suite.model_validate(yaml_text.read(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: {brief(first['msg'])}") from error
    found = []
    for cell in suite.cells:
        for text in cell.methods:
            parsed = parse_setting(text)
            if isinstance(parsed, tuple):
                METHODS.get(parsed[0])
        for mode in cell.compile:
            Compiler(mode or "default")
        shared = cell.model_dump(exclude={"batch_size", "dtype", "compile"})
        for dtype, mode, size in itertools.product(cell.dtype, cell.compile, cell.batch_size):
            dtype_of(dtype)
            found.append({**shared, "dtype": dtype, "compile": mode, "batch_size": size})
    return found


def run(
    benchmarks: Sequence[dict[str, Any]],
    folder: Path,
    device: str | None = None,
    minutes: float | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[list[Record], list[str]]:
    """Runs benchmarks, from `load`, that have no results in the folder (`results.jsonl`, `table.md`) yet.

    Args:
        device: `None` = a GPU if there is one.
        minutes: after so many no further benchmark is begun; `None` = no limit.
        tell: called with a line on every benchmark.

    Returns:
        (records of all that have run, a sentence on each that has not).
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    here = {"device": device_name(torch.device(device)), "vtok": vtok.__version__, "torch": torch.__version__}
    kept, start = Records(folder / "results.jsonl"), time.monotonic()
    done, records, left = kept.load(), [], []
    models: dict[tuple[str, str], nn.Module] = {}  # one at a time
    for benchmark in benchmarks:
        title = f"{benchmark['model']}, batch {benchmark['batch_size']}, {benchmark['dtype']}" + (
            f", compiled ({benchmark['compile']})" if benchmark["compile"] else ""
        )
        key = key_of(benchmark | here)
        found = [record for record in done if record.get("suite_key") == key]
        if found:
            records += found
            continue
        if minutes is not None and time.monotonic() - start > 60 * minutes:
            left.append(f"{title}: the {minutes:g} minutes were over")
            continue
        tell(title)
        try:
            for number, result in enumerate(_measured(benchmark, models, device)):
                found.append({"key": f"{key}-{number}", "suite_key": key, "compile": benchmark["compile"], **asdict(result)})
        except Exception as error:  # out of memory, a compiler, a kernel: the others run all the same
            kind = "" if isinstance(error, VtokError) else f"{type(error).__name__}: "
            left.append(f"{title}: {kind}{brief(error)}")
            continue
        kept.extend(found)
        records += found
        write(folder / "table.md", markdown(records, left))
    write(folder / "table.md", markdown(records, left))
    return records, left


def _measured(benchmark: dict[str, Any], models: dict[tuple[str, str], nn.Module], device: str) -> list[Any]:
    """The results of one benchmark; its model stays loaded for the next one."""
    name, dtype = benchmark["model"], benchmark["dtype"]
    if (name, dtype) not in models:
        models.clear()
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        models[name, dtype] = load_model(name, random_on=(device, dtype_of(dtype) or torch.float32))
    model = models[name, dtype]
    settings = [parse_setting(text) for text in benchmark["methods"]]
    common = {"pairs": benchmark["pairs"], "dtype": dtype, "device": device, "name": name}
    if vlm_targets(model):
        prompt = vtok.Prompt(benchmark["images"], benchmark["text_tokens"])
        return measure_prompts(model, sample_prompts(model, benchmark["batch_size"], prompt), settings, **common)
    compiler = None if benchmark["compile"] is None else Compiler(benchmark["compile"])
    pictures = sample_images(name, model, benchmark["batch_size"])
    on_gpu = device.startswith("cuda")
    return measure(model, pictures, settings, memory=on_gpu, profile=False, compiler=compiler, **common)


def _mark(record: Record) -> str:
    return "" if record["baseline_check"]["ok"] else " †"


def table(records: Sequence[Record]) -> Table:
    """One line a setting of every benchmark: speed-up with its interval, the bound that its MACs imply, the share reached."""

    columns = [
        Column("model", lambda r: r["model"].split("/")[-1], left=True),
        Column("batch", lambda r: str(r["batch_size"])),
        Column("dtype", lambda r: r["dtype"].replace("bfloat16", "bf16").replace("float", "fp")),
        Column("compiled", lambda r: r["compile"] or "-"),
        Column("method", lambda r: r["setting"], left=True),
        Column("speed-up [95 %]", lambda r: interval(r["speedup"], r["speedup_ci"]) + _mark(r)),
        Column("implied", lambda r: f"{r['implied_speedup']:.2f}x"),
        Column("achieved [95 %]", lambda r: interval(r["achieved"], r["achieved_ci"], "")),
        Column("attention", lambda r: r["kernel"]["patched"] if "kernel" in r else r["attention"]),
    ]
    first = records[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return Table.of(records, columns, caption=f"{first['device_name']}; {versions}; speed-up of VLMs: of the prefill; {_BUSY}")


def markdown(records: Sequence[Record], left: Sequence[str]) -> str:
    """The table with its caption, and what has not run."""
    shown = table(records) if records else None
    lines = ["Nothing has run."] if shown is None else [shown.markdown(), "", shown.caption or ""]
    if left:
        lines += ["", "Not run:", "", *(f"- {line}" for line in left)]
    return "\n".join(lines) + "\n"
