"""What Python writes by name, compiled code reads by the same name, and the other way round."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import carray, cfunc, types

from attnhook.kernels.topk.numba import aim, blocks, dots, loops
from attnhook.kernels.topk.numba.blocks import NEXT_THREAD, NEXT_UNIT, POOL, ROW, AimWords, DotWords, RowWords, Words
from attnhook.kernels.topk.numba.intrinsics import fetch_add
from attnhook.kernels.topk.numba.jobs import Job
from tests.helpers import python

WORDS = (DotWords, RowWords, AimWords)
INT64 = types.CPointer(types.int64)


def names_of(kind: type[Words] | np.dtype[Any]) -> tuple[str, ...]:
    return (kind if isinstance(kind, np.dtype) else np.dtype(kind)).names or ()


def compiled(first: Any, *lines: str) -> Any:
    """A C function of two addresses, ``at`` and one of int64; numba reads a field by a name that is written there."""
    scope: dict[str, Any] = {"carray": carray, "fetch_add": fetch_add}
    exec("\n    ".join(["def function(at, other):", *lines]), scope)
    return cfunc(types.void(types.CPointer(first), INT64))(scope["function"])


def call(function: Any, at: int, other: np.ndarray) -> None:
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(function.address)(at, other.ctypes.data)


@pytest.mark.parametrize("kind", WORDS)
def test_each_word_is_read_and_written_by_its_name(kind: type[Words]) -> None:
    names, argument = names_of(kind), blocks.argument_of(kind, ROW)
    view = f"w, other = carray(at, 1)[0].words, carray(other, {len(names)})"
    read = compiled(argument, view, *(f"other[{n}] = w.{name}" for n, name in enumerate(names)))
    write = compiled(argument, view, *(f"w.{name} = other[{n}]" for n, name in enumerate(names)))
    words, other = kind(), np.zeros(len(names), np.int64)
    expected = [(n + 1) << 40 | n for n in range(len(names))]  # more than 32 bits of each
    for name, value in zip(names, expected, strict=True):
        setattr(words, name, value)
    call(read, ctypes.addressof(words), other)
    assert other.tolist() == expected
    call(write, ctypes.addressof(words), -other)
    assert [getattr(words, name) for name in names] == [-value for value in expected]


@pytest.mark.parametrize("table", [ROW, POOL])
def test_each_column_is_read_and_written_by_its_name(table: np.dtype[Any]) -> None:
    """Of the second of two rows: the first must stay what it is."""
    names = names_of(table)
    record = blocks.from_dtype(table)
    view = f"row, other = carray(at, 2)[1], carray(other, {len(names)})"
    read = compiled(record, view, *(f"other[{n}] = row.{name}" for n, name in enumerate(names)))
    write = compiled(record, view, *(f"row.{name} = other[{n}]" for n, name in enumerate(names)))
    rows, other = np.zeros(2, table), np.zeros(len(names), np.int64)
    expected = [(n + 1) << 40 | n for n in range(len(names))]
    for name, value in zip(names, expected, strict=True):
        rows[name] = 7, value
    call(read, rows.ctypes.data, other)
    assert other.tolist() == expected
    call(write, rows.ctypes.data, -other)
    assert rows.tolist() == [(7,) * len(names), tuple(-value for value in expected)]


@pytest.mark.parametrize("kind", WORDS)
def test_the_counters_are_where_the_jobs_count(kind: type[Words]) -> None:
    words = kind(next_unit=40, next_thread=2)
    count = compiled(
        blocks.argument_of(kind), "at = carray(at, 1).ctypes.data", "other = carray(other, 3)",
        f"other[0] = fetch_add(at + {NEXT_UNIT})", f"other[1] = fetch_add(at + {NEXT_THREAD})",
        f"other[2] = fetch_add(at + {NEXT_UNIT})",
    )  # fmt: skip
    other = np.zeros(3, np.int64)
    call(count, ctypes.addressof(words), other)
    assert other.tolist() == [40, 2, 41] and (words.next_unit, words.next_thread) == (42, 3)


def test_a_job_clears_the_counters_before_it_runs() -> None:
    words = RowWords(next_unit=9, next_thread=9)
    seen: list[int] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def body(address: int) -> None:
        seen.extend(np.ctypeslib.as_array((ctypes.c_int64 * 2).from_address(address)))

    class Compiled:
        address = ctypes.cast(body, ctypes.c_void_p).value

    Job(Compiled, words).run(1)
    assert seen == [0, 0]


@pytest.mark.parametrize("kind", WORDS)
def test_a_word_that_is_not_described_is_refused(kind: type[Words]) -> None:
    with pytest.raises(AttributeError, match="'rowz'"):
        kind(rowz=3)
    words = kind(rows=3)
    with pytest.raises(AttributeError, match="'rowz'"):
        words.rowz = 3
    assert [name for name in names_of(kind) if getattr(words, name)] == ["rows"]
    with pytest.raises(TypeError):
        words.rows = 0.5


def test_compiled_code_is_kept_by_what_it_is_called_with() -> None:
    """numba looks at the date of one file, which says nothing of the layout, nor of functions in other files."""
    for job, kind, tables in (
        (loops.row_job, RowWords, (ROW,)), (dots.dot_job, DotWords, (ROW, POOL)), (aim.aim_job, AimWords, (ROW,)),
    ):  # fmt: skip
        kept = str(job._sig)
        places = [kept.index(f"{name}[type=int64") for name in names_of(kind)]
        assert places == sorted(places)
        assert all(f"table_{n}[type=Record({names_of(table)[0]}[" in kept for n, table in enumerate(tables))
        assert f"sources_{blocks._sources()}" in kept


@pytest.mark.long
@pytest.mark.slow
def test_what_has_changed_since_is_compiled_again(tmp_path: Path) -> None:
    """A change of one of the files that a job calls, whose own date stays: the compiled code is another."""
    code = """
        import shutil, sys
        from pathlib import Path
        import attnhook.kernels.topk
        folder = Path(sys.argv[1]) / "numba"
        shutil.copytree(Path(attnhook.kernels.topk.__file__).parent / "numba", folder,
                        ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        changed = folder / "elementary.py"
        changed.write_text(changed.read_text() + sys.argv[2])
        attnhook.kernels.topk.__path__.insert(0, sys.argv[1])
        from attnhook.kernels.topk.numba import aim
        print(aim.aim_job._cache_hits)
    """
    cache = str(tmp_path / "cache")
    for more, hits in (("", 0), ("", 1), ("\n# a change\n", 0)):
        done = python("-c", code, str(tmp_path), more, NUMBA_CACHE_DIR=cache)
        assert (done.stdout.strip(), done.stderr) == (str(hits), "")
