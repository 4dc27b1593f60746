"""docs/plugins.md: the package that it builds is installed and run, and what it shows of tinyserve stands there so."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from attnhook import TokenRecord
from tests.helpers import ROOT, byte_tokenizer, python, tiny_model
from tests.plugins.installing import installed

PAGE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
FIRST, _, SERVER = PAGE.partition("\n## A server engine\n")


def _blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's package, as pip installs it."""
    folder = tmp_path_factory.mktemp("page") / "tiny"
    named = re.findall(r"`([\w./]+)`[^`\n]*:\n\n```\w+\n(.*?)^```$", FIRST, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in named] == [
        "pyproject.toml",
        *(f"attnhook_tiny/{name}.py" for name in ("__init__", "udp", "engine", "backend", "watching")),
    ]
    for name, code in named:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code, encoding="utf-8")
    return installed(folder, tmp_path_factory)


def _run(site: Path, code: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(site), str(ROOT)))
    return subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environ}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_its_engine_sink_and_observer_do_what_the_page_says(site):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(20)
        last = _blocks(FIRST, "python")[-1]
        assert "127.0.0.1:9001" in last
        script = last.replace("127.0.0.1:9001", f"127.0.0.1:{receiver.getsockname()[1]}")
        run = _run(site, script, ATTNHOOK_TINY_TTL="2")
        assert run.returncode == 0, run.stderr
        sent = [TokenRecord.from_bytes(receiver.recv(1 << 16)) for _ in range(6)]
    assert re.fullmatch(r"\[\d+, \d+, \d+\] \{'document': 0\.\d+\}\n", run.stdout)
    assert [(record.request_id, record.query_position) for record in sent] == [("r0", p) for p in range(7, 13)]


@pytest.mark.slow
def test_it_is_listed_and_checks_itself(site, tmp_path):
    tiny_model(vocab_size=256).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    run = _run(site, "from attnhook.cli.app import main; main()", "verify", "--model", str(tmp_path), "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(run.stdout)
    assert report["engines"]["tiny"] == "1.2" and report["sinks"]["udp:"] == "attnhook_tiny.udp"
    assert report["plugins"] == {"tiny": "loaded"}
    assert report["self-check of tiny"]["largest |dP|"].endswith("(allowed 1e-05)")
    assert report["hooks"]["tiny: Engine.attention"] == "patched"


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"ATTNHOOK_TINY_TTL": "0"}, "ATTNHOOK_TINY_TTL='0' must be a whole number from 1 to 255"),
        (
            {"ATTNHOOK_TINY_TLT": "1"},
            "unknown environment variable ATTNHOOK_TINY_TLT; did you mean 'ATTNHOOK_TINY_TTL'?",
        ),
    ],
)
def test_its_variable(site, environ, said):
    run = _run(site, "import attnhook; attnhook.install(sinks='udp:127.0.0.1:9')", **environ)
    assert run.returncode == 1 and said in run.stderr


def test_what_it_shows_of_tinyserve_stands_there():
    files = [path.read_text(encoding="utf-8") for path in (ROOT / "examples" / "tinyserve").rglob("*.py")]
    blocks = _blocks(SERVER, "python")
    assert len(blocks) >= 6
    for block in blocks:
        assert any(block in text for text in files), block


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\((\.\./[^)#]+|[\w./]+\.md)", PAGE):
        assert (ROOT / "docs" / target).exists(), target


def test_the_contracts_are_those_that_it_names():
    run = python("-c", "from attnhook.plugins import CONTRACTS; import json; print(json.dumps(CONTRACTS))")
    assert f"`{run.stdout.strip()}`" in " ".join(PAGE.split())


def test_the_other_package_of_these_tests_uses_stable_names_too():
    used = re.findall(
        r"^\s*(?:from|import) (attnhook[.\w]*)",
        "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "thirdparty").rglob("*.py")),
        re.MULTILINE,
    )
    assert {name for name in used if not name.startswith("attnhook_")} == {
        "attnhook", "attnhook.options", "attnhook.plugins"
    }  # fmt: skip
