"""Imports run one way, counted over whole files; folders stay small; importing vtok needs torch alone."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import vtok

ROOT = Path(__file__).resolve().parents[2]
HOMES = {"vtok": ROOT / "vtok", "vtok.patches": ROOT / "patches", "vtok.eval": ROOT / "eval"}
# The layers, lowest first: a module may import modules of its own layer and of layers below.
LAYERS = (
    ("errors", "_version"),
    ("reading", "writing"),
    ("registry", "core", "ops"),
    ("capabilities",),
    ("config",),
    ("methods", "cost", "serialization"),
    ("reports", "serving"),
    ("patches",),
    ("targets",),
    ("api", "measuring"),
    ("export",),
    ("",),  # vtok itself
    ("testing",),
    ("eval", "__main__"),
)
# Ours that are imported inside a function although they are no optional dependency, and why.
LATE = {
    "vtok.registry": "entries of tables are imported on first use, so that `import vtok` imports no backend",
    "vtok.eval": "names of the package are imported on first use",
}
MOST_FILES = 12  # Python files in a folder, `__init__.py` included


@cache
def modules():
    """Dotted name -> file."""
    found = {}
    for package, home in HOMES.items():
        for path in sorted(home.rglob("*.py")):
            if any(part.is_symlink() for part in path.parents):
                continue
            parts = [*package.split("."), *path.relative_to(home).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(name):
    """(module of vtok that a module imports, whether inside a function), those under TYPE_CHECKING included."""
    tree, found = ast.parse(modules()[name].read_text(encoding="utf-8")), set()

    def visit(node, inside):
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vtok":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add((whole if whole in modules() else node.module, inside))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in modules():
                    found.add((alias.name, inside))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, False)
    stubs = {"vtok._signatures"}  # of a module that is there already
    return {(other, late) for other, late in found if other not in {name, *stubs}}


def layer(name):
    part = name.split(".")[1] if "." in name else ""
    return next(i for i, parts in enumerate(LAYERS) if part in parts)


def test_every_module_has_a_layer():
    assert {name for name in modules() if not any([*name.split("."), ""][1] in parts for parts in LAYERS)} == set()


def test_imports_run_one_way():
    wrong = [f"{a} -> {b}" for a in modules() for b, _ in imports(a) if layer(b) > layer(a) and b != "vtok"]
    assert wrong == []


def test_no_circle():
    """Strongly connected parts of the imports, by Tarjan's algorithm."""
    number, low, stack, circles = {}, {}, [], []

    def visit(name):
        number[name] = low[name] = len(number)
        stack.append(name)
        for other in sorted({b for b, _ in imports(name)}):
            if other not in number:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == number[name]:
            part = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(part) > 1:
                circles.append(sorted(part))

    for name in modules():
        if name not in number:
            visit(name)
    assert circles == []


def test_folders_are_small():
    count = {}
    for path in modules().values():
        count[path.parent] = count.get(path.parent, 0) + 1
    assert {str(folder.relative_to(ROOT)): n for folder, n in count.items() if n > MOST_FILES} == {}


@pytest.mark.parametrize("name", ["timm", "open_clip", "transformers", "vllm", "torch"])
def test_no_module_shadows_a_library(name):
    """A script started in the folder of such a module would import it in place of the library."""
    assert [path for path in modules().values() if path.stem == name or path.parent.name == name] == []


def test_named_tuples_have_no_other_base():
    """Python 3.10 refuses to make such a class."""
    found = []
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and len(node.bases) > 1:
                found += [f"{path.relative_to(ROOT)}:{node.lineno}" for base in node.bases if ast.unparse(base) == "NamedTuple"]
    assert found == []


def test_nothing_dispatches_on_a_name():
    """No comparison of a method's, a task's or a family's name with a constant."""
    baselines = {"random", "uniform"}  # reports compare with these, and other things are called so
    tasks = {"imagenet", "zeroshot", "retrieval", "vqa", "gqa", "pope", "mme", "textvqa", "docvqa", "chartqa", "vqav2"}
    names = {*vtok.METHODS.names()} - baselines | tasks
    found = []
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                constants = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
                if constants & names:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


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
    measuring = "\ntry: vtok.benchmark(None, 'tome', None)\nexcept vtok.MissingExtraError as e: print(e, file=sys.stderr)\n"
    code = blocker + "import vtok; print(len(vtok.METHODS.names()))" + measuring + "import vtok.eval.cli as c; c.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == str(len(vtok.METHODS.names()))
    assert done.stderr.count('pip install "vtok[eval]"') == 2, "benchmark and the program"
    assert done.returncode == 1


def test_the_public_names_exist():
    for name in vtok.__all__:
        assert getattr(vtok, name) is not None
    assert set(vtok._CONFIGS.values()) <= set(vtok.METHODS.names())
    assert all(getattr(vtok, cls).name == name for cls, name in vtok._CONFIGS.items())
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        vtok.nonsense  # noqa: B018


def test_no_file_is_long():
    for path in modules().values():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
