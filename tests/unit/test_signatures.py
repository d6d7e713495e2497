"""What editors complete: a signature a method, which says what its config class says."""

import ast
import dataclasses
import inspect

import pytest

import vtok
from vtok import api
from vtok.eval.signatures import FILE, stub

FUNCTIONS = {name: getattr(api, name) for name in ("patch", "patched", "plan")}


def test_the_file_is_that_of_the_registry():
    assert FILE.read_text(encoding="utf-8") == stub(), "run: python -m vtok.eval.signatures"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_method_has_its_knobs(function):
    own = {name for name, one in inspect.signature(api.plan if function == "plan" else api.patch).parameters.items()}
    own -= {"model", "method", "params"}
    found = {}
    for node in ast.parse(FILE.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            found[ast.unparse(node.args.args[1].annotation)] = {one.arg for one in node.args.kwonlyargs}
    assert found.pop("MethodName | Method") == own
    known = {
        f"Literal[{name!r}]": {field.name for field in dataclasses.fields(vtok.METHODS.get(name))} | own
        for name in vtok.METHODS
    }
    assert found == known
    assert inspect.signature(getattr(vtok, function)) == inspect.signature(FUNCTIONS[function]), (
        "at run time the function itself"
    )
