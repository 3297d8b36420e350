"""The table of exit statuses, and whoever restarts by it."""

import pytest

from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.data.base import DataError
from lowrank_jax.experiment.errors import DONE, HOPELESS, INTERRUPTED, MEANINGS, UserError
from lowrank_jax.experiment.hosts.processes import ClusterError
from lowrank_jax.experiment.preflight.compiler import PreflightError
from lowrank_jax.experiment.workdir.checkpoint import CheckpointError
from lowrank_jax.experiment.workdir.workdir import WorkdirError


@pytest.mark.parametrize("error", [ConfigError, WorkdirError, DataError, CheckpointError, ClusterError, PreflightError])
def test_what_the_user_can_mend_has_one_base(error):
    assert issubclass(error, UserError)


def test_the_scripts_restart_by_the_table(repository):
    final = sorted({DONE, *HOPELESS})
    assert final == [0, 2, 4] and set(final) < set(MEANINGS)
    supervise = (repository / "scripts" / "supervise.sh").read_text()
    assert f"[[ $status =~ ^({'|'.join(map(str, final))}|126|127)$ ]]; then exit" in supervise  # and what cannot be run
    assert f"{' | '.join(map(str, HOPELESS))})" in supervise
    assert f"    {INTERRUPTED}) " in supervise
    tpu_vm = (repository / "scripts" / "tpu_vm.sh").read_text()
    assert f"case $status in {' | '.join(map(str, [*final, INTERRUPTED]))}) exit" in tpu_vm  # stopped on purpose
