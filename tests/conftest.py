"""Eight CPU devices, a compilation cache that all workers share and a data folder for each; set before jax is imported."""

import gc
import os
import pathlib
import shutil
import signal
import tempfile
import threading

_SCRATCH = pathlib.Path(tempfile.gettempdir()) / f"lowrank_jax_tests_{os.getuid()}"

os.environ["JAX_PLATFORMS"] = "cpu"
# Compilation takes most of the tests' time: at the lowest effort, and without the newer emitter of fusions, a fifth of it.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)
os.environ["TFDS_DATA_DIR"] = str(_SCRATCH / os.environ.get("PYTEST_XDIST_WORKER", "") / "data")
# By default jax keeps what took over a second to compile; nearly all programs of tests are smaller.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_SCRATCH / "xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
# Its threads wait for each other by spinning: on a busy machine hundreds of small decompositions took a minute, not a second.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from absl import logging  # noqa: E402

from lowrank_jax.experiment.training.stop import StopSignal  # noqa: E402

logging.set_verbosity(logging.ERROR)
# Compilation makes the first example of a property slow: a deadline would only measure that.
hypothesis.settings.register_profile("project", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("project")


_CACHE_BYTES = 2 * 2**30  # of compiled programs; beyond, they are those of many versions


def _end(number: int, frame: object) -> None:
    if os.getpid() != _MAIN:  # a child that was forked
        os._exit(128 + number)
    pytest.exit(f"ended by {signal.Signals(number).name}", returncode=128 + number)


_MAIN = os.getpid()

gc.set_threshold(50_000, 20, 20)  # tracing makes many objects; at Python's own threshold collecting takes a seventh of the time


@pytest.fixture
def unhandled_sigterm(monkeypatch):
    """For a test that sends SIGTERM to this process: the tests' own handler, which would end them, is away."""
    monkeypatch.setattr(StopSignal, "chained", False)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def pytest_configure(config: pytest.Config) -> None:
    # `train` in this process turns SIGTERM into a request to stop; here it hands it on, so that the tests end.
    StopSignal.chained = True
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)
    cache = _SCRATCH / "xla"
    if hasattr(config, "workerinput") or not cache.is_dir():
        return
    if sum(file.stat().st_size for file in os.scandir(cache)) > _CACHE_BYTES:
        shutil.rmtree(cache)


@pytest.fixture(scope="module", autouse=True)
def programs():
    """A compiled program takes three memory mappings, of which Linux gives a process 65,530: with all of them it crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    return pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="session")
def small_imagenet(tmp_path_factory):
    from tests.imagenet_files import write_small

    return write_small(tmp_path_factory.mktemp("imagenet"))
