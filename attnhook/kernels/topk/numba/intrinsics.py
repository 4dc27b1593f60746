"""What numba lacks and the compiled kernel needs: bit casts, raw pointers, an atomic counter."""

# mypy: allow-untyped-decorators
from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic


@intrinsic
def float_bits(typing: Any, x: Any) -> Any:
    """int32 with the bits of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def bits_float(typing: Any, x: Any) -> Any:
    """float32 with the bits of an int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """void* from an int64 address, for `numba.carray`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def fetch_add(typing: Any, address: Any) -> Any:
    """The int64 at an address, which goes up by one at the same time for all threads."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", target, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), generate
