"""Where the first weights come from: the model's own initialiser draws them, and the plan's methods factor them.

`Start.state` is the one way to the state before the first step.  In the place of drawn weights it takes trained ones, which
`weights` reads.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lowrank_jax import inputs
from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.data.base import Dataset
from lowrank_jax.experiment.guided import with_guides, without_guides
from lowrank_jax.experiment.hosts.sharding import replicated
from lowrank_jax.experiment.network import Network
from lowrank_jax.experiment.training.mixing import Normalize
from lowrank_jax.experiment.training.state import TrainState, key
from lowrank_jax.linen.factorize import factorize
from lowrank_jax.paths import named_leaves
from lowrank_jax.planning.plans import Plan
from lowrank_jax.projection.two_sided import GradientMoments
from lowrank_jax.text import first_line

Batches = Callable[[], Iterable[dict[str, jax.Array]]]
"""The batches that layers are measured on, from the first one."""


class Calibration(NamedTuple):
    """What is known of the layers, by their kernels' names: see `inputs.second_moments` and `inputs.gradient_moments`."""

    moments: Mapping[str, Any] | None = None
    gradients: Mapping[str, GradientMoments] | None = None


UNKNOWN = Calibration()


def calibration_shapes(plan: Plan, *, data_aware: bool, loss: str | None) -> Calibration:
    """What `Start.calibration` returns, as shapes; `UNKNOWN` where nothing is measured."""
    if not data_aware:
        return UNKNOWN
    return Calibration(inputs.moment_shapes(plan)) if loss is None else Calibration(None, inputs.gradient_shapes(plan))


class Weights(NamedTuple):
    """What a network starts from, by the names that `TrainState` has for it."""

    params: Any
    batch_stats: Any
    collections: Any


def blank_images(dataset: Dataset) -> jax.Array:
    """One input of zeros, `[1, height, width, channels]` or `[1, features]`, for a model to initialise on."""
    return jnp.zeros((1, *dataset.image_shape), jnp.float32)


def init_dense(network: Network, images: jax.Array, seed: Any) -> Any:
    """The dense model's variables, drawn by its own initialiser; parameters without boxes, as the config's rules shard them."""
    variables = network.init(key(seed, "init"), images)
    return {**variables, "params": nn.meta.unbox(variables["params"])}


def init_weights(network: Network, plan: Plan, images: jax.Array, seed: Any, known: Calibration = UNKNOWN) -> Weights:
    """Draws the dense model and factors it.  Made to run under `jit`.

    Args:
      network, plan: the network, and which of its kernels are factored.
      images: of the shape that the model takes; their values do not matter.
      seed: of the run, a whole number or a uint32 scalar.
      known: for a data-aware factorisation.
    """
    # Drawn once, rather than anew in every operation that reads a kernel, which a TPU's compiler would take minutes for.
    variables = jax.lax.optimization_barrier(init_dense(network, images, seed))
    return factored(network, variables, plan, images, seed, known)


def factored(
    network: Network, variables: Any, plan: Plan, images: jax.Array, seed: Any, known: Calibration = UNKNOWN
) -> Weights:
    """`init_weights` from variables that are there already."""
    params = factorize(variables["params"], plan, key=key(seed, "factorize"), **known._asdict())
    return Weights(params, variables.get("batch_stats", {}), state_collections(network, variables, images))


def guided(weights: Weights) -> Weights:
    """The same with a guide beside every factor pair."""
    return weights._replace(params=with_guides(weights.params))


def state_collections(network: Network, variables: Any, images: jax.Array) -> dict[str, Any]:
    """See `Network.state`.

    Raises:
      ConfigError: a collection holds what a checkpoint cannot, such as random keys.
    """
    state = network.state(variables, images)
    for name, leaf in named_leaves(state).items():
        if not (jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == jnp.bool_):
            raise ConfigError("config", [f"model: the collection {name!r} holds {leaf.dtype}, which a checkpoint cannot"])
    return state


def fresh_state(weights: Weights, optimizer: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """The state before the first step, from its weights."""
    params, batch_stats, collections = weights
    average = {"params": without_guides(params), "batch_stats": batch_stats} if ema else {}
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params), average, collections)


@dataclasses.dataclass(frozen=True)
class Start:
    """The start of a run.

    Attributes:
      network, plan: the network, and which of its kernels are factored.
      images: from `blank_images`.
      seed: of the run.
      optimizer: for its state.
      shapes: of the state, with shardings.
      mesh: the devices, which need not be there to `lower`.
      normalize: images of a batch to what the network takes.
      data_aware: kernels are factored for the inputs that a few batches give their layers.
      loss: by whose curvature they are factored too, as `inputs.gradient_moments` takes it; None for methods without.
      trained: the dense network is, so that its BatchNorms have statistics of their own.
      on_host: this machine's CPU decomposes the kernels rather than the devices.
      guided: factor pairs have guides beside them.
    """

    network: Network
    plan: Plan
    images: jax.Array
    seed: int
    optimizer: optax.GradientTransformation
    shapes: TrainState
    mesh: Mesh
    normalize: Normalize
    data_aware: bool
    on_host: bool
    guided: bool = False
    loss: str | None = None
    trained: bool = False

    def state(self, batches: Batches = tuple) -> TrainState:
        """The state before the first step, laid out over the devices.

        Args:
          batches: what the layers are measured on, if the start is data-aware.

        Raises:
          ConfigError: jax has no CPU device, and the host is to decompose.
        """
        known = self.calibration(self._jit_draw()(self._seed()), batches) if self.data_aware else UNKNOWN
        if self.on_host:
            return self.state_of(self._jit_draw()(self._seed()), known)
        return self._jit_state()(self._seed(), known)

    def state_of(self, variables: Any, known: Calibration) -> TrainState:
        """The same from the dense network's variables, whole on every device."""
        if self.on_host:
            return jax.jit(self._fresh, out_shardings=self._shardings())(self.factored_by_host(variables, known))

        def factored_state(variables: Any, seed: Any, known: Calibration) -> TrainState:
            return self._fresh(factored(self.network, variables, self.plan, self.images, seed, known))

        return jax.jit(factored_state, out_shardings=self._shardings())(variables, self._seed(), known)

    def lower(self) -> jax.stages.Lowered:
        """The program of `state` for the devices, before it is compiled; without what the host decomposes."""
        if self.on_host:
            return self._jit_draw().lower(self._seed())
        known = calibration_shapes(self.plan, data_aware=self.data_aware, loss=self.loss)
        return self._jit_state().lower(self._seed(), known)

    def _seed(self) -> np.uint32:
        return np.uint32(self.seed)

    def _jit_state(self) -> Any:
        def init_state(seed: Any, known: Calibration) -> TrainState:
            return self._fresh(init_weights(self.network, self.plan, self.images, seed, known))

        return jax.jit(init_state, out_shardings=self._shardings())

    def _jit_draw(self) -> Any:
        """Of the dense network, on every device."""
        draw = functools.partial(init_dense, self.network, self.images)
        return jax.jit(draw, out_shardings=replicated(self.mesh))

    def _fresh(self, weights: Weights) -> TrainState:
        weights = guided(weights) if self.guided else weights
        return fresh_state(weights, self.optimizer, ema=bool(self.shapes.ema))

    def _shardings(self) -> Any:
        return jax.tree.map(lambda leaf: leaf.sharding, self.shapes)

    def calibration(self, variables: Any, batches: Batches, plan: Plan | None = None) -> Calibration:
        """Of the layers in the dense network, as the methods need it.

        Where it is not trained, or has no gradients measured, every BatchNorm uses its batch's own statistics.

        Args:
          variables: the dense network's.
          batches: of the training data.
          plan: the kernels; None for those of the start.
        """
        normalize, plan = jax.jit(self.normalize), plan or self.plan
        if not plan.captured:
            return UNKNOWN
        images = lambda: (normalize(batch["image"]) for batch in batches())  # noqa: E731
        flags: dict[str, Any] = self.network.flags(train=not self.trained)
        network = self.network.module, variables
        dropout = {"dropout": key(self.seed, "dropout")}
        try:
            if self.loss is None:
                return Calibration(inputs.second_moments(*network, images(), plan, rngs=dropout, **flags))
            drawn = {"key": key(self.seed, "gradients"), "loss": self.loss}
            return Calibration(None, inputs.gradient_moments(*network, images(), plan, **drawn, rngs=dropout, **flags))
        except ValueError as error:
            raise ConfigError("config", [f"lowrank.moment_batches: {first_line(error)}"]) from error

    def factored_by_host(self, variables: Any, known: Calibration) -> Weights:
        """`factored`, decomposed by this machine's CPU; the same in all processes, on the host.

        Args:
          variables: the dense network's, whole on every device.
          known: of the layers, on the devices.
        """
        # What is known of a batch that several processes read is on the devices of all of them.
        known = on_host(jax.jit(lambda tree: tree, out_shardings=replicated(self.mesh))(known))
        with jax.default_device(_cpu()):
            weights = on_host(factored(self.network, on_host(variables), self.plan, self.images, self._seed(), known))
        if jax.process_count() > 1:  # hosts of two kinds may round differently, and every replica has to be the same
            weights = multihost_utils.broadcast_one_to_all(weights)
        return weights


def on_host(tree: Any) -> Any:
    """Arrays that are whole on every device, as NumPy's."""
    return jax.tree.map(np.asarray, tree)


def _cpu() -> Any:
    """This process's CPU as a device.

    Raises:
      ConfigError: jax was told to do without.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        hint = f'"host" needs jax\'s CPU device: unset JAX_PLATFORMS or add cpu to it ({first_line(error)})'
        raise ConfigError("config", [f"init.svd: {hint}"]) from error
