"""The examples of the documentation run offline, and its notebooks from the first cell to the last."""

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("open_clip")

DOCS = Path(__file__).resolve().parents[2] / "assets" / "docs"
slow = pytest.mark.slow
# Script -> arguments that make it short, and what it prints.
RUNS = {
    "classify": (["--count", "4", "--method", "tome"], "the same class for"),
    "zero_shot": (["--flops", "0.6"], "picture 5: unpatched red circle"),
    "ask_a_vlm": (["--keep", "0.25"], "divprune, 0.25 of the visual tokens: no"),
    "serve": ([], "of 576 visual tokens 58 stay"),
    "finetune_tome": (["--steps", "1", "--batch-size", "4", "--test", "10"], "loaded again from finetuned"),
    "finetune_atp": (["--steps", "1", "--batch-size", "2"], "decoder layer 1"),
    "export_onnx": ([], "largest difference to the model"),
    "write_a_method": ([], "random, keep=0.9: top-1"),
}
SLOW = {"finetune_atp", "export_onnx", "write_a_method"}


def test_every_example_is_run():
    assert {path.stem for path in (DOCS / "examples").glob("*.py")} == set(RUNS)
    shown = (DOCS / "examples.md").read_text(encoding="utf-8")
    assert all(f"<!-- include: assets/docs/examples/{name}.py -->" in shown for name in RUNS)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[slow] if name in SLOW else []) for name in RUNS])
def test_example(name, monkeypatch, tmp_path, capsys):
    if name == "export_onnx":
        pytest.importorskip("onnxruntime")
    arguments, said = RUNS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(DOCS / "examples" / f"{name}.py"), run_name="__main__")
    assert said in capsys.readouterr().out


@slow
@pytest.mark.parametrize("path", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook(path, tmp_path, monkeypatch):
    """From the first cell to the last, in a kernel of its own. Outputs are stored for readers; they are made anew here."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    stored = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]
    assert stored and not any(out.output_type == "error" for cell in stored for out in cell.outputs)
    assert path.stat().st_size < 500_000
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a kernel draws into its own cells, unless another backend is asked for
    nbclient.NotebookClient(notebook, timeout=560, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert any("image/png" in out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", ()))
