"""Predictors that tell what happens in an actor, or make it happen. Ray's workers import them from here.

Each keeps notes in a folder that is named as its class, since nothing else of a killed actor is left.
"""

import asyncio
import json
import os
import signal
from pathlib import Path

import pyarrow as pa

from kivi_jax.engine import Engine
from kivi_jax.ray_data import KiviPredictor

FOLDER = "KIVI_JAX_TEST_FOLDER"  # the environment variable with the place for notes
CHECKPOINT = "checkpoint"  # folder of checkpoints there


def committed() -> list[Path]:
    """Checkpoints of rows that are written for good."""
    return [
        file
        for file in Path(os.environ[FOLDER], CHECKPOINT).glob("*.parquet")
        if not file.name.endswith(".pending.parquet")
    ]


class Probe(KiviPredictor):
    """Notes every batch that is finished, and adds columns of who did it, and of most slots in use so far."""

    @classmethod
    def folder(cls) -> Path:
        folder = Path(os.environ[FOLDER], cls.__name__)
        folder.mkdir(exist_ok=True)
        return folder

    @classmethod
    def once(cls) -> bool:
        """Whether nobody asked before."""
        try:
            (cls.folder() / "once").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    @classmethod
    def finished(cls) -> list[list[int]]:
        """The ids of each finished batch."""
        return [json.loads(file.read_text()) for file in cls.folder().glob("*.json")]

    def __init__(self, *arguments, **options):
        self.most = self.batches = 0
        step = Engine.step

        def watched(engine):
            self.before_step()
            outputs = step(engine)
            self.most = max(self.most, engine.running)
            return outputs

        Engine.step = watched  # the only engine of this process
        super().__init__(*arguments, **options)

    def before_step(self) -> None:
        pass

    async def before_batch(self) -> None:
        pass

    async def __call__(self, batch: pa.Table) -> pa.Table:
        await self.before_batch()
        table = await super().__call__(batch)
        ids = batch.column("id").to_pylist()
        self.batches += 1
        (self.folder() / f"{os.getpid()}-{ids[0]}.json").write_text(json.dumps(ids))
        table = table.append_column("pid", pa.array([os.getpid()] * len(ids)))
        return table.append_column("most", pa.array([self.most] * len(ids)))


class KilledOnce(Probe):
    def before_step(self) -> None:
        if self.batches >= 2 and self.once():
            os.kill(os.getpid(), signal.SIGKILL)


class DiesOnce(Probe):
    def before_step(self) -> None:
        if self.batches >= 2 and self.once():
            raise RuntimeError("a chip was lost\nand pages of what else XLA says")


class DiesAtOnce(Probe):
    def before_step(self) -> None:
        raise RuntimeError("a chip was lost\nand pages of what else XLA says")


class Stopped(Probe):
    """Ends the job once some of its rows are written, and others are not."""

    async def before_batch(self) -> None:
        if self.batches >= 3:
            while not committed():
                await asyncio.sleep(0.05)
            raise RuntimeError("this job is to be resumed")


class Resumed(Probe):
    pass
