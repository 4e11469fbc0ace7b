"""What the tests of every kernel have in common where few tokens matter.

Of random queries, which attend all tokens about alike, scales of scores may be off by several percent unnoticed.
"""

import pytest

from kivi_jax.kv import KVConfig
from kivi_jax.kv.config import PRESETS

SHARPNESS = 4

few_tokens = pytest.mark.parametrize(
    ("config", "head_dim"),
    [
        (PRESETS["kivi2"], 128),
        (PRESETS["kivi-k4v2"], 64),
        (KVConfig(2, 2, 64, 128, boosted_channels=0.25), 128),
    ],
    ids=str,
)
