"""Keys or values quantized in groups of a channel's tokens or of a token's channels."""

from typing import Literal, NamedTuple, get_args

from jax import Array
from jaxtyping import Float

from kivi_jax.kv.quantize import dequantize_keys, dequantize_values, quantize_keys, quantize_values

Grouping = Literal["per token", "per channel"]
GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)


class Pairing(NamedTuple):
    """How keys and values are quantized; KIVI's is `Pairing("per channel", "per token", bits, group_size)`."""

    keys: Grouping
    values: Grouping
    bits: int
    group_size: int


def quantized(
    x: Float[Array, "*batch T D"], grouping: Grouping, bits: int, group_size: int
) -> Float[Array, "*batch T D"]:
    """`x` quantized and dequantized again, in its dtype.

    A group, with a scale and a zero of its own, is per channel `group_size` consecutive tokens of one channel, as KIVI
    has it for keys, and per token `group_size` consecutive channels of one token, as it has it for values.

    Raises:
        ValueError: bits other than 2 and 4, or T or D that don't divide into groups.
    """
    if grouping == "per channel":
        found = dequantize_keys(quantize_keys(x, bits, group_size), bits, group_size)
    else:
        found = dequantize_values(quantize_values(x, bits, group_size), bits, group_size)
    return found.astype(x.dtype)
