"""Parameters of exhaustive tests."""

from typing import Any

import pytest


def further(*values: Any) -> Any:
    """Parameters that only `make test-long` runs."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)
