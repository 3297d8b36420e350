"""The theory is tested in float64: other tests stay in float32."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield
