"""Imports point downwards; importing vtok needs torch alone; the public surface is what it says it is."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vtok

ROOT = Path(__file__).resolve().parent.parent
# package or module -> what it may import from vtok at module level ("" = the part itself)
ALLOWED = {
    "errors": set(),
    "_version": set(),
    "registry": {"errors"},
    "ops": {"errors", "ops", "state"},
    "space": set(),
    "state": set(),
    "reduction": {"errors", "ops", "state"},
    "run": {"errors", "state"},
    "tower": {"state"},
    "prompt": {"ops", "reduction", "state", "tower"},
    "config": {"errors", "plain", "prompt", "reduction", "space", "state"},
    "cost": {"config", "state"},
    "prompt_cost": {"cost", "errors", "prompt"},
    "plain": set(),
    "reading": {"errors"},
    "writing": {"errors"},
    "methods": {"config", "errors", "methods", "ops", "prompt", "reduction", "space", "state", "writing"},
    "patches": {"config", "cost", "errors", "ops", "patches", "prompt", "prompt_cost", "reduction", "registry", "run", "state"},
}
CORE = [
    "api",
    "budget",
    "describe",
    "files",
    "fit",
    "inspection",
    "probe",
    "prompt_budget",
    "prompt_plan",
    "prompt_report",
    "resolve",
    "text",
    "vlm",
    "vlm_towers",
]


def _imports(path):
    """Parts of vtok that a file imports, those inside functions and TYPE_CHECKING blocks left out."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vtok":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


def _files(part):
    home = ROOT / "patches" if part == "patches" else ROOT / "vtok" / part
    return sorted(home.rglob("*.py")) if home.is_dir() else [ROOT / "vtok" / f"{part}.py"]


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_downwards(part):
    for path in _files(part):
        assert _imports(path) <= ALLOWED[part], path


@pytest.mark.parametrize("part", CORE)
def test_nothing_below_imports_eval(part):
    assert "eval" not in _imports(ROOT / "vtok" / f"{part}.py")


def test_importing_vtok_needs_torch_alone():
    code = (
        "import sys, vtok; vtok.METHODS.names(); vtok.ToMe; "
        "bad = {'timm', 'open_clip', 'transformers', 'numpy', 'PIL', 'typer', 'rich', 'yaml', 'safetensors', 'matplotlib'};"
        "import torch; loaded = bad & set(sys.modules); "
        "print(sorted(loaded - {'numpy'}), 'vtok.eval' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout
    assert out.strip() == "[] False"


def test_vtok_runs_without_its_extras(tmp_path):
    """With every optional package hidden, vtok imports, lists its methods and says which extra is missing."""
    blocker = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'timm', 'typer', 'rich', 'yaml', 'matplotlib', 'safetensors', 'torchvision'}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name.split('.')[0])\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    code = blocker + "import vtok; print(len(vtok.METHODS.names())); import vtok.eval.cli as c; c.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == str(len(vtok.METHODS.names()))
    assert 'pip install "vtok[eval]"' in done.stderr
    assert done.returncode == 1


def test_the_public_names_exist():
    for name in vtok.__all__:
        assert getattr(vtok, name) is not None
    assert set(vtok._CONFIGS.values()) == set(vtok.METHODS.names())
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        vtok.nonsense  # noqa: B018


def test_pages_that_the_readme_names_are_there_after_an_import():
    """`help(vtok.eval.demo.vit)` and the others, as a reader types them: nothing else has been imported."""
    pages = sorted(set(re.findall(r"help\((vtok\.[\w.]+)\)", (ROOT / "README.md").read_text())))
    assert len(pages) > 6 and any(page.startswith("vtok.eval.") for page in pages)
    code = "import vtok\n" + "".join(f"assert len({page}.__doc__) > 100\n" for page in pages)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        vtok.eval.nonsense  # noqa: B018


def test_no_file_is_long():
    for path in [p for home in ("vtok", "patches", "eval") for p in (ROOT / home).rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path
