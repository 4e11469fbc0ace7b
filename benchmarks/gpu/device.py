"""A device by itself: what it is, and how fast it copies its memory."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from benchmarks.gpu.timing import interleaved, timed
from benchmarks.gpu.worker import Record, serve


def measure(copy_bytes: int | None) -> Iterator[Record]:
    """What the device is; and unless None, the bandwidth of copying so many bytes."""
    (device, *_) = jax.devices()
    software = " ".join(device.client.platform_version.split())
    yield {"device": device.device_kind, "platform": device.platform, "backend": software}
    if copy_bytes is not None:
        yield measure_copy(copy_bytes)


def measure_copy(size: int) -> Record:
    """Bytes a second, read and written ones together, of passing over `size` bytes; the better of two programs."""
    x = copied = jnp.arange(size // 4, dtype=jnp.int32)
    new = jax.jit(jnp.copy)
    in_place = jax.jit(lambda x: x + 1, donate_argnums=0)

    def copy() -> None:
        nonlocal copied
        copied = new(x)

    def increment() -> None:
        nonlocal x
        x = in_place(x)

    runs = {
        "copy": timed(copy, lambda: copied.block_until_ready()),
        "increment": timed(increment, lambda: x.block_until_ready()),
    }
    for run in runs.values():
        run(2)
    medians = {name: timing.median for name, timing in interleaved(runs).items()}
    return {
        "part": "copy",
        "bytes": x.nbytes,
        "milliseconds": {name: 1e3 * seconds for name, seconds in medians.items()},
        "bytes_per_second": 2 * x.nbytes / min(medians.values()),
    }


if __name__ == "__main__":
    serve(measure)
