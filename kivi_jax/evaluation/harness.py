"""A model for lm-evaluation-harness whose answers come through the cache: `pip install kivi-jax[eval]`.

import lm_eval
from kivi_jax.evaluation.harness import KiviLM
lm_eval.simple_evaluate(model=KiviLM(kivi_jax.load("org/name"), "kivi2"), tasks=["hellaswag"])
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from kivi_jax.completions import Completion
from kivi_jax.engine import Engine
from kivi_jax.kv.config import KVConfig
from kivi_jax.model import Params
from kivi_jax.request import GenerationSettings
from kivi_jax.scoring import score
from kivi_jax.text import load_tokenizer

MAX_NEW_TOKENS = 256  # of tasks that don't say, as for the harness's other models
# What tasks say in transformers' words, and generate in ours.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
WITHOUT_EFFECT = ("do_sample", "use_cache", "pad_token_id", "eos_token_id")


class KiviLM(TemplateLM):  # type: ignore[misc] # the harness has no types
    """Scores with `kivi_jax.score`, where every token attends what the cache holds when it is decoded, and generates
    with an engine. With `kv="bf16"` it scores as the harness's own `hf` model does.

    Args:
        params: from `load`.
        kv: how keys and values are stored.
        slots: of the engine; None for as many as fit the device's memory.

    Raises:
        ValueError: the model has no tokenizer or no end token.
    """

    def __init__(self, params: Params, kv: str | KVConfig = "kivi2", *, slots: int | None = None) -> None:
        super().__init__()
        if params.tokenizer is None:
            raise ValueError("the harness needs a model with a tokenizer")
        self.params, self.kv, self.slots = params, kv, slots
        self.tokenizer = load_tokenizer(params.tokenizer)
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the harness needs a tokenizer with an end token")
        self.max_length = params.config.max_positions

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text that has no context: the beginning token, or the end token of the text before."""
        beginning = self.tokenizer.bos_token_id
        return self.eot_token_id if beginning is None else beginning

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
        if add_special_tokens is None:  # a chat template may have written the beginning token already
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **ignored: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for _, context, continuation in requests:
            tokens = (context + continuation)[-self.max_length - 1 :]
            if len(continuation) >= len(tokens):
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens leaves no room for its context "
                    f"in the model's {self.max_length} positions"
                )
            pairs.append((tokens[: -len(continuation)], continuation))
        scores = score(self.params, pairs, self.kv)
        answers = [(sum(found.logprobs), all(found.greedy)) for found in scores]
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of all the model's positions, each after one token before it."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            of_text = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += of_text
            counts.append(len(of_text))
        answers = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(answers)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asked = [
            self._read_request(text, options, seed)
            for seed, (text, options) in enumerate(request.args for request in requests)
        ]
        if not asked:
            return []
        # A new engine each time: requests of one task are alike, and what they need is known only here.
        capacity = max(len(prompt) + settings.max_new_tokens for prompt, settings in asked)
        engine = Engine(
            self.params,
            self.kv,
            slots=self.slots,
            most_slots=len(asked) if self.slots is None else None,
            capacity=capacity,
            prefill_tokens=capacity,  # prompts attend themselves exactly, as where they are scored
        )
        texts: list[str] = [""] * len(asked)
        with tqdm(total=len(asked), desc="generating", disable=disable_tqdm) as progress:
            for place, completion in engine.generate(asked):
                assert isinstance(completion, Completion)
                if completion.finish_reason == "error":
                    raise ValueError(f"request {place}: {completion.error}")
                texts[place] = completion.text or ""
                self.cache_hook.add_partial("generate_until", requests[place].args, texts[place])
                progress.update()
        return texts

    def _read_request(
        self, text: str, options: dict[str, Any], seed: int
    ) -> tuple[list[int], GenerationSettings]:
        """A prompt, of which the newest tokens that leave room for the answer are kept, and how to answer it. Tasks may
        repeat a prompt for several samples, so each request has its own seed.

        Raises:
            ValueError: options that there are not here, or an answer as long as the model's positions.
        """
        given = normalize_gen_kwargs(options, MAX_NEW_TOKENS)
        stops = handle_stop_sequences(
            given.pop("until", None), eos=self.tokenizer.decode([self.eot_token_id])
        )
        max_new_tokens = given.pop("max_gen_toks")
        sampling = {name: given.pop(name) for name in SAMPLING if name in given}
        for name in WITHOUT_EFFECT:
            given.pop(name, None)
        if given.get("num_beams") == 1:
            del given["num_beams"]
        if given:
            raise ValueError(f"tasks can't set {', '.join(given)}, only {', '.join(SAMPLING)}")
        room = self.max_length - max_new_tokens
        if room < 1:
            raise ValueError(
                f"answers of {max_new_tokens} tokens leave no room for a prompt in {self.max_length} positions"
            )
        settings = GenerationSettings(
            max_new_tokens=max_new_tokens, stop=tuple(filter(None, stops)), seed=seed, **sampling
        )
        return self.tok_encode(text)[-room:], settings
