"""Products of queries and stored keys as vector instructions, for numba: sums stay in registers.

numba's own loops leave one dot product at a time to the compiler, which then moves and adds up more than it
multiplies. Here a few queries meet each key while it is in a register. Vectors of 16 floats are two or four on
machines whose registers are shorter.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils, types
from numba.extending import intrinsic

LANES = 16
#: Keys that four queries meet at once: as many sums as fit in the registers.
TOGETHER = 2 if get_host_cpu_features().get("avx512f") else 1
_AHEAD = 4096  # bytes
_I32 = ir.IntType(32)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)


def products_of(queries: int, bfloat16: bool, *, keys: int = 1, pairs: bool = False) -> Any:
    """Intrinsic f(q, q_step, k, k_step, blocks, out, out_step): products of up to four queries and one key, or two.

    Products of the float32 at address q + n * q_step and of the stored elements at k + m * k_step, ``blocks`` vectors
    of each, go to float32 at out + n * out_step + 4 * m. With ``pairs`` query n has a key of its own, at k + n *
    k_step. Written out as vector instructions, because the sums must stay in registers to be fast and the compiler's
    own do not.
    """

    @intrinsic
    def products(typing: Any, q: Any, q_step: Any, k: Any, k_step: Any, blocks: Any, out: Any, out_step: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            q, q_step, k, k_step, blocks, out, out_step = arguments
            zero = ir.Constant(_FLOATS, None)
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(queries)] for _ in range(keys)]
            size = LANES * (2 if bfloat16 else 4)
            with cgutils.for_range(builder, blocks) as loop:

                def elements(start: Any, step: Any, n: int, size: int, short: bool) -> Any:
                    return _load_floats(
                        builder, _after(builder, _after(builder, start, step, n), loop.index, size), short
                    )

                here = [elements(k, k_step, m, size, bfloat16) for m in range(queries if pairs else keys)]
                for m in range(queries if pairs else keys):
                    ahead = builder.add(k, ir.Constant(ir.IntType(64), _AHEAD))
                    _prefetch(builder, _after(builder, _after(builder, ahead, k_step, m), loop.index, size))
                for n in range(queries):
                    row = elements(q, q_step, n, 4 * LANES, False)
                    for m in range(keys):
                        total = sums[m][n]
                        key = here[n if pairs else m]
                        builder.store(_multiply_add(builder, row, key, builder.load(total)), total)
            for m in range(keys):
                added = _four_sums(builder, [builder.load(total) for total in sums[m]])
                for n in range(queries):
                    at = _as_pointer(builder, _after(builder, out, out_step, n), ir.FloatType())
                    at = builder.gep(at, [ir.Constant(ir.IntType(64), m)])
                    builder.store(builder.extract_element(added, ir.Constant(_I32, 4 * n)), at)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return products


def columns_of(queries: int, bfloat16: bool) -> Any:
    """Intrinsic f(q, q_step, k, k_step, dim, out, out_step): products of some queries and 16 keys side by side.

    Element d of all keys stands at address k + d * k_step, in one vector.
    """

    @intrinsic
    def columns(typing: Any, q: Any, q_step: Any, k: Any, k_step: Any, dim: Any, out: Any, out_step: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            q, q_step, k, k_step, dim, out, out_step = arguments
            sums = [cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, None)) for _ in range(queries)]
            with cgutils.for_range(builder, dim) as loop:
                offset = builder.mul(loop.index, k_step)
                here = _load_floats(builder, builder.add(k, offset), bfloat16)
                for g in range(queries):
                    at = _after(builder, _after(builder, q, q_step, g), loop.index, 4)
                    value = builder.load(_as_pointer(builder, at, ir.FloatType()))
                    one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, ir.Constant(_I32, 0))
                    every = builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, LANES), None))
                    builder.store(_multiply_add(builder, every, here, builder.load(sums[g])), sums[g])
            for g in range(queries):
                at = _as_pointer(builder, _after(builder, out, out_step, g), _FLOATS)
                builder.store(builder.load(sums[g]), at, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return columns


def _after(builder: Any, address: Any, step: Any, count: int) -> Any:
    return builder.add(address, builder.mul(step, ir.Constant(ir.IntType(64), count))) if count else address


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
