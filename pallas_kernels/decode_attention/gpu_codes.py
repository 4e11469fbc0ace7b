"""Codes as the GPU's matrix unit wants them, and arithmetic in pairs of 16 bits, in registers.

Triton has no operations for either but inline assembly. Each is there a second time as plain JAX, for the interpreter.
"""

import struct
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Int16, Int32

from kivi_jax.pallas_kernels.decode_attention.gpu_softmax import wide


def unpack(
    halves: Int16[Array, "W C"], bit: int, bits: int, dtype: Any, interpret: bool
) -> Float[Array, "W C"]:
    """`1 + code / 2^bits`: the code becomes the highest bits of the mantissa of a one.

    Flipping the top bit of a field, which is code - 2^(bits - 1) in two's complement, makes it the code.
    """
    mantissa = 7 if dtype == jnp.bfloat16 else 10
    one = (2 ** (14 - mantissa) - 1) << mantissa
    mask = (2**bits - 1) << (mantissa - bits)
    flipped = one ^ (1 << (mantissa - 1))
    left = mantissa - bits - bit
    if interpret:
        moved = halves << max(left, 0) if left >= 0 else jax.lax.shift_right_logical(halves, jnp.int16(-left))
        return jax.lax.bitcast_convert_type((moved & jnp.int16(mask)) ^ jnp.int16(flipped), dtype)
    shift = f"shl.b32 moved, $1, {left};" if left >= 0 else f"shr.u32 moved, $1, {-left};"
    both = 0x10001  # two numbers to a register
    # (a & b) ^ c
    return _in_pairs(
        f"{{ .reg .b32 moved; {shift} lop3.b32 $0, moved, {mask * both}, {flipped * both}, 0x6A; }}",
        dtype,
        halves,
    )


def unit_of(bits: int) -> float:
    """An unpacked code is 1 + code / unit."""
    return 2.0**bits


def middle_code(bits: int) -> float:
    return (2**bits - 1) / 2


def multiply(x: Float[Array, "*n"], y: Float[Array, "*n"], interpret: bool) -> Float[Array, "*n"]:
    if interpret:
        return (wide(x) * wide(y)).astype(x.dtype)
    # Plus -0, which leaves a product as it is: Ampere multiplies pairs of bfloat16 in no other way.
    kind = _pair(x.dtype)
    return _in_pairs(
        f"{{ .reg .b32 none; mov.b32 none, 0x80008000; fma.rn.{kind} $0, $1, $2, none; }}", x.dtype, x, y
    )


def multiply_add(
    x: Float[Array, "*n"], y: Float[Array, "*n"], z: Float[Array, "*n"], interpret: bool
) -> Float[Array, "*n"]:
    """x · y + z, rounded once."""
    if interpret:
        return (wide(x) * wide(y) + wide(z)).astype(x.dtype)
    return _in_pairs(f"fma.rn.{_pair(x.dtype)} $0, $1, $2, $3;", x.dtype, x, y, z)


def _pair(dtype: Any) -> str:
    return "bf16x2" if dtype == jnp.bfloat16 else "f16x2"


def _in_pairs(assembly: str, dtype: Any, *args: Array) -> Array:
    (result,) = plgpu.elementwise_inline_asm(
        assembly,
        args=args,
        constraints=",".join(["=r", *["r"] * len(args)]),
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, dtype)],
    )
    return result


def exp2_of_sum(
    x: Float[Array, "*n"], factor: float, y: Float[Array, "*n"], interpret: bool
) -> Float[Array, "*n"]:
    """2^(x · factor + y) in two instructions; what is below the smallest normal number becomes 0."""
    if interpret:
        return jnp.exp2(x * factor + y)
    (bits,) = struct.unpack("<I", struct.pack("<f", factor))
    (result,) = plgpu.elementwise_inline_asm(
        f"{{ .reg .f32 sum; fma.rn.f32 sum, $1, 0f{bits:08X}, $2; ex2.approx.ftz.f32 $0, sum; }}",
        args=[x, y],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return result


def anew(index: Int32[Array, "*n"], tile: Array, use: str, interpret: bool) -> Int32[Array, "*n"]:
    """`index`, of which the compiler does not know that it is the same for other uses and other tiles.

    What is read twice, and addresses, it would otherwise keep in registers, and there are too few of them.
    """
    if interpret:
        return index
    (same,) = plgpu.elementwise_inline_asm(
        f"mov.b32 $0, $1; // {use}",
        args=[index, jnp.broadcast_to(tile, index.shape)],
        constraints="=r,r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(index.shape, index.dtype)],
    )
    return same
