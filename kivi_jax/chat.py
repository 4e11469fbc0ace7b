"""A conversation on one live KV state, which each turn extends."""

import dataclasses
import functools
from collections.abc import Generator
from typing import Unpack

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from kivi_jax.arguments import read_size
from kivi_jax.batching import bucket
from kivi_jax.completions import Completion, make_reader
from kivi_jax.decoding import Decoding, begin_decoding, continue_decoding, seen_tokens
from kivi_jax.generation import STREAM_TOKENS
from kivi_jax.kv.config import KVConfig, resolve_kv
from kivi_jax.kv.state import KVState, kv_bytes
from kivi_jax.model import Params, jit_of_params
from kivi_jax.request import GenerationOptions, GenerationSettings, make_settings
from kivi_jax.rows import make_rows
from kivi_jax.steps import extend, init_state, prefill
from kivi_jax.text import encode, read_stops

CAPACITY = 8192
LEAST_ADDED = 64  # tokens that a turn is padded to, so that most turns run the same program


class Chat:
    """Answers message after message. What was said stays in the KV state, and a turn costs only what is new in it.

    A turn attends earlier ones as the cache stores them, and its own message exactly. The whole conversation is read
    again where the state holds other tokens than it: after a stop string or an error, and with chat templates that
    change earlier turns, by trimming them or leaving out their thoughts.

    Args:
        params: a model whose tokenizer has a chat template.
        kv: storage of the KV state, as for `generate`.
        settings: how to answer; None for the defaults. `n` is not for chats.
        system: a system message before all others.
        capacity: tokens of the whole conversation; by default the model's positions, but at most 8192.
        chat_template: the name of one, where the checkpoint has several.
        **options: fields of `GenerationSettings`, which change those of `settings`.

    Attributes:
        messages: the conversation so far.

    Raises:
        TypeError, ValueError: as `generate`; or `capacity` is more than the model's positions, or has no room for an
            answer.
    """

    def __init__(
        self,
        params: Params,
        kv: str | KVConfig = "kivi2",
        settings: GenerationSettings | None = None,
        *,
        system: str | None = None,
        capacity: int | None = None,
        chat_template: str | None = None,
        **options: Unpack[GenerationOptions],
    ) -> None:
        self.params = params
        self.kv = resolve_kv(kv, params.config.head_dim, params.config.num_layers)
        self.settings = make_settings(settings, None, **options)
        if self.settings.n is not None:
            raise ValueError("a chat has one answer to each message; leave n out")
        positions = params.config.max_positions
        self.capacity = read_size("capacity", min(positions, CAPACITY) if capacity is None else capacity)
        if self.capacity > positions:
            raise ValueError(f"capacity {self.capacity} exceeds the model's {positions} positions")
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self._chat_template = chat_template
        self._stops, self._end_tokens = read_stops(params, self.settings)
        self._turns = 0
        self._state: KVState | None = None
        self._held: list[int] = []  # the tokens in the state
        self._answering: Generator[Completion, None, None] | None = None
        self._encode("?")  # so that what is wrong is said now

    @property
    def tokens(self) -> int:
        """How many tokens the state holds."""
        return len(self._held)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the state, for all of its capacity; 0 before the first message."""
        return 0 if self._state is None else kv_bytes(self._state)

    def ask(self, message: str) -> Generator[Completion, None, None]:
        """Answers, and yields the answer as it grows. One that is not read to its end stays as it is when the next
        message comes, and one that nobody reads was not asked for.

        Raises:
            ValueError: the conversation, with an answer of `max_new_tokens`, has no room in `capacity`. It is then as
                it was before.
        """
        if self._answering is not None:
            self._answering.close()
        self._answering = self._answer(*self._encode(message))
        return self._answering

    def _encode(self, message: str) -> tuple[list[dict[str, str]], list[int]]:
        """The conversation with one more message, and its tokens."""
        said = [*self.messages, {"role": "user", "content": message}]
        (ids,) = encode(self.params, [said], self._chat_template)
        if self.capacity - len(ids) < self.settings.max_new_tokens:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, and an answer of {self.settings.max_new_tokens} exceeds its "
                f"capacity of {self.capacity}; begin another, or give it more capacity or lower max_new_tokens"
            )
        return said, ids

    def _answer(self, said: list[dict[str, str]], ids: list[int]) -> Generator[Completion, None, None]:
        reader = make_reader(self.params, said, ids, self.settings, self._stops, self._end_tokens)
        decoding = self._begin(ids)
        completion = None
        try:
            while completion is None or completion.finish_reason is None:
                if completion is not None:
                    decoding = continue_decoding(self.params, decoding, jnp.int32(STREAM_TOKENS))
                tokens, logprobs = _generated(decoding)
                completion = reader.read(tokens, logprobs)
                yield completion
        finally:
            if completion is not None:
                self.messages = [*said, {"role": "assistant", "content": completion.text or ""}]
                self._turns += 1
                # Rows whose activations overflowed lack tokens, and where Ctrl-C came between two pieces of an answer,
                # the state was given away.
                if completion.finish_reason != "error" and not decoding.tokens.is_deleted():
                    # The newest token is not in the state yet.
                    held = ids + _generated(decoding)[0][:-1]
                    self._state, self._held = decoding.state, held

    def _begin(self, ids: list[int]) -> Decoding:
        """The first token after `ids`, of which the state may hold the first ones."""
        # An answer's text may also be cut into other tokens than those it came in.
        goes_on = self._state is not None and self._held == ids[: len(self._held)] != ids
        added = ids[len(self._held) :] if goes_on else ids
        tokens = np.zeros((1, min(bucket(len(added), least=LEAST_ADDED), self.capacity)), np.int32)
        tokens[0, : len(added)] = added
        state = self._state if goes_on else None
        self._state, self._held = None, []  # it is donated, or let go before there is another
        if state is None:
            state, append = init_state(self.params, 1, self.capacity, self.kv), _prefill
        else:
            append = _extend
        logits, state = append(self.params, jnp.asarray(tokens), jnp.asarray([len(added)]), state)
        penalized = self.settings.repetition_penalty != 1
        seen = None
        if penalized:
            whole = np.zeros((1, self.capacity), np.int32)
            whole[0, : len(ids)] = ids
            seen = seen_tokens(self.params, jnp.asarray(whole), jnp.asarray([len(ids)]))
        one, turn = np.zeros(1, np.int32), np.full(1, self._turns, np.int32)
        rows = make_rows(self.settings, self._end_tokens, one, turn, 1)
        if self.settings.temperature == 0 and not penalized:
            rows = dataclasses.replace(rows, sampling=None)
        return begin_decoding(
            self.params,
            logits,
            state,
            seen,
            rows,
            max_new_tokens=bucket(self.settings.max_new_tokens, least=16),
            logprobs=self.settings.logprobs,
        )


def _generated(decoding: Decoding) -> tuple[list[int], list[float] | None]:
    """The tokens so far, and their log-probabilities if these are wanted."""
    count = int(decoding.counts[0])
    tokens = np.asarray(decoding.tokens)[0, :count].tolist()
    return tokens, None if decoding.logprobs is None else np.asarray(decoding.logprobs)[0, :count].tolist()


@functools.partial(jit_of_params, donate_argnames="state")
def _prefill(
    params: Params, tokens: Int[Array, "1 T"], lengths: Int[Array, " 1"], state: KVState
) -> tuple[Float[Array, "1 vocab"], KVState]:
    return prefill(params, tokens, lengths, state)


@functools.partial(jit_of_params, donate_argnames="state")
def _extend(
    params: Params, tokens: Int[Array, "1 T"], lengths: Int[Array, " 1"], state: KVState
) -> tuple[Float[Array, "1 vocab"], KVState]:
    return extend(params, tokens, lengths, state)
