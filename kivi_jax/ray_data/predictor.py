"""An engine in an actor of Ray."""

import asyncio
import os
import sys
import traceback

import pyarrow as pa
import ray

from kivi_jax.checkpoints.load import load
from kivi_jax.engine import Engine
from kivi_jax.engine.thread import EngineDied, EngineThread
from kivi_jax.kv.config import KVConfig
from kivi_jax.mesh import local_mesh
from kivi_jax.ray_data.rows import Result, add_results, check_columns, read_output, read_rows, refused
from kivi_jax.request import GenerationSettings
from kivi_jax.text import Prompt


class KiviPredictor:
    """A class for `Dataset.map_batches`, of which each actor makes one object. `map_prompts` calls it for you.

    All batches that an actor has at a time share one engine, so that its slots stay full when one of them is nearly
    done. Batches are pyarrow tables: `batch_format="pyarrow"`.

    Args:
        model: as for `kivi_jax.load`; a folder has to be there on every host.
        settings: for rows without their own; None for the defaults.
        kv: storage of the KV state, as for `kivi_jax.generate`.
        mesh: "DATAxMODEL", how the actor's devices are laid out; None for a single device.
        dtype, revision, max_positions: as for `kivi_jax.load`.
        slots, capacity, window, prefill_tokens, chat_template: as for `kivi_jax.Engine`.

    Raises:
        ValueError: what `load` or `Engine` refuse, a mesh of other devices, or a model without a tokenizer.
    """

    def __init__(
        self,
        model: str,
        settings: GenerationSettings | None = None,
        *,
        kv: str | KVConfig = "kivi2",
        mesh: str | None = None,
        dtype: str = "bfloat16",
        revision: str | None = None,
        max_positions: int | None = None,
        slots: int | None = None,
        capacity: int | None = None,
        window: int = 64,
        prefill_tokens: int = 4096,
        chat_template: str | None = None,
    ) -> None:
        self._settings = settings or GenerationSettings()
        params = load(
            model,
            dtype,
            revision=revision,
            mesh=None if mesh is None else local_mesh(mesh),
            max_positions=max_positions,
        )
        if params.tokenizer is None:
            raise ValueError(
                f"{model} has no tokenizer, which texts in rows need; put its files beside the weights"
            )
        self._engine = EngineThread(
            Engine(
                params,
                kv,
                slots=slots,
                capacity=capacity,
                window=window,
                prefill_tokens=prefill_tokens,
                chat_template=chat_template,
            )
        )
        self._has_finished = False  # a batch that the engine had a part in

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """The batch with the columns of `Result` added, in the order of its rows.

        Args:
            batch: rows with a "prompt", a text, or "messages", a list of them; columns with names of
                `GenerationSettings` (but `n` and `logprobs`) set what isn't null; any others are passed on.

        Raises:
            ValueError: the columns are none of these, or are named as those of results are.
            EngineDied: before any batch was finished. Later, the process ends.
        """
        check_columns(batch.column_names)
        rows = read_rows(batch, self._settings)
        try:
            results = await asyncio.gather(*(self._answer(row) for row in rows))
        except EngineDied as error:
            self._end_actor(error)
            raise
        self._has_finished = self._has_finished or not all(result.error for result in results)
        return add_results(batch, results)

    async def _answer(self, row: tuple[Prompt, GenerationSettings] | Result) -> Result:
        if isinstance(row, Result):
            return row
        try:
            return read_output(await asyncio.wrap_future(self._engine.submit(*row)))
        except EngineDied:
            raise
        except Exception as error:  # a row that can't be done must not end a job of millions
            return refused(error)

    def _end_actor(self, error: EngineDied) -> None:
        """Ends the process of an actor, so that Ray starts another and gives it the batches that are lost.

        An exception alone wouldn't do: Ray gives the batch to the same actor again, or ends the job. That is right
        where the engine died of the first batches it got, as it would do again.
        """
        if not (self._has_finished and ray.is_initialized() and ray.get_runtime_context().get_actor_id()):
            return
        traceback.print_exception(error)
        print("this actor ends now, and Ray starts another one", file=sys.stderr, flush=True)
        os._exit(1)
