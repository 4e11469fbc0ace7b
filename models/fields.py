"""Reads the fields of a `config.json` that all families have, and refuses what no family computes.

Fields are checked before they are used, so that a wrong one is a clear ValueError and never a wrong model. Absent
fields have the defaults of transformers.
"""

import reprlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# Fields that would change the arithmetic, and the values that leave it unchanged.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None, {}),
    "partial_rotary_factor": (None, 1),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "dual_chunk_attention_config": (None, {}),
    "llama_4_scaling_beta": (None, 0),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "per_layer_config": (None, {}),
    "rope_interleaved": (None, False),
    "apply_residual_connection_post_layernorm": (None, False),
    "is_causal": (None, True),
    "use_bidirectional_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}
GREATEST_SIZE = 2**31 - 1  # positions and tokens are int32
MOST_LAYERS = 1000  # far more than any model has; each takes time and memory even before weights are read
FULL, SLIDING = "full_attention", "sliding_attention"


def refuse_other_arithmetic(fields: Mapping[str, Any]) -> None:
    """Refuses fields that ask for arithmetic which is not implemented here.

    Raises:
        ValueError: there is such a field.
    """
    for name, neutral in NEUTRAL.items():
        if fields.get(name) not in neutral:
            raise ValueError(
                f"config.json: {name} {reprlib.repr(fields[name])} is not supported; "
                "it would change what the model computes"
            )


def refuse_other_activation(fields: Mapping[str, Any], name: str, supported: str) -> None:
    """Refuses the feed-forward layers' activation in the field `name` if it isn't the `supported` one, the default.

    Raises:
        ValueError: it is another one.
    """
    if (activation := fields.get(name, supported)) != supported:
        raise ValueError(f"config.json: {name} {activation!r} is not supported, only {supported!r}")


def read_sizes(fields: Mapping[str, Any], required: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Checks fields that are sizes; `optional` ones may be absent.

    Raises:
        ValueError: a required field is missing, one is not a positive whole number below 2^31, or there are too many
            layers.
    """
    if missing := [name for name in required if fields.get(name) is None]:
        raise ValueError(f"config.json lacks the fields {', '.join(missing)}")
    sizes = {name: fields[name] for name in (*required, *optional) if fields.get(name) is not None}
    if wrong := {name: size for name, size in sizes.items() if not is_size(size)}:
        raise ValueError(
            f"config.json: these must be positive whole numbers below 2^31, got {reprlib.repr(wrong)}"
        )
    if (layers := sizes.get("num_hidden_layers", 0)) > MOST_LAYERS:
        raise ValueError(f"config.json: num_hidden_layers must be at most {MOST_LAYERS}, got {layers}")


def read_positive(fields: Mapping[str, Any], name: str, default: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    if not is_positive(value):
        raise ValueError(f"config.json: {name} must be a positive number, got {value!r}")
    return float(value)


def read_flag(fields: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json: {name} must be true or false, got {value!r}")
    return default if value is None else value


def read_head_dim(fields: Mapping[str, Any]) -> int:
    """`head_dim`, or the hidden size divided by the number of heads.

    Raises:
        ValueError: it is not an even whole number.
    """
    head_dim = fields.get("head_dim") or fields["hidden_size"] / fields["num_attention_heads"]
    if head_dim % 2:
        raise ValueError(
            f"config.json: head_dim must be an even whole number for rotary positions, got {head_dim}"
        )
    return int(head_dim)


def read_sliding_windows(
    fields: Mapping[str, Any], window: int | None, default: Sequence[str]
) -> tuple[int | None, ...]:
    """How many of the newest tokens each layer attends, None for all, by `layer_types` or else by `default`.

    Raises:
        ValueError: `layer_types` doesn't list full or sliding attention for each layer, or there is no `window`.
    """
    types = fields.get("layer_types") or default
    if not isinstance(types, Sequence) or len(types) != len(default):
        raise ValueError(f"config.json: layer_types must name all {len(default)} layers, got {types!r}")
    if others := [kind for kind in types if kind not in (FULL, SLIDING)]:
        raise ValueError(f"config.json: layer_types {others[0]!r} is not supported, only {FULL}, {SLIDING}")
    if SLIDING in types and window is None:
        raise ValueError(f"config.json: layer_types has {SLIDING}, but no sliding_window is in use")
    return tuple(window if kind == SLIDING else None for kind in types)


def is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= GREATEST_SIZE


def is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
