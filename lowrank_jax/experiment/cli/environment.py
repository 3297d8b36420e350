"""Before a command runs: quiet libraries, and the folder of the compilation cache."""

import os
import pathlib
import sys
import tempfile


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


def _can_write(folder: pathlib.Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
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
