"""The network that a run is compared with, beside its evaluation."""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lowrank_jax import comparison
from lowrank_jax.comparison import Fidelity, Run, Totals
from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.config.trust import Trust
from lowrank_jax.experiment.data.base import Dataset
from lowrank_jax.experiment.errors import UserError
from lowrank_jax.experiment.hosts.sharding import replicated
from lowrank_jax.experiment.objective import SOFTMAX
from lowrank_jax.experiment.training.build import Experiment
from lowrank_jax.experiment.training.stored import open_network
from lowrank_jax.experiment.workdir import files
from lowrank_jax.planning.plans import Plan
from lowrank_jax.text import did_you_mean, shown

EvalStep = Callable[..., dict[str, Any]]

_STEPS = ("latest", "best")
_LAG = 2  # batches that are compared on the devices before the first of them is read
NO_CLASSES = "agreement and KL have no meaning"
_NOTHING = "no floating-point outputs"
_ABSENT = "only one of the networks has a kernel of this name"


def split_place(place: str) -> tuple[str, str]:
    """The work directory and the step of "runs/dense", "runs/dense@best" or "runs/dense@400".

    Raises:
      ConfigError: there is a work directory before the @, and no step behind it.
    """
    folder, at, step = place.rpartition("@")
    if not at or "/" in step or _is_there(place):
        return place, "latest"
    if step in _STEPS or re.fullmatch(r"[0-9]+", step):
        if not folder:
            raise ConfigError("--against", [f"{place} names no work directory: DIR@{step}"])
        return folder, step
    if _is_there(folder):
        hint = did_you_mean(step, _STEPS)
        raise ConfigError("--against", [f"{place}: {shown(step)} is no step; it is latest, best or a number{hint}"])
    return place, "latest"


def _is_there(folder: str) -> bool:
    return bool(folder) and files.is_local(folder) and pathlib.Path(folder).exists()


@dataclasses.dataclass(frozen=True)
class Against:
    """What a network was compared with.

    Attributes:
      workdir, step: its run, and the checkpoint.
      left_out: why there is no agreement and no divergence; empty if there are.
      damaged: the reason by newer step that could not be used.
    """

    workdir: str
    step: int
    left_out: str = ""
    damaged: dict[int, str] = dataclasses.field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"against": self.workdir, "step": self.step, "left_out": self.left_out}


@dataclasses.dataclass(frozen=True)
class Watched:
    """A network whose layers' outputs are captured.

    Attributes:
      run: `(variables, images) -> Run`.
      unseen: by the kernel's name why its layer's outputs cannot be had; known once the network has run.
    """

    run: Callable[[Any, jax.Array], Run]
    unseen: dict[str, str]

    @classmethod
    def of(cls, experiment: Experiment, kernels: tuple[str, ...], *, logits: bool) -> "Watched":
        """The network of an experiment, with the layers of these kernels; whether its outputs are logits."""
        unseen: dict[str, str] = {}
        return cls(experiment.jit_watched_forward(kernels, logits=logits, unseen=unseen), unseen)


class Reference:
    """A network that others are compared with.

    Args:
      place: its work directory, and which step.
      trusted: what of the code that its config names may be imported.

    Raises:
      WorkdirError, ConfigError, CheckpointError: it cannot be read; the message says why.
      UntrustedCode: its config names code that is not trusted.
    """

    def __init__(self, place: str, trusted: Trust = False):
        self._opened = open_network(*split_place(place), trusted)
        self._variables = self._opened.variables()
        self._watched: dict[Hashable, Watched] = {}

    def comparison(self, workdir: str, experiment: Experiment, plan: Plan) -> "Comparison":
        """The comparison of a run's network with this one.

        Args:
          workdir: the run's, for messages.
          experiment: the run's.
          plan: of the network that is evaluated.

        Raises:
          ConfigError: the networks take other inputs, or give other outputs.
        """
        ours, restored = self._opened.experiment, self._opened.restored
        both = ((workdir, experiment), (self._opened.workdir, ours))
        left_out = _left_out(both)
        kernels, absent = _kernels(plan, ours.plan)
        low, dense = (self._watch(each, kernels, not left_out) for _, each in both)
        _check_fit(both)
        against = Against(self._opened.workdir, restored.step, left_out, restored.damaged)
        return Comparison(against, dense, self._variables, workdir, low, (*kernels, *absent), absent, experiment.mesh)

    def _watch(self, experiment: Experiment, kernels: tuple[str, ...], logits: bool) -> Watched:
        """One for all networks that compute the same: a run that is compared with itself runs the very same program."""
        config, dataset = experiment.config, experiment.dataset
        sizes = dataset.image_shape, config.num_outputs, dataset.mean, dataset.std
        key = (config.model, config.code_dir, sizes, kernels, logits)
        if key not in self._watched:
            self._watched[key] = Watched.of(experiment, kernels, logits=logits)
        return self._watched[key]


class Comparison:
    """Compares two networks on every batch of an evaluation.

    Args:
      against: what is compared with.
      dense, variables: its network.
      workdir, low: the run that is compared, for messages, and its network.
      kernels: those to compare the layers of, in order, and those of `absent`.
      absent: by the name of a kernel why it is not compared.
      mesh: the devices.
    """

    def __init__(
        self,
        against: Against,
        dense: Watched,
        variables: Any,
        workdir: str,
        low: Watched,
        kernels: tuple[str, ...],
        absent: Mapping[str, str],
        mesh: Mesh,
    ):
        self.against = against
        self._dense, self._variables, self._workdir, self._low = dense, variables, workdir, low
        self._kernels, self._unseen = kernels, dict(absent)
        self._totals = Totals()
        self._waiting: collections.deque[Any] = collections.deque()
        self._compare = jax.jit(_compared, out_shardings=replicated(mesh))

    def beside(self, eval_step: EvalStep, variables: Any) -> EvalStep:
        """The evaluation step, which from now on compares a network with these variables on its batches, too."""

        def step(part: Any, batch: dict[str, jax.Array]) -> dict[str, Any]:
            if part is variables:
                self._add(variables, batch)
            return eval_step(part, batch)

        return step

    def fidelity(self) -> Fidelity:
        """What was found on the batches so far.

        Raises:
          UserError: a network's outputs are not numbers.
        """
        while self._waiting:
            self._read()
        return self._totals.fidelity(self._kernels, {**self._low.unseen, **self._dense.unseen, **self._unseen})

    def _add(self, variables: Any, batch: dict[str, jax.Array]) -> None:
        images, mask = batch["image"], batch["mask"]
        both = self._dense.run(self._variables, images), self._low.run(variables, images)
        self._unseen |= comparison.misfits(*both)
        self._waiting.append(self._compare(*comparison.common(*both), mask))
        if len(self._waiting) > _LAG:
            self._read()

    def _read(self) -> None:
        figures, mask, broken = jax.device_get(self._waiting.popleft())
        for name, is_broken in zip((f"{self.against.workdir}, step {self.against.step}", self._workdir), broken, strict=True):
            if is_broken:
                raise UserError(f"{name}: its outputs for some examples are not numbers, so networks cannot be compared")
        self._totals.add(figures, mask > 0)


def _compared(dense: Run, low: Run, mask: jax.Array) -> tuple[Any, jax.Array, list[jax.Array]]:
    """The figures of a batch, which of its examples count, and whether the outputs of either network are no numbers."""
    return comparison.compare(dense, low, mask), mask, [_is_broken(run, mask) for run in (dense, low)]


def _is_broken(run: Run, mask: jax.Array) -> jax.Array:
    arrays = run.outputs if run.predictions is None else (run.predictions,)
    rows = [jnp.isnan(array.reshape(len(mask), array.size // len(mask))).any(-1) for array in arrays]
    return jnp.stack([(row & (mask > 0)).any() for row in rows]).any()


def _left_out(networks: Sequence[tuple[str, Experiment]]) -> str:
    """Why classes cannot be compared; empty if they can."""
    others = [f"{name} has objective.name={each.config.objective.name}" for name, each in networks if not _is_softmax(each)]
    return f"{' and '.join(dict.fromkeys(others))}, so {NO_CLASSES}" if others else ""


def _is_softmax(experiment: Experiment) -> bool:
    return experiment.config.objective.name == SOFTMAX


def _kernels(plan: Plan, other: Plan) -> tuple[tuple[str, ...], dict[str, str]]:
    """The kernels that either network factors and both have, and by the name of every other one that it is only in one."""
    factored = dict.fromkeys(kernel.name for each in (plan, other) for kernel in each.factored)
    shared = {kernel.name for kernel in plan.kernels} & {kernel.name for kernel in other.kernels}
    return tuple(name for name in factored if name in shared), {name: _ABSENT for name in factored if name not in shared}


def _check_fit(networks: Sequence[tuple[str, Experiment]]) -> None:
    """Raises ConfigError unless two networks take the same inputs, and give outputs of the same shapes."""
    (one, ours), (other, theirs) = ((name, (_inputs(each.dataset), _outputs(each))) for name, each in networks)
    problems = [
        f"{one} {verb} {mine}; {other} {verb} {yours}"
        for verb, mine, yours in zip(("takes", "gives"), ours, theirs, strict=True)
        if mine != yours
    ]
    if not problems and ours[1] == _NOTHING:
        problems = [f"{one} and {other} give {_NOTHING}"]
    if problems:
        raise ConfigError("--against", problems)


def _inputs(dataset: Dataset) -> str:
    return f"{'x'.join(map(str, dataset.image_shape))} {dataset.image_dtype} inputs"


def _outputs(experiment: Experiment) -> str:
    """What a network gives for an example."""
    dataset = experiment.dataset
    images = jax.ShapeDtypeStruct((experiment.mesh.size, *dataset.image_shape), dataset.image_dtype)
    returned = jax.eval_shape(experiment.jit_forward(), experiment.shapes.variables()[""], images)
    shapes = [list(leaf.shape[1:]) for leaf in jax.tree.leaves(returned) if np.issubdtype(leaf.dtype, np.floating)]
    return f"outputs of shape {', '.join(map(str, shapes))}" if shapes else _NOTHING
