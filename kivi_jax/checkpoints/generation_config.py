"""What generation_config.json says about ending and sampling."""

import math
import reprlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "generation_config.json"
# For each setting its least and greatest value, both allowed, and the value that has no effect and is left out.
_TINY = math.ulp(0.0)
_RANGES: dict[str, tuple[float, float, float | None]] = {
    "temperature": (0, 1e6, None),
    "top_k": (0, math.inf, 0),
    "top_p": (_TINY, 1, 1),
    "min_p": (0, 1, 0),
    "repetition_penalty": (_TINY, 1e6, 1),
}
# Settings that `generate` does not have, and their values that have no effect.
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
    """End-of-sequence token ids, from generation_config.json, which often lists more, or else from config.json.

    Values that are not token ids, such as the -1 that some files use for none, are left out with a warning.
    """
    for file, fields in ((FILE, generation), ("config.json", config)):
        ids = fields.get("eos_token_id")
        listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
        tokens = tuple(token for token in listed if _is_token(token))
        if len(tokens) < len(listed):
            warnings.warn(
                f"{folder / file}: eos_token_id must be a token id or a list of them, got {reprlib.repr(ids)}; "
                "what is no id ends no completion",
                stacklevel=3,
            )
        if tokens or ids == []:
            return tokens
    return ()


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def read_sampling(folder: Path, fields: Mapping[str, Any]) -> tuple[tuple[str, int | float], ...]:
    """Arguments of `generate` that the checkpoint's authors recommend.

    As in Hugging Face's generation, a repetition penalty always applies, and the other settings only if `do_sample` is
    true. Then a missing temperature is 1, and a missing top_k means none.

    Settings that `generate` doesn't have and values that it would refuse are left out with a warning: they are only
    recommendations, and no reason to refuse the model.
    """
    sampled = fields.get("do_sample")
    left_out = [name for name, neutral in _OTHERS.items() if fields.get(name) not in neutral]
    if left_out:
        _warn_of(folder, f"generate has no {', '.join(left_out)}")
    odd = {} if sampled in (None, True, False) else {"do_sample": sampled}
    settings: dict[str, int | float] = {"temperature": 1.0} if sampled is True else {}
    for name, (least, greatest, neutral) in _RANGES.items():
        value = fields.get(name)
        if value is None or not (sampled is True or name == "repetition_penalty"):
            continue
        kind = int if name == "top_k" else int | float
        if not isinstance(value, kind) or isinstance(value, bool) or not least <= value <= greatest:
            odd[name] = value
        elif value != neutral:
            settings[name] = value
    if odd:
        _warn_of(
            folder,
            f"out of range: {', '.join(f'{name} {reprlib.repr(value)}' for name, value in odd.items())}",
        )
    return tuple(settings.items())


def _warn_of(folder: Path, what: str) -> None:
    warnings.warn(f"{folder / FILE}: {what}; params.sampling is without", stacklevel=4)
