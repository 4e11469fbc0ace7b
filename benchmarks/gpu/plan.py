"""What is measured on a GPU, the most important first; and the same in tiny shapes, for a CPU."""

import dataclasses
from collections.abc import Mapping

from kivi_jax.kv.config import PRESETS, KVConfig

BF16 = "bf16"
KINDS = ("kivi2-plus", "kivi2", "kivi4")  # presets that attention is timed with

Shape = tuple[int, int, int]  # query heads, KV heads, head_dim
Sizes = tuple[
    tuple[int, int], ...
]  # rows and tokens of attention, or new tokens and stored ones, or tokens of prompts and new ones


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is measured before anything of the next stage.

    Attributes:
        grid: of correctness, one of `correctness.GRIDS`.
        attention: shapes, the most important first, and how many rows and tokens each is timed with.
        chunks: shapes, and how many new and stored tokens each is timed with.
        kvs: what is generated with, bf16 first.
        loads: tokens of prompts, and new ones.
    """

    grid: str
    attention: tuple[tuple[Shape, Sizes], ...]
    chunks: tuple[tuple[Shape, Sizes], ...]
    kvs: tuple[str, ...]
    loads: Sizes


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        prefix: of the files' names.
        kernel: the implementation of decode attention that is measured.
        stages: the most important first.
        small: whether the model is the small one.
        copy_bytes: of the copy.
        most_caches: that attention goes around; each is one more attention in a program.
        limit: bytes that generation may use, None for the device's.
        torch_device: where PyTorch computes.
        environment: of all workers.
        generation: of those that generate.
    """

    prefix: str
    kernel: str
    stages: tuple[Stage, ...]
    small: bool
    copy_bytes: int
    most_caches: int
    limit: int | None
    torch_device: str
    environment: Mapping[str, str]
    generation: Mapping[str, str]


# What is generated with: a preset, and R.
KVS: Mapping[str, KVConfig] = {
    BF16: PRESETS[BF16],
    **{
        f"{kind} R={residual}": dataclasses.replace(PRESETS[kind], residual_length=residual)
        for kind, residual in (
            ("kivi2", 32),
            ("kivi2-plus", 64),
            ("kivi4", 32),
            ("kivi2", 128),
            ("kivi2-plus", 128),
            ("kivi4", 128),
        )
    },
}
GROUPED, MULTI_HEAD, MULTI_QUERY = (32, 8, 128), (32, 32, 128), (71, 1, 64)
LONG: Sizes = ((16, 32768), (1, 32768), (64, 4096))
SHORT: Sizes = tuple((rows, tokens) for tokens in (4096, 2048, 1024, 512) for rows in (1, 16))
FULL = Plan(
    prefix="gpu",
    kernel="pallas_gpu",
    stages=(
        Stage(
            "first",
            ((GROUPED, LONG), (MULTI_HEAD, LONG[-1:]), (MULTI_QUERY, LONG[:1])),
            ((GROUPED, ((2048, 30720),)),),
            (BF16, "kivi2-plus R=64", "kivi2 R=32"),
            ((161, 338),),
        ),
        Stage(
            "whole",
            tuple((shape, (*SHORT, *LONG, (1, 131072))) for shape in (GROUPED, MULTI_HEAD, MULTI_QUERY)),
            tuple((shape, ((2048, 30720), (256, 4096))) for shape in (GROUPED, MULTI_HEAD, MULTI_QUERY)),
            tuple(KVS),
            ((161, 338), (4096, 256)),
        ),
    ),
    small=False,
    copy_bytes=2 * 2**30,
    most_caches=32,  # as many as a model has layers
    limit=None,
    torch_device="cuda",
    # So that workers' figures are what they use, and PyTorch has memory where JAX has had it.
    environment={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    # One piece has no gaps; the rest is for what is not in the allocator's hands.
    generation={"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93"},
)
SMOKE = Plan(
    prefix="smoke",
    kernel="xla",
    stages=(
        Stage(
            "small",
            (((4, 2, 64), ((1, 256),)),),
            (((4, 2, 64), ((40, 256),)),),
            (BF16, "kivi2-plus R=64"),
            ((40, 24),),
        ),
        Stage("small", (((4, 2, 64), ((2, 160),)),), (), (), ()),
    ),
    small=True,
    copy_bytes=2**20,
    most_caches=2,
    limit=40_000_000,
    torch_device="cpu",
    environment={"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"},
    generation={},
)
