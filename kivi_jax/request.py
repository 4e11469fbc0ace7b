"""What a request may set, checked in one place."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict, Unpack

from kivi_jax.arguments import read_flag, read_number, read_size, read_whole


class GenerationOptions(TypedDict, total=False):
    """Fields of `GenerationSettings` as keyword arguments, but for `n`, on which the type of a result depends."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    seed: int
    stop: str | Sequence[str] | None
    logprobs: bool
    ignore_eos: bool


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """How completions are generated. Whole numbers and floats may be of any library's type.

    Attributes:
        max_new_tokens: most tokens to generate for a prompt.
        temperature: 0 takes the most likely token, more samples.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the fewest tokens that together reach this probability.
        min_p: sample among the tokens at least this times as likely as the most likely one. The cuts follow the
            temperature in this order; `sampling.Sampling` says exactly how.
        repetition_penalty: divides the positive and multiplies the other logits of all tokens that a row's prompt or
            completion has already, so more than 1 discourages them; also where temperature is 0.
        seed: of the samples, a whole number of 64 bits.
        n: samples of every prompt, which is prefilled once; the first is what None, a single one, gives.
        stop: a string or several that end a completion, which then ends before them; a special token's too, like
            `"<|eot_id|>"`.
        logprobs: also give the log-probability of every token, see `Completion`.
        ignore_eos: go on after the end tokens of the checkpoint, as measurements do; they are then part of the result.

    Raises:
        ValueError: a setting of the wrong type or out of range, or several greedy samples, which would all be the same.
    """

    max_new_tokens: int = 128
    temperature: float | int = 0.0
    top_k: int | None = None
    top_p: float | int | None = None
    min_p: float | int | None = None
    repetition_penalty: float | int = 1.0
    seed: int = 0
    n: int | None = None
    stop: str | Sequence[str] | None = None
    logprobs: bool = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "max_new_tokens": read_size("max_new_tokens", self.max_new_tokens),
            "temperature": read_number("temperature", self.temperature),
            "repetition_penalty": read_number("repetition_penalty", self.repetition_penalty),
            "seed": read_whole("seed", self.seed),
            "logprobs": read_flag("logprobs", self.logprobs),
            "ignore_eos": read_flag("ignore_eos", self.ignore_eos),
        }
        if self.n is not None:
            checked["n"] = read_size("n", self.n, ", or None for a single sample")
        if self.top_k is not None:
            checked["top_k"] = read_size("top_k", self.top_k, ", or None for all tokens")
        if self.top_p is not None:
            checked["top_p"] = read_number("top_p", self.top_p, ", or None for 1")
        if self.min_p is not None:
            checked["min_p"] = read_number("min_p", self.min_p, ", or None for 0")
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        self._check_ranges()
        self._check_stops()

    def _check_ranges(self) -> None:
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit 64 bits, got {self.seed}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty must be positive, and 1 for none, got {self.repetition_penalty}"
            )
        if self.n is not None and self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"{self.n} samples at temperature 0 would all be the same; set a temperature above 0"
            )

    def _check_stops(self) -> None:
        stop: Any = self.stop
        several = isinstance(stop, Iterable) and not isinstance(stop, str)
        stops: tuple[Any, ...] = () if stop is None else tuple(stop) if several else (stop,)
        if not all(isinstance(text, str) and text for text in stops):
            raise ValueError(f"stop must be a string or several, none of them empty, got {stop!r}")
        object.__setattr__(self, "stop", stops)

    @property
    def stops(self) -> tuple[str, ...]:
        """What `stop` is once it is checked, also for type checkers."""
        return tuple(self.stop or ())


def make_settings(
    settings: GenerationSettings | None, n: int | None, **options: Unpack[GenerationOptions]
) -> GenerationSettings:
    """`settings`, or the defaults, with what `n`, unless it is None, and `options` change.

    Raises:
        TypeError: there is no such option.
        ValueError: as `GenerationSettings`, or `settings` are none.
    """
    if settings is not None and not isinstance(settings, GenerationSettings):
        raise ValueError(f"settings must be GenerationSettings or None, got {settings!r}")
    known = [field.name for field in dataclasses.fields(GenerationSettings)]
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"there is no option {unknown[0]!r}; settings are {', '.join(known)}")
    changes: dict[str, Any] = {**options} if n is None else {**options, "n": n}
    return dataclasses.replace(GenerationSettings() if settings is None else settings, **changes)
