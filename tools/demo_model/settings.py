"""What decides the demo model's training: its shape, stages, rates."""

import dataclasses

import optax
from jax import Array

from kivi_jax.models.llama import LlamaConfig

Params = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A number of steps at one row length."""

    length: int
    rows: int
    steps: int

    @classmethod
    def parse(cls, text: str) -> "Stage":
        return cls(*(int(part) for part in text.split(":")))


DEFAULT_STAGES = [
    Stage(256, 16, 400),
    Stage(512, 8, 1400),
    Stage(1024, 4, 200),
    Stage(2048, 2, 100),
    Stage(512, 8, 320),
    Stage(2048, 2, 80),
]


@dataclasses.dataclass(frozen=True)
class Training:
    """All that decides the result, written beside the checkpoints."""

    model: LlamaConfig
    stages: tuple[Stage, ...]
    seed: int
    muon_rate: float
    adam_rate: float
    warmup: int
    cooldown: int
    quantized_from: int

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> Stage:
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def optimizer(self) -> optax.GradientTransformation:
        """Muon (Jordan et al. 2024) for the linear layers, Adam for embedding and norms."""

        def schedule(rate: float) -> optax.Schedule:
            flat = self.steps - self.warmup - self.cooldown
            return optax.join_schedules(
                [
                    optax.linear_schedule(0.0, rate, self.warmup),
                    optax.constant_schedule(rate),
                    optax.linear_schedule(rate, 0.02 * rate, self.cooldown),
                ],
                [self.warmup, self.warmup + flat],
            )

        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.contrib.muon(
                schedule(self.muon_rate),
                adam_learning_rate=schedule(self.adam_rate),
                adam_b2=0.95,
                muon_weight_dimension_numbers=muon_dimensions,
            ),
        )


def muon_dimensions(params: Params) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
    dimensions = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)  # kernels are [out, in]
    return {name: dimensions if name.endswith("kernel") else None for name in params}
