"""An experiment, built from its config: model, plan, optimiser and mesh, and the jitted functions over them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from lowrank_jax.experiment import optim
from lowrank_jax.experiment.config.files import ConfigError
from lowrank_jax.experiment.config.plan import has_budget, make_plan, plan_by_rules
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.data.base import Dataset
from lowrank_jax.experiment.hosts import votes
from lowrank_jax.experiment.hosts.sharding import (
    absent_mesh,
    batch_sharding,
    batch_shards,
    gathered,
    make_mesh,
    replicated,
    state_shardings,
)
from lowrank_jax.experiment.network import Network
from lowrank_jax.experiment.objective import Objective
from lowrank_jax.experiment.training import mixing, state, step
from lowrank_jax.experiment.training.fits import check_program
from lowrank_jax.experiment.training.start import (
    Batches,
    Start,
    blank_images,
    calibration_shapes,
    fresh_state,
    guided,
    init_weights,
)
from lowrank_jax.planning import chips
from lowrank_jax.planning.execution import choose_execution
from lowrank_jax.planning.plans import Plan


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What `build` returns.

    Attributes:
      config: the config.
      dataset: the description of the data set, without examples.
      network, plan: the model as it is called, and which of its kernels are factored.
      make_optimizer: the schedule and the optimiser for a learning rate, which may be traced.
      mesh: the devices; abstract if they need not exist.
      shapes: a `TrainState` of `jax.ShapeDtypeStruct`s with shardings.
      class_weights: what the loss of each class counts, where that is found in the data; see `balanced`.
      guided_steps: how long guides fade beside its factor pairs; 0 without guides.
    """

    config: Config
    dataset: Dataset
    network: Network
    plan: Plan
    make_optimizer: Callable[[Any], tuple[optax.Schedule, optax.GradientTransformation]]
    mesh: Mesh
    shapes: state.TrainState
    class_weights: tuple[float, ...] = ()
    guided_steps: int = 0

    @property
    def model(self) -> nn.Module:
        """The Linen module."""
        return self.network.module

    def init(self, batches: Batches = tuple) -> state.TrainState:
        """The state before the first step, laid out over the devices; see `Start.state`."""
        return self.start().state(batches)

    def lower_init(self) -> jax.stages.Lowered:
        """The program of `init`, not compiled; the devices of the mesh need not exist."""
        return self.start().lower()

    def start(self) -> Start:
        """What makes the first state."""
        config = self.config
        return Start(
            self.network,
            self.plan,
            blank_images(self.dataset),
            config.seed,
            self.make_optimizer(config.peak_lr)[1],
            self.shapes,
            self.mesh,
            self._normalizer(),
            data_aware=config.lowrank.moment_batches > 0,
            loss=config.curvature,
            trained=config.curvature is not None or config.is_imported,
            on_host=config.init.svd == "host",
            guided=self.guided_steps > 0,
        )

    def shardings(self) -> Any:
        """A `TrainState` of them."""
        return _shardings(self.shapes)

    def compile_train_step(self) -> Callable[..., tuple[state.TrainState, step.Metrics]]:
        """The compiled training step `(state, batch) -> (state, metrics)`; it reuses the memory of the old state.

        Raises:
          TooLarge: it does not fit into memory.
          ConfigError: the inputs' mean and deviation are not known.
        """
        self._check_measured()
        compiled, settings = self.lower_train_step().compile(), self._settings()
        check_program(compiled, "a training step")
        return lambda state, batch: compiled(state, batch, *settings)

    def lower_train_step(self) -> jax.stages.Lowered:
        """The training step, not compiled; the devices of the mesh need not exist."""

        # The seed and the learning rate are arguments of the program, so that other values find it in the compilation cache.
        def train_step(state: state.TrainState, batch: dict[str, jax.Array], seed: Any, lr: Any):
            schedule, optimizer = self.make_optimizer(lr)
            settings = self.config.optim
            update = step.make_train_step(
                self.network,
                optimizer,
                schedule,
                self._mixing(),
                objective=self.objective,
                accumulate=settings.accumulate,
                ema_decay=settings.ema_decay,
                seed=seed,
                gather=self._gather(self.shapes.params),
                guided_steps=self.guided_steps,
            )
            batch, word = votes.split(batch)
            state, metrics = update(state, batch)
            return state, {**metrics, **word}

        jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(self.shardings(), replicated(self.mesh)))
        return jitted.lower(self.shapes, self._batch_shapes(self.config.batch_size), *self._settings())

    @property
    def objective(self) -> Objective:
        return self.config.build_objective(self.class_weights)

    def _settings(self) -> tuple[np.uint32, np.float32]:
        return self._seed(), np.float32(self.config.peak_lr)

    def _seed(self) -> np.uint32:
        return np.uint32(self.config.seed)

    def jit_eval_step(self, *, classes: int = 0) -> jax.stages.Wrapped:
        """The evaluation step `(variables, batch) -> sums`; it serves networks of other ranks too.

        Args:
          classes: how many classes to count the predictions of; see `step.tally`.

        Raises:
          ConfigError: the inputs' mean and deviation are not known.
        """
        self._check_measured()
        return self._jit_eval_step(classes)

    def jit_forward(self) -> jax.stages.Wrapped:
        """The network as it is evaluated: `(variables, images) -> outputs`, of images as the data set has them.

        Raises:
          ConfigError: the inputs' mean and deviation are not known.
        """
        self._check_measured()
        return jax.jit(step.make_forward(self.network, self._normalizer(), gather=self._gather_evaluated()))

    def jit_watched_forward(self, kernels: Sequence[str], *, logits: bool, unseen: dict[str, str]) -> jax.stages.Wrapped:
        """The same, with what the layers of these kernels return; see `step.make_watched_forward`.

        Raises:
          ConfigError: the inputs' mean and deviation are not known.
        """
        self._check_measured()
        gather = self._gather_evaluated()
        forward = step.make_watched_forward(
            self.network, self._normalizer(), kernels, logits=logits, unseen=unseen, gather=gather
        )
        return jax.jit(forward)

    def _check_measured(self) -> None:
        """Shapes do not depend on what the normaliser subtracts; what a network learns and computes does."""
        dataset = self.dataset
        if not (dataset.mean and dataset.std):
            raise ConfigError("config", [f"dataset.name: the mean and the deviation of {dataset.name} have not been measured"])

    def _jit_eval_step(self, classes: int = 0) -> jax.stages.Wrapped:
        eval_step = step.make_eval_step(
            self.network, self._normalizer(), objective=self.objective, gather=self._gather_evaluated(), classes=classes
        )

        def step_with_word(variables: dict[str, Any], batch: dict[str, jax.Array]) -> dict[str, Any]:
            batch, word = votes.split(batch)
            return {**eval_step(variables, batch), **word}

        return jax.jit(step_with_word, out_shardings=replicated(self.mesh))

    def _gather(self, params: Any) -> step.Gather:
        """Makes parameters, of these shapes, what a step computes with: not sharded over the axes that shard a batch.

        Otherwise the TPU's compiler shards the convolutions and passes slices of kernels around (CHANGELOG.md).
        """
        stored = _shardings(params)
        computed = gathered(stored)
        if computed == stored:  # an evaluation step may then serve networks of other ranks
            return lambda params: params
        return lambda params: jax.lax.with_sharding_constraint(params, computed)

    def _gather_evaluated(self) -> step.Gather:
        return self._gather(self.shapes.variables()[""]["params"])

    def lower_eval_step(self) -> jax.stages.Lowered:
        """The evaluation step of training, not compiled; the devices of the mesh need not exist."""
        batch = self._batch_shapes(self.config.eval.batch_size)
        batch["mask"] = jax.ShapeDtypeStruct(batch["label"].shape[:1], jnp.float32, sharding=batch["label"].sharding)
        return self._jit_eval_step().lower(self.shapes.variables()[""], batch)

    def _normalizer(self):
        return mixing.normalizer(self.dataset.mean, self.dataset.std)

    def _mixing(self) -> mixing.Mixing:
        data = self.config.dataset
        return mixing.Mixing(
            self._normalizer(),
            self.config.target_classes,
            label_smoothing=self.config.optim.label_smoothing,
            random_erasing=data.random_erasing,
            mixup=data.mixup,
            cutmix=data.cutmix,
        )

    def _batch_shapes(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        sharding = batch_sharding(self.mesh)
        fields = {
            name: jax.ShapeDtypeStruct((size, *field.shape), field.dtype, sharding=sharding)
            for name, field in self.dataset.fields.items()
        }
        return {**fields, **votes.batch_shapes(self.mesh)}


def build(
    config: Config,
    source: str = "config",
    devices: Sequence[Any] | int | None = None,
    plan: Plan | None = None,
    *,
    guided_steps: int = 0,
) -> Experiment:
    """Builds an experiment; nothing is computed and no data is read.

    Args:
      config: the experiment.
      source: what to call it in messages.
      devices: of the mesh, by default all of this machine's; a number stands for devices that need not exist.
      plan: the ranks, where they have been decided; None for the config's own.
      guided_steps: the length of self-guided training; 0 for a network without guides.

    Raises:
      ConfigError: the parts do not fit together.
    """
    dataset, network = config.description, config.build_network()
    mesh = _mesh(config, devices)
    plan = planned_for(mesh, config, plan or make_plan(config))
    init = functools.partial(init_weights, network, plan, blank_images(dataset), config.seed)
    known = calibration_shapes(plan, data_aware=config.lowrank.moment_batches > 0, loss=config.curvature)
    weights = jax.eval_shape(lambda known: guided(init(known)) if guided_steps else init(known), known)

    def make_optimizer(lr: Any) -> tuple[optax.Schedule, optax.GradientTransformation]:
        schedule = optim.make_schedule(
            config.optim,
            lr,
            total_steps=config.total_steps,
            in_steps=config.in_steps,
            extensions=[(end, how) for end, (_, how) in zip(config.phase_ends, config.extensions, strict=False)],
        )
        return schedule, optim.make_optimizer(config.optim, schedule, weights.params, _names_of_phases(config))

    try:
        _, optimizer = make_optimizer(config.peak_lr)
    except ValueError as error:
        raise ConfigError(source, [f"optim.decay_rules: {line}" for line in str(error).splitlines()]) from error
    fresh = functools.partial(fresh_state, optimizer=optimizer, ema=config.optim.ema_decay is not None)
    shapes = jax.eval_shape(fresh, weights)
    try:
        shardings = state_shardings(shapes, mesh, config.mesh.to_rules())
    except ValueError as error:
        raise ConfigError(source, [f"mesh.rules: {line}" for line in str(error).splitlines()]) from error
    shapes = _placed(shapes, shardings)
    return Experiment(config, dataset, network, plan, make_optimizer, mesh, shapes, guided_steps=guided_steps)


def _names_of_phases(config: Config) -> list[str]:
    """What the parameters that a budget or a warm-up decides about may be called, before and after."""
    if not (has_budget(config) or config.starts_dense):
        return []
    kernels = [kernel.name for kernel in plan_by_rules(config).kernels if kernel.choices]
    return [f"{name}{part}" for name in kernels for part in ("", "/u", "/v")]


def _mesh(config: Config, devices: Sequence[Any] | int | None) -> Mesh:
    if isinstance(devices, int):
        return absent_mesh(**config.mesh.sizes(devices))
    return make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.model, devices)


def planned_for(mesh: Mesh | AbstractMesh, config: Config, plan: Plan) -> Plan:
    """A plan of the config's network; if the devices of the mesh exist, with the execution of every kernel chosen for them."""
    if isinstance(mesh, AbstractMesh):
        return plan
    chip = chips.of_device(mesh.devices.flat[0])
    part = batch_shards(mesh) * config.optim.accumulate
    itemsize = jnp.dtype(config.model.dtype).itemsize
    return choose_execution(plan, chip, batch=max(1, config.batch_size // part), itemsize=itemsize)


def _shardings(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)


def _placed(shapes: Any, shardings: Any) -> Any:
    def place(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, shardings)
