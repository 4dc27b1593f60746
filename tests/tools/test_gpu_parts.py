"""Parts for a GPU machine: what is packed comes out again, what is not whole is refused; code by architecture."""

from __future__ import annotations

import struct
import subprocess
import zipfile
from pathlib import Path

import pytest

from tools.gpu import machine, pack, parts
from tools.gpu.fatbin import keep_architecture


@pytest.fixture
def packed(tmp_path: Path) -> tuple[parts.Archive, Path, Path]:
    """An archive of three files in parts of 1,000 bytes."""
    root, out = tmp_path / "root", tmp_path / "out"
    (root / "package" / "inner").mkdir(parents=True)
    out.mkdir()
    noise = bytes((n * n * 7919 >> 3) % 251 for n in range(4000))
    (root / "package" / "__init__.py").write_text("VALUE = 3\n", encoding="utf-8")
    (root / "package" / "inner" / "data").write_bytes(noise)
    (root / "other.so").write_bytes(bytes(5000))
    archive = parts.pack("some", root, out, {"package": "1.0"}, part_bytes=1000)
    parts.write_manifest([archive], out)
    return archive, root, out


def test_what_is_packed_comes_out_again(packed: tuple[parts.Archive, Path, Path], tmp_path: Path) -> None:
    archive, root, out = packed
    assert len(archive.files) > 1, "one part shows nothing about joining"
    assert all((out / file).stat().st_size <= 1000 for file in archive.files)
    (known,) = parts.read_manifest(out).values()
    assert known == archive and known.versions == {"package": "1.0"}
    target = tmp_path / "target"
    assert parts.unpack(known, out, target)
    for path in root.rglob("*"):
        if path.is_file():
            assert (target / path.relative_to(root)).read_bytes() == path.read_bytes()
    (target / "mark").touch()
    assert not parts.unpack(known, out, target)  # it is there already
    assert (target / "mark").exists()


@pytest.mark.parametrize("fault", ["missing", "changed"])
def test_parts_that_are_not_whole_are_refused(
    packed: tuple[parts.Archive, Path, Path], tmp_path: Path, fault: str
) -> None:
    archive, _, out = packed
    file = list(archive.files)[1]
    if fault == "missing":
        (out / file).unlink()
    else:
        data = bytearray((out / file).read_bytes())
        data[10] ^= 1
        (out / file).write_bytes(data)
    target = tmp_path / "target"
    with pytest.raises(parts.PartError, match=r"some\.tar\.xz\.1.*(carry|SHA-256)"):
        parts.unpack(archive, out, target)
    assert not target.exists()


def test_a_second_call_runs_on_what_the_first_has_unpacked(
    packed: tuple[parts.Archive, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, _, out = packed
    monkeypatch.setenv("GPU_CHECK_HOME", str(tmp_path / "home"))
    assert machine.unpack(("some",), out) == []
    for file in archive.files:
        (out / file).unlink()  # another part was carried in its place
    assert machine.unpack(("some",), out) == []
    assert str(tmp_path / "home" / "some") in machine.paths(("some",))
    (told,) = machine.unpack(("other",), out)
    assert "not packed" in told


def test_engines_find_attnhook_where_it_is_not_installed(tmp_path: Path) -> None:
    machine.announce(tmp_path)
    code = (
        "from importlib.metadata import entry_points; "
        "print([p.value for g in ('vllm.general_plugins', 'sglang.srt.plugins') for p in entry_points(group=g)])"
    )
    done = subprocess.run(
        ["python3", "-I", "-c", f"import sys; sys.path[:] = [{str(tmp_path)!r}, *sys.path]; {code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.count("attnhook.process.lifecycle:load") == 2


def test_a_wheel_without_what_no_check_runs(tmp_path: Path) -> None:
    wheel = tmp_path / "sglang_kernel-0.4.4-cp310-abi3-any.whl"
    names = [
        "sgl_kernel/__init__.py", "sgl_kernel/sm90/common_ops.abi3.so", "sgl_kernel/sm100/common_ops.abi3.so",
        "sgl_kernel/flash_ops.abi3.so", "sgl_kernel/tests/test_it.py", "sgl_kernel-0.4.4.data/scripts/tool",
        "sgl_kernel-0.4.4.data/purelib/extra.py", "sglang_kernel-0.4.4.dist-info/METADATA",
    ]  # fmt: skip
    with zipfile.ZipFile(wheel, "w") as data:
        for name in names:
            data.writestr(name, name)
    pack.take(wheel, "sglang_kernel", tmp_path / "root", 90)
    found = {
        path.relative_to(tmp_path / "root").as_posix() for path in (tmp_path / "root").rglob("*") if path.is_file()
    }
    assert found == {
        "sgl_kernel/__init__.py", "sgl_kernel/sm90/common_ops.abi3.so", "extra.py",
        "sglang_kernel-0.4.4.dist-info/METADATA",
    }  # fmt: skip


def test_every_package_has_one_version() -> None:
    """Two archives on one path must not bring the same package in two versions."""
    pinned: dict[str, str] = {}
    for name in pack.ARCHIVES:
        lines = (pack.PACKAGES / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        for line in lines:
            if line and not line.startswith("#"):
                package, _, version = line.partition("==")
                assert version, f"{name}.txt: {line} has no version"
                assert pinned.setdefault(package.lower(), version) == version, f"{name}.txt: {line}"


ELF, PTX = 2, 1


def container(*entries: tuple[int, int, bytes]) -> bytes:
    """A fat binary's container of (kind, architecture, code)."""
    body = b"".join(
        struct.pack("<HHIQIIHHI", kind, 0, 64, len(code), 0, 0, 0, 0, architecture).ljust(64, b"\0") + code
        for kind, architecture, code in entries
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A real shared library whose section .nv_fatbin holds two containers."""
    both = container((ELF, 80, b"a" * 40), (PTX, 80, b"p" * 24), (ELF, 90, b"h" * 56), (ELF, 100, b"b" * 8))
    old = container((ELF, 80, b"o" * 40), (PTX, 80, b"q" * 24))
    (tmp_path / "code").write_bytes(both + bytes(8) + old)
    (tmp_path / "code.s").write_text(
        f'.section .nv_fatbin,"a"\n.align 8\n.incbin "{tmp_path / "code"}"\n.section .note.GNU-stack\n',
        encoding="utf-8",
    )
    subprocess.run(["gcc", "-shared", "-o", str(tmp_path / "lib.so"), str(tmp_path / "code.s")], check=True)
    return tmp_path / "lib.so"


def test_one_architecture_is_kept(library: Path) -> None:
    before = library.read_bytes()
    data = bytearray(before)
    told = keep_architecture(data, 90)
    assert (told.containers, told.kept, told.dropped) == (2, 3, 3)
    assert len(data) == len(before)
    # the first container holds what a build for this architecture alone would; the second, which has none, everything
    at = before.index(struct.pack("<IH", 0xBA55ED50, 1))
    kept = container((ELF, 90, b"h" * 56))
    assert data[at : at + len(kept)] == kept
    second = before.index(b"o" * 40)
    assert data[second : second + 40] == b"o" * 40 and b"q" * 24 in data
    assert not any(code in data for code in (b"a" * 40, b"p" * 24, b"b" * 8))
    # everything in front of the containers is as it was
    assert data[:at] == before[:at]


def test_what_is_no_cuda_library_is_said(library: Path) -> None:
    with pytest.raises(ValueError, match="ELF"):
        keep_architecture(bytearray(b"#!/bin/sh\n" * 100), 90)
    data = bytearray(library.read_bytes().replace(b".nv_fatbin", b".nv_fatbxn"))
    with pytest.raises(ValueError, match="no GPU code"):
        keep_architecture(data, 90)
    data = bytearray(library.read_bytes())
    at = data.index(struct.pack("<IH", 0xBA55ED50, 1))
    data[at + 16 + 8 : at + 16 + 16] = struct.pack("<Q", 1 << 40)  # an entry that ends behind its container
    with pytest.raises(ValueError, match="ends behind"):
        keep_architecture(data, 90)
