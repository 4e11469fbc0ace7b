"""Unpacks codes for the GPU's matrix unit, and computes with pairs of 16-bit numbers in a register.

Triton can do either only by inline assembly. Each function has a plain JAX version beside it for the interpreter.
"""

import struct
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Int16

from kivi_jax.pallas_kernels.decode_attention.gpu_softmax import to_float32

MANTISSA_BITS = {jnp.dtype(jnp.bfloat16): 7, jnp.dtype(jnp.float16): 10}
USED_BITS = 7  # the highest ones: a float16 scale times a code in lower bits would underflow


class Field(NamedTuple):
    """Where a code lies in half a word, and where it goes in a mantissa.

    Attributes:
        shift: bits by which the half word is shifted right, or left if negative; as many fields as possible share one.
        position: the mantissa bit at which the code then begins.
        unit: an unpacked code is -(1 + code / unit).
    """

    shift: int
    position: int
    unit: float


def fields_of(bits: int, dtype: Any) -> list[Field]:
    """The fields of half a word, from its lowest bit on."""
    lowest = MANTISSA_BITS[jnp.dtype(dtype)] - USED_BITS
    together = USED_BITS // bits
    places = [divmod(i, together) for i in range(16 // bits)]
    return [
        Field(moves * together * bits - lowest, i * bits + lowest, 2.0 ** (USED_BITS - i * bits))
        for moves, i in places
    ]


def unpack(
    halves: Int16[Array, "*n"], field: Field, bits: int, dtype: Any, interpret: bool
) -> Float[Array, "*n"]:
    """`-(1 + code / unit)`: the code is put into the mantissa of -1.

    A field holds code - 2^(bits - 1) in two's complement; flipping its top bit gives the code.
    """
    mantissa = MANTISSA_BITS[jnp.dtype(dtype)]
    minus_one = ((2 ** (14 - mantissa) - 1) << mantissa) - 2**15
    mask = (2**bits - 1) << field.position
    flipped = minus_one ^ (1 << (field.position + bits - 1))
    if interpret:
        left, right = jnp.int16(max(-field.shift, 0)), jnp.int16(max(field.shift, 0))
        moved = jax.lax.shift_right_logical(halves << left, right)
        return jax.lax.bitcast_convert_type((moved & jnp.int16(mask)) ^ jnp.int16(flipped), dtype)
    # Two numbers to a register; lop3 0x6A is (a & b) ^ c.
    mask, flipped = (0x10001 * (x & 0xFFFF) for x in (mask, flipped))
    shift = (
        f"shr.u32 moved, $1, {field.shift};" if field.shift >= 0 else f"shl.b32 moved, $1, {-field.shift};"
    )
    return _in_pairs(
        f"{{ .reg .b32 moved; {shift} lop3.b32 $0, moved, {mask}, {flipped}, 0x6A; }}", dtype, halves
    )


def negative(scale: Float[Array, "*n"], interpret: bool) -> Float[Array, "*n"]:
    """-scale, by an exclusive or: the assembler would pair the halves of a plain scale again for each use."""
    if interpret:
        return -scale
    return _in_pairs("xor.b32 $0, $1, 0x80008000;", scale.dtype, scale)


def scaled(
    unpacked: Float[Array, "*n"], negative_scale: Float[Array, "*n"], interpret: bool
) -> Float[Array, "*n"]:
    """scale · code / unit, rounded once."""
    if interpret:
        return (to_float32(unpacked) * to_float32(negative_scale) + to_float32(negative_scale)).astype(
            unpacked.dtype
        )
    kind = "bf16x2" if unpacked.dtype == jnp.bfloat16 else "f16x2"
    return _in_pairs(f"fma.rn.{kind} $0, $1, $2, $2;", unpacked.dtype, unpacked, negative_scale)


def affine(
    codes: Float[Array, "*n"], scale: Float[Array, "*n"], zero: Float[Array, "*n"], interpret: bool
) -> Float[Array, "*n"]:
    """scale · code + zero, rounded once."""
    if interpret:
        return (to_float32(codes) * to_float32(scale) + to_float32(zero)).astype(codes.dtype)
    kind = "bf16x2" if codes.dtype == jnp.bfloat16 else "f16x2"
    return _in_pairs(f"fma.rn.{kind} $0, $1, $2, $3;", codes.dtype, codes, scale, zero)


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
    """2^(x · factor + y) in two instructions; subnormal results become 0."""
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
