"""The wheel holds exactly one top-level name, `vtok`; the folder list in pyproject is complete."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import vtok

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_folder_is_listed():
    homes = {"vtok": ROOT / "vtok", **{name: ROOT / path for name, path in SETUP["package-dir"].items()}}
    found = set()
    for name, home in homes.items():
        for folder, subfolders, files in os.walk(home):  # does not enter links
            subfolders[:] = [s for s in subfolders if s != "__pycache__" and not (Path(folder) / s).is_symlink()]
            if "__init__.py" in files:
                found.add(".".join((name, *Path(folder).relative_to(home).parts)))
    assert found == set(SETUP["packages"])


@pytest.mark.parametrize("name", ["patches", "eval", "configs", "assets"])
def test_links_point_at_the_real_folder(name):
    link = ROOT / "vtok" / name
    assert link.is_symlink()
    assert link.resolve() == ROOT / name
    assert not os.path.isabs(os.readlink(link))


def test_the_top_level_is_the_agreed_one():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.fail("this test runs in a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    visible = {name for name in top if not name.startswith(".")}
    fixed = {"pyproject.toml", "vtok", "patches", "eval", "configs", "tests", "assets", "README.md"}
    texts = {"LICENSE", "NOTICE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md", "Makefile"}
    assert visible <= fixed | texts
    assert fixed <= visible


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """sdist, and the wheel made from it."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)], check=True, capture_output=True
    )
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.mark.slow
def test_the_wheel_is_whole_and_leaks_nothing(built, tmp_path):
    wheel, _ = built
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert len(names) == len(set(names))
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"vtok"}
    assert wheel.stat().st_size < 3e6
    assert [n for n in names if n.startswith("vtok/assets/")] == ["vtok/assets/__init__.py"], "weights and pictures stay here"
    assert {Path(n).suffix for n in names if ".dist-info/" not in n} == {
        ".py",
        ".pyi",
        ".typed",
        ".yaml",
        ".html",
        ".css",
        ".js",
    }
    for file in (
        "vtok/py.typed",
        "vtok/eval/report/html/templates/report.html",
        "vtok/configs/tome/tome_vit_s_augreg_r13.yaml",
    ):
        assert file in names
    target = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)], check=True)
    assert {p.name for p in target.iterdir() if "dist-info" not in p.name and p.name != "bin"} == {"vtok"}
    code = (
        f"ROOT = {str(ROOT)!r}\n"
        "import vtok, vtok.patches.timm_vit.adapter, vtok.eval.tasks.imagenet\n"
        "from vtok.eval.models import reference\n"
        "from vtok.eval.runs import loader as runs\n"
        "assert vtok.__file__.startswith('.') or 'site' in vtok.__file__, vtok.__file__\n"
        "from vtok.eval.runs.methods import portable\n"
        "assert portable({'weights': '/x/y'}) == {'weights': '/x/y'}\n"
        "from vtok.eval.published import tables\n"
        "assert len(tables.tables()) > 9\n"
        "try: reference.load_reference_vit()\n"
        "except vtok.ConfigError as error: told = str(error)\n"
        "assert 'in the folder assets/ of its source repository and not in the installed package' in told, told\n"
        "import os; os.environ['VTOK_ASSETS'] = ROOT + '/assets'\n"
        "print(vtok.__version__, len(runs.bundled()), sum(p.numel() for p in reference.load_reference_vit().parameters()))\n"
        "for name in ('patches', 'eval', 'configs', 'assets', 'tests'):\n"
        "    try: __import__(name)\n"
        "    except ModuleNotFoundError: continue\n"
        "    raise SystemExit(name + ' leaked')\n"
    )
    env = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd="/", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = [path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name != "suites"]  # above them are tables
    assert done.stdout.split() == [vtok.__version__, str(len(runs)), "1362730"]


@pytest.mark.slow
def test_an_index_takes_both_files(built):
    """What PyPI checks of metadata and README."""
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, built)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_sdist_has_the_shape_of_the_repository(built):
    _, sdist = built
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "NOTICE",
        "vtok/api.py",
        "patches/block.py",
        "eval/cli/__init__.py",
    } <= names
    assert sdist.stat().st_size < 3e6


def test_one_version_is_stated():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert citation["version"] == vtok.__version__ and f"\n## [{vtok.__version__}]" in changes


def test_the_editable_install_sees_every_part():
    code = "import vtok.patches.block, vtok.eval.cli, vtok.configs, vtok.assets; print(vtok.__file__)"
    out = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True).stdout
    assert Path(out.strip()) == ROOT / "vtok" / "__init__.py"
