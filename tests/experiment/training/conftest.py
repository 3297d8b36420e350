"""What tests of whole runs share."""

import pytest

from tests import running


@pytest.fixture(scope="module")
def programs_are_shared():
    """Runs of a module compile each program once."""
    with running.shared_programs():
        yield
