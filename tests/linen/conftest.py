import pytest

import lowrank_jax as lr
from lowrank_jax.linen import known


@pytest.fixture
def register(monkeypatch):
    """Registers layers for one test."""
    monkeypatch.setattr(known, "_KNOWN", dict(known._KNOWN))
    return lr.register_layer
