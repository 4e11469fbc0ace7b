"""What generation_config.json says about ending and sampling."""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kivi_jax.checkpoint import CheckpointError

FILE = "generation_config.json"
# Setting: the least and the greatest value, and the one that changes nothing and is left out. Both ends are allowed.
_TINY = math.ulp(0.0)
_RANGES: dict[str, tuple[float, float, float | None]] = {
    "temperature": (0, 1e6, None),
    "top_k": (0, math.inf, 0),
    "top_p": (_TINY, 1, 1),
    "min_p": (0, 1, 0),
    "repetition_penalty": (_TINY, 1e6, 1),
}
# Settings that `generate` does not have, and the values with which they change nothing.
_OTHERS: dict[str, tuple[Any, ...]] = {
    "typical_p": (None, 1),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "suppress_tokens": (None, []),
    "bad_words_ids": (None, []),
    "sequence_bias": (None, {}),
}


def read_end_tokens(
    folder: Path, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> tuple[int, ...]:
    """End-of-sequence ids; generation_config.json knows more of them than config.json.

    Raises:
        CheckpointError: they are no ids.
    """
    ids = generation.get("eos_token_id")
    ids = config.get("eos_token_id") if ids is None else ids
    listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(
        isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31 for token in listed
    ):
        raise CheckpointError(f"{folder}: eos_token_id must be a token id or a list of them, got {ids!r}")
    return tuple(listed)


def read_sampling(folder: Path, fields: Mapping[str, Any]) -> tuple[tuple[str, int | float], ...]:
    """Arguments of `generate` that the checkpoint's authors recommend.

    A repetition penalty always counts, as in Hugging Face's generation; the settings that shape a distribution count
    when `do_sample` is true, with a temperature of 1 where none is given, and without top_k where none is. A warning
    names settings that `generate` doesn't have.

    Raises:
        CheckpointError: a setting is no number, or out of range.
    """
    sampled = fields.get("do_sample")
    if sampled not in (None, True, False):
        raise CheckpointError(f"{folder / FILE}: do_sample must be true or false, got {sampled!r}")
    if others := [name for name, neutral in _OTHERS.items() if fields.get(name) not in neutral]:
        warnings.warn(
            f"{folder / FILE}: generate has no {', '.join(others)}; params.sampling is without", stacklevel=3
        )
    settings: dict[str, int | float] = {"temperature": 1.0} if sampled else {}
    for name, (least, greatest, neutral) in _RANGES.items():
        value = fields.get(name)
        if value is None or not (sampled or name == "repetition_penalty"):
            continue
        kind = int if name == "top_k" else int | float
        if not isinstance(value, kind) or isinstance(value, bool) or not least <= value <= greatest:
            raise CheckpointError(f"{folder / FILE}: {name} is out of range: {value!r}")
        if value != neutral:
            settings[name] = value
    return tuple(settings.items())
