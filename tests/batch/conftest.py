"""A bucket for tests that write to one."""

import pytest
from etils.epath import backend

from tests.batch.bucket import Bucket


@pytest.fixture
def bucket(monkeypatch):
    """What is in it: paths, and in-memory files."""
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(type(backend.fsspec_backend), "fs", lambda *_: Bucket())
    return Bucket.store
