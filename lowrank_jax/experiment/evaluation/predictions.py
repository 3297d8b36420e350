"""The likeliest classes of image files."""

import concurrent.futures
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import special

from lowrank_jax.experiment.data import image_files
from lowrank_jax.experiment.data.decode import Undecodable, pool
from lowrank_jax.experiment.errors import UserError
from lowrank_jax.experiment.evaluation import classes
from lowrank_jax.experiment.report.rendering import as_csv
from lowrank_jax.experiment.workdir import files
from lowrank_jax.text import one_line, shown

if TYPE_CHECKING:
    from lowrank_jax.experiment.evaluation.trained import TrainedNetwork

_LARGEST = 2**28  # bytes of an image file


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a network takes an image file for.

    Attributes:
      file: its path.
      labels, names, probabilities: of the likeliest classes, the likeliest first; empty if there is an error.
      changed: what was done to the image that evaluation does not do, such as resizing; "" for nothing.
      error: why there is no prediction; "" if there is one.
    """

    file: str
    labels: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    changed: str = ""
    error: str = ""

    def line(self, width: int = 0) -> str:
        """The file, and its classes with their probabilities."""
        shares = [f"{one_line(name)} {share:.4f}" for name, share in zip(self.names, self.probabilities, strict=True)]
        return "  ".join([one_line(self.file).ljust(width), *(shares or [self.error])])

    def record(self) -> dict[str, Any]:
        """For JSON."""
        ranked = zip(self.labels, self.names, self.probabilities, strict=True)
        found = [{"label": label, "class": name, "probability": share} for label, name, share in ranked]
        return {"file": self.file, "classes": found, "changed": self.changed, "error": self.error}


def table(done: Sequence[Prediction], top: int) -> str:
    """As CSV, with two columns for each of the likeliest classes."""
    header = ["file", *(f"{name}{rank}" for rank in range(1, top + 1) for name in ("class", "probability")), "error"]
    return as_csv([header, *(_row(prediction, top) for prediction in done)])


def _row(prediction: Prediction, top: int) -> list[Any]:
    pairs = [cell for pair in zip(prediction.names, prediction.probabilities, strict=True) for cell in pair]
    return [prediction.file, *pairs, *[None] * (2 * top - len(pairs)), prediction.error]


def check(network: "TrainedNetwork") -> None:
    """Raises UserError if the network does not choose one class, or takes no images from files."""
    dataset = network.dataset
    if reason := classes.chooses_none(network.config, dataset) or image_files.why_not(dataset):
        raise UserError(f"{dataset.name}: {reason}; restore(...)(inputs) in Python gives the network's outputs")


def predictions(network: "TrainedNetwork", paths: Iterable[str | os.PathLike[str]], top: int = 5) -> Iterator[Prediction]:
    """See `TrainedNetwork.predict`; one after the other, as they are known."""
    found, _ = image_files.find(paths)
    return of_files(network, found, top)


def of_files(network: "TrainedNetwork", found: Sequence[str], top: int) -> Iterator[Prediction]:
    """The same of files alone, which need not be looked for."""
    check(network)
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise UserError(f"top={shown(top)}; give a whole number of at least 1")
    if not found:
        raise UserError(f"there are no image files ({', '.join(image_files.SUFFIXES)})")
    return _predicted(network, found, min(top, network.dataset.num_classes or top))


def _predicted(network: "TrainedNetwork", found: Sequence[str], top: int) -> Iterator[Prediction]:
    names = classes.names_of(network.dataset)
    shares_of = special.expit if network.config.objective.name == "sigmoid" else special.softmax
    size = network.batch_size

    def start(place: int) -> list[concurrent.futures.Future[tuple[np.ndarray | None, Prediction]]]:
        return [pool().submit(_read, network, file) for file in found[place : place + size]]

    waiting = start(0)
    for place in range(0, len(found), size):
        read, waiting = [future.result() for future in waiting], start(place + size)
        images = [image for image, _ in read if image is not None]
        rows = iter(network(np.stack(images)) if images else ())
        for image, prediction in read:
            yield prediction if image is None else _ranked(prediction, next(rows), shares_of, names, top)


def _read(network: "TrainedNetwork", file: str) -> tuple[np.ndarray | None, Prediction]:
    """The image, or None and why there is none."""
    try:
        image, changed = image_files.read(network.dataset, files.read_bytes(pathlib.Path(file), _LARGEST))
        return image, Prediction(file, changed=changed)
    except OSError as error:
        return None, Prediction(file, error=str(error.strerror or error))
    except (ValueError, Undecodable) as error:
        return None, Prediction(file, error=str(error))


def _ranked(
    prediction: Prediction, logits: np.ndarray, shares_of: Callable[[np.ndarray], np.ndarray], names: Sequence[str], top: int
) -> Prediction:
    if not np.isfinite(logits).all():
        return dataclasses.replace(prediction, error="the network's outputs for it are not finite")
    shares = shares_of(logits.astype(np.float64))
    order = np.argsort(-shares, kind="stable")[:top]
    return dataclasses.replace(
        prediction,
        labels=tuple(map(int, order)),
        names=tuple(names[label] for label in order),
        probabilities=tuple(float(shares[label]) for label in order),
    )
