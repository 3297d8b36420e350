"""Which extra of the package brings what cannot be imported."""

from lowrank_jax.text import first_line

EXTRAS = {
    "PIL": "train",
    "absl": "train",
    "array_record": "train",
    "clu": "train",
    "cv2": "train",
    "datasets": "hf",
    "etils": "train",
    "filelock": "train",
    "google.cloud": "gcs",
    "google.protobuf": "train",
    "grain": "train",
    "importlib_resources": "train",
    "jinja2": "train",
    "libtpu": "tpu-preflight",
    "matplotlib": "train",
    "ml_collections": "train",
    "orbax": "train",
    "ray": "train,ray",
    "rich": "train",
    "safetensors": "train",
    "scipy": "train",
    "simplejpeg": "train",
    "sklearn": "train",
    "tensorboard": "train",
    "tensorflow": "train",
    "tensorflow_datasets": "train",
    "upath": "train",
    "yaml": "train",
}
"""The extra that has a package, by the name that is imported."""


def missing(error: ImportError) -> str | None:
    """What to install, in one line; None if it is a module of ours that cannot be imported."""
    name = error.name or ""
    if name.split(".")[0] == "lowrank_jax":
        return None
    extra = next((extra for package, extra in EXTRAS.items() if f"{name}.".startswith(f"{package}.")), None)
    if extra is None:
        return f"{first_line(error)}; what lowrank itself imports comes with pip install 'lowrank_jax[train]'"
    why = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({first_line(error)})"
    return f"{name} {why}, which this command needs: pip install 'lowrank_jax[{extra}]'"
