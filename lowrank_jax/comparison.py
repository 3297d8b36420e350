"""How far the outputs of one network are from those of another: of a batch on the devices, and of many in float64."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.text import align, html_table

Layers = Mapping[str, tuple[jax.Array, ...]]  # by a kernel's name what its layer returned, each `[..., batch or 1, elements]`


class Run(NamedTuple):
    """What a network gave for a batch.

    Attributes:
      outputs: floating-point arrays, `[batch, ...]`; of logits the only one, `[batch, ..., classes]`.
      predictions: logarithms of probabilities, of the shape of the logits; None where outputs are no logits.
      layers: the outputs of layers.
    """

    outputs: tuple[jax.Array, ...]
    predictions: jax.Array | None
    layers: Layers


class Lengths(NamedTuple):
    """Of the difference between two outputs, and of the first of them, over a whole batch; scalars."""

    difference: Any
    dense: Any


class Figures(NamedTuple):
    """The comparison of a batch.

    Attributes:
      agreements, divergences: of each example, `[batch]`; None where outputs are no logits.
      outputs: of the outputs.
      layers: of the layers, by the kernel's name.
    """

    agreements: Any
    divergences: Any
    outputs: Lengths
    layers: dict[str, Lengths]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Fidelity:
    """How faithful a network is to the one that it came from.

    Errors are relative ones of outputs as they are, |low - dense| / |dense| in the Frobenius norm over all examples: 0 where
    both are the same, infinite where the dense network's are zeros alone and the other's are not.  Outputs that are infinite
    in both networks alike, as the logits of a class that is masked, count nothing.

    Attributes:
      examples: how many were compared.
      agreement: the share of them for which both networks choose the same class; of equal logits the first is chosen.
      kl: the mean Kullback-Leibler divergence KL(dense || low) of the softmaxes, in nats.
      logits_error: of the logits.  They are not centred: a shift that all classes of an example share is an error here, though
        no softmax sees it.
      layers: by the kernel's name that of its layer's output in the running network, so that what the layers before it do
        wrong counts too: over all positions, all uses of a shared layer, and all layers of a stack.
      unseen: by the name of every other kernel that was asked for why there is none.
      agreements, divergences: those of each example, float64 `[examples]`: of a map of classes the share of its places and
        their mean, where an example is what the first axis of the logits counts.

    Where outputs are no logits, `agreement` and `kl` are NaN, `agreements` and `divergences` are empty, and `logits_error` is
    that of the outputs.
    """

    examples: int
    agreement: float
    kl: float
    logits_error: float
    layers: dict[str, float]
    unseen: dict[str, str]
    agreements: np.ndarray
    divergences: np.ndarray

    @property
    def has_classes(self) -> bool:
        """Whether outputs are logits."""
        return len(self.agreements) > 0

    def figures(self) -> dict[str, str]:
        """The totals as text, by what a table calls them."""
        if not self.has_classes:
            return {"outputs error": _text(self.logits_error)}
        return {"agreement": f"{self.agreement:.4f}", "KL": _text(self.kl), "logits error": _text(self.logits_error)}

    def worst(self, most: int | None = None) -> dict[str, float]:
        """The errors of layers, the largest first; by default all."""
        ranked = sorted(self.layers.items(), key=lambda item: -item[1])
        return dict(ranked[:most])

    def rows_of_layers(self, most: int | None = None) -> list[list[str]]:
        """A header, and a row for each of the worst layers; nothing if none was compared."""
        rows = [[name, _text(error)] for name, error in self.worst(most).items()]
        return [["layer of", "error"], *rows] if rows else []

    def record(self) -> dict[str, Any]:
        """The figures of the whole and of layers, for JSON; None is what is no finite number."""
        totals = {name: getattr(self, name) for name in ("agreement", "kl", "logits_error")}
        layers = {name: _finite(error) for name, error in self.layers.items()}
        figures = {name: _finite(value) for name, value in totals.items()}
        return {"examples": self.examples, **figures, "layers": layers, "unseen": dict(self.unseen)}

    def __str__(self) -> str:
        tables = [self._totals(), self.rows_of_layers(), self._left_out()]
        return "\n\n".join(align(table) for table in tables if table)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "\n".join(html_table(table) for table in (self._totals(), self.rows_of_layers(), self._left_out()) if table)

    def _totals(self) -> list[list[str]]:
        figures = self.figures()
        return [["examples", *figures], [f"{self.examples:,}", *figures.values()]]

    def _left_out(self) -> list[list[str]]:
        return [["not compared", "why"], *map(list, self.unseen.items())] if self.unseen else []


def divergences(one: jax.Array, other: jax.Array) -> jax.Array:
    """The Kullback-Leibler divergence of the second from the first, `[..., classes] -> [...]`, of logarithms of probabilities.

    As a sum without cancellation: 0 where both are the same.
    """
    p, change = jnp.exp(one), jnp.where(jnp.isneginf(one), 0, other - one)
    small = change < 1
    near = p * (jnp.expm1(jnp.where(small, change, 0)) - change)
    return jnp.sum(jnp.where(small & (p > 0), near, jnp.exp(other) - p - p * change), axis=-1)


@jax.jit
def compare(dense: Run, low: Run, mask: jax.Array | None = None) -> Figures:
    """Compares what two networks gave for a batch.

    Args:
      dense, low: with outputs of the same shapes, and the same layers.
      mask: which examples count, those where it is not 0, `[batch]`; None if all do.  Then the outputs of layers need an axis
        of examples.
    """
    agreements = divergent = None
    if dense.predictions is not None and low.predictions is not None:
        (one,), (other,) = dense.outputs, low.outputs
        agreements = _per_example(one.argmax(-1) == other.argmax(-1))
        divergent = _per_example(divergences(dense.predictions, low.predictions))
    layers = {name: _lengths(dense.layers[name], low.layers[name], mask, axis=-2) for name in dense.layers}
    return Figures(agreements, divergent, _lengths(dense.outputs, low.outputs, mask, axis=0), layers)


def _per_example(values: jax.Array) -> jax.Array:
    """The mean over all axes but the first."""
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    return values.reshape(1) if not values.ndim else values.mean(range(1, values.ndim))


def _lengths(dense: Iterable[jax.Array], low: Iterable[jax.Array], mask: jax.Array | None, axis: int) -> Lengths:
    differences, sizes = [], []
    for one, other in zip(dense, low, strict=True):
        wide = jnp.promote_types(jnp.promote_types(one.dtype, other.dtype), jnp.float32)
        one, other = one.astype(wide), other.astype(wide)
        counts = jnp.ones((), bool) if mask is None else _along(mask > 0, axis, one.ndim)
        same = one == other  # infinite ones too
        differences.append(_length(jnp.where(counts & ~same, other - one, 0)))
        sizes.append(_length(jnp.where(counts & ~(same & jnp.isinf(one)), one, 0)))
    return Lengths(_length(jnp.stack(differences)), _length(jnp.stack(sizes)))


def _along(mask: jax.Array, axis: int, ndim: int) -> jax.Array:
    """A vector along one axis of an array of so many."""
    shape = [1] * ndim
    shape[axis] = len(mask)
    return mask.reshape(shape)


def _length(x: jax.Array) -> jax.Array:
    """The Euclidean norm of all elements; squares of large or small ones do not leave the range of floats."""
    largest = jnp.max(jnp.abs(x), initial=0)
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return unit * jnp.sqrt(jnp.sum((x / unit) ** 2))


def misfits(dense: Run, low: Run) -> dict[str, str]:
    """By the kernel's name why the outputs of its layers cannot be compared; arrays or their shapes."""
    found = {}
    for name in dense.layers.keys() & low.layers.keys():
        one, other = ([tuple(array.shape) for array in run.layers[name]] for run in (dense, low))
        if len(one) != len(other):
            found[name] = f"its layer returns {len(one)} arrays in one network and {len(other)} in the other"
        elif one != other:
            found[name] = "its layer's outputs have other shapes in the other network"
    return found


def common(dense: Run, low: Run) -> tuple[Run, Run]:
    """The same runs with those layers alone that can be compared."""
    names = [name for name in dense.layers if name in low.layers and name not in misfits(dense, low)]
    one, other = (run._replace(layers={name: run.layers[name] for name in names}) for run in (dense, low))
    return one, other


class Totals:
    """Sums over batches in float64, on the host."""

    def __init__(self) -> None:
        self._examples = 0
        self._agreements: list[np.ndarray] = []
        self._divergences: list[np.ndarray] = []
        self._outputs = np.zeros(2)
        self._layers: dict[str, np.ndarray] = {}

    def add(self, figures: Figures, seen: np.ndarray) -> None:
        """Adds what `compare` found, as arrays or NumPy's; `seen` says which examples count, bool `[batch]`."""
        self._examples += int(seen.sum())
        if figures.agreements is not None:
            self._agreements.append(np.asarray(figures.agreements, np.float64)[seen])
            self._divergences.append(np.asarray(figures.divergences, np.float64)[seen])
        self._outputs = self._outputs + _squares(figures.outputs)
        for name, lengths in figures.layers.items():
            self._layers[name] = self._layers.get(name, 0) + _squares(lengths)

    def fidelity(self, kernels: Iterable[str], unseen: Mapping[str, str]) -> Fidelity:
        """The fidelity over all batches.

        Args:
          kernels: which were asked for, in order.
          unseen: why some of them were not seen.
        """
        errors = {name: _error(squares) for name, squares in self._layers.items() if name not in unseen}
        reasons = {**{name: "its layer's outputs are not numbers" for name in errors if math.isnan(errors[name])}, **unseen}
        agreements, divergent = (_joined(parts) for parts in (self._agreements, self._divergences))
        return Fidelity(
            self._examples,
            float(agreements.mean()) if len(agreements) else math.nan,
            float(divergent.mean()) if len(divergent) else math.nan,
            _error(self._outputs),
            {name: errors[name] for name in kernels if name in errors and name not in reasons},
            {name: reasons[name] for name in kernels if name in reasons},
            agreements,
            divergent,
        )


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *parts])


def _squares(lengths: Lengths) -> np.ndarray:
    return np.asarray([float(length) for length in lengths]) ** 2


def _error(squares: np.ndarray) -> float:
    difference, dense = map(float, np.sqrt(squares))
    if not dense and not math.isnan(difference):
        return math.inf if difference else 0.0
    return difference if not math.isfinite(difference) else difference / dense


def _text(value: float) -> str:
    return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.4f}"  # 0.0000 is 0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
