"""Renders the docstrings, which hold the longer texts, as pages: `make docs`, or `python -m vtok.eval.docs FOLDER`."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import vtok
import vtok.eval
from vtok.errors import MissingExtraError

WITHOUT = ("vtok.assets", "vtok.configs")  # data, no texts
UNREAD = (  # need lmms-eval or vLLM, which are not among the dependencies of development
    r"!vtok\.eval\.lmms\.(models|record|task)",
    r"!vtok\.serving\.vllm_plugin\.(llava|llava_next|processor|qwen_vl|worker)",
)


def modules(package: str = "vtok") -> Iterator[str]:
    """Names of a package and of all modules in it, the package first."""
    yield package
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not found.name.startswith(WITHOUT) and not found.name.endswith("__main__"):
            yield found.name


def render(folder: Path) -> None:
    """Writes one page a module.

    Args:
        folder: where to; made if it is not there.

    Raises:
        MissingExtraError: pdoc is not installed.
    """
    try:
        import pdoc
        import pdoc.render
    except ImportError as error:
        raise MissingExtraError("pdoc", "dev") from error
    for module in (vtok, vtok.eval):  # both import on first use, and pdoc looks at what is there
        for name in module.__all__:
            vars(module)[name] = getattr(module, name)
    pdoc.render.configure(docformat="google", footer_text=f"vtok {vtok.__version__}")
    with warnings.catch_warnings():  # types that modules import for checkers alone are shown as they are written
        warnings.filterwarnings("ignore", "Error parsing type annotation")
        warnings.filterwarnings("ignore", "Couldn't import vtok.(eval.lmms|serving.vllm_plugin)")
        warnings.filterwarnings("ignore", "The module specification")  # of a package holds its modules, which are named too
        pdoc.pdoc(*modules(), *UNREAD, output_directory=folder)


if __name__ == "__main__":
    render(Path(sys.argv[1] if len(sys.argv) > 1 else "docs-html"))
