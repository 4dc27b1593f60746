"""Products of queries and stored keys as vector instructions, for numba: sums stay in registers.

numba's own loops leave one dot product at a time to the compiler, which then moves and adds up more than it
multiplies. Here a few queries meet each key while it is in a register. Vectors of 16 floats are two or four on
machines whose registers are shorter.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils, types
from numba.extending import intrinsic

LANES = 16
#: Keys that four queries meet at once: as many sums as fit in the registers.
TOGETHER = 2 if get_host_cpu_features().get("avx512f") else 1
_AHEAD = 4096  # bytes
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)


@intrinsic
def queries_times_keys(
    typing: Any, size: Any, queries: Any, q: Any, q_step: Any, k: Any, k_step: Any, keys: Any, blocks: Any, out: Any,
    out_step: Any,
) -> Any:  # fmt: skip
    """Products of one to four queries and any number of keys: (queries, keys) at out + n * out_step + 4 * m.

    All are int64. Query n is float32 at address q + n * q_step, key m has elements of ``size`` bytes (4 float32, 2
    bfloat16) at k + m * k_step; both are ``blocks`` vectors long.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        size, queries, q, q_step, k, k_step, keys, blocks, out, out_step = arguments

        def variant(queries: int, bfloat16: bool) -> None:
            at_once = TOGETHER if queries > 2 else 1
            whole = builder.sub(keys, builder.urem(keys, ir.Constant(_I64, at_once)))
            for start, stop, step in ((ir.Constant(_I64, 0), whole, at_once), (whole, keys, 1)):
                with cgutils.for_range_slice(builder, start, stop, ir.Constant(_I64, step), _I64) as (key, _):
                    here, to = _after(builder, k, k_step, key), _after(builder, out, 4, key)
                    _products(builder, queries, step, bfloat16, (q, q_step), (here, k_step), blocks, (to, out_step))
                if at_once == 1:
                    break

        _by_variant(builder, size, queries, (4, 3, 2, 1), variant)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10), generate


@intrinsic
def queries_times_own_keys(
    typing: Any, size: Any, q: Any, q_step: Any, k: Any, k_step: Any, head_step: Any, keys: Any, blocks: Any, out: Any,
    out_step: Any,
) -> Any:  # fmt: skip
    """Products of four queries, each with keys of its own: query n's are at k + n * head_step, ``k_step`` apart.

    For the rest see `queries_times_keys`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        size, q, q_step, k, k_step, head_step, keys, blocks, out, out_step = arguments

        def variant(queries: int, bfloat16: bool) -> None:
            with cgutils.for_range(builder, keys) as loop:
                here, to = _after(builder, k, k_step, loop.index), _after(builder, out, 4, loop.index)
                _products(
                    builder, queries, 1, bfloat16, (q, q_step), (here, head_step), blocks, (to, out_step), own=True
                )

        _by_variant(builder, size, ir.Constant(_I64, 4), (4,), variant)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10), generate


@intrinsic
def queries_times_columns(
    typing: Any, size: Any, queries: Any, q: Any, q_step: Any, k: Any, k_step: Any, dim: Any, out: Any, out_step: Any
) -> Any:
    """Products of one to four queries and 16 keys that lie side by side, 16 floats at out + n * out_step.

    Element d of all keys stands at address k + d * k_step, in one vector. For the rest see `queries_times_keys`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        size, queries, q, q_step, k, k_step, dim, out, out_step = arguments

        def variant(queries: int, bfloat16: bool) -> None:
            _columns(builder, queries, bfloat16, (q, q_step), (k, k_step), dim, (out, out_step))

        _by_variant(builder, size, queries, (4, 3, 2, 1), variant)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), generate


def _by_variant(
    builder: Any, size: Any, queries: Any, counts: Sequence[int], write: Callable[[int, bool], None]
) -> None:
    """Code for each size of an element and number of queries; the call's own say which of it runs.

    How many sums there are must be known when the code is written, for them to stay in registers.
    """
    end = builder.append_basic_block("written")
    halves = {bits: builder.append_basic_block(f"elements_of_{bits}_bits") for bits in (16, 32)}
    builder.cbranch(builder.icmp_signed("==", size, ir.Constant(_I64, 2)), halves[16], halves[32])
    for bits, half in halves.items():
        builder.position_at_end(half)
        blocks = {count: builder.append_basic_block(f"queries_{count}") for count in counts}
        # the last is the rest: from four cases on LLVM makes a table of jumps, which is slower
        switch = builder.switch(queries, blocks[counts[-1]])
        for count, block in blocks.items():
            if count != counts[-1]:
                switch.add_case(ir.Constant(_I64, count), block)
            builder.position_at_end(block)
            write(count, bits == 16)
            builder.branch(end)
    builder.position_at_end(end)


def _products(
    builder: Any,
    queries: int,
    keys: int,
    bfloat16: bool,
    q: tuple[Any, Any],
    k: tuple[Any, Any],
    blocks: Any,
    out: tuple[Any, Any],
    *,
    own: bool = False,
) -> None:
    """Products of some queries and some keys, each an address and the bytes to the next; with ``own`` in pairs.

    Written out as vector instructions, because the sums must stay in registers to be fast and the compiler's own do
    not.
    """
    zero = ir.Constant(_FLOATS, None)
    sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(queries)] for _ in range(keys)]
    size = LANES * (2 if bfloat16 else 4)
    starts = [_after(builder, *k, m) for m in range(queries if own else keys)]
    with cgutils.for_range(builder, blocks) as loop:
        places = [_after(builder, start, size, loop.index) for start in starts]
        here = [_load_floats(builder, place, bfloat16) for place in places]
        for place in places:
            _prefetch(builder, builder.add(place, ir.Constant(_I64, _AHEAD)))
        for n in range(queries):
            row = _load_floats(builder, _after(builder, _after(builder, *q, n), 4 * LANES, loop.index), False)
            for m in range(keys):
                total = sums[m][n]
                builder.store(_multiply_add(builder, row, here[n if own else m], builder.load(total)), total)
    for m in range(keys):
        added = _four_sums(builder, [builder.load(total) for total in sums[m]])
        for n in range(queries):
            at = _as_pointer(builder, _after(builder, _after(builder, *out, n), 4, m), ir.FloatType())
            builder.store(builder.extract_element(added, ir.Constant(_I32, 4 * n)), at)


def _columns(
    builder: Any, queries: int, bfloat16: bool, q: tuple[Any, Any], k: tuple[Any, Any], dim: Any, out: tuple[Any, Any]
) -> None:
    """Products of some queries and one vector of keys, whose elements d are ``k``'s step apart."""
    sums = [cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, None)) for _ in range(queries)]
    with cgutils.for_range(builder, dim) as loop:
        here = _load_floats(builder, _after(builder, *k, loop.index), bfloat16)
        for n in range(queries):
            at = _after(builder, _after(builder, *q, n), 4, loop.index)
            value = builder.load(_as_pointer(builder, at, ir.FloatType()))
            one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, ir.Constant(_I32, 0))
            every = builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, LANES), None))
            builder.store(_multiply_add(builder, every, here, builder.load(sums[n])), sums[n])
    for n in range(queries):
        at = _as_pointer(builder, _after(builder, *out, n), _FLOATS)
        builder.store(builder.load(sums[n]), at, align=4)


def _after(builder: Any, address: Any, step: Any, count: Any) -> Any:
    """address + step * count; numbers of Python are constants, and nothing is written for a count of 0."""
    if isinstance(count, int) and count == 0:
        return address
    step, count = (ir.Constant(_I64, x) if isinstance(x, int) else x for x in (step, count))
    return builder.add(address, builder.mul(step, count))


def _as_pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _load_floats(builder: Any, address: Any, bfloat16: bool) -> Any:
    """16 floats of 16 stored elements, wherever these lie."""
    if not bfloat16:
        return builder.load(_as_pointer(builder, address, _FLOATS), align=4)
    bits = builder.load(_as_pointer(builder, address, ir.VectorType(ir.IntType(16), LANES)), align=2)
    wide = builder.zext(bits, ir.VectorType(_I32, LANES))
    shift = ir.Constant(ir.VectorType(_I32, LANES), [16] * LANES)
    return builder.bitcast(builder.shl(wide, shift), _FLOATS)


def _four_sums(builder: Any, vectors: list[Any]) -> Any:
    """The sums of up to four vectors, in elements 0, 4, 8 and 12: half as many steps as one vector at a time."""
    first, *rest = vectors
    a, b, c, d = (first, *rest, *[first] * (3 - len(rest)))
    parts = list(range(2 * LANES))

    def fold(x: Any, y: Any, half: list[int], other: list[int]) -> Any:
        picked = (ir.Constant(ir.VectorType(_I32, LANES), places) for places in (half, other))
        low, high = (builder.shuffle_vector(x, y, places) for places in picked)
        return builder.fadd(low, high)

    halves = parts[:8] + parts[16:24], parts[8:16] + parts[24:]
    quarters = [n for n in parts if n % 8 < 4], [n for n in parts if n % 8 >= 4]
    x = fold(fold(a, b, *halves), fold(c, d, *halves), *quarters)
    x = fold(x, x, parts[:LANES], [n ^ 2 for n in parts[:LANES]])
    return fold(x, x, parts[:LANES], [n ^ 1 for n in parts[:LANES]])


def _multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    function = _function(builder, f"llvm.fmuladd.v{LANES}f32", _FLOATS, _FLOATS, _FLOATS, _FLOATS)
    return builder.call(function, [x, y, z])


def _prefetch(builder: Any, address: Any) -> None:
    """Ask for the line at an address that will be read soon, wherever it is."""
    pointer = ir.IntType(8).as_pointer()
    function = _function(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, _I32, _I32, _I32)
    builder.call(function, [builder.inttoptr(address, pointer), *(ir.Constant(_I32, n) for n in (0, 3, 1))])


def _function(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """An LLVM intrinsic, declared once a module."""
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(result, arguments), name)
