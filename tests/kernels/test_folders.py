"""A folder per library, named like it: neither is ever taken for the other."""

from __future__ import annotations

import ast
import importlib
import sys

import pytest

from attnhook.kernels import topk
from attnhook.kernels.topk.dispatch import kernel
from attnhook.options import KERNELS
from tests.helpers import ROOT, python

LIBRARIES = ("torch", "numba", "triton")


def test_every_module_computes_with_the_library() -> None:
    for name in KERNELS:
        kernel(name)
    modules = {name: module for name, module in sys.modules.items() if name.startswith("attnhook.kernels.")}
    assert {f"attnhook.kernels.topk.{name}" for name in LIBRARIES} <= modules.keys()
    for name, module in modules.items():
        for library in LIBRARIES:
            found, known = vars(module).get(library), importlib.import_module(library)
            if module is topk:
                assert found is sys.modules[f"attnhook.kernels.topk.{library}"]
            else:
                assert found is None or found is known, f"{library} in {name} is {found}"


def test_the_package_above_the_folders_imports_no_library() -> None:
    """Python would replace the name by the folder when that is imported, in the middle of the package's life."""
    package = ast.parse((ROOT / "attnhook/kernels/topk/__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(package) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports
    assert not any(alias.name in LIBRARIES for node in imports for alias in node.names)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "triton"])  # which needs a GPU here
def test_a_kernel_brings_in_no_other_library(name: str) -> None:
    """Nor does the dispatcher bring in any but torch: numba takes a third of a second to import, Triton more."""
    code = f"""
        import sys
        from attnhook.kernels.topk import TopKStep
        assert not {{"numba", "triton"}} & sys.modules.keys(), "before a kernel was chosen"
        from attnhook.kernels.topk.dispatch import kernel
        kernel({name!r})
        print(sorted({{"numba", "triton"}} & sys.modules.keys()))
    """
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(["numba"] if name == "compiled" else [])
