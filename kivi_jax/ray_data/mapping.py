"""From a dataset of prompts to one of results."""

import inspect
from typing import Any, Unpack

from ray.data import ActorPoolStrategy, Dataset

from kivi_jax.arguments import read_size
from kivi_jax.checkpoints.load import DTYPES
from kivi_jax.kv.config import KVConfig, find_kv
from kivi_jax.mesh import read_mesh_shape
from kivi_jax.ray_data.predictor import KiviPredictor
from kivi_jax.request import GenerationOptions, GenerationSettings, make_settings


def map_prompts(
    dataset: Dataset,
    model: str,
    settings: GenerationSettings | None = None,
    *,
    kv: str | KVConfig = "kivi2",
    tpus: int | None = None,
    gpus: int | None = None,
    mesh: str | None = None,
    concurrency: int | tuple[int, int] = 1,
    batch_size: int = 32,
    batches_in_flight: int = 16,
    dtype: str = "bfloat16",
    revision: str | None = None,
    max_positions: int | None = None,
    slots: int | None = None,
    capacity: int | None = None,
    window: int = 64,
    prefill_tokens: int = 4096,
    chat_template: str | None = None,
    **options: Unpack[GenerationOptions],
) -> Dataset:
    """Completes the prompts of a dataset on actors of Ray, each with an engine. Like other transformations, lazily::

        import ray
        from kivi_jax.ray_data import map_prompts

        prompts = ray.data.read_parquet("gs://bucket/prompts")
        map_prompts(prompts, "org/name", tpus=4, mesh="4x1", concurrency=8).write_parquet("gs://bucket/results")

    A job that was stopped goes on where it was if, before that, Ray Data is told to remember which rows are written::

        from ray.data.checkpoint import CheckpointConfig

        context = ray.data.DataContext.get_current()
        context.checkpoint_config = CheckpointConfig(id_column="id", checkpoint_path="gs://bucket/checkpoint")

    Rows are cut into blocks of `batch_size`, which is what is lost with an actor, and what is remembered as written.
    Results come in any order.

    Args:
        dataset: rows with a "prompt", a text, or "messages", a list of them; columns with names of
            `GenerationSettings` (but `n` and `logprobs`) set what isn't null; any others are passed on.
        model: as for `kivi_jax.load`; a folder has to be there on every host.
        settings: for rows without their own; None for the defaults.
        kv: storage of the KV state, as for `kivi_jax.generate`.
        tpus: TPU chips of an actor, best all that a host has.
        gpus: GPUs of an actor. Without this and `tpus`, it runs on the CPU that Ray gives it.
        mesh: "DATAxMODEL", how an actor's devices are laid out: "4x1" holds the whole model on each of four and splits
            batches, "1x4" splits the model. A TPU7x chip is two devices.
        concurrency: actors; or the fewest and the most.
        batch_size: rows of a batch.
        batches_in_flight: batches that an actor has at a time. Together they should be about twice its slots.
        dtype, revision, max_positions: as for `kivi_jax.load`.
        slots, capacity, window, prefill_tokens, chat_template: as for `kivi_jax.Engine`.
        **options: fields of `GenerationSettings`, which change those of `settings`.

    Returns:
        The dataset with the columns generated_text, finish_reason, prompt_tokens, completion_tokens and error
        (`rows.Result`). A row that can't be done has its error there, and hinders no other.

    Raises:
        TypeError: an option that there is not.
        ValueError: a value that is wrong whatever the cluster is like. What only an actor can find, it raises when the
            dataset is computed.
    """
    settings = make_settings(settings, None, **options)
    if settings.n is not None or settings.logprobs:
        raise ValueError(
            "a row gets one completion and no log-probabilities; leave out n and logprobs, "
            "and repeat rows with unlike seeds for several samples"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    find_kv(kv)
    batch_size = read_size("batch_size", batch_size)
    given = {
        "settings": settings,
        "kv": kv,
        "mesh": mesh,
        "dtype": dtype,
        "revision": revision,
        "max_positions": max_positions,
        "slots": slots,
        "capacity": capacity,
        "window": window,
        "prefill_tokens": prefill_tokens,
        "chat_template": chat_template,
    }
    return dataset.repartition(target_num_rows_per_block=batch_size).map_batches(
        KiviPredictor,
        batch_size=batch_size,
        batch_format="pyarrow",
        udf_modifying_row_count=False,
        fn_constructor_args=(model,),
        fn_constructor_kwargs=given,
        **_actors(concurrency, read_size("batches_in_flight", batches_in_flight)),
        **_devices(tpus, gpus, mesh),
    )


def _devices(tpus: int | None, gpus: int | None, mesh: str | None) -> dict[str, Any]:
    """Arguments of `map_batches` for an actor's devices."""
    if tpus is not None and gpus is not None:
        raise ValueError(f"an actor runs on TPUs or on GPUs, got tpus {tpus} and gpus {gpus}; leave out one")
    if mesh is not None:
        read_mesh_shape(mesh)
    name, count = ("gpus", gpus) if tpus is None else ("tpus", tpus)
    if count is None:
        return {}
    if read_size(name, count, ", or None for none") > 1 and mesh is None:
        raise ValueError(
            f"{name} {count} without a mesh would use one device only; pass mesh='{count}x1' to split batches, "
            f"or mesh='1x{count}' to split the model"
        )
    return {"num_gpus": count} if tpus is None else {"resources": {"TPU": count}}


def _actors(concurrency: int | tuple[int, int], batches: int) -> dict[str, Any]:
    """Arguments of `map_batches` for the pool. By default Ray restarts dead actors and repeats their batches."""
    fewest, most = concurrency if isinstance(concurrency, tuple) else (concurrency, concurrency)
    sizes: dict[str, Any] = {
        "min_size": read_size("concurrency", fewest),
        "max_size": read_size("concurrency", most),
    }
    if fewest > most:
        raise ValueError(
            f"concurrency must be a number of actors, or the fewest and the most, got {concurrency}"
        )
    # Named so from Ray 2.59 on; before, an option of the actor, which newer ones will refuse.
    name = "max_concurrent_calls_per_actor"
    if name in inspect.signature(ActorPoolStrategy).parameters:
        return {"compute": ActorPoolStrategy(**sizes | {name: batches})}
    return {"compute": ActorPoolStrategy(**sizes), "max_concurrency": batches}
