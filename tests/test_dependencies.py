"""What attnhook imports is declared in pyproject.toml, or comes with what is."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import packages_distributions

import pytest

from tests.helpers import ROOT, python

tomllib = pytest.importorskip("tomllib")  # Python 3.11

#: Not declared: the engines, which whoever serves has, and what they or a declared package always bring.
BROUGHT = {"vllm": "", "sglang": "", "fastapi": "vllm and sglang", "triton": "torch", "llvmlite": "numba"}


def _imported() -> dict[str, str]:
    """Packages of others that attnhook imports, each with a module that does."""
    found = {}
    for path in sorted((ROOT / "attnhook").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            else:
                continue
            for name in names:
                found.setdefault(name.partition(".")[0], str(path.relative_to(ROOT)))
    return {name: where for name, where in found.items() if name not in {*sys.stdlib_module_names, "attnhook"}}


def _declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra, more in project["optional-dependencies"].items():
        if extra != "dev":
            wanted += more
    names = [re.split(r"[\[<>=!~ ;]", one)[0] for one in wanted]
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def test_what_is_imported_is_declared():
    homes, declared = packages_distributions(), _declared()
    missing = {
        name: where
        for name, where in _imported().items()
        if name not in BROUGHT
        and not {re.sub(r"[-_.]+", "-", home).lower() for home in homes.get(name, [name])} & declared
    }
    assert missing == {}, "declare its distribution in pyproject.toml"


def test_what_is_named_as_brought_is_imported():
    assert BROUGHT.keys() <= _imported().keys()


@pytest.mark.slow
def test_the_transformers_extra_alone_captures():
    """What only other extras bring is not there: an import of it on this way would fail."""
    code = """
        import sys
        for name in ("msgspec", "zmq", "starlette", "uvicorn", "websockets", "prometheus_client", "opentelemetry",
                     "zstandard", "vllm", "sglang", "umap", "hdbscan", "matplotlib"):
            sys.modules[name] = None
        import importlib.util
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name in ("vllm", "sglang") else find(name, *rest)
        import torch
        import attnhook
        from tests.helpers import tiny_model
        model = tiny_model()
        with attnhook.capture(layers="all", sinks="memory:") as records:
            model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert [record.query_position for record in records] == [2, 3, 4], records
        from attnhook.cli import app
        print("ok")
    """
    run = python("-c", code)
    assert (run.returncode, run.stdout.splitlines()[-1:]) == (0, ["ok"]), run.stderr[-3000:]
