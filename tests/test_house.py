"""The house: data goes one way, no modules import each other in a circle, engines are imported in their adapters only.

The order is the list of docs/architecture.md, which is read here. Every import counts: at the top of a module, inside a
function, for type checking only. Importing a submodule runs the packages above it; that is no arrow.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.helpers import ROOT

ENGINES = {"vllm", "sglang", "transformers"}
TOP = {"__init__", "errors", "options"}


def _modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "attnhook").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imported(name: str, path: Path) -> set[str]:
    """Dotted names that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import, which this test does not follow"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def _arrows(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports."""
    arrows = {}
    for name, path in modules.items():
        targets = set()
        for full in _imported(name, path):
            while full and full not in modules:  # a name of a module, or of a package's ``__init__``
                full = full.rpartition(".")[0]
            targets.add(full)
        arrows[name] = targets - {"", name}
    return arrows


def _room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def _order() -> list[str]:
    """Rooms from the lowest to the highest, as docs/architecture.md lists them."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("| room |") :].partition("\n\n")[0]
    return re.findall(r"^\| \[?`(\w+)(?:/|\.py)`", table, re.MULTILINE)


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    return _arrows(_modules())


def test_nothing_but_errors_and_options_lies_loose():
    assert {path.stem for path in (ROOT / "attnhook").glob("*.py")} == TOP


def test_every_room_is_in_the_order_once(arrows):
    rooms = {_room(name) for name in arrows if "." in name}
    order = _order()
    assert sorted(order) == sorted(rooms)


def test_arrows_go_down(arrows):
    rank = {room: place for place, room in enumerate(_order())}
    up = [
        f"{name} -> {target}"
        for name, targets in arrows.items()
        for target in targets
        if "." in name and "." in target and rank[_room(target)] > rank[_room(name)]
    ]
    assert up == []


def test_the_package_is_asked_for_its_version_only():
    modules = _modules()
    asked = {
        full
        for name, path in modules.items()
        if "." in name
        for full in _imported(name, path)
        if full == "attnhook" or (full.count(".") == 1 and full.startswith("attnhook.") and full not in modules)
    }
    assert asked == {"attnhook.__version__"}


def test_no_circle(arrows):
    left = {name: targets - {"attnhook"} for name, targets in arrows.items() if name != "attnhook"}
    while True:
        free = [name for name, targets in left.items() if not targets & left.keys()]
        if not free:
            break
        for name in free:
            del left[name]
    assert left == {}, "each of these imports another of them, or one that does"


def test_engines_are_imported_in_their_adapters_only():
    wrong = [
        f"{name} imports {full}"
        for name, path in _modules().items()
        if not name.startswith("attnhook.backends.")
        for full in _imported(name, path)
        if full.split(".")[0] in ENGINES
    ]
    assert wrong == []


def test_an_adapter_imports_no_other_engine():
    wrong = [
        f"{name} imports {full}"
        for name, path in _modules().items()
        if name.startswith("attnhook.backends.")
        for full in _imported(name, path)
        if full.split(".")[0] in ENGINES - {name.split(".")[2] if name.count(".") > 1 else ""}
        or (full.startswith("attnhook.backends.") and full.split(".")[2] in ENGINES - {name.split(".")[2]})
    ]
    assert wrong == []
