"""Before a command runs: quiet libraries, and the folder of the compilation cache."""

import contextlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from lowrank_jax.experiment.errors import UserError
from lowrank_jax.experiment.workdir import files


def prepare() -> None:
    """Silences start-up messages of libraries, and turns on a compilation cache unless the user has chosen one."""
    try:
        pathlib.Path.home()
    except RuntimeError:  # as in a container that runs as somebody unknown
        os.environ["HOME"] = tempfile.gettempdir()
        print(f"lowrank: this user has no home folder; using {tempfile.gettempdir()} (set HOME)", file=sys.stderr)
    if not pathlib.Path(os.environ.get("XDG_CACHE_HOME", "")).is_absolute():
        os.environ.pop("XDG_CACHE_HOME", None)  # its specification has such a one ignored; libraries may not

    import jax
    from absl import logging

    check_modes()
    os.environ["MPLBACKEND"] = "agg"  # pictures become files
    logging.set_verbosity(logging.ERROR)
    quiet()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_home() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    folder = jax.config.values["jax_compilation_cache_dir"]
    if folder and "://" not in folder and not _can_write(pathlib.Path(folder)):
        jax.config.update("jax_compilation_cache_dir", None)
        print(f"lowrank: {folder} cannot be written, so compiled programs are not kept", file=sys.stderr)


_MODES: dict[str, tuple[Any, ...]] = {
    "jax_disable_jit": (False,),
    "jax_no_tracing": (False,),
    "jax_numpy_dtype_promotion": ("standard",),
    "jax_numpy_rank_promotion": ("allow", "warn"),
    "jax_transfer_guard": (None, "allow", "log", "log_explicit"),
    "jax_transfer_guard_host_to_device": (None, "allow", "log", "log_explicit"),
    "jax_transfer_guard_device_to_device": (None, "allow", "log", "log_explicit"),
    "jax_transfer_guard_device_to_host": (None, "allow", "log", "log_explicit"),
}
"""What these settings of jax may be: those of its debugging modes in which training cannot run are left out."""


@contextlib.contextmanager
def modes_kept() -> Iterator[None]:
    """Around what runs a config file, or code that it names, which may change jax's modes.  Raises UserError then."""
    try:
        yield
    finally:  # in place of an error that such a mode has caused
        check_modes()


def check_modes() -> None:
    """Raises UserError if jax is in a mode in which training cannot run, such as without compilation."""
    import jax

    for name, possible in _MODES.items():
        value = getattr(jax.config, name, possible[0])
        if value not in possible:
            reason = f"training is compiled, and relies on {name}={possible[0]}; unset {name.upper()}"
            raise UserError(f"lowrank: {name} is {value} in this environment; {reason}")


def _can_write(folder: pathlib.Path) -> bool:
    try:
        files.make_folder(folder)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def quiet() -> None:
    """Keeps libraries from announcing themselves; all that is changed of a program that uses the package."""
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    hush_tpu_compiler()


def hush_tpu_compiler() -> None:
    """Without a TPU, jax still loads the TPU's compiler where that is installed, which complains of what it cannot find out."""
    if not (list(pathlib.Path("/dev").glob("accel*")) or list(pathlib.Path("/dev/vfio").glob("[0-9]*"))):
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")


def cache_home() -> pathlib.Path:
    """The project's folder for what can be made again."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "lowrank_jax"
