"""How the key-value state is stored: bits, group size, boosted channels, exact tokens and exact layers."""

import dataclasses
import operator
from typing import Any

from kivi_jax.arguments import read_flag, read_number, read_whole
from kivi_jax.kv.quantize import BOOSTED_BITS, BOOSTED_FROM

UNQUANTIZED_BITS = 16  # stands for the activation dtype, whatever that is


@dataclasses.dataclass(frozen=True)
class KVConfig:
    """Storage of the key-value state (KIVI, Liu et al. 2024, arXiv 2402.02750).

    Attributes:
        key_bits: bits of a key's code, 2 or 4; 16 for both keys and values stores the activation dtype.
        value_bits: bits of a value's code, likewise.
        group_size: values that share one scale and one zero, consecutive tokens of a channel for keys and
            consecutive channels of a token for values. It must divide the model's `head_dim`.
        residual_length: number of newest tokens whose values stay exact, a multiple of `group_size`.
        sink_tokens: number of first tokens that stay exact for good, at most `residual_length`. Models send much of
            their attention there ("attention sinks"), and their keys would widen the range of their groups.
        overrides: layers stored in another way, as `{layer: name or KVConfig}`; -1 is the last layer. Kept as a sorted
            tuple of pairs.
        boosted_channels: the share of key channels that have 4 bits instead of `key_bits`, which must be 2: those that
            would lose most. They are chosen for each row and KV head when its first `residual_length` tokens are
            quantized, by their range and the queries there.
        rotated_values: whether values are stored rotated by a Hadamard matrix, which spreads what sits in few channels,
            and with scales and zeros by least squares. What attention gives is rotated back.

    Raises:
        ValueError: the fields do not fit together.
    """

    key_bits: int
    value_bits: int
    group_size: int = 32
    residual_length: int = 128
    sink_tokens: int = 0
    overrides: Any = ()
    boosted_channels: float = 0.0
    rotated_values: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "overrides", _read_overrides(self.overrides))
        for name in ("key_bits", "value_bits", "group_size", "residual_length", "sink_tokens"):
            object.__setattr__(self, name, read_whole(name, getattr(self, name)))
        object.__setattr__(self, "boosted_channels", read_number("boosted_channels", self.boosted_channels))
        object.__setattr__(self, "rotated_values", read_flag("rotated_values", self.rotated_values))
        bits = self.bits
        if not 0 <= self.boosted_channels < 1 or (self.boosted_channels and self.key_bits != BOOSTED_FROM):
            raise ValueError(
                f"boosted_channels is a share of key channels, from 0 to less than 1, and needs key_bits = "
                f"{BOOSTED_FROM}; got {self.boosted_channels} with key_bits = {self.key_bits}"
            )
        if bits == (UNQUANTIZED_BITS, UNQUANTIZED_BITS):
            if self.rotated_values:
                raise ValueError("rotated_values is for quantized values; an unquantized state has none")
            return
        if not set(bits) <= {2, 4}:
            raise ValueError(
                f"key_bits and value_bits must each be 2 or 4 (or both 16 for an unquantized state), got {bits}"
            )
        if self.group_size < 1:
            raise ValueError(f"group_size must be positive, got {self.group_size}; the usual value is 32")
        if self.residual_length < 1 or self.residual_length % self.group_size:
            raise ValueError(
                f"residual_length must be a positive multiple of group_size {self.group_size}, "
                f"got {self.residual_length}"
            )
        # A flush writes residual_length tokens as whole words.
        if self.residual_length * min(bits) % 32:
            raise ValueError(
                f"residual_length must be a multiple of {32 // min(bits)} tokens, which fill one 32-bit word "
                f"at {min(bits)} bits, got {self.residual_length}"
            )
        if not 0 <= self.sink_tokens <= self.residual_length:
            raise ValueError(
                f"sink_tokens must be from 0 to residual_length {self.residual_length}, got {self.sink_tokens}"
            )

    @property
    def bits(self) -> tuple[int, int]:
        return self.key_bits, self.value_bits

    @property
    def quantized(self) -> bool:
        return self.key_bits != UNQUANTIZED_BITS

    def bits_per_value(self) -> float:
        """Mean stored bits of a packed key or value in a layer without override, its share of a 16-bit scale and zero
        included.
        """
        if not self.quantized:
            return float(UNQUANTIZED_BITS)
        more = (BOOSTED_BITS - BOOSTED_FROM) * self.boosted_channels
        return (self.key_bits + more + self.value_bits) / 2 + 32 / self.group_size

    def boosted_of(self, head_dim: int) -> int:
        """How many of a head's key channels are boosted."""
        return round(self.boosted_channels * head_dim)

    def of_layers(self, num_layers: int) -> tuple["KVConfig", ...]:
        """The configuration of every layer, none of which has overrides.

        Raises:
            ValueError: an override is for a layer that the model does not have, or two disagree.
        """
        layers = [dataclasses.replace(self, overrides=())] * num_layers
        overridden: dict[int, KVConfig] = {}
        for index, config in self.overrides:
            if not -num_layers <= index < num_layers:
                raise ValueError(f"overrides name layer {index} of a model with {num_layers} layers")
            if overridden.setdefault(index % num_layers, config) != config:
                raise ValueError(f"overrides store layer {index % num_layers} in two ways")
            layers[index] = config
        return tuple(layers)


def _read_overrides(overrides: Any) -> tuple[tuple[int, KVConfig], ...]:
    try:
        given = dict(overrides)
    except (TypeError, ValueError):
        given = {None: overrides}
    pairs = []
    for index, kv in given.items():
        config = PRESETS.get(kv) if isinstance(kv, str) else kv
        if not isinstance(index, int) or not isinstance(config, KVConfig) or config.overrides:
            raise ValueError(
                f"overrides map a layer's index to one of {', '.join(map(repr, PRESETS))} or a KVConfig "
                f"without overrides, got {overrides!r}"
            )
        pairs.append((index, config))
    return tuple(sorted(pairs, key=operator.itemgetter(0)))


_EXACT = KVConfig(UNQUANTIZED_BITS, UNQUANTIZED_BITS)
# The recommended one first.
PRESETS = {
    "kivi2-plus": KVConfig(2, 2, 64, sink_tokens=32, boosted_channels=0.25, rotated_values=True),
    "kivi2-plus-g32": KVConfig(2, 2, sink_tokens=32, boosted_channels=0.25, rotated_values=True),
    "bf16": _EXACT,
    "kivi4": KVConfig(4, 4),
    "kivi-k4v2": KVConfig(4, 2),
    "kivi-k2v4": KVConfig(2, 4),
    "kivi2": KVConfig(2, 2),
    "kivi2-sinks": KVConfig(2, 2, sink_tokens=32),
    "kivi2-edges": KVConfig(2, 2, overrides={0: _EXACT, -1: _EXACT}),
    "kivi-k4v4": KVConfig(4, 4),
    "kivi-k2v2": KVConfig(2, 2),
}


def resolve_kv(kv: str | KVConfig, head_dim: int, num_layers: int) -> KVConfig:
    """The configuration that `kv` names, checked against a model's `head_dim` and number of layers.

    Raises:
        ValueError: an unknown name, a group size that does not divide `head_dim`, or an override without a layer.
    """
    config = find_kv(kv)
    for layer in config.of_layers(num_layers):
        _check_head_dim(layer, head_dim)
    return config


def find_kv(kv: str | KVConfig) -> KVConfig:
    """The configuration that `kv` names or is.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(kv, str) and kv in PRESETS:
        return PRESETS[kv]
    if isinstance(kv, KVConfig):
        return kv
    raise ValueError(f"kv must be one of {', '.join(map(repr, PRESETS))} or a KVConfig, got {kv!r}")


def _check_head_dim(config: KVConfig, head_dim: int) -> None:
    if config.quantized and head_dim % config.group_size:
        raise ValueError(
            f"group_size {config.group_size} does not divide the model's head_dim {head_dim}; "
            f"pass kv=KVConfig(..., group_size=G) with a G that does"
        )
    if config.boosted_channels and not 0 < config.boosted_of(head_dim) == config.boosted_channels * head_dim:
        raise ValueError(
            f"boosted_channels {config.boosted_channels} of the model's head_dim {head_dim} are no whole number "
            f"of channels"
        )
    if config.quantized and head_dim == 64 and config.residual_length * min(config.bits) % 64:
        raise ValueError(
            f"residual_length {config.residual_length} must be a multiple of {64 // min(config.bits)} tokens "
            f"at {min(config.bits)} bits for a head_dim of 64, two of whose word rows share one"
        )
