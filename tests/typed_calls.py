"""What type checkers make of `generate`'s results; checked by `make types`, never run."""

from typing import assert_type

import kivi_jax
from kivi_jax import Completion, GenerationSettings

params = kivi_jax.load("demo")
conversation = [{"role": "user", "content": "w1"}]

assert_type(kivi_jax.generate(params, "w1"), Completion)
assert_type(kivi_jax.generate(params, conversation, "kivi4", max_new_tokens=3, stop="w2"), Completion)
assert_type(kivi_jax.generate(params, ["w1", "w2"], temperature=0.5, top_k=None), list[Completion])
assert_type(kivi_jax.generate(params, [[1, 2]], seed=3), list[Completion])
assert_type(kivi_jax.generate(params, "w1", n=2), list[Completion])
assert_type(kivi_jax.generate(params, ["w1"], n=2), list[list[Completion]])
# Settings may have an n.
assert_type(
    kivi_jax.generate(params, ["w1"], settings=GenerationSettings(3)),
    Completion | list[Completion] | list[list[Completion]],
)
kivi_jax.generate(params, "w1", max_tokens=3)  # type: ignore[call-overload]
